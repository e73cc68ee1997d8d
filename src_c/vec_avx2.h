/* vec_avx2.h: the vector vocabulary in AVX2 and FMA. vec_scalar.h says what each word means. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "names.h"

#define FN_ISA avx2
#define VECTORS_A_SWEEP_f32 4
#define VECTORS_A_SWEEP_f64 4
#define AFFINE_ROWS 2
#define HAS_HALVES 1
#define HAS_MASKS 0
#define HAS_HALF_LOADS 1
#define KEEP_IN_REGISTER(v) __asm__("" : "+x"(v))
#define FMA_SUBTRACTS 1
#define UNROLL _Pragma("GCC unroll 8")

/* ---- eight doubles ---------------------------------------------------------------------------- */

typedef struct {
    __m256d lo, hi;
} vd8;

INLINE vd8 vd8_set1(double a) { return (vd8){_mm256_set1_pd(a), _mm256_set1_pd(a)}; }
INLINE vd8 vd8_load_f64(const double *p)
{
    return (vd8){_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)};
}
INLINE vd8 vd8_load_f32(const float *p)
{
    return (vd8){_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4))};
}
INLINE void vd8_store_f32(float *p, vd8 a)
{
    _mm_storeu_ps(p, _mm256_cvtpd_ps(a.lo));
    _mm_storeu_ps(p + 4, _mm256_cvtpd_ps(a.hi));
}
INLINE void vd8_store_f64(double *p, vd8 a)
{
    _mm256_storeu_pd(p, a.lo);
    _mm256_storeu_pd(p + 4, a.hi);
}
INLINE vd8 vd8_add(vd8 a, vd8 b)
{
    return (vd8){_mm256_add_pd(a.lo, b.lo), _mm256_add_pd(a.hi, b.hi)};
}
INLINE vd8 vd8_sub(vd8 a, vd8 b)
{
    return (vd8){_mm256_sub_pd(a.lo, b.lo), _mm256_sub_pd(a.hi, b.hi)};
}
INLINE vd8 vd8_mul(vd8 a, vd8 b)
{
    return (vd8){_mm256_mul_pd(a.lo, b.lo), _mm256_mul_pd(a.hi, b.hi)};
}
INLINE vd8 vd8_div(vd8 a, vd8 b)
{
    return (vd8){_mm256_div_pd(a.lo, b.lo), _mm256_div_pd(a.hi, b.hi)};
}
INLINE vd8 vd8_sqrt(vd8 a) { return (vd8){_mm256_sqrt_pd(a.lo), _mm256_sqrt_pd(a.hi)}; }
INLINE unsigned vd8_le(vd8 a, vd8 b)
{
    const int lo = _mm256_movemask_pd(_mm256_cmp_pd(a.lo, b.lo, _CMP_LE_OQ));
    const int hi = _mm256_movemask_pd(_mm256_cmp_pd(a.hi, b.hi, _CMP_LE_OQ));
    return (unsigned)(lo | hi << 4);
}

INLINE double vd8_hsum(vd8 a)
{
    const __m256d b = _mm256_add_pd(a.lo, a.hi);
    const __m128d c = _mm_add_pd(_mm256_castpd256_pd128(b), _mm256_extractf128_pd(b, 1));
    return _mm_cvtsd_f64(_mm_add_sd(c, _mm_unpackhi_pd(c, c)));
}

/* Sums of four vectors of four, each as (j, j + 2), (j, j + 1). */
INLINE __m256d hsum4(__m256d a, __m256d b, __m256d c, __m256d d)
{
    const __m256d ac = _mm256_add_pd(_mm256_permute2f128_pd(a, c, 0x20),
                                     _mm256_permute2f128_pd(a, c, 0x31));
    const __m256d bd = _mm256_add_pd(_mm256_permute2f128_pd(b, d, 0x20),
                                     _mm256_permute2f128_pd(b, d, 0x31));
    return _mm256_add_pd(_mm256_unpacklo_pd(ac, bd), _mm256_unpackhi_pd(ac, bd));
}

INLINE vd8 vd8_hsum8(const vd8 r[8])
{
    __m256d half[8];
    UNROLL for (int j = 0; j < 8; j++) half[j] = _mm256_add_pd(r[j].lo, r[j].hi);
    return (vd8){hsum4(half[0], half[1], half[2], half[3]),
                 hsum4(half[4], half[5], half[6], half[7])};
}

/* ---- float ------------------------------------------------------------------------------------ */

typedef __m256 vec_f32;
#define VW_f32 8

static const int32_t first_lanes_f32[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
INLINE __m256i first_f32(ptrdiff_t n)
{
    return _mm256_loadu_si256((const __m256i *)(first_lanes_f32 + 8 - n));
}
INLINE vec_f32 v_zero_f32(void) { return _mm256_setzero_ps(); }
INLINE vec_f32 v_set1_f32(float a) { return _mm256_set1_ps(a); }
INLINE vec_f32 v_load_f32(const float *p) { return _mm256_loadu_ps(p); }
INLINE vec_f32 v_loadn_f32(const float *p, ptrdiff_t n)
{
    return _mm256_maskload_ps(p, first_f32(n));
}
INLINE void v_store_f32(float *p, vec_f32 a) { _mm256_storeu_ps(p, a); }
INLINE void v_storen_f32(float *p, vec_f32 a, ptrdiff_t n)
{
    _mm256_maskstore_ps(p, first_f32(n), a);
}
INLINE void v_stream_f32(float *p, vec_f32 a) { _mm256_stream_ps(p, a); }
INLINE vec_f32 v_firstn_f32(vec_f32 a, ptrdiff_t n)
{
    return _mm256_and_ps(a, _mm256_castsi256_ps(first_f32(n)));
}
INLINE vec_f32 v_add_f32(vec_f32 a, vec_f32 b) { return _mm256_add_ps(a, b); }
INLINE vec_f32 v_sub_f32(vec_f32 a, vec_f32 b) { return _mm256_sub_ps(a, b); }
INLINE vec_f32 v_mul_f32(vec_f32 a, vec_f32 b) { return _mm256_mul_ps(a, b); }
INLINE vec_f32 v_fma_f32(vec_f32 a, vec_f32 b, vec_f32 c) { return _mm256_fmadd_ps(a, b, c); }

typedef struct {
    __m256 lo, hi;
} quarter_f32;
typedef struct {
    vd8 lo, hi;
} wide_f32;

INLINE quarter_f32 v_fold_f32(const vec_f32 *a, const int count)
{
    if (count == 1) return (quarter_f32){a[0], _mm256_setzero_ps()};
    if (count == 2) return (quarter_f32){a[0], a[1]};
    if (count == 4) return (quarter_f32){_mm256_add_ps(a[0], a[2]), _mm256_add_ps(a[1], a[3])};
    return (quarter_f32){_mm256_add_ps(_mm256_add_ps(a[0], a[4]), _mm256_add_ps(a[2], a[6])),
                         _mm256_add_ps(_mm256_add_ps(a[1], a[5]), _mm256_add_ps(a[3], a[7]))};
}

INLINE double quarter_hsum_f32(quarter_f32 a)
{
    const __m256 b = _mm256_add_ps(a.lo, a.hi);
    const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return (double)_mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}

INLINE vd8 widen_f32(__m256 a)
{
    return (vd8){_mm256_cvtps_pd(_mm256_castps256_ps128(a)),
                 _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1))};
}

/* Two rows' 8 sums to 4 of each, then two such pairs to 2 of each. */
INLINE __m256 four_of_each(__m256 a, __m256 b)
{
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
INLINE __m256 two_of_each(__m256 a, __m256 b)
{
    return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
}

INLINE vd8 quarter_hsum8_f32(const quarter_f32 r[8])
{
    __m256 s[8];
    UNROLL for (int j = 0; j < 8; j++) s[j] = _mm256_add_ps(r[j].lo, r[j].hi);
    const __m256 a = two_of_each(four_of_each(s[0], s[4]), four_of_each(s[1], s[5]));
    const __m256 b = two_of_each(four_of_each(s[2], s[6]), four_of_each(s[3], s[7]));
    return widen_f32(_mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd)));
}

/* ---- two rows of half a vector side by side ---- */

INLINE vec_f32 v_halves_f32(const float p[8], const int k)
{
    return _mm256_blend_ps(_mm256_broadcast_ss(p + 2 * k), _mm256_broadcast_ss(p + 2 * k + 1), 0xf0);
}

INLINE vd8 halves_hsum8_f32(const vec_f32 v[4])
{
    const __m256 a = two_of_each(v[0], v[1]), b = two_of_each(v[2], v[3]);
    const __m256 sums = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); /* rows 0 2 4 6, 1 3 5 7 */
    return widen_f32(_mm256_permutevar8x32_ps(sums, order));
}

INLINE wide_f32 wide_zero_f32(void) { return (wide_f32){vd8_set1(0), vd8_set1(0)}; }
INLINE wide_f32 wide_add_f32(wide_f32 a, quarter_f32 q)
{
    return (wide_f32){vd8_add(a.lo, widen_f32(q.lo)), vd8_add(a.hi, widen_f32(q.hi))};
}
INLINE double wide_hsum_f32(wide_f32 a) { return vd8_hsum(vd8_add(a.lo, a.hi)); }

/* ---- double ----------------------------------------------------------------------------------- */

typedef __m256d vec_f64;
#define VW_f64 4

static const int64_t first_lanes_f64[8] = {-1, -1, -1, -1};
INLINE __m256i first_f64(ptrdiff_t n)
{
    return _mm256_loadu_si256((const __m256i *)(first_lanes_f64 + 4 - n));
}
INLINE vec_f64 v_zero_f64(void) { return _mm256_setzero_pd(); }
INLINE vec_f64 v_set1_f64(double a) { return _mm256_set1_pd(a); }
INLINE vec_f64 v_load_f64(const double *p) { return _mm256_loadu_pd(p); }
INLINE vec_f64 v_loadn_f64(const double *p, ptrdiff_t n)
{
    return _mm256_maskload_pd(p, first_f64(n));
}
INLINE void v_store_f64(double *p, vec_f64 a) { _mm256_storeu_pd(p, a); }
INLINE void v_storen_f64(double *p, vec_f64 a, ptrdiff_t n)
{
    _mm256_maskstore_pd(p, first_f64(n), a);
}
INLINE void v_stream_f64(double *p, vec_f64 a) { _mm256_stream_pd(p, a); }
INLINE vec_f64 v_firstn_f64(vec_f64 a, ptrdiff_t n)
{
    return _mm256_and_pd(a, _mm256_castsi256_pd(first_f64(n)));
}
INLINE vec_f64 v_add_f64(vec_f64 a, vec_f64 b) { return _mm256_add_pd(a, b); }
INLINE vec_f64 v_sub_f64(vec_f64 a, vec_f64 b) { return _mm256_sub_pd(a, b); }
INLINE vec_f64 v_mul_f64(vec_f64 a, vec_f64 b) { return _mm256_mul_pd(a, b); }
INLINE vec_f64 v_fma_f64(vec_f64 a, vec_f64 b, vec_f64 c) { return _mm256_fmadd_pd(a, b, c); }

typedef vd8 quarter_f64, wide_f64;

INLINE quarter_f64 v_fold_f64(const vec_f64 *a, const int count)
{
    if (count == 1) return (vd8){a[0], _mm256_setzero_pd()};
    if (count == 2) return (vd8){a[0], a[1]};
    if (count == 4) return (vd8){_mm256_add_pd(a[0], a[2]), _mm256_add_pd(a[1], a[3])};
    return (vd8){_mm256_add_pd(_mm256_add_pd(a[0], a[4]), _mm256_add_pd(a[2], a[6])),
                 _mm256_add_pd(_mm256_add_pd(a[1], a[5]), _mm256_add_pd(a[3], a[7]))};
}

INLINE vec_f64 v_halves_f64(const double p[8], const int k)
{
    return _mm256_blend_pd(_mm256_broadcast_sd(p + 2 * k), _mm256_broadcast_sd(p + 2 * k + 1), 0xc);
}

INLINE __m256d sums_of_two(__m256d a, __m256d b)
{
    const __m256d sums = _mm256_add_pd(_mm256_unpacklo_pd(a, b), _mm256_unpackhi_pd(a, b));
    return _mm256_permute4x64_pd(sums, 0xd8); /* rows 0 2, 1 3 */
}

INLINE vd8 halves_hsum8_f64(const vec_f64 v[4])
{
    return (vd8){sums_of_two(v[0], v[1]), sums_of_two(v[2], v[3])};
}

INLINE double quarter_hsum_f64(quarter_f64 a) { return vd8_hsum(a); }
INLINE vd8 quarter_hsum8_f64(const quarter_f64 r[8]) { return vd8_hsum8(r); }
INLINE wide_f64 wide_zero_f64(void) { return vd8_set1(0); }
INLINE wide_f64 wide_add_f64(wide_f64 a, quarter_f64 q) { return vd8_add(a, q); }
INLINE double wide_hsum_f64(wide_f64 a) { return vd8_hsum(a); }

/* ---- storage types, masks, int8 (convert.h) --------------------------------------------------- */

#define CONVERT_STEP 16

INLINE vec_f32 v_load_f16(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p));
}
INLINE vec_f32 v_load_bf16(const uint16_t *p)
{
    const __m128i h = _mm_loadu_si128((const void *)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
INLINE void v_store2_f16(uint16_t *p, vec_f32 a, vec_f32 b)
{
    _mm_storeu_si128((void *)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((void *)(p + 8), _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
}
INLINE __m256i upper_halves(__m256i a, __m256i b)
{
    const __m256i pairs = _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
    return _mm256_permute4x64_epi64(pairs, 0xd8);
}
INLINE __m256i rounded_to_bf16(__m256i bits)
{
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}
/* A NaN stays one when its lower half goes, and becomes quiet. */
INLINE void v_store2_bf16(uint16_t *p, vec_f32 a, vec_f32 b)
{
    const __m256i ai = _mm256_castps_si256(a), bi = _mm256_castps_si256(b);
    __m256i rounded = upper_halves(rounded_to_bf16(ai), rounded_to_bf16(bi));
    if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)), 0)) {
        const __m256i nan = upper_halves(_mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)),
                                         _mm256_castps_si256(_mm256_cmp_ps(b, b, _CMP_UNORD_Q)));
        const __m256i quiet = _mm256_or_si256(upper_halves(ai, bi), _mm256_set1_epi16(0x40));
        rounded = _mm256_blendv_epi8(rounded, quiet, nan);
    }
    _mm256_storeu_si256((void *)p, rounded);
}

/* To nearest, then back to what a cut would have left, with its last bit set. */
INLINE __m128 rounded_to_odd(__m256d a)
{
    const __m128 nearest = _mm256_cvtpd_ps(a);
    const __m256d sign = _mm256_set1_pd(-0.0), back = _mm256_cvtps_pd(nearest);
    const __m256d beyond =
        _mm256_cmp_pd(_mm256_andnot_pd(sign, back), _mm256_andnot_pd(sign, a), _CMP_GT_OQ);
    const __m256d inexact = _mm256_cmp_pd(back, a, _CMP_NEQ_UQ);
    const __m256i low_halves = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    const __m256i b = _mm256_permutevar8x32_epi32(_mm256_castpd_si256(beyond), low_halves);
    const __m256i i = _mm256_permutevar8x32_epi32(_mm256_castpd_si256(inexact), low_halves);
    const __m128i cut = _mm_add_epi32(_mm_castps_si128(nearest), _mm256_castsi256_si128(b));
    return _mm_castsi128_ps(_mm_or_si128(cut, _mm_srli_epi32(_mm256_castsi256_si128(i), 31)));
}
INLINE void vd8_store_f32_odd(float *p, vd8 a)
{
    _mm_storeu_ps(p, rounded_to_odd(a.lo));
    _mm_storeu_ps(p + 4, rounded_to_odd(a.hi));
}

INLINE __m128i mask_bytes_f32(const unsigned char *mask)
{
    return _mm_cmpeq_epi8(_mm_loadl_epi64((const void *)mask), _mm_setzero_si128());
}
INLINE __m128i mask_bytes_f64(const unsigned char *mask)
{
    int bytes;
    memcpy(&bytes, mask, 4);
    return _mm_cmpeq_epi8(_mm_cvtsi32_si128(bytes), _mm_setzero_si128());
}

/* Where the lanes that a mask keeps come from, three bits each, lane 0's lowest: lane k goes to
 * where the bits below it in the mask count to. */
#define PLACE(m, k)                                                                                \
    ((m) >> (k) & 1 ? (uint32_t)(k) << 3 * __builtin_popcount((m) & ((1 << (k)) - 1)) : 0)
#define PLACES(m)                                                                                  \
    (PLACE(m, 0) | PLACE(m, 1) | PLACE(m, 2) | PLACE(m, 3) | PLACE(m, 4) | PLACE(m, 5) |           \
     PLACE(m, 6) | PLACE(m, 7))
#define PLACES4(m) PLACES(m), PLACES((m) + 1), PLACES((m) + 2), PLACES((m) + 3)
#define PLACES16(m) PLACES4(m), PLACES4((m) + 4), PLACES4((m) + 8), PLACES4((m) + 12)
#define PLACES64(m) PLACES16(m), PLACES16((m) + 16), PLACES16((m) + 32), PLACES16((m) + 48)
static const uint32_t places_f32[256] = {PLACES64(0), PLACES64(64), PLACES64(128), PLACES64(192)};

INLINE __m256i places_of(uint32_t places)
{
    return _mm256_srlv_epi32(_mm256_set1_epi32((int)places),
                             _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21));
}
INLINE ptrdiff_t v_compress_f32(float *into, vec_f32 v, const unsigned char *mask)
{
    const unsigned kept = ~(unsigned)_mm_movemask_epi8(mask_bytes_f32(mask)) & 0xff;
    _mm256_storeu_ps(into, _mm256_permutevar8x32_ps(v, places_of(places_f32[kept])));
    return __builtin_popcount(kept);
}
/* A lane of double is two of float. */
INLINE ptrdiff_t v_compress_f64(double *into, vec_f64 v, const unsigned char *mask)
{
    const __m128i out = mask_bytes_f64(mask);
    const unsigned kept = ~(unsigned)_mm_movemask_epi8(_mm_unpacklo_epi8(out, out)) & 0xff;
    const __m256i places = places_of(places_f32[kept]);
    _mm256_storeu_ps((float *)into, _mm256_permutevar8x32_ps(_mm256_castpd_ps(v), places));
    return __builtin_popcount(kept) / 2;
}
INLINE vec_f32 v_keep_f32(vec_f32 v, const unsigned char *mask)
{
    const __m256i out = _mm256_cvtepi8_epi32(mask_bytes_f32(mask));
    return _mm256_andnot_ps(_mm256_castsi256_ps(out), v);
}
INLINE vec_f64 v_keep_f64(vec_f64 v, const unsigned char *mask)
{
    const __m256i out = _mm256_cvtepi8_epi64(mask_bytes_f64(mask));
    return _mm256_andnot_pd(_mm256_castsi256_pd(out), v);
}

/* As integers NaN is larger than infinity. */
INLINE vec_f32 v_larger_f32(vec_f32 a, vec_f32 v)
{
    const __m256i size = _mm256_castps_si256(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), v));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), size));
}
INLINE float v_largest_f32(vec_f32 a)
{
    a = v_larger_f32(a, _mm256_permute2f128_ps(a, a, 1));
    a = v_larger_f32(a, _mm256_permute_ps(a, 0x4e));
    return _mm256_cvtss_f32(v_larger_f32(a, _mm256_permute_ps(a, 0xb1)));
}
INLINE vec_f64 v_larger_f64(vec_f64 a, vec_f64 v)
{
    const __m256d size = _mm256_andnot_pd(_mm256_set1_pd(-0.0), v);
    const __m256i larger = _mm256_cmpgt_epi64(_mm256_castpd_si256(size), _mm256_castpd_si256(a));
    return _mm256_blendv_pd(a, size, _mm256_castsi256_pd(larger));
}
INLINE double v_largest_f64(vec_f64 a)
{
    a = v_larger_f64(a, _mm256_permute2f128_pd(a, a, 1));
    return _mm256_cvtsd_f64(v_larger_f64(a, _mm256_permute_pd(a, 5)));
}

INLINE vec_f32 v_div_f32(vec_f32 a, vec_f32 b) { return _mm256_div_ps(a, b); }
INLINE vec_f64 v_div_f64(vec_f64 a, vec_f64 b) { return _mm256_div_pd(a, b); }
INLINE vec_f32 v_clip127_f32(vec_f32 a)
{
    const __m256 clipped = _mm256_max_ps(_mm256_set1_ps(-127), a);
    const __m256 number = _mm256_cmp_ps(a, a, _CMP_ORD_Q);
    return _mm256_and_ps(number, _mm256_min_ps(_mm256_set1_ps(127), clipped));
}
INLINE vec_f64 v_clip127_f64(vec_f64 a)
{
    const __m256d clipped = _mm256_max_pd(_mm256_set1_pd(-127), a);
    const __m256d number = _mm256_cmp_pd(a, a, _CMP_ORD_Q);
    return _mm256_and_pd(number, _mm256_min_pd(_mm256_set1_pd(127), clipped));
}

typedef __m256i ints_f32;
typedef __m128i ints_f64;
INLINE ints_f32 v_nearest_f32(vec_f32 a) { return _mm256_cvtps_epi32(a); }
INLINE ints_f64 v_nearest_f64(vec_f64 a) { return _mm256_cvtpd_epi32(a); }
INLINE int v_near_tie_f32(const ints_f32 a[4])
{
    const __m256i least =
        _mm256_min_epu16(_mm256_min_epu16(a[0], a[1]), _mm256_min_epu16(a[2], a[3]));
    const __m256i past = _mm256_and_si256(least, _mm256_set1_epi32(0xfffc));
    return _mm256_movemask_epi8(_mm256_cmpeq_epi32(past, _mm256_setzero_si256())) != 0;
}
INLINE int v_near_tie_f64(const ints_f64 a[4])
{
    const __m128i least = _mm_min_epu16(_mm_min_epu16(a[0], a[1]), _mm_min_epu16(a[2], a[3]));
    const __m128i past = _mm_and_si128(least, _mm_set1_epi32(0xfffc));
    return _mm_movemask_epi8(_mm_cmpeq_epi32(past, _mm_setzero_si128())) != 0;
}
INLINE void v_store_i8_f32(signed char *into, const ints_f32 a[4])
{
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i q[4];
    UNROLL for (int k = 0; k < 4; k++) q[k] = _mm256_srai_epi32(a[k], 16);
    const __m256i low = _mm256_packs_epi32(q[0], q[1]), high = _mm256_packs_epi32(q[2], q[3]);
    _mm256_storeu_si256((void *)into,
                        _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
}
INLINE void v_store_i8_f64(signed char *into, const ints_f64 a[4])
{
    __m128i q[4];
    UNROLL for (int k = 0; k < 4; k++) q[k] = _mm_srai_epi32(a[k], 16);
    const __m128i low = _mm_packs_epi32(q[0], q[1]), high = _mm_packs_epi32(q[2], q[3]);
    _mm_storeu_si128((void *)into, _mm_packs_epi16(low, high));
}

/* ---- activations (activation.h) -------------------------------------------------------------- */

#define UNROLL_LONG UNROLL_FULLY

INLINE vec_f32 v_fnma_f32(vec_f32 a, vec_f32 b, vec_f32 c)
{
    return _mm256_fnmadd_ps(a, b, c);
}
INLINE vec_f32 v_max_f32(vec_f32 a, vec_f32 b) { return _mm256_max_ps(a, b); }
INLINE vec_f32 v_min_f32(vec_f32 a, vec_f32 b) { return _mm256_min_ps(a, b); }
INLINE vec_f32 v_abs_f32(vec_f32 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
INLINE vec_f32 v_power_of_2_f32(vec_f32 a)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a), 23));
}
INLINE vec_f64 v_fnma_f64(vec_f64 a, vec_f64 b, vec_f64 c)
{
    return _mm256_fnmadd_pd(a, b, c);
}
INLINE vec_f64 v_max_f64(vec_f64 a, vec_f64 b) { return _mm256_max_pd(a, b); }
INLINE vec_f64 v_min_f64(vec_f64 a, vec_f64 b) { return _mm256_min_pd(a, b); }
INLINE vec_f64 v_abs_f64(vec_f64 a) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), a); }
INLINE vec_f64 v_power_of_2_f64(vec_f64 a)
{
    return _mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(a), 52));
}

INLINE void v_fence(void) { _mm_sfence(); }
