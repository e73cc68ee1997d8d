/* vec_scalar.h: the vector vocabulary in plain C, one element a vector, and what each word means.
 *
 *   vd8            eight doubles; vd8_hsum adds them as (j, j + 4), (j, j + 2), (j, j + 1), and
 *                  vd8_hsum8 does so for eight at once; vd8_le gives bit j where a[j] <= b[j]
 *   vec_T          VW_T elements of T; v_loadn reads the first n, from 0 to VW_T, and leaves +0 in
 *                  the rest, v_storen writes the first n, v_firstn keeps the first n and makes the
 *                  rest +0; v_stream writes an aligned vector past the cache
 *   quarter_T      a quarter of a block's lanes; v_fold makes it by adding lanes (j, j + LANES/2),
 *                  then (j, j + LANES/4), given all of a block's vectors or the first 1, 2 or 4 of
 *                  them where no other lane holds anything; quarter_hsum goes on halving, in T, to
 *                  one sum, quarter_hsum8 does so for eight
 *   wide_T         a quarter of the lanes in double, to which wide_add adds a block's; wide_hsum
 *                  halves them, in double, to one sum
 *   HAS_HALVES     whether there is v_halves, p[2k] in the first half of a vector and p[2k + 1] in
 *                  the second, and halves_hsum8, the sums of eight halves, halving as quarter_hsum does
 *   VECTORS_A_SWEEP_T  how many of a block's vectors registers have room for in a sweep with two
 *                  sums; AFFINE_ROWS, how many rows share the parameters in registers
 */
#include <math.h>

#include "names.h"

#define FN_ISA scalar
#define VECTORS_A_SWEEP_f32 64
#define VECTORS_A_SWEEP_f64 32
#define AFFINE_ROWS 1
#define HAS_HALVES 0
#define UNROLL

typedef struct {
    double d[8];
} vd8;

#define VD8_MAP(expression)                                                                        \
    vd8 r;                                                                                         \
    for (int j = 0; j < 8; j++) r.d[j] = (expression);                                             \
    return r

INLINE vd8 vd8_set1(double a) { VD8_MAP(a); }
INLINE vd8 vd8_load_f64(const double *p) { VD8_MAP(p[j]); }
INLINE vd8 vd8_load_f32(const float *p) { VD8_MAP((double)p[j]); }
INLINE vd8 vd8_add(vd8 a, vd8 b) { VD8_MAP(a.d[j] + b.d[j]); }
INLINE vd8 vd8_sub(vd8 a, vd8 b) { VD8_MAP(a.d[j] - b.d[j]); }
INLINE vd8 vd8_mul(vd8 a, vd8 b) { VD8_MAP(a.d[j] * b.d[j]); }
INLINE vd8 vd8_div(vd8 a, vd8 b) { VD8_MAP(a.d[j] / b.d[j]); }
INLINE vd8 vd8_sqrt(vd8 a) { VD8_MAP(sqrt(a.d[j])); }
INLINE void vd8_store_f64(double *p, vd8 a)
{
    for (int j = 0; j < 8; j++) p[j] = a.d[j];
}
INLINE void vd8_store_f32(float *p, vd8 a)
{
    for (int j = 0; j < 8; j++) p[j] = (float)a.d[j];
}
INLINE unsigned vd8_le(vd8 a, vd8 b)
{
    unsigned bits = 0;
    for (int j = 0; j < 8; j++) bits |= (unsigned)(a.d[j] <= b.d[j]) << j;
    return bits;
}
INLINE double vd8_hsum(vd8 a)
{
    for (int half = 4; half; half /= 2)
        for (int j = 0; j < half; j++) a.d[j] += a.d[j + half];
    return a.d[0];
}
INLINE vd8 vd8_hsum8(const vd8 r[8])
{
    vd8 sums;
    for (int j = 0; j < 8; j++) sums.d[j] = vd8_hsum(r[j]);
    return sums;
}

/* ---- float and double ------------------------------------------------------------------------- */

#define SCALAR_VOCABULARY(T, type, lanes, fma_of_type)                                             \
    typedef type vec_##T;                                                                          \
    INLINE vec_##T v_zero_##T(void) { return 0; }                                           \
    INLINE vec_##T v_set1_##T(type a) { return a; }                                         \
    INLINE vec_##T v_load_##T(const type *p) { return *p; }                                 \
    INLINE vec_##T v_loadn_##T(const type *p, ptrdiff_t n) { return n > 0 ? *p : 0; }       \
    INLINE void v_store_##T(type *p, vec_##T a) { *p = a; }                                 \
    INLINE void v_storen_##T(type *p, vec_##T a, ptrdiff_t n)                               \
    {                                                                                              \
        if (n > 0) *p = a;                                                                         \
    }                                                                                              \
    INLINE void v_stream_##T(type *p, vec_##T a) { *p = a; }                                \
    INLINE vec_##T v_firstn_##T(vec_##T a, ptrdiff_t n) { return n > 0 ? a : 0; }           \
    INLINE vec_##T v_add_##T(vec_##T a, vec_##T b) { return a + b; }                        \
    INLINE vec_##T v_sub_##T(vec_##T a, vec_##T b) { return a - b; }                        \
    INLINE vec_##T v_mul_##T(vec_##T a, vec_##T b) { return a * b; }                        \
    INLINE vec_##T v_fma_##T(vec_##T a, vec_##T b, vec_##T c)                               \
    {                                                                                              \
        return fma_of_type(a, b, c);                                                               \
    }                                                                                              \
    typedef struct {                                                                               \
        type q[lanes / 4];                                                                         \
    } quarter_##T;                                                                                 \
    INLINE quarter_##T v_fold_##T(const vec_##T *a, const int count)                               \
    {                                                                                              \
        quarter_##T r = {{0}};                                                                     \
        if (count < lanes)                                                                         \
            for (int j = 0; j < count; j++) r.q[j] = a[j];                                         \
        else                                                                                       \
            for (int j = 0; j < lanes / 4; j++)                                                    \
                r.q[j] = (a[j] + a[j + lanes / 2]) + (a[j + lanes / 4] + a[j + lanes / 4 * 3]);    \
        return r;                                                                                  \
    }                                                                                              \
    INLINE double quarter_hsum_##T(quarter_##T a)                                                  \
    {                                                                                              \
        for (int half = lanes / 8; half; half /= 2)                                                \
            for (int j = 0; j < half; j++) a.q[j] += a.q[j + half];                                \
        return (double)a.q[0];                                                                     \
    }                                                                                              \
    INLINE vd8 quarter_hsum8_##T(const quarter_##T *a) { VD8_MAP(quarter_hsum_##T(a[j])); }        \
    typedef struct {                                                                               \
        double d[lanes / 4];                                                                       \
    } wide_##T;                                                                                    \
    INLINE wide_##T wide_zero_##T(void)                                                            \
    {                                                                                              \
        return (wide_##T){{0}};                                                                    \
    }                                                                                              \
    INLINE wide_##T wide_add_##T(wide_##T a, quarter_##T q)                                        \
    {                                                                                              \
        for (int j = 0; j < lanes / 4; j++) a.d[j] += (double)q.q[j];                              \
        return a;                                                                                  \
    }                                                                                              \
    INLINE double wide_hsum_##T(wide_##T a)                                                        \
    {                                                                                              \
        for (int half = lanes / 8; half; half /= 2)                                                \
            for (int j = 0; j < half; j++) a.d[j] += a.d[j + half];                                \
        return a.d[0];                                                                             \
    }

#define VW_f32 1
#define VW_f64 1
SCALAR_VOCABULARY(f32, float, 64, fmaf)
SCALAR_VOCABULARY(f64, double, 32, fma)

INLINE void v_fence(void) {}
