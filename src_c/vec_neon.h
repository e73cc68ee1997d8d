/* vec_neon.h: the vector vocabulary in AArch64 Advanced SIMD. vec_scalar.h says what each word
 * means. */
#include <arm_neon.h>

#define FN_ISA neon
#define VECTORS_A_SWEEP_f32 8
#define VECTORS_A_SWEEP_f64 8
#define AFFINE_ROWS 4
#define UNROLL _Pragma("GCC unroll 16")

/* ---- eight doubles ---------------------------------------------------------------------------- */

typedef struct {
    float64x2_t q[4];
} vd8;

#define VD8_MAP(expression)                                                                        \
    vd8 r;                                                                                         \
    UNROLL for (int j = 0; j < 4; j++) r.q[j] = (expression);                                      \
    return r

static inline vd8 vd8_set1(double a) { VD8_MAP(vdupq_n_f64(a)); }
static inline vd8 vd8_load(const double *p) { VD8_MAP(vld1q_f64(p + 2 * j)); }
static inline vd8 vd8_add(vd8 a, vd8 b) { VD8_MAP(vaddq_f64(a.q[j], b.q[j])); }
static inline vd8 vd8_sub(vd8 a, vd8 b) { VD8_MAP(vsubq_f64(a.q[j], b.q[j])); }
static inline vd8 vd8_mul(vd8 a, vd8 b) { VD8_MAP(vmulq_f64(a.q[j], b.q[j])); }
static inline vd8 vd8_div(vd8 a, vd8 b) { VD8_MAP(vdivq_f64(a.q[j], b.q[j])); }
static inline vd8 vd8_sqrt(vd8 a) { VD8_MAP(vsqrtq_f64(a.q[j])); }
static inline void vd8_store_f64(double *p, vd8 a)
{
    UNROLL for (int j = 0; j < 4; j++) vst1q_f64(p + 2 * j, a.q[j]);
}
static inline void vd8_store_f32(float *p, vd8 a)
{
    UNROLL for (int j = 0; j < 4; j++) vst1_f32(p + 2 * j, vcvt_f32_f64(a.q[j]));
}
static inline unsigned vd8_le(vd8 a, vd8 b)
{
    unsigned bits = 0;
    UNROLL for (int j = 0; j < 4; j++) {
        const uint64x2_t le = vcleq_f64(a.q[j], b.q[j]);
        bits |= (unsigned)(vgetq_lane_u64(le, 0) & 1) << 2 * j;
        bits |= (unsigned)(vgetq_lane_u64(le, 1) & 1) << (2 * j + 1);
    }
    return bits;
}
static inline float64x2_t fold_to_two(vd8 a)
{
    return vaddq_f64(vaddq_f64(a.q[0], a.q[2]), vaddq_f64(a.q[1], a.q[3]));
}
static inline double vd8_hsum(vd8 a) { return vpaddd_f64(fold_to_two(a)); }
static inline vd8 vd8_hsum8(const vd8 a[8])
{
    VD8_MAP(vpaddq_f64(fold_to_two(a[2 * j]), fold_to_two(a[2 * j + 1])));
}

/* ---- float ------------------------------------------------------------------------------------ */

typedef float32x4_t vec_f32;
#define VW_f32 4

static inline vec_f32 v_zero_f32(void) { return vdupq_n_f32(0); }
static inline vec_f32 v_set1_f32(float a) { return vdupq_n_f32(a); }
static inline vec_f32 v_load_f32(const float *p) { return vld1q_f32(p); }
static inline void v_store_f32(float *p, vec_f32 a) { vst1q_f32(p, a); }
static inline vec_f32 v_loadn_f32(const float *p, ptrdiff_t n)
{
    float lanes[4] = {0};
    for (ptrdiff_t j = 0; j < n; j++) lanes[j] = p[j];
    return vld1q_f32(lanes);
}
static inline void v_storen_f32(float *p, vec_f32 a, ptrdiff_t n)
{
    float lanes[4];
    vst1q_f32(lanes, a);
    for (ptrdiff_t j = 0; j < n; j++) p[j] = lanes[j];
}
static inline vec_f32 v_firstn_f32(vec_f32 a, ptrdiff_t n)
{
    static const uint32_t first[8] = {~0u, ~0u, ~0u, ~0u};
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a), vld1q_u32(first + 4 - n)));
}
static inline void v_stream_f32(float *p, vec_f32 a) { vst1q_f32(p, a); }
static inline vec_f32 v_add_f32(vec_f32 a, vec_f32 b) { return vaddq_f32(a, b); }
static inline vec_f32 v_sub_f32(vec_f32 a, vec_f32 b) { return vsubq_f32(a, b); }
static inline vec_f32 v_mul_f32(vec_f32 a, vec_f32 b) { return vmulq_f32(a, b); }
static inline vec_f32 v_fma_f32(vec_f32 a, vec_f32 b, vec_f32 c) { return vfmaq_f32(c, a, b); }

typedef struct {
    vd8 lo, hi;
} wide_f32;

static inline vd8 widen_f32(float32x4_t a, float32x4_t b)
{
    return (vd8){{vcvt_f64_f32(vget_low_f32(a)), vcvt_high_f64_f32(a),
                  vcvt_f64_f32(vget_low_f32(b)), vcvt_high_f64_f32(b)}};
}
static inline wide_f32 v_fold_f32(const vec_f32 a[16])
{
    float32x4_t s[4];
    UNROLL for (int j = 0; j < 4; j++)
        s[j] = vaddq_f32(vaddq_f32(a[j], a[j + 8]), vaddq_f32(a[j + 4], a[j + 12]));
    return (wide_f32){widen_f32(s[0], s[1]), widen_f32(s[2], s[3])};
}
static inline wide_f32 wide_add_f32(wide_f32 a, wide_f32 b)
{
    return (wide_f32){vd8_add(a.lo, b.lo), vd8_add(a.hi, b.hi)};
}
static inline vd8 wide_vd8_f32(wide_f32 a) { return vd8_add(a.lo, a.hi); }

/* ---- double ----------------------------------------------------------------------------------- */

typedef float64x2_t vec_f64;
#define VW_f64 2

static inline vec_f64 v_zero_f64(void) { return vdupq_n_f64(0); }
static inline vec_f64 v_set1_f64(double a) { return vdupq_n_f64(a); }
static inline vec_f64 v_load_f64(const double *p) { return vld1q_f64(p); }
static inline void v_store_f64(double *p, vec_f64 a) { vst1q_f64(p, a); }
static inline vec_f64 v_loadn_f64(const double *p, ptrdiff_t n)
{
    return n > 0 ? vsetq_lane_f64(*p, vdupq_n_f64(0), 0) : vdupq_n_f64(0);
}
static inline void v_storen_f64(double *p, vec_f64 a, ptrdiff_t n)
{
    if (n > 0) *p = vgetq_lane_f64(a, 0);
}
static inline vec_f64 v_firstn_f64(vec_f64 a, ptrdiff_t n)
{
    return n > 0 ? vsetq_lane_f64(0, a, 1) : vdupq_n_f64(0);
}
static inline void v_stream_f64(double *p, vec_f64 a) { vst1q_f64(p, a); }
static inline vec_f64 v_add_f64(vec_f64 a, vec_f64 b) { return vaddq_f64(a, b); }
static inline vec_f64 v_sub_f64(vec_f64 a, vec_f64 b) { return vsubq_f64(a, b); }
static inline vec_f64 v_mul_f64(vec_f64 a, vec_f64 b) { return vmulq_f64(a, b); }
static inline vec_f64 v_fma_f64(vec_f64 a, vec_f64 b, vec_f64 c) { return vfmaq_f64(c, a, b); }

typedef vd8 wide_f64;

static inline wide_f64 v_fold_f64(const vec_f64 a[16])
{
    VD8_MAP(vaddq_f64(vaddq_f64(a[j], a[j + 8]), vaddq_f64(a[j + 4], a[j + 12])));
}
static inline wide_f64 wide_add_f64(wide_f64 a, wide_f64 b) { return vd8_add(a, b); }
static inline vd8 wide_vd8_f64(wide_f64 a) { return a; }

static inline void v_fence(void) {}
