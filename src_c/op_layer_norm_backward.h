/* op_layer_norm_backward.h: dx, dweight and dbias of layer_norm over rows of T.
 *
 * With xh = (x - mean) * rstd and g = dy * weight:
 *
 *     dx = rstd * (g - mean(g) - xh * mean(g * xh))      dweight = sum dy * xh      dbias = sum dy
 *
 * The saved mean is only a pivot of the row's own precision: c = mean(x - pivot) is formed again
 * and xh = (x - pivot)*rstd - c*rstd; with the rounded mean alone dx would err by 1e-3 at
 * mean = 1e6 std.
 *
 * One call takes at most FN_BACKWARD_ROWS rows. Within it dweight and dbias are summed row after
 * row, in T; the caller adds these partial sums in double, in an order that does not depend on the
 * number of threads (parallel.c). */

#define backward_row FN_OF_T(backward_row)
typedef struct {
    element pivot, rstd, shift; /* xh = (x - pivot)*rstd + shift */
    element slope, base;        /* dx = (g + xh*slope)*rstd + base */
    element dx_rstd;            /* that last rstd, which may differ for a scaled row */
    scale x, dy, dx;            /* powers of two for rows out of range, else 1 */
} backward_row;

/* rms: the means of x and of g count as 0. */
#define dots_to_coefficients FN_OF_T(dots_to_coefficients)
INLINE void dots_to_coefficients(const double sums[3], double rstd, ptrdiff_t n, int rms,
                                 backward_row *row)
{
    const double per_n = 1.0 / (double)n;
    const double c = rms ? 0 : sums[0] * per_n;
    const double mean_g = rms ? 0 : sums[1] * per_n;
    const double mean_g_xh = (sums[2] - c * sums[1]) * per_n * rstd;
    row->rstd = row->dx_rstd = (element)rstd;
    row->shift = (element)(0.0 - c * rstd);
    row->slope = (element)(0.0 - mean_g_xh);
    row->base = (element)(0.0 - mean_g * rstd);
}

/* Rows of gradient 0 are common, as padding, and need no care. */
#define all_zero FN_OF_T(all_zero)
static COLD int all_zero(const element *dy, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i++)
        if (dy[i] != 0) return 0;
    return 1;
}

/* Whether T's range sufficed: rstd is of ordinary size, no sum overflowed, and g is not so small
 * that its products with x - mean may have underflowed. (g is at least as large as the means, which
 * may be small for other reasons; such rows take the careful way for nothing.) */
#define within_range FN_OF_T(within_range)
INLINE int within_range(const double sums[3], double rstd, ptrdiff_t n, const element *dy,
                        ptrdiff_t dy_n)
{
    const int is_float = sizeof(element) == sizeof(float);
    const double limit = is_float ? 0x1p50 : 0x1p400, least = is_float ? 0x1p-77 : 0x1p-600;
    const double g = fabs(sums[1]) + fabs(sums[2]) * rstd;
    return rstd <= limit && rstd >= 1 / limit && fabs(sums[0]) <= DBL_MAX && g <= DBL_MAX &&
           (g >= least * (double)n || all_zero(dy, dy_n));
}

/* 1/std of x times 2^up, where the rstd that was saved did not fit T: eps was 0 or next to it, and x
 * alone tells. 0 for a constant row: it has no gradient. */
#define rstd_of_scaled FN_OF_T(rstd_of_scaled)
static double rstd_of_scaled(const element *x, ptrdiff_t n, int rms, int up)
{
    row_stats stats;
    recentred_stats(x, n, 0, rms, up, &stats);
    return stats.variance > 0 ? stats.reported_rstd : 0;
}

/* Rows that overflow or underflow: x and dy are read through powers of two that bring the largest
 * of each into [0.5, 1). */
#define careful_row_state FN_OF_T(careful_row_state)
typedef struct {
    double x_rstd; /* of the scaled row */
    int lost;      /* whether the rstd that was saved did not fit T */
    int up, up_dy;
} careful_row_state;

/* Chooses the powers of two; x has n elements, dy dy_n. */
#define careful_start FN_OF_T(careful_start)
static COLD careful_row_state careful_start(const element *x, ptrdiff_t n, const element *dy,
                                            ptrdiff_t dy_n, element rstd, int rms,
                                            backward_row *row)
{
    const double largest = row_largest(x, n), largest_dy = row_largest(dy, dy_n);
    careful_row_state c = {.up = largest <= DBL_MAX ? exponent_to_one(largest) : 0,
                           .up_dy = largest_dy <= DBL_MAX ? exponent_to_one(largest_dy) : 0,
                           .lost = largest <= DBL_MAX && rstd > MOST};
    c.x_rstd = c.lost ? rstd_of_scaled(x, n, rms, c.up) : ldexp((double)rstd, -c.up);
    row->x = scale_to(c.up);
    row->dy = scale_to(c.up_dy);
    row->pivot = (element)ldexp((double)row->pivot, c.up);
    return c;
}

/* From the sums of the scaled row. */
#define careful_end FN_OF_T(careful_end)
static COLD void careful_end(const double sums[3], ptrdiff_t n, element rstd, int rms,
                             const careful_row_state *c, backward_row *row)
{
    /* x_rstd beyond T: x is constant, or eps is all that counts, and x - pivot is 0 all over. */
    const double x_rstd = c->x_rstd;
    dots_to_coefficients(sums, x_rstd > (double)MOST ? (double)MOST : x_rstd, n, rms, row);
    /* dx is multiplied by rstd as it was saved, or, if that is lost, by x's own and 2^up. */
    row->dx_rstd = c->lost ? (element)x_rstd : rstd;
    row->dx = scale_to(c->lost ? c->up - c->up_dy : -c->up_dy);
    row->base = (element)(0.0 - (rms ? 0 : sums[1] / (double)n) * (double)row->dx_rstd);
    const double sizes = fabs(sums[0]) + fabs(sums[1]) + fabs(sums[2]) + fabs(x_rstd);
    if (!(sizes <= DBL_MAX)) row->base = (element)NAN;
}

/* ---- sums in double, here and in parallel.c --------------------------------------------------- */

#define widen_add FN_OF_T(widen_add)
static void widen_add(double *into, const void *from, ptrdiff_t n, int add)
{
    const element *p = from;
    const vd8 zero = vd8_set1(-0.0);
    ptrdiff_t i = 0;
    for (; i + 8 <= n; i += 8)
        vd8_store_f64(into + i,
                      vd8_add(add ? vd8_load_f64(into + i) : zero, vd8_load_element(p + i)));
    for (; i < n; i++) into[i] = (add ? into[i] : -0.0) + (double)p[i];
}

#define narrow FN_OF_T(narrow)
static void narrow(void *into, const double *from, ptrdiff_t n)
{
    element *p = into;
    ptrdiff_t i = 0;
    for (; i + 8 <= n; i += 8) vd8_store_element(p + i, vd8_load_f64(from + i));
    for (; i < n; i++) p[i] = (element)from[i];
}

/* ---- what one pass over x and dy can do with the coefficients ---------------------------------- */

#define backward_sums FN_OF_T(backward_sums)
typedef struct {
    const element *w;
    element *dweight, *dbias; /* sums so far */
    int first;                /* nothing has been summed yet */
    int stream;               /* write dx past the cache */
    ptrdiff_t x_ahead, dy_ahead, dx_ahead; /* bytes to what is fetched meanwhile; 0: itself */
} backward_sums;

#define through FN_OF_T(through)
INLINE vec through(vec v, scale s, const int scaled) { return scaled ? scale_by(v, s) : v; }

#define backward_vector FN_OF_T(backward_vector)
INLINE void backward_vector(const element *const *x, const element *const *dy, element *const *dx,
                            const backward_row *row, const int rows, const backward_sums *sums,
                            ptrdiff_t i, ptrdiff_t left, const int want_dx, const int want_sums,
                            const int scaled)
{
    /* A weight of 1 changes no bit. */
    const vec w = want_dx && sums->w ? load_some(sums->w + i, left) : v_set1(1);
    vec dw = v_zero(), db = v_zero();
    if (want_sums && !sums->first) {
        dw = load_some(sums->dweight + i, left);
        db = load_some(sums->dbias + i, left);
    }
    UNROLL for (int k = 0; k < rows; k++) {
        const backward_row *c = &row[k];
        const vec rstd = v_set1(c->rstd);
        const vec d = v_sub(through(load_some(x[k] + i, left), c->x, scaled), v_set1(c->pivot));
        const vec xh = v_fma(d, rstd, v_set1(c->shift));
        const vec plain = load_some(dy[k] + i, left);
        if (want_sums) {
            dw = v_fma(plain, xh, dw);
            db = v_add(db, plain);
        }
        if (want_dx) {
            const vec g = v_mul(through(plain, c->dy, scaled), w);
            const vec inner = v_fma(xh, v_set1(c->slope), g);
            const vec out = v_fma(inner, v_set1(c->dx_rstd), v_set1(c->base));
            if (sums->stream && left >= VW)
                v_stream(dx[k] + i, through(out, c->dx, scaled));
            else
                store_some(dx[k] + i, through(out, c->dx, scaled), left);
        }
    }
    if (want_sums) {
        store_some(sums->dweight + i, dw, left);
        store_some(sums->dbias + i, db, left);
    }
}

#define fetch_rows_ahead FN_OF_T(fetch_rows_ahead)
INLINE void fetch_rows_ahead(const element *const *x, const element *const *dy, element *const *dx,
                             const int rows, const backward_sums *sums, ptrdiff_t i,
                             const int want_dx)
{
    UNROLL for (int k = 0; k < rows; k++) {
        __builtin_prefetch((const char *)(x[k] + i) + sums->x_ahead, 0, 2);
        __builtin_prefetch((const char *)(dy[k] + i) + sums->dy_ahead, 0, 2);
        if (want_dx && !sums->stream)
            __builtin_prefetch((const char *)(dx[k] + i) + sums->dx_ahead, 1, 2);
    }
}

#define backward_pass_with FN_OF_T(backward_pass_with)
INLINE void backward_pass_with(const element *const *x, const element *const *dy,
                               element *const *dx, const backward_row *row, const int rows,
                               const backward_sums *all, ptrdiff_t n, const int want_dx,
                               const int want_sums, const int scaled)
{
    const backward_sums sums = *all; /* so that it stays in registers whatever dx points to */
    ptrdiff_t i = 0;
    for (; i + VW <= n; i += VW) {
        if (!scaled) fetch_rows_ahead(x, dy, dx, rows, &sums, i, want_dx);
        backward_vector(x, dy, dx, row, rows, &sums, i, VW, want_dx, want_sums, scaled);
    }
    if (i < n)
        backward_vector(x, dy, dx, row, rows, &sums, i, n - i, want_dx, want_sums, scaled);
}

/* Both dx and the sums, as most want it; one text for all else. */
#define backward_pass FN_OF_T(backward_pass)
INLINE void backward_pass(const element *const *x, const element *const *dy, element *const *dx,
                          const backward_row *row, const int rows, const backward_sums *sums,
                          ptrdiff_t n)
{
    if (dx[0] && sums->dweight)
        backward_pass_with(x, dy, dx, row, rows, sums, n, 1, 1, 0);
    else
        backward_pass_with(x, dy, dx, row, rows, sums, n, dx[0] != NULL, sums->dweight != NULL, 0);
}

#define scaled_backward_pass FN_OF_T(scaled_backward_pass)
static COLD void scaled_backward_pass(const element *const *x, const element *const *dy,
                                      element *const *dx, const backward_row *row,
                                      const backward_sums *sums, ptrdiff_t n)
{
    backward_pass_with(x, dy, dx, row, 1, sums, n, dx[0] != NULL, sums->dweight != NULL, 1);
}

#define one_row_pass FN_OF_T(one_row_pass)
OUTLINE void one_row_pass(const element *const *x, const element *const *dy, element *const *dx,
                          const backward_row *row, const backward_sums *sums, ptrdiff_t n)
{
    backward_pass(x, dy, dx, row, 1, sums, n);
}

/* ---- groups of plain rows --------------------------------------------------------------------- */

/* Rows whose pass shares dweight and dbias; more of them would crowd each other out of L1. */
#define BACKWARD_GROUP 2

#define scaled_dots FN_OF_T(scaled_dots)
static COLD void scaled_dots(const element *x, const element *dy, const element *w, ptrdiff_t n,
                             element pivot, const scale *sx, const scale *sdy, double sums[3])
{
    element rooms[2 * BLOCK];
    row_dots(x, dy, w, n, pivot, sx, sdy, rooms, sums);
}

/* What the pass needs of a row, whose pivot is set; false where it must read through factors. */
#define coefficients_of FN_OF_T(coefficients_of)
OUTLINE int coefficients_of(const element *x, const element *dy, const element *w, ptrdiff_t n,
                           element rstd, int rms, backward_row *row)
{
    double dots[3];
    row_dots(x, dy, w, n, row->pivot, NULL, NULL, NULL, dots);
    if (within_range(dots, rstd, n, dy, n)) {
        dots_to_coefficients(dots, rstd, n, rms, row);
        return 1;
    }
    const careful_row_state c = careful_start(x, n, dy, n, rstd, rms, row);
    scaled_dots(x, dy, w, n, row->pivot, &row->x, &row->dy, dots);
    careful_end(dots, n, rstd, rms, &c, row);
    return 0;
}

#define backward_group FN_OF_T(backward_group)
INLINE void backward_group(const fn_layer_norm_backward_args *a, ptrdiff_t row,
                                  const int rows, backward_sums *sums)
{
    const element *x[BACKWARD_GROUP], *dy[BACKWARD_GROUP];
    element *dx[BACKWARD_GROUP];
    backward_row coefficients[BACKWARD_GROUP];
    const element *mean = a->mean, *rstd = a->rstd;
    const ptrdiff_t n = a->shape.cols;
    const scale one = {1, 1};
    int careful = 0;
    for (int k = 0; k < rows; k++) {
        x[k] = row_at(&a->shape, &a->x, row + k);
        dy[k] = row_at(&a->shape, &a->dy, row + k);
        dx[k] = a->dx.data ? row_at(&a->shape, &a->dx, row + k) : NULL;
        backward_row *c = &coefficients[k];
        *c = (backward_row){.pivot = mean ? mean[row + k] : 0, .x = one, .dy = one, .dx = one};
        careful |= !coefficients_of(x[k], dy[k], a->weight, n, rstd[row + k], a->rms, c);
    }
    if (a->fetch) { /* the group after the next: the next would not be there in time */
        sums->x_ahead = a->x.stride * rows * 2;
        sums->dy_ahead = a->dy.stride * rows * 2;
        sums->dx_ahead = a->dx.stride * rows;
    }
    if (!careful) {
        backward_pass(x, dy, dx, coefficients, rows, sums, n);
        return;
    }
    for (int k = 0; k < rows; k++) {
        scaled_backward_pass(x + k, dy + k, dx + k, coefficients + k, sums, n);
        sums->first = 0;
    }
}

/* ---- rows with steps: one at a time ------------------------------------------------------------ */

/* A row of x and dy as the pass reads them. */
#define step_rows FN_OF_T(step_rows)
typedef struct {
    const element *x, *dy, *w, *b;
    ptrdiff_t n;
} step_rows;

/* The row in place, or, where it is not T or will be changed, in `room`. */
#define step_row FN_OF_T(step_row)
static const element *step_row(const fn_shape *shape, const fn_steps *s, const fn_rows *rows,
                               ptrdiff_t row, ptrdiff_t n, element *room, int changed)
{
    const char *from = step_row_at(shape, s, rows, row);
    if (is_direct(rows) && !changed && !s->mask.data) return (const element *)from;
    load_part(room, shape, rows, from, 0, n);
    return room;
}

/* What the mask leaves out becomes `value`, which has no influence: dy 0, and x the pivot. */
#define fill_masked FN_OF_T(fill_masked)
static void fill_masked(const fn_shape *shape, const fn_steps *s, ptrdiff_t row, element *p,
                        element value)
{
    unsigned char mask_room[BLOCK];
    const unsigned char *mask = row_at(shape, &s->mask, row);
    for (ptrdiff_t i = 0; i < shape->cols; i += BLOCK) {
        const ptrdiff_t m = block_length(shape->cols, i);
        const unsigned char *kept = mask_part(shape, &s->mask, mask, i, m, mask_room);
        for (ptrdiff_t k = 0; k < m; k++)
            if (!kept[k]) p[i + k] = value;
    }
}

/* xh = (y - bias) / weight, in place. */
#define undo_affine FN_OF_T(undo_affine)
static void undo_affine(element *y, const element *w, const element *b, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i += VW) {
        vec v = load_some(y + i, n - i);
        if (b) v = v_sub(v, load_some(b + i, n - i));
        if (w) v = v_div(v, load_some(w + i, n - i)); /* past the end: nothing is stored */
        store_some(y + i, v, n - i);
    }
}

/* x and g = dy * weight as the sums see them: without what the mask leaves out, and with the weight
 * already in g, as it may repeat itself; dy through a factor, if one is given. Returns how many
 * elements there are. */
#define summed_rows FN_OF_T(summed_rows)
static ptrdiff_t summed_rows(const fn_layer_norm_backward_args *a, const workspace *space,
                             ptrdiff_t row, const step_rows *rows, const scale *factor, element *x,
                             element *g)
{
    const fn_steps *s = a->steps;
    const unsigned char *mask = s->mask.data ? row_at(&a->shape, &s->mask, row) : NULL;
    element strip[BLOCK];
    unsigned char mask_room[BLOCK];
    const packing_fetch nothing = {0};
    ptrdiff_t count = 0;
    for (ptrdiff_t i = 0, m; i < rows->n; i += m) {
        const ptrdiff_t at = i % space->tile, rest = space->tile - at;
        m = block_length(rows->n, i) < rest ? block_length(rows->n, i) : rest;
        element *to = mask ? strip : g + i;
        const element *dy = block_at(rows->dy + i, m, factor, to);
        add_strip(to, dy, rows->w ? rows->w + at : NULL, NULL, NULL, m);
        if (!mask) continue;
        const unsigned char *kept = mask_part(&a->shape, &s->mask, mask, i, m, mask_room);
        compress_strip(g + count, strip, kept, m, nothing);
        count += compress_strip(x + count, rows->x + i, kept, m, nothing);
    }
    return mask ? count : rows->n;
}

/* From xh, whose own rstd is 1, to x. */
#define rescale_dx FN_OF_T(rescale_dx)
static void rescale_dx(backward_row *c, element rstd)
{
    const element finite = rstd <= MOST ? rstd : 0;
    c->base = (element)((double)c->base * (double)finite);
    c->dx_rstd = c->dx_rstd * finite;
}

#define step_pivot FN_OF_T(step_pivot)
INLINE element step_pivot(const fn_layer_norm_backward_args *a, ptrdiff_t row)
{
    return a->mean && !a->steps->from_output ? ((const element *)a->mean)[row] : 0;
}

/* As coefficients_of, of rows that the sums see otherwise than the pass does. -1: none are left. */
#define coefficients_of_seen FN_OF_T(coefficients_of_seen)
static int coefficients_of_seen(const fn_layer_norm_backward_args *a, const workspace *space,
                                ptrdiff_t row, const step_rows *rows, element rstd, backward_row *c)
{
    element *x_room = space->rooms + 2 * space->room_stride, *g = x_room + space->room_stride;
    const element *x = a->steps->mask.data ? x_room : rows->x;
    const ptrdiff_t n = summed_rows(a, space, row, rows, NULL, x_room, g);
    double dots[3];
    if (!n) return -1;
    row_dots(x, g, NULL, n, c->pivot, NULL, NULL, NULL, dots);
    if (within_range(dots, rstd, n, rows->dy, rows->n)) {
        dots_to_coefficients(dots, rstd, n, a->rms, c);
        return 1;
    }
    const careful_row_state state = careful_start(x, n, rows->dy, rows->n, rstd, a->rms, c);
    summed_rows(a, space, row, rows, &c->dy, x_room, g);
    scaled_dots(x, g, NULL, n, c->pivot, &c->x, NULL, dots);
    careful_end(dots, n, rstd, a->rms, &state, c);
    return 0;
}

#define step_coefficients FN_OF_T(step_coefficients)
static int step_coefficients(const fn_layer_norm_backward_args *a, const workspace *space,
                             ptrdiff_t row, const step_rows *rows, backward_row *c)
{
    const fn_steps *s = a->steps;
    const element rstd = ((const element *)a->rstd)[row], own = s->from_output ? 1 : rstd;
    const scale one = {1, 1};
    if (!rows->n) return -1;
    *c = (backward_row){.pivot = step_pivot(a, row), .x = one, .dy = one, .dx = one};
    const int plain = s->mask.data || s->starts
                          ? coefficients_of_seen(a, space, row, rows, own, c)
                          : coefficients_of(rows->x, rows->dy, rows->w, rows->n, own, a->rms, c);
    if (s->from_output) rescale_dx(c, rstd);
    return plain;
}

/* Nodes of a segment whose sums go in T, before they are added in double. */
#define flush_sums FN_OF_T(flush_sums)
static void flush_sums(const backward_sums *sums, double *into, ptrdiff_t n)
{
    widen_add(into, sums->dweight, n, 1);
    widen_add(into + n, sums->dbias, n, 1);
    memset(sums->dweight, 0, (size_t)n * sizeof(element));
    memset(sums->dbias, 0, (size_t)n * sizeof(element));
}

#define step_pass FN_OF_T(step_pass)
static void step_pass(const fn_layer_norm_backward_args *a, const workspace *space,
                      const step_rows *rows, element *dx, const backward_row *c, int plain,
                      backward_sums *sums)
{
    const ptrdiff_t period = a->steps->param_cols ? a->steps->param_cols : rows->n;
    sums->w = rows->w;
    for (ptrdiff_t i = 0, nodes = 1; i < rows->n; i += period, nodes++) {
        const element *x = rows->x + i, *dy = rows->dy + i;
        element *to = dx ? dx + i : NULL;
        const ptrdiff_t m = period < rows->n - i ? period : rows->n - i;
        if (plain)
            one_row_pass(&x, &dy, &to, c, sums, m);
        else
            scaled_backward_pass(&x, &dy, &to, c, sums, m);
        if (a->steps->starts && sums->dweight && nodes % FN_BACKWARD_ROWS == 0)
            flush_sums(sums, space->sums, period);
    }
    if (a->steps->starts && sums->dweight) flush_sums(sums, space->sums, period);
}

/* dx of a row into its place, with zeros where nothing was read. */
#define finish_dx FN_OF_T(finish_dx)
static void finish_dx(const fn_layer_norm_backward_args *a, ptrdiff_t row, element *from, char *dx,
                      ptrdiff_t n)
{
    const fn_steps *s = a->steps;
    if (s->mask.data && n) fill_masked(&a->shape, s, row, from, 0);
    if (!is_direct(&a->dx)) store_part(&a->shape, &a->dx, dx, 0, from, n);
    if (!s->starts && n < a->shape.cols) zero_rest(&a->shape, &a->dx, dx, n);
}

#define step_backward_row FN_OF_T(step_backward_row)
static void step_backward_row(const fn_layer_norm_backward_args *a, workspace *space, ptrdiff_t row,
                              backward_sums *sums)
{
    const fn_shape *shape = &a->shape;
    const fn_steps *s = a->steps;
    const fn_output *o = &s->outputs[0];
    element *x_room = space->rooms, *dy_room = x_room + space->room_stride;
    step_rows rows = {.n = step_length(shape, s, row)};
    rows.w = parameter(shape, s, space, &o->weight, 0, s->offset, row);
    rows.b = parameter(shape, s, space, &o->bias, 1, 0, row);
    rows.x = step_row(shape, s, &s->x, row, rows.n, x_room, s->from_output);
    rows.dy = step_row(shape, s, &a->dy, row, rows.n, dy_room, 0);
    if (s->from_output) undo_affine(x_room, rows.w, rows.b, rows.n);
    if (s->mask.data) {
        fill_masked(shape, s, row, dy_room, 0);
        fill_masked(shape, s, row, x_room, step_pivot(a, row));
    }
    char *dx = a->dx.data ? step_row_at(shape, s, &a->dx, row) : NULL;
    element *to = !dx ? NULL : is_direct(&a->dx) ? (element *)dx : dy_room;
    backward_row c;
    const int plain = step_coefficients(a, space, row, &rows, &c);
    if (plain >= 0) step_pass(a, space, &rows, to, &c, plain, sums);
    if (!dx) return;
    finish_dx(a, row, to, dx, plain >= 0 ? rows.n : 0);
}

#define step_backward FN_OF_T(step_backward)
static COLD void step_backward(const fn_layer_norm_backward_args *a, ptrdiff_t row0, ptrdiff_t row1,
                               void *scratch, backward_sums *sums)
{
    workspace space = workspace_in(scratch, &a->shape, a->steps, 1);
    const ptrdiff_t n = a->steps->param_cols ? a->steps->param_cols : a->shape.cols;
    sums->first = 0;
    if (sums->dweight) {
        memset(sums->dweight, 0, (size_t)n * sizeof(element));
        memset(sums->dbias, 0, (size_t)n * sizeof(element));
        if (a->steps->starts) memset(space.sums, 0, 2 * (size_t)n * sizeof(double));
    }
    for (ptrdiff_t row = row0; row < row1; row++) step_backward_row(a, &space, row, sums);
    if (!sums->dweight || !a->steps->starts) return;
    narrow(sums->dweight, space.sums, n);
    narrow(sums->dbias, space.sums + n, n);
}

/* ---- the kernel ------------------------------------------------------------------------------- */

/* At most FN_BACKWARD_ROWS rows; dweight and dbias, where not NULL, are overwritten with their
 * sums over these rows. */
#define layer_norm_backward FN_OF_T(layer_norm_backward)
static void layer_norm_backward(const void *args, ptrdiff_t row0, ptrdiff_t row1, void *dweight,
                                void *dbias, void *scratch)
{
    const fn_layer_norm_backward_args *a = args;
    backward_sums sums = {.w = a->weight,
                          .dweight = dweight,
                          .dbias = dbias,
                          .first = 1,
                          .stream = a->stream};
    if (a->steps) {
        step_backward(a, row0, row1, scratch, &sums);
        return;
    }
    ptrdiff_t row = row0;
    for (; row + BACKWARD_GROUP <= row1; row += BACKWARD_GROUP) {
        backward_group(a, row, BACKWARD_GROUP, &sums);
        sums.first = 0;
    }
    for (; row < row1; row++) {
        backward_group(a, row, 1, &sums);
        sums.first = 0;
    }
    if (a->stream) v_fence();
}
