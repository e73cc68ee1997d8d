/* affine.h: the last pass of a normalization over rows of T: y = ((x - pivot)*rstd + shift)*weight +
 * bias, written through the cache (affine) or past it (streamed). */

#define LINE (64 / (ptrdiff_t)sizeof(element))

/* ---- y = ((x - pivot)*rstd + shift)*weight + bias --------------------------------------------- */

#define normalise FN_OF_T(normalise)
INLINE vec normalise(vec x, vec pivot, vec rstd, vec shift)
{
    return v_fma(v_sub(x, pivot), rstd, shift);
}

#define scale_and_shift FN_OF_T(scale_and_shift)
INLINE vec scale_and_shift(vec h, vec w, vec b, const int has_w, const int has_b)
{
    if (has_w && has_b) return v_fma(h, w, b);
    if (has_w) return v_mul(h, w);
    return has_b ? v_add(h, b) : h;
}

/* Up to AFFINE_ROWS rows side by side, so that the parameters are loaded once for all of them. */
#define affine FN_OF_T(affine)
typedef struct {
    const element *x[AFFINE_ROWS];
    element *y[AFFINE_ROWS];
    vec pivot[AFFINE_ROWS], rstd[AFFINE_ROWS], shift[AFFINE_ROWS];
    const element *w, *b;
    ptrdiff_t x_ahead, y_ahead; /* bytes to what is fetched meanwhile; 0: nothing */
} affine;

#define affine_vector FN_OF_T(affine_vector)
INLINE void affine_vector(const affine *a, const int rows, ptrdiff_t i, ptrdiff_t left,
                          const int has_w, const int has_b)
{
    vec wv = has_w ? load_some(a->w + i, left) : v_zero();
    vec bv = has_b ? load_some(a->b + i, left) : v_zero();
    vec out[AFFINE_ROWS];
    if (rows > 1 && has_w && has_b) { /* or the compiler loads them again for each row */
        KEEP_IN_REGISTER(wv);
        KEEP_IN_REGISTER(bv);
    }
    /* All loads before all stores: y may be x, and rows may lie 4,096 bytes apart. */
    UNROLL for (int r = 0; r < rows; r++)
        out[r] = scale_and_shift(
            normalise(load_some(a->x[r] + i, left), a->pivot[r], a->rstd[r], a->shift[r]), wv, bv,
            has_w, has_b);
    UNROLL for (int r = 0; r < rows; r++) store_some(a->y[r] + i, out[r], left);
}

#define fetch_ahead FN_OF_T(fetch_ahead)
INLINE void fetch_ahead(const affine *a, const int rows, ptrdiff_t i)
{
    ptrdiff_t x = i * (ptrdiff_t)sizeof(element) + a->x_ahead;
    ptrdiff_t y = i * (ptrdiff_t)sizeof(element) + a->y_ahead;
    __asm__("" : "+r"(x), "+r"(y)); /* two registers, not one for each row */
    UNROLL for (int r = 0; r < rows; r++) {
        __builtin_prefetch((const char *)a->x[r] + x, 0, 2);
        __builtin_prefetch((const char *)a->y[r] + y, 1, 2);
    }
}

#define affine_pass_with FN_OF_T(affine_pass_with)
INLINE void affine_pass_with(const affine *all, const int rows, ptrdiff_t n, const int has_w,
                             const int has_b)
{
    const affine a = *all; /* so that it stays in registers whatever y points to */
    ptrdiff_t i = 0;
    for (; i + LINE <= n; i += LINE) {
        if (a.x_ahead) fetch_ahead(&a, rows, i);
        UNROLL for (int k = 0; k < LINE; k += VW) affine_vector(&a, rows, i + k, VW, has_w, has_b);
    }
    if (VW < LINE)
        NO_UNROLL for (; i + VW <= n; i += VW) affine_vector(&a, rows, i, VW, has_w, has_b);
    if (i < n) affine_vector(&a, rows, i, n - i, has_w, has_b);
}

#define affine_pass FN_OF_T(affine_pass)
INLINE void affine_pass(const affine *a, const int rows, ptrdiff_t n)
{
    if (a->w && a->b)
        affine_pass_with(a, rows, n, 1, 1);
    else if (a->w)
        affine_pass_with(a, rows, n, 1, 0);
    else /* seldom: one text for both */
        affine_pass_with(a, rows, n, 0, a->b != NULL);
}

/* Part of a row, from the parameters' own places for it. */
#define affine_strip FN_OF_T(affine_strip)
OUTLINE void affine_strip(const element *x, element *y, const element *w, const element *b,
                          ptrdiff_t n, const row_stats *stats, ptrdiff_t x_ahead, ptrdiff_t y_ahead)
{
    const affine a = {.x = {x},
                      .y = {y},
                      .pivot = {v_set1(stats->pivot)},
                      .rstd = {v_set1(stats->rstd)},
                      .shift = {v_set1(stats->shift)},
                      .w = w,
                      .b = b,
                      .x_ahead = x_ahead,
                      .y_ahead = y_ahead};
    affine_pass(&a, 1, n);
}

/* affine_strip of n elements, but +0 where a mask leaves out. stream: past the cache, but for what is
 * less than a vector; y begins with a line then. */
#define affine_kept FN_OF_T(affine_kept)
OUTLINE void affine_kept(const element *x, element *y, const element *w, const element *b,
                         const unsigned char *mask, ptrdiff_t n, const row_stats *stats, int stream)
{
    const vec pivot = v_set1(stats->pivot), rstd = v_set1(stats->rstd);
    const vec shift = v_set1(stats->shift);
    ptrdiff_t i = 0;
    NO_UNROLL for (; i + VW <= n; i += VW)
    {
        /* A weight of 1 and a bias of -0 change no bit. */
        const vec wv = w ? v_load(w + i) : v_set1(1), bv = b ? v_load(b + i) : v_set1((element)-0.0);
        const vec v = v_keep(v_fma(normalise(v_load(x + i), pivot, rstd, shift), wv, bv), mask + i);
        if (stream)
            v_stream(y + i, v);
        else
            v_store(y + i, v);
    }
    if (i == n) return;
    affine_strip(x + i, y + i, w ? w + i : NULL, b ? b + i : NULL, n - i, stats, 0, 0);
    keep_strip(y + i, mask + i, n - i);
}

/* ---- past the cache --------------------------------------------------------------------------- */

/* The cache line that two rows share, held back until it is whole: elements from .. to of it are
 * known. Writing its two parts apart would cost more than the rest of the row saves. */
#define carry FN_OF_T(carry)
typedef struct {
    element held[2 * LINE]; /* a line, and what a vector leaves behind it */
    element *line;
    ptrdiff_t from, to;
} carry;

#define write_carry FN_OF_T(write_carry)
OUTLINE void write_carry(carry *c)
{
    if (c->from == 0 && c->to == LINE)
        UNROLL for (int k = 0; k < LINE; k += VW) v_stream(c->line + k, v_load(c->held + k));
    else
        NO_UNROLL for (ptrdiff_t i = c->from; i < c->to; i++) c->line[i] = c->held[i];
    c->line = NULL;
}

#define release_carry FN_OF_T(release_carry)
INLINE void release_carry(carry *c)
{
    if (c->line) write_carry(c);
}

#define streamed FN_OF_T(streamed)
typedef struct {
    const element *x, *w, *b, *ahead;
    vec pivot, rstd, shift;
} streamed;

/* Elements i .. i + count - 1 into c->held[at ...], zeros from element n on. A weight of 1 and a
 * bias of -0 change no bit. */
#define hold_elements FN_OF_T(hold_elements)
OUTLINE void hold_elements(carry *c, ptrdiff_t at, const streamed *s, ptrdiff_t i, ptrdiff_t n,
                           ptrdiff_t count)
{
    c->to = at + count;
    NO_UNROLL for (; at < LINE; at += VW, i += VW)
    {
        const ptrdiff_t left = part_at(i, n);
        const vec w = s->w ? v_loadn(s->w + i, left) : v_set1(1);
        const vec b = s->b ? v_loadn(s->b + i, left) : v_set1((element)-0.0);
        const vec h = normalise(v_loadn(s->x + i, left), s->pivot, s->rstd, s->shift);
        v_store(c->held + at, v_firstn(v_fma(h, w, b), left));
    }
}

/* Whole lines from element i on; returns the first element that is left. */
#define stream_lines FN_OF_T(stream_lines)
INLINE ptrdiff_t stream_lines(const streamed *s, element *y, ptrdiff_t i, ptrdiff_t n,
                              const int has_w, const int has_b)
{
    for (; i + LINE <= n; i += LINE) {
        if (s->ahead) __builtin_prefetch(s->ahead + i, 0, 2);
        UNROLL for (int k = 0; k < LINE; k += VW) {
            const vec w = has_w ? v_load(s->w + i + k) : v_zero();
            const vec b = has_b ? v_load(s->b + i + k) : v_zero();
            const vec h = normalise(v_load(s->x + i + k), s->pivot, s->rstd, s->shift);
            v_stream(y + i + k, scale_and_shift(h, w, b, has_w, has_b));
        }
    }
    return i;
}

/* From element i, which begins a line, on: what is left of n elements, and zeros up to `end`;
 * meanwhile the first ahead_n elements of s->ahead are fetched. */
#define stream_zeros FN_OF_T(stream_zeros)
OUTLINE void stream_zeros(const streamed *s, element *y, ptrdiff_t i, ptrdiff_t n, ptrdiff_t end,
                         ptrdiff_t ahead_n, carry *c)
{
    for (; i < end; i += LINE) {
        const ptrdiff_t left = end - i;
        if (i < ahead_n) __builtin_prefetch(s->ahead + i, 0, 2);
        if (i >= n && left >= LINE) {
            UNROLL for (int k = 0; k < LINE; k += VW) v_stream(y + i + k, v_zero());
            continue;
        }
        c->line = y + i;
        c->from = 0;
        hold_elements(c, 0, s, i, n, left < LINE ? left : LINE);
        if (left >= LINE) write_carry(c);
    }
}

/* A row of n elements, and zeros up to `end`. Meanwhile a row is fetched from s->ahead, unless it is
 * NULL: n elements, and where zeros follow, the first ahead_n. */
#define stream_pass FN_OF_T(stream_pass)
INLINE void stream_pass(const streamed *s, element *y, ptrdiff_t n, ptrdiff_t end,
                        ptrdiff_t ahead_n, carry *c)
{
    const ptrdiff_t offset = (ptrdiff_t)((uintptr_t)y % 64 / sizeof(element));
    ptrdiff_t i = 0;
    if (offset) {
        if (c->line != y - offset || c->to != offset) {
            release_carry(c);
            c->line = y - offset;
            c->from = offset;
        }
        i = end < LINE - offset ? end : LINE - offset;
        hold_elements(c, offset, s, 0, n, i);
        if (c->to < LINE) return;
    }
    release_carry(c);
    if (s->w && s->b)
        i = stream_lines(s, y, i, n, 1, 1);
    else if (s->w)
        i = stream_lines(s, y, i, n, 1, 0);
    else
        i = stream_lines(s, y, i, n, 0, s->b != NULL);
    if (i == end) return;
    if (n < end) {
        stream_zeros(s, y, i, n, end, ahead_n, c);
        return;
    }
    c->line = y + i;
    c->from = 0;
    hold_elements(c, 0, s, i, n, n - i);
}
