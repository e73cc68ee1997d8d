/* op_stats.h: mean, variance and 1/sqrt(variance + eps) of rows of T: what layer_norm and moments
 * share.
 *
 * Two passes with a corrected mean. With m0 = round(sum(x)/n) and d = x - m0, one pass gives
 *
 *     c = sum(d)/n        var = sum(d*d)/n - c*c        mean = m0 + c
 *
 * c is what rounding the mean to T lost; without it a row with |mean| = 1e7 std is wrong in its
 * first digit. Rows that this does not serve go to careful_stats, one at a time: where m0 was too
 * far off (c*c > var/4) it is moved by c and the pass is repeated; where the statistics leave the
 * range of T the row is read through a power of two that brings max|x| into [0.5, 1). */

/* What the affine pass needs of a row: y = ((x - pivot)*rstd + shift)*weight + bias, all of it on
 * the scaled row where s is not 1. */
#define row_stats FN_OF_T(row_stats)
typedef struct {
    element pivot, rstd, shift;
    scale s;
    double mean, variance, reported_rstd, c;
} row_stats;

/* Variances below this may have lost digits to underflow of the squares. */
#define LEAST_VARIANCE (sizeof(element) == sizeof(float) ? 0x1p-80 : 0x1p-600)

#define MOST (sizeof(element) == sizeof(float) ? (element)FLT_MAX : (element)DBL_MAX)

#define sums_to_stats FN_OF_T(sums_to_stats)
INLINE int sums_to_stats(double sum, double squares, double per_n, double eps,
                                element pivot, row_stats *stats)
{
    const double c = sum * per_n;
    const double variance = squares * per_n - c * c;
    const double padded = variance + eps;
    const double rstd = 1.0 / sqrt(padded);
    stats->pivot = pivot;
    stats->rstd = (element)rstd;
    stats->shift = (element)(0.0 - c * rstd);
    stats->mean = (double)pivot + c;
    stats->variance = variance;
    stats->reported_rstd = rstd;
    stats->c = c;
    return c * c <= variance * 0.25 && LEAST_VARIANCE <= padded && variance <= DBL_MAX;
}

/* The first pass over one row. */
#define row_pivot FN_OF_T(row_pivot)
INLINE element row_pivot(const element *x, ptrdiff_t n)
{
    return (element)(row_sum(x, n, NULL, NULL) * (1.0 / (double)n));
}

/* The second; false where the row needs careful_stats. rms: deviations are from 0, and their mean
 * counts as 0; pivot is 0. */
#define plain_stats FN_OF_T(plain_stats)
INLINE int plain_stats(const element *x, ptrdiff_t n, element pivot, double eps, int rms,
                       row_stats *stats)
{
    const deviation_sums d =
        rms ? (deviation_sums){0, row_squares(x, n)} : row_deviations(x, n, pivot, NULL, NULL);
    return sums_to_stats(d.sum, d.squares, 1.0 / (double)n, eps, pivot, stats);
}

/* eps for a row times 2^exponent. Where it overflows it is all that counts, and where it underflows
 * it counts nothing. */
#define scaled_rstd FN_OF_T(scaled_rstd)
static double scaled_rstd(double variance, double eps, int exponent)
{
    const double scaled_eps = ldexp(eps, 2 * exponent);
    if (scaled_eps > DBL_MAX) return ldexp(1.0 / sqrt(eps), -exponent);
    return 1.0 / sqrt(variance + scaled_eps);
}

/* The recentred pass on the row times 2^exponent; what it stores is the scaled row's. A constant row,
 * whose variance is 0, gives the bias, also where 1/sqrt(eps) is infinite. */
#define recentred_stats FN_OF_T(recentred_stats)
static COLD void recentred_stats(const element *x, ptrdiff_t n, double eps, int rms, int exponent,
                                 row_stats *stats)
{
    element room[BLOCK];
    const double per_n = 1.0 / (double)n;
    const scale s = scale_to(exponent);
    element pivot = rms ? 0 : (element)(row_sum(x, n, &s, room) * per_n);
    double c;
    for (int pass = 0;; pass++) {
        const deviation_sums d = row_deviations(x, n, pivot, &s, room);
        c = rms ? 0 : d.sum * per_n;
        stats->variance = d.squares * per_n - c * c;
        stats->mean = (double)pivot + c;
        const element moved = (element)stats->mean;
        if (c * c <= stats->variance * 0.25 || pass == 3 || moved == pivot || moved != moved) break;
        pivot = moved;
    }
    stats->pivot = pivot;
    stats->s = s;
    stats->c = c;
    /* Not above 0: the row is constant, or, where eps is all that counts, its squares underflowed. */
    if (stats->variance < 0) stats->variance = 0;
    stats->reported_rstd = scaled_rstd(stats->variance, eps, exponent);
    stats->rstd = (element)stats->reported_rstd;
    stats->shift = (element)(0.0 - c * stats->reported_rstd);
    if (stats->variance == 0 && !(stats->rstd <= MOST)) stats->rstd = stats->shift = 0;
}

#define careful_stats FN_OF_T(careful_stats)
static COLD void careful_stats(const element *x, ptrdiff_t n, double eps, int rms,
                               row_stats *stats)
{
    const double largest = row_largest(x, n);
    if (!(largest <= DBL_MAX)) { /* NaN and infinity take the row with them */
        *stats = (row_stats){NAN, NAN, NAN, {1, 1}, NAN, NAN, NAN, NAN};
        return;
    }
    int exponent = 0;
    recentred_stats(x, n, eps, rms, exponent, stats);
    if (!(stats->variance <= DBL_MAX && LEAST_VARIANCE <= stats->variance + eps)) {
        exponent = exponent_to_one(largest);
        recentred_stats(x, n, eps, rms, exponent, stats);
    }
    stats->reported_rstd =
        stats->variance > 0 ? ldexp(stats->reported_rstd, exponent) : 1.0 / sqrt(eps);
    stats->mean = ldexp(stats->mean, -exponent);
    stats->variance = ldexp(stats->variance, -2 * exponent);
}

/* ---- several rows at once --------------------------------------------------------------------- */

/* Two, four or eight rows of one block, whose scalar arithmetic is done as one vector. It rounds as
 * sums_to_stats does. */
#define group_stats FN_OF_T(group_stats)
typedef struct {
    const element *x[8];
    element *room[8]; /* each row's own, where there are steps */
    ptrdiff_t n[8];
    double per_n[8];
    element pivot[8], rstd[8], shift[8];
    double c[8], reported_rstd[8];
    unsigned careful; /* a bit for each row that needs careful_stats */
} group_stats;

/* What has been stored is to be loaded element by element, which costs nothing; left alone, the
 * compiler takes it out of registers by two shuffles each. */
#define KEEP_IN_MEMORY(p) __asm__ volatile("" : : "r"(p) : "memory")

#define group_pivots FN_OF_T(group_pivots)
INLINE void group_pivots(vd8 sums, vd8 per_n, group_stats *stats)
{
    const vd8 total = vd8_add(sums, vd8_set1(0)); /* -0 becomes +0 */
    vd8_store_element(stats->pivot, vd8_mul(total, per_n));
    KEEP_IN_MEMORY(stats);
}

#define group_rstds FN_OF_T(group_rstds)
INLINE void group_rstds(vd8 sums, vd8 squares, vd8 per_n, double eps, group_stats *stats)
{
    const vd8 c = vd8_mul(sums, per_n), c2 = vd8_mul(c, c);
    const vd8 variance = vd8_sub(vd8_mul(squares, per_n), c2);
    const vd8 padded = vd8_add(variance, vd8_set1(eps));
    const vd8 rstd = vd8_div(vd8_set1(1), vd8_sqrt(padded));
    vd8_store_element(stats->rstd, rstd);
    vd8_store_element(stats->shift, vd8_sub(vd8_set1(0), vd8_mul(c, rstd)));
    vd8_store_f64(stats->c, c);
    vd8_store_f64(stats->reported_rstd, rstd);
    stats->careful = 0xff & ~(vd8_le(c2, vd8_mul(variance, vd8_set1(0.25))) &
                              vd8_le(vd8_set1(LEAST_VARIANCE), padded) &
                              vd8_le(variance, vd8_set1(DBL_MAX)));
    KEEP_IN_MEMORY(stats);
}

/* The same of two rows: for so few, scalars cost less. */
#define pair_pivots FN_OF_T(pair_pivots)
INLINE void pair_pivots(const quarter sums[2], group_stats *stats)
{
    UNROLL for (int i = 0; i < 2; i++)
        stats->pivot[i] = (element)((quarter_hsum(sums[i]) + 0.0) * stats->per_n[i]);
}

#define pair_rstds FN_OF_T(pair_rstds)
INLINE void pair_rstds(const double sums[2], const quarter squares[2], double eps,
                       group_stats *stats)
{
    stats->careful = 0;
    UNROLL for (int i = 0; i < 2; i++) {
        row_stats row;
        const int plain = sums_to_stats(sums[i], quarter_hsum(squares[i]), stats->per_n[i], eps,
                                        stats->pivot[i], &row);
        stats->rstd[i] = row.rstd;
        stats->shift[i] = row.shift;
        stats->c[i] = sums[i] * stats->per_n[i];
        stats->reported_rstd[i] = row.reported_rstd;
        stats->careful |= (unsigned)!plain << i;
    }
}

#define stats_in_group FN_OF_T(stats_in_group)
INLINE row_stats stats_in_group(const group_stats *stats, int i)
{
    return (row_stats){.pivot = stats->pivot[i], .rstd = stats->rstd[i], .shift = stats->shift[i]};
}
