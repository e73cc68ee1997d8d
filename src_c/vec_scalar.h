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
 *   HAS_MASKS      whether v_loadn and v_storen are as fast as v_load and v_store
 *   HAS_HALF_LOADS whether there are v_load_f16 and v_load_bf16, a vector of float from halves, and
 *                  v_store2_f16 and v_store2_bf16, two vectors rounded as below; without them
 *                  f32_from_f16 and its like
 *   HAS_BF16_INSTRUCTIONS  v_store2_bf16_quick, which returns 0 where it may be wrong; only for
 *                  CPUs of which fn_has_bf16_instructions is true
 *   CONVERT_STEP   how many elements f32_from_f16 and its like convert at a time, in memory; to bf16
 *                  and f16 they round to nearest even, NaN stays quiet NaN; vd8_store_f32_odd cuts
 *                  off, and sets the last bit of what is not exact
 *   v_compress     writes a whole vector that begins with the lanes whose mask bytes are not 0, in
 *                  order, and returns how many; v_keep makes the lanes +0 whose mask bytes are 0
 *   v_larger       the larger of each lane of a, none negative, and of |v|; NaN where one is NaN;
 *                  v_largest is the largest of a vector's lanes
 *   ints_T         whole numbers of 32 bits; v_nearest rounds half to even; v_clip127 clips to +-127, NaN
 *                  to +0; v_near_tie: whether a lower half in four vectors is less than 4; v_store_i8
 *                  writes the upper halves, within +-127, as int8
 *   v_fnma         c - a b with one rounding, as v_fma is a b + c
 *   v_max, v_min   of a, which is no NaN, and b; NaN where b is NaN. Of a +0 and a -0 it is either,
 *                  but v_max(-0, b) is b for both zeros
 *   v_power_of_2   2^k of 1.5 * 2^52 + 1023 + k (1.5 * 2^23 + 127 + k in f32); k is the exponent
 *                  of a normal number
 *   UNROLL_LONG    UNROLL, for loops of up to 16 rounds
 *   VECTORS_A_SWEEP_T  how many of a block's vectors registers have room for in a sweep with two
 *                  sums; AFFINE_ROWS, how many rows share the parameters in registers
 *   KEEP_IN_REGISTER  what has been loaded is not loaded again
 *   FMA_SUBTRACTS  whether adders, apart from multipliers, have more to do in a sum of deviations: every
 *                  other a - b is then a * 1 + -b, which has the same bits
 */
#include <limits.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "names.h"

#define FN_ISA scalar
#define VECTORS_A_SWEEP_f32 64
#define VECTORS_A_SWEEP_f64 32
#define AFFINE_ROWS 1
#define FMA_SUBTRACTS 0
#define KEEP_IN_REGISTER(v) (void)(v)
#define HAS_HALVES 0
#define HAS_HALF_LOADS 0
#define HAS_MASKS 0
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

/* ---- storage types, masks, int8 (convert.h) --------------------------------------------------- */

#define CONVERT_STEP 8

INLINE uint32_t bits_of_f32(float a)
{
    uint32_t bits;
    memcpy(&bits, &a, sizeof bits);
    return bits;
}
INLINE float f32_of_bits(uint32_t bits)
{
    float a;
    memcpy(&a, &bits, sizeof a);
    return a;
}
INLINE uint64_t bits_of_f64(double a)
{
    uint64_t bits;
    memcpy(&bits, &a, sizeof bits);
    return bits;
}

static float f32_of_f16(unsigned h)
{
    const uint32_t sign = (h & 0x8000) << 16, size = h & 0x7fff;
    if (size > 0x7c00) return f32_of_bits(sign | 0x7fc00000 | size << 13);
    if (size == 0x7c00) return f32_of_bits(sign | 0x7f800000);
    if (size < 0x400) return f32_of_bits(sign | bits_of_f32((float)size * 0x1p-24f));
    return f32_of_bits(sign | ((size << 13) + (112u << 23)));
}
static unsigned f16_of_f32(float a)
{
    const uint32_t bits = bits_of_f32(a), size = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    if (size > 0x7f800000) return sign | 0x7e00 | (size >> 13 & 0x3ff);
    if (size >= 0x477ff000) return sign | 0x7c00; /* 65,520, the middle past the largest */
    /* What is below the normal numbers counts in steps of 2^-24, which 0.5's last bit is. */
    if (size < 0x38800000) return sign | (bits_of_f32(f32_of_bits(size) + 0.5f) - 0x3f000000);
    return sign | (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
}
static unsigned bf16_of_f32(float a)
{
    const uint32_t bits = bits_of_f32(a);
    if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
/* To nearest, then back to what a cut would have left, with its last bit set. */
static float f32_of_f64_odd(double a)
{
    const float nearest = (float)a;
    const double back = (double)nearest;
    if (back == a) return nearest;
    return f32_of_bits((bits_of_f32(nearest) - (fabs(back) > fabs(a))) | 1);
}

INLINE void f32_from_f16(float *into, const uint16_t *from)
{
    for (int j = 0; j < 8; j++) into[j] = f32_of_f16(from[j]);
}
INLINE void f16_from_f32(uint16_t *into, const float *from)
{
    for (int j = 0; j < 8; j++) into[j] = (uint16_t)f16_of_f32(from[j]);
}
INLINE void f32_from_bf16(float *into, const uint16_t *from)
{
    for (int j = 0; j < 8; j++) into[j] = f32_of_bits((uint32_t)from[j] << 16);
}
INLINE void bf16_from_f32(uint16_t *into, const float *from)
{
    for (int j = 0; j < 8; j++) into[j] = (uint16_t)bf16_of_f32(from[j]);
}
INLINE void vd8_store_f32_odd(float *p, vd8 a)
{
    for (int j = 0; j < 8; j++) p[j] = f32_of_f64_odd(a.d[j]);
}

#define SCALAR_MASKS_AND_INT8(T, type, abs_of_type)                                                \
    INLINE ptrdiff_t v_compress_##T(type *into, vec_##T v, const unsigned char *mask)              \
    {                                                                                              \
        *into = v;                                                                                 \
        return *mask != 0;                                                                         \
    }                                                                                              \
    INLINE vec_##T v_keep_##T(vec_##T v, const unsigned char *mask) { return *mask ? v : 0; }      \
    INLINE vec_##T v_larger_##T(vec_##T a, vec_##T v)                                              \
    {                                                                                              \
        const type size = abs_of_type(v);                                                          \
        return bits_of_##T(size) > bits_of_##T(a) ? size : a;                                      \
    }                                                                                              \
    INLINE type v_largest_##T(vec_##T a) { return a; }                                             \
    INLINE vec_##T v_div_##T(vec_##T a, vec_##T b) { return a / b; }                               \
    INLINE vec_##T v_clip127_##T(vec_##T a)                                                        \
    {                                                                                              \
        return a != a ? 0 : a < -127 ? -127 : a > 127 ? 127 : a;                                   \
    }                                                                                              \
    typedef int ints_##T;                                                                          \
    INLINE ints_##T v_nearest_##T(vec_##T a)                                                       \
    {                                                                                              \
        return abs_of_type(a) < 0x1p30f ? (int)lrint((double)a) : INT_MIN;                         \
    }                                                                                              \
    INLINE int v_near_tie_##T(const ints_##T a[4])                                                 \
    {                                                                                              \
        int near = 0;                                                                              \
        for (int j = 0; j < 4; j++) near |= (a[j] & 0xffff) < 4;                                   \
        return near;                                                                               \
    }                                                                                              \
    INLINE void v_store_i8_##T(signed char *into, const ints_##T a[4])                             \
    {                                                                                              \
        for (int j = 0; j < 4; j++) into[j] = (signed char)(a[j] >> 16);                           \
    }

SCALAR_MASKS_AND_INT8(f32, float, fabsf)
SCALAR_MASKS_AND_INT8(f64, double, fabs)

/* ---- activations (activation.h) -------------------------------------------------------------- */

#define UNROLL_LONG

#define SCALAR_ACTIVATION_WORDS(T, type, bits, mantissa, fma_of_type, abs_of_type)                 \
    INLINE vec_##T v_fnma_##T(vec_##T a, vec_##T b, vec_##T c) { return fma_of_type(-a, b, c); }   \
    INLINE vec_##T v_max_##T(vec_##T a, vec_##T b) { return a > b ? a : b; }                       \
    INLINE vec_##T v_min_##T(vec_##T a, vec_##T b) { return a < b ? a : b; }                       \
    INLINE vec_##T v_abs_##T(vec_##T a) { return abs_of_type(a); }                                 \
    INLINE vec_##T v_power_of_2_##T(vec_##T a)                                                     \
    {                                                                                              \
        bits shifted;                                                                              \
        memcpy(&shifted, &a, sizeof a);                                                            \
        shifted <<= mantissa;                                                                      \
        memcpy(&a, &shifted, sizeof a);                                                            \
        return a;                                                                                  \
    }

SCALAR_ACTIVATION_WORDS(f32, float, uint32_t, 23, fmaf, fabsf)
SCALAR_ACTIVATION_WORDS(f64, double, uint64_t, 52, fma, fabs)

INLINE void v_fence(void) {}
