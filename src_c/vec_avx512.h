/* vec_avx512.h: the vector vocabulary in AVX-512 F, DQ, BW and VL. vec_scalar.h says what each
 * word means. */
#include <immintrin.h>

#define FN_ISA avx512
#define VECTORS_A_SWEEP_f32 4
#define VECTORS_A_SWEEP_f64 4
#define AFFINE_ROWS 4
#define UNROLL _Pragma("GCC unroll 8")

/* ---- eight doubles ---------------------------------------------------------------------------- */

typedef __m512d vd8;

static inline vd8 vd8_set1(double a) { return _mm512_set1_pd(a); }
static inline vd8 vd8_load(const double *p) { return _mm512_loadu_pd(p); }
static inline void vd8_store_f32(float *p, vd8 a) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(a)); }
static inline void vd8_store_f64(double *p, vd8 a) { _mm512_storeu_pd(p, a); }
static inline vd8 vd8_add(vd8 a, vd8 b) { return _mm512_add_pd(a, b); }
static inline vd8 vd8_sub(vd8 a, vd8 b) { return _mm512_sub_pd(a, b); }
static inline vd8 vd8_mul(vd8 a, vd8 b) { return _mm512_mul_pd(a, b); }
static inline vd8 vd8_div(vd8 a, vd8 b) { return _mm512_div_pd(a, b); }
static inline vd8 vd8_sqrt(vd8 a) { return _mm512_sqrt_pd(a); }
static inline unsigned vd8_le(vd8 a, vd8 b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }

static inline double vd8_hsum(vd8 a)
{
    const __m256d b = _mm256_add_pd(_mm512_castpd512_pd256(a), _mm512_extractf64x4_pd(a, 1));
    const __m128d c = _mm_add_pd(_mm256_castpd256_pd128(b), _mm256_extractf128_pd(b, 1));
    return _mm_cvtsd_f64(_mm_add_sd(c, _mm_unpackhi_pd(c, c)));
}

/* Halves of two vectors side by side, added: four sums of each from eight. */
static inline __m512d add_halves(__m512d a, __m512d b)
{
    return _mm512_add_pd(_mm512_shuffle_f64x2(a, b, 0x44), _mm512_shuffle_f64x2(a, b, 0xee));
}

static inline __m512d add_quarters(__m512d a, __m512d b)
{
    return _mm512_add_pd(_mm512_shuffle_f64x2(a, b, 0x88), _mm512_shuffle_f64x2(a, b, 0xdd));
}

static inline vd8 vd8_hsum8(const vd8 r[8])
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

static inline __mmask16 first_f32(ptrdiff_t n) { return (__mmask16)_bzhi_u32(0xffff, (unsigned)n); }
static inline vec_f32 v_zero_f32(void) { return _mm512_setzero_ps(); }
static inline vec_f32 v_set1_f32(float a) { return _mm512_set1_ps(a); }
static inline vec_f32 v_load_f32(const float *p) { return _mm512_loadu_ps(p); }
static inline vec_f32 v_loadn_f32(const float *p, ptrdiff_t n)
{
    return _mm512_maskz_loadu_ps(first_f32(n), p);
}
static inline void v_store_f32(float *p, vec_f32 a) { _mm512_storeu_ps(p, a); }
static inline void v_storen_f32(float *p, vec_f32 a, ptrdiff_t n)
{
    _mm512_mask_storeu_ps(p, first_f32(n), a);
}
static inline void v_stream_f32(float *p, vec_f32 a) { _mm512_stream_ps(p, a); }
static inline vec_f32 v_firstn_f32(vec_f32 a, ptrdiff_t n)
{
    return _mm512_maskz_mov_ps(first_f32(n), a);
}
static inline vec_f32 v_add_f32(vec_f32 a, vec_f32 b) { return _mm512_add_ps(a, b); }
static inline vec_f32 v_sub_f32(vec_f32 a, vec_f32 b) { return _mm512_sub_ps(a, b); }
static inline vec_f32 v_mul_f32(vec_f32 a, vec_f32 b) { return _mm512_mul_ps(a, b); }
static inline vec_f32 v_fma_f32(vec_f32 a, vec_f32 b, vec_f32 c) { return _mm512_fmadd_ps(a, b, c); }

typedef struct {
    vd8 lo, hi;
} wide_f32;

static inline wide_f32 v_fold_f32(const vec_f32 a[4])
{
    const __m512 s = _mm512_add_ps(_mm512_add_ps(a[0], a[2]), _mm512_add_ps(a[1], a[3]));
    return (wide_f32){_mm512_cvtps_pd(_mm512_castps512_ps256(s)),
                      _mm512_cvtps_pd(_mm512_extractf32x8_ps(s, 1))};
}
static inline wide_f32 wide_add_f32(wide_f32 a, wide_f32 b)
{
    return (wide_f32){vd8_add(a.lo, b.lo), vd8_add(a.hi, b.hi)};
}
static inline vd8 wide_vd8_f32(wide_f32 a) { return vd8_add(a.lo, a.hi); }

/* ---- double ----------------------------------------------------------------------------------- */

typedef __m512d vec_f64;
#define VW_f64 8

static inline __mmask8 first_f64(ptrdiff_t n) { return (__mmask8)_bzhi_u32(0xff, (unsigned)n); }
static inline vec_f64 v_zero_f64(void) { return _mm512_setzero_pd(); }
static inline vec_f64 v_set1_f64(double a) { return _mm512_set1_pd(a); }
static inline vec_f64 v_load_f64(const double *p) { return _mm512_loadu_pd(p); }
static inline vec_f64 v_loadn_f64(const double *p, ptrdiff_t n)
{
    return _mm512_maskz_loadu_pd(first_f64(n), p);
}
static inline void v_store_f64(double *p, vec_f64 a) { _mm512_storeu_pd(p, a); }
static inline void v_storen_f64(double *p, vec_f64 a, ptrdiff_t n)
{
    _mm512_mask_storeu_pd(p, first_f64(n), a);
}
static inline void v_stream_f64(double *p, vec_f64 a) { _mm512_stream_pd(p, a); }
static inline vec_f64 v_firstn_f64(vec_f64 a, ptrdiff_t n)
{
    return _mm512_maskz_mov_pd(first_f64(n), a);
}
static inline vec_f64 v_add_f64(vec_f64 a, vec_f64 b) { return _mm512_add_pd(a, b); }
static inline vec_f64 v_sub_f64(vec_f64 a, vec_f64 b) { return _mm512_sub_pd(a, b); }
static inline vec_f64 v_mul_f64(vec_f64 a, vec_f64 b) { return _mm512_mul_pd(a, b); }
static inline vec_f64 v_fma_f64(vec_f64 a, vec_f64 b, vec_f64 c) { return _mm512_fmadd_pd(a, b, c); }

typedef vd8 wide_f64;

static inline wide_f64 v_fold_f64(const vec_f64 a[4])
{
    return _mm512_add_pd(_mm512_add_pd(a[0], a[2]), _mm512_add_pd(a[1], a[3]));
}
static inline wide_f64 wide_add_f64(wide_f64 a, wide_f64 b) { return vd8_add(a, b); }
static inline vd8 wide_vd8_f64(wide_f64 a) { return a; }

static inline void v_fence(void) { _mm_sfence(); }
