/* row.h: the row primitives, over the vocabulary of vec_<isa>.h, for the type T.
 *
 * The order of every rounding, which is the same for each instruction set:
 *
 *   - A row's elements are numbered 0 .. n-1 and cut into blocks of 1,024.
 *   - Within a block there are 64 lanes (32 for double). Lane j starts at +0 and takes elements j,
 *     j + LANES, j + 2 LANES, ... in that order, in the row's own type.
 *   - The block's lanes are folded to a quarter: (j, j + LANES/2), then (j, j + LANES/4), still in
 *     the row's type, and widened to double. Blocks are added to each other there, in order.
 *   - What is left is folded in double: (j, j + 8) for float, (j, j + 4), (j, j + 2), (j, j + 1).
 *
 * So the rounding error of a sum grows with 16 + 2 additions in float (32 + 2 in double), then with
 * the number of blocks in double: it stays near one ulp of the row's type up to millions of
 * elements. Elements past a row's end count as +0, which changes no sum that started at +0.
 * Fused multiply-adds stand where v_fma is written and nowhere else (-ffp-contract=off). */

/* Rows whose statistics leave the range of T are read through a factor, a power of two; it takes
 * two factors to write every such power as an element. */
#define scale FN_OF_T(scale)
typedef struct {
    element first, second;
} scale;

#define scale_by FN_OF_T(scale_by)
static inline vec scale_by(vec v, scale s, const int scaled)
{
    return scaled ? v_mul(v_mul(v, v_set1(s.first)), v_set1(s.second)) : v;
}

#define load_some FN_OF_T(load_some)
static inline vec load_some(const element *p, ptrdiff_t n)
{
    return n >= VW ? v_load(p) : v_loadn(p, n);
}

#define store_some FN_OF_T(store_some)
static inline void store_some(element *p, vec v, ptrdiff_t n)
{
    if (n >= VW)
        v_store(p, v);
    else
        v_storen(p, v, n);
}

/* ---- sum(x) ----------------------------------------------------------------------------------- */

#define block_sum FN_OF_T(block_sum)
static inline wide block_sum(const element *x, ptrdiff_t n, scale s, const int scaled)
{
    vec sum[VECTORS];
    UNROLL for (int k = 0; k < VECTORS; k++) sum[k] = v_zero();
    ptrdiff_t i = 0;
    for (; i + LANES <= n; i += LANES)
        UNROLL for (int k = 0; k < VECTORS; k++)
            sum[k] = v_add(sum[k], scale_by(v_load(x + i + k * VW), s, scaled));
    UNROLL for (int k = 0; k < VECTORS; k++) {
        const ptrdiff_t left = n - i - k * VW;
        if (left <= 0) break;
        sum[k] = v_add(sum[k], scale_by(load_some(x + i + k * VW, left), s, scaled));
    }
    return v_fold(sum);
}

#define row_sum FN_OF_T(row_sum)
static inline vd8 row_sum(const element *x, ptrdiff_t n, scale s, const int scaled)
{
    if (n <= BLOCK) return wide_vd8(block_sum(x, n, s, scaled));
    wide sum = block_sum(x, BLOCK, s, scaled);
    for (ptrdiff_t i = BLOCK; i < n; i += BLOCK)
        sum = wide_add(sum, block_sum(x + i, n - i < BLOCK ? n - i : BLOCK, s, scaled));
    return wide_vd8(sum);
}

/* ---- sum(x - pivot) and sum((x - pivot)^2) ---------------------------------------------------- */

#define block_deviations FN_OF_T(block_deviations)
static inline void block_deviations(const element *x, ptrdiff_t n, vec pivot, scale s,
                                    const int scaled, wide *sum, wide *squares)
{
    vec d_sum[VECTORS], d_squares[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v += VECTORS_A_SWEEP) {
        vec a[VECTORS_A_SWEEP], q[VECTORS_A_SWEEP];
        UNROLL for (int k = 0; k < VECTORS_A_SWEEP; k++) a[k] = q[k] = v_zero();
        const element *p = x + v * VW;
        ptrdiff_t i = 0;
        for (; i + LANES <= n; i += LANES)
            UNROLL for (int k = 0; k < VECTORS_A_SWEEP; k++) {
                const vec d = v_sub(scale_by(v_load(p + i + k * VW), s, scaled), pivot);
                a[k] = v_add(a[k], d);
                q[k] = v_fma(d, d, q[k]);
            }
        UNROLL for (int k = 0; k < VECTORS_A_SWEEP; k++) {
            const ptrdiff_t left = n - i - (v + k) * VW;
            if (left <= 0) break;
            vec d = v_sub(scale_by(load_some(p + i + k * VW, left), s, scaled), pivot);
            if (left < VW) d = v_firstn(d, left);
            a[k] = v_add(a[k], d);
            q[k] = v_fma(d, d, q[k]);
        }
        UNROLL for (int k = 0; k < VECTORS_A_SWEEP; k++) {
            d_sum[v + k] = a[k];
            d_squares[v + k] = q[k];
        }
    }
    *sum = v_fold(d_sum);
    *squares = v_fold(d_squares);
}

#define row_deviations FN_OF_T(row_deviations)
static inline void row_deviations(const element *x, ptrdiff_t n, element pivot, scale s,
                                  const int scaled, vd8 *sum, vd8 *squares)
{
    const vec m = v_set1(pivot);
    wide a, q;
    block_deviations(x, n < BLOCK ? n : BLOCK, m, s, scaled, &a, &q);
    for (ptrdiff_t i = BLOCK; i < n; i += BLOCK) {
        wide block_a, block_q;
        block_deviations(x + i, n - i < BLOCK ? n - i : BLOCK, m, s, scaled, &block_a, &block_q);
        a = wide_add(a, block_a);
        q = wide_add(q, block_q);
    }
    *sum = wide_vd8(a);
    *squares = wide_vd8(q);
}

/* ---- sum(x - pivot), sum(g) and sum(g (x - pivot)), g = dy * weight ---------------------------- */

#define block_dots FN_OF_T(block_dots)
static inline void block_dots(const element *x, const element *dy, const element *w, ptrdiff_t n,
                              vec pivot, scale sx, scale sdy, const int scaled, wide total[3])
{
    vec d_sum[VECTORS], g_sum[VECTORS], gd_sum[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v += VECTORS_A_SWEEP) {
        vec a[VECTORS_A_SWEEP], b[VECTORS_A_SWEEP], c[VECTORS_A_SWEEP];
        UNROLL for (int k = 0; k < VECTORS_A_SWEEP; k++) a[k] = b[k] = c[k] = v_zero();
        ptrdiff_t i = v * VW;
        for (; i - v * VW + LANES <= n; i += LANES)
            UNROLL for (int k = 0; k < VECTORS_A_SWEEP; k++) {
                const ptrdiff_t at = i + k * VW;
                const vec d = v_sub(scale_by(v_load(x + at), sx, scaled), pivot);
                vec g = scale_by(v_load(dy + at), sdy, scaled);
                if (w) g = v_mul(g, v_load(w + at));
                a[k] = v_add(a[k], d);
                b[k] = v_add(b[k], g);
                c[k] = v_fma(g, d, c[k]);
            }
        UNROLL for (int k = 0; k < VECTORS_A_SWEEP; k++) {
            const ptrdiff_t at = i + k * VW, left = n - at;
            if (left <= 0) break;
            vec d = v_sub(scale_by(load_some(x + at, left), sx, scaled), pivot);
            if (left < VW) d = v_firstn(d, left);
            vec g = scale_by(load_some(dy + at, left), sdy, scaled);
            if (w) g = v_mul(g, load_some(w + at, left));
            a[k] = v_add(a[k], d);
            b[k] = v_add(b[k], g);
            c[k] = v_fma(g, d, c[k]);
        }
        UNROLL for (int k = 0; k < VECTORS_A_SWEEP; k++) {
            d_sum[v + k] = a[k];
            g_sum[v + k] = b[k];
            gd_sum[v + k] = c[k];
        }
    }
    total[0] = v_fold(d_sum);
    total[1] = v_fold(g_sum);
    total[2] = v_fold(gd_sum);
}

#define row_dots FN_OF_T(row_dots)
static inline void row_dots(const element *x, const element *dy, const element *w, ptrdiff_t n,
                            element pivot, scale sx, scale sdy, const int scaled, double sums[3])
{
    const vec m = v_set1(pivot);
    wide total[3];
    block_dots(x, dy, w, n < BLOCK ? n : BLOCK, m, sx, sdy, scaled, total);
    for (ptrdiff_t i = BLOCK; i < n; i += BLOCK) {
        wide block[3];
        block_dots(x + i, dy + i, w ? w + i : NULL, n - i < BLOCK ? n - i : BLOCK, m, sx, sdy,
                   scaled, block);
        for (int k = 0; k < 3; k++) total[k] = wide_add(total[k], block[k]);
    }
    for (int k = 0; k < 3; k++) sums[k] = vd8_hsum(wide_vd8(total[k]));
}

/* ---- scaling into range ----------------------------------------------------------------------- */

/* The largest magnitude of a row; NaN where the row holds a NaN. */
#define row_largest FN_OF_T(row_largest)
static double row_largest(const element *x, ptrdiff_t n)
{
    double largest = 0, poison = 0;
    for (ptrdiff_t i = 0; i < n; i++) {
        const double a = fabs((double)x[i]);
        if (a > largest) largest = a;
        poison += a * 0; /* NaN once there is a NaN or an infinity */
    }
    return largest + poison;
}

/* 2^exponent as a scale. */
#define scale_to FN_OF_T(scale_to)
static scale scale_to(int exponent)
{
    const int half = exponent / 2;
    return (scale){(element)ldexp(1.0, half), (element)ldexp(1.0, exponent - half)};
}

/* The exponent that brings `largest` into [0.5, 1); 0 for zero. */
#define exponent_to_one FN_OF_T(exponent_to_one)
static int exponent_to_one(double largest)
{
    int exponent;
    frexp(largest, &exponent);
    return -exponent;
}
