/* channels.c: group, instance and batch norm, over the strips, rows and blocks of op_channels.h.
 *
 * Statistics are layer_norm's own, a row at a time; what a unit has of rows or planes is merged here, in
 * double and in the order of the rows. No arithmetic on elements is done in this file. */
#include <float.h>
#include <math.h>
#include <stdint.h>

#include "elements.h"

/* n elements as `dtype`: where they lie, or in `room`. */
static const void *as_computed(const void *data, fn_dtype type, ptrdiff_t i, ptrdiff_t n,
                               fn_dtype dtype, void *room)
{
    const char *from = at_element(data, type, i);
    if (type == dtype) return from;
    fn_active_isa->channels.load_elements[dtype](room, from, type, n);
    return room;
}

/* What follows the strip that scratch begins with. */
static char *after_strip(void *scratch, fn_dtype dtype)
{
    return scratch ? (char *)scratch + FN_GROUP_COLS * fn_size_of(dtype) : NULL;
}

/* Rounded to what is computed in. */
static double rounded(double a, fn_dtype dtype) { return dtype == FN_F64 ? a : (double)(float)a; }

/* Elements of a row. */
static ptrdiff_t cols_of(const fn_channels *l) { return l->planes * l->plane; }

/* Inlined, as fmax is not: its care for NaN is not needed where these are used. */
static double larger(double a, double b) { return a > b ? a : b; }
static double smaller(double a, double b) { return a < b ? a : b; }

/* ---- planes ----------------------------------------------------------------------------------- */

/* What becomes of x (and dy) by plane_pass, an activation after it, as another type where asked for. */
typedef struct {
    void *y;
    fn_dtype y_type, dtype;
    fn_activation activation;
    char *strip;
    int stream;
    ptrdiff_t ahead; /* elements to what is to be fetched meanwhile; 0: nothing */
} plane_result;

static void finish_plane(const plane_result *r, const char *x, const char *dy, ptrdiff_t i,
                         ptrdiff_t n, const double terms[4])
{
    const fn_channel_table *table = &fn_active_isa->channels;
    const ptrdiff_t size = fn_size_of(r->dtype), y_size = fn_size_of(r->y_type);
    char *y = (char *)r->y + i * y_size;
    if (r->y_type == r->dtype && !r->activation) {
        table->plane_pass[r->dtype](x, dy, y, n, terms, r->stream, r->ahead);
        return;
    }
    for (ptrdiff_t k = 0; k < n; k += FN_GROUP_COLS) {
        const ptrdiff_t m = n - k < FN_GROUP_COLS ? n - k : FN_GROUP_COLS;
        table->plane_pass[r->dtype](x + k * size, dy ? dy + k * size : NULL, r->strip, m, terms, 0,
                                    0);
        table->store_elements[r->dtype](y + k * y_size, r->y_type, r->strip, m, r->activation);
    }
}

/* ---- forward ---------------------------------------------------------------------------------- */

/* The mean is pivot + shift, where pivot is a number of the type that is computed in. */
typedef struct {
    double pivot, shift, variance, rstd;
} unit_moments;

/* Sums of squares up to this leave all deviations in the range of what is computed in: no row's own
 * are larger, but what lies between rows may be. */
static double largest_squares(fn_dtype dtype) { return dtype == FN_F64 ? DBL_MAX : 0x1p252; }

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
    const double padded = row.variance + a->eps;
    *m = (unit_moments){row.pivot, row.shift, row.variance, 1.0 / sqrt(padded)};
    return !(padded < least_variance(a->dtype) || row.variance > DBL_MAX);
}

/* Whether w*rstd has lost digits to the least numbers, though the weight is nowhere near them. */
static int is_lost(double w, double rstd, fn_dtype dtype)
{
    return fabs(w * rstd) < least_of(dtype) && fabs(w) >= (dtype == FN_F64 ? 0x1p-960 : 0x1p-100);
}

/* Whether a plane's factor stays in range though all that it is made of does. */
static int weights_fit(const fn_channel_norm_args *a, ptrdiff_t first, double rstd)
{
    for (ptrdiff_t j = 0; a->weight && j < a->layout.planes; j++) {
        const double w = number_at(a->weight, a->dtype, first + j, 1);
        if (fabs(w * rstd) > largest_of(a->dtype) && fabs(w) <= DBL_MAX) return 0;
        if (is_lost(w, rstd, a->dtype)) return 0;
    }
    return 1;
}

static int find_moments(const fn_channel_norm_args *a, ptrdiff_t u, ptrdiff_t kind, void *room,
                        const void **x, unit_moments *m)
{
    if (a->given) {
        const double pivot = rounded(a->mean[kind], a->dtype);
        *m = (unit_moments){pivot, a->mean[kind] - pivot, 0, a->rstd[kind]};
        return 1;
    }
    const int fits = moments_of_unit(a, u * a->layout.stride, room, x, m) &&
                     weights_fit(a, kind * a->layout.planes, m->rstd);
    a->refused[u] = !fits;
    if (!fits) return 0;
    a->mean[u] = m->pivot + m->shift;
    a->variance[u] = m->variance;
    a->rstd[u] = m->rstd;
    return 1;
}

static void channel_norm(const void *args, ptrdiff_t unit0, ptrdiff_t unit1, void *scratch)
{
    const fn_channel_norm_args *a = args;
    const fn_channels *l = &a->layout;
    const ptrdiff_t planes = l->planes, size = fn_size_of(a->dtype);
    char *room = after_strip(scratch, a->dtype);
    const plane_result result = {a->y,    a->y_type, a->dtype, a->activation,
                                 scratch, a->stream, a->fetch};
    ptrdiff_t kind = unit0 % l->kinds;
    for (ptrdiff_t u = unit0; u < unit1; u++, kind = kind + 1 < l->kinds ? kind + 1 : 0) {
        const ptrdiff_t first = kind * planes;
        const void *x = NULL;
        unit_moments m;
        if (!find_moments(a, u, kind, room, &x, &m)) continue;
        for (ptrdiff_t row = 0; row < l->rows; row++) {
            const ptrdiff_t at = u * l->stride + row * l->row_stride;
            if (!x || l->rows > 1) x = as_computed(a->x, a->x_type, at, cols_of(l), a->dtype, room);
            for (ptrdiff_t j = 0; j < planes; j++) {
                const double factor = m.rstd * number_at(a->weight, a->dtype, first + j, 1);
                const double bias = number_at(a->bias, a->dtype, first + j, 0);
                const double terms[4] = {m.pivot, factor, bias - m.shift * factor, 0};
                finish_plane(&result, (const char *)x + j * l->plane * size, NULL,
                             at + j * l->plane, l->plane, terms);
            }
        }
    }
    fence(a->stream);
}

/* ---- backward --------------------------------------------------------------------------------- */

/* Square roots of variances within these bounds leave their squares, times a gradient, in range. */
static double largest_rstd(fn_dtype dtype) { return dtype == FN_F64 ? 0x1p301 : 0x1p41; }

/* Whether two sums of a plane, of dy and of dy times xh, lost nothing to either end of the range.
 * Products of dy and 1/rstd may underflow by half a least number each: next to `least`, that is
 * nothing. */
static int sums_are_safe(double a, double b, double least, fn_dtype dtype)
{
    const double largest = larger(fabs(a), fabs(b));
    if (a != a || b != b) return 0;
    return largest == 0 || (largest >= larger(least, dtype == FN_F64 ? 0x1p-900 : 0x1p-90) &&
                            largest <= largest_of(dtype));
}

/* Whether what dx takes besides dy*factor is rounded to T's digits, though T's least number stands in
 * the way; `sums`: the largest of the unit's n elements. */
static int terms_are_safe(const double terms[4], double rstd, double sums, double n, fn_dtype dtype)
{
    const double least = smaller(rstd, rstd * rstd) * (sums / n);
    return (terms[2] == 0 && terms[3] == 0) || least >= least_of(dtype) * sqrt(n);
}

/* The unit's rows as they are computed with. */
static void load_rows(const fn_channel_norm_backward_args *a, ptrdiff_t at, char *rooms,
                      const char **x, const char **dy)
{
    const ptrdiff_t cols = cols_of(&a->layout);
    *x = as_computed(a->x, a->x_type, at, cols, a->dtype, rooms);
    if (rooms) rooms += fn_room_stride(cols) * fn_size_of(a->dtype);
    *dy = as_computed(a->dy, a->dy_type, at, cols, a->dtype, rooms);
}

/* sums[2 j] and sums[2 j + 1]: of dy (x - pivot) and dy over plane j of all rows; returns the sum of
 * x - pivot over the unit. */
static double sums_of_unit(const fn_channel_norm_backward_args *a, ptrdiff_t at, double pivot,
                           char *rooms, const char **x, const char **dy, double *sums)
{
    const fn_channels *l = &a->layout;
    const ptrdiff_t planes = l->planes, step = l->plane * fn_size_of(a->dtype);
    double deviations = 0;
    for (ptrdiff_t row = 0; row < l->rows; row++, at += l->row_stride) {
        load_rows(a, at, rooms, x, dy);
        for (ptrdiff_t j = 0; j < planes; j++) {
            double dots[3];
            fn_active_isa->channels.plane_dots[a->dtype](*x + j * step, *dy + j * step, l->plane,
                                                         pivot, dots);
            deviations += dots[0];
            sums[2 * j] = (row ? sums[2 * j] : 0) + dots[2];
            sums[2 * j + 1] = (row ? sums[2 * j + 1] : 0) + dots[1];
        }
    }
    return deviations;
}

/* dweight of each plane in the place of its first sum, and what dx takes besides dy*factor; false where
 * the unit is out of range. */
static int gradients_of_unit(const fn_channel_norm_backward_args *a, ptrdiff_t first, double mean,
                             double rstd, double deviations, double *sums, double terms[4])
{
    const fn_channels *l = &a->layout;
    const double n = (double)l->rows * (double)cols_of(l), per_n = 1.0 / n;
    const double most = largest_of(a->dtype);
    const double least = 4 * least_of(a->dtype) * rstd * (double)l->rows * (double)l->plane;
    const double c = a->given ? mean - terms[0] : deviations * per_n;
    double g = 0, gx = 0, largest = 0;
    const double bound = largest_rstd(a->dtype);
    int fits = 1 <= rstd * bound && rstd <= bound;
    for (ptrdiff_t j = 0; j < l->planes; j++) {
        const double w = number_at(a->weight, a->dtype, first + j, 1), dy = sums[2 * j + 1];
        const double dyx = sums[2 * j] * rstd;
        fits &= sums_are_safe(dy, dyx, least, a->dtype) && fabs(w * rstd) <= most &&
                !is_lost(w, rstd, a->dtype);
        largest = larger(largest, larger(fabs(dy), fabs(dyx)));
        sums[2 * j] = (sums[2 * j] - c * dy) * rstd;
        g += w * dy;
        gx += w * sums[2 * j];
    }
    if (!a->given) {
        terms[3] = -rstd * rstd * (gx * per_n);
        terms[2] = -rstd * (g * per_n) - c * terms[3];
        fits &= terms_are_safe(terms, rstd, largest, n, a->dtype);
    }
    return fits && fabs(terms[3]) <= most && fabs(terms[2]) <= most;
}

static void channel_norm_backward(const void *args, ptrdiff_t unit0, ptrdiff_t unit1, void *scratch)
{
    const fn_channel_norm_backward_args *a = args;
    const fn_channels *l = &a->layout;
    const ptrdiff_t planes = l->planes, size = fn_size_of(a->dtype);
    char *rooms = after_strip(scratch, a->dtype);
    const plane_result result = {a->dx,   a->x_type, a->dtype, FN_NO_ACTIVATION,
                                 scratch, a->stream, a->fetch};
    ptrdiff_t kind = unit0 % l->kinds;
    for (ptrdiff_t u = unit0; u < unit1; u++, kind = kind + 1 < l->kinds ? kind + 1 : 0) {
        const ptrdiff_t first = kind * planes, own = a->given ? kind : u;
        const double mean = a->mean[own], rstd = a->rstd[own];
        double terms[4] = {rounded(mean, a->dtype)}, *sums = a->sums + 2 * u * planes;
        const char *x, *dy;
        const double deviations = sums_of_unit(a, u * l->stride, terms[0], rooms, &x, &dy, sums);
        a->refused[u] = (unsigned char)!gradients_of_unit(a, first, mean, rstd, deviations, sums,
                                                          terms);
        if (a->refused[u] || !a->dx) continue;
        for (ptrdiff_t row = 0; row < l->rows; row++) {
            const ptrdiff_t at = u * l->stride + row * l->row_stride;
            if (l->rows > 1) load_rows(a, at, rooms, &x, &dy);
            for (ptrdiff_t j = 0; j < planes; j++) {
                const char *x_plane = x + j * l->plane * size, *dy_plane = dy + j * l->plane * size;
                terms[1] = rstd * number_at(a->weight, a->dtype, first + j, 1);
                if (a->given) { /* x has no part in it */
                    terms[0] = 0;
                    x_plane = dy_plane;
                    dy_plane = NULL;
                }
                finish_plane(&result, x_plane, dy_plane, at + j * l->plane, l->plane, terms);
            }
        }
    }
    fence(a->stream);
}

/* ---- channels last ---------------------------------------------------------------------------- */

/* Columns of a block that are converted at a time. */
enum { TILE_COLS = 64 };

/* Rows row0 .. of `cols` columns from column j on: where they lie, or in `room`; *step: from row to row. */
static const void *tile_at(const fn_channels_last_args *a, const void *data, fn_dtype type,
                           ptrdiff_t row0, ptrdiff_t rows, ptrdiff_t j, ptrdiff_t cols, char *room,
                           ptrdiff_t *step)
{
    *step = a->cols;
    if (type == a->dtype) return at_element(data, type, row0 * a->cols + j);
    *step = TILE_COLS;
    for (ptrdiff_t r = 0; r < rows; r++)
        as_computed(data, type, (row0 + r) * a->cols + j, cols, a->dtype,
                    room + r * TILE_COLS * fn_size_of(a->dtype));
    return room;
}

/* Both kinds of sums; blocks are numbered sample by sample. */
static void channels_last_sums(const void *args, ptrdiff_t block0, ptrdiff_t block1, void *scratch)
{
    const fn_channels_last_args *a = args;
    const fn_channel_table *table = &fn_active_isa->channels;
    const ptrdiff_t each = (a->sample + a->block - 1) / a->block, size = fn_size_of(a->dtype);
    char *rooms[2] = {scratch, scratch ? (char *)scratch + TILE_COLS * a->block * size : NULL};
    for (ptrdiff_t b = block0; b < block1; b++) {
        const ptrdiff_t skipped = b % each * a->block, row0 = b / each * a->sample + skipped;
        const ptrdiff_t rows = a->sample - skipped < a->block ? a->sample - skipped : a->block;
        for (ptrdiff_t j = 0, n; j < a->cols; j += n) {
            n = a->cols - j < TILE_COLS ? a->cols - j : TILE_COLS;
            ptrdiff_t step, dy_step;
            double *into[3];
            for (int k = 0; k < 3; k++) into[k] = a->sums + (k * a->blocks + b) * a->cols + j;
            const void *x = tile_at(a, a->x, a->x_type, row0, rows, j, n, rooms[0], &step);
            if (!a->dy) {
                table->column_moments[a->dtype](x, step, rows, n, into);
                continue;
            }
            const void *dy = tile_at(a, a->dy, a->dy_type, row0, rows, j, n, rooms[1], &dy_step);
            const void *pivots = at_element(a->terms[0], a->dtype, b / each * a->cols + j);
            table->column_dots[a->dtype](x, dy, step, dy_step, rows, n, pivots, into);
        }
    }
}

static void channels_last(const void *args, ptrdiff_t row0, ptrdiff_t row1, void *scratch)
{
    const fn_channels_last_args *a = args;
    const fn_channel_table *table = &fn_active_isa->channels;
    char *strip = scratch, *room = after_strip(scratch, a->dtype),
         *dy_room = after_strip(room, a->dtype);
    const int direct = a->y_type == a->dtype && !a->activation;
    for (ptrdiff_t row = row0; row < row1; row++)
        for (ptrdiff_t j = 0, n; j < a->cols; j += n) {
            n = a->cols - j < FN_GROUP_COLS ? a->cols - j : FN_GROUP_COLS;
            const ptrdiff_t at = row * a->cols + j, own = row / a->sample * a->cols + j;
            const void *x = as_computed(a->x, a->x_type, at, n, a->dtype, room);
            const void *dy = NULL, *terms[4] = {0};
            if (a->dy) dy = as_computed(a->dy, a->dy_type, at, n, a->dtype, dy_room);
            for (int k = 0; k < (dy ? 4 : 3); k++)
                terms[k] = at_element(a->terms[k], a->dtype, own);
            char *y = (char *)a->y + at * fn_size_of(a->y_type);
            table->columns_pass[a->dtype](x, dy, direct ? y : strip, n, terms);
            if (!direct) table->store_elements[a->dtype](y, a->y_type, strip, n, a->activation);
        }
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
           l->plane * fn_size_of(dtype) >= STREAM_ROW_BYTES(bytes) &&
           (uintptr_t)y % (uintptr_t)fn_size_of(dtype) == 0;
}

static fn_plan plan_of(const fn_channels *l, ptrdiff_t bytes_each, int stream, int threads)
{
    const ptrdiff_t bytes = l->units * l->rows * cols_of(l) * bytes_each;
    return (fn_plan){.threads = fn_planned_threads(bytes, l->units, threads),
                     .stream = stream,
                     .regime = stream ? "stream" : "planes",
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

fn_plan fn_plan_channels_last(const fn_channels_last_args *a, fn_dtype dtype, int threads)
{
    (void)dtype;
    const ptrdiff_t bytes = a->rows * a->cols *
                            (fn_size_of(a->x_type) + (a->dy ? fn_size_of(a->dy_type) : 0) +
                             (a->y ? fn_size_of(a->y_type) : 0));
    return (fn_plan){.threads = fn_planned_threads(bytes, a->y ? a->rows : a->blocks, threads),
                     .regime = "channels last",
                     .bytes = bytes};
}

/* How far ahead to fetch, in elements. Where rows of a unit lie apart, each pass is a new stream that the
 * CPU does not see coming: the next unit's row. Where all is one stream the CPU fetches better by itself,
 * but for what is written past the cache. */
static ptrdiff_t fetched(const fn_channels *l, const fn_plan *plan)
{
    if (l->rows > 1 && plan->bytes >= FETCH_BYTES) return l->stride;
    return plan->stream ? 256 : 0;
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
    a->stream = plan.stream;
    a->fetch = fetched(&a->layout, &plan);
    a->dtype = dtype;
    return fn_run_rowwise(channel_norm, a, a->layout.units, plan.threads,
                          scratch_for(&a->layout, plain, a->x_type != dtype, dtype));
}

int fn_channel_norm_backward(fn_channel_norm_backward_args *a, fn_dtype dtype, int threads)
{
    const fn_plan plan = fn_plan_channel_norm_backward(a, dtype, threads);
    const int plain = a->x_type == dtype && a->dy_type == dtype;
    a->stream = plan.stream;
    a->fetch = fetched(&a->layout, &plan);
    a->dtype = dtype;
    return fn_run_rowwise(channel_norm_backward, a, a->layout.units, plan.threads,
                          scratch_for(&a->layout, plain, 2, dtype));
}

static int sums_of_blocks(fn_channels_last_args *a, fn_dtype dtype, int threads)
{
    const fn_plan plan = fn_plan_channels_last(a, dtype, threads);
    const int plain = a->x_type == dtype && (!a->dy || a->dy_type == dtype);
    a->dtype = dtype;
    return fn_run_rowwise(channels_last_sums, a, a->blocks, plan.threads,
                          plain ? 0 : bytes_of(2 * TILE_COLS * a->block, dtype));
}

int fn_channels_last_moments(fn_channels_last_args *a, fn_dtype dtype, int threads)
{
    a->dy = a->y = NULL;
    return sums_of_blocks(a, dtype, threads);
}

int fn_channels_last_dots(fn_channels_last_args *a, fn_dtype dtype, int threads)
{
    a->y = NULL;
    return sums_of_blocks(a, dtype, threads);
}

int fn_channels_last(fn_channels_last_args *a, fn_dtype dtype, int threads)
{
    const fn_plan plan = fn_plan_channels_last(a, dtype, threads);
    const int plain = a->x_type == dtype && a->y_type == dtype && !a->activation &&
                      (!a->dy || a->dy_type == dtype);
    a->dtype = dtype;
    return fn_run_rowwise(channels_last, a, a->rows, plan.threads,
                          plain ? 0 : bytes_of(3 * FN_GROUP_COLS, dtype));
}

int fn_plane_moments(fn_plane_moments_args *a, fn_dtype dtype, int threads)
{
    const ptrdiff_t bytes = a->rows * a->cols * fn_size_of(a->x_type);
    a->dtype = dtype;
    return fn_run_rowwise(plane_moments, a, a->rows, fn_planned_threads(bytes, a->rows, threads),
                          a->x_type == dtype ? 0 : bytes_of(a->cols, dtype));
}
