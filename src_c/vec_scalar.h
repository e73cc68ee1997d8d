/* vec_scalar.h: the vector vocabulary in plain C, one element a vector, and what each word means.
 *
 *   vd8            eight doubles; vd8_hsum adds them as (j, j + 4), (j, j + 2), (j, j + 1), and
 *                  vd8_hsum8 does so for eight at once; vd8_le gives bit j where a[j] <= b[j]
 *   vec_T          VW_T elements of T; v_loadn reads the first n < VW_T and leaves +0 in the rest,
 *                  v_storen writes the first n, v_firstn keeps the first n and makes the rest +0;
 *                  v_stream writes an aligned vector past the cache
 *   wide_T         a quarter of a block's lanes as doubles; v_fold adds lanes (j, j + LANES/2) and
 *                  (j, j + LANES/4) in T and widens what is left; wide_vd8 folds it to eight
 *   VECTORS_A_SWEEP_T  how many of a block's vectors registers have room for in a sweep with two
 *                  sums; AFFINE_ROWS, how many rows share the parameters in registers
 */
#include <math.h>

#define FN_ISA scalar
#define VECTORS_A_SWEEP_f32 64
#define VECTORS_A_SWEEP_f64 32
#define AFFINE_ROWS 1
#define UNROLL

typedef struct {
    double d[8];
} vd8;

#define VD8_MAP(expression)                                                                        \
    vd8 r;                                                                                         \
    for (int j = 0; j < 8; j++) r.d[j] = (expression);                                             \
    return r

static inline vd8 vd8_set1(double a) { VD8_MAP(a); }
static inline vd8 vd8_load(const double *p) { VD8_MAP(p[j]); }
static inline vd8 vd8_add(vd8 a, vd8 b) { VD8_MAP(a.d[j] + b.d[j]); }
static inline vd8 vd8_sub(vd8 a, vd8 b) { VD8_MAP(a.d[j] - b.d[j]); }
static inline vd8 vd8_mul(vd8 a, vd8 b) { VD8_MAP(a.d[j] * b.d[j]); }
static inline vd8 vd8_div(vd8 a, vd8 b) { VD8_MAP(a.d[j] / b.d[j]); }
static inline vd8 vd8_sqrt(vd8 a) { VD8_MAP(sqrt(a.d[j])); }
static inline void vd8_store_f64(double *p, vd8 a)
{
    for (int j = 0; j < 8; j++) p[j] = a.d[j];
}
static inline void vd8_store_f32(float *p, vd8 a)
{
    for (int j = 0; j < 8; j++) p[j] = (float)a.d[j];
}
static inline unsigned vd8_le(vd8 a, vd8 b)
{
    unsigned bits = 0;
    for (int j = 0; j < 8; j++) bits |= (unsigned)(a.d[j] <= b.d[j]) << j;
    return bits;
}
static inline double vd8_hsum(vd8 a)
{
    for (int half = 4; half; half /= 2)
        for (int j = 0; j < half; j++) a.d[j] += a.d[j + half];
    return a.d[0];
}
static inline vd8 vd8_hsum8(const vd8 r[8])
{
    vd8 sums;
    for (int j = 0; j < 8; j++) sums.d[j] = vd8_hsum(r[j]);
    return sums;
}

/* ---- float and double ------------------------------------------------------------------------- */

#define SCALAR_VOCABULARY(T, type, lanes, fma_of_type)                                             \
    typedef type vec_##T;                                                                          \
    static inline vec_##T v_zero_##T(void) { return 0; }                                           \
    static inline vec_##T v_set1_##T(type a) { return a; }                                         \
    static inline vec_##T v_load_##T(const type *p) { return *p; }                                 \
    static inline vec_##T v_loadn_##T(const type *p, ptrdiff_t n) { return n > 0 ? *p : 0; }       \
    static inline void v_store_##T(type *p, vec_##T a) { *p = a; }                                 \
    static inline void v_storen_##T(type *p, vec_##T a, ptrdiff_t n)                               \
    {                                                                                              \
        if (n > 0) *p = a;                                                                         \
    }                                                                                              \
    static inline void v_stream_##T(type *p, vec_##T a) { *p = a; }                                \
    static inline vec_##T v_firstn_##T(vec_##T a, ptrdiff_t n) { return n > 0 ? a : 0; }           \
    static inline vec_##T v_add_##T(vec_##T a, vec_##T b) { return a + b; }                        \
    static inline vec_##T v_sub_##T(vec_##T a, vec_##T b) { return a - b; }                        \
    static inline vec_##T v_mul_##T(vec_##T a, vec_##T b) { return a * b; }                        \
    static inline vec_##T v_fma_##T(vec_##T a, vec_##T b, vec_##T c)                               \
    {                                                                                              \
        return fma_of_type(a, b, c);                                                               \
    }                                                                                              \
    typedef struct {                                                                               \
        double d[lanes / 4];                                                                       \
    } wide_##T;                                                                                    \
    static inline wide_##T v_fold_##T(const vec_##T *a)                                            \
    {                                                                                              \
        wide_##T r;                                                                                \
        for (int j = 0; j < lanes / 4; j++) {                                                      \
            const type low = a[j] + a[j + lanes / 2];                                              \
            const type high = a[j + lanes / 4] + a[j + lanes / 4 * 3];                             \
            r.d[j] = (double)(type)(low + high);                                                   \
        }                                                                                          \
        return r;                                                                                  \
    }                                                                                              \
    static inline wide_##T wide_add_##T(wide_##T a, wide_##T b)                                    \
    {                                                                                              \
        for (int j = 0; j < lanes / 4; j++) a.d[j] += b.d[j];                                      \
        return a;                                                                                  \
    }                                                                                              \
    static inline vd8 wide_vd8_##T(wide_##T a)                                                     \
    {                                                                                              \
        VD8_MAP(lanes / 4 > 8 ? a.d[j] + a.d[j + lanes / 4 - 8] : a.d[j]);                         \
    }

#define VW_f32 1
#define VW_f64 1
SCALAR_VOCABULARY(f32, float, 64, fmaf)
SCALAR_VOCABULARY(f64, double, 32, fma)

static inline void v_fence(void) {}
