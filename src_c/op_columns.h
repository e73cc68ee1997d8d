/* op_columns.h: layer_norm of rows that lie side by side, each a column in memory: channels first.
 *
 * Element i of all rows is a contiguous line. So rows are taken a strip of them at a time, and go
 * through the arithmetic of row_pivot, plain_stats and affine_pass together, each in its own place
 * of a vector: nothing is done across vectors, and a row's lanes, in row.h's sense, are vectors. The
 * four that v_fold adds are summed side by side in registers; that leaves a quarter of them to be
 * halved on. */

/* Four cache lines: what lies a page or more apart is worth fetching only in some bulk. */
#define STRIP (256 / (int)sizeof(element))
#define QUARTER (LANES / 4)

/* Vectors whose statistics registers have room for. */
#define AFFINE_VECTORS (VW == 1 ? STRIP : 4)

#define column_strip FN_OF_T(column_strip)
typedef struct {
    const fn_layer_norm_args *a;
    const fn_rows *x, *y;
    ptrdiff_t x_step, y_step; /* bytes from line to line, or FN_UNEVEN */
    const char *x_at;         /* where the first line of this strip begins */
    char *y_at;
    ptrdiff_t x_ahead, y_ahead; /* bytes to the next strip */
    ptrdiff_t rows;             /* up to STRIP */
    int direct;                 /* x is read where it lies */
    element pivot[STRIP], rstd[STRIP], shift[STRIP];
    uint64_t careful; /* a bit for each row that needs careful_stats */
} column_strip;

/* Quarter lanes of a block, and their totals where there are more blocks. */
#define column_sums FN_OF_T(column_sums)
typedef struct {
    element block[QUARTER][STRIP];
    double total[QUARTER][STRIP];
} column_sums;

/* ---- lines ------------------------------------------------------------------------------------- */

#ifndef FN_UNEVEN
#define FN_UNEVEN PTRDIFF_MIN

/* The one stride that reaches every element of a row, if there is one. */
static ptrdiff_t even_step(const fn_shape *shape, const fn_rows *rows)
{
    ptrdiff_t step = fn_size_of(rows->dtype), reach = 0;
    for (ptrdiff_t d = rows->col_strides ? shape->col_ndim - 1 : -1; d >= 0; d--) {
        if (shape->col_shape[d] == 1) continue;
        if (reach == 0) step = reach = rows->col_strides[d];
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
#endif

/* Lines i, i + QUARTER, ..., from row k of the strip on, in T and with zeros to a whole vector. */
#define pack_lines FN_OF_T(pack_lines)
OUTLINE void pack_lines(const column_strip *s, ptrdiff_t i, ptrdiff_t count, ptrdiff_t k,
                        element *into)
{
    const ptrdiff_t last = (s->rows - 1) / VW * VW;
    for (into += k; count > 0; count--, i += QUARTER, into += STRIP) {
        const char *line = s->x_at + line_at(&s->a->shape, s->x, s->x_step, i) + k * s->x->stride;
        if (!s->direct) {
            v_store(into + last - k, v_zero());
            load_strip(into, line, s->x->stride, s->x->dtype, s->rows - k);
        } else {
            v_store(into, v_loadn((const element *)line, s->rows - k));
        }
    }
}

/* ---- sums -------------------------------------------------------------------------------------- */

#define add_line FN_OF_T(add_line)
INLINE void add_line(vec *sum, vec *squares, const char *line, vec pivot, const int deviations)
{
    vec v = v_load((const element *)line);
    if (deviations) {
        v = v_sub(v, pivot);
        *squares = v_fma(v, v, *squares);
    }
    *sum = v_add(*sum, v);
}

/* Four lanes, whose lines come in turn. */
#define add_lanes FN_OF_T(add_lanes)
INLINE void add_lanes(const char *line, ptrdiff_t step, ptrdiff_t count, vec pivot,
                      const int deviations, element *sums, element *all_squares)
{
    vec sum[4], squares[4];
    UNROLL for (int l = 0; l < 4; l++) sum[l] = squares[l] = v_zero();
    NO_UNROLL for (; count >= 4; count -= 4, line += 4 * step)
        UNROLL for (int l = 0; l < 4; l++)
            add_line(&sum[l], &squares[l], line + l * step, pivot, deviations);
    UNROLL for (int l = 0; l < 3; l++) {
        if (l >= count) break;
        add_line(&sum[l], &squares[l], line + l * step, pivot, deviations);
    }
    v_store(sums, v_add(v_add(sum[0], sum[2]), v_add(sum[1], sum[3])));
    if (!deviations) return;
    v_store(all_squares, v_add(v_add(squares[0], squares[2]), v_add(squares[1], squares[3])));
}

#define add_block FN_OF_T(add_block)
INLINE void add_block(const column_strip *s, ptrdiff_t first, const int deviations,
                      column_sums *sum, column_sums *squares)
{
    element packed[BLOCK / QUARTER][STRIP];
    const ptrdiff_t n = block_length(s->a->shape.cols, first);
    const ptrdiff_t direct_rows = s->direct ? s->rows / VW * VW : 0;
    for (ptrdiff_t j = 0; j < QUARTER; j++) {
        const ptrdiff_t count = (n - j + QUARTER - 1) / QUARTER;
        const char *lines = s->x_at + (first + j) * s->x_step;
        ptrdiff_t step = QUARTER * s->x_step;
        for (ptrdiff_t k = 0; k < s->rows; k += VW) {
            if (k == direct_rows) {
                pack_lines(s, first + j, count, k, packed[0]);
                lines = (const char *)packed;
                step = sizeof packed[0];
            }
            add_lanes(lines + k * (ptrdiff_t)sizeof(element), step, count, v_load(s->pivot + k),
                      deviations, sum->block[j] + k, squares->block[j] + k);
        }
    }
}

#define widen_block FN_OF_T(widen_block)
OUTLINE void widen_block(column_sums *s)
{
    const element *from = s->block[0];
    double *into = s->total[0];
    for (int i = 0; i < QUARTER * STRIP; i += 8)
        vd8_store_f64(into + i, vd8_add(vd8_load_f64(into + i), vd8_load_element(from + i)));
}

/* The halving tree, which ends in the first line of `total`. */
#define fold_lines FN_OF_T(fold_lines)
OUTLINE void fold_lines(column_sums *s, ptrdiff_t n)
{
    double *p = s->total[0];
    for (int half = QUARTER / 2 * STRIP; n > BLOCK && half >= STRIP; half /= 2)
        for (int i = 0; i < half; i += 8)
            vd8_store_f64(p + i, vd8_add(vd8_load_f64(p + i), vd8_load_f64(p + half + i)));
    for (int k = 0; n <= BLOCK && k < STRIP; k += VW) {
        vec v[QUARTER / 2];
        UNROLL for (int j = 0; j < QUARTER / 2; j++)
            v[j] = v_add(v_load(s->block[j] + k), v_load(s->block[j + QUARTER / 2] + k));
        UNROLL for (int half = QUARTER / 4; half; half /= 2)
            UNROLL for (int j = 0; j < half; j++) v[j] = v_add(v[j], v[j + half]);
        v_store(s->block[0] + k, v[0]);
    }
    for (int i = 0; n <= BLOCK && i < STRIP; i += 8)
        vd8_store_f64(p + i, vd8_load_element(s->block[0] + i));
}

#define add_all FN_OF_T(add_all)
INLINE void add_all(const column_strip *s, const int deviations, column_sums *sum,
                    column_sums *squares)
{
    const ptrdiff_t n = s->a->shape.cols;
    memset(sum->total, 0, n > BLOCK ? sizeof sum->total : 0);
    memset(squares->total, 0, n > BLOCK ? sizeof squares->total : 0);
    for (ptrdiff_t first = 0; first < n; first += BLOCK) {
        add_block(s, first, deviations, sum, squares);
        if (n > BLOCK) widen_block(sum);
        if (n > BLOCK && deviations) widen_block(squares);
    }
    fold_lines(sum, n);
    if (deviations) fold_lines(squares, n);
}

/* ---- statistics -------------------------------------------------------------------------------- */

#define strip_stats FN_OF_T(strip_stats)
OUTLINE void strip_stats(column_strip *s, ptrdiff_t row)
{
    column_sums sum, squares;
    const fn_layer_norm_args *a = s->a;
    const vd8 per_n = vd8_set1(1.0 / (double)a->shape.cols);
    group_stats stats;
    memset(s->pivot, 0, sizeof s->pivot);
    if (!a->rms) {
        add_all(s, 0, &sum, &squares);
        for (ptrdiff_t i = 0; i < s->rows; i += 8) {
            group_pivots(vd8_load_f64(sum.total[0] + i), per_n, &stats);
            memcpy(s->pivot + i, stats.pivot, sizeof stats.pivot);
        }
    }
    add_all(s, 1, &sum, &squares);
    if (a->rms) memset(sum.total, 0, sizeof sum.total[0]);
    s->careful = 0;
    for (ptrdiff_t i = 0; i < s->rows; i += 8) {
        const ptrdiff_t left = s->rows - i < 8 ? s->rows - i : 8;
        group_rstds(vd8_load_f64(sum.total[0] + i), vd8_load_f64(squares.total[0] + i), per_n,
                    a->eps, &stats);
        memcpy(stats.pivot, s->pivot + i, sizeof stats.pivot);
        memcpy(s->rstd + i, stats.rstd, sizeof stats.rstd);
        memcpy(s->shift + i, stats.shift, sizeof stats.shift);
        s->careful |= (uint64_t)(stats.careful & ((1u << left) - 1)) << i;
        if (a->mean || a->rstd) store_group_stats(a, row + i, (int)left, &stats);
    }
}

/* ---- output ------------------------------------------------------------------------------------ */

/* A weight of 1 and a bias of -0 change no bit, so they stand for those that are absent; and so does
 * an offset of -0. */
#define line_parameters FN_OF_T(line_parameters)
typedef struct {
    const element *w, *b;
    ptrdiff_t w_step, b_step;
    element offset;
} line_parameters;

#define parameters_of FN_OF_T(parameters_of)
static line_parameters parameters_of(const fn_steps *steps)
{
    static const element one = 1, minus_zero = (element)-0.0;
    const void *w = steps->outputs->weight.data, *b = steps->outputs->bias.data;
    return (line_parameters){
        .w = w ? w : &one,
        .b = b ? b : &minus_zero,
        .w_step = w != NULL,
        .b_step = b != NULL,
        .offset = w && steps->offset != 0 ? (element)steps->offset : minus_zero,
    };
}

/* From where x lies to where y lies. */
#define finish_direct FN_OF_T(finish_direct)
INLINE void finish_direct(const column_strip *s, ptrdiff_t first, const int stream)
{
    vec pivot[AFFINE_VECTORS], rstd[AFFINE_VECTORS], shift[AFFINE_VECTORS], out[AFFINE_VECTORS];
    const ptrdiff_t x_step = s->x_step, y_step = s->y_step;
    const ptrdiff_t x_ahead = s->x_ahead, y_ahead = s->y_ahead;
    line_parameters p = parameters_of(s->a->steps);
    const char *x = s->x_at + first * (ptrdiff_t)sizeof(element);
    char *y = s->y_at + first * (ptrdiff_t)sizeof(element);
    UNROLL for (int k = 0; k < AFFINE_VECTORS; k++) {
        pivot[k] = v_load(s->pivot + first + k * VW);
        rstd[k] = v_load(s->rstd + first + k * VW);
        shift[k] = v_load(s->shift + first + k * VW);
    }
    for (ptrdiff_t n = s->a->shape.cols; n > 0; n--) {
        const vec w = v_set1(*p.w + p.offset), b = v_set1(*p.b);
        UNROLL for (int k = 0; k < AFFINE_VECTORS; k++)
            out[k] = v_fma(
                normalise(v_load((const element *)x + k * VW), pivot[k], rstd[k], shift[k]), w, b);
        UNROLL for (int k = 0; k < AFFINE_VECTORS; k++) {
            if (stream)
                v_stream((element *)y + k * VW, out[k]);
            else
                v_store((element *)y + k * VW, out[k]);
        }
        UNROLL for (int k = 0; k < AFFINE_VECTORS * VW; k += LINE) {
            __builtin_prefetch((const element *)(x + x_ahead) + k, 0, 2);
            if (!stream) __builtin_prefetch((const element *)(y + y_ahead) + k, 1, 2);
        }
        x += x_step;
        y += y_step;
        p.w += p.w_step;
        p.b += p.b_step;
    }
}

#define store_line FN_OF_T(store_line)
OUTLINE void store_line(const column_strip *s, char *y, element *line)
{
    const fn_rows *rows = s->y;
    const fn_activation activation = s->a->steps->activation;
    if (activation) activate_strip(line, s->rows, activation);
    if (!s->careful)
        store_strip(y, rows->stride, rows->dtype, line, s->rows);
    else
        for (ptrdiff_t r = 0; r < s->rows; r++)
            if (!(s->careful >> r & 1))
                store_strip(y + r * rows->stride, rows->stride, rows->dtype, line + r, 1);
}

/* What is not a whole strip from T to T: line by line through a room. */
#define finish_lines FN_OF_T(finish_lines)
OUTLINE void finish_lines(const column_strip *s, int y_direct)
{
    line_parameters p = parameters_of(s->a->steps);
    element room[STRIP];
    for (ptrdiff_t i = 0; i < s->a->shape.cols; i++) {
        const vec w = v_set1(*p.w + p.offset), b = v_set1(*p.b);
        const element *x = room;
        element *y = (element *)(s->y_at + line_at(&s->a->shape, s->y, s->y_step, i));
        element *into = y_direct ? y : room;
        if (s->direct)
            x = (const element *)(s->x_at + i * s->x_step);
        else
            pack_lines(s, i, 1, 0, room);
        for (ptrdiff_t k = 0; k < s->rows; k += VW) {
            const vec h = normalise(load_some(x + k, s->rows - k), v_load(s->pivot + k),
                                    v_load(s->rstd + k), v_load(s->shift + k));
            store_some(into + k, v_fma(h, w, b), s->rows - k);
        }
        if (!y_direct) store_line(s, (char *)y, room);
        p.w += p.w_step;
        p.b += p.b_step;
    }
}

#define finish_strip_of_rows FN_OF_T(finish_strip_of_rows)
INLINE void finish_strip_of_rows(const column_strip *s)
{
    const int y_direct = s->y->dtype == FN_OWN_TYPE && !s->careful && !s->a->steps->activation;
    if (!y_direct || !s->direct || s->rows < STRIP || s->y_step == FN_UNEVEN) {
        finish_lines(s, y_direct);
        return;
    }
    const int aligned = ((uintptr_t)s->y_at | (uintptr_t)s->y_step) % 64 == 0;
    for (ptrdiff_t k = 0; k < STRIP; k += AFFINE_VECTORS * VW) {
        if (s->a->stream && aligned)
            finish_direct(s, k, 1);
        else
            finish_direct(s, k, 0);
    }
}

/* ---- the kernel -------------------------------------------------------------------------------- */

/* How many rows from `row` on lie side by side and make a strip; up to a cache line's end in y. */
#define rows_in_strip FN_OF_T(rows_in_strip)
INLINE ptrdiff_t rows_in_strip(const column_strip *s, ptrdiff_t row, ptrdiff_t end)
{
    const fn_shape *shape = &s->a->shape;
    ptrdiff_t left = end - row;
    if (shape->outer_ndim) {
        const ptrdiff_t run = shape->inner - row % shape->inner;
        if (run < left) left = run;
    }
    const ptrdiff_t whole = STRIP - (ptrdiff_t)((uintptr_t)s->y_at % 64 / sizeof(element));
    return left < whole ? left : whole;
}

#define layer_norm_columns FN_OF_T(layer_norm_columns)
static void layer_norm_columns(const void *args, ptrdiff_t row0, ptrdiff_t row1, void *scratch)
{
    const fn_layer_norm_args *a = args;
    column_strip s = {.a = a, .x = &a->steps->x, .y = &a->steps->outputs[0].y};
    s.x_step = even_step(&a->shape, s.x);
    s.y_step = even_step(&a->shape, s.y);
    s.direct = s.x->dtype == FN_OWN_TYPE && s.x_step != FN_UNEVEN;
    s.x_ahead = s.y_ahead = 0;
    for (ptrdiff_t row = row0; row < row1; row += s.rows) {
        s.x_at = row_at(&a->shape, s.x, row);
        s.y_at = row_at(&a->shape, s.y, row);
        s.rows = rows_in_strip(&s, row, row1);
        if (row + s.rows < row1) {
            s.x_ahead = (const char *)row_at(&a->shape, s.x, row + s.rows) - s.x_at;
            s.y_ahead = (const char *)row_at(&a->shape, s.y, row + s.rows) - s.y_at;
        }
        strip_stats(&s, row);
        finish_strip_of_rows(&s);
        for (ptrdiff_t r = 0; r < s.rows; r++)
            if (s.careful >> r & 1) layer_norm(a, row + r, row + r + 1, scratch);
    }
    if (a->stream) v_fence();
}
