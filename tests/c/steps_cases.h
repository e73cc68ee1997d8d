/* steps_cases.h: the cases of checksums.c that have steps, named by the public op that asks for
 * them: storage types, addends, masks, lengths, packed rows, parameters of rows' own, activations,
 * int8, backward; each in layouts and ways that must not matter. */
#include "inputs.h"

/* What a call asks for besides its op; these combine. */
enum {
    RMS = 1 << 0,
    OFFSET = 1 << 1,
    ROUND_FIRST = 1 << 2,
    RESIDUAL = 1 << 3,
    OTHER_RESIDUAL = 1 << 4, /* of another type than x */
    GATE = 1 << 5,
    LINEAR_BIAS = 1 << 6,
    UNROUNDED = 1 << 7,
    LENGTHS = 1 << 8,
    MASK = 1 << 9,
    PACKED_ROWS = 1 << 10,
    OWN = 1 << 11, /* parameters for each row */
    THREE = 1 << 12,
    TO_OTHER = 1 << 13, /* y of another type than x */
    TO_INT8 = 1 << 14,
    FROM_OUTPUT = 1 << 15
};

typedef struct {
    const char *op, *name;
    int asks;
    fn_activation activation;
} recipe;

static const recipe recipes[] = {
    {"layer_norm", "plain", 0, 0},
    {"layer_norm", "other-silu", TO_OTHER, FN_SILU},
    {"layer_norm", "int8", TO_INT8, 0},
    {"layer_norm", "own-relu", OWN, FN_RELU},
    {"layer_norm", "lengths-gelu", LENGTHS, FN_GELU},
    {"layer_norm", "mask", MASK | TO_OTHER, 0},
    {"layer_norm", "mask-int8", MASK | TO_INT8, 0},
    {"rms_norm", "gelu_tanh", RMS, FN_GELU_TANH},
    {"rms_norm", "first", RMS | OFFSET | ROUND_FIRST, 0},
    {"rms_norm", "mask", RMS | MASK, 0},
    {"add_layer_norm", "rounded", RESIDUAL, 0},
    {"add_layer_norm", "unrounded", RESIDUAL | LINEAR_BIAS | UNROUNDED, 0},
    {"add_layer_norm", "other", RESIDUAL | OTHER_RESIDUAL | LINEAR_BIAS, 0},
    {"add_rms_norm", "int8", RMS | OFFSET | RESIDUAL | TO_INT8, 0},
    {"adaptive_layer_norm", "gate", RESIDUAL | GATE | OWN | OFFSET, 0},
    {"parallel_layer_norm", "three", THREE, 0},
    {"segment_layer_norm", "silu", PACKED_ROWS, FN_SILU},
    {"segment_layer_norm", "int8", PACKED_ROWS | TO_INT8, 0},
    {"segment_rms_norm", "offset", RMS | PACKED_ROWS | OFFSET, 0},
    {"layer_norm_backward", "plain", 0, 0},
    {"layer_norm_backward", "lengths", LENGTHS, 0},
    {"layer_norm_backward", "mask", MASK, 0},
    {"layer_norm_backward", "from-output", FROM_OUTPUT, 0},
    {"rms_norm_backward", "offset", RMS | OFFSET, 0},
    {"rms_norm_backward", "from-output", RMS | FROM_OUTPUT | LENGTHS, 0},
    {"adaptive_layer_norm_backward", "own", OWN | OFFSET, 0},
    {"segment_layer_norm_backward", "plain", PACKED_ROWS, 0},
    {"segment_rms_norm_backward", "offset", RMS | PACKED_ROWS | OFFSET, 0},
    {"moments", "plain", 0, 0},
};

/* Dimensions: outer and inner rows, outer and inner elements of a row. */
static const ptrdiff_t step_shapes[][4] = {
    {1, 1, 1, 1},    {1, 9, 7, 1},    {2, 70, 2, 3},   {3, 9, 16, 4},
    {1, 8, 10, 103}, {1, 2, 15, 140}, {1, 135, 17, 6},
};

enum { MOST_ROWS = 140 };

typedef struct {
    const recipe *recipe;
    const ptrdiff_t *dims;
    ptrdiff_t rows, cols;
    fn_dtype dtype, compute;
    block x, residual, dy, mask, mean, rstd;
    ptrdiff_t lengths[MOST_ROWS], starts[MOST_ROWS + 1];
} step_case;

/* ---- ways ------------------------------------------------------------------------------------ */

enum { COMPACT, APART, SIDE_BY_SIDE, CHANNELS_FIRST, SHUFFLED };

typedef struct {
    const char *name;
    int layout;
    ptrdiff_t gap;
    size_t offset;
    int alone, parts, wide, in_place;
} step_way;

static const step_way step_ways[] = {
    {.name = "as it is"},
    {.name = "with gaps", .gap = 3, .offset = 8},
    {.name = "elements apart", .layout = APART},
    {.name = "side by side", .layout = SIDE_BY_SIDE, .offset = 40},
    {.name = "channels first", .layout = CHANNELS_FIRST, .gap = 1},
    {.name = "shuffled", .layout = SHUFFLED, .offset = 8, .parts = 2},
    {.name = "a row at a time", .alone = 1},
    {.name = "in 3 parts", .parts = 3},
    {.name = "converted before", .wide = 1},
    {.name = "in place", .offset = 24, .in_place = 1},
};

enum { STEP_WAYS = sizeof step_ways / sizeof *step_ways };

static int is_backward(const step_case *c) { return strstr(c->recipe->op, "backward") != NULL; }

static int can_run(const step_case *c, const step_way *w)
{
    if (c->recipe->asks & PACKED_ROWS && (w->layout != COMPACT || w->gap)) return 0;
    return !(w->alone && is_backward(c)); /* sums over rows are not one row's */
}

/* ---- arrays of a layout ---------------------------------------------------------------------- */

typedef struct {
    fn_rows rows;
    ptrdiff_t strides[4];
} array;

typedef struct {
    char *memory[32];
    int count;
    fn_shape shape;
    fn_steps steps;
    fn_output outputs[3];
    array x, residual, sum, mask, dy, dx[2], y[3];
    char *mean, *rstd, *sums[4];
} step_call;

static char *take(step_call *k, ptrdiff_t bytes, size_t offset)
{
    const block b = new_block((size_t)bytes, offset);
    k->memory[k->count++] = b.memory;
    return b.data;
}

static void make(array *a, step_call *k, const step_case *c, const step_way *w, fn_dtype dtype)
{
    static const int orders[][4] = {
        [COMPACT] = {3, 2, 1, 0},        [APART] = {3, 2, 1, 0},    [SIDE_BY_SIDE] = {1, 0, 3, 2},
        [CHANNELS_FIRST] = {1, 3, 2, 0}, [SHUFFLED] = {2, 0, 3, 1},
    };
    const ptrdiff_t size = (ptrdiff_t)size_of(dtype);
    ptrdiff_t step = w->layout == APART ? 3 * size : size, bytes = size;
    for (int d = 0; d < 4; d++) {
        const int of = orders[w->layout][d];
        a->strides[of] = step;
        bytes += step * (c->dims[of] - 1);
        step = step * c->dims[of] + (d == 1 ? w->gap * size : 0);
    }
    const int packed = c->recipe->asks & PACKED_ROWS;
    if (packed) bytes = c->starts[c->rows] * size;
    a->rows = (fn_rows){.data = take(k, bytes, w->offset),
                        .stride = packed ? 0 : a->strides[1],
                        .outer_strides = k->shape.outer_ndim ? a->strides : NULL,
                        .col_strides = w->layout == COMPACT ? NULL : a->strides + 2,
                        .dtype = dtype};
}

static ptrdiff_t length_of(const step_case *c, ptrdiff_t row)
{
    return c->recipe->asks & PACKED_ROWS ? c->starts[row + 1] - c->starts[row] : c->cols;
}

static void *at(const array *a, const step_case *c, ptrdiff_t row, ptrdiff_t i)
{
    char *data = a->rows.data;
    if (c->recipe->asks & PACKED_ROWS)
        return data + (c->starts[row] + i) * (ptrdiff_t)size_of(a->rows.dtype);
    const ptrdiff_t *s = a->strides, inner = c->dims[1], run = c->dims[3];
    return data + row / inner * s[0] + row % inner * s[1] + i / run * s[2] + i % run * s[3];
}

static void fill(const array *a, const step_case *c, const block *from, fn_dtype dtype)
{
    const size_t size = size_of(dtype);
    for (ptrdiff_t r = 0; r < c->rows; r++)
        for (ptrdiff_t i = 0; i < length_of(c, r); i++) {
            const char *element = from->data + (size_t)(r * c->cols + i) * size;
            if (a->rows.dtype == dtype)
                memcpy(at(a, c, r, i), element, size);
            else
                put(at(a, c, r, i), 0, get(element, 0, dtype), a->rows.dtype);
        }
}

static uint64_t hash_array(uint64_t h, const array *a, const step_case *c)
{
    for (ptrdiff_t r = 0; r < c->rows; r++)
        for (ptrdiff_t i = 0; i < length_of(c, r); i++)
            h = hash(h, at(a, c, r, i), 1, a->rows.dtype);
    return h;
}

/* ---- a call ---------------------------------------------------------------------------------- */

static fn_rows new_parameter(step_call *k, const step_case *c, const step_way *w, uint64_t seed,
                             fn_dtype dtype)
{
    const ptrdiff_t rows = c->recipe->asks & OWN ? c->rows : 1;
    const ptrdiff_t n = c->recipe->asks & PACKED_ROWS ? c->dims[3] : c->cols;
    const ptrdiff_t stride = n * (ptrdiff_t)size_of(dtype);
    char *data = take(k, rows * stride, w->offset);
    for (ptrdiff_t r = 0; r < rows; r++)
        fill_row(data + r * stride, PLAIN, dtype, seed + (uint64_t)r, n);
    return (fn_rows){.data = data, .stride = rows > 1 ? stride : 0, .dtype = dtype};
}

static fn_dtype residual_type(const step_case *c)
{
    static const fn_dtype others[] = {FN_BF16, FN_F16, FN_BF16, FN_F32};
    return c->recipe->asks & OTHER_RESIDUAL ? others[c->dtype] : c->dtype;
}

static fn_dtype sum_type(const step_case *c)
{
    return residual_type(c) == c->dtype ? c->dtype : c->compute;
}

static fn_dtype y_type(const step_case *c)
{
    if (c->recipe->asks & TO_INT8) return FN_I8;
    if (c->recipe->asks & TO_OTHER) return c->dtype < FN_F16 ? FN_F16 : FN_F32;
    return c->dtype;
}

static void add_addends(step_call *k, const step_case *c, const step_way *w)
{
    make(&k->residual, k, c, w, w->wide ? c->compute : residual_type(c));
    fill(&k->residual, c, &c->residual, residual_type(c));
    if (w->in_place && sum_type(c) == residual_type(c))
        k->sum = k->residual;
    else
        make(&k->sum, k, c, w, sum_type(c));
    k->steps.residual = k->residual.rows;
    k->steps.sum = k->sum.rows;
    if (c->recipe->asks & GATE) k->steps.gate = new_parameter(k, c, w, 1000, FN_F16);
    if (c->recipe->asks & LINEAR_BIAS) k->steps.linear_bias = new_parameter(k, c, w, 2000, FN_BF16);
}

static void add_outputs(step_call *k, const step_case *c, const step_way *w)
{
    static const fn_dtype bias_types[] = {FN_F16, FN_BF16, FN_F32, FN_F64};
    k->steps.outputs = k->outputs;
    k->steps.output_count = c->recipe->asks & THREE ? 3 : 1;
    for (int i = 0; i < k->steps.output_count; i++) {
        if (w->in_place && y_type(c) == c->dtype && k->steps.output_count == 1)
            k->y[i] = k->x;
        else
            make(&k->y[i], k, c, w, y_type(c));
        k->outputs[i].y = k->y[i].rows;
        if (i < 2) k->outputs[i].weight = new_parameter(k, c, w, 3000u + (uint64_t)i, c->dtype);
        if (i != 1) k->outputs[i].bias = new_parameter(k, c, w, 4000u, bias_types[c->dtype]);
        k->outputs[i].scales = (float *)take(k, c->rows * 4, 0);
    }
}

/* Arrays point into the call, which therefore stays where it is. */
static void new_call(step_call *k, const step_case *c, const step_way *w)
{
    const int asks = c->recipe->asks;
    const ptrdiff_t size = (ptrdiff_t)size_of(c->compute);
    memset(k, 0, sizeof *k);
    k->shape = (fn_shape){.rows = c->rows,
                          .cols = c->cols,
                          .inner = c->dims[1],
                          .outer_ndim = w->layout >= CHANNELS_FIRST,
                          .outer_shape = c->dims,
                          .col_ndim = 2,
                          .col_shape = c->dims + 2};
    k->steps = (fn_steps){.offset = asks & OFFSET ? 1 : 0,
                          .round_sum = !(asks & UNROUNDED),
                          .round_before_weight = (asks & ROUND_FIRST) != 0,
                          .from_output = (asks & FROM_OUTPUT) != 0,
                          .activation = c->recipe->activation,
                          .lengths = asks & LENGTHS ? c->lengths : NULL,
                          .starts = asks & PACKED_ROWS ? c->starts : NULL,
                          .param_cols = asks & PACKED_ROWS ? c->dims[3] : 0};
    make(&k->x, k, c, w, w->wide ? c->compute : c->dtype);
    fill(&k->x, c, &c->x, c->dtype);
    k->steps.x = k->x.rows;
    if (asks & MASK) {
        make(&k->mask, k, c, w, FN_I8);
        fill(&k->mask, c, &c->mask, FN_I8);
        k->steps.mask = k->mask.rows;
    }
    if (asks & RESIDUAL) add_addends(k, c, w);
    add_outputs(k, c, w);
    k->mean = take(k, c->rows * size, 0);
    k->rstd = take(k, c->rows * size, 0);
}

static void free_call(step_call *k)
{
    while (k->count) free(k->memory[--k->count]);
}

static fn_rows from_row(fn_rows rows, ptrdiff_t row)
{
    if (rows.data) rows.data = (char *)rows.data + row * rows.stride;
    return rows;
}

/* `rows` rows from `row` on, which is 0 unless all arrays are compact. */
static int forward(const step_call *k, const step_case *c, ptrdiff_t row, ptrdiff_t rows)
{
    const ptrdiff_t size = (ptrdiff_t)size_of(c->compute);
    fn_steps steps = k->steps;
    fn_output outputs[3];
    for (int i = 0; i < 3; i++) {
        outputs[i].weight = from_row(k->outputs[i].weight, row);
        outputs[i].bias = from_row(k->outputs[i].bias, row);
        outputs[i].y = from_row(k->outputs[i].y, row);
        outputs[i].scales = k->outputs[i].scales ? k->outputs[i].scales + row : NULL;
    }
    fn_rows *const each[] = {&steps.x, &steps.residual, &steps.sum, &steps.mask, &steps.gate};
    for (int i = 0; i < 5; i++) *each[i] = from_row(*each[i], row);
    steps.outputs = outputs;
    if (steps.lengths) steps.lengths += row;
    if (steps.starts) steps.starts += row;
    steps.from_output = 0;
    fn_layer_norm_args args = {.shape = k->shape,
                               .x = steps.x,
                               .y = outputs[0].y,
                               .mean = c->recipe->asks & RMS ? NULL : k->mean + row * size,
                               .rstd = k->rstd + row * size,
                               .eps = 1e-5,
                               .rms = c->recipe->asks & RMS,
                               .steps = &steps};
    args.shape.rows = rows;
    return fn_layer_norm(&args, c->compute, 0);
}

static uint64_t run_forward(step_call *k, const step_case *c, const step_way *w)
{
    const ptrdiff_t step = w->alone ? 1 : c->rows;
    for (ptrdiff_t row = 0; row < c->rows; row += step)
        if (forward(k, c, row, step)) abort();
    uint64_t h = hash(ANY, k->rstd, c->rows, c->compute);
    if (!(c->recipe->asks & RMS)) h = hash(h, k->mean, c->rows, c->compute);
    if (c->recipe->asks & RESIDUAL) h = hash_array(h, &k->sum, c);
    for (int i = 0; i < k->steps.output_count; i++) {
        h = hash_array(h, &k->y[i], c);
        if (c->recipe->asks & TO_INT8) h = hash(h, k->outputs[i].scales, c->rows, FN_F32);
    }
    return h;
}

/* dx and the sums together, then each alone, which must be the same. */
static uint64_t run_backward(step_call *k, const step_case *c, const step_way *w)
{
    const int rms = c->recipe->asks & RMS;
    const ptrdiff_t n = c->recipe->asks & PACKED_ROWS ? c->dims[3] : c->cols;
    make(&k->dy, k, c, w, w->wide ? c->compute : c->dtype);
    fill(&k->dy, c, &c->dy, c->dtype);
    for (int i = 0; i < 4; i++) k->sums[i] = take(k, n * (ptrdiff_t)size_of(c->compute), 0);
    fn_layer_norm_backward_args args = {.shape = k->shape,
                                        .dy = k->dy.rows,
                                        .x = k->x.rows,
                                        .weight = k->outputs[0].weight.data,
                                        .mean = rms ? NULL : c->mean.data,
                                        .rstd = c->rstd.data,
                                        .rms = rms,
                                        .steps = &k->steps};
    fn_layer_norm_backward_args both = args, sums = args;
    for (int i = 0; i < 2; i++) make(&k->dx[i], k, c, w, c->dtype);
    both.dx = k->dx[0].rows;
    args.dx = k->dx[1].rows;
    both.dweight = k->sums[0];
    sums.dweight = k->sums[2];
    both.dbias = rms ? NULL : k->sums[1];
    sums.dbias = rms ? NULL : k->sums[3];
    if (fn_layer_norm_backward(&both, c->compute, 0) |
        fn_layer_norm_backward(&args, c->compute, 0) | fn_layer_norm_backward(&sums, c->compute, 0))
        abort();
    uint64_t h[2];
    for (int i = 0; i < 2; i++) {
        h[i] = hash_array(ANY, &k->dx[i], c);
        h[i] = hash(h[i], k->sums[2 * i], n, c->compute);
        if (!rms) h[i] = hash(h[i], k->sums[2 * i + 1], n, c->compute);
    }
    return h[0] == h[1] ? h[0] : 0;
}

static uint64_t run_step_moments(step_call *k, const step_case *c, const step_way *w)
{
    const ptrdiff_t size = (ptrdiff_t)size_of(c->compute), step = w->alone ? 1 : c->rows;
    for (ptrdiff_t row = 0; row < c->rows; row += step) {
        fn_steps steps = {.x = from_row(k->x.rows, row)};
        fn_moments_args args = {.shape = k->shape,
                                .x = steps.x,
                                .mean = k->mean + row * size,
                                .variance = k->rstd + row * size,
                                .steps = &steps};
        args.shape.rows = step;
        if (fn_moments(&args, c->compute, 0)) abort();
    }
    return hash(hash(ANY, k->mean, c->rows, c->compute), k->rstd, c->rows, c->compute);
}

static uint64_t run_step_case(const step_case *c, const step_way *w)
{
    step_call k;
    uint64_t h;
    new_call(&k, c, w);
    fn_force_partition(w->parts);
    if (is_backward(c))
        h = run_backward(&k, c, w);
    else
        h = strcmp(c->recipe->op, "moments") ? run_forward(&k, c, w) : run_step_moments(&k, c, w);
    fn_force_partition(0);
    free_call(&k);
    return h;
}

/* ---- the list -------------------------------------------------------------------------------- */

/* mean and rstd as the forward op leaves them, and its y in the place of x where that is asked. */
static void go_forward(step_case *c)
{
    step_call k;
    const size_t bytes = (size_t)c->rows * size_of(c->compute);
    new_call(&k, c, &step_ways[0]);
    if (forward(&k, c, 0, c->rows)) abort();
    memcpy(c->mean.data, k.mean, bytes);
    memcpy(c->rstd.data, k.rstd, bytes);
    if (c->recipe->asks & FROM_OUTPUT)
        memcpy(c->x.data, k.y[0].rows.data, (size_t)(c->rows * c->cols) * size_of(c->dtype));
    free_call(&k);
}

static step_case new_step_case(const recipe *asked, const ptrdiff_t *dims, fn_dtype dtype)
{
    step_case c = {.recipe = asked,
                   .dims = dims,
                   .rows = dims[0] * dims[1],
                   .cols = dims[2] * dims[3],
                   .dtype = dtype,
                   .compute = dtype == FN_F64 ? FN_F64 : FN_F32};
    const size_t size = size_of(dtype), n = (size_t)c.cols;
    const fn_dtype other = residual_type(&c);
    c.x = new_block((size_t)c.rows * n * size, 0);
    c.dy = new_block((size_t)c.rows * n * size, 0);
    c.residual = new_block((size_t)c.rows * n * size_of(other), 0);
    c.mask = new_block((size_t)c.rows * n, 0);
    c.mean = new_block((size_t)c.rows * size_of(c.compute), 0);
    c.rstd = new_block((size_t)c.rows * size_of(c.compute), 0);
    for (ptrdiff_t r = 0; r < c.rows; r++) {
        const uint64_t seed = (uint64_t)(r + c.cols), random = mix(seed);
        const size_t from = (size_t)r * n;
        fill_row(c.x.data + from * size, r % 3 ? PLAIN : MIXED, dtype, seed, c.cols);
        fill_row(c.dy.data + from * size, PLAIN, dtype, 77 + seed, c.cols);
        fill_row(c.residual.data + from * size_of(other), PLAIN, other, 777 + seed, c.cols);
        for (size_t i = 0; i < n; i++) /* every fourth row keeps all, others few or many */
            c.mask.data[from + i] = r % 4 == 3 || mix(random + i) % 8 < random % 8;
        c.lengths[r] = (ptrdiff_t)(random % (n + 1));
        c.starts[r + 1] = c.starts[r] +
                          dims[3] * (r ? (ptrdiff_t)(random % (uint64_t)(dims[2] + 1)) : dims[2]);
    }
    if (is_backward(&c)) go_forward(&c);
    return c;
}

static int run_steps(const char *isa, int brief)
{
    int failures = 0;
    for (size_t t = 0; t < sizeof recipes / sizeof *recipes; t++)
        for (size_t s = 0; s < sizeof step_shapes / sizeof *step_shapes; s++)
            for (int dtype = FN_F32; dtype <= FN_BF16; dtype++) {
                static const char *const names[] = {"f32", "f64", "f16", "bf16"};
                step_case c = new_step_case(&recipes[t], step_shapes[s], (fn_dtype)dtype);
                char name[128];
                snprintf(name, sizeof name, "%s-%s-steps-%tdx%td-%s", recipes[t].op, names[dtype],
                         c.rows, c.cols, recipes[t].name);
                uint64_t first = 0;
                for (int k = 0; k < (brief ? 1 : STEP_WAYS); k++) {
                    if (!can_run(&c, &step_ways[k])) continue;
                    const uint64_t h = run_step_case(&c, &step_ways[k]);
                    if (k == 0) first = h;
                    if (h == first && h) continue;
                    fprintf(stderr, "%s %s: other bits %s\n", isa, name,
                            h ? step_ways[k].name : "by what is asked for");
                    failures++;
                }
                const block all[] = {c.x, c.dy, c.residual, c.mask, c.mean, c.rstd};
                for (int i = 0; i < 6; i++) free(all[i].memory);
                printf("%s %s %016llx\n", isa, name, (unsigned long long)first);
            }
    return failures;
}
