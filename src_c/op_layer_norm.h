/* op_layer_norm.h: y = (x - mean) * rstd * weight + bias over rows of T. Root mean square is the same
 * with a mean of 0. Where there are steps (steps.h), rows come from the prologue and go to the
 * epilogue; what lies between is one text.
 *
 * Four regimes, which differ in speed and not in a bit:
 *
 *   narrow   rows of at most four vectors, eight at a time, in registers
 *   group    rows of one block, four or two at a time: the scalar arithmetic of the group is one vector's,
 *            and the parameters are loaded once for several rows
 *   row      wider rows, one at a time
 *   stream   outputs larger than the cache, one row at a time, written by whole cache lines past
 *            the cache while a row to come is fetched (groups whose last steps leave them in a
 *            room are written so from there: stream_rooms)
 *
 * Each goes through rows in three steps: start (the pivot), middle (variance and rstd) and finish
 * (the output). A step ends in a chain of scalar operations of some hundred cycles that the next
 * one waits for; so while it runs, another group's step is done: start of one group, finish of the
 * group before it, middle of the first. (Single rows overlap where it pays: rows_overlap.) */

/* In plain C there is nothing to gain from registers. */
#define NARROW_COLS (VW > 1 ? 4 * VW : 0)

/* ---- one row ---------------------------------------------------------------------------------- */

#define store_row_stats FN_OF_T(store_row_stats)
INLINE void store_row_stats(const fn_layer_norm_args *a, ptrdiff_t row, double mean, double rstd)
{
    if (a->mean) ((element *)a->mean)[row] = (element)mean;
    if (a->rstd) ((element *)a->rstd)[row] = (element)rstd;
}

#define affine_row FN_OF_T(affine_row)
INLINE void affine_row(const fn_layer_norm_args *a, ptrdiff_t row, const row_stats *stats)
{
    /* Of x the next row has been started already. */
    affine_strip(row_at(&a->shape, &a->x, row), row_at(&a->shape, &a->y, row), a->weight, a->bias,
                 a->shape.cols, stats, a->fetch ? 2 * a->x.stride : 0, a->fetch ? a->y.stride : 0);
}

/* A plain row, read through stats->s. */
#define scaled_affine_row FN_OF_T(scaled_affine_row)
static COLD void scaled_affine_row(const fn_layer_norm_args *a, ptrdiff_t row,
                                   const row_stats *stats)
{
    const element *x = row_at(&a->shape, &a->x, row), *w = a->weight, *b = a->bias;
    element *y = row_at(&a->shape, &a->y, row);
    for (ptrdiff_t i = 0; i < a->shape.cols; i += BLOCK) {
        const finished f = {.w = w, .b = b, .stats = stats, .scaled = 1};
        finish_strip(&f, x + i, y + i, i, block_length(a->shape.cols, i));
    }
}

/* A row whose statistics take care; x as the prologue left it. */
#define careful_row FN_OF_T(careful_row)
static COLD void careful_row(const fn_layer_norm_args *a, workspace *space, ptrdiff_t row,
                             const element *x, ptrdiff_t n)
{
    row_stats stats = {.mean = 0, .reported_rstd = NAN, .s = {1, 1}};
    if (n) careful_stats(x, n, a->eps, a->rms, &stats);
    store_row_stats(a, row, stats.mean, stats.reported_rstd);
    if (a->steps)
        epilogue(&a->shape, a->steps, space, row, x, &stats, 1);
    else
        scaled_affine_row(a, row, &stats);
}

/* Rows of a group that cannot go side by side: some need care, or there are steps. */
#define finish_one_by_one FN_OF_T(finish_one_by_one)
OUTLINE void finish_one_by_one(const fn_layer_norm_args *a, workspace *space, ptrdiff_t row,
                               int rows, const group_stats *stats)
{
    for (int i = 0; i < rows; i++) {
        const row_stats plain = stats_in_group(stats, i);
        const element *x = a->steps ? stats->x[i] : row_at(&a->shape, &a->x, row + i);
        if (stats->careful >> i & 1)
            careful_row(a, space, row + i, x, a->steps ? stats->n[i] : a->shape.cols);
        else if (a->steps)
            epilogue(&a->shape, a->steps, space, row + i, x, &plain, 0);
        else
            affine_row(a, row + i, &plain);
    }
}

#define store_group_stats FN_OF_T(store_group_stats)
OUTLINE void store_group_stats(const fn_layer_norm_args *a, ptrdiff_t row, int rows,
                               const group_stats *stats)
{
    for (int i = 0; i < rows; i++)
        store_row_stats(a, row + i, (double)stats->pivot[i] + stats->c[i], stats->reported_rstd[i]);
}

/* ---- narrow ----------------------------------------------------------------------------------- */

/* What a run of narrow rows shares. */
#define narrow_rows FN_OF_T(narrow_rows)
typedef struct {
    const fn_layer_norm_args *a;
    parts p;
    vec w[4], b[4];
    vd8 per_n;
    ptrdiff_t x_ahead, y_ahead; /* bytes to what is fetched meanwhile */
} narrow_rows;

/* Some 4 KB ahead, in whole rows; 0, a row that is being read anyway, where all of it is in cache. */
#define narrow_ahead FN_OF_T(narrow_ahead)
INLINE ptrdiff_t narrow_ahead(const fn_layer_norm_args *a, ptrdiff_t stride)
{
    const ptrdiff_t bytes = stride < 0 ? -stride : stride;
    return a->fetch && bytes ? stride * (1 + 4096 / bytes) : 0;
}

#define fetch_narrow FN_OF_T(fetch_narrow)
INLINE void fetch_narrow(const narrow_rows *s, const char *x, const char *y)
{
    __builtin_prefetch(x + s->x_ahead, 0, 3);
    __builtin_prefetch(y + s->y_ahead, 1, 3);
}

#define narrow_x FN_OF_T(narrow_x)
INLINE const element *narrow_x(const narrow_rows *s, ptrdiff_t row)
{
    return (const element *)((const char *)s->a->x.data + row * s->a->x.stride);
}

#define narrow_start FN_OF_T(narrow_start)
INLINE void narrow_start(const narrow_rows *s, ptrdiff_t row, const int few, group_stats *stats)
{
    quarter sums[8];
    UNROLL for (int i = 0; i < 8; i++) sums[i] = few_sum(narrow_x(s, row + i), s->p, few);
    group_pivots(quarter_hsum8(sums), s->per_n, stats);
}

#define narrow_middle FN_OF_T(narrow_middle)
INLINE void narrow_middle(const narrow_rows *s, ptrdiff_t row, const int few, group_stats *stats)
{
    quarter sums[8], squares[8];
    UNROLL for (int i = 0; i < 8; i++)
        few_deviations(narrow_x(s, row + i), s->p, few, stats->pivot[i], &sums[i], &squares[i]);
    group_rstds(quarter_hsum8(sums), quarter_hsum8(squares), s->per_n, s->a->eps, stats);
}

#define narrow_finish FN_OF_T(narrow_finish)
INLINE void narrow_finish(const narrow_rows *s, ptrdiff_t row, const int few,
                          const group_stats *stats)
{
    const fn_layer_norm_args *a = s->a;
    char *y = (char *)a->y.data + row * a->y.stride;
    if (stats->careful) {
        finish_one_by_one(a, NULL, row, 8, stats);
        return;
    }
    UNROLL for (int i = 0; i < 8; i++) {
        const element *x = narrow_x(s, row + i);
        const vec pivot = v_set1(stats->pivot[i]), rstd = v_set1(stats->rstd[i]);
        const vec shift = v_set1(stats->shift[i]);
        element *out = (element *)(y + i * a->y.stride);
        UNROLL for (int k = 0; k < few; k++) {
            const vec h = normalise(v_loadn(x + k * VW, s->p.n[k]), pivot, rstd, shift);
            fetch_narrow(s, (const char *)(x + k * VW), (const char *)(out + k * VW));
            v_storen(out + k * VW, v_fma(h, s->w[k], s->b[k]), s->p.n[k]);
        }
    }
}

/* A weight of 1 and a bias of -0 change no bit, so they stand for those that are absent. Returns
 * the first row that is left. */
#define layer_norm_narrow FN_OF_T(layer_norm_narrow)
INLINE ptrdiff_t layer_norm_narrow(const fn_layer_norm_args *a, ptrdiff_t row, ptrdiff_t end,
                                   const int few)
{
    const element *w = a->weight, *b = a->bias;
    narrow_rows s = {.a = a,
                     .p = parts_of(a->shape.cols),
                     .per_n = vd8_set1(1.0 / (double)a->shape.cols),
                     .x_ahead = narrow_ahead(a, a->x.stride),
                     .y_ahead = narrow_ahead(a, a->y.stride)};
    group_stats stats[2];
    UNROLL for (int k = 0; k < few; k++) {
        s.w[k] = w ? v_loadn(w + k * VW, s.p.n[k]) : v_set1(1);
        s.b[k] = b ? v_loadn(b + k * VW, s.p.n[k]) : v_set1((element)-0.0);
    }
    const ptrdiff_t first = row;
    for (int now = 0;; row += 8, now = !now) {
        const int more = row + 8 <= end;
        if (more) narrow_start(&s, row, few, &stats[now]);
        if (row > first) narrow_finish(&s, row - 8, few, &stats[!now]);
        if (!more) return row;
        narrow_middle(&s, row, few, &stats[now]);
        if (a->mean || a->rstd) store_group_stats(a, row, 8, &stats[now]);
    }
}

/* ---- narrow rows of half a vector ------------------------------------------------------------- */

#if HAS_HALVES
/* Contiguous rows of exactly VW/2 elements lie two to a vector, eight to four vectors. */

#define halves_start FN_OF_T(halves_start)
INLINE void halves_start(const narrow_rows *s, ptrdiff_t row, group_stats *stats)
{
    vec v[4];
    UNROLL for (int k = 0; k < 4; k++) v[k] = v_load(narrow_x(s, row) + k * VW);
    group_pivots(halves_hsum8(v), s->per_n, stats);
}

#define halves_middle FN_OF_T(halves_middle)
INLINE void halves_middle(const narrow_rows *s, ptrdiff_t row, group_stats *stats)
{
    vec d[4], q[4];
    UNROLL for (int k = 0; k < 4; k++) {
        d[k] = v_sub(v_load(narrow_x(s, row) + k * VW), v_halves(stats->pivot, k));
        q[k] = v_mul(d[k], d[k]);
    }
    group_rstds(halves_hsum8(d), halves_hsum8(q), s->per_n, s->a->eps, stats);
}

#define halves_finish FN_OF_T(halves_finish)
INLINE void halves_finish(const narrow_rows *s, ptrdiff_t row, const group_stats *stats)
{
    const element *x = narrow_x(s, row);
    element *y = (element *)((char *)s->a->y.data + row * s->a->y.stride);
    if (stats->careful) {
        finish_one_by_one(s->a, NULL, row, 8, stats);
        return;
    }
    UNROLL for (int k = 0; k < 4; k++) {
        const vec h = normalise(v_load(x + k * VW), v_halves(stats->pivot, k),
                                v_halves(stats->rstd, k), v_halves(stats->shift, k));
        fetch_narrow(s, (const char *)(x + k * VW), (const char *)(y + k * VW));
        v_store(y + k * VW, v_fma(h, s->w[0], s->b[0]));
    }
}

#define layer_norm_halves FN_OF_T(layer_norm_halves)
OUTLINE ptrdiff_t layer_norm_halves(const fn_layer_norm_args *a, ptrdiff_t row, ptrdiff_t end)
{
    element w[VW], b[VW];
    for (int i = 0; i < VW; i++) {
        w[i] = a->weight ? ((const element *)a->weight)[i % (VW / 2)] : 1;
        b[i] = a->bias ? ((const element *)a->bias)[i % (VW / 2)] : (element)-0.0;
    }
    const narrow_rows s = {
        .a = a,
        .per_n = vd8_set1(1.0 / (double)(VW / 2)),
        .w = {v_load(w)},
        .b = {v_load(b)},
        .x_ahead = narrow_ahead(a, a->x.stride),
        .y_ahead = narrow_ahead(a, a->y.stride)};
    const ptrdiff_t first = row;
    group_stats stats[2];
    for (int now = 0;; row += 8, now = !now) {
        const int more = row + 8 <= end;
        if (more) halves_start(&s, row, &stats[now]);
        if (row > first) halves_finish(&s, row - 8, &stats[!now]);
        if (!more) return row;
        halves_middle(&s, row, &stats[now]);
        if (a->mean || a->rstd) store_group_stats(a, row, 8, &stats[now]);
    }
}
#endif

/* ---- group ------------------------------------------------------------------------------------ */

/* Groups of four pay for short rows of float; elsewhere they would be code for little. */
#define HAS_FOURS (VW > 1 && sizeof(element) == sizeof(float))

/* The rows that a group lacks of eight are copies. */
#define copy_rows FN_OF_T(copy_rows)
INLINE void copy_rows(quarter sums[8], const int rows)
{
    UNROLL for (int i = rows; i < 8; i++) sums[i] = sums[i - rows];
}

/* The lengths of a group's rows, where they differ. An empty row divides by nothing: its sums are
 * 0, and it ends with care. */
#define group_lengths FN_OF_T(group_lengths)
INLINE void group_lengths(group_stats *stats, const int rows)
{
    for (int i = 0; i < rows; i++) stats->per_n[i] = stats->n[i] ? 1.0 / (double)stats->n[i] : 0;
    for (int i = rows; i < 8; i++) stats->per_n[i] = stats->per_n[i - rows];
    KEEP_IN_MEMORY(stats);
}

/* Whether the sums were formed as well. */
#define group_prologue FN_OF_T(group_prologue)
OUTLINE int group_prologue(const fn_layer_norm_args *a, workspace *space, ptrdiff_t row,
                           int rows, int now, group_stats *stats, quarter *sums)
{
    const fn_steps *s = a->steps;
    if (a->fetch == FN_FETCH_BETWEEN_PASSES) fetch_step_rows(space->ahead, a, row, rows);
    for (int i = 0; i < rows; i++) {
        stats->room[i] = space->rooms + (now * rows + i) * space->room_stride;
        if (space->half) {
            sums[i] = half_sum(a, row + i, rows, stats->room[i]);
            stats->x[i] = stats->room[i];
        } else if (space->plain_sums) {
            sums[i] = plain_sum(s, row + i, a->shape.cols, stats->room[i], &stats->x[i]);
        } else {
            stats->x[i] = prologue(&a->shape, s, a, row + i, stats->room[i], &stats->n[i]);
        }
        fetch_share(space->ahead);
    }
    if (s->lengths || s->starts || s->mask.data) group_lengths(stats, rows);
    return space->half || space->plain_sums;
}

/* Bytes from a row to what is asked for while it is read: it comes two groups later, as the next one has
 * been started already. 0: nothing is. */
#define step_ahead FN_OF_T(step_ahead)
OUTLINE ptrdiff_t step_ahead(const fn_steps *s)
{
    const int uneven = s->lengths || s->starts || s->mask.data;
    return is_direct(&s->x) && !has_sum(s) && !uneven ? s->x.stride : 0;
}

#define group_ahead FN_OF_T(group_ahead)
INLINE ptrdiff_t group_ahead(const fn_layer_norm_args *a, const int rows)
{
    if (a->fetch != FN_FETCH_IN_PASSES) return 0;
    return 2 * rows * (a->steps ? step_ahead(a->steps) : a->x.stride);
}

/* Whether that is in the pass of deviations, where a line has more arithmetic to itself than in the
 * affine pass: what it writes is on its way then as well, and together they are more than the last cache
 * delivers meanwhile. Nothing is gained by asking for y too, for which the CPU does it. Measured: not for
 * squares alone, nor for short rows. */
#define FETCHED_IN_MIDDLE(a, rows) ((rows) == 2 && !(a)->rms)

#define group_middle FN_OF_T(group_middle)
INLINE void group_middle(const fn_layer_norm_args *a, workspace *space, ptrdiff_t row,
                         const int rows, group_stats *stats)
{
    const ptrdiff_t ahead = FETCHED_IN_MIDDLE(a, rows) ? group_ahead(a, rows) : 0;
    quarter sums[8], squares[8];
    if (a->rms) {
        NO_UNROLL for (int i = 0; i < rows; i++) squares[i] = block_squares(stats->x[i], stats->n[i]);
    } else {
        NO_UNROLL for (int i = 0; i < rows; i++)
            block_deviations(stats->x[i], stats->n[i], v_set1(stats->pivot[i]), ahead, &sums[i],
                             &squares[i]);
    }
    if (rows == 2) {
        const double deviations[2] = {a->rms ? 0 : quarter_hsum(sums[0]),
                                      a->rms ? 0 : quarter_hsum(sums[1])};
        pair_rstds(deviations, squares, a->eps, stats);
    } else {
        vd8 deviations = vd8_set1(0);
        copy_rows(squares, rows);
        if (!a->rms) {
            copy_rows(sums, rows);
            deviations = quarter_hsum8(sums);
        }
        group_rstds(deviations, quarter_hsum8(squares), vd8_load_f64(stats->per_n), a->eps, stats);
        stats->careful &= (1u << rows) - 1;
    }
    if (a->steps) {
        fetch_share(space->ahead);
        for (int i = 0; i < rows; i++) stats->careful |= (unsigned)!stats->n[i] << i;
    }
    if (a->mean || a->rstd) store_group_stats(a, row, rows, stats);
}

#define group_start FN_OF_T(group_start)
INLINE void group_start(const fn_layer_norm_args *a, workspace *space, ptrdiff_t row,
                        const int rows, int now, group_stats *stats)
{
    quarter sums[8];
    int summed = 0;
    if (a->steps)
        summed = group_prologue(a, space, row, rows, now, stats, sums);
    else
        UNROLL for (int i = 0; i < rows; i++) stats->x[i] = row_at(&a->shape, &a->x, row + i);
    if (a->rms) {
        for (int i = 0; i < rows; i++) stats->pivot[i] = 0;
        return;
    }
    if (!summed)
        NO_UNROLL for (int i = 0; i < rows; i++) sums[i] = block_sum(stats->x[i], stats->n[i]);
    if (rows == 2) {
        pair_pivots(sums, stats);
        return;
    }
    copy_rows(sums, rows);
    group_pivots(quarter_hsum8(sums), vd8_load_f64(stats->per_n), stats);
}

/* What the rows of a group share. */
#define group_pass FN_OF_T(group_pass)
typedef struct {
    const element *w, *b;
    ptrdiff_t x_ahead, y_ahead;
} group_pass;

/* The rows of a group side by side, into y. */
#define group_affine FN_OF_T(group_affine)
INLINE void group_affine(const group_pass *p, const group_stats *stats, element *const *y,
                         const int rows, ptrdiff_t n)
{
    const int together = rows < AFFINE_ROWS ? rows : AFFINE_ROWS;
    affine a = {.w = p->w, .b = p->b, .x_ahead = p->x_ahead, .y_ahead = p->y_ahead};
    for (int first = 0; first < rows; first += together) {
        UNROLL for (int r = 0; r < together; r++) {
            a.x[r] = stats->x[first + r];
            a.y[r] = y[first + r];
            a.pivot[r] = v_set1(stats->pivot[first + r]);
            a.rstd[r] = v_set1(stats->rstd[first + r]);
            a.shift[r] = v_set1(stats->shift[first + r]);
        }
        affine_pass(&a, together, n);
    }
}

#define group_affine_of FN_OF_T(group_affine_of)
OUTLINE void group_affine_of(const group_pass *pass, const group_stats *stats, element *const *y,
                             int rows, ptrdiff_t n)
{
    if (HAS_FOURS && rows == 4)
        group_affine(pass, stats, y, 4, n);
    else
        group_affine(pass, stats, y, 2, n);
}

#define plain_group FN_OF_T(plain_group)
INLINE void plain_group(const fn_layer_norm_args *a, ptrdiff_t row, int rows,
                        const group_stats *stats)
{
    group_pass pass = {.w = a->weight, .b = a->bias};
    element *y[4];
    if (!FETCHED_IN_MIDDLE(a, rows)) pass.x_ahead = group_ahead(a, rows);
    if (pass.x_ahead) pass.y_ahead = a->y.stride * rows;
    for (int i = 0; i < rows; i++) y[i] = row_at(&a->shape, &a->y, row + i);
    group_affine_of(&pass, stats, y, rows, a->shape.cols);
}

/* A row on its way. */
#define row_state FN_OF_T(row_state)
typedef struct {
    const element *x;
    element *room;
    ptrdiff_t n;
    row_stats stats;
    int plain;
} row_state;

/* One row of those that differ in length. What a mask packed is read again, with what it left out. */
#define uneven_row FN_OF_T(uneven_row)
OUTLINE void uneven_row(const fn_layer_norm_args *a, const group_pass *pass, ptrdiff_t row,
                        const row_state *state, element *to, int stream)
{
    const fn_steps *s = a->steps;
    const element *x = state->x;
    ptrdiff_t n = state->n;
    if (s->mask.data) {
        unsigned char mask_room[BLOCK];
        n = a->shape.cols;
        x = part(&a->shape, &s->x, row_at(&a->shape, &s->x, row), 0, n, state->room);
        const unsigned char *mask = mask_part(&a->shape, &s->mask, row_at(&a->shape, &s->mask, row),
                                              0, n, mask_room);
        affine_kept(x, to, pass->w, pass->b, mask, n, &state->stats, stream);
        return;
    }
    if (s->starts) { /* packed rows begin anywhere: y by whole lines from the first on */
        const ptrdiff_t head = (ptrdiff_t)(-(uintptr_t)to % 64 / sizeof(element));
        const ptrdiff_t m = head < n ? head : n;
        affine_strip(x, to, NULL, NULL, m, &state->stats, 0, 0);
        x += m, to += m, n -= m;
    }
    affine_strip(x, to, pass->w, pass->b, n, &state->stats, 0, 0);
}

/* The rows of a group that differ in length, one by one. */
#define uneven_group FN_OF_T(uneven_group)
INLINE void uneven_group(const fn_layer_norm_args *a, workspace *space, const group_pass *pass,
                         ptrdiff_t row, int rows, const group_stats *stats, element *const *to,
                         int stream)
{
    for (int i = 0; i < rows; i++) {
        row_state state; /* no more of it is asked for */
        state.x = stats->x[i];
        state.room = stats->room[i];
        state.n = stats->n[i];
        state.stats.pivot = stats->pivot[i];
        state.stats.rstd = stats->rstd[i];
        state.stats.shift = stats->shift[i];
        uneven_row(a, pass, row + i, &state, to[i], stream);
        fetch_share(space->ahead);
    }
}

/* Two rows of a group, and the largest magnitude of each, NaN where there is a NaN. Of float only: for
 * int8 of double one pass more is less code. */
#define HAS_LARGEST (VW > 1 && sizeof(element) == sizeof(float))
#define affine_largest FN_OF_T(affine_largest)
OUTLINE void affine_largest(const group_pass *pass, const group_stats *stats, int first,
                            element *const *y, ptrdiff_t n, element *largest)
{
    /* A weight of 1 and a bias of -0 change no bit. */
    ALIGNED element none[2 * VW];
    const element *w = pass->w ? pass->w : none, *b = pass->b ? pass->b : none + VW;
    const ptrdiff_t w_step = pass->w ? VW : 0, b_step = pass->b ? VW : 0;
    const ptrdiff_t x_ahead = pass->x_ahead;
    const element *x[2];
    element *out[2];
    vec pivot[2], rstd[2], shift[2], most[2];
    v_store(none, v_set1(1));
    v_store(none + VW, v_set1((element)-0.0));
    UNROLL for (int r = 0; r < 2; r++) {
        x[r] = stats->x[first + r];
        out[r] = y[first + r];
        pivot[r] = v_set1(stats->pivot[first + r]);
        rstd[r] = v_set1(stats->rstd[first + r]);
        shift[r] = v_set1(stats->shift[first + r]);
        most[r] = v_zero();
    }
    NO_UNROLL for (ptrdiff_t i = 0; i < n; i += VW, w += w_step, b += b_step)
    {
        vec wv = v_load(w), bv = v_load(b), v[2];
        KEEP_IN_REGISTER(wv);
        KEEP_IN_REGISTER(bv);
        UNROLL for (int r = 0; r < 2; r++) {
            __builtin_prefetch((const char *)(x[r] + i) + x_ahead, 0, 2);
            v[r] = v_fma(normalise(v_load(x[r] + i), pivot[r], rstd[r], shift[r]), wv, bv);
            most[r] = v_larger(most[r], v[r]);
        }
        UNROLL for (int r = 0; r < 2; r++) v_store(out[r] + i, v[r]);
    }
    UNROLL for (int r = 0; r < 2; r++) largest[first + r] = v_largest(most[r]);
}

#define step_group FN_OF_T(step_group)
OUTLINE void step_group(const fn_layer_norm_args *a, workspace *space, ptrdiff_t row, int rows,
                        const group_stats *stats)
{
    const fn_steps *s = a->steps;
    const fn_output *o = &s->outputs[0];
    const int uneven = s->lengths || s->starts || s->mask.data;
    const int past = space->stream && s->mask.data && !s->activation; /* straight past the cache */
    const int direct = is_direct(&o->y) && (past || !space->stream);
    const ptrdiff_t x_ahead = FETCHED_IN_MIDDLE(a, rows) ? 0 : group_ahead(a, rows);
    const group_pass pass = {
        .w = parameter(&a->shape, s, space, &o->weight, 0, s->offset, row),
        .b = parameter(&a->shape, s, space, &o->bias, 1, 0, row),
        .x_ahead = x_ahead,
        .y_ahead = x_ahead && direct ? o->y.stride * rows : 0,
    };
    const int quick_int8 = HAS_LARGEST && o->y.dtype == FN_I8 && !uneven && !s->activation &&
                           a->shape.cols % VW == 0;
    element *to[4], largest[4];
    char *y[4];
    for (int i = 0; i < rows; i++) {
        y[i] = step_row_at(&a->shape, s, &o->y, row + i);
        /* Where x is in no room, all groups pass through the same ones, and less of L1. */
        to[i] = direct ? (element *)y[i]
                : stats->x[i] == stats->room[i] ? stats->room[i]
                                                : space->rooms + i * space->room_stride;
    }
    if (uneven) {
        uneven_group(a, space, &pass, row, rows, stats, to, past);
    } else {
        if (quick_int8)
            for (int i = 0; i < rows; i += 2)
                affine_largest(&pass, stats, i, to, a->shape.cols, largest);
        else
            group_affine_of(&pass, stats, to, rows, a->shape.cols);
        fetch_share(space->ahead);
    }
    if (past || (direct && !s->activation && !s->lengths)) return;
    for (int i = 0; i < rows; i++) {
        store_row(&a->shape, s, row + i, space->stream, y[i], to[i], quick_int8 ? &largest[i] : NULL);
        fetch_share(space->ahead);
    }
}

#define group_finish FN_OF_T(group_finish)
OUTLINE void group_finish(const fn_layer_norm_args *a, workspace *space, ptrdiff_t row, int rows,
                          const group_stats *stats)
{
    if (stats->careful)
        finish_one_by_one(a, space, row, rows, stats);
    else if (!a->steps)
        plain_group(a, row, rows, stats);
    else if (space->half)
        half_group(a, space, row, rows, stats);
    else if (share_parameters(&a->shape, a->steps, row, rows))
        step_group(a, space, row, rows, stats);
    else
        finish_one_by_one(a, space, row, rows, stats);
}

/* Whether a group is started before another is finished. From rows of 4 KB on, two groups with their
 * results and the parameters are more than L1 holds, unless the rows' own type is a half one. */
#define groups_overlap FN_OF_T(groups_overlap)
INLINE int groups_overlap(const fn_layer_norm_args *a, const workspace *space)
{
    return a->shape.cols * (ptrdiff_t)sizeof(element) < 4096 || (a->steps && space->half);
}

#define layer_norm_group FN_OF_T(layer_norm_group)
INLINE ptrdiff_t layer_norm_group(const fn_layer_norm_args *a, workspace *space, ptrdiff_t row,
                                  ptrdiff_t end, const int rows)
{
    const ptrdiff_t first = row;
    const int overlap = rows > 2 || groups_overlap(a, space);
    group_stats stats[2];
    for (int i = 0; i < rows; i++) stats[0].n[i] = stats[1].n[i] = a->shape.cols;
    group_lengths(&stats[0], rows);
    group_lengths(&stats[1], rows);
    for (int now = 0;; row += rows, now = !now) {
        const int more = row + rows <= end;
        if (more) group_start(a, space, row, rows, now, &stats[now]);
        if (overlap && row > first) group_finish(a, space, row - rows, rows, &stats[!now]);
        if (!more) return row;
        group_middle(a, space, row, rows, &stats[now]);
        if (!overlap) group_finish(a, space, row, rows, &stats[now]);
    }
}

/* Apart, so that neither loop takes registers from the other. */
#define layer_norm_fours FN_OF_T(layer_norm_fours)
OUTLINE ptrdiff_t layer_norm_fours(const fn_layer_norm_args *a, workspace *space, ptrdiff_t row,
                                   ptrdiff_t end)
{
    return layer_norm_group(a, space, row, end, 4);
}

#define layer_norm_pairs FN_OF_T(layer_norm_pairs)
OUTLINE ptrdiff_t layer_norm_pairs(const fn_layer_norm_args *a, workspace *space, ptrdiff_t row,
                                   ptrdiff_t end)
{
    return layer_norm_group(a, space, row, end, 2);
}

/* ---- row and stream --------------------------------------------------------------------------- */

/* Rows up to FETCHED_ROW_BYTES are fetched whole, into L2, while another row is written: the row
 * that comes after the next, or, of short rows, one some FETCH_DISTANCE further on. */
#define FETCHED_ROW_BYTES ((ptrdiff_t)1 << 17)
#define FETCH_DISTANCE ((ptrdiff_t)15 << 10)

#define row_start FN_OF_T(row_start)
INLINE element row_start(const fn_layer_norm_args *a, workspace *space, ptrdiff_t row,
                         int now, row_state *state)
{
    state->n = a->shape.cols;
    if (a->steps) {
        /* Wide rows of T the CPU fetches by itself; what is converted first it comes to later. */
        if (a->fetch == FN_FETCH_BETWEEN_PASSES && !is_direct(&a->steps->x))
            fetch_step_rows(space->ahead, a, row, 1);
        state->room = space->rooms + now * space->room_stride;
        state->x = prologue(&a->shape, a->steps, a, row, state->room, &state->n);
    } else {
        state->x = row_at(&a->shape, &a->x, row);
    }
    return a->rms || !state->n ? 0 : row_pivot(state->x, state->n);
}

#define row_middle FN_OF_T(row_middle)
INLINE void row_middle(const fn_layer_norm_args *a, ptrdiff_t row, element pivot, row_state *state)
{
    state->plain =
        state->n && plain_stats(state->x, state->n, pivot, a->eps, a->rms, &state->stats);
    if (state->plain)
        store_row_stats(a, row, state->stats.mean, state->stats.reported_rstd);
}

#define stream_row FN_OF_T(stream_row)
INLINE void stream_row(const fn_layer_norm_args *a, workspace *space, ptrdiff_t row, ptrdiff_t end,
                       const row_state *state, carry *c)
{
    const fn_steps *steps = a->steps;
    const row_stats *stats = &state->stats;
    const ptrdiff_t cols = a->shape.cols, bytes = cols * (ptrdiff_t)sizeof(element);
    const ptrdiff_t ahead = row + (bytes > FETCH_DISTANCE / 2 ? 2 : FETCH_DISTANCE / bytes);
    const int zeros = steps && steps->lengths;
    const int fetch = (!steps || (zeros && is_direct(&steps->x))) && ahead < end &&
                      bytes <= FETCHED_ROW_BYTES;
    const streamed s = {
        .x = state->x,
        .w = steps ? parameter(&a->shape, steps, space, &steps->outputs[0].weight, 0,
                               steps->offset, row)
                   : a->weight,
        .b = steps ? parameter(&a->shape, steps, space, &steps->outputs[0].bias, 1, 0, row)
                   : a->bias,
        .ahead = fetch ? row_at(&a->shape, steps ? &steps->x : &a->x, ahead) : NULL,
        .pivot = v_set1(stats->pivot),
        .rstd = v_set1(stats->rstd),
        .shift = v_set1(stats->shift),
    };
    element *y = steps ? (element *)step_row_at(&a->shape, steps, &steps->outputs[0].y, row)
                       : row_at(&a->shape, &a->y, row);
    stream_pass(&s, y, state->n, zeros ? cols : state->n,
                zeros && fetch ? steps->lengths[ahead] : 0, c);
}

/* A row of one block, or one that a mask packed and that goes straight from x to y, as step_group
 * has them; false where it is of another kind. */
#define step_row_finish FN_OF_T(step_row_finish)
INLINE int step_row_finish(const fn_layer_norm_args *a, workspace *space, ptrdiff_t row,
                           const row_state *state)
{
    const fn_steps *s = a->steps;
    const fn_output *o = &s->outputs[0];
    const int straight = s->mask.data && !s->mask.col_strides && is_direct(&s->x) &&
                         is_direct(&o->y) && !s->activation;
    const ptrdiff_t most = s->mask.data ? a->shape.cols : state->n;
    if ((most > BLOCK && !straight) || !share_parameters(&a->shape, s, row, 1)) return 0;
    char *y = step_row_at(&a->shape, s, &o->y, row);
    const int past = space->stream && s->mask.data && !s->activation;
    const int direct = is_direct(&o->y) && (past || !space->stream);
    element *to = direct ? (element *)y : state->room;
    const group_pass pass = {.w = parameter(&a->shape, s, space, &o->weight, 0, s->offset, row),
                             .b = parameter(&a->shape, s, space, &o->bias, 1, 0, row)};
    uneven_row(a, &pass, row, state, to, past);
    if (!past && (!direct || s->activation || s->lengths))
        store_row(&a->shape, s, row, space->stream, y, to, NULL);
    return 1;
}

#define row_finish FN_OF_T(row_finish)
OUTLINE void row_finish(const fn_layer_norm_args *a, workspace *space, ptrdiff_t row,
                        ptrdiff_t end, const row_state *state, carry *c)
{
    if (!state->plain) {
        release_carry(c);
        careful_row(a, space, row, state->x, state->n);
    } else if (a->stream) {
        stream_row(a, space, row, end, state, c);
    } else if (a->steps) {
        if (!step_row_finish(a, space, row, state))
            epilogue(&a->shape, a->steps, space, row, state->x, &state->stats, 0);
    } else {
        affine_row(a, row, &state->stats);
    }
}

/* Whether the next row is started before a row is finished. It hides a scalar chain, but keeps two
 * rows in L1. Measured, it pays for rows of up to 5 KB, and for streamed rows, but for those of less
 * than 16 KB from main memory: they are not there in time. */
#define rows_overlap FN_OF_T(rows_overlap)
INLINE int rows_overlap(const fn_layer_norm_args *a)
{
    const ptrdiff_t bytes = a->shape.cols * (ptrdiff_t)sizeof(element);
    if (!a->stream || a->steps) return bytes <= FN_OVERLAP_BYTES;
    return bytes >= 16 << 10 || !a->from_memory;
}

#define layer_norm_rows FN_OF_T(layer_norm_rows)
INLINE void layer_norm_rows(const fn_layer_norm_args *a, workspace *space, ptrdiff_t row,
                            ptrdiff_t end)
{
    const ptrdiff_t first = row;
    const int overlap = rows_overlap(a);
    row_state state[2];
    carry c = {.line = NULL};
    for (int now = 0;; row++, now = overlap && !now) {
        const element pivot = row < end ? row_start(a, space, row, now, &state[now]) : 0;
        if (a->steps) fetch_share(space->ahead);
        if (overlap && row > first) row_finish(a, space, row - 1, end, &state[!now], &c);
        if (row >= end) break;
        if (a->steps) fetch_share(space->ahead);
        row_middle(a, row, pivot, &state[now]);
        if (a->steps) fetch_share(space->ahead);
        if (!overlap) row_finish(a, space, row, end, &state[now], &c);
    }
    release_carry(&c);
}

/* ---- the kernel ------------------------------------------------------------------------------- */

/* As many rows as fill groups; returns the first row that is left. */
#define layer_norm_groups FN_OF_T(layer_norm_groups)
OUTLINE ptrdiff_t layer_norm_groups(const fn_layer_norm_args *a, workspace *space, ptrdiff_t row,
                                    ptrdiff_t end)
{
    const ptrdiff_t n = a->shape.cols;
    const int in_registers = !a->shape.outer_ndim && !a->steps && !a->rms;
#if HAS_HALVES
    const ptrdiff_t contiguous = n * (ptrdiff_t)sizeof(element);
    if (n == VW / 2 && sizeof(element) == sizeof(float) && in_registers && a->x.stride == contiguous && a->y.stride == contiguous)
        row = layer_norm_halves(a, row, end);
#endif
    if (VW > 1 && n <= NARROW_COLS && end - row >= 8 && in_registers) {
        /* Of double all go as the widest: it is less code. */
        if (n <= VW && sizeof(element) == sizeof(float))
            row = layer_norm_narrow(a, row, end, 1);
        else if (n <= 2 * VW && sizeof(element) == sizeof(float))
            row = layer_norm_narrow(a, row, end, 2);
        else
            row = layer_norm_narrow(a, row, end, 4);
    }
    if (HAS_FOURS && n * (ptrdiff_t)sizeof(element) <= FN_FOUR_ROWS_BYTES)
        row = layer_norm_fours(a, space, row, end);
    return n <= BLOCK ? layer_norm_pairs(a, space, row, end) : row;
}

#define layer_norm FN_OF_T(layer_norm)
static void layer_norm(const void *args, ptrdiff_t row0, ptrdiff_t row1, void *scratch)
{
    const fn_layer_norm_args *a = args;
    workspace space;
    fetcher ahead = {.runs = 0};
    if (a->steps) {
        space = workspace_in(scratch, &a->shape, a->steps, 0);
        space.half = half_call(a);
        space.plain_sums = VW > 1 && is_plain_sum(&a->shape, a->steps, FN_OWN_TYPE, LANES);
        space.ahead = &ahead;
        space.stream = a->stream_rooms;
    }
    if (VW > 1 && !a->stream && row1 - row0 > 1) row0 = layer_norm_groups(a, &space, row0, row1);
    layer_norm_rows(a, &space, row0, row1);
    if (a->stream || a->stream_rooms) v_fence();
}
