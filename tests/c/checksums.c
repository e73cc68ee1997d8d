/* checksums.c: the C core without Python, for any CPU that has a compiler or an emulator.
 *
 *     checksums [--short] [isa ...]      the instruction sets named, or all that this CPU has
 *
 * prints `isa case checksum` for each of a fixed list of cases. Inputs come from integers by exact
 * steps, so equal checksums mean equal bits wherever the program runs. Each case is run in several
 * ways that must not matter (alone, in place, strided, misaligned, split, past the cache); a way
 * that changes a bit is named on stderr and the exit status is 1. --short, for slow emulators, runs
 * each case in one way only and leaves out the outputs that go past the cache. */
#include <stdio.h>

#include "inputs.h"
#include "channel_cases.h"
#include "steps_cases.h"
#include "weight_cases.h"

/* ---- arrays ---------------------------------------------------------------------------------- */

/* Rows `gap` elements apart, backwards in memory where `backwards`. */
typedef struct {
    block block;
    fn_rows rows;
} matrix;

static matrix new_matrix(ptrdiff_t rows, ptrdiff_t cols, fn_dtype dtype, size_t offset,
                         ptrdiff_t gap, int backwards)
{
    const ptrdiff_t size = (ptrdiff_t)size_of(dtype), stride = (cols + gap) * size;
    matrix m = {.block = new_block((size_t)(stride * (rows - 1) + cols * size), offset)};
    m.rows.data = m.block.data + (backwards ? stride * (rows - 1) : 0);
    m.rows.stride = backwards ? -stride : stride;
    return m;
}

static void *row_of(const fn_rows *rows, ptrdiff_t row)
{
    return (char *)rows->data + row * rows->stride;
}

/* Compact rows, made once for a case and copied for each way to run it. */
static block new_rows(int kind, fn_dtype dtype, uint64_t seed, ptrdiff_t rows, ptrdiff_t cols)
{
    const size_t bytes = (size_t)cols * size_of(dtype);
    block b = new_block((size_t)rows * bytes, 0);
    for (ptrdiff_t r = 0; r < rows; r++)
        fill_row(b.data + (size_t)r * bytes, kind, dtype, seed + (uint64_t)r, cols);
    return b;
}

static void copy_rows(const matrix *m, const block *from, ptrdiff_t rows, ptrdiff_t cols,
                      fn_dtype dtype)
{
    const size_t bytes = (size_t)cols * size_of(dtype);
    for (ptrdiff_t r = 0; r < rows; r++)
        memcpy(row_of(&m->rows, r), from->data + (size_t)r * bytes, bytes);
}

static uint64_t hash_rows(uint64_t h, const matrix *m, ptrdiff_t rows, ptrdiff_t cols,
                          fn_dtype dtype)
{
    for (ptrdiff_t r = 0; r < rows; r++) h = hash(h, row_of(&m->rows, r), cols, dtype);
    return h;
}

/* ---- cases and the ways to run them ---------------------------------------------------------- */

typedef struct {
    ptrdiff_t rows, cols;
    int kind, weight, bias;
    double eps;
    block x, dy;
} shape_case;

/* Differences that must not matter. */
typedef struct {
    const char *name;
    size_t offset;
    ptrdiff_t gap;
    int backwards, in_place, alone, parts, warm;
} way;

/* The first three are those that matter to outputs that go past the cache. */
static const way ways[] = {
    {.name = "as it is", .warm = 1},
    {.name = "fresh output"},
    {.name = "misaligned", .offset = 8, .warm = 1},
    {.name = "strided", .offset = 24, .gap = 5, .warm = 1},
    {.name = "backwards", .offset = 40, .gap = 3, .backwards = 1, .warm = 1},
    {.name = "in place", .offset = 56, .in_place = 1, .warm = 1},
    {.name = "a row at a time", .alone = 1},
    {.name = "in 2 parts", .parts = 2, .warm = 1},
    {.name = "in 7 parts", .offset = 16, .parts = 7, .warm = 1},
};

enum { WAYS = sizeof ways / sizeof *ways, STREAM_WAYS = 3 };

static int streamed; /* calls so far that wrote past the cache */

typedef uint64_t run_function(const shape_case *c, fn_dtype dtype, const way *w);

static uint64_t run_layer_norm(const shape_case *c, fn_dtype dtype, const way *w)
{
    const ptrdiff_t size = (ptrdiff_t)size_of(dtype);
    matrix x = new_matrix(c->rows, c->cols, dtype, w->offset, w->gap, w->backwards);
    matrix y = w->in_place ? x : new_matrix(c->rows, c->cols, dtype, w->offset, w->gap, 0);
    block weight = new_vector(PLAIN, dtype, 1, c->cols, w->offset);
    block bias = new_vector(PLAIN, dtype, 2, c->cols, w->offset);
    block mean = new_block((size_t)(c->rows * size), w->offset);
    block rstd = new_block((size_t)(c->rows * size), w->offset);
    copy_rows(&x, &c->x, c->rows, c->cols, dtype);
    const ptrdiff_t step = w->alone ? 1 : c->rows;
    for (ptrdiff_t row = 0; row < c->rows; row += step) {
        fn_layer_norm_args args = {.shape = {.rows = step, .cols = c->cols, .inner = 1},
                                   .x = {.data = row_of(&x.rows, row), .stride = x.rows.stride},
                                   .y = {.data = row_of(&y.rows, row), .stride = y.rows.stride},
                                   .weight = c->weight ? weight.data : NULL,
                                   .bias = c->bias ? bias.data : NULL,
                                   .mean = mean.data + row * size,
                                   .rstd = rstd.data + row * size,
                                   .eps = c->eps,
                                   .y_is_warm = w->warm};
        streamed += fn_plan_layer_norm(&args, dtype, 0).stream;
        fn_layer_norm(&args, dtype, 0);
    }
    uint64_t h = hash_rows(ANY, &y, c->rows, c->cols, dtype);
    h = hash(hash(h, mean.data, c->rows, dtype), rstd.data, c->rows, dtype);
    if (!w->in_place) free(y.block.memory);
    free(x.block.memory);
    free(weight.memory);
    free(bias.memory);
    free(mean.memory);
    free(rstd.memory);
    return h;
}

/* mean and rstd as layer_norm leaves them. */
static void saved_statistics(const shape_case *c, fn_dtype dtype, const matrix *x, void *mean,
                             void *rstd)
{
    matrix y = new_matrix(c->rows, c->cols, dtype, 0, 0, 0);
    fn_layer_norm_args args = {.shape = {.rows = c->rows, .cols = c->cols, .inner = 1},
                               .x = x->rows,
                               .y = y.rows,
                               .mean = mean,
                               .rstd = rstd,
                               .eps = c->eps};
    fn_layer_norm(&args, dtype, 0);
    free(y.block.memory);
}

/* dx, dweight and dbias together, then the sums alone and dx alone, which must be the same. */
static uint64_t run_layer_norm_backward(const shape_case *c, fn_dtype dtype, const way *w)
{
    const ptrdiff_t size = (ptrdiff_t)size_of(dtype), n = c->cols;
    matrix x = new_matrix(c->rows, n, dtype, w->offset, w->gap, w->backwards);
    matrix dy = new_matrix(c->rows, n, dtype, w->offset, 2 * w->gap, w->backwards);
    matrix dx[2] = {new_matrix(c->rows, n, dtype, w->offset, w->gap, 0),
                    new_matrix(c->rows, n, dtype, 0, 0, 0)};
    block weight = new_vector(PLAIN, dtype, 1, n, w->offset);
    block mean = new_block((size_t)(c->rows * size), w->offset);
    block rstd = new_block((size_t)(c->rows * size), w->offset);
    block sums[4];
    for (int k = 0; k < 4; k++) sums[k] = new_block((size_t)(n * size), w->offset);
    copy_rows(&x, &c->x, c->rows, n, dtype);
    copy_rows(&dy, &c->dy, c->rows, n, dtype);
    saved_statistics(c, dtype, &x, mean.data, rstd.data);
    fn_layer_norm_backward_args args = {.shape = {.rows = c->rows, .cols = n, .inner = 1},
                                        .dy = dy.rows,
                                        .x = x.rows,
                                        .dx = dx[0].rows,
                                        .weight = c->weight ? weight.data : NULL,
                                        .mean = mean.data,
                                        .rstd = rstd.data,
                                        .dweight = sums[0].data,
                                        .dbias = sums[1].data,
                                        .dx_is_warm = w->warm};
    streamed += fn_plan_layer_norm_backward(&args, dtype, 0).stream;
    int bad = fn_layer_norm_backward(&args, dtype, 0);
    args.dx.data = NULL;
    args.dweight = sums[2].data;
    args.dbias = NULL;
    bad |= fn_layer_norm_backward(&args, dtype, 0);
    args.dweight = NULL;
    args.dbias = sums[3].data;
    bad |= fn_layer_norm_backward(&args, dtype, 0);
    args.dbias = NULL;
    args.dx = dx[1].rows;
    bad |= fn_layer_norm_backward(&args, dtype, 0);
    if (bad) abort();
    uint64_t h[2];
    for (int k = 0; k < 2; k++) {
        h[k] = hash_rows(ANY, &dx[k], c->rows, n, dtype);
        h[k] = hash(h[k], sums[2 * k].data, n, dtype);
        h[k] = hash(h[k], sums[2 * k + 1].data, n, dtype);
        free(dx[k].block.memory);
    }
    for (int k = 0; k < 4; k++) free(sums[k].memory);
    free(x.block.memory);
    free(dy.block.memory);
    free(weight.memory);
    free(mean.memory);
    free(rstd.memory);
    return h[0] == h[1] ? h[0] : 0; /* 0: output masks changed a bit */
}

static uint64_t run_moments(const shape_case *c, fn_dtype dtype, const way *w)
{
    const ptrdiff_t size = (ptrdiff_t)size_of(dtype);
    matrix x = new_matrix(c->rows, c->cols, dtype, w->offset, w->gap, w->backwards);
    block mean = new_block((size_t)(c->rows * size), w->offset);
    block variance = new_block((size_t)(c->rows * size), w->offset);
    copy_rows(&x, &c->x, c->rows, c->cols, dtype);
    const ptrdiff_t step = w->alone ? 1 : c->rows;
    for (ptrdiff_t row = 0; row < c->rows; row += step) {
        fn_moments_args args = {.shape = {.rows = step, .cols = c->cols, .inner = 1},
                                .x = {.data = row_of(&x.rows, row), .stride = x.rows.stride},
                                .mean = mean.data + row * size,
                                .variance = variance.data + row * size};
        fn_moments(&args, dtype, 0);
    }
    uint64_t h = hash(ANY, mean.data, c->rows, dtype);
    h = hash(h, variance.data, c->rows, dtype);
    free(x.block.memory);
    free(mean.memory);
    free(variance.memory);
    return h;
}

/* ---- the list -------------------------------------------------------------------------------- */

#define OP_NAME(op) #op,
#define OP_RUN(op) run_##op,
#define OP_INDEX(op) INDEX_##op,
#define DTYPE_NAME(dtype) #dtype,

static const char *const op_names[] = {FN_OPS(OP_NAME)};
static run_function *const op_runs[] = {FN_OPS(OP_RUN)};
static const char *const dtype_names[] = {FN_DTYPES(DTYPE_NAME)};

enum { FN_OPS(OP_INDEX) OPS };

/* Narrow rows, one row more and less than every vector, lane count and block, several blocks, and
 * (backward) several blocks of rows. */
static const ptrdiff_t shapes[][2] = {
    {1, 1},    {9, 1},    {21, 2},    {17, 3},    {43, 4},    {11, 5},   {16, 7},   {27, 8},
    {13, 8},   {15, 15},  {34, 16},   {19, 17},   {20, 31},   {33, 32},  {34, 33},  {15, 63},
    {16, 64},  {17, 65},  {14, 127},  {9, 128},   {15, 130},  {4, 255},  {9, 256},  {5, 257},
    {6, 511},  {16, 512}, {5, 513},   {17, 768},  {9, 1023},  {9, 1024}, {5, 1025}, {3, 2047},
    {2, 2048}, {3, 2049}, {17, 4096}, {3, 16384}, {1, 70001}, {161, 33}, {513, 24}, {250, 129},
};

static int failures;

static void run_case(const char *isa, int op, fn_dtype dtype, shape_case *c, int way_count)
{
    char name[128];
    snprintf(name, sizeof name, "%s-%s-%tdx%td-%s-%s%s-eps%s", op_names[op], dtype_names[dtype],
             c->rows, c->cols, c->kind == MIXED ? "mixed" : "plain", c->weight ? "w" : "",
             c->bias ? "b" : "", c->eps > 0 ? "1e-5" : "0");
    c->x = new_rows(c->kind, dtype, ANY, c->rows, c->cols);
    c->dy = new_rows(c->kind == MIXED ? MANY_SCALES : PLAIN, dtype, 2 * ANY, c->rows, c->cols);
    uint64_t first = 0;
    for (int k = 0; k < way_count; k++) {
        fn_force_partition(ways[k].parts);
        const uint64_t h = op_runs[op](c, dtype, &ways[k]);
        fn_force_partition(0);
        if (k == 0) first = h;
        if (h == first && h) continue;
        fprintf(stderr, "%s %s: other bits %s\n", isa, name, h ? ways[k].name : "by output mask");
        failures++;
    }
    free(c->x.memory);
    free(c->dy.memory);
    printf("%s %s %016llx\n", isa, name, (unsigned long long)first);
}

static shape_case new_case(ptrdiff_t rows, ptrdiff_t cols, int kind, int parameters, double eps)
{
    return (shape_case){.rows = rows,
                        .cols = cols,
                        .kind = kind,
                        .weight = parameters & 1,
                        .bias = parameters >> 1 & 1,
                        .eps = eps};
}

static void run_shapes(const char *isa, int op, fn_dtype dtype, int way_count)
{
    for (int s = 0; s < (int)(sizeof shapes / sizeof *shapes); s++) {
        const ptrdiff_t rows = shapes[s][0], cols = shapes[s][1];
        shape_case cases[] = {
            new_case(rows, cols, PLAIN, s, 1e-5),
            new_case(rows, cols, MIXED, s + 1 + s / 4, 1e-5),
            new_case(rows, cols, MIXED, s + 2 + s / 4, 0),
        };
        for (int k = 0; k < 3; k++) run_case(isa, op, dtype, &cases[k], way_count);
    }
}

/* Outputs of more than 8 MiB go past the cache where they are warm (and dx where rows keep to cache
 * lines). */
static void run_streams(const char *isa)
{
    static const struct {
        int op;
        fn_dtype dtype;
        ptrdiff_t cols;
        int kind, parameters;
    } list[] = {
        {INDEX_layer_norm, FN_F32, 263, PLAIN, 2},
        {INDEX_layer_norm, FN_F32, 768, MIXED, 0},
        {INDEX_layer_norm, FN_F32, 770, MIXED, 3},
        {INDEX_layer_norm, FN_F64, 769, MIXED, 1},
        {INDEX_layer_norm_backward, FN_F32, 768, MIXED, 1},
    };
    for (size_t k = 0; k < sizeof list / sizeof *list; k++) {
        const ptrdiff_t row = list[k].cols * (ptrdiff_t)size_of(list[k].dtype);
        shape_case c = new_case(((ptrdiff_t)9 << 20) / row, list[k].cols, list[k].kind,
                                list[k].parameters, 1e-5);
        streamed = 0;
        run_case(isa, list[k].op, list[k].dtype, &c, STREAM_WAYS);
        if (streamed) continue;
        fprintf(stderr, "%s: an output of 9 MiB did not go past the cache\n", isa);
        failures++;
    }
}

static void run_isa(const char *isa, int brief)
{
    fn_isa_select(isa);
    for (int dtype = 0; dtype < FN_DTYPE_COUNT; dtype++)
        for (int op = 0; op < OPS; op++) run_shapes(isa, op, dtype, brief ? 1 : WAYS);
    failures += run_steps(isa, brief);
    failures += run_channels(isa, brief);
    failures += run_weights(isa, brief);
    if (brief) return;
    run_streams(isa);
    failures += run_channel_streams(isa);
}

int main(int argc, char **argv)
{
    const int brief = argc > 1 && strcmp(argv[1], "--short") == 0;
    const int named = argc - 1 - brief;
    for (int i = 1 + brief; i < argc; i++) {
        if (fn_isa_select(argv[i]) != FN_OK) {
            fprintf(stderr, "checksums: this CPU cannot run %s\n", argv[i]);
            return 2;
        }
        run_isa(argv[i], brief);
    }
    for (int i = 0; !named && i < fn_isa_count(); i++)
        if (fn_isa_supported(i)) run_isa(fn_isa_name(i), brief);
    return failures > 0;
}
