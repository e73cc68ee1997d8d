/* op_columns.h: layer_norm of rows that lie side by side, each a column in memory: channels first.
 *
 * Element i of all rows is a contiguous line. So rows are taken a strip of them at a time, and go
 * through the arithmetic of row_pivot, plain_stats and affine_pass together, each in its own place
 * of a vector: nothing is done across vectors, and a row's lanes, in row.h's sense, are vectors.
 * The four that v_fold adds are summed side by side in registers; that leaves a quarter of them to
 * be halved on.
 *
 * x is read three times, from cache but for the first. What is not T goes through a room of as many
 * lines as are summed at a time. The next strip's x is asked for in the pass over deviations and its y in
 * the last one: either alone is held up by memory if it asks for both. */

/* Four cache lines: what lies a page or more apart is worth fetching only in some bulk. */
#define STRIP (256 / (int)sizeof(element))
#define QUARTER (LANES / 4)

/* Lines that are summed at a time: every QUARTERth of a block. */
#define RUN (BLOCK / QUARTER)

/* What of a strip L1 has room for besides the next one. */
#define STRIP_BYTES (24 << 10)

/* Vectors that are written at a time: of narrow strips a cache line's, of others what registers have
 * room for the statistics of. */
#define LINE_VECTORS (LINE / VW)
#define WIDE_VECTORS (LINE_VECTORS < 4 ? 4 : LINE_VECTORS)

/* Quarter lanes of a block, and their totals in double, of which the first end as the sums. */
#define column_sums FN_OF_T(column_sums)
typedef struct {
    _Alignas(64) element block[QUARTER][STRIP];
    double total[QUARTER][STRIP];
} column_sums;

#define column_strip FN_OF_T(column_strip)
typedef struct {
    const fn_layer_norm_args *a;
    const fn_rows *x, *y;
    ptrdiff_t x_step, y_step; /* bytes from line to line, or FN_UNEVEN */
    const element *w, *b;
    ptrdiff_t w_step, b_step;
    const char *x_at, *x_next; /* where the first lines of this strip and the next one begin */
    char *y_at, *y_next;
    ptrdiff_t width;  /* of a whole strip: up to STRIP */
    ptrdiff_t rows;   /* up to that */
    int direct;       /* x is read where it lies */
    int deviates;     /* sums are of deviations from the pivots, and of their squares */
    uint64_t careful; /* a bit for each row that needs careful_stats */
    _Alignas(64) element pivot[STRIP], rstd[STRIP], shift[STRIP];
    /* Here, as frames of this size cost something each time they are entered: */
    column_sums sums[2];
    element room[RUN][STRIP];
} column_strip;

/* ---- where things lie ------------------------------------------------------------------------ */

#ifndef FN_UNEVEN
#define FN_UNEVEN PTRDIFF_MIN

/* The one stride that reaches every element of a row, if there is one. */
static ptrdiff_t even_step(const fn_shape *shape, const fn_rows *rows)
{
    if (!rows->col_strides) return fn_size_of(rows->dtype);
    const ptrdiff_t step = rows->col_strides[shape->col_ndim - 1];
    ptrdiff_t reach = step;
    for (ptrdiff_t d = shape->col_ndim - 1; d >= 0; d--) {
        if (reach != rows->col_strides[d]) return FN_UNEVEN;
        reach *= shape->col_shape[d];
    }
    return step;
}

OUTLINE ptrdiff_t line_at(const fn_shape *shape, const fn_rows *rows, ptrdiff_t step, ptrdiff_t i)
{
    ptrdiff_t left;
    return step != FN_UNEVEN ? i * step : run_at(shape, rows->col_strides, i, &left);
}

OUTLINE char *row_begin(const fn_shape *shape, const fn_rows *rows, ptrdiff_t row)
{
    return row_at(shape, rows, row);
}

/* How many lines i, i + every, ... there are. */
INLINE ptrdiff_t lines_from(ptrdiff_t i, ptrdiff_t end, ptrdiff_t every)
{
    return (ptrdiff_t)((size_t)(end - i + every - 1) / (size_t)every);
}
#endif

/* Not where lines would compete for the same few places in L1, nor what is converted first, by whole
 * strips. */
#define stays_in_l1 FN_OF_T(stays_in_l1)
INLINE int stays_in_l1(const column_strip *s) { return s->direct && s->x_step % 2048; }

#define fits_l1 FN_OF_T(fits_l1)
INLINE int fits_l1(const column_strip *s, ptrdiff_t width)
{
    return s->a->shape.cols * width * (ptrdiff_t)sizeof(element) <= STRIP_BYTES;
}

/* ---- the room -------------------------------------------------------------------------------- */

/* Whole strips of half types are soon converted, and not worth load_strip's and store_strip's
 * choices: their type. Of all else, T. */
#define whole_halves FN_OF_T(whole_halves)
INLINE fn_dtype whole_halves(const column_strip *s, const fn_rows *rows)
{
    const int is_float = sizeof(element) == sizeof(float);
    return is_float && s->rows == STRIP && !s->careful ? rows->dtype : FN_OWN_TYPE;
}

/* Lines i, i + QUARTER, ... in T, with zeros to a whole vector. */
#define pack_lines FN_OF_T(pack_lines)
OUTLINE void pack_lines(const column_strip *s, ptrdiff_t i, ptrdiff_t count, element *into)
{
    const fn_dtype halves = whole_halves(s, s->x);
    for (; count > 0; count--, i += QUARTER, into += STRIP) {
        const char *line = s->x_at + line_at(&s->a->shape, s->x, s->x_step, i);
        if (halves == FN_F16 || halves == FN_BF16)
            convert_steps(into, line, halves == FN_F16 ? F32_FROM_F16 : F32_FROM_BF16, STRIP);
        else {
            v_store(into + (s->rows - 1) / VW * VW, v_zero());
            load_strip(into, line, s->x->stride, s->x->dtype, s->rows);
        }
    }
}

/* Less than a vector of each line, where they lie as T. */
#define pack_parts FN_OF_T(pack_parts)
OUTLINE void pack_parts(const char *line, ptrdiff_t step, ptrdiff_t count, ptrdiff_t width,
                        element *into)
{
    for (; count > 0; count--, line += step, into += STRIP)
        v_store(into, v_loadn((const element *)line, width));
}

#define unpack_line FN_OF_T(unpack_line)
OUTLINE void unpack_line(const column_strip *s, ptrdiff_t i, element *line)
{
    const fn_rows *y = s->y;
    const fn_dtype halves = whole_halves(s, y);
    char *to = s->y_at + line_at(&s->a->shape, y, s->y_step, i);
    const fn_activation activation = s->a->steps->activation;
    if (activation) activate_strip(line, s->rows, activation);
    if (halves == FN_F16 || halves == FN_BF16)
        convert_steps(to, line, halves == FN_F16 ? F16_FROM_F32 : BF16_FROM_F32, STRIP);
    else if (!s->careful)
        store_strip(to, y->stride, y->dtype, line, s->rows);
    else
        for (ptrdiff_t r = 0; r < s->rows; r++)
            if (!(s->careful >> r & 1))
                store_strip(to + r * y->stride, y->stride, y->dtype, line + r, 1);
}

/* ---- sums ------------------------------------------------------------------------------------ */

#define add_line FN_OF_T(add_line)
INLINE void add_line(vec *sum, vec *squares, const char *line, ptrdiff_t ahead, vec pivot,
                     vec minus, const int odd, const int deviations)
{
    vec v = v_load((const element *)line);
    if (deviations) {
        /* The same bits, and less for the adders to do. */
        v = FMA_SUBTRACTS && odd ? v_fma(v, v_set1(1), minus) : v_sub(v, pivot);
        *squares = v_fma(v, v, *squares);
        __builtin_prefetch(line + ahead, 0, 2);
    }
    *sum = v_add(*sum, v);
}

/* Four lanes, whose `count` lines come in turn. Deviations ask for what lies so many bytes ahead. */
#define add_lanes FN_OF_T(add_lanes)
INLINE void add_lanes(const char *line, ptrdiff_t step, ptrdiff_t count, ptrdiff_t ahead, vec pivot,
                      const int deviations, element *sums, element *all_squares)
{
    vec sum[4], squares[4];
    const vec minus = v_sub(v_set1((element)-0.0), pivot);
    UNROLL for (int l = 0; l < 4; l++) sum[l] = squares[l] = v_zero();
    NO_UNROLL for (; count >= 4; count -= 4, line += 4 * step)
        UNROLL for (int l = 0; l < 4; l++)
            add_line(&sum[l], &squares[l], line + l * step, ahead, pivot, minus, l % 2, deviations);
    UNROLL for (int l = 0; l < 3; l++) {
        if (l >= count) break;
        add_line(&sum[l], &squares[l], line + l * step, ahead, pivot, minus, 0, deviations);
    }
    v_store(sums, v_add(v_add(sum[0], sum[2]), v_add(sum[1], sum[3])));
    if (!deviations) return;
    v_store(all_squares, v_add(v_add(squares[0], squares[2]), v_add(squares[1], squares[3])));
}

/* Lane by lane, all vectors of each; or, with less to do between runs, vector by vector, all lanes of
 * each: where a vector is a cache line, and L1 holds them all, which are one block then. (Of double it
 * gains less than its code is worth.) */
#define goes_down FN_OF_T(goes_down)
INLINE int goes_down(const column_strip *s)
{
    return LINE_VECTORS == 1 && sizeof(element) == sizeof(float) && s->rows % VW == 0 &&
           stays_in_l1(s) && fits_l1(s, s->width);
}

#define add_down FN_OF_T(add_down)
INLINE void add_down(column_strip *s, int deviates)
{
    const ptrdiff_t n = s->a->shape.cols, step = s->x_step, ahead = s->x_next - s->x_at;
    _Static_assert(STRIP_BYTES / 64 <= BLOCK, "one block");
    for (ptrdiff_t k = 0; k < s->rows; k += VW) {
        const char *line = s->x_at + k * (ptrdiff_t)sizeof(element);
        const vec pivot = v_load(s->pivot + k);
        NO_UNROLL for (ptrdiff_t j = 0; j < QUARTER; j++, line += step) {
            const ptrdiff_t count = lines_from(j, n, QUARTER);
            element *sums = s->sums[0].block[j] + k, *squares = s->sums[1].block[j] + k;
            if (deviates)
                add_lanes(line, QUARTER * step, count, ahead, pivot, 1, sums, squares);
            else
                add_lanes(line, QUARTER * step, count, 0, pivot, 0, sums, NULL);
        }
    }
}

#define add_block FN_OF_T(add_block)
INLINE void add_block(column_strip *s, ptrdiff_t first)
{
    const ptrdiff_t end = first + block_length(s->a->shape.cols, first);
    const ptrdiff_t rows = s->rows, to_next = s->direct ? s->x_next - s->x_at : 0;
    NO_UNROLL for (ptrdiff_t j = 0; j < QUARTER; j++) {
        const ptrdiff_t count = lines_from(first + j, end, QUARTER);
        const char *line = (const char *)s->room;
        ptrdiff_t step = sizeof s->room[0], ahead = to_next;
        if (s->direct) {
            line = s->x_at + (first + j) * s->x_step;
            step = QUARTER * s->x_step;
        } else {
            pack_lines(s, first + j, count, s->room[0]);
        }
        NO_UNROLL for (ptrdiff_t k = 0; k < rows; k += VW, line += VW * sizeof(element)) {
            if (s->direct && k + VW > rows) {
                pack_parts(line, step, count, rows - k, s->room[0]);
                line = (const char *)s->room;
                step = sizeof s->room[0];
                ahead = 0;
            }
            element *sums = s->sums[0].block[j] + k, *squares = s->sums[1].block[j] + k;
            if (s->deviates)
                add_lanes(line, step, count, ahead, v_load(s->pivot + k), 1, sums, squares);
            else
                add_lanes(line, step, count, 0, v_zero(), 0, sums, NULL);
        }
    }
}

#define widen_block FN_OF_T(widen_block)
OUTLINE void widen_block(column_sums *s, ptrdiff_t first, ptrdiff_t rows)
{
    if (!first) memset(s->total, 0, sizeof s->total);
    for (int j = 0; j < QUARTER; j++)
        for (ptrdiff_t i = 0; i < rows; i += 8)
            vd8_store_f64(s->total[j] + i, vd8_add(vd8_load_f64(s->total[j] + i),
                                                   vd8_load_element(s->block[j] + i)));
}

/* The halving tree. */
#define fold_lines FN_OF_T(fold_lines)
OUTLINE void fold_lines(column_sums *s, ptrdiff_t n, ptrdiff_t rows)
{
    double *p = s->total[0];
    for (int half = QUARTER / 2 * STRIP; n > BLOCK && half >= STRIP; half /= 2)
        for (int i = 0; i < half; i += 8)
            vd8_store_f64(p + i, vd8_add(vd8_load_f64(p + i), vd8_load_f64(p + half + i)));
    if (n > BLOCK) return;
    for (ptrdiff_t k = 0; k < rows; k += VW) {
        vec v[QUARTER / 2];
        UNROLL for (int j = 0; j < QUARTER / 2; j++)
            v[j] = v_add(v_load(s->block[j] + k), v_load(s->block[j + QUARTER / 2] + k));
        UNROLL for (int half = QUARTER / 4; half; half /= 2)
            UNROLL for (int j = 0; j < half; j++) v[j] = v_add(v[j], v[j + half]);
        v_store(s->block[0] + k, v[0]);
    }
    for (ptrdiff_t i = 0; i < rows; i += 8)
        vd8_store_f64(p + i, vd8_load_element(s->block[0] + i));
}

/* Sums of x - pivot, and of its squares where those are wanted. */
#define add_all FN_OF_T(add_all)
OUTLINE void add_all(column_strip *s, int deviates)
{
    const ptrdiff_t n = s->a->shape.cols;
    s->deviates = deviates;
    const int down = goes_down(s);
    if (down) add_down(s, deviates);
    for (ptrdiff_t first = 0; !down && first < n; first += BLOCK) {
        add_block(s, first);
        for (int i = 0; n > BLOCK && i <= deviates; i++) widen_block(&s->sums[i], first, s->rows);
    }
    for (int i = 0; i <= deviates; i++) fold_lines(&s->sums[i], n, s->rows);
}

/* ---- statistics ------------------------------------------------------------------------------ */

/* Eight rows, from row i of the strip on. Without vectors it takes less code to do them in turn. */
#define eight_pivots FN_OF_T(eight_pivots)
INLINE void eight_pivots(column_strip *s, ptrdiff_t i, const double *sums, double per_n)
{
    group_stats stats;
    for (int r = 0; VW == 1 && r < 8; r++) stats.pivot[r] = (element)((sums[i + r] + 0) * per_n);
    if (VW > 1) group_pivots(vd8_load_f64(sums + i), vd8_set1(per_n), &stats);
    memcpy(s->pivot + i, stats.pivot, sizeof stats.pivot);
}

#define eight_rstds FN_OF_T(eight_rstds)
INLINE void eight_rstds(column_strip *s, ptrdiff_t row, ptrdiff_t i, const double *sums,
                        const double *squares, double per_n)
{
    const fn_layer_norm_args *a = s->a;
    const ptrdiff_t left = s->rows - i < 8 ? s->rows - i : 8;
    group_stats stats;
    stats.careful = 0;
    for (int r = 0; VW == 1 && r < 8; r++) {
        row_stats one;
        const int plain = sums_to_stats(sums[i + r], squares[i + r], per_n, a->eps, 0, &one);
        stats.careful |= (unsigned)!plain << r;
        stats.rstd[r] = one.rstd;
        stats.shift[r] = one.shift;
        stats.c[r] = one.mean;
        stats.reported_rstd[r] = one.reported_rstd;
    }
    if (VW > 1)
        group_rstds(vd8_load_f64(sums + i), vd8_load_f64(squares + i), vd8_set1(per_n), a->eps,
                    &stats);
    memcpy(stats.pivot, s->pivot + i, sizeof stats.pivot);
    memcpy(s->rstd + i, stats.rstd, sizeof stats.rstd);
    memcpy(s->shift + i, stats.shift, sizeof stats.shift);
    s->careful |= (uint64_t)(stats.careful & ((1u << left) - 1)) << i;
    if (a->mean || a->rstd) store_group_stats(a, row + i, (int)left, &stats);
}

#define strip_stats FN_OF_T(strip_stats)
OUTLINE void strip_stats(column_strip *s, ptrdiff_t row)
{
    const double per_n = 1.0 / (double)s->a->shape.cols;
    memset(s->pivot, 0, sizeof s->pivot);
    if (!s->a->rms) {
        add_all(s, 0);
        for (ptrdiff_t i = 0; i < s->rows; i += 8) eight_pivots(s, i, s->sums[0].total[0], per_n);
    }
    add_all(s, 1);
    if (s->a->rms) memset(s->sums[0].total, 0, sizeof s->sums[0].total[0]);
    s->careful = 0;
    for (ptrdiff_t i = 0; i < s->rows; i += 8)
        eight_rstds(s, row, i, s->sums[0].total[0], s->sums[1].total[0], per_n);
}

/* ---- output ---------------------------------------------------------------------------------- */

/* A weight of 1 and a bias of -0 change no bit, so they stand for those that are absent. */
#define set_parameters FN_OF_T(set_parameters)
INLINE void set_parameters(column_strip *s, void *scratch, ptrdiff_t row)
{
    static const element one = 1, minus_zero = (element)-0.0;
    const fn_shape *shape = &s->a->shape;
    const fn_steps *steps = s->a->steps;
    const fn_output *o = steps->outputs;
    workspace space = workspace_in(scratch, shape, steps, 0);
    const element *w = parameter(shape, steps, &space, &o->weight, 0, steps->offset, row);
    const element *b = parameter(shape, steps, &space, &o->bias, 1, 0, row);
    s->w = w ? w : &one;
    s->b = b ? b : &minus_zero;
    s->w_step = w != NULL;
    s->b_step = b != NULL;
}

/* From where x lies to where y lies: `count` vectors of every line, from row k on. */
#define finish_vectors FN_OF_T(finish_vectors)
INLINE void finish_vectors(const column_strip *s, ptrdiff_t k, int stream, const int count)
{
    vec pivot[WIDE_VECTORS], rstd[WIDE_VECTORS], shift[WIDE_VECTORS], out[WIDE_VECTORS];
    ptrdiff_t width[WIDE_VECTORS];
    const element *x = (const element *)s->x_at + k, *w = s->w, *b = s->b;
    element *y = (element *)s->y_at + k;
    /* What is written past the cache is not fetched: x is, once more. */
    const char *y_next = (const char *)((const element *)(stream ? s->x_next : s->y_next) + k);
    const ptrdiff_t x_step = s->x_step, y_step = s->y_step, w_step = s->w_step, b_step = s->b_step;
    const ptrdiff_t y_next_step = stream ? x_step : y_step;
    UNROLL for (int v = 0; v < count; v++) {
        width[v] = part_at(k + v * VW, s->rows);
        pivot[v] = v_load(s->pivot + k + v * VW);
        rstd[v] = v_load(s->rstd + k + v * VW);
        shift[v] = v_load(s->shift + k + v * VW);
    }
    for (ptrdiff_t n = s->a->shape.cols; n > 0; n--, w += w_step, b += b_step) {
        const vec wv = v_set1(*w), bv = v_set1(*b);
        UNROLL for (int v = 0; v < count; v++) {
            const vec d = HAS_MASKS ? v_loadn(x + v * VW, width[v]) : v_load(x + v * VW);
            out[v] = v_fma(normalise(d, pivot[v], rstd[v], shift[v]), wv, bv);
        }
        if (stream)
            UNROLL for (int v = 0; v < count; v++) v_stream(y + v * VW, out[v]);
        else if (HAS_MASKS)
            UNROLL for (int v = 0; v < count; v++) v_storen(y + v * VW, out[v], width[v]);
        else
            UNROLL for (int v = 0; v < count; v++) v_store(y + v * VW, out[v]);
        UNROLL for (int f = 0; f < count * VW; f += LINE)
            __builtin_prefetch((const element *)y_next + f, 1, 2);
        x = (const element *)((const char *)x + x_step);
        y = (element *)((char *)y + y_step);
        y_next += y_next_step;
    }
}

#define finish_wide FN_OF_T(finish_wide)
OUTLINE void finish_wide(const column_strip *s, ptrdiff_t k, int stream)
{
    finish_vectors(s, k, stream, WIDE_VECTORS);
}

#define finish_narrow FN_OF_T(finish_narrow)
OUTLINE void finish_narrow(const column_strip *s, ptrdiff_t k, int stream)
{
    finish_vectors(s, k, stream, LINE_VECTORS);
}

/* All else, line by line through a room. */
#define finish_lines FN_OF_T(finish_lines)
OUTLINE void finish_lines(const column_strip *s)
{
    element room[STRIP];
    const element *w = s->w, *b = s->b;
    for (ptrdiff_t i = 0; i < s->a->shape.cols; i++, w += s->w_step, b += s->b_step) {
        const vec wv = v_set1(*w), bv = v_set1(*b);
        pack_lines(s, i, 1, room);
        for (ptrdiff_t k = 0; k < s->rows; k += VW) {
            const vec h = normalise(v_load(room + k), v_load(s->pivot + k), v_load(s->rstd + k),
                                    v_load(s->shift + k));
            v_store(room + k, v_fma(h, wv, bv));
        }
        unpack_line(s, i, room);
    }
}

/* Whether y is written where it lies, by whole vectors or parts of them. */
#define writes_direct FN_OF_T(writes_direct)
INLINE int writes_direct(const column_strip *s)
{
    return s->direct && s->y->dtype == FN_OWN_TYPE && s->y_step != FN_UNEVEN && !s->careful &&
           (HAS_MASKS || s->rows == s->width);
}

#define finish_rows FN_OF_T(finish_rows)
INLINE void finish_rows(const column_strip *s)
{
    const fn_activation activation = s->a->steps->activation;
    const int aligned = ((uintptr_t)s->y_at | (uintptr_t)s->y_step) % 64 == 0;
    const int stream = s->a->stream && aligned && s->rows == s->width && !activation;
    if (!writes_direct(s)) {
        finish_lines(s);
        return;
    }
    if (WIDE_VECTORS == LINE_VECTORS || s->width < STRIP)
        for (ptrdiff_t k = 0; k < s->rows; k += LINE) finish_narrow(s, k, stream);
    else
        for (ptrdiff_t k = 0; k < s->rows; k += WIDE_VECTORS * VW) finish_wide(s, k, stream);
    for (ptrdiff_t i = 0; activation && i < s->a->shape.cols; i++)
        activate_strip((element *)(s->y_at + i * s->y_step), s->rows, activation);
}

/* ---- the kernel ------------------------------------------------------------------------------ */

/* Strips that L1 holds until they are written: less wide where there are many lines. */
#define strip_width FN_OF_T(strip_width)
INLINE ptrdiff_t strip_width(const column_strip *s)
{
    const fn_shape *shape = &s->a->shape;
    const ptrdiff_t side_by_side = shape->outer_ndim ? shape->inner : shape->rows;
    ptrdiff_t width = STRIP;
    if (!stays_in_l1(s) || side_by_side < 2 * STRIP) return STRIP;
    while (width > LINE && !fits_l1(s, width)) width /= 2;
    return width;
}

/* How many of the rows from `row` on make a strip. They lie side by side, and where there are many
 * of them, strips begin where cache lines of y do. */
#define rows_in_strip FN_OF_T(rows_in_strip)
INLINE ptrdiff_t rows_in_strip(const column_strip *s, ptrdiff_t row, ptrdiff_t end)
{
    const fn_shape *shape = &s->a->shape;
    ptrdiff_t left = end - row;
    if (shape->outer_ndim) {
        const ptrdiff_t side_by_side = shape->inner - row % shape->inner;
        if (side_by_side < left) left = side_by_side;
    }
    if (left < 4 * s->width || s->y_step % 64) return left < s->width ? left : s->width;
    return s->width - (ptrdiff_t)((uintptr_t)s->y_at % 64 / sizeof(element));
}

#define layer_norm_columns FN_OF_T(layer_norm_columns)
static void layer_norm_columns(const void *args, ptrdiff_t row0, ptrdiff_t row1, void *scratch)
{
    const fn_layer_norm_args *a = args;
    column_strip s;
    memset(&s, 0, offsetof(column_strip, sums));
    s.a = a;
    s.x = &a->steps->x;
    s.y = &a->steps->outputs->y;
    s.x_step = even_step(&a->shape, s.x);
    s.y_step = even_step(&a->shape, s.y);
    s.direct = s.x->dtype == FN_OWN_TYPE && s.x_step != FN_UNEVEN;
    s.width = strip_width(&s);
    s.x_next = row_begin(&a->shape, s.x, row0);
    s.y_next = row_begin(&a->shape, s.y, row0);
    set_parameters(&s, scratch, row0);
    for (ptrdiff_t row = row0; row < row1; row += s.rows) {
        s.x_at = s.x_next;
        s.y_at = s.y_next;
        s.rows = rows_in_strip(&s, row, row1);
        if (row + s.rows < row1) {
            s.x_next = row_begin(&a->shape, s.x, row + s.rows);
            s.y_next = row_begin(&a->shape, s.y, row + s.rows);
        }
        strip_stats(&s, row);
        finish_rows(&s);
        for (ptrdiff_t r = 0; s.careful; r++, s.careful >>= 1)
            if (s.careful & 1) layer_norm(a, row + r, row + r + 1, scratch);
    }
    if (a->stream) v_fence();
}
