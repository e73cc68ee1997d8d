/* channels.c: group, instance and batch norm, over the strips and rows of op_channels.h.
 *
 * Statistics are layer_norm's own, a row at a time; what a unit has of rows or planes is merged here, in
 * double and in the order of the rows. No arithmetic on elements is done in this file. */
#include "channels.h"

/* ---- lines held back ---------------------------------------------------------------------------- */

/* As it is: another line is wanted in its place, or no more comes. */
void fn_let_go(fn_held_line *held)
{
    if (held->line)
        memcpy(held->line + held->from, held->bytes + held->from, (size_t)(held->to - held->from));
    held->line = NULL;
}

/* The place for bytes from .. to - 1 of `line`, beside what is known of it already. */
fn_held_line *fn_held_line_at(fn_held_line held[FN_HELD_LINES], char *line, ptrdiff_t from,
                              ptrdiff_t to)
{
    for (int k = 0; k < FN_HELD_LINES; k++) {
        if (held[k].line != line) continue;
        if (held[k].to == from)
            held[k].to = to;
        else if (held[k].from == to)
            held[k].from = from;
        else
            break;
        return &held[k];
    }
    fn_held_line *h = held[0].line && !held[1].line ? &held[1] : &held[0];
    fn_let_go(h);
    h->line = line;
    h->from = from;
    h->to = to;
    return h;
}

/* ---- planes ----------------------------------------------------------------------------------- */

/* Short planes that are done by one call, and share a strip; else 1. */
static ptrdiff_t planes_together(const fn_channels *l, int stream)
{
    const ptrdiff_t n = FN_GROUP_COLS / l->plane;
    if (l->plane > FN_SHORT_PLANE || stream) return 1;
    return n < FN_PLANES ? n : FN_PLANES;
}

/* Into a strip first: `count` planes of n elements, or one of any length. */
static void convert_planes(fn_plane_result *r, const char *x, const char *dy, char *y, ptrdiff_t n,
                           ptrdiff_t count, const double (*terms)[4])
{
    const fn_channel_table *table = &fn_active_isa->channels;
    const ptrdiff_t size = fn_size_of(r->dtype), y_size = fn_size_of(r->y_type);
    if (count > 1) {
        table->planes_pass[r->dtype](x, dy, r->strip, n, (int)count, terms);
        table->store_elements[r->dtype](y, r->y_type, r->strip, n * count, r->activation);
        return;
    }
    for (ptrdiff_t k = 0; k < n; k += FN_GROUP_COLS) {
        const ptrdiff_t m = n - k < FN_GROUP_COLS ? n - k : FN_GROUP_COLS;
        table->plane_pass[r->dtype](x + k * size, dy ? dy + k * size : NULL, r->strip, m, *terms,
                                    NULL, 0);
        table->store_elements[r->dtype](y + k * y_size, r->y_type, r->strip, m, r->activation);
    }
}

void fn_finish_planes(fn_plane_result *r, const char *x, const char *dy, ptrdiff_t i, ptrdiff_t n,
                      ptrdiff_t count, const double (*terms)[4])
{
    const fn_channel_table *table = &fn_active_isa->channels;
    char *y = (char *)r->y + i * fn_size_of(r->y_type);
    if (r->y_type != r->dtype || r->activation)
        convert_planes(r, x, dy, y, n, count, terms);
    else if (count > 1)
        table->planes_pass[r->dtype](x, dy, y, n, (int)count, terms);
    else
        table->plane_pass[r->dtype](x, dy, y, n, *terms, r->stream ? r->held : NULL, r->ahead);
}

/* Planes of one element that are done at a time. */
enum { SOME_ELEMENTS = 128 };

/* The same number as many terms. */
static void repeat_term(const fn_plane_result *r, void *into, double term, ptrdiff_t n)
{
    double terms[SOME_ELEMENTS];
    for (int i = 0; i < SOME_ELEMENTS; i++) terms[i] = term;
    fn_active_isa->narrow[r->dtype](into, terms, n);
}

static const void *parameters_at(const void *data, fn_dtype dtype, ptrdiff_t i)
{
    return data ? at_element(data, dtype, i) : NULL;
}

/* A row of n planes of one element, side by side from element `at` on: unit is what they share, its pivot, what
 * the mean lies beyond it, and rstd; with dy, slope and shift too. */
static void finish_elements(fn_plane_result *r, const char *x, const char *dy, ptrdiff_t at,
                            ptrdiff_t n, const double unit[3], const void *weight, const void *bias,
                            const double shift_slope[2])
{
    const fn_channel_table *table = &fn_active_isa->channels;
    const ptrdiff_t size = fn_size_of(r->dtype);
    const int direct = r->y_type == r->dtype && !r->activation;
    double room[5][SOME_ELEMENTS + 8];
    void *terms[4] = {room[0], room[1], room[2], room[3]};
    void *formed[3] = {room[0], room[1], dy ? room[4] : room[2]};
    for (int t = 0; dy && t < 2; t++)
        repeat_term(r, terms[2 + t], shift_slope[t], n < SOME_ELEMENTS ? n : SOME_ELEMENTS);
    for (ptrdiff_t j = 0, k; j < n; j += k) {
        char *y = (char *)r->y + (at + j) * fn_size_of(r->y_type), *to = direct ? y : r->strip;
        k = n - j < SOME_ELEMENTS ? n - j : SOME_ELEMENTS;
        table->column_terms[r->dtype](unit, NULL, NULL, parameters_at(weight, r->dtype, j),
                                      parameters_at(bias, r->dtype, j), k, formed);
        table->columns_pass[r->dtype](x + j * size, dy ? dy + j * size : NULL, to, k,
                                      (const void *const *)terms, 0);
        if (!direct) table->store_elements[r->dtype](y, r->y_type, to, k, r->activation);
    }
}

/* ---- forward ---------------------------------------------------------------------------------- */

/* Rows are merged one by one (Chan, Golub, LeVeque 1979), by their distance from the first one's pivot.
 * *x: the last row as it was computed with. False where the unit is out of range. */
static int moments_of_unit(const fn_channel_norm_args *a, ptrdiff_t at, void *room, const void **x,
                           unit_moments *m)
{
    const fn_channels *l = &a->layout;
    const double n = (double)cols_of(l);
    fn_row_moments row;
    double first = 0, mean = 0, squares = 0;
    for (ptrdiff_t r = 0; r < l->rows; r++, at += l->row_stride) {
        *x = as_computed(a->x, a->x_type, at, cols_of(l), a->dtype, room);
        if (!fn_active_isa->channels.row_moments[a->dtype](*x, cols_of(l), a->eps, &row)) return 0;
        if (r == 0) first = row.pivot;
        const double delta = ((row.pivot - first) + row.shift) - mean, part = 1.0 / (double)(r + 1);
        mean += delta * part;
        squares += row.variance * n + delta * delta * (double)r * n * part;
    }
    if (l->rows > 1) {
        if (squares > largest_squares(a->dtype)) return 0;
        row.variance = squares / ((double)l->rows * n);
        row.pivot = rounded(first + mean, a->dtype);
        row.shift = (first - row.pivot) + mean;
    }
    *m = (unit_moments){.pivot = row.pivot, .shift = row.shift, .variance = row.variance};
    return 1;
}

/* Whether the planes' factors stay in range though all that they are made of does. */
static int weights_fit(const fn_channel_norm_args *a, ptrdiff_t kind, double rstd)
{
    const ptrdiff_t planes = a->layout.planes;
    for (ptrdiff_t j = kind * planes; a->weight && j < (kind + 1) * planes; j++)
        if (!weight_fits(number_at(a->weight, a->dtype, j, 1), rstd, a->dtype)) return 0;
    return 1;
}

unit_moments fn_given_moments(const fn_channel_norm_args *a, ptrdiff_t kind)
{
    const double pivot = rounded(a->mean[kind], a->dtype);
    return (unit_moments){pivot, a->mean[kind] - pivot, 0, a->rstd[kind]};
}

static int find_moments(const fn_channel_norm_args *a, ptrdiff_t u, ptrdiff_t kind, void *room,
                        const void **x, unit_moments *m)
{
    *m = (unit_moments){0, 0, 0, 0};
    if (a->given) {
        *m = fn_given_moments(a, kind);
        return 1;
    }
    const int fits = moments_of_unit(a, u * a->layout.stride, room, x, m) && rstd_fits(a, m) &&
                     weights_fit(a, kind, m->rstd);
    keep_moments(a, u, fits, m);
    return fits;
}

/* Of the plane of parameter i, as planes_pass takes them. */
static void forward_terms(const fn_channel_norm_args *a, ptrdiff_t i, const unit_moments *m,
                          double terms[4])
{
    const double factor = m->rstd * number_at(a->weight, a->dtype, i, 1);
    terms[0] = m->pivot;
    terms[1] = factor;
    terms[2] = number_at(a->bias, a->dtype, i, 0) - m->shift * factor;
    terms[3] = 0;
}

/* Short planes of known statistics, one after the other. */
static void given_planes(const fn_channel_norm_args *a, ptrdiff_t plane0, ptrdiff_t plane1,
                         fn_plane_result *result)
{
    const ptrdiff_t n = a->layout.plane, size = fn_size_of(a->dtype);
    const ptrdiff_t together = planes_together(&a->layout, a->stream);
    for (ptrdiff_t p = plane0, count; p < plane1; p += count) {
        double terms[FN_PLANES][4];
        count = plane1 - p < together ? plane1 - p : together;
        for (ptrdiff_t k = 0; k < count; k++) {
            const ptrdiff_t kind = (p + k) % a->layout.kinds;
            const unit_moments m = fn_given_moments(a, kind);
            forward_terms(a, kind, &m, terms[k]);
        }
        fn_finish_planes(result, (const char *)a->x + p * n * size, NULL, p * n, n, count, terms);
    }
}

static void channel_norm(const void *args, ptrdiff_t unit0, ptrdiff_t unit1, void *scratch)
{
    const fn_channel_norm_args *a = args;
    const fn_channels *l = &a->layout;
    const ptrdiff_t planes = l->planes, together = planes_together(l, a->stream),
                    size = fn_size_of(a->dtype);
    char *room = after_strip(scratch, a->dtype);
    fn_plane_result result = {.y = a->y,
                              .y_type = a->y_type,
                              .dtype = a->dtype,
                              .activation = a->activation,
                              .strip = scratch,
                              .stream = a->stream,
                              .ahead = a->fetch};
    if (a->given && together > 1 && a->x_type == a->dtype && planes * l->rows == 1 &&
        l->stride == l->plane) {
        given_planes(a, unit0, unit1, &result);
        return;
    }
    ptrdiff_t kind = unit0 % l->kinds;
    for (ptrdiff_t u = unit0; u < unit1; u++, kind = kind + 1 < l->kinds ? kind + 1 : 0) {
        const ptrdiff_t first = kind * planes;
        const void *x = NULL;
        unit_moments m;
        if (!find_moments(a, u, kind, room, &x, &m)) continue;
        for (ptrdiff_t row = 0; row < l->rows; row++) {
            const ptrdiff_t at = u * l->stride + row * l->row_stride;
            if (!x || l->rows > 1) x = as_computed(a->x, a->x_type, at, cols_of(l), a->dtype, room);
            if (l->plane == 1) {
                const double unit[3] = {m.pivot, m.shift, m.rstd};
                finish_elements(&result, x, NULL, at, planes, unit,
                                parameters_at(a->weight, a->dtype, first),
                                parameters_at(a->bias, a->dtype, first), NULL);
                continue;
            }
            for (ptrdiff_t j = 0, n; j < planes; j += n) {
                double terms[FN_PLANES][4];
                n = planes - j < together ? planes - j : together;
                for (ptrdiff_t k = 0; k < n; k++) forward_terms(a, first + j + k, &m, terms[k]);
                fn_finish_planes(&result, (const char *)x + j * l->plane * size, NULL,
                                 at + j * l->plane, l->plane, n, terms);
            }
        }
    }
    end_stream(result.stream, result.held);
}

/* ---- backward --------------------------------------------------------------------------------- */

/* The unit's rows as they are computed with. */
static void load_rows(const fn_channel_norm_backward_args *a, ptrdiff_t at, char *rooms,
                      const char **x, const char **dy)
{
    const ptrdiff_t cols = cols_of(&a->layout);
    *x = as_computed(a->x, a->x_type, at, cols, a->dtype, rooms);
    if (rooms) rooms += fn_room_stride(cols) * fn_size_of(a->dtype);
    *dy = as_computed(a->dy, a->dy_type, at, cols, a->dtype, rooms);
}

/* dots[k], or of planes that are done together dots[k*FN_PLANES + j]: the kth sum of plane j. */
static void dots_of_planes(const fn_channel_norm_backward_args *a, const char *x, const char *dy,
                           ptrdiff_t count, double pivot, double dots[3 * FN_PLANES])
{
    const fn_channel_table *table = &fn_active_isa->channels;
    if (count > 1)
        table->planes_dots[a->dtype](x, dy, a->layout.plane, (int)count, &pivot, 0, dots);
    else
        table->plane_dots[a->dtype](x, dy, a->layout.plane, pivot, dots);
}

/* sums[2 j] and sums[2 j + 1]: of dy (x - pivot) and dy over plane j of all rows; returns the sum of
 * x - pivot over the unit. */
static double sums_of_unit(const fn_channel_norm_backward_args *a, ptrdiff_t at, double pivot,
                           char *rooms, const char **x, const char **dy, double *sums)
{
    const fn_channels *l = &a->layout;
    const ptrdiff_t planes = l->planes, step = l->plane * fn_size_of(a->dtype);
    const ptrdiff_t together = planes_together(l, a->stream);
    double deviations = 0;
    for (ptrdiff_t row = 0; row < l->rows; row++, at += l->row_stride) {
        load_rows(a, at, rooms, x, dy);
        for (ptrdiff_t j = 0, n; j < planes; j += n) {
            double dots[3 * FN_PLANES];
            n = planes - j < together ? planes - j : together;
            dots_of_planes(a, *x + j * step, *dy + j * step, n, pivot, dots);
            const ptrdiff_t step_of_dots = n > 1 ? FN_PLANES : 1;
            for (ptrdiff_t k = 0; k < n; k++) {
                double *sum = sums + 2 * (j + k);
                deviations += dots[k];
                sum[0] = (row ? sum[0] : 0) + dots[2 * step_of_dots + k];
                sum[1] = (row ? sum[1] : 0) + dots[step_of_dots + k];
            }
        }
    }
    return deviations;
}

/* sums: of each plane, of dy (x - pivot), which becomes dweight, and of dy; deviations: of x - pivot over
 * the unit; terms[0]: the pivot. Makes what dx takes besides dy*factor in terms; false where the unit is out
 * of range. first: the unit's first weight. */
static int gradients_of_unit(const fn_channel_norm_backward_args *a, const gradient_bounds *b,
                             ptrdiff_t first, double mean, double rstd, double deviations,
                             double *sums, double terms[4])
{
    unit_gradients u = begun_gradients(a, b, mean, rstd, terms[0], deviations);
    for (ptrdiff_t j = 0; j < a->layout.planes; j++)
        add_plane(b, number_at(a->weight, a->dtype, first + j, 1), &u, sums + 2 * j);
    return finish_gradients(a, b, &u, terms);
}

/* ---- backward of units of one short plane a row, which lie side by side -------------------------- */

/* Batch norm's channels, instance norm's planes. */
static int are_short_neighbours(const fn_channel_norm_backward_args *a)
{
    const fn_channels *l = &a->layout;
    return l->planes == 1 && l->stride == l->plane && planes_together(l, a->stream) > 1 &&
           a->x_type == a->dtype && a->dy_type == a->dtype;
}

/* The sums of `count` units of which the first begins at element `at`; those of x - pivot apart. */
static void sums_of_neighbours(const fn_channel_norm_backward_args *a, ptrdiff_t at, int count,
                               const double pivots[FN_PLANES], double *sums,
                               double deviations[FN_PLANES])
{
    const fn_channels *l = &a->layout;
    memset(sums, 0, 2 * (size_t)count * sizeof *sums);
    for (int k = 0; k < count; k++) deviations[k] = 0;
    for (ptrdiff_t row = 0; row < l->rows; row++, at += l->row_stride) {
        double dots[3 * FN_PLANES];
        fn_active_isa->channels.planes_dots[a->dtype](at_element(a->x, a->dtype, at),
                                                      at_element(a->dy, a->dtype, at), l->plane,
                                                      count, pivots, 1, dots);
        for (int k = 0; k < count; k++) {
            deviations[k] += dots[k];
            sums[2 * k] += dots[2 * FN_PLANES + k];
            sums[2 * k + 1] += dots[FN_PLANES + k];
        }
    }
}

/* dx of `count` units, of which none is refused. */
static void finish_neighbours(const fn_channel_norm_backward_args *a, fn_plane_result *result,
                              ptrdiff_t at, ptrdiff_t count, const double (*terms)[4])
{
    const fn_channels *l = &a->layout;
    for (ptrdiff_t row = 0; row < l->rows; row++, at += l->row_stride) {
        const char *x = at_element(a->x, a->dtype, at), *dy = at_element(a->dy, a->dtype, at);
        fn_finish_planes(result, a->given ? dy : x, a->given ? NULL : dy, at, l->plane, count,
                         terms);
    }
}

static void neighbours_backward(const fn_channel_norm_backward_args *a, ptrdiff_t unit0,
                                ptrdiff_t unit1, fn_plane_result *result)
{
    const fn_channels *l = &a->layout;
    const ptrdiff_t together = planes_together(l, a->stream);
    const gradient_bounds bounds = gradient_bounds_of(a);
    for (ptrdiff_t u = unit0, count; u < unit1; u += count) {
        const ptrdiff_t kind = u % l->kinds, own = a->given ? kind : u;
        double pivots[FN_PLANES], deviations[FN_PLANES], terms[FN_PLANES][4] = {{0}};
        count = unit1 - u < together ? unit1 - u : together;
        if (count > l->kinds - kind) count = l->kinds - kind;
        for (ptrdiff_t k = 0; k < count; k++) pivots[k] = rounded(a->mean[own + k], a->dtype);
        sums_of_neighbours(a, u * l->stride, (int)count, pivots, a->sums + 2 * u, deviations);
        for (ptrdiff_t k = 0; k < count; k++) {
            const double rstd = a->rstd[own + k];
            terms[k][0] = pivots[k];
            a->refused[u + k] = (unsigned char)!gradients_of_unit(a, &bounds, kind + k,
                                                                  a->mean[own + k], rstd,
                                                                  deviations[k],
                                                                  a->sums + 2 * (u + k), terms[k]);
            if (a->given) terms[k][0] = 0;
            terms[k][1] = rstd * number_at(a->weight, a->dtype, kind + k, 1);
        }
        if (!a->dx) continue;
        if (!memchr(a->refused + u, 1, (size_t)count))
            finish_neighbours(a, result, u * l->stride, count, (const double (*)[4])terms);
        else
            for (ptrdiff_t k = 0; k < count; k++)
                if (!a->refused[u + k])
                    finish_neighbours(a, result, (u + k) * l->stride, 1,
                                      (const double (*)[4])terms + k);
    }
}

static void channel_norm_backward(const void *args, ptrdiff_t unit0, ptrdiff_t unit1, void *scratch)
{
    const fn_channel_norm_backward_args *a = args;
    const fn_channels *l = &a->layout;
    const ptrdiff_t planes = l->planes, together = planes_together(l, a->stream),
                    size = fn_size_of(a->dtype);
    char *rooms = after_strip(scratch, a->dtype);
    /* L1 has the last planes still; but lines that planes share are to be whole before they go past it. */
    const int descending = !a->stream || l->plane * size % 64 == 0;
    fn_plane_result result = {.y = a->dx,
                              .y_type = a->x_type,
                              .dtype = a->dtype,
                              .strip = scratch,
                              .stream = a->stream,
                              .ahead = a->fetch};
    if (are_short_neighbours(a)) {
        neighbours_backward(a, unit0, unit1, &result);
        return;
    }
    const gradient_bounds bounds = gradient_bounds_of(a);
    ptrdiff_t kind = unit0 % l->kinds;
    for (ptrdiff_t u = unit0; u < unit1; u++, kind = kind + 1 < l->kinds ? kind + 1 : 0) {
        const ptrdiff_t first = kind * planes, own = a->given ? kind : u;
        const double mean = a->mean[own], rstd = a->rstd[own];
        double shared[4] = {rounded(mean, a->dtype)}, *sums = a->sums + 2 * u * planes;
        double terms[FN_PLANES][4];
        const char *x, *dy;
        const double deviations = sums_of_unit(a, u * l->stride, shared[0], rooms, &x, &dy, sums);
        a->refused[u] = (unsigned char)!gradients_of_unit(a, &bounds, first, mean, rstd, deviations,
                                                          sums, shared);
        if (a->refused[u] || !a->dx) continue;
        if (a->given) shared[0] = 0;
        const double pivot = shared[0], shift = shared[2], slope = shared[3];
        for (ptrdiff_t k = 0; k < together; k++) {
            terms[k][0] = pivot;
            terms[k][2] = shift;
            terms[k][3] = slope;
        }
        for (ptrdiff_t row = 0; row < l->rows; row++) {
            const ptrdiff_t at = u * l->stride + row * l->row_stride;
            if (l->rows > 1) load_rows(a, at, rooms, &x, &dy);
            if (l->plane == 1 && !a->given) {
                const double shift_slope[2] = {shift, slope}, unit[3] = {pivot, 0, rstd};
                finish_elements(&result, x, dy, at, planes, unit,
                                parameters_at(a->weight, a->dtype, first), NULL, shift_slope);
                continue;
            }
            for (ptrdiff_t done = 0, n; done < planes; done += n) {
                n = planes - done < together ? planes - done : together;
                const ptrdiff_t j = descending ? planes - done - n : done, from = j * l->plane;
                for (ptrdiff_t k = 0; k < n; k++)
                    terms[k][1] = rstd * number_at(a->weight, a->dtype, first + j + k, 1);
                const char *x_planes = x + from * size, *dy_planes = dy + from * size;
                if (a->given) /* x has no part in it */
                    fn_finish_planes(&result, dy_planes, NULL, at + from, l->plane, n, terms);
                else
                    fn_finish_planes(&result, x_planes, dy_planes, at + from, l->plane, n, terms);
            }
        }
    }
    end_stream(result.stream, result.held);
}

/* ---- moments of planes ------------------------------------------------------------------------ */

static void plane_moments(const void *args, ptrdiff_t row0, ptrdiff_t row1, void *scratch)
{
    const fn_plane_moments_args *a = args;
    for (ptrdiff_t row = row0; row < row1; row++) {
        fn_row_moments m;
        const void *x = as_computed(a->x, a->x_type, row * a->cols, a->cols, a->dtype, scratch);
        fn_active_isa->channels.row_moments[a->dtype](x, a->cols, 0, &m);
        a->sums[row] = m.pivot;
        a->sums[row + a->rows] = m.shift;
        a->sums[row + 2 * a->rows] = m.variance * (double)a->cols;
    }
}

/* ---- calls ------------------------------------------------------------------------------------ */

/* Whether the result goes past the cache: where the call moves as much as a forward call of rows that
 * does, of which the result is a half. */
static int streams(const fn_channels *l, const void *y, fn_dtype y_type, int warm, fn_dtype dtype,
                   int arrays)
{
    const ptrdiff_t bytes = l->units * l->rows * cols_of(l) * fn_size_of(dtype);
    return y && warm && y_type == dtype && bytes * arrays >= 2 * STREAM_BYTES &&
           (is_last(l) || l->plane * fn_size_of(dtype) >= STREAM_ROW_BYTES(bytes)) &&
           (uintptr_t)y % (uintptr_t)fn_size_of(dtype) == 0;
}

static fn_plan plan_of(const fn_channels *l, ptrdiff_t bytes_each, int stream, int threads)
{
    const ptrdiff_t bytes = l->units * l->rows * cols_of(l) * bytes_each;
    const char *regime = stream ? "stream" : "planes";
    return (fn_plan){.threads = fn_planned_threads(bytes, independent_of(l), threads),
                     .stream = stream,
                     .regime = is_last(l) ? "channels last" : regime,
                     .bytes = bytes};
}

fn_plan fn_plan_channel_norm(const fn_channel_norm_args *a, fn_dtype dtype, int threads)
{
    return plan_of(&a->layout, fn_size_of(a->x_type) + fn_size_of(a->y_type),
                   !a->activation && streams(&a->layout, a->y, a->y_type, a->y_is_warm, dtype, 2),
                   threads);
}

fn_plan fn_plan_channel_norm_backward(const fn_channel_norm_backward_args *a, fn_dtype dtype,
                                      int threads)
{
    return plan_of(&a->layout, fn_size_of(a->dy_type) + fn_size_of(a->x_type) * (a->dx ? 2 : 1),
                   streams(&a->layout, a->dx, a->x_type, a->dx_is_warm, dtype, 3), threads);
}

/* How far ahead to fetch, in elements. Where rows of a unit lie apart, each pass is a new stream that the
 * CPU does not see coming: the next unit's row. Where all is one stream the CPU fetches better. */
static ptrdiff_t fetched(const fn_channels *l, const fn_plan *plan)
{
    return l->rows > 1 && plan->bytes >= FETCH_BYTES ? l->stride : 0;
}

/* A strip of results, and a row of each array that is converted. */
static size_t scratch_for(const fn_channels *l, int plain, int rooms, fn_dtype dtype)
{
    return plain ? 0 : bytes_of(FN_GROUP_COLS + rooms * fn_room_stride(cols_of(l)), dtype);
}

int fn_channel_norm(fn_channel_norm_args *a, fn_dtype dtype, int threads)
{
    const fn_plan plan = fn_plan_channel_norm(a, dtype, threads);
    const int plain = a->x_type == dtype && a->y_type == dtype && !a->activation;
    a->dtype = dtype;
    if (is_last(&a->layout)) return fn_channels_last_norm(a, plan);
    a->stream = plan.stream;
    a->fetch = fetched(&a->layout, &plan);
    return fn_run_rowwise(channel_norm, a, a->layout.units, plan.threads,
                          scratch_for(&a->layout, plain, a->x_type != dtype, dtype));
}

int fn_channel_norm_backward(fn_channel_norm_backward_args *a, fn_dtype dtype, int threads)
{
    const fn_plan plan = fn_plan_channel_norm_backward(a, dtype, threads);
    const int plain = a->x_type == dtype && a->dy_type == dtype;
    a->dtype = dtype;
    if (is_last(&a->layout)) return fn_channels_last_norm_backward(a, plan);
    a->stream = plan.stream;
    a->fetch = fetched(&a->layout, &plan);
    return fn_run_rowwise(channel_norm_backward, a, a->layout.units, plan.threads,
                          scratch_for(&a->layout, plain, 2, dtype));
}

void fn_rstds(double *variances, double eps, ptrdiff_t n)
{
    fn_active_isa->rstds(variances, eps, n);
}

int fn_plane_moments(fn_plane_moments_args *a, fn_dtype dtype, int threads)
{
    const ptrdiff_t bytes = a->rows * a->cols * fn_size_of(a->x_type);
    a->dtype = dtype;
    return fn_run_rowwise(plane_moments, a, a->rows, fn_planned_threads(bytes, a->rows, threads),
                          a->x_type == dtype ? 0 : bytes_of(a->cols, dtype));
}
