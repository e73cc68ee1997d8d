/* row.h: the row primitives, over the vocabulary of vec_<isa>.h, for the type T.
 *
 * The order of every rounding, which is the same for each instruction set:
 *
 *   - A row's elements are numbered 0 .. n-1 and cut into blocks of 1,024.
 *   - Within a block there are 64 lanes (32 for double). Lane j starts at +0 and takes elements j,
 *     j + LANES, j + 2 LANES, ... in that order, in the row's own type.
 *   - The block's lanes are folded to a quarter: (j, j + LANES/2), then (j, j + LANES/4), in T.
 *   - A row of one block goes on halving in T to one sum. Rows of more blocks widen each block's
 *     quarter to double, add blocks there in order, and halve the total in double.
 *
 * So the rounding error of a sum grows with 16 + 6 additions in float (32 + 5 in double), and from
 * there with the number of blocks in double only: it stays near one ulp of T up to millions of
 * elements. Elements past a row's end count as +0, which changes no sum that started at +0.
 * Fused multiply-adds stand where v_fma is written and nowhere else (-ffp-contract=off). */

/* Rows whose statistics leave the range of T are read through a factor, a power of two; it takes
 * two factors to write every such power as an element. */
#define scale FN_OF_T(scale)
typedef struct {
    element first, second;
} scale;

#define scale_by FN_OF_T(scale_by)
INLINE vec scale_by(vec v, scale s) { return v_mul(v_mul(v, v_set1(s.first)), v_set1(s.second)); }

/* How much of a vector there is at i of n elements: from 0 to VW. */
#define part_at FN_OF_T(part_at)
INLINE ptrdiff_t part_at(ptrdiff_t i, ptrdiff_t n)
{
    const ptrdiff_t left = n - i;
    return left < 0 ? 0 : left < VW ? left : VW;
}

#define load_some FN_OF_T(load_some)
INLINE vec load_some(const element *p, ptrdiff_t n)
{
    return n >= VW ? v_load(p) : v_loadn(p, n);
}

#define store_some FN_OF_T(store_some)
INLINE void store_some(element *p, vec v, ptrdiff_t n)
{
    if (n >= VW)
        v_store(p, v);
    else
        v_storen(p, v, n);
}

/* n elements of x, scaled, into y. */
#define scaled_strip FN_OF_T(scaled_strip)
static COLD void scaled_strip(const element *x, element *y, scale s, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i += VW)
        store_some(y + i, scale_by(load_some(x + i, n - i), s), n - i);
}

/* A block where it lies, or, if it is read through a factor, in `room`. */
#define block_at FN_OF_T(block_at)
INLINE const element *block_at(const element *x, ptrdiff_t n, const scale *s, element *room)
{
    if (!s) return x;
    scaled_strip(x, room, *s, n);
    return room;
}

/* ---- sum(x) ----------------------------------------------------------------------------------- */

#define block_sum FN_OF_T(block_sum)
INLINE quarter block_sum(const element *x, ptrdiff_t n)
{
    vec sum[VECTORS];
    UNROLL for (int k = 0; k < VECTORS; k++) sum[k] = v_zero();
    ptrdiff_t i = 0;
    NO_UNROLL for (; i + LANES <= n; i += LANES)
        UNROLL for (int k = 0; k < VECTORS; k++) sum[k] = v_add(sum[k], v_load(x + i + k * VW));
    UNROLL for (int k = 0; k < VECTORS; k++) {
        const ptrdiff_t at = i + k * VW;
        if (at >= n) break;
        sum[k] = v_add(sum[k], load_some(x + at, n - at));
    }
    return v_fold(sum, VECTORS);
}

/* A block's length, from i on. */
#define block_length FN_OF_T(block_length)
INLINE ptrdiff_t block_length(ptrdiff_t n, ptrdiff_t i) { return n - i < BLOCK ? n - i : BLOCK; }

/* s: the factor it is read through, with room for a block, or both NULL. (The room is the caller's:
 * in a frame of this function it would cost the plain rows time.) */
#define row_sum FN_OF_T(row_sum)
OUTLINE double row_sum(const element *x, ptrdiff_t n, const scale *s, element *room)
{
    wide total = wide_zero();
    for (ptrdiff_t i = 0; i < n; i += BLOCK) {
        const ptrdiff_t m = block_length(n, i);
        const quarter sum = block_sum(block_at(x + i, m, s, room), m);
        if (n <= BLOCK) return quarter_hsum(sum);
        total = wide_add(total, sum);
    }
    return wide_hsum(total);
}

/* ---- sum(x - pivot) and sum((x - pivot)^2) ---------------------------------------------------- */

/* x - pivot of up to a vector of elements, +0 past the end. */
#define deviation FN_OF_T(deviation)
INLINE vec deviation(const element *x, ptrdiff_t left, vec pivot)
{
    if (left >= VW) return v_sub(v_load(x), pivot);
    return v_firstn(v_sub(v_loadn(x, left), pivot), left);
}

/* ahead: bytes from x to what is fetched meanwhile, a line for each of x's; 0: nothing. */
#define block_deviations FN_OF_T(block_deviations)
INLINE void block_deviations(const element *x, ptrdiff_t n, vec pivot, ptrdiff_t ahead, quarter *sum,
                             quarter *squares)
{
    const ptrdiff_t line = 64 / (ptrdiff_t)sizeof(element);
    const vec one = v_set1(1), minus = v_sub(v_set1((element)-0.0), pivot);
    vec d_sum[VECTORS], d_squares[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v += VECTORS_A_SWEEP) {
        vec a[VECTORS_A_SWEEP], q[VECTORS_A_SWEEP];
        UNROLL for (int k = 0; k < VECTORS_A_SWEEP; k++) a[k] = q[k] = v_zero();
        ptrdiff_t i = 0;
        NO_UNROLL for (; i + LANES <= n; i += LANES)
        {
            if (ahead) UNROLL for (int k = 0; k < VECTORS_A_SWEEP * VW; k += line)
                __builtin_prefetch((const char *)(x + i + v * VW + k) + ahead, 0, 2);
            UNROLL for (int k = 0; k < VECTORS_A_SWEEP; k++) {
                const vec e = v_load(x + i + (v + k) * VW);
                /* The same bits, and less for the adders to do. */
                const vec d = FMA_SUBTRACTS && k % 2 ? v_fma(e, one, minus) : v_sub(e, pivot);
                a[k] = v_add(a[k], d);
                q[k] = v_fma(d, d, q[k]);
            }
        }
        UNROLL for (int k = 0; k < VECTORS_A_SWEEP; k++) {
            const ptrdiff_t at = i + (v + k) * VW;
            if (at >= n) break;
            const vec d = deviation(x + at, n - at, pivot);
            a[k] = v_add(a[k], d);
            q[k] = v_fma(d, d, q[k]);
        }
        UNROLL for (int k = 0; k < VECTORS_A_SWEEP; k++) {
            d_sum[v + k] = a[k];
            d_squares[v + k] = q[k];
        }
    }
    *sum = v_fold(d_sum, VECTORS);
    *squares = v_fold(d_squares, VECTORS);
}


/* sum(x^2), as block_deviations forms it with a pivot of 0. */
#define block_squares FN_OF_T(block_squares)
OUTLINE quarter block_squares(const element *x, ptrdiff_t n)
{
    vec q[VECTORS];
    UNROLL for (int k = 0; k < VECTORS; k++) q[k] = v_zero();
    ptrdiff_t i = 0;
    NO_UNROLL for (; i + LANES <= n; i += LANES)
        UNROLL for (int k = 0; k < VECTORS; k++) {
            const vec v = v_load(x + i + k * VW);
            q[k] = v_fma(v, v, q[k]);
        }
    UNROLL for (int k = 0; k < VECTORS; k++) {
        const ptrdiff_t at = i + k * VW;
        if (at >= n) break;
        const vec v = load_some(x + at, n - at);
        q[k] = v_fma(v, v, q[k]);
    }
    return v_fold(q, VECTORS);
}

#define row_squares FN_OF_T(row_squares)
OUTLINE double row_squares(const void *row, ptrdiff_t n)
{
    const element *x = row;
    wide total = wide_zero();
    for (ptrdiff_t i = 0; i < n; i += BLOCK) {
        const quarter q = block_squares(x + i, block_length(n, i));
        if (n <= BLOCK) return quarter_hsum(q);
        total = wide_add(total, q);
    }
    return wide_hsum(total);
}

/* Two doubles go back in registers. */
#define deviation_sums FN_OF_T(deviation_sums)
typedef struct {
    double sum, squares;
} deviation_sums;

#define row_deviations FN_OF_T(row_deviations)
OUTLINE deviation_sums row_deviations(const element *x, ptrdiff_t n, element pivot, const scale *s,
                                      element *room)
{
    wide total_a = wide_zero(), total_q = total_a;
    for (ptrdiff_t i = 0; i < n; i += BLOCK) {
        const ptrdiff_t m = block_length(n, i);
        quarter a, q;
        block_deviations(block_at(x + i, m, s, room), m, v_set1(pivot), 0, &a, &q);
        if (n <= BLOCK) return (deviation_sums){quarter_hsum(a), quarter_hsum(q)};
        total_a = wide_add(total_a, a);
        total_q = wide_add(total_q, q);
    }
    return (deviation_sums){wide_hsum(total_a), wide_hsum(total_q)};
}

/* ---- the same of rows of at most 1, 2 or 4 vectors ---------------------------------------------- */

/* How many elements each of a narrow row's vectors holds. */
#define parts FN_OF_T(parts)
typedef struct {
    ptrdiff_t n[4];
} parts;

#define parts_of FN_OF_T(parts_of)
INLINE parts parts_of(ptrdiff_t n)
{
    parts p;
    for (int k = 0; k < 4; k++) p.n[k] = part_at(k * VW, n);
    return p;
}

/* The lanes that such a row leaves out would add +0: that matters to the sign of a zero sum only,
 * which the last addition makes +0. */
#define few_sum FN_OF_T(few_sum)
INLINE quarter few_sum(const element *x, parts p, const int count)
{
    vec v[4];
    UNROLL for (int k = 0; k < count; k++) v[k] = v_loadn(x + k * VW, p.n[k]);
    return v_fold(v, count);
}

#define few_deviations FN_OF_T(few_deviations)
INLINE void few_deviations(const element *x, parts p, const int count, element pivot, quarter *sum,
                           quarter *squares)
{
    vec d[4], q[4];
    UNROLL for (int k = 0; k < count; k++) {
        d[k] = v_firstn(v_sub(v_loadn(x + k * VW, p.n[k]), v_set1(pivot)), p.n[k]);
        q[k] = v_mul(d[k], d[k]);
    }
    *sum = v_fold(d, count);
    *squares = v_fold(q, count);
}

/* ---- sum(x - pivot), sum(g) and sum(g (x - pivot)), g = dy * weight ---------------------------- */

#define block_dots FN_OF_T(block_dots)
INLINE void block_dots(const element *x, const element *dy, const element *w, ptrdiff_t n,
                       vec pivot, quarter total[3])
{
    vec d_sum[VECTORS], g_sum[VECTORS], gd_sum[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; v += VECTORS_A_SWEEP) {
        vec a[VECTORS_A_SWEEP], b[VECTORS_A_SWEEP], c[VECTORS_A_SWEEP];
        UNROLL for (int k = 0; k < VECTORS_A_SWEEP; k++) a[k] = b[k] = c[k] = v_zero();
        ptrdiff_t i = 0;
        NO_UNROLL for (; i + LANES <= n; i += LANES)
            UNROLL for (int k = 0; k < VECTORS_A_SWEEP; k++) {
                const ptrdiff_t at = i + (v + k) * VW;
                const vec d = v_sub(v_load(x + at), pivot);
                vec g = v_load(dy + at);
                if (w) g = v_mul(g, v_load(w + at));
                a[k] = v_add(a[k], d);
                b[k] = v_add(b[k], g);
                c[k] = v_fma(g, d, c[k]);
            }
        UNROLL for (int k = 0; k < VECTORS_A_SWEEP; k++) {
                const ptrdiff_t at = i + (v + k) * VW;
                if (at >= n) break;
                const vec d = deviation(x + at, n - at, pivot);
                vec g = load_some(dy + at, n - at);
                if (w) g = v_mul(g, load_some(w + at, n - at));
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
    total[0] = v_fold(d_sum, VECTORS);
    total[1] = v_fold(g_sum, VECTORS);
    total[2] = v_fold(gd_sum, VECTORS);
}

/* sx, sdy: the factors that x and dy are read through, with room for a block of each, or NULL. */
#define row_dots FN_OF_T(row_dots)
OUTLINE void row_dots(const element *x, const element *dy, const element *w, ptrdiff_t n,
                      element pivot, const scale *sx, const scale *sdy, element *rooms,
                      double sums[3])
{
    wide total[3];
    for (int k = 0; k < 3; k++) total[k] = wide_zero();
    for (ptrdiff_t i = 0; i < n; i += BLOCK) {
        quarter block[3];
        const ptrdiff_t m = block_length(n, i);
        block_dots(block_at(x + i, m, sx, rooms), block_at(dy + i, m, sdy, rooms + BLOCK),
                   w ? w + i : NULL, m, v_set1(pivot), block);
        if (n <= BLOCK) {
            for (int k = 0; k < 3; k++) sums[k] = quarter_hsum(block[k]);
            return;
        }
        for (int k = 0; k < 3; k++) total[k] = wide_add(total[k], block[k]);
    }
    for (int k = 0; k < 3; k++) sums[k] = wide_hsum(total[k]);
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
