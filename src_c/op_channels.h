/* op_channels.h: what group, instance and batch norm (channels.c) need of an instruction set, over
 * arrays of T. Statistics are layer_norm's own. What is done to a plane, or to a row of channels, takes
 * up to four numbers, formed in double by the caller and rounded once:
 *
 *     y = (x - pivot)*factor + shift      dx = dy*factor + ((x - pivot)*slope + shift) */

/* A strip of any type to T, and back after an activation. */
#define load_elements FN_OF_T(load_elements)
static void load_elements(void *into, const void *from, fn_dtype dtype, ptrdiff_t n)
{
    move_strip(into, sizeof(element), FN_OWN_TYPE, from, fn_size_of(dtype), dtype, n);
}

#define store_elements FN_OF_T(store_elements)
static void store_elements(void *into, fn_dtype dtype, void *strip, ptrdiff_t n,
                           fn_activation activation)
{
    if (activation) activate_strip(strip, n, activation);
    move_strip(into, fn_size_of(dtype), dtype, strip, sizeof(element), FN_OWN_TYPE, n);
}

/* False where the row had to be scaled into the range of T: then the pivot is the mean, rounded. */
#define row_moments FN_OF_T(row_moments)
static int row_moments(const void *x, ptrdiff_t n, double eps, fn_row_moments *m)
{
    row_stats stats;
    const element pivot = row_pivot(x, n);
    stats.s = (scale){1, 1};
    if (!plain_stats(x, n, pivot, eps, 0, &stats)) careful_stats(x, n, eps, 0, &stats);
    const int scaled = stats.s.first != 1 || stats.s.second != 1;
    *m = (fn_row_moments){scaled ? stats.mean : (double)stats.pivot, scaled ? 0 : stats.c,
                          stats.variance};
    return !scaled;
}

#define plane_dots FN_OF_T(plane_dots)
static void plane_dots(const void *x, const void *dy, ptrdiff_t n, double pivot, double sums[3])
{
    row_dots(x, dy, NULL, n, (element)pivot, NULL, NULL, NULL, sums);
}

/* The same of up to eight short planes of n elements, first all of the first kind; step 1: each has a pivot
 * of its own, else 0. */
#define planes_dots FN_OF_T(planes_dots)
static void planes_dots(const void *x, const void *dy, ptrdiff_t n, int planes,
                        const double *pivots, int step, double sums[3 * FN_PLANES])
{
    const element *xs = x, *dys = dy;
    quarter part[3][FN_PLANES], q[3];
    if (n == 1) {
        for (int j = 0; j < planes; j++) { /* what is added to 0, as in longer planes, is not -0 */
            const element d = 0 + (xs[j] - (element)pivots[j * step]), g = 0 + dys[j];
            sums[j] = (double)d;
            sums[FN_PLANES + j] = (double)g;
            sums[2 * FN_PLANES + j] = (double)(0 + g * d);
        }
        return;
    }
    if (VW == 1) { /* takes less code */
        for (int j = 0; j < planes; j++) {
            double dots[3];
            plane_dots(xs + j * n, dys + j * n, n, pivots[j * step], dots);
            for (int k = 0; k < 3; k++) sums[k * FN_PLANES + j] = dots[k];
        }
        return;
    }
    for (int j = 0; j < planes; j++) {
        block_dots(xs + j * n, dys + j * n, NULL, n, v_set1((element)pivots[j * step]), q);
        for (int k = 0; k < 3; k++) part[k][j] = q[k];
    }
    for (int k = 0; k < 3; k++) {
        for (int j = planes; j < FN_PLANES; j++) part[k][j] = part[k][0]; /* any numbers */
        vd8_store_f64(sums + k * FN_PLANES, quarter_hsum8(part[k]));
    }
}

/* ---- a plane ---------------------------------------------------------------------------------- */

#define plane_terms FN_OF_T(plane_terms)
typedef struct {
    vec pivot, factor, shift, slope;
} plane_terms;

/* From the four numbers, as the caller forms them. */
#define plane_terms_of FN_OF_T(plane_terms_of)
INLINE plane_terms plane_terms_of(const double *t)
{
    return (plane_terms){v_set1((element)t[0]), v_set1((element)t[1]), v_set1((element)t[2]),
                         v_set1((element)t[3])};
}

#define plane_vector FN_OF_T(plane_vector)
INLINE vec plane_vector(const element *x, const element *dy, ptrdiff_t left, const plane_terms *t)
{
    const vec d = v_sub(load_some(x, left), t->pivot);
    if (!dy) return v_fma(d, t->factor, t->shift);
    return v_fma(load_some(dy, left), t->factor, v_fma(d, t->slope, t->shift));
}

/* Vectors whose loads come before their stores: a load whose address equals that of a store under way
 * but for a multiple of 4,096 would wait for it. */
#define PLANE_VECTORS (LINE > 4 * VW ? LINE / VW : 4)

/* What lies `ahead` elements on is asked for meanwhile: the next unit, which a first pass will read. */
#define fetch_plane FN_OF_T(fetch_plane)
INLINE void fetch_plane(const element *x, const element *dy, ptrdiff_t ahead)
{
    UNROLL for (int k = 0; k < PLANE_VECTORS * VW; k += LINE) {
        __builtin_prefetch(x + ahead + k, 0, 2);
        if (dy) __builtin_prefetch(dy + ahead + k, 0, 2);
    }
}

/* Lines that will be written shortly: gradients wait for them, as what they read is in L1. */
#define own_plane FN_OF_T(own_plane)
INLINE void own_plane(element *y)
{
    UNROLL for (int k = 0; k < PLANE_VECTORS * VW; k += LINE)
        __builtin_prefetch(y + 48 * LINE + k, 1, 2);
}

#define store_plane FN_OF_T(store_plane)
INLINE void store_plane(element *y, const vec *v, const int count, int stream)
{
    if (stream)
        UNROLL for (int k = 0; k < count; k++) v_stream(y + k * VW, v[k]);
    else
        UNROLL for (int k = 0; k < count; k++) v_store(y + k * VW, v[k]);
}

/* From element i to where it returns: n, or, past the cache, where the last whole line ends. */
#define plane_body FN_OF_T(plane_body)
INLINE ptrdiff_t plane_body(const element *x, const element *dy, element *y, ptrdiff_t i,
                            ptrdiff_t n, const plane_terms *t, int stream, ptrdiff_t ahead)
{
    vec v[PLANE_VECTORS];
    NO_UNROLL for (; i + PLANE_VECTORS * VW <= n; i += PLANE_VECTORS * VW)
    {
        if (dy && !stream) own_plane(y + i);
        if (ahead) fetch_plane(x + i, dy ? dy + i : NULL, ahead);
        UNROLL for (int k = 0; k < PLANE_VECTORS; k++)
            v[k] = plane_vector(x + i + k * VW, dy ? dy + i + k * VW : NULL, VW, t);
        store_plane(y + i, v, PLANE_VECTORS, stream);
    }
    NO_UNROLL for (; i + LINE <= n; i += LINE)
    {
        UNROLL for (int k = 0; k < LINE / VW; k++)
            v[k] = plane_vector(x + i + k * VW, dy ? dy + i + k * VW : NULL, VW, t);
        store_plane(y + i, v, LINE / VW, stream);
    }
    if (stream) return i;
    NO_UNROLL for (; i < n; i += VW)
        store_some(y + i, plane_vector(x + i, dy ? dy + i : NULL, n - i, t), n - i);
    return n;
}

/* n elements that do not fill the line they are in: held back until what else it takes has come. */
#define plane_held FN_OF_T(plane_held)
OUTLINE void plane_held(const element *x, const element *dy, element *y, ptrdiff_t n,
                        const plane_terms *t, fn_held_line *held)
{
    const ptrdiff_t size = (ptrdiff_t)sizeof(element), from = (ptrdiff_t)((uintptr_t)y % 64);
    fn_held_line *h = fn_held_line_at(held, (char *)y - from, from, from + n * size);
    element *line = (element *)(void *)h->bytes, *into = line + from / size;
    NO_UNROLL for (ptrdiff_t i = 0; i < n; i += VW)
    {
        const plane_terms terms = *t;
        store_some(into + i, plane_vector(x + i, dy ? dy + i : NULL, n - i, &terms), n - i);
    }
    if (h->to - h->from < 64) return;
    UNROLL for (int k = 0; k < LINE; k += VW)
        v_stream((element *)(void *)h->line + k, v_load(line + k));
    h->line = NULL;
}

/* t: pivot, factor, shift, slope. held: past the cache, with these lines held back; else NULL. ahead:
 * elements to what is to be fetched, or 0. */
#define plane_pass FN_OF_T(plane_pass)
static void plane_pass(const void *x, const void *dy, void *y, ptrdiff_t n, const double *t,
                       fn_held_line *held, ptrdiff_t ahead)
{
    const plane_terms terms = plane_terms_of(t);
    const element *xs = x, *dys = dy;
    element *ys = y;
    ptrdiff_t i = 0;
    if (held && (uintptr_t)ys % 64) {
        const ptrdiff_t before = (ptrdiff_t)((64 - (uintptr_t)ys % 64) / sizeof(element));
        i = before < n ? before : n;
        plane_held(xs, dys, ys, i, &terms, held);
    }
    i = dy ? plane_body(xs, dys, ys, i, n, &terms, held != NULL, ahead)
           : plane_body(xs, NULL, ys, i, n, &terms, held != NULL, ahead);
    if (i < n) plane_held(xs + i, dy ? dys + i : NULL, ys + i, n - i, &terms, held);
}

/* Short planes of n elements, one after the other. */
#define planes_pass FN_OF_T(planes_pass)
static void planes_pass(const void *x, const void *dy, void *y, ptrdiff_t n, int planes,
                        const double (*t)[4])
{
    const element *xs = x, *dys = dy;
    element *ys = y;
    for (int j = 0; j < planes; j++, xs += n, ys += n) {
        const plane_terms terms = plane_terms_of(t[j]);
        if (dy)
            NO_UNROLL for (ptrdiff_t i = 0; i < n; i += VW)
                store_some(ys + i, plane_vector(xs + i, dys + j * n + i, n - i, &terms), n - i);
        else
            NO_UNROLL for (ptrdiff_t i = 0; i < n; i += VW)
                store_some(ys + i, plane_vector(xs + i, NULL, n - i, &terms), n - i);
    }
}

/* ---- channels last: rows of channels, numbers of each column ------------------------------------- */

#define columns_vector FN_OF_T(columns_vector)
INLINE vec columns_vector(const element *x, const element *dy, const element *const t[4],
                          ptrdiff_t i, ptrdiff_t left)
{
    const vec d = v_sub(load_some(x + i, left), load_some(t[0] + i, left));
    const vec factor = load_some(t[1] + i, left), shift = load_some(t[2] + i, left);
    if (!dy) return v_fma(d, factor, shift);
    return v_fma(load_some(dy + i, left), factor, v_fma(d, load_some(t[3] + i, left), shift));
}

/* The vectors that are whole. */
#define columns_part FN_OF_T(columns_part)
INLINE ptrdiff_t columns_part(const element *x, const element *dy, element *y, ptrdiff_t n,
                              const element *const t[4], int stream)
{
    ptrdiff_t i = 0;
    NO_UNROLL for (; i + VW <= n; i += VW)
    {
        const vec v = columns_vector(x, dy, t, i, VW);
        if (stream)
            v_stream(y + i, v);
        else
            v_store(y + i, v);
    }
    return i;
}

/* stream: past the cache; y begins with a line then. (By % the compiler sees that no vector is whole.) */
#define columns_pass FN_OF_T(columns_pass)
static void columns_pass(const void *x, const void *dy, void *y, ptrdiff_t n,
                         const void *const terms[4], int stream)
{
    const element *const t[4] = {terms[0], terms[1], terms[2], terms[3]};
    const ptrdiff_t i =
        dy ? columns_part(x, dy, y, n, t, stream) : columns_part(x, NULL, y, n, t, stream);
    if (i < n) v_storen((element *)y + i, columns_vector(x, dy, t, i, (n - i) % VW), n - i);
}

/* Up to eight numbers to double, from an array that may end there. */
#define widen_some FN_OF_T(widen_some)
INLINE vd8 widen_some(const element *x, ptrdiff_t left)
{
    element room[8] = {0};
    if (left >= 8) return vd8_load_element(x);
    memcpy(room, x, (size_t)left * sizeof(element));
    return vd8_load_element(room);
}

#define load_doubles FN_OF_T(load_doubles)
INLINE vd8 load_doubles(const double *x, ptrdiff_t left)
{
    double room[8] = {0};
    if (left >= 8) return vd8_load_f64(x);
    memcpy(room, x, (size_t)left * sizeof(double));
    return vd8_load_f64(room);
}

/* Of n channels, pivot, factor and shift as columns_pass takes them, with room for eight beyond the last.
 * m: what all of them have; NULL: mean and rstd of each. */
#define column_terms FN_OF_T(column_terms)
static void column_terms(const double m[3], const double *mean, const double *rstd, const void *w,
                         const void *b, ptrdiff_t n, void *const terms[3])
{
    element *pivots = terms[0], *factors = terms[1], *shifts = terms[2];
    NO_UNROLL for (ptrdiff_t i = 0; i < n; i += 8)
    {
        const vd8 center = m ? vd8_set1(m[0]) : load_doubles(mean + i, n - i);
        vd8_store_element(pivots + i, center);
        const vd8 shift = m ? vd8_set1(m[1]) : vd8_sub(center, vd8_load_element(pivots + i));
        vd8 factor = m ? vd8_set1(m[2]) : load_doubles(rstd + i, n - i), y0 = vd8_set1(0);
        if (w) factor = vd8_mul(factor, widen_some((const element *)w + i, n - i));
        if (b) y0 = widen_some((const element *)b + i, n - i);
        vd8_store_element(factors + i, factor);
        vd8_store_element(shifts + i, vd8_sub(y0, vd8_mul(shift, factor)));
    }
}

/* A block's sums of a channel have four lanes, rows 0 4 8 ..., 1 5 9 ..., in T, of which the first takes
 * the last rows as well, where they are no four; added as (0 + 2) + (1 + 3). So of 64 rows no more than
 * eighteen numbers are added in a row. */
#define lane_sums FN_OF_T(lane_sums)
typedef struct {
    vec d[4], g[4], dg[4];
} lane_sums;

#define beyond FN_OF_T(beyond)
INLINE const element *beyond(const element *x, ptrdiff_t bytes)
{
    return (const element *)((const char *)x + bytes);
}

/* left: how many channels there are, up to VW: the others count as 0. */
#define load_channels FN_OF_T(load_channels)
INLINE vec load_channels(const element *x, ptrdiff_t left)
{
    return sizeof(vec) > 16 ? v_loadn(x, left) : load_some(x, left);
}

/* to_dy: bytes from an element of x to dy's. */
#define add_row FN_OF_T(add_row)
INLINE void add_row(lane_sums *s, int k, const element *x, ptrdiff_t to_dy, ptrdiff_t left,
                    vec pivot, vec dy_pivot)
{
    const vec d = v_sub(load_channels(x, left), pivot);
    const vec g = v_sub(load_channels(beyond(x, to_dy), left), dy_pivot);
    s->d[k] = v_add(s->d[k], d);
    s->g[k] = v_add(s->g[k], g);
    s->dg[k] = v_fma(g, d, s->dg[k]);
}

#define put_lanes FN_OF_T(put_lanes)
INLINE void put_lanes(element *into, const vec *a)
{
    v_store(into, v_add(v_add(a[0], a[2]), v_add(a[1], a[3])));
}

/* Of a vector of channels. next: what is fetched meanwhile, a vector a row: of rows so far apart the CPU
 * sees no stream. centred: there is no dy but x. */
#define tile_sums FN_OF_T(tile_sums)
OUTLINE void tile_sums(const element *x, ptrdiff_t to_dy, ptrdiff_t step, ptrdiff_t rows,
                       ptrdiff_t left, const element *next, const element *pivots, int centred,
                       element *into, ptrdiff_t apart)
{
    const vec pivot = load_channels(pivots, left), dy_pivot = centred ? pivot : v_zero();
    lane_sums s;
    UNROLL for (int k = 0; k < 4; k++) s.d[k] = s.g[k] = s.dg[k] = v_zero();
    NO_UNROLL for (; rows >= 4; rows -= 4, x += 4 * step, next += 4 * VW)
        UNROLL for (int k = 0; k < 4; k++) {
            __builtin_prefetch(next + k * VW, 0, 2);
            __builtin_prefetch(beyond(next + k * VW, to_dy), 0, 2);
            add_row(&s, k, x + k * step, to_dy, left, pivot, dy_pivot);
        }
    NO_UNROLL for (; rows > 0; rows--, x += step) add_row(&s, 0, x, to_dy, left, pivot, dy_pivot);
    put_lanes(into, s.d);
    put_lanes(into + apart, s.dg);
    put_lanes(into + 2 * apart, s.g);
}

/* Of a block of rows `step` elements apart, for each column: sums of d = x - pivot, of g*d and of g, where
 * g is dy, or without a dy d; `apart` elements from one sum to the next; in `into` there is room for a whole
 * vector. ahead: elements to a block that is to come. */
#define channel_sums FN_OF_T(channel_sums)
static void channel_sums(const void *x, const void *dy, ptrdiff_t step, ptrdiff_t rows,
                         ptrdiff_t cols, ptrdiff_t ahead, const void *pivots, void *into,
                         ptrdiff_t apart)
{
    const element *xs = x, *p = pivots;
    const ptrdiff_t to_dy = dy ? (const char *)dy - (const char *)x : 0;
    for (ptrdiff_t j = 0; j < cols; j += VW)
        tile_sums(xs + j, to_dy, step, rows, cols - j < VW ? cols - j : VW, xs + ahead + j * rows,
                  p + j, !dy, (element *)into + j, apart);
}
