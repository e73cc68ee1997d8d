/* convert.h: strips of T from and to the types and strides of arrays; int8; masks.
 *
 * Strips may be of any length. What lies apart in memory is gathered first and scattered last, so
 * that the conversions themselves go by whole vectors, whatever the layout. */

/* ---- one for both types ----------------------------------------------------------------------- */

#ifndef FN_CONVERT
#define FN_CONVERT

/* Whole vectors that cross a cache line are slow to come back from it. */
#define ALIGNED _Alignas(64)

/* What is converted on the stack goes by pieces of so many elements: stacks may be small. */
enum { PIECE = 256 };

typedef enum {
    F32_FROM_F16,
    F32_FROM_BF16,
    F16_FROM_F32,
    BF16_FROM_F32,
    F64_FROM_F32,
    F32_FROM_F64,
    F32_FROM_F64_ODD
} conversion;

#define EACH_STEP(step) NO_UNROLL for (ptrdiff_t i = 0; i < n; i += (step))

#if HAS_HALF_LOADS
/* A step is two vectors. */
INLINE void f32_from_f16(float *into, const uint16_t *from)
{
    v_store_f32(into, v_load_f16(from));
    v_store_f32(into + VW_f32, v_load_f16(from + VW_f32));
}
INLINE void f32_from_bf16(float *into, const uint16_t *from)
{
    v_store_f32(into, v_load_bf16(from));
    v_store_f32(into + VW_f32, v_load_bf16(from + VW_f32));
}
INLINE void f16_from_f32(uint16_t *into, const float *from)
{
    v_store2_f16(into, v_load_f32(from), v_load_f32(from + VW_f32));
}
INLINE void bf16_from_f32(uint16_t *into, const float *from)
{
    v_store2_bf16(into, v_load_f32(from), v_load_f32(from + VW_f32));
}
#endif

/* To and from float, by the other type. */
static const unsigned char to_float[] = {[FN_F64] = F32_FROM_F64_ODD,
                                         [FN_F16] = F32_FROM_F16,
                                         [FN_BF16] = F32_FROM_BF16};
static const unsigned char of_float[] = {[FN_F64] = F64_FROM_F32,
                                         [FN_F16] = F16_FROM_F32,
                                         [FN_BF16] = BF16_FROM_F32};

/* n is a multiple of CONVERT_STEP, which is one of 8. */
OUTLINE void convert_steps(void *into, const void *from, conversion how, ptrdiff_t n)
{
    const uint16_t *from_h = from;
    const float *from_s = from;
    const double *from_d = from;
    uint16_t *h = into;
    float *s = into;
    double *d = into;
    switch (how) {
    case F32_FROM_F16: EACH_STEP(CONVERT_STEP) f32_from_f16(s + i, from_h + i); break;
    case F32_FROM_BF16: EACH_STEP(CONVERT_STEP) f32_from_bf16(s + i, from_h + i); break;
    case F16_FROM_F32: EACH_STEP(CONVERT_STEP) f16_from_f32(h + i, from_s + i); break;
    case BF16_FROM_F32: EACH_STEP(CONVERT_STEP) bf16_from_f32(h + i, from_s + i); break;
    case F64_FROM_F32: EACH_STEP(8) vd8_store_f64(d + i, vd8_load_f32(from_s + i)); break;
    case F32_FROM_F64: EACH_STEP(8) vd8_store_f32(s + i, vd8_load_f64(from_d + i)); break;
    case F32_FROM_F64_ODD: EACH_STEP(8) vd8_store_f32_odd(s + i, vd8_load_f64(from_d + i)); break;
    }
}

#define COPY_EACH(type)                                                                            \
    NO_UNROLL for (; n > 0; n--, into += into_stride, from += from_stride)                         \
    {                                                                                              \
        type bits;                                                                                 \
        memcpy(&bits, from, sizeof bits);                                                          \
        memcpy(into, &bits, sizeof bits);                                                          \
    }

/* n elements of so many bytes as they are, from one stride to another. */
OUTLINE void copy_strip(char *into, ptrdiff_t into_stride, const char *from, ptrdiff_t from_stride,
                        ptrdiff_t size, ptrdiff_t n)
{
    if (into_stride == size && from_stride == size)
        memmove(into, from, (size_t)(n * size));
    else if (size == 8)
        COPY_EACH(uint64_t)
    else if (size == 4)
        COPY_EACH(uint32_t)
    else if (size == 2)
        COPY_EACH(uint16_t)
    else
        COPY_EACH(uint8_t)
}

OUTLINE void convert(char *into, ptrdiff_t into_size, const char *from, ptrdiff_t from_size,
                     conversion how, ptrdiff_t n)
{
    const ptrdiff_t whole = n / CONVERT_STEP * CONVERT_STEP, left = n - whole;
    convert_steps(into, from, how, whole);
    if (!left) return;
    ALIGNED double read[CONVERT_STEP] = {0}, written[CONVERT_STEP];
    copy_strip((char *)read, from_size, from + whole * from_size, from_size, from_size, left);
    convert_steps(written, read, how, CONVERT_STEP);
    copy_strip(into + whole * into_size, into_size, (char *)written, into_size, into_size, left);
}

/* From any type and stride to any other, rounded once to nearest even.
 *
 * Between double and the half types the way leads through a float. There a double is rounded to odd:
 * the last bit says whether anything was cut off, so that the rounding to nearest that follows is
 * that of the double itself. */
OUTLINE void move_strip(char *into, ptrdiff_t into_stride, fn_dtype into_type, const char *from,
                        ptrdiff_t from_stride, fn_dtype from_type, ptrdiff_t n)
{
    ALIGNED double gathered[PIECE], scattered[PIECE];
    ALIGNED float floats[PIECE];
    const ptrdiff_t into_size = fn_size_of(into_type), from_size = fn_size_of(from_type);
    if (into_type == from_type) {
        copy_strip(into, into_stride, from, from_stride, into_size, n);
        return;
    }
    for (ptrdiff_t m; n > 0; n -= m, into += m * into_stride, from += m * from_stride) {
        m = n < PIECE ? n : PIECE;
        const char *p = from;
        char *q = into_stride == into_size ? into : (char *)scattered;
        if (from_stride != from_size) {
            copy_strip((char *)gathered, from_size, from, from_stride, from_size, m);
            p = (const char *)gathered;
        }
        if (into_type == FN_F32) {
            const int how = from_type == FN_F64 ? F32_FROM_F64 : to_float[from_type];
            convert(q, into_size, p, from_size, (conversion)how, m);
        } else {
            if (from_type != FN_F32) {
                convert((char *)floats, 4, p, from_size, (conversion)to_float[from_type], m);
                p = (const char *)floats;
            }
            convert(q, into_size, p, 4, (conversion)of_float[into_type], m);
        }
        if (q != into) copy_strip(into, into_stride, q, into_size, into_size, m);
    }
}

/* Elements of `type` in place, to what a lesser type would hold of them; int8 is another matter. */
OUTLINE void round_elements(char *p, fn_dtype type, fn_dtype to, ptrdiff_t n)
{
    ALIGNED float room[PIECE];
    const ptrdiff_t size = fn_size_of(type), to_size = fn_size_of(to);
    if (to_size >= size || to == FN_I8) return;
    for (ptrdiff_t m; n > 0; n -= m, p += m * size) {
        m = n < PIECE ? n : PIECE;
        move_strip((char *)room, to_size, to, p, size, type, m);
        move_strip(p, size, type, (const char *)room, to_size, to, m);
    }
}

/* How far ahead of a mask, of elements that it packs, and of their places in y lies what is fetched
 * meanwhile, in bytes. Where nothing is, that is what is read. */
typedef struct {
    ptrdiff_t mask, x, y;
} packing_fetch;

#endif

/* ---- any type, any stride --------------------------------------------------------------------- */

/* Whether a strip is what most are: contiguous, of a half type, of float and whole steps. */
#define is_quick FN_OF_T(is_quick)
INLINE int is_quick(fn_dtype dtype, ptrdiff_t stride, ptrdiff_t n)
{
    return sizeof(element) == sizeof(float) && (dtype == FN_F16 || dtype == FN_BF16) &&
           stride == 2 && n % CONVERT_STEP == 0;
}

/* From what lies `stride` bytes apart, exactly; double to float rounds to nearest. */
#define load_strip FN_OF_T(load_strip)
INLINE void load_strip(element *into, const void *from, ptrdiff_t stride, fn_dtype dtype,
                       ptrdiff_t n)
{
    if (is_quick(dtype, stride, n))
        convert_steps(into, from, (conversion)to_float[dtype], n);
    else
        move_strip((char *)into, sizeof(element), FN_OWN_TYPE, from, stride, dtype, n);
}

/* Rounded once, to nearest even. */
#define store_strip FN_OF_T(store_strip)
INLINE void store_strip(void *into, ptrdiff_t stride, fn_dtype dtype, const element *from,
                        ptrdiff_t n)
{
    if (is_quick(dtype, stride, n))
        convert_steps(into, from, (conversion)of_float[dtype], n);
    else
        move_strip(into, stride, dtype, (const char *)from, sizeof(element), FN_OWN_TYPE, n);
}

/* To what `dtype` would hold of it, which is all of it for int8. */
#define round_strip FN_OF_T(round_strip)
INLINE void round_strip(element *p, fn_dtype dtype, ptrdiff_t n)
{
    round_elements((char *)p, FN_OWN_TYPE, dtype, n);
}

/* ---- masks: bytes, 0 for what is left out ------------------------------------------------------ */

/* What the mask keeps, packed; returns how many. `into` may be `from`, and has room for a vector
 * more than is kept. */
#define compress_strip FN_OF_T(compress_strip)
OUTLINE ptrdiff_t compress_strip(element *into, const element *from, const unsigned char *mask,
                                 ptrdiff_t n, packing_fetch ahead)
{
    ptrdiff_t i = 0, count = 0;
    NO_UNROLL for (; i + VW <= n; i += VW)
    {
        __builtin_prefetch(mask + i + ahead.mask, 0, 2);
        __builtin_prefetch((const char *)(from + i) + ahead.x, 0, 2);
        __builtin_prefetch((const char *)(from + i) + ahead.y, 1, 2);
        count += v_compress(into + count, v_load(from + i), mask + i);
    }
    for (; i < n; i++) {
        into[count] = from[i];
        count += mask[i] != 0;
    }
    return count;
}

/* +0 where the mask leaves out, whatever was there. */
#define keep_strip FN_OF_T(keep_strip)
OUTLINE void keep_strip(element *p, const unsigned char *mask, ptrdiff_t n)
{
    ptrdiff_t i = 0;
    for (; i + VW <= n; i += VW) v_store(p + i, v_keep(v_load(p + i), mask + i));
    for (; i < n; i++)
        if (!mask[i]) p[i] = 0;
}

/* ---- int8 ------------------------------------------------------------------------------------- */

/* The largest magnitude; NaN where there is a NaN. */
#define strip_largest FN_OF_T(strip_largest)
OUTLINE element strip_largest(const element *p, ptrdiff_t n)
{
    vec even = v_zero(), odd = v_zero();
    ptrdiff_t i = 0;
    NO_UNROLL for (; i + 2 * VW <= n; i += 2 * VW)
    {
        even = v_larger(even, v_load(p + i));
        odd = v_larger(odd, v_load(p + i + VW));
    }
    NO_UNROLL for (; i < n; i += VW) odd = v_larger(odd, load_some(p + i, n - i));
    return v_largest(v_larger(even, odd));
}

/* int8 is cut from quotients that are counted in such parts. */
#define PARTS ((element)65536)

/* rint(from / step) of four vectors. */
#define divide FN_OF_T(divide)
OUTLINE void divide(ints parts_of[4], const element *from, element step)
{
    /* Added to a number, it leaves no place for a fraction. */
    const vec whole = v_set1(sizeof(element) == sizeof(float) ? 0x1.8p23f : (element)0x1.8p52);
    NO_UNROLL for (int k = 0; k < 4; k++)
    {
        const vec v = v_clip127(v_div(v_load(from + k * VW), v_set1(step)));
        parts_of[k] = v_nearest(v_mul(v_sub(v_add(v, whole), whole), v_set1(PARTS)));
    }
}

/* clip(rint(from / step), -127, 127), NaN as 0, of finite elements up to some 127 steps from 0 where
 * step is finite. Goes by four vectors, past the end, and may be in place; meanwhile it fetches what lies
 * `ahead` further on than what it writes.
 *
 * The division is dear and seldom needed. Quotients are counted in parts of 1/65,536, and one half is
 * added: then the upper half of the number is what is wanted, and the lower one begins anew at each
 * tie. In float the number is off by 1/2 part for the rounding of 65536/step, 1/4 for that of the sum,
 * 1/2 for that to a whole number, and the quotient that is defined moves by 1/4 when it is rounded:
 * by less than 2. So both lie on one side of a tie unless the lower half is the tie's or next to it:
 * 0, 1 or 2, with another part added. */
#define quantise_strip FN_OF_T(quantise_strip)
OUTLINE void quantise_strip(signed char *into, const element *from, element step, ptrdiff_t n,
                            ptrdiff_t ahead)
{
    const element per_step = PARTS / step;
    /* No NaN either. Numbers one at a time may as well be divided. */
    const int finite = VW > 1 && per_step > 0 && per_step <= FLT_MAX;
    const vec factor = v_set1(per_step), half = v_set1(PARTS / 2 + 1);
    NO_UNROLL for (ptrdiff_t i = 0; i < n; i += 4 * VW)
    {
        ints q[4];
        __builtin_prefetch(into + i + ahead, 1, 2);
        UNROLL for (int k = 0; k < 4; k++)
            q[k] = v_nearest(v_fma(v_load(from + i + k * VW), factor, half));
        if (!finite || v_near_tie(q)) {
            ints divided[4];
            divide(divided, from + i, step);
            UNROLL for (int k = 0; k < 4; k++) q[k] = divided[k];
        }
        v_store_i8(into + i, q);
    }
}
