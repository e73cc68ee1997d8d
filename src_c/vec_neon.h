/* vec_neon.h: the vector vocabulary in AArch64 Advanced SIMD. vec_scalar.h says what each word
 * means. */
#include <arm_neon.h>
#include <string.h>

#include "names.h"

#define FN_ISA neon
#define VECTORS_A_SWEEP_f32 8
#define VECTORS_A_SWEEP_f64 8
#define AFFINE_ROWS 4
#define HAS_HALVES 0
#define HAS_HALF_LOADS 1
#define HAS_MASKS 0
#define KEEP_IN_REGISTER(v) __asm__("" : "+w"(v))
#define FMA_SUBTRACTS 0
#define UNROLL _Pragma("GCC unroll 16")

/* ---- eight doubles ---------------------------------------------------------------------------- */

typedef struct {
    float64x2_t q[4];
} vd8;

#define VD8_MAP(expression)                                                                        \
    vd8 r;                                                                                         \
    UNROLL for (int j = 0; j < 4; j++) r.q[j] = (expression);                                      \
    return r

INLINE vd8 vd8_set1(double a) { VD8_MAP(vdupq_n_f64(a)); }
INLINE vd8 vd8_load_f64(const double *p) { VD8_MAP(vld1q_f64(p + 2 * j)); }
INLINE vd8 vd8_load_f32(const float *p) { VD8_MAP(vcvt_f64_f32(vld1_f32(p + 2 * j))); }
INLINE vd8 vd8_add(vd8 a, vd8 b) { VD8_MAP(vaddq_f64(a.q[j], b.q[j])); }
INLINE vd8 vd8_sub(vd8 a, vd8 b) { VD8_MAP(vsubq_f64(a.q[j], b.q[j])); }
INLINE vd8 vd8_mul(vd8 a, vd8 b) { VD8_MAP(vmulq_f64(a.q[j], b.q[j])); }
INLINE vd8 vd8_div(vd8 a, vd8 b) { VD8_MAP(vdivq_f64(a.q[j], b.q[j])); }
INLINE vd8 vd8_sqrt(vd8 a) { VD8_MAP(vsqrtq_f64(a.q[j])); }
INLINE void vd8_store_f64(double *p, vd8 a)
{
    UNROLL for (int j = 0; j < 4; j++) vst1q_f64(p + 2 * j, a.q[j]);
}
INLINE void vd8_store_f32(float *p, vd8 a)
{
    UNROLL for (int j = 0; j < 4; j++) vst1_f32(p + 2 * j, vcvt_f32_f64(a.q[j]));
}
INLINE unsigned vd8_le(vd8 a, vd8 b)
{
    unsigned bits = 0;
    UNROLL for (int j = 0; j < 4; j++) {
        const uint64x2_t le = vcleq_f64(a.q[j], b.q[j]);
        bits |= (unsigned)(vgetq_lane_u64(le, 0) & 1) << 2 * j;
        bits |= (unsigned)(vgetq_lane_u64(le, 1) & 1) << (2 * j + 1);
    }
    return bits;
}
INLINE float64x2_t fold_to_two(vd8 a)
{
    return vaddq_f64(vaddq_f64(a.q[0], a.q[2]), vaddq_f64(a.q[1], a.q[3]));
}
INLINE double vd8_hsum(vd8 a) { return vpaddd_f64(fold_to_two(a)); }
INLINE vd8 vd8_hsum8(const vd8 a[8])
{
    VD8_MAP(vpaddq_f64(fold_to_two(a[2 * j]), fold_to_two(a[2 * j + 1])));
}

/* ---- float ------------------------------------------------------------------------------------ */

typedef float32x4_t vec_f32;
#define VW_f32 4

INLINE vec_f32 v_zero_f32(void) { return vdupq_n_f32(0); }
INLINE vec_f32 v_set1_f32(float a) { return vdupq_n_f32(a); }
INLINE vec_f32 v_load_f32(const float *p) { return vld1q_f32(p); }
INLINE void v_store_f32(float *p, vec_f32 a) { vst1q_f32(p, a); }
INLINE vec_f32 v_loadn_f32(const float *p, ptrdiff_t n)
{
    float lanes[4] = {0};
    if (n == 4) return vld1q_f32(p);
    for (ptrdiff_t j = 0; j < n; j++) lanes[j] = p[j];
    return vld1q_f32(lanes);
}
INLINE void v_storen_f32(float *p, vec_f32 a, ptrdiff_t n)
{
    float lanes[4];
    vst1q_f32(lanes, a);
    for (ptrdiff_t j = 0; j < n; j++) p[j] = lanes[j];
}
INLINE vec_f32 v_firstn_f32(vec_f32 a, ptrdiff_t n)
{
    static const uint32_t first[8] = {~0u, ~0u, ~0u, ~0u};
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a), vld1q_u32(first + 4 - n)));
}
INLINE void v_stream_f32(float *p, vec_f32 a) { vst1q_f32(p, a); }
INLINE vec_f32 v_add_f32(vec_f32 a, vec_f32 b) { return vaddq_f32(a, b); }
INLINE vec_f32 v_sub_f32(vec_f32 a, vec_f32 b) { return vsubq_f32(a, b); }
INLINE vec_f32 v_mul_f32(vec_f32 a, vec_f32 b) { return vmulq_f32(a, b); }
INLINE vec_f32 v_fma_f32(vec_f32 a, vec_f32 b, vec_f32 c) { return vfmaq_f32(c, a, b); }

typedef struct {
    float32x4_t q[4];
} quarter_f32;
typedef struct {
    vd8 lo, hi;
} wide_f32;

INLINE quarter_f32 v_fold_f32(const vec_f32 *a, const int count)
{
    quarter_f32 r;
    UNROLL for (int j = 0; j < 4; j++)
        r.q[j] = count == 16 ? vaddq_f32(vaddq_f32(a[j], a[j + 8]), vaddq_f32(a[j + 4], a[j + 12]))
                 : j < count ? a[j]
                             : vdupq_n_f32(0);
    return r;
}

INLINE float32x4_t fold_to_four(quarter_f32 a)
{
    return vaddq_f32(vaddq_f32(a.q[0], a.q[2]), vaddq_f32(a.q[1], a.q[3]));
}
/* Two rows' sums of four to two of each. */
INLINE float32x4_t two_of_each(float32x4_t a, float32x4_t b)
{
    return vaddq_f32(vcombine_f32(vget_low_f32(a), vget_low_f32(b)),
                     vcombine_f32(vget_high_f32(a), vget_high_f32(b)));
}
INLINE double quarter_hsum_f32(quarter_f32 a)
{
    const float32x4_t b = fold_to_four(a);
    return (double)vpadds_f32(vadd_f32(vget_low_f32(b), vget_high_f32(b)));
}
INLINE vd8 widen_f32(float32x4_t a, float32x4_t b)
{
    return (vd8){{vcvt_f64_f32(vget_low_f32(a)), vcvt_high_f64_f32(a),
                  vcvt_f64_f32(vget_low_f32(b)), vcvt_high_f64_f32(b)}};
}
INLINE vd8 quarter_hsum8_f32(const quarter_f32 r[8])
{
    float32x4_t pairs[4];
    UNROLL for (int j = 0; j < 4; j++)
        pairs[j] = two_of_each(fold_to_four(r[2 * j]), fold_to_four(r[2 * j + 1]));
    return widen_f32(vpaddq_f32(pairs[0], pairs[1]), vpaddq_f32(pairs[2], pairs[3]));
}

INLINE wide_f32 wide_zero_f32(void) { return (wide_f32){vd8_set1(0), vd8_set1(0)}; }
INLINE wide_f32 wide_add_f32(wide_f32 a, quarter_f32 q)
{
    return (wide_f32){vd8_add(a.lo, widen_f32(q.q[0], q.q[1])),
                      vd8_add(a.hi, widen_f32(q.q[2], q.q[3]))};
}
INLINE double wide_hsum_f32(wide_f32 a) { return vd8_hsum(vd8_add(a.lo, a.hi)); }

/* ---- double ----------------------------------------------------------------------------------- */

typedef float64x2_t vec_f64;
#define VW_f64 2

INLINE vec_f64 v_zero_f64(void) { return vdupq_n_f64(0); }
INLINE vec_f64 v_set1_f64(double a) { return vdupq_n_f64(a); }
INLINE vec_f64 v_load_f64(const double *p) { return vld1q_f64(p); }
INLINE void v_store_f64(double *p, vec_f64 a) { vst1q_f64(p, a); }
INLINE vec_f64 v_loadn_f64(const double *p, ptrdiff_t n)
{
    if (n == 2) return vld1q_f64(p);
    return n > 0 ? vsetq_lane_f64(*p, vdupq_n_f64(0), 0) : vdupq_n_f64(0);
}
INLINE void v_storen_f64(double *p, vec_f64 a, ptrdiff_t n)
{
    if (n > 0) p[0] = vgetq_lane_f64(a, 0);
    if (n > 1) p[1] = vgetq_lane_f64(a, 1);
}
INLINE vec_f64 v_firstn_f64(vec_f64 a, ptrdiff_t n)
{
    if (n == 2) return a;
    return n > 0 ? vsetq_lane_f64(0, a, 1) : vdupq_n_f64(0);
}
INLINE void v_stream_f64(double *p, vec_f64 a) { vst1q_f64(p, a); }
INLINE vec_f64 v_add_f64(vec_f64 a, vec_f64 b) { return vaddq_f64(a, b); }
INLINE vec_f64 v_sub_f64(vec_f64 a, vec_f64 b) { return vsubq_f64(a, b); }
INLINE vec_f64 v_mul_f64(vec_f64 a, vec_f64 b) { return vmulq_f64(a, b); }
INLINE vec_f64 v_fma_f64(vec_f64 a, vec_f64 b, vec_f64 c) { return vfmaq_f64(c, a, b); }

typedef vd8 quarter_f64, wide_f64;

INLINE quarter_f64 v_fold_f64(const vec_f64 *a, const int count)
{
    VD8_MAP(count == 16 ? vaddq_f64(vaddq_f64(a[j], a[j + 8]), vaddq_f64(a[j + 4], a[j + 12]))
            : j < count ? a[j]
                        : vdupq_n_f64(0));
}

INLINE double quarter_hsum_f64(quarter_f64 a) { return vd8_hsum(a); }
INLINE vd8 quarter_hsum8_f64(const quarter_f64 r[8]) { return vd8_hsum8(r); }
INLINE wide_f64 wide_zero_f64(void) { return vd8_set1(0); }
INLINE wide_f64 wide_add_f64(wide_f64 a, quarter_f64 q) { return vd8_add(a, q); }
INLINE double wide_hsum_f64(wide_f64 a) { return vd8_hsum(a); }

/* ---- storage types, masks, int8 (convert.h) --------------------------------------------------- */

#define CONVERT_STEP 8

INLINE uint16x4_t load_u16(const uint16_t *p)
{
    return vreinterpret_u16_u8(vld1_u8((const uint8_t *)p));
}
INLINE void store_u16(uint16_t *p, uint16x4_t a)
{
    vst1_u8((uint8_t *)p, vreinterpret_u8_u16(a));
}
INLINE vec_f32 v_load_f16(const uint16_t *p)
{
    return vcvt_f32_f16(vreinterpret_f16_u16(load_u16(p)));
}
INLINE vec_f32 v_load_bf16(const uint16_t *p)
{
    return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(load_u16(p)), 16));
}
INLINE void v_store2_f16(uint16_t *p, vec_f32 a, vec_f32 b)
{
    store_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a)));
    store_u16(p + 4, vreinterpret_u16_f16(vcvt_f16_f32(b)));
}
INLINE uint16x4_t rounded_to_bf16(vec_f32 v)
{
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint16x4_t rounded = vaddhn_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint16x4_t quiet = vorr_u16(vshrn_n_u32(bits, 16), vdup_n_u16(0x40));
    return vbsl_u16(vmovn_u32(vceqq_f32(v, v)), rounded, quiet);
}
INLINE void v_store2_bf16(uint16_t *p, vec_f32 a, vec_f32 b)
{
    store_u16(p, rounded_to_bf16(a));
    store_u16(p + 4, rounded_to_bf16(b));
}
INLINE void vd8_store_f32_odd(float *p, vd8 a)
{
    UNROLL for (int j = 0; j < 4; j++) vst1_f32(p + 2 * j, vcvtx_f32_f64(a.q[j]));
}

INLINE ptrdiff_t v_compress_f32(float *into, vec_f32 v, const unsigned char *mask)
{
    float lanes[4];
    ptrdiff_t count = 0;
    vst1q_f32(lanes, v);
    UNROLL for (int j = 0; j < 4; j++) {
        into[count] = lanes[j];
        count += mask[j] != 0;
    }
    return count;
}
INLINE ptrdiff_t v_compress_f64(double *into, vec_f64 v, const unsigned char *mask)
{
    const ptrdiff_t first = mask[0] != 0;
    into[0] = vgetq_lane_f64(v, 0);
    into[first] = vgetq_lane_f64(v, 1);
    return first + (mask[1] != 0);
}
INLINE vec_f32 v_keep_f32(vec_f32 v, const unsigned char *mask)
{
    uint32_t bytes;
    memcpy(&bytes, mask, 4);
    const uint16x8_t halves = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(bytes)));
    const uint32x4_t lanes = vmovl_u16(vget_low_u16(halves));
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vtstq_u32(lanes, lanes)));
}
INLINE vec_f64 v_keep_f64(vec_f64 v, const unsigned char *mask)
{
    const uint64x2_t lanes = vsetq_lane_u64(mask[1], vdupq_n_u64(mask[0]), 1);
    return vreinterpretq_f64_u64(vandq_u64(vreinterpretq_u64_f64(v), vtstq_u64(lanes, lanes)));
}

/* As integers NaN is larger than infinity. */
INLINE vec_f32 v_larger_f32(vec_f32 a, vec_f32 v)
{
    const uint32x4_t size = vreinterpretq_u32_f32(vabsq_f32(v));
    return vreinterpretq_f32_u32(vmaxq_u32(vreinterpretq_u32_f32(a), size));
}
INLINE float v_largest_f32(vec_f32 a)
{
    const uint32_t bits = vmaxvq_u32(vreinterpretq_u32_f32(a));
    return vget_lane_f32(vreinterpret_f32_u32(vdup_n_u32(bits)), 0);
}
INLINE vec_f64 v_larger_f64(vec_f64 a, vec_f64 v)
{
    const float64x2_t size = vabsq_f64(v);
    return vbslq_f64(vcgtq_u64(vreinterpretq_u64_f64(size), vreinterpretq_u64_f64(a)), size, a);
}
INLINE double v_largest_f64(vec_f64 a)
{
    return vgetq_lane_f64(v_larger_f64(a, vextq_f64(a, a, 1)), 0);
}

INLINE vec_f32 v_div_f32(vec_f32 a, vec_f32 b) { return vdivq_f32(a, b); }
INLINE vec_f64 v_div_f64(vec_f64 a, vec_f64 b) { return vdivq_f64(a, b); }
INLINE vec_f32 v_clip127_f32(vec_f32 a)
{
    const float32x4_t clipped = vminq_f32(vmaxq_f32(a, vdupq_n_f32(-127)), vdupq_n_f32(127));
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(clipped), vceqq_f32(a, a)));
}
INLINE vec_f64 v_clip127_f64(vec_f64 a)
{
    const float64x2_t clipped = vminq_f64(vmaxq_f64(a, vdupq_n_f64(-127)), vdupq_n_f64(127));
    return vreinterpretq_f64_u64(vandq_u64(vreinterpretq_u64_f64(clipped), vceqq_f64(a, a)));
}

typedef int32x4_t ints_f32;
typedef int32x2_t ints_f64;
INLINE ints_f32 v_nearest_f32(vec_f32 a) { return vcvtnq_s32_f32(a); }
INLINE ints_f64 v_nearest_f64(vec_f64 a) { return vqmovn_s64(vcvtnq_s64_f64(a)); }
INLINE int16x8_t upper_halves(int32x4_t a, int32x4_t b)
{
    return vuzp2q_s16(vreinterpretq_s16_s32(a), vreinterpretq_s16_s32(b));
}
INLINE uint16x8_t lower_halves(int32x4_t a, int32x4_t b)
{
    return vuzp1q_u16(vreinterpretq_u16_s32(a), vreinterpretq_u16_s32(b));
}
INLINE int v_near_tie_f32(const ints_f32 a[4])
{
    return vminvq_u16(vminq_u16(lower_halves(a[0], a[1]), lower_halves(a[2], a[3]))) < 4;
}
INLINE int v_near_tie_f64(const ints_f64 a[4])
{
    return vminvq_u16(lower_halves(vcombine_s32(a[0], a[1]), vcombine_s32(a[2], a[3]))) < 4;
}
INLINE void v_store_i8_f32(signed char *into, const ints_f32 a[4])
{
    const int8x8_t low = vmovn_s16(upper_halves(a[0], a[1]));
    vst1q_s8(into, vmovn_high_s16(low, upper_halves(a[2], a[3])));
}
INLINE void v_store_i8_f64(signed char *into, const ints_f64 a[4])
{
    vst1_s8(into, vmovn_s16(upper_halves(vcombine_s32(a[0], a[1]), vcombine_s32(a[2], a[3]))));
}

/* ---- activations (activation.h) -------------------------------------------------------------- */

#define UNROLL_LONG UNROLL_FULLY

INLINE vec_f32 v_fnma_f32(vec_f32 a, vec_f32 b, vec_f32 c) { return vfmsq_f32(c, a, b); }
INLINE vec_f32 v_max_f32(vec_f32 a, vec_f32 b) { return vmaxq_f32(a, b); }
INLINE vec_f32 v_min_f32(vec_f32 a, vec_f32 b) { return vminq_f32(a, b); }
INLINE vec_f32 v_abs_f32(vec_f32 a) { return vabsq_f32(a); }
INLINE vec_f32 v_power_of_2_f32(vec_f32 a)
{
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(a), 23));
}
INLINE vec_f64 v_fnma_f64(vec_f64 a, vec_f64 b, vec_f64 c) { return vfmsq_f64(c, a, b); }
INLINE vec_f64 v_max_f64(vec_f64 a, vec_f64 b) { return vmaxq_f64(a, b); }
INLINE vec_f64 v_min_f64(vec_f64 a, vec_f64 b) { return vminq_f64(a, b); }
INLINE vec_f64 v_abs_f64(vec_f64 a) { return vabsq_f64(a); }
INLINE vec_f64 v_power_of_2_f64(vec_f64 a)
{
    return vreinterpretq_f64_u64(vshlq_n_u64(vreinterpretq_u64_f64(a), 52));
}

INLINE void v_fence(void) {}
