/* steps.h: what is done to rows of T before their statistics are formed and after they are
 * normalised.
 *
 * The plain case, contiguous rows of T, has no steps. All else is a prologue and an epilogue of
 * steps on a strip of at most 1,024 elements, which stays in L1:
 *
 *   prologue   load from any type and layout; gate * x, + linear_bias, + residual; store the sum;
 *              drop the elements that a mask leaves out
 *   epilogue   weight and bias, the affine pass of every op; the activation; zeros for what is left
 *              out; store to any type and layout, or, of a whole row, to int8
 *
 * Each step is one call a strip, chosen by what the arguments hold; so steps combine freely, and
 * the arithmetic between them is that of the plain case: it sees rows of T that lie in a room of
 * the thread's scratch, or where the caller has them, if that serves. */

#ifndef FN_STEPS
#define FN_STEPS

/* ---- one for both types ---------------------------------------------------------------------- */

/* Zeros from element i on. */
OUTLINE void zero_rest(const fn_shape *shape, const fn_rows *rows, char *row, ptrdiff_t i)
{
    const ptrdiff_t size = fn_size_of(rows->dtype);
    if (!rows->col_strides) {
        memset(row + i * size, 0, (size_t)((shape->cols - i) * size));
        return;
    }
    for (ptrdiff_t left; i < shape->cols; i++)
        memset(row + run_at(shape, rows->col_strides, i, &left), 0, (size_t)size);
}

/* Where a row of x, y or another array that lies as they do begins. */
INLINE char *step_row_at(const fn_shape *shape, const fn_steps *steps, const fn_rows *rows,
                         ptrdiff_t row)
{
    if (steps->starts) return (char *)rows->data + steps->starts[row] * fn_size_of(rows->dtype);
    return row_at(shape, rows, row);
}

/* How many elements from the row's first on are to be read, and written as other than 0. */
INLINE ptrdiff_t step_length(const fn_shape *shape, const fn_steps *steps, ptrdiff_t row)
{
    if (steps->lengths) return steps->lengths[row];
    return steps->starts ? steps->starts[row + 1] - steps->starts[row] : shape->cols;
}

/* The mask of elements i .. i + n - 1, in place or gathered into `room`. */
OUTLINE const unsigned char *mask_part(const fn_shape *shape, const fn_rows *mask,
                                      const unsigned char *row, ptrdiff_t i, ptrdiff_t n,
                                      unsigned char *room)
{
    if (!mask->col_strides) return row + i;
    for (ptrdiff_t k = 0, left; k < n; k++) room[k] = row[run_at(shape, mask->col_strides, i + k, &left)];
    return room;
}

/* Whether the rows of a group have one output and the same parameters, from their first on. */
OUTLINE int share_parameters(const fn_shape *shape, const fn_steps *s, ptrdiff_t row, int rows)
{
    const fn_rows *w = &s->outputs[0].weight, *b = &s->outputs[0].bias;
    if (s->output_count != 1 || s->param_cols || s->round_before_weight || w->stride || b->stride)
        return 0;
    if (!w->outer_strides && !b->outer_strides) return 1;
    return !shape->outer_ndim || row % shape->inner + rows <= shape->inner;
}

/* Whether sums are what most are: x + residual, all of the type computed in, of rows that fill all
 * lanes. */
OUTLINE int is_plain_sum(const fn_shape *shape, const fn_steps *s, fn_dtype own, ptrdiff_t lanes)
{
    const fn_rows *arrays[] = {&s->x, &s->residual, &s->sum};
    if (!s->residual.data || s->gate.data || s->linear_bias.data || s->mask.data || s->lengths ||
        s->starts || shape->outer_ndim || shape->cols % lanes)
        return 0;
    for (int i = 0; i < 3; i++)
        if (arrays[i]->data && (arrays[i]->dtype != own || arrays[i]->col_strides)) return 0;
    return 1;
}

/* ---- what is to come ---- */

/* What the arrays of a group to come hold, by cache lines, so far as it has not been asked for. */
typedef struct {
    struct {
        const char *at;
        ptrdiff_t lines, share;
        int written;
    } run[8];
    int runs;
} fetcher;

/* A share of it, between one pass and the next. All at once would fill the buffers that the CPU has
 * for lines on their way, and everybody would wait. */
static COLD void fetch_shares(fetcher *f)
{
    for (int k = 0; k < f->runs; k++) {
        const char *p = f->run[k].at;
        ptrdiff_t n = f->run[k].lines < f->run[k].share ? f->run[k].lines : f->run[k].share;
        f->run[k].lines -= n;
        f->run[k].at = p + 64 * n;
        if (f->run[k].written)
            for (; n > 0; n--, p += 64) __builtin_prefetch(p, 1, 2);
        else
            for (; n > 0; n--, p += 64) __builtin_prefetch(p, 0, 2);
    }
}

INLINE void fetch_share(fetcher *f)
{
    if (__builtin_expect(f->runs, 0)) fetch_shares(f);
}

/* How often fetch_share is called, at least, while a row, or a group of two, is on its way. */
enum { ROW_SHARES = 3, GROUP_SHARES = 4 };

/* n elements of each of the rows that come `later` rows after `row`, of an array that will be read
 * or written then. */
static void fetch_rows(fetcher *f, const fn_shape *shape, const fn_rows *array, ptrdiff_t row,
                       ptrdiff_t later, int rows, ptrdiff_t n, int written)
{
    const ptrdiff_t bytes = n * fn_size_of(array->dtype), stride = array->stride;
    if (!array->data || array->col_strides || !stride) return;
    if (rows > 1 && (stride < bytes || stride > 2 * bytes)) return;
    if (row + later + rows > shape->rows) return;
    const ptrdiff_t lines = ((rows - 1) * stride + bytes + 63) / 64;
    f->run[f->runs].at = (const char *)array->data + (row + later) * stride;
    f->run[f->runs].lines = lines;
    f->run[f->runs].share = lines / (rows == 1 ? ROW_SHARES : GROUP_SHARES) + 1;
    f->run[f->runs++].written = written;
}

/* What is read two groups from now, and what is written one group from now. */
OUTLINE void fetch_step_rows(fetcher *f, const fn_layer_norm_args *a, ptrdiff_t row, int rows)
{
    const fn_steps *s = a->steps;
    const ptrdiff_t n = a->shape.cols, next = 2 * rows;
    f->runs = 0;
    if (s->starts) return; /* the CPU sees by itself that packed rows follow one another */
    if (s->lengths)
        for (int i = 0; i < rows && row + next + i < a->shape.rows; i++)
            fetch_rows(f, &a->shape, &s->x, row, next + i, 1, s->lengths[row + next + i], 0);
    else
        fetch_rows(f, &a->shape, &s->x, row, next, rows, n, 0);
    fetch_rows(f, &a->shape, &s->residual, row, next, rows, n, 0);
    fetch_rows(f, &a->shape, &s->mask, row, next, rows, n, 0);
    if (a->stream) return;
    fetch_rows(f, &a->shape, &s->sum, row, rows, rows, n, 1);
    if (!a->stream_rooms) fetch_rows(f, &a->shape, &s->outputs[0].y, row, rows, rows, n, 1);
}

#endif

/* One thread's scratch. */
#define workspace FN_OF_T(workspace)
typedef struct {
    element *rooms;         /* of the rows in flight */
    element *result;        /* the last room: of a row of results, before it becomes int8 */
    element *params;        /* converted parameters, two an output */
    const void **params_of; /* the row of parameters that each was converted from */
    double *sums;           /* backward, where parameters repeat within a row */
    ptrdiff_t room_stride, param_stride, tile;
    fn_dtype half; /* of rows that go op_half.h's way; 0: none do */
    int plain_sums; /* rows go by plain_sum */
    int stream;    /* rows of y go from a room past the cache */
    fetcher *ahead;
} workspace;

#define workspace_in FN_OF_T(workspace_in)
static workspace workspace_in(void *scratch, const fn_shape *shape, const fn_steps *steps,
                              int backward)
{
    const ptrdiff_t count = 2 * steps->output_count;
    workspace s = {.rooms = scratch, .room_stride = fn_room_stride(shape->cols)};
    s.tile = fn_tile(shape->cols, steps->param_cols);
    s.param_stride = fn_room_stride(s.tile);
    s.params = s.rooms + fn_rooms(shape, steps, sizeof(element), backward) * s.room_stride;
    s.result = s.params - s.room_stride;
    s.params_of = (const void **)(s.params + count * s.param_stride);
    s.sums = (double *)(s.params_of + (count + 7) / 8 * 8);
    for (ptrdiff_t i = 0; i < count; i++) s.params_of[i] = NULL;
    return s;
}

/* ---- rows of any type and layout -------------------------------------------------------------- */

#define is_direct FN_OF_T(is_direct)
INLINE int is_direct(const fn_rows *rows) { return rows->dtype == FN_OWN_TYPE && !rows->col_strides; }

/* Elements i .. i + n - 1 of the row at `from`. */
#define load_part FN_OF_T(load_part)
OUTLINE void load_part(element *into, const fn_shape *shape, const fn_rows *rows, const char *from,
                       ptrdiff_t i, ptrdiff_t n)
{
    const ptrdiff_t size = fn_size_of(rows->dtype);
    if (!rows->col_strides) {
        load_strip(into, from + i * size, size, rows->dtype, n);
        return;
    }
    for (ptrdiff_t left; n > 0; n -= left, i += left, into += left) {
        const char *run = from + run_at(shape, rows->col_strides, i, &left);
        if (left > n) left = n;
        load_strip(into, run, rows->col_strides[shape->col_ndim - 1], rows->dtype, left);
    }
}

#define store_part FN_OF_T(store_part)
OUTLINE void store_part(const fn_shape *shape, const fn_rows *rows, char *into, ptrdiff_t i,
                        const element *from, ptrdiff_t n)
{
    const ptrdiff_t size = fn_size_of(rows->dtype);
    if (!rows->col_strides) {
        store_strip(into + i * size, size, rows->dtype, from, n);
        return;
    }
    for (ptrdiff_t left; n > 0; n -= left, i += left, from += left) {
        char *run = into + run_at(shape, rows->col_strides, i, &left);
        if (left > n) left = n;
        store_strip(run, rows->col_strides[shape->col_ndim - 1], rows->dtype, from, left);
    }
}

/* Those elements where they lie, or converted into `room`. */
#define part FN_OF_T(part)
INLINE const element *part(const fn_shape *shape, const fn_rows *rows, const char *from, ptrdiff_t i,
                           ptrdiff_t n, element *room)
{
    if (is_direct(rows)) return (const element *)from + i;
    load_part(room, shape, rows, from, i, n);
    return room;
}

/* ---- prologue --------------------------------------------------------------------------------- */

#define has_sum FN_OF_T(has_sum)
INLINE int has_sum(const fn_steps *s)
{
    return s->residual.data || s->gate.data || s->linear_bias.data || s->sum.data;
}

#define add_vector FN_OF_T(add_vector)
INLINE void add_vector(element *into, const element *x, const element *gate, const element *bias,
                       const element *residual, ptrdiff_t i, ptrdiff_t left)
{
    vec v = load_some(x + i, left);
    if (gate) v = v_mul(load_some(gate + i, left), v);
    if (bias) v = v_add(v, load_some(bias + i, left));
    if (residual) v = v_add(v, load_some(residual + i, left));
    store_some(into + i, v, left);
}

/* (gate * x + linear_bias) + residual; what is NULL is left out. */
#define add_strip FN_OF_T(add_strip)
OUTLINE void add_strip(element *into, const element *x, const element *gate, const element *bias,
                       const element *residual, ptrdiff_t n)
{
    ptrdiff_t i = 0;
    for (; i + VW <= n; i += VW) add_vector(into, x, gate, bias, residual, i, VW);
    if (i < n) add_vector(into, x, gate, bias, residual, i, n - i);
}

/* Such a row of one block, into its place or `room`; meanwhile its elements are summed. */
#define plain_sum FN_OF_T(plain_sum)
OUTLINE quarter plain_sum(const fn_steps *s, ptrdiff_t row, ptrdiff_t n, element *room,
                          const element **at)
{
    const element *x = (const element *)((char *)s->x.data + row * s->x.stride);
    const element *residual = (element *)((char *)s->residual.data + row * s->residual.stride);
    element *into = s->sum.data ? (element *)((char *)s->sum.data + row * s->sum.stride) : room;
    vec sum[VECTORS];
    *at = into;
    UNROLL for (int k = 0; k < VECTORS; k++) sum[k] = v_zero();
    NO_UNROLL for (ptrdiff_t i = 0; i < n; i += LANES)
        UNROLL for (int k = 0; k < VECTORS; k++) {
            const vec v = v_add(v_load(x + i + k * VW), v_load(residual + i + k * VW));
            sum[k] = v_add(sum[k], v);
            v_store(into + i + k * VW, v);
        }
    return v_fold(sum, VECTORS);
}

/* Where the parts of one row's sum begin; NULL for those that are absent. */
#define addends FN_OF_T(addends)
typedef struct {
    const char *x, *gate, *bias, *residual;
    char *sum;
} addends;

#define addends_of FN_OF_T(addends_of)
INLINE addends addends_of(const fn_shape *shape, const fn_steps *s, ptrdiff_t row)
{
    return (addends){.x = row_at(shape, &s->x, row),
                     .gate = s->gate.data ? row_at(shape, &s->gate, row) : NULL,
                     .bias = s->linear_bias.data ? row_at(shape, &s->linear_bias, row) : NULL,
                     .residual = s->residual.data ? row_at(shape, &s->residual, row) : NULL,
                     .sum = s->sum.data ? row_at(shape, &s->sum, row) : NULL};
}

/* n elements, then zeros up to `end`; past the cache, where whole vectors lie so. */
#define stream_part FN_OF_T(stream_part)
static void stream_part(element *into, const element *from, ptrdiff_t n, ptrdiff_t end)
{
    ptrdiff_t i = 0;
    if ((uintptr_t)into % 64 == 0) {
        for (; i + VW <= n; i += VW) v_stream(into + i, v_load(from + i));
        for (; i + VW <= end; i += VW)
            v_stream(into + i, i < n ? v_loadn(from + i, n - i) : v_zero());
    }
    if (i < n) {
        memcpy(into + i, from + i, (size_t)(n - i) * sizeof(element));
        i = n;
    }
    if (i < end) memset(into + i, 0, (size_t)(end - i) * sizeof(element));
}

/* One row's sum in T, into its own place where that serves, else into `room`. stream: the place is
 * written past the cache, and the room is where the row is read again. */
#define sum_row FN_OF_T(sum_row)
static const element *sum_row(const fn_shape *shape, const fn_steps *s, ptrdiff_t row, int stream,
                              element *room)
{
    element x_room[PIECE], gate_room[PIECE], bias_room[PIECE], residual_room[PIECE];
    const addends a = addends_of(shape, s, row);
    const int own = a.sum && is_direct(&s->sum), in_place = own && !stream;
    element *into = in_place ? (element *)a.sum : room;
    const int converts = !is_direct(&s->x) || (a.gate && !is_direct(&s->gate)) ||
                         (a.bias && !is_direct(&s->linear_bias)) ||
                         (a.residual && !is_direct(&s->residual));
    const ptrdiff_t n = shape->cols, piece = converts ? PIECE : BLOCK;
    for (ptrdiff_t i = 0; i < n; i += piece) {
        const ptrdiff_t m = n - i < piece ? n - i : piece;
        add_strip(into + i, part(shape, &s->x, a.x, i, m, x_room),
                  a.gate ? part(shape, &s->gate, a.gate, i, m, gate_room) : NULL,
                  a.bias ? part(shape, &s->linear_bias, a.bias, i, m, bias_room) : NULL,
                  a.residual ? part(shape, &s->residual, a.residual, i, m, residual_room) : NULL,
                  m);
        if (!a.sum || in_place) continue;
        if (own) {
            stream_part((element *)a.sum + i, into + i, m, m);
            continue;
        }
        store_part(shape, &s->sum, a.sum, i, into + i, m);
        if (s->round_sum) round_strip(into + i, s->sum.dtype, m);
    }
    return into;
}

/* Packing leaves time for a line or so with each vector: of what lies some 8 KB further on, beyond
 * the rows in flight. How far that is where rows of T lie one stride apart. (Longer rows the CPU
 * sees by itself.) */
#define MOST_FETCHED (16 * BLOCK)
#define fetch_while_packing FN_OF_T(fetch_while_packing)
static packing_fetch fetch_while_packing(const fn_layer_norm_args *a, const char *x, ptrdiff_t row)
{
    const fn_steps *s = a->steps;
    const fn_rows *y = &s->outputs[0].y;
    const ptrdiff_t rows = 2 + 8192 / (a->shape.cols * (ptrdiff_t)sizeof(element));
    const ptrdiff_t x_ahead = rows * s->x.stride;
    return (packing_fetch){
        .mask = s->mask.col_strides ? 0 : rows * s->mask.stride,
        .x = x_ahead,
        .y = a->stream_rooms || !is_direct(y)
                 ? x_ahead
                 : (char *)y->data + (row + rows) * y->stride - x,
    };
}

/* The elements that the mask keeps, packed. a: whose rows are fetched meanwhile; NULL: none. */
#define masked_row FN_OF_T(masked_row)
static const element *masked_row(const fn_shape *shape, const fn_steps *s,
                                 const fn_layer_norm_args *a, ptrdiff_t row, element *room,
                                 ptrdiff_t *length)
{
    element x_room[BLOCK];
    unsigned char mask_room[BLOCK];
    const char *x = row_at(shape, &s->x, row);
    const unsigned char *mask = row_at(shape, &s->mask, row);
    const ptrdiff_t n = shape->cols;
    packing_fetch ahead = {0};
    if (a && a->fetch && is_direct(&s->x) && n <= MOST_FETCHED)
        ahead = fetch_while_packing(a, x, row);
    *length = 0;
    for (ptrdiff_t i = 0; i < n; i += BLOCK) {
        const ptrdiff_t m = block_length(n, i);
        const element *from = part(shape, &s->x, x, i, m, x_room);
        *length += compress_strip(room + *length, from,
                                  mask_part(shape, &s->mask, mask, i, m, mask_room), m, ahead);
    }
    return room;
}

/* What the statistics see of a row: *length elements of T, where they lie or in `room`. a: NULL
 * where nothing is to be fetched meanwhile. */
#define prologue FN_OF_T(prologue)
OUTLINE const element *prologue(const fn_shape *shape, const fn_steps *s,
                                const fn_layer_norm_args *a, ptrdiff_t row, element *room,
                                ptrdiff_t *length)
{
    if (s->mask.data) return masked_row(shape, s, a, row, room, length);
    *length = step_length(shape, s, row);
    if (has_sum(s)) return sum_row(shape, s, row, a && a->stream, room);
    const char *x = step_row_at(shape, s, &s->x, row);
    if (is_direct(&s->x)) return (const element *)x;
    load_part(room, shape, &s->x, x, 0, *length);
    return room;
}

/* ---- parameters ------------------------------------------------------------------------------- */

#define add_to_all FN_OF_T(add_to_all)
static void add_to_all(element *p, element offset, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n; i += VW)
        store_some(p + i, v_add(load_some(p + i, n - i), v_set1(offset)), n - i);
}

/* The row of parameters that belongs to `row`, in T, with the offset added: in place, or as it was
 * converted for the row before, or converted. `which` counts them through all outputs. */
#define parameter FN_OF_T(parameter)
OUTLINE const element *parameter(const fn_shape *shape, const fn_steps *s, workspace *space,
                                 const fn_rows *rows, ptrdiff_t which, double offset, ptrdiff_t row)
{
    if (!rows->data) return NULL;
    const char *from = row_at(shape, rows, row);
    const int repeats = s->param_cols && s->param_cols < space->tile;
    if (is_direct(rows) && offset == 0 && !repeats) return (const element *)from;
    element *into = space->params + which * space->param_stride;
    if (space->params_of[which] == from) return into;
    const ptrdiff_t n = repeats ? s->param_cols : space->tile;
    load_part(into, shape, rows, from, 0, n);
    if (offset != 0) add_to_all(into, (element)offset, n);
    for (ptrdiff_t i = n; i < space->tile; i++) into[i] = into[i - n];
    space->params_of[which] = from;
    return into;
}

/* ---- epilogue --------------------------------------------------------------------------------- */

/* What a strip of y is made from. */
#define finished FN_OF_T(finished)
typedef struct {
    const element *w, *b;
    const row_stats *stats;
    int scaled; /* stats->s counts */
    int round_first; /* round to `dtype` before weight and bias */
    fn_dtype dtype;
    fn_activation activation;
} finished;

#define finish_strip FN_OF_T(finish_strip)
OUTLINE void finish_strip(const finished *f, const element *x, element *y, ptrdiff_t at,
                          ptrdiff_t n)
{
    const row_stats *stats = f->stats;
    const element *w = f->w ? f->w + at : NULL, *b = f->b ? f->b + at : NULL;
    if (f->scaled) {
        scaled_strip(x, y, stats->s, n);
        x = y;
    }
    if (f->round_first) {
        affine_strip(x, y, NULL, NULL, n, stats, 0, 0);
        round_strip(y, f->dtype, n);
        if (w || b) {
            static const row_stats as_it_is = {.rstd = 1};
            affine_strip(y, y, w, b, n, &as_it_is, 0, 0);
        }
    } else {
        affine_strip(x, y, w, b, n, stats, 0, 0);
    }
    if (f->activation) activate_strip(y, n, f->activation);
}

/* max(largest/127, the least normal number) in float; NaN where the row holds one. */
#define int8_scale FN_OF_T(int8_scale)
static float int8_scale(element largest)
{
    const float step = (float)(largest / 127);
    return step < FLT_MIN ? FLT_MIN : step;
}

/* A row of y in T, in a room, to int8. Four vectors past it are made 0 and rounded as well: there is
 * room for them, but not in y. */
#define store_int8 FN_OF_T(store_int8)
OUTLINE void store_int8(const fn_shape *shape, const fn_output *o, char *y, ptrdiff_t row,
                        element *from, ptrdiff_t n, element largest)
{
    const int whole = !o->y.col_strides && n % (4 * VW) == 0;
    char *into = whole ? y : (char *)from;
    o->scales[row] = int8_scale(largest);
    if (n % (4 * VW))
        NO_UNROLL for (int k = 0; k < 4; k++) v_store(from + n + k * VW, v_zero());
    quantise_strip((signed char *)into, from, (element)o->scales[row], n,
                   whole ? 2 * o->y.stride : 0);
    if (whole) return;
    if (!o->y.col_strides) memcpy(y, into, (size_t)n);
    for (ptrdiff_t i = 0, left; o->y.col_strides && i < n; i += left) {
        char *run = y + run_at(shape, o->y.col_strides, i, &left);
        if (left > n - i) left = n - i;
        copy_strip(run, o->y.col_strides[shape->col_ndim - 1], into + i, 1, 1, left);
    }
}

/* What is left to do with a whole row of y in T, in place of it or from a room. largest: its largest
 * magnitude, which only int8 asks for, or NULL. */
#define store_row FN_OF_T(store_row)
OUTLINE void store_row(const fn_shape *shape, const fn_steps *s, ptrdiff_t row, int stream, char *y,
                       element *from, const element *largest)
{
    const fn_output *o = &s->outputs[0];
    const ptrdiff_t n = step_length(shape, s, row);
    if (s->activation) activate_strip(from, n, s->activation);
    if (stream) {
        stream_part((element *)y, from, n, shape->cols);
        return;
    }
    if (o->y.dtype == FN_I8)
        store_int8(shape, o, y, row, from, n, largest ? *largest : strip_largest(from, n));
    else if (!is_direct(&o->y))
        store_part(shape, &o->y, y, 0, from, n);
    if (s->lengths && n < shape->cols) zero_rest(shape, &o->y, y, n);
}

/* One row of one output. x: the row as the prologue left it, or, where a mask packed it, NULL. */
#define write_output FN_OF_T(write_output)
static void write_output(const fn_shape *shape, const fn_steps *s, workspace *space, ptrdiff_t k,
                         ptrdiff_t row, const element *x, const row_stats *stats, int scaled)
{
    element x_room[PIECE], strip[PIECE];
    unsigned char mask_room[PIECE];
    const fn_output *o = &s->outputs[k];
    const finished f = {
        .w = parameter(shape, s, space, &o->weight, 2 * k, s->offset, row),
        .b = parameter(shape, s, space, &o->bias, 2 * k + 1, 0, row),
        .stats = stats,
        .scaled = scaled,
        .round_first = s->round_before_weight && o->y.dtype != FN_OWN_TYPE && o->y.dtype != FN_I8,
        .dtype = o->y.dtype,
        .activation = s->activation,
    };
    const char *from = step_row_at(shape, s, &s->x, row);
    char *y = step_row_at(shape, s, &o->y, row);
    const unsigned char *mask = s->mask.data ? row_at(shape, &s->mask, row) : NULL;
    const int direct = is_direct(&o->y), to_int8 = o->y.dtype == FN_I8;
    const ptrdiff_t n = step_length(shape, s, row);
    for (ptrdiff_t i = 0, m; i < n; i += m) {
        const ptrdiff_t at = i < space->tile ? i : i % space->tile, rest = space->tile - at;
        m = n - i < rest ? n - i : rest;
        m = m < PIECE ? m : PIECE;
        element *to = to_int8 ? space->result + i : direct ? (element *)y + i : strip;
        finish_strip(&f, x ? x + i : part(shape, &s->x, from, i, m, x_room), to, at, m);
        if (mask) keep_strip(to, mask_part(shape, &s->mask, mask, i, m, mask_room), m);
        if (!direct && !to_int8) store_part(shape, &o->y, y, i, to, m);
    }
    if (to_int8)
        store_int8(shape, o, y, row, space->result, n, strip_largest(space->result, n));
    if (!s->starts && n < shape->cols) zero_rest(shape, &o->y, y, n);
}

/* One row of every output, and its statistics. */
#define epilogue FN_OF_T(epilogue)
OUTLINE void epilogue(const fn_shape *shape, const fn_steps *s, workspace *space, ptrdiff_t row,
                      const element *x, const row_stats *stats, int scaled)
{
    for (ptrdiff_t k = 0; k < s->output_count; k++)
        write_output(shape, s, space, k, row, s->mask.data ? NULL : x, stats, scaled);
}
