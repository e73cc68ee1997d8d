/* vec_avx512.h: the vector vocabulary in AVX-512 F, DQ, BW and VL. vec_scalar.h says what each
 * word means. */
#include <immintrin.h>
#include <stdint.h>

#include "names.h"

#define FN_ISA avx512
#define VECTORS_A_SWEEP_f32 4
#define VECTORS_A_SWEEP_f64 4
#define AFFINE_ROWS 4
#define HAS_HALVES 1
#define HAS_MASKS 1
#define HAS_HALF_LOADS 1
#define KEEP_IN_REGISTER(v) __asm__("" : "+v"(v))
#define FMA_SUBTRACTS 1
#define UNROLL _Pragma("GCC unroll 8")

/* ---- eight doubles ---------------------------------------------------------------------------- */

typedef __m512d vd8;

INLINE vd8 vd8_set1(double a) { return _mm512_set1_pd(a); }
INLINE vd8 vd8_load_f64(const double *p) { return _mm512_loadu_pd(p); }
INLINE vd8 vd8_load_f32(const float *p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
INLINE void vd8_store_f32(float *p, vd8 a) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(a)); }
INLINE void vd8_store_f64(double *p, vd8 a) { _mm512_storeu_pd(p, a); }
INLINE vd8 vd8_add(vd8 a, vd8 b) { return _mm512_add_pd(a, b); }
INLINE vd8 vd8_sub(vd8 a, vd8 b) { return _mm512_sub_pd(a, b); }
INLINE vd8 vd8_mul(vd8 a, vd8 b) { return _mm512_mul_pd(a, b); }
INLINE vd8 vd8_div(vd8 a, vd8 b) { return _mm512_div_pd(a, b); }
INLINE vd8 vd8_sqrt(vd8 a) { return _mm512_sqrt_pd(a); }
INLINE unsigned vd8_le(vd8 a, vd8 b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }

INLINE double vd8_hsum(vd8 a)
{
    const __m256d b = _mm256_add_pd(_mm512_castpd512_pd256(a), _mm512_extractf64x4_pd(a, 1));
    const __m128d c = _mm_add_pd(_mm256_castpd256_pd128(b), _mm256_extractf128_pd(b, 1));
    return _mm_cvtsd_f64(_mm_add_sd(c, _mm_unpackhi_pd(c, c)));
}

/* Halves of two vectors side by side, added: four sums of each from eight. */
INLINE __m512d add_halves(__m512d a, __m512d b)
{
    return _mm512_add_pd(_mm512_shuffle_f64x2(a, b, 0x44), _mm512_shuffle_f64x2(a, b, 0xee));
}

INLINE __m512d add_quarters(__m512d a, __m512d b)
{
    return _mm512_add_pd(_mm512_shuffle_f64x2(a, b, 0x88), _mm512_shuffle_f64x2(a, b, 0xdd));
}

INLINE vd8 vd8_hsum8(const vd8 r[8])
{
    const __m512d p04 = add_halves(r[0], r[4]), p15 = add_halves(r[1], r[5]);
    const __m512d p26 = add_halves(r[2], r[6]), p37 = add_halves(r[3], r[7]);
    const __m512d p0246 = add_quarters(p04, p26), p1357 = add_quarters(p15, p37);
    const __m512d sums = _mm512_add_pd(_mm512_unpacklo_pd(p0246, p1357),
                                       _mm512_unpackhi_pd(p0246, p1357)); /* rows 0 1 4 5 2 3 6 7 */
    return _mm512_shuffle_f64x2(sums, sums, 0xd8);
}

/* ---- float ------------------------------------------------------------------------------------ */

typedef __m512 vec_f32;
#define VW_f32 16

INLINE __mmask16 first_f32(ptrdiff_t n) { return (__mmask16)_bzhi_u32(0xffff, (unsigned)n); }
INLINE vec_f32 v_zero_f32(void) { return _mm512_setzero_ps(); }
INLINE vec_f32 v_set1_f32(float a) { return _mm512_set1_ps(a); }
INLINE vec_f32 v_load_f32(const float *p) { return _mm512_loadu_ps(p); }
INLINE vec_f32 v_loadn_f32(const float *p, ptrdiff_t n)
{
    return _mm512_maskz_loadu_ps(first_f32(n), p);
}
INLINE void v_store_f32(float *p, vec_f32 a) { _mm512_storeu_ps(p, a); }
INLINE void v_storen_f32(float *p, vec_f32 a, ptrdiff_t n)
{
    _mm512_mask_storeu_ps(p, first_f32(n), a);
}
INLINE void v_stream_f32(float *p, vec_f32 a) { _mm512_stream_ps(p, a); }
INLINE vec_f32 v_firstn_f32(vec_f32 a, ptrdiff_t n)
{
    return _mm512_maskz_mov_ps(first_f32(n), a);
}
INLINE vec_f32 v_add_f32(vec_f32 a, vec_f32 b) { return _mm512_add_ps(a, b); }
INLINE vec_f32 v_sub_f32(vec_f32 a, vec_f32 b) { return _mm512_sub_ps(a, b); }
INLINE vec_f32 v_mul_f32(vec_f32 a, vec_f32 b) { return _mm512_mul_ps(a, b); }
INLINE vec_f32 v_fma_f32(vec_f32 a, vec_f32 b, vec_f32 c) { return _mm512_fmadd_ps(a, b, c); }

typedef __m512 quarter_f32;
typedef struct {
    vd8 lo, hi;
} wide_f32;

INLINE quarter_f32 v_fold_f32(const vec_f32 *a, const int count)
{
    if (count == 1) return a[0];
    if (count == 2) return _mm512_add_ps(a[0], a[1]);
    return _mm512_add_ps(_mm512_add_ps(a[0], a[2]), _mm512_add_ps(a[1], a[3]));
}

INLINE double quarter_hsum_f32(quarter_f32 a)
{
    const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return (double)_mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}

/* The second half of each 128 bits of two vectors, added to the first: sums of 2 from sums of 4. */
#define ADD_SECOND_128(a, b, first, second)                                                        \
    _mm512_add_ps(_mm512_shuffle_f32x4(a, b, first), _mm512_shuffle_f32x4(a, b, second))

INLINE vd8 quarter_hsum8_f32(const quarter_f32 r[8])
{
    const __m512 p04 = ADD_SECOND_128(r[0], r[4], 0x44, 0xee);
    const __m512 p15 = ADD_SECOND_128(r[1], r[5], 0x44, 0xee);
    const __m512 p26 = ADD_SECOND_128(r[2], r[6], 0x44, 0xee);
    const __m512 p37 = ADD_SECOND_128(r[3], r[7], 0x44, 0xee);
    const __m512 p0426 = ADD_SECOND_128(p04, p26, 0x88, 0xdd);
    const __m512 p1537 = ADD_SECOND_128(p15, p37, 0x88, 0xdd);
    const __m512 pairs = _mm512_add_ps(_mm512_shuffle_ps(p0426, p1537, 0x44),
                                       _mm512_shuffle_ps(p0426, p1537, 0xee));
    const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(pairs, pairs, 0x88),
                                      _mm512_shuffle_ps(pairs, pairs, 0xdd));
    /* 128 bits each: rows 0 1, 4 5, 2 3, 6 7 */
    const __m512i order = _mm512_setr_epi64(0, 4, 2, 6, 0, 0, 0, 0);
    const __m512d ordered = _mm512_permutexvar_pd(order, _mm512_castps_pd(sums));
    return _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_castpd512_pd256(ordered)));
}

/* ---- two rows of half a vector side by side ---- */

INLINE vec_f32 v_halves_f32(const float p[8], const int k)
{
    return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(p[2 * k]), _mm512_set1_ps(p[2 * k + 1]));
}

INLINE vd8 halves_hsum8_f32(const vec_f32 v[4])
{
    const __m512 r0123 = ADD_SECOND_128(v[0], v[1], 0x88, 0xdd);
    const __m512 r4567 = ADD_SECOND_128(v[2], v[3], 0x88, 0xdd);
    const __m512 pairs =
        _mm512_add_ps(_mm512_shuffle_ps(r0123, r4567, 0x44), _mm512_shuffle_ps(r0123, r4567, 0xee));
    const __m512 sums =
        _mm512_add_ps(_mm512_shuffle_ps(pairs, pairs, 0x88), _mm512_shuffle_ps(pairs, pairs, 0xdd));
    /* 128 bits each: rows 0 4, 1 5, 2 6, 3 7 */
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_cvtps_pd(_mm512_castps512_ps256(_mm512_permutexvar_ps(order, sums)));
}

INLINE wide_f32 wide_zero_f32(void) { return (wide_f32){vd8_set1(0), vd8_set1(0)}; }
INLINE wide_f32 wide_add_f32(wide_f32 a, quarter_f32 q)
{
    return (wide_f32){vd8_add(a.lo, _mm512_cvtps_pd(_mm512_castps512_ps256(q))),
                      vd8_add(a.hi, _mm512_cvtps_pd(_mm512_extractf32x8_ps(q, 1)))};
}
INLINE double wide_hsum_f32(wide_f32 a) { return vd8_hsum(vd8_add(a.lo, a.hi)); }

/* ---- double ----------------------------------------------------------------------------------- */

typedef __m512d vec_f64;
#define VW_f64 8

INLINE __mmask8 first_f64(ptrdiff_t n) { return (__mmask8)_bzhi_u32(0xff, (unsigned)n); }
INLINE vec_f64 v_zero_f64(void) { return _mm512_setzero_pd(); }
INLINE vec_f64 v_set1_f64(double a) { return _mm512_set1_pd(a); }
INLINE vec_f64 v_load_f64(const double *p) { return _mm512_loadu_pd(p); }
INLINE vec_f64 v_loadn_f64(const double *p, ptrdiff_t n)
{
    return _mm512_maskz_loadu_pd(first_f64(n), p);
}
INLINE void v_store_f64(double *p, vec_f64 a) { _mm512_storeu_pd(p, a); }
INLINE void v_storen_f64(double *p, vec_f64 a, ptrdiff_t n)
{
    _mm512_mask_storeu_pd(p, first_f64(n), a);
}
INLINE void v_stream_f64(double *p, vec_f64 a) { _mm512_stream_pd(p, a); }
INLINE vec_f64 v_firstn_f64(vec_f64 a, ptrdiff_t n)
{
    return _mm512_maskz_mov_pd(first_f64(n), a);
}
INLINE vec_f64 v_add_f64(vec_f64 a, vec_f64 b) { return _mm512_add_pd(a, b); }
INLINE vec_f64 v_sub_f64(vec_f64 a, vec_f64 b) { return _mm512_sub_pd(a, b); }
INLINE vec_f64 v_mul_f64(vec_f64 a, vec_f64 b) { return _mm512_mul_pd(a, b); }
INLINE vec_f64 v_fma_f64(vec_f64 a, vec_f64 b, vec_f64 c) { return _mm512_fmadd_pd(a, b, c); }

typedef vd8 quarter_f64, wide_f64;

INLINE quarter_f64 v_fold_f64(const vec_f64 *a, const int count)
{
    if (count == 1) return a[0];
    if (count == 2) return _mm512_add_pd(a[0], a[1]);
    return _mm512_add_pd(_mm512_add_pd(a[0], a[2]), _mm512_add_pd(a[1], a[3]));
}

INLINE vec_f64 v_halves_f64(const double p[8], const int k)
{
    return _mm512_mask_blend_pd(0xf0, _mm512_set1_pd(p[2 * k]), _mm512_set1_pd(p[2 * k + 1]));
}

INLINE vd8 halves_hsum8_f64(const vec_f64 v[4])
{
    const __m512d r0123 = add_quarters(v[0], v[1]), r4567 = add_quarters(v[2], v[3]);
    const __m512d sums =
        _mm512_add_pd(_mm512_unpacklo_pd(r0123, r4567), _mm512_unpackhi_pd(r0123, r4567));
    return _mm512_permutexvar_pd(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), sums);
}

INLINE double quarter_hsum_f64(quarter_f64 a) { return vd8_hsum(a); }
INLINE vd8 quarter_hsum8_f64(const quarter_f64 r[8]) { return vd8_hsum8(r); }
INLINE wide_f64 wide_zero_f64(void) { return vd8_set1(0); }
INLINE wide_f64 wide_add_f64(wide_f64 a, quarter_f64 q) { return vd8_add(a, q); }
INLINE double wide_hsum_f64(wide_f64 a) { return vd8_hsum(a); }

/* ---- storage types, masks, int8 (convert.h) --------------------------------------------------- */

#define CONVERT_STEP 32

INLINE vec_f32 v_load_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p));
}
INLINE vec_f32 v_load_bf16(const uint16_t *p)
{
    const __m256i h = _mm256_loadu_si256((const void *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
INLINE void v_store2_f16(uint16_t *p, vec_f32 a, vec_f32 b)
{
    _mm256_storeu_si256((void *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    _mm256_storeu_si256((void *)(p + 16), _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
}
/* The upper halves, and one more where the lower is above the middle, or is the middle while the
 * upper is odd. A NaN stays one when its lower half goes, and becomes quiet. */
INLINE void v_store2_bf16(uint16_t *p, vec_f32 a, vec_f32 b)
{
    const __m512i ai = _mm512_castps_si512(a), bi = _mm512_castps_si512(b);
    const __m512i ones = _mm512_set1_epi16(1);
    const __m512i odd_places = _mm512_setr_epi32(
        0x030001, 0x070005, 0x0b0009, 0x0f000d, 0x130011, 0x170015, 0x1b0019, 0x1f001d, 0x230021,
        0x270025, 0x2b0029, 0x2f002d, 0x330031, 0x370035, 0x3b0039, 0x3f003d);
    const __m512i even_places = _mm512_sub_epi16(odd_places, ones);
    const __m512i high = _mm512_permutex2var_epi16(ai, odd_places, bi);
    const __m512i low = _mm512_permutex2var_epi16(ai, even_places, bi);
    const __m512i above = _mm512_adds_epu16(low, _mm512_and_si512(high, ones));
    const __mmask32 up = _mm512_cmpgt_epu16_mask(above, _mm512_set1_epi16((short)0x8000));
    __m512i rounded = _mm512_mask_add_epi16(high, up, high, ones);
    if (__builtin_expect(_mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q), 0)) {
        const __mmask32 nan = _mm512_kunpackw(_mm512_cmp_ps_mask(b, b, _CMP_UNORD_Q),
                                              _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q));
        const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi16(0x40));
        rounded = _mm512_mask_mov_epi16(rounded, nan, quiet);
    }
    _mm512_storeu_si512(p, rounded);
}
#define HAS_BF16_INSTRUCTIONS 1
/* It makes zeros of numbers below the normal ones, so these are looked for. In words of the
 * assembler's, as the compiler has none for what the rest of this file may not use. */
INLINE int v_store2_bf16_quick(uint16_t *p, vec_f32 a, vec_f32 b)
{
    __m512i rounded;
    __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(rounded) : "v"(a), "v"(b));
    _mm512_storeu_si512(p, rounded);
    const int subnormal = 0x20;
    return !(_mm512_fpclass_ps_mask(a, subnormal) | _mm512_fpclass_ps_mask(b, subnormal));
}
INLINE void vd8_store_f32_odd(float *p, vd8 a)
{
    const __m256 cut = _mm512_cvt_roundpd_ps(a, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    const __mmask8 inexact = _mm512_cmp_pd_mask(_mm512_cvtps_pd(cut), a, _CMP_NEQ_UQ);
    const __m256i bits = _mm256_castps_si256(cut);
    _mm256_storeu_si256((void *)p,
                        _mm256_mask_or_epi32(bits, inexact, bits, _mm256_set1_epi32(1)));
}

INLINE __mmask16 mask_f32(const unsigned char *mask)
{
    const __m128i bytes = _mm_loadu_si128((const void *)mask);
    return _mm_test_epi8_mask(bytes, bytes);
}
INLINE __mmask8 mask_f64(const unsigned char *mask)
{
    const __m128i bytes = _mm_loadl_epi64((const void *)mask);
    return (__mmask8)_mm_test_epi8_mask(bytes, bytes);
}
/* In a register first: straight to memory is many times as slow on some CPUs. */
INLINE ptrdiff_t v_compress_f32(float *into, vec_f32 v, const unsigned char *mask)
{
    const __mmask16 kept = mask_f32(mask);
    _mm512_storeu_ps(into, _mm512_maskz_compress_ps(kept, v));
    return __builtin_popcount(kept);
}
INLINE ptrdiff_t v_compress_f64(double *into, vec_f64 v, const unsigned char *mask)
{
    const __mmask8 kept = mask_f64(mask);
    _mm512_storeu_pd(into, _mm512_maskz_compress_pd(kept, v));
    return __builtin_popcount(kept);
}
INLINE vec_f32 v_keep_f32(vec_f32 v, const unsigned char *mask)
{
    return _mm512_maskz_mov_ps(mask_f32(mask), v);
}
INLINE vec_f64 v_keep_f64(vec_f64 v, const unsigned char *mask)
{
    return _mm512_maskz_mov_pd(mask_f64(mask), v);
}

/* As integers NaN is larger than infinity. */
INLINE vec_f32 v_larger_f32(vec_f32 a, vec_f32 v)
{
    const __m512i size = _mm512_castps_si512(_mm512_abs_ps(v));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), size));
}
INLINE float v_largest_f32(vec_f32 a)
{
    const int bits = _mm512_reduce_max_epi32(_mm512_castps_si512(a));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
}
INLINE vec_f64 v_larger_f64(vec_f64 a, vec_f64 v)
{
    const __m512i size = _mm512_castpd_si512(_mm512_abs_pd(v));
    return _mm512_castsi512_pd(_mm512_max_epi64(_mm512_castpd_si512(a), size));
}
INLINE double v_largest_f64(vec_f64 a)
{
    const long long bits = _mm512_reduce_max_epi64(_mm512_castpd_si512(a));
    return _mm_cvtsd_f64(_mm_castsi128_pd(_mm_cvtsi64_si128(bits)));
}

INLINE vec_f32 v_div_f32(vec_f32 a, vec_f32 b) { return _mm512_div_ps(a, b); }
INLINE vec_f64 v_div_f64(vec_f64 a, vec_f64 b) { return _mm512_div_pd(a, b); }
INLINE vec_f32 v_clip127_f32(vec_f32 a)
{
    const __m512 clipped = _mm512_max_ps(_mm512_set1_ps(-127), a);
    const __mmask16 number = _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q);
    return _mm512_maskz_min_ps(number, _mm512_set1_ps(127), clipped);
}
INLINE vec_f64 v_clip127_f64(vec_f64 a)
{
    const __m512d clipped = _mm512_max_pd(_mm512_set1_pd(-127), a);
    const __mmask8 number = _mm512_cmp_pd_mask(a, a, _CMP_ORD_Q);
    return _mm512_maskz_min_pd(number, _mm512_set1_pd(127), clipped);
}

typedef __m512i ints_f32;
typedef __m256i ints_f64;
INLINE ints_f32 v_nearest_f32(vec_f32 a) { return _mm512_cvtps_epi32(a); }
INLINE ints_f64 v_nearest_f64(vec_f64 a) { return _mm512_cvtpd_epi32(a); }
INLINE int v_near_tie_f32(const ints_f32 a[4])
{
    const __m512i least =
        _mm512_min_epu16(_mm512_min_epu16(a[0], a[1]), _mm512_min_epu16(a[2], a[3]));
    return _mm512_testn_epi32_mask(least, _mm512_set1_epi32(0xfffc)) != 0;
}
INLINE int v_near_tie_f64(const ints_f64 a[4])
{
    const __m256i least =
        _mm256_min_epu16(_mm256_min_epu16(a[0], a[1]), _mm256_min_epu16(a[2], a[3]));
    return _mm256_testn_epi32_mask(least, _mm256_set1_epi32(0xfffc)) != 0;
}
INLINE void v_store_i8_f32(signed char *into, const ints_f32 a[4])
{
    const __m512i upper = _mm512_setr_epi32(
        0x030001, 0x070005, 0x0b0009, 0x0f000d, 0x130011, 0x170015, 0x1b0019, 0x1f001d, 0x230021,
        0x270025, 0x2b0029, 0x2f002d, 0x330031, 0x370035, 0x3b0039, 0x3f003d);
    const __m512i low = _mm512_permutex2var_epi16(a[0], upper, a[1]);
    const __m512i high = _mm512_permutex2var_epi16(a[2], upper, a[3]);
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    _mm512_storeu_si512(into, _mm512_permutexvar_epi64(order, _mm512_packs_epi16(low, high)));
}
INLINE void v_store_i8_f64(signed char *into, const ints_f64 a[4])
{
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i q[4];
    UNROLL for (int k = 0; k < 4; k++) q[k] = _mm256_srai_epi32(a[k], 16);
    const __m256i low = _mm256_packs_epi32(q[0], q[1]), high = _mm256_packs_epi32(q[2], q[3]);
    _mm256_storeu_si256((void *)into,
                        _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
}

/* ---- activations (activation.h) -------------------------------------------------------------- */

#define UNROLL_LONG UNROLL_FULLY

INLINE vec_f32 v_fnma_f32(vec_f32 a, vec_f32 b, vec_f32 c)
{
    return _mm512_fnmadd_ps(a, b, c);
}
INLINE vec_f32 v_max_f32(vec_f32 a, vec_f32 b) { return _mm512_max_ps(a, b); }
INLINE vec_f32 v_min_f32(vec_f32 a, vec_f32 b) { return _mm512_min_ps(a, b); }
INLINE vec_f32 v_abs_f32(vec_f32 a) { return _mm512_abs_ps(a); }
INLINE vec_f32 v_power_of_2_f32(vec_f32 a)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), 23));
}
INLINE vec_f64 v_fnma_f64(vec_f64 a, vec_f64 b, vec_f64 c)
{
    return _mm512_fnmadd_pd(a, b, c);
}
INLINE vec_f64 v_max_f64(vec_f64 a, vec_f64 b) { return _mm512_max_pd(a, b); }
INLINE vec_f64 v_min_f64(vec_f64 a, vec_f64 b) { return _mm512_min_pd(a, b); }
INLINE vec_f64 v_abs_f64(vec_f64 a) { return _mm512_abs_pd(a); }
INLINE vec_f64 v_power_of_2_f64(vec_f64 a)
{
    return _mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(a), 52));
}

INLINE void v_fence(void) { _mm_sfence(); }
