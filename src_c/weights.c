/* weights.c: weight norm and unit norm, forward and backward, over the strips, rows and columns of the
 * instruction set.
 *
 * A vector of norm r takes two numbers, formed in double and rounded once: w = v*factor, where factor is
 * g/r; backward, with along = sum(dw*v)/r, dv = dw*factor + v*slope, where slope is -factor*along/r.
 * Squares are summed in the order of row.h, whether vectors are rows or lie side by side. No arithmetic
 * on elements is done in this file but to find out why a sum is next to 0. */
#include <math.h>
#include <string.h>

#include "elements.h"

/* Elements of a vector. */
static ptrdiff_t length_of(const fn_weight_norm_args *a) { return a->outer * a->inner; }

/* ---- the numbers of a vector ------------------------------------------------------------------ */

/* Whether a product of v and dw, whose n elements lie `step` apart, has fewer digits than others, though
 * neither is 0. */
static int loses_digits(const void *v, const void *dw, ptrdiff_t step, ptrdiff_t n, fn_dtype dtype)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        const double x = number_at(v, dtype, i * step, 0), y = number_at(dw, dtype, i * step, 0);
        if (x != 0 && y != 0 && !(fabs(x * y) >= least_of(dtype))) return 1;
    }
    return 0;
}

typedef struct {
    double squares, dot; /* sums of v*v and of dw*v */
    const void *v, *dw;  /* its elements as they are computed with, and how far apart they lie */
    ptrdiff_t step;
} vector_sums;

/* What the numbers of a vector of n elements are to be within. */
typedef struct {
    ptrdiff_t n;
    double least, largest, least_squares;
} vector_bounds;

static vector_bounds bounds_of(const fn_weight_norm_args *a)
{
    const ptrdiff_t n = length_of(a);
    return (vector_bounds){n, least_of(a->dtype), largest_of(a->dtype),
                           (double)n * least_variance(a->dtype)};
}

/* Whether a number keeps its digits when it is rounded. */
static int is_normal(double number, const vector_bounds *b)
{
    return fabs(number) >= b->least && fabs(number) <= b->largest;
}

/* Backward: slope, and whether that and what it is made of keep their digits. */
static int find_slope(const fn_weight_norm_args *a, ptrdiff_t u, const vector_sums *s,
                      const vector_bounds *b, double per_norm, double *factor, double *slope)
{
    const double size = fabs(s->dot);
    a->along[u] = s->dot * per_norm;
    *slope = -(*factor * a->along[u] * per_norm);
    /* Short of digits it does no harm where v is small. */
    const int fits = is_normal(*slope, b) || *factor == 0 || size == 0 ||
                     (per_norm >= 1 && fabs(*slope) <= 1);
    if (b->n == 1) *factor = *slope = 0; /* it has no other direction */
    return fits && size <= DBL_MAX &&
           (size >= (double)b->n * b->least || !loses_digits(s->v, s->dw, s->step, b->n, a->dtype));
}

/* Forward: the factor of a vector that is short, zero, out of range or comes to have no length. */
static int find_odd_factor(const fn_weight_norm_args *a, const vector_sums *s,
                           const vector_bounds *b, double norm, double g, double *factor)
{
    int fits = norm <= DBL_MAX && norm * norm >= b->least_squares;
    if (norm == 0 && a->eps >= 0) {
        fits = !loses_digits(s->v, s->v, s->step, b->n, a->dtype);
        *factor = 0;
        if (a->eps == 0) return fits && !a->dw; /* unit norm's zeros stay what they are */
    }
    *factor = g / (norm < a->eps ? a->eps : norm);
    return fits && (g == 0 || is_normal(*factor, b));
}

/* Vector u's numbers, also in factor and slope; false where they are out of range. */
static int find_terms(const fn_weight_norm_args *a, ptrdiff_t u, const vector_sums *s,
                      const vector_bounds *b, double *factor, double *slope)
{
    const double norm = a->given ? a->norm[u] : sqrt(s->squares), per_norm = 1 / norm;
    const double g = number_at(a->g, a->g_type, u, 1);
    a->norm[u] = norm;
    *factor = g * per_norm;
    *slope = 0;
    int fits = norm >= a->eps && norm <= DBL_MAX && norm * norm >= b->least_squares &&
               is_normal(*factor, b);
    if (!fits) fits = find_odd_factor(a, s, b, norm, g, factor);
    if (a->dw && !(norm < a->eps)) fits &= find_slope(a, u, s, b, per_norm, factor, slope);
    a->refused[u] = (unsigned char)!fits;
    return fits;
}

/* ---- vectors one by one ----------------------------------------------------------------------- */

static void load(void *into, const void *from, fn_dtype type, ptrdiff_t n, fn_dtype dtype)
{
    if (type == dtype)
        memcpy(into, from, (size_t)(n * fn_size_of(dtype)));
    else
        fn_active_isa->channels.load_elements[dtype](into, from, type, n);
}

/* The vector whose first element is `at`, in `room`. */
static char *gathered(const fn_weight_norm_args *a, const void *data, fn_dtype type, ptrdiff_t at,
                      char *room)
{
    const ptrdiff_t run = a->inner * fn_size_of(a->dtype);
    for (ptrdiff_t o = 0; o < a->outer; o++, at += a->kinds * a->inner)
        load(room + o * run, at_element(data, type, at), type, a->inner, a->dtype);
    return room;
}

/* `count` short vectors, one after the other, from u on. */
static void finish_short(const fn_weight_norm_args *a, ptrdiff_t u, ptrdiff_t count,
                         const vector_bounds *b)
{
    const fn_channel_table *table = &fn_active_isa->channels;
    const ptrdiff_t n = length_of(a), size = n * fn_size_of(a->dtype);
    const char *v = (const char *)a->v + u * size, *dw = a->dw;
    const double zero = 0; /* what they are summed about */
    double squares[3 * FN_PLANES], dots[3 * FN_PLANES], terms[FN_PLANES][4];
    int fits[FN_PLANES + 1];
    fits[count] = 0;
    if (dw) dw += u * size;
    if (!a->given) table->planes_dots[a->dtype](v, v, n, (int)count, &zero, 0, squares);
    if (dw) table->planes_dots[a->dtype](v, dw, n, (int)count, &zero, 0, dots);
    for (ptrdiff_t k = 0; k < count; k++) {
        const vector_sums s = {.v = v + k * size,
                               .dw = dw ? dw + k * size : NULL,
                               .step = 1,
                               .squares = a->given ? 0 : squares[2 * FN_PLANES + k],
                               .dot = dw ? dots[2 * FN_PLANES + k] : 0};
        terms[k][0] = 0;
        terms[k][2] = -0.0; /* to which 0 adds its sign */
        fits[k] = find_terms(a, u + k, &s, b, &terms[k][1], &terms[k][3]) && a->w;
    }
    for (ptrdiff_t k = 0, end; k < count; k = end) { /* what is refused is not written */
        for (end = k; fits[end]; end++) {
        }
        if (end > k)
            table->planes_pass[a->dtype](v + k * size, dw ? dw + k * size : NULL,
                                         (char *)a->w + (u + k) * size, n, (int)(end - k),
                                         terms + k);
        else
            end++;
    }
}

static void weight_rows(const void *args, ptrdiff_t u0, ptrdiff_t u1, void *scratch)
{
    const fn_weight_norm_args *a = args;
    const fn_channel_table *table = &fn_active_isa->channels;
    const fn_dtype dtype = a->dtype;
    const ptrdiff_t n = length_of(a), size = fn_size_of(dtype);
    const vector_bounds b = bounds_of(a);
    fn_plane_result result = {.y = a->w,
                              .y_type = a->w_type,
                              .dtype = dtype,
                              .strip = scratch,
                              .stream = a->stream};
    if (!scratch && n <= FN_SHORT_PLANE && !a->stream) {
        for (ptrdiff_t u = u0; u < u1; u += FN_PLANES)
            finish_short(a, u, u1 - u < FN_PLANES ? u1 - u : FN_PLANES, &b);
        return;
    }
    for (ptrdiff_t u = u0; u < u1; u++) {
        ptrdiff_t at = u * n;
        const char *v = (const char *)a->v + at * size;
        const char *dw = a->dw ? (const char *)a->dw + at * size : NULL;
        if (scratch) {
            char *room = (char *)scratch + FN_GROUP_COLS * size;
            at = (u / a->kinds * a->outer * a->kinds + u % a->kinds) * a->inner;
            v = gathered(a, a->v, a->v_type, at, room);
            if (dw) dw = gathered(a, a->dw, a->dw_type, at, room + fn_room_stride(n) * size);
        }
        double dots[3], terms[1][4] = {{0, 0, -0.0, 0}}; /* to which 0 adds its sign */
        vector_sums s = {.v = v, .dw = dw, .step = 1};
        if (!a->given) s.squares = table->row_squares[dtype](v, n);
        if (dw) {
            table->plane_dots[dtype](v, dw, n, 0, dots);
            s.dot = dots[2];
        }
        if (!find_terms(a, u, &s, &b, &terms[0][1], &terms[0][3]) || !a->w) continue;
        for (ptrdiff_t o = 0; o < a->outer; o++, at += a->kinds * a->inner) {
            fn_finish_planes(&result, v, dw, at, a->inner, 1, terms);
            v += a->inner * size;
            if (dw) dw += a->inner * size;
        }
    }
    end_stream(result.stream, result.held);
}

/* ---- vectors side by side ---------------------------------------------------------------------
 *
 * A row's lanes are lines here. Products are added to them by columns_pass, whose shift is the sums so
 * far, and lines to lines by plane_pass: so the sums are row.h's to the bit. */

/* Columns that go together: as many as leave room for their lanes in L2, as what is read of a line in
 * one go is best long. Narrower lines that follow one another go so many elements at a time. */
enum { PANEL_COLS = 1024, CALL_COLS = 512, BLOCK_LINES = 1024 };

static ptrdiff_t lanes_of(fn_dtype dtype) { return dtype == FN_F64 ? 32 : 64; }

/* Of n columns: numbers in double, then what columns_pass takes, lines of them one after the other. */
typedef struct {
    double *squares, *dots, *numbers[3], *totals;
    char *zeros, *terms[3], *lanes;
} panel_room;

static ptrdiff_t call_cols(ptrdiff_t n) { return n < CALL_COLS ? CALL_COLS : n; }

static panel_room room_in(double *room, ptrdiff_t n, fn_dtype dtype)
{
    const ptrdiff_t term = call_cols(n) * fn_size_of(dtype);
    panel_room r = {.squares = room, .dots = room + n};
    for (int k = 0; k < 3; k++) r.numbers[k] = room + (2 + k) * n;
    r.totals = room + 5 * n;
    r.zeros = (char *)(r.totals + lanes_of(dtype) / 4 * n);
    for (int k = 0; k < 3; k++) r.terms[k] = r.zeros + (1 + k) * term;
    r.lanes = r.terms[2] + term;
    return r;
}

static size_t panel_bytes(ptrdiff_t n, fn_dtype dtype)
{
    return (size_t)((5 + lanes_of(dtype) / 4) * n) * sizeof(double) +
           bytes_of(4 * call_cols(n) + lanes_of(dtype) * n, dtype);
}

/* How many lines of n columns follow one another in a call. */
static ptrdiff_t lines_at_once(const fn_weight_norm_args *a, ptrdiff_t n)
{
    const ptrdiff_t lines = n == a->kinds ? call_cols(n) / n : 1;
    return lines < a->outer ? lines : a->outer;
}

/* The halving tree, from `count` lanes of n columns down to `last`. */
static void fold_lanes(char *lanes, ptrdiff_t count, ptrdiff_t last, ptrdiff_t n, fn_dtype dtype)
{
    static const double sum[4] = {0, 1, 0, 1};
    const ptrdiff_t size = fn_size_of(dtype);
    for (ptrdiff_t half = count / 2 * n; half >= last * n; half /= 2)
        fn_active_isa->channels.plane_pass[dtype](lanes, lanes + half * size, lanes, half, sum,
                                                  NULL, 0);
}

/* Sums of x*y down n columns from element `at` on. */
static void add_columns(const fn_weight_norm_args *a, const void *x, const void *y, ptrdiff_t at,
                        ptrdiff_t n, double *into, const panel_room *r)
{
    const fn_dtype dtype = a->dtype;
    const ptrdiff_t size = fn_size_of(dtype), most = lines_at_once(a, n);
    ptrdiff_t lanes = lanes_of(dtype);
    while (lanes / 2 >= a->outer) lanes /= 2; /* the others hold zeros */
    for (ptrdiff_t line = 0; line < a->outer; line += BLOCK_LINES) {
        const ptrdiff_t left = a->outer - line, count = left < BLOCK_LINES ? left : BLOCK_LINES;
        memset(r->lanes, 0, (size_t)(lanes * n * size));
        for (ptrdiff_t i = 0, m; i < count; i += m, at += m * a->kinds) {
            const ptrdiff_t lane = i % lanes;
            m = most < lanes - lane ? most : lanes - lane;
            if (m > count - i) m = count - i;
            char *sums = r->lanes + lane * n * size;
            const void *from = at_element(x, dtype, at);
            const void *const terms[4] = {r->zeros, at_element(y, dtype, at), sums, r->zeros};
            fn_active_isa->channels.columns_pass[dtype](from, from, sums, m * n, terms, 0);
        }
        const int one = a->outer <= BLOCK_LINES;
        fold_lanes(r->lanes, lanes, one ? 1 : lanes / 4, n, dtype);
        fn_active_isa->widen_add[dtype](r->totals, r->lanes, one ? n : lanes / 4 * n, line > 0);
    }
    if (a->outer > BLOCK_LINES) fold_lanes((char *)r->totals, lanes / 4, 1, n, FN_F64);
    memcpy(into, r->totals, (size_t)n * sizeof(double));
}

/* Where a column is refused, what lies in w stays as it is if that is v itself. */
static void terms_of_columns(const fn_weight_norm_args *a, ptrdiff_t u, ptrdiff_t at, ptrdiff_t n,
                             const vector_bounds *b, const panel_room *r)
{
    double *const *into = r->numbers;
    const size_t size = (size_t)(n * fn_size_of(a->dtype));
    for (ptrdiff_t i = 0; i < n; i++) {
        const vector_sums s = {r->squares[i], r->dots[i], at_element(a->v, a->dtype, at + i),
                               a->dw ? at_element(a->dw, a->dtype, at + i) : NULL, a->kinds};
        if (!find_terms(a, u + i, &s, b, &into[0][i], &into[2][i])) into[0][i] = 1;
        into[1][i] = -0.0; /* to which 0 adds its sign */
    }
    for (int k = 0; k < 3; k++) {
        fn_active_isa->narrow[a->dtype](r->terms[k], into[k], n);
        for (ptrdiff_t i = 1; i < lines_at_once(a, n); i++)
            memcpy(r->terms[k] + (size_t)i * size, r->terms[k], size);
    }
}

static void finish_columns(const fn_weight_norm_args *a, ptrdiff_t at, ptrdiff_t n,
                           const panel_room *r)
{
    const void *const terms[4] = {r->zeros, r->terms[0], r->terms[1], r->terms[2]};
    const ptrdiff_t size = fn_size_of(a->dtype), lines = lines_at_once(a, n);
    for (ptrdiff_t left = a->outer; left > 0; left -= lines, at += lines * a->kinds)
        fn_active_isa->channels.columns_pass[a->dtype]((const char *)a->v + at * size,
                                                       a->dw ? (const char *)a->dw + at * size
                                                             : NULL,
                                                       (char *)a->w + at * size,
                                                       (left < lines ? left : lines) * n, terms, 0);
}

static void weight_columns(const void *args, ptrdiff_t p0, ptrdiff_t p1, void *scratch)
{
    const fn_weight_norm_args *a = args;
    const ptrdiff_t panels = (a->kinds + a->panel - 1) / a->panel;
    const panel_room r = room_in(scratch, a->panel, a->dtype);
    const vector_bounds b = bounds_of(a);
    memset(r.zeros, 0, bytes_of(call_cols(a->panel), a->dtype));
    for (ptrdiff_t p = p0; p < p1; p++) {
        const ptrdiff_t sample = p / panels, j = p % panels * a->panel;
        const ptrdiff_t n = a->kinds - j < a->panel ? a->kinds - j : a->panel;
        const ptrdiff_t at = sample * a->outer * a->kinds + j;
        if (!a->given) add_columns(a, a->v, a->v, at, n, r.squares, &r);
        if (a->dw) add_columns(a, a->v, a->dw, at, n, r.dots, &r);
        terms_of_columns(a, sample * a->kinds + j, at, n, &b, &r);
        if (a->w) finish_columns(a, at, n, &r);
    }
}

/* ---- calls ------------------------------------------------------------------------------------ */

static int in_columns(const fn_weight_norm_args *a) { return a->inner == 1 && a->kinds > 1; }

fn_plan fn_plan_weight_norm(const fn_weight_norm_args *a, fn_dtype dtype, int threads)
{
    const ptrdiff_t vectors = a->samples * a->kinds, elements = vectors * length_of(a);
    const ptrdiff_t bytes = elements * (fn_size_of(a->v_type) + (a->w ? fn_size_of(a->w_type) : 0) +
                                        (a->dw ? fn_size_of(a->dw_type) : 0));
    const ptrdiff_t row = a->inner * fn_size_of(dtype);
    const int columns = in_columns(a);
    const int stream = a->w && a->w_is_warm && a->w_type == dtype && !columns &&
                       elements * fn_size_of(dtype) >= STREAM_BYTES &&
                       row >= STREAM_ROW_BYTES(elements * fn_size_of(dtype));
    return (fn_plan){.threads = fn_planned_threads(bytes, vectors, threads),
                     .stream = stream,
                     .regime = columns  ? "columns"
                               : stream ? "stream"
                                        : "row",
                     .bytes = bytes};
}

int fn_weight_norm(fn_weight_norm_args *a, fn_dtype dtype, int threads)
{
    const fn_plan plan = fn_plan_weight_norm(a, dtype, threads);
    const int plain = a->outer == 1 && a->v_type == dtype && (!a->w || a->w_type == dtype) &&
                      (!a->dw || a->dw_type == dtype);
    a->dtype = dtype;
    a->stream = plan.stream;
    if (in_columns(a)) {
        a->panel = a->kinds < PANEL_COLS ? a->kinds : PANEL_COLS;
        return fn_run_rowwise(weight_columns, a,
                              a->samples * ((a->kinds + a->panel - 1) / a->panel), plan.threads,
                              panel_bytes(a->panel, dtype));
    }
    return fn_run_rowwise(weight_rows, a, a->samples * a->kinds, plan.threads,
                          plain
                              ? 0
                              : bytes_of(FN_GROUP_COLS + 2 * fn_room_stride(length_of(a)), dtype));
}
