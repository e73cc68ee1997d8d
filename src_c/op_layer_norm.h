/* op_layer_norm.h: y = (x - mean) * rstd * weight + bias over rows of T.
 *
 * Three regimes, which differ in speed and not in a bit:
 *
 *   group    rows of at most GROUP_COLS elements, eight or four at a time: the scalar arithmetic of
 *            the group is one vector's, and the parameters are loaded once for several rows
 *   row      wider rows, one at a time
 *   stream   outputs larger than the cache, one row at a time, written by whole cache lines past
 *            the cache while the next row is fetched
 */

/* Eight rows of 256 elements, or four of 1,024, leave room in L1 for the output. */
#define EIGHT_ROWS_COLS (1024 / (ptrdiff_t)sizeof(element))
#define GROUP_COLS BLOCK

/* ---- y = ((x - pivot)*rstd + shift)*weight + bias --------------------------------------------- */

#define normalise FN_OF_T(normalise)
static inline vec normalise(vec x, vec pivot, vec rstd, vec shift)
{
    return v_fma(v_sub(x, pivot), rstd, shift);
}

#define scale_and_shift FN_OF_T(scale_and_shift)
static inline vec scale_and_shift(vec h, vec w, vec b, const int has_w, const int has_b)
{
    if (has_w && has_b) return v_fma(h, w, b);
    if (has_w) return v_mul(h, w);
    return has_b ? v_add(h, b) : h;
}

#define affine_vector FN_OF_T(affine_vector)
static inline void affine_vector(const element *const *x, element *const *y, const int rows,
                                 ptrdiff_t i, ptrdiff_t left, const vec *pivot, const vec *rstd,
                                 const vec *shift, const element *w, const element *b,
                                 const int has_w, const int has_b)
{
    const vec wv = has_w ? load_some(w + i, left) : v_zero();
    const vec bv = has_b ? load_some(b + i, left) : v_zero();
    vec out[AFFINE_ROWS];
    /* All loads before all stores: y may be x, and rows may lie 4,096 bytes apart. */
    UNROLL for (int r = 0; r < rows; r++)
        out[r] = scale_and_shift(normalise(load_some(x[r] + i, left), pivot[r], rstd[r], shift[r]),
                                 wv, bv, has_w, has_b);
    UNROLL for (int r = 0; r < rows; r++) store_some(y[r] + i, out[r], left);
}

/* `rows` rows side by side; rows is a constant of at most AFFINE_ROWS wherever this is called. */
#define affine_rows_with FN_OF_T(affine_rows_with)
static inline void affine_rows_with(const element *const *x, element *const *y, const int rows,
                                    ptrdiff_t n, const element *pivot, const element *rstd,
                                    const element *shift, const element *w, const element *b,
                                    const int has_w, const int has_b)
{
    vec p[AFFINE_ROWS], r[AFFINE_ROWS], s[AFFINE_ROWS];
    UNROLL for (int k = 0; k < rows; k++) {
        p[k] = v_set1(pivot[k]);
        r[k] = v_set1(rstd[k]);
        s[k] = v_set1(shift[k]);
    }
    ptrdiff_t i = 0;
    for (; i + VW <= n; i += VW) affine_vector(x, y, rows, i, VW, p, r, s, w, b, has_w, has_b);
    if (i < n) affine_vector(x, y, rows, i, n - i, p, r, s, w, b, has_w, has_b);
}

#define affine_rows FN_OF_T(affine_rows)
static inline void affine_rows(const element *const *x, element *const *y, const int rows,
                               ptrdiff_t n, const element *pivot, const element *rstd,
                               const element *shift, const element *w, const element *b)
{
    if (w && b)
        affine_rows_with(x, y, rows, n, pivot, rstd, shift, w, b, 1, 1);
    else if (w)
        affine_rows_with(x, y, rows, n, pivot, rstd, shift, w, b, 1, 0);
    else if (b)
        affine_rows_with(x, y, rows, n, pivot, rstd, shift, w, b, 0, 1);
    else
        affine_rows_with(x, y, rows, n, pivot, rstd, shift, w, b, 0, 0);
}

/* ---- rows that need care ---------------------------------------------------------------------- */

#define careful_row FN_OF_T(careful_row)
static COLD void careful_row(const fn_layer_norm_args *a, ptrdiff_t row)
{
    const element *x = row_at(&a->shape, &a->x, row);
    element *y = row_at(&a->shape, &a->y, row);
    const element *w = a->weight, *b = a->bias;
    const ptrdiff_t n = a->shape.cols;
    row_stats stats;
    careful_stats(x, n, a->eps, &stats);
    const vec pivot = v_set1(stats.pivot), rstd = v_set1(stats.rstd), shift = v_set1(stats.shift);
    for (ptrdiff_t i = 0; i < n; i += VW) {
        const ptrdiff_t left = n - i;
        const vec h = normalise(scale_by(load_some(x + i, left), stats.s, 1), pivot, rstd, shift);
        const vec wv = w ? load_some(w + i, left) : v_zero();
        const vec bv = b ? load_some(b + i, left) : v_zero();
        store_some(y + i, scale_and_shift(h, wv, bv, w != NULL, b != NULL), left);
    }
    if (a->mean) ((element *)a->mean)[row] = (element)stats.mean;
    if (a->rstd) ((element *)a->rstd)[row] = (element)stats.reported_rstd;
}

/* ---- group ------------------------------------------------------------------------------------ */

#define store_group_stats FN_OF_T(store_group_stats)
static inline void store_group_stats(const fn_layer_norm_args *a, ptrdiff_t row, int rows,
                                     const group_stats *stats)
{
    element *mean = a->mean, *rstd = a->rstd;
    for (int i = 0; mean && i < rows; i++)
        mean[row + i] = (element)((double)stats->pivot[i] + stats->c[i]);
    for (int i = 0; rstd && i < rows; i++) rstd[row + i] = (element)stats->reported_rstd[i];
}

#define layer_norm_group FN_OF_T(layer_norm_group)
static inline void layer_norm_group(const fn_layer_norm_args *a, ptrdiff_t row, const int rows)
{
    const element *x[8];
    element *y[8];
    group_stats stats;
    for (int i = 0; i < rows; i++) {
        x[i] = row_at(&a->shape, &a->x, row + i);
        y[i] = row_at(&a->shape, &a->y, row + i);
    }
    const unsigned careful = stats_of_group(x, rows, a->shape.cols, a->eps, &stats);
    if (a->mean || a->rstd) store_group_stats(a, row, rows, &stats);
    if (!careful) {
        for (int i = 0; i < rows; i += AFFINE_ROWS)
            affine_rows(x + i, y + i, AFFINE_ROWS, a->shape.cols, stats.pivot + i, stats.rstd + i,
                        stats.shift + i, a->weight, a->bias);
        return;
    }
    for (int i = 0; i < rows; i++)
        if (careful >> i & 1)
            careful_row(a, row + i);
        else
            affine_rows(x + i, y + i, 1, a->shape.cols, stats.pivot + i, stats.rstd + i,
                        stats.shift + i, a->weight, a->bias);
}

/* ---- row -------------------------------------------------------------------------------------- */

#define store_row_stats FN_OF_T(store_row_stats)
static inline void store_row_stats(const fn_layer_norm_args *a, ptrdiff_t row,
                                   const row_stats *stats)
{
    if (a->mean) ((element *)a->mean)[row] = (element)stats->mean;
    if (a->rstd) ((element *)a->rstd)[row] = (element)stats->reported_rstd;
}

#define layer_norm_row FN_OF_T(layer_norm_row)
static inline void layer_norm_row(const fn_layer_norm_args *a, ptrdiff_t row)
{
    const element *x = row_at(&a->shape, &a->x, row);
    element *y = row_at(&a->shape, &a->y, row);
    row_stats stats;
    if (!plain_stats(x, a->shape.cols, a->eps, &stats)) {
        careful_row(a, row);
        return;
    }
    store_row_stats(a, row, &stats);
    affine_rows(&x, &y, 1, a->shape.cols, &stats.pivot, &stats.rstd, &stats.shift, a->weight,
                a->bias);
}

/* ---- stream ----------------------------------------------------------------------------------- */

#define LINE (64 / (ptrdiff_t)sizeof(element))

/* The cache line that two rows share, held back until it is whole: elements from .. to of it are
 * known. Writing its two parts apart would cost more than the rest of the row saves. */
#define carry FN_OF_T(carry)
typedef struct {
    element held[LINE];
    element *line;
    ptrdiff_t from, to;
} carry;

#define release_carry FN_OF_T(release_carry)
static inline void release_carry(carry *c)
{
    if (c->line && c->from == 0 && c->to == LINE)
        UNROLL for (int k = 0; k < LINE; k += VW) v_stream(c->line + k, v_load(c->held + k));
    else if (c->line)
        for (ptrdiff_t i = c->from; i < c->to; i++) c->line[i] = c->held[i];
    c->line = NULL;
}

#define streamed_row FN_OF_T(streamed_row)
typedef struct {
    const element *x, *w, *b, *next;
    vec pivot, rstd, shift;
    int near;
} streamed_row;

#define streamed_vector FN_OF_T(streamed_vector)
static inline vec streamed_vector(const streamed_row *s, ptrdiff_t i, ptrdiff_t left,
                                  const int has_w, const int has_b)
{
    const vec wv = has_w ? load_some(s->w + i, left) : v_zero();
    const vec bv = has_b ? load_some(s->b + i, left) : v_zero();
    const vec h = normalise(load_some(s->x + i, left), s->pivot, s->rstd, s->shift);
    return scale_and_shift(h, wv, bv, has_w, has_b);
}

/* Elements i .. i + count - 1 of the row into c->held[at ...]. */
#define hold_elements FN_OF_T(hold_elements)
static inline void hold_elements(carry *c, ptrdiff_t at, const streamed_row *s, ptrdiff_t i,
                                 ptrdiff_t count, const int has_w, const int has_b)
{
    for (ptrdiff_t k = 0; k < count; k += VW)
        store_some(c->held + at + k, streamed_vector(s, i + k, count - k, has_w, has_b), count - k);
    c->to = at + count;
}

#define stream_row_with FN_OF_T(stream_row_with)
static inline void stream_row_with(const streamed_row *s, element *y, ptrdiff_t n, carry *c,
                                   const int has_w, const int has_b)
{
    ptrdiff_t i = 0;
    const ptrdiff_t offset = (ptrdiff_t)((uintptr_t)y % 64 / sizeof(element));
    if (offset) {
        if (c->line != y - offset || c->to != offset) {
            release_carry(c);
            c->line = y - offset;
            c->from = offset;
        }
        i = n < LINE - offset ? n : LINE - offset;
        hold_elements(c, offset, s, 0, i, has_w, has_b);
        if (c->to < LINE) return;
    }
    release_carry(c);
    for (; i + LINE <= n; i += LINE) {
        if (s->next && s->near)
            __builtin_prefetch(s->next + i, 0, 3);
        else if (s->next)
            __builtin_prefetch(s->next + i, 0, 2);
        UNROLL for (int k = 0; k < LINE; k += VW)
            v_stream(y + i + k, streamed_vector(s, i + k, VW, has_w, has_b));
    }
    if (i == n) return;
    c->line = y + i;
    c->from = 0;
    hold_elements(c, 0, s, i, n - i, has_w, has_b);
}

#define layer_norm_stream FN_OF_T(layer_norm_stream)
static inline void layer_norm_stream(const fn_layer_norm_args *a, ptrdiff_t row0, ptrdiff_t row1)
{
    const ptrdiff_t n = a->shape.cols, bytes = n * (ptrdiff_t)sizeof(element);
    carry c = {.line = NULL};
    for (ptrdiff_t row = row0; row < row1; row++) {
        const element *x = row_at(&a->shape, &a->x, row);
        element *y = row_at(&a->shape, &a->y, row);
        row_stats stats;
        if (!plain_stats(x, n, a->eps, &stats)) {
            release_carry(&c);
            careful_row(a, row);
            continue;
        }
        store_row_stats(a, row, &stats);
        const streamed_row s = {
            .x = x,
            .w = a->weight,
            .b = a->bias,
            /* Prefetch the next row into L1 where it and the parameters fit, else into L2. */
            .next = row + 1 < row1 && bytes <= 1 << 18 ? row_at(&a->shape, &a->x, row + 1) : NULL,
            .near = bytes <= 1 << 12,
            .pivot = v_set1(stats.pivot),
            .rstd = v_set1(stats.rstd),
            .shift = v_set1(stats.shift),
        };
        if (s.w && s.b)
            stream_row_with(&s, y, n, &c, 1, 1);
        else if (s.w)
            stream_row_with(&s, y, n, &c, 1, 0);
        else if (s.b)
            stream_row_with(&s, y, n, &c, 0, 1);
        else
            stream_row_with(&s, y, n, &c, 0, 0);
    }
    release_carry(&c);
    v_fence();
}

/* ---- the kernel ------------------------------------------------------------------------------- */

#define layer_norm FN_OF_T(layer_norm)
static void layer_norm(const void *args, ptrdiff_t row0, ptrdiff_t row1)
{
    const fn_layer_norm_args *a = args;
    ptrdiff_t row = row0;
    if (a->stream) {
        layer_norm_stream(a, row0, row1);
        return;
    }
    if (a->shape.cols <= EIGHT_ROWS_COLS)
        for (; row + 8 <= row1; row += 8) layer_norm_group(a, row, 8);
    if (a->shape.cols <= GROUP_COLS)
        for (; row + 4 <= row1; row += 4) layer_norm_group(a, row, 4);
    for (; row < row1; row++) layer_norm_row(a, row);
}
