/* parallel.c: how rows are split over threads, how many threads there are, and what a fork does.
 *
 * Kernels take a range of rows and know nothing of this file. How the rows are cut changes no bit:
 * forward results belong to one row, and backward's sums over rows are cut into blocks of
 * FN_BACKWARD_ROWS rows and folded in one fixed tree (below). */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "split.h"

#ifdef _OPENMP
#include <omp.h>
#endif

/* ---- how many threads there may be ------------------------------------------------------------ */

static atomic_int requested, quota, partition;
/* Threads at work in calls that are running now, in the whole process. */
static atomic_int busy;
#ifdef _OPENMP
static _Thread_local int owns_a_team;
#endif

int fn_openmp(void)
{
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

void fn_set_cpu_quota(int cpus) { quota = cpus; }
int fn_cpu_quota(void) { return quota; }
void fn_set_num_threads(int threads) { requested = threads; }
int fn_requested_threads(void) { return requested; }
void fn_force_partition(int parts) { partition = parts; }

int fn_cpu_affinity(void)
{
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (int)online : 1;
}

static int least(int a, int b) { return b > 0 && b < a ? b : a; }

int fn_openmp_limit(void)
{
#ifdef _OPENMP
    return omp_in_parallel() ? 1 : omp_get_max_threads();
#else
    return 1;
#endif
}

/* The system is asked last, and only where its answer counts: asking takes 0.4 us. */
int fn_max_threads(void)
{
    const int most = least(least(fn_openmp_limit(), quota), requested);
    return most > 1 ? least(most, fn_cpu_affinity()) : most;
}

/* ---- fork ------------------------------------------------------------------------------------- */

/* libgomp keeps its idle threads in a pool that a forked child inherits without the threads, and
 * then waits for them for ever. Letting the pool go before the fork lets the child, and the parent,
 * make a new one. Only the thread that forks lives on in the child, so only its pool counts. */
#ifdef _OPENMP
static void before_fork(void)
{
    if (owns_a_team && !omp_in_parallel()) omp_pause_resource_all(omp_pause_hard);
    owns_a_team = 0;
}

/* What other threads had at work stays behind with them. */
static void in_child(void) { busy = 0; }

/* When the library is loaded: a handler that is registered while a fork is under way does not run in
 * its child. */
__attribute__((constructor)) static void register_fork_handlers(void)
{
    pthread_atfork(before_fork, NULL, in_child);
}
#endif

/* ---- the split -------------------------------------------------------------------------------- */

typedef struct {
    void (*work)(void *context, int part, ptrdiff_t first, ptrdiff_t end);
    void *context;
    ptrdiff_t units;
    int parts;
} fn_split;

static void run_part(const fn_split *split, int part)
{
    const ptrdiff_t share = split->units / split->parts, extra = split->units % split->parts;
    const ptrdiff_t first = share * part + (part < extra ? part : extra);
    split->work(split->context, part, first, first + share + (part < extra));
}

/* Units are cut into `parts` even ranges. Parts and threads are the same unless a test forces a
 * partition on a machine with fewer cores. */
static void run_split(const fn_split *split, int threads)
{
#ifdef _OPENMP
    if (threads > 1) {
        owns_a_team = 1;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int part = 0; part < split->parts; part++) run_part(split, part);
        return;
    }
#endif
    (void)threads;
    for (int part = 0; part < split->parts; part++) run_part(split, part);
}

/* Calls that run at the same time share the CPUs: a call takes as many threads as are left, and its
 * own at the least. */
static int take_threads(int wanted)
{
    int at_work = atomic_load_explicit(&busy, memory_order_relaxed);
    for (;;) {
        const int left = partition > 0 ? wanted : wanted - at_work;
        const int taken = left > 1 ? left : 1;
        if (atomic_compare_exchange_weak(&busy, &at_work, at_work + taken)) return taken;
    }
}

static void give_back_threads(int taken) { atomic_fetch_sub(&busy, taken); }

static int forced_parts(ptrdiff_t units)
{
    return partition > 0 && units > 0 ? (int)(partition < units ? partition : units) : 0;
}

/* ---- what a call costs, and what it is worth --------------------------------------------------- */

/* A second thread pays from about this many bytes: waking it takes some 2 to 10 us, in which one
 * core moves 100 to 200 KB between registers and the L2 cache. */
#define BYTES_A_THREAD ((ptrdiff_t)1 << 19)

/* With steps there is more to do a row, and the CPU by itself fetches more of it from its last cache;
 * from memory, what is asked for is best spread over all that is done. */
#define STEP_FETCH_BYTES ((ptrdiff_t)4 << 20)
#define SPREAD_FETCH_BYTES ((ptrdiff_t)32 << 20)

/* Calls that move this much find little of x in any cache. */
#define MEMORY_BYTES ((ptrdiff_t)64 << 20)

static int fetch_of(int has_steps, ptrdiff_t bytes)
{
    if (has_steps && bytes >= SPREAD_FETCH_BYTES) return FN_FETCH_BETWEEN_PASSES;
    return bytes >= (has_steps ? STEP_FETCH_BYTES : FETCH_BYTES) ? FN_FETCH_IN_PASSES : FN_NO_FETCH;
}

int fn_planned_threads(ptrdiff_t bytes, ptrdiff_t units, int threads)
{
    const int parts = forced_parts(units);
    if (parts) return parts;
    const ptrdiff_t worth = bytes / BYTES_A_THREAD;
    if (worth < 2 || units < 2 || threads == 1) return 1;
    ptrdiff_t most = least(fn_max_threads(), threads);
    if (most > worth) most = worth;
    return (int)(most < units ? most : units);
}

static ptrdiff_t elements_of(const fn_shape *shape, const fn_steps *s)
{
    return s && s->starts ? s->starts[shape->rows] - s->starts[0] : shape->rows * shape->cols;
}

static int worth_streaming(const fn_shape *shape, const fn_steps *s, const fn_rows *y, int warm,
                           fn_dtype dtype)
{
    const ptrdiff_t bytes = elements_of(shape, s) * fn_size_of(dtype);
    return y->data && warm && bytes >= STREAM_BYTES &&
           bytes >= shape->rows * STREAM_ROW_BYTES(bytes) &&
           (uintptr_t)y->data % (uintptr_t)fn_size_of(dtype) == 0;
}

/* Columns are written by strips of many rows, so their length is of no account. */
static int worth_streaming_columns(const fn_layer_norm_args *a, fn_dtype dtype)
{
    const fn_rows *y = &a->steps->outputs[0].y;
    const ptrdiff_t bytes = a->shape.rows * a->shape.cols * fn_size_of(dtype);
    return a->y_is_warm && bytes >= STREAM_BYTES && y->dtype == dtype && !a->steps->activation;
}

/* ---- calls with steps ------------------------------------------------------------------------- */

/* What they read and write, less the parameters: of packed rows what there is of them, of others
 * all that they may have. */
static ptrdiff_t step_bytes(const fn_shape *shape, const fn_steps *s)
{
    const ptrdiff_t elements = elements_of(shape, s);
    const fn_rows *arrays[] = {&s->x, &s->residual, &s->sum};
    ptrdiff_t bytes = 0;
    for (int i = 0; i < 3; i++)
        if (arrays[i]->data) bytes += elements * fn_size_of(arrays[i]->dtype);
    for (ptrdiff_t i = 0; i < s->output_count; i++)
        if (s->outputs[i].y.data) bytes += elements * fn_size_of(s->outputs[i].y.dtype);
    return bytes;
}

/* Fewer rows side by side than this are cheaper to gather one at a time. */
#define LEAST_COLUMNS 8

static int side_by_side(const fn_shape *shape, const fn_rows *rows)
{
    return rows->col_strides && rows->stride == fn_size_of(rows->dtype) &&
           (rows->outer_strides || !shape->outer_ndim);
}

static int is_common(const fn_shape *shape, const fn_rows *rows)
{
    if (!rows->data) return 1;
    for (ptrdiff_t d = 0; d < shape->outer_ndim; d++)
        if (rows->outer_strides && rows->outer_strides[d]) return 0;
    return rows->stride == 0 && !rows->col_strides;
}

/* Of calls with steps: rows of one output in T, large enough and warm, may be written past the
 * cache, straight from the affine pass, or, where another step follows it, from a room. (Not packed
 * rows whose parameters repeat: they go by tiles.) */
static int step_streams(const fn_layer_norm_args *a, fn_dtype dtype)
{
    const fn_steps *s = a->steps;
    const fn_output *o = &s->outputs[0];
    return s->output_count == 1 && o->y.dtype == dtype && !o->y.col_strides &&
           !(s->starts && s->param_cols) &&
           worth_streaming(&a->shape, s, &o->y, a->y_is_warm, dtype);
}

static int has_late_steps(const fn_steps *s) { return s->activation || s->mask.data; }

/* What comes from a room or through a mask is written by whole lines: rows must begin with one, as
 * packed rows do not. */
static int streams_from_rooms(const fn_layer_norm_args *a, fn_dtype dtype)
{
    if (!step_streams(a, dtype) || !has_late_steps(a->steps) || a->steps->starts) return 0;
    const fn_rows *y = &a->steps->outputs[0].y;
    return (a->shape.cols <= FN_GROUP_COLS || !a->steps->activation) && !y->outer_strides &&
           y->stride % 64 == 0 && (uintptr_t)y->data % 64 == 0;
}

/* Whether rows lie side by side, and nothing is asked that looks along a row but the statistics. */
static int in_columns(const fn_layer_norm_args *a)
{
    const fn_steps *s = a->steps;
    const ptrdiff_t inner = a->shape.outer_ndim ? a->shape.inner : a->shape.rows;
    if (!s || s->residual.data || s->gate.data || s->linear_bias.data || s->sum.data ||
        s->mask.data || s->lengths || s->starts || s->output_count != 1 || s->round_before_weight)
        return 0;
    const fn_output *o = &s->outputs[0];
    return inner >= LEAST_COLUMNS && o->y.dtype != FN_I8 && side_by_side(&a->shape, &s->x) &&
           side_by_side(&a->shape, &o->y) && is_common(&a->shape, &o->weight) &&
           is_common(&a->shape, &o->bias);
}

/* As op_layer_norm.h chooses. */
static const char *regime_of(const fn_layer_norm_args *a, fn_dtype dtype, int stream)
{
    const fn_shape *shape = &a->shape;
    if (stream) return "stream";
    if (shape->cols <= fn_active_isa->narrow_cols[dtype] && shape->rows >= 8 &&
        !shape->outer_ndim && !a->steps && !a->rms)
        return "narrow";
    const int has_groups = fn_active_isa->narrow_cols[dtype] > 0; /* not without vectors */
    return has_groups && shape->cols <= 1024 && shape->rows > 1 ? "group" : "row";
}

fn_plan fn_plan_layer_norm(const fn_layer_norm_args *a, fn_dtype dtype, int threads)
{
    const ptrdiff_t bytes = 2 * a->shape.rows * a->shape.cols * fn_size_of(dtype);
    fn_plan plan = {.bytes = a->steps ? step_bytes(&a->shape, a->steps) : bytes};
    plan.threads = fn_planned_threads(plan.bytes, a->shape.rows, threads);
    if (in_columns(a)) {
        plan.stream = worth_streaming_columns(a, dtype);
        plan.regime = "columns";
    } else {
        plan.stream = a->steps ? step_streams(a, dtype) && !has_late_steps(a->steps)
                               : worth_streaming(&a->shape, NULL, &a->y, a->y_is_warm, dtype);
        plan.regime = regime_of(a, dtype, plan.stream);
    }
    return plan;
}

fn_plan fn_plan_moments(const fn_moments_args *a, fn_dtype dtype, int threads)
{
    const ptrdiff_t bytes = a->steps ? step_bytes(&a->shape, a->steps)
                                     : a->shape.rows * a->shape.cols * fn_size_of(dtype);
    return (fn_plan){.threads = fn_planned_threads(bytes, a->shape.rows, threads),
                     .regime = "row",
                     .bytes = bytes};
}

static ptrdiff_t backward_blocks(ptrdiff_t rows)
{
    return (rows + FN_BACKWARD_ROWS - 1) / FN_BACKWARD_ROWS;
}

fn_plan fn_plan_layer_norm_backward(const fn_layer_norm_backward_args *a, fn_dtype dtype,
                                    int threads)
{
    const ptrdiff_t arrays = a->dx.data ? 3 : 2;
    const ptrdiff_t bytes = arrays * elements_of(&a->shape, a->steps) * fn_size_of(dtype);
    /* By whole lines only where rows begin with one. */
    const int aligned = (uintptr_t)a->dx.data % 64 == 0 && a->dx.stride % 64 == 0 &&
                        !a->shape.outer_ndim && !a->steps;
    return (fn_plan){.threads = fn_planned_threads(bytes, backward_blocks(a->shape.rows), threads),
                     .stream = aligned &&
                               worth_streaming(&a->shape, NULL, &a->dx, a->dx_is_warm, dtype),
                     .regime = a->shape.rows > 1 && !a->steps ? "group" : "row",
                     .bytes = bytes};
}

/* ---- layer_norm and moments: rows are independent ---------------------------------------------- */

/* Scratch up to this size lies on each thread's stack. */
#define STACK_SCRATCH ((size_t)16 << 10)

typedef struct {
    fn_row_kernel *kernel;
    const void *args;
    size_t scratch_bytes; /* of a part, a multiple of 64 */
    char *scratch;        /* of all parts; NULL where stacks serve */
} fn_rowwise;

static __attribute__((noinline)) void run_on_stack(const fn_rowwise *call, ptrdiff_t first,
                                                   ptrdiff_t end)
{
    _Alignas(64) char scratch[STACK_SCRATCH];
    call->kernel(call->args, first, end, scratch);
}

static void rowwise_work(void *context, int part, ptrdiff_t first, ptrdiff_t end)
{
    const fn_rowwise *call = context;
    if (!call->scratch_bytes)
        call->kernel(call->args, first, end, NULL);
    else if (!call->scratch)
        run_on_stack(call, first, end);
    else
        call->kernel(call->args, first, end, call->scratch + (size_t)part * call->scratch_bytes);
}

/* Memory for `parts` parts of so many bytes, at a cache line; *block is what to free. */
static char *take_scratch(size_t bytes, int parts, void **block)
{
    *block = bytes < SIZE_MAX / 2 / (size_t)parts ? malloc(bytes * (size_t)parts + 64) : NULL;
    return *block ? (char *)*block + (64 - (uintptr_t)*block % 64) : NULL;
}

static size_t scratch_of(const fn_shape *shape, const fn_steps *steps, fn_dtype dtype, int backward)
{
    if (!steps) return 0;
    if (shape->cols > PTRDIFF_MAX / 256 / (steps->output_count + 1)) return SIZE_MAX;
    return (fn_scratch_bytes(shape, steps, fn_size_of(dtype), backward) + 63) / 64 * 64;
}

static int run_parts(fn_rowwise *call, ptrdiff_t rows, int parts)
{
    void *block = NULL;
    if (call->scratch_bytes > STACK_SCRATCH) {
        call->scratch = take_scratch(call->scratch_bytes, parts, &block);
        if (!call->scratch) return FN_NO_MEMORY;
    }
    const fn_split split = {rowwise_work, call, rows, parts};
    run_split(&split, parts);
    free(block);
    return FN_OK;
}

int fn_run_rowwise(fn_row_kernel *kernel, const void *args, ptrdiff_t rows, int threads,
                   size_t scratch_bytes)
{
    fn_rowwise call = {kernel, args, scratch_bytes, NULL};
    if (threads == 1 && !scratch_bytes) {
        kernel(args, 0, rows, NULL);
        return FN_OK;
    }
    if (threads == 1) return run_parts(&call, rows, 1);
    const int taken = take_threads(threads);
    const int status = run_parts(&call, rows, taken);
    give_back_threads(taken);
    return status;
}

int fn_layer_norm(fn_layer_norm_args *args, fn_dtype dtype, int threads)
{
    const fn_plan plan = fn_plan_layer_norm(args, dtype, threads);
    args->stream = plan.stream;
    args->from_memory = plan.bytes >= MEMORY_BYTES;
    args->fetch = args->shape.outer_ndim ? FN_NO_FETCH : fetch_of(args->steps != NULL, plan.bytes);
    args->stream_rooms = !in_columns(args) && args->steps && streams_from_rooms(args, dtype);
    fn_row_kernel *kernel = in_columns(args) ? fn_active_isa->layer_norm_columns[dtype]
                                             : fn_active_isa->layer_norm[dtype];
    return fn_run_rowwise(kernel, args, args->shape.rows, plan.threads,
                          scratch_of(&args->shape, args->steps, dtype, 0));
}

int fn_moments(fn_moments_args *args, fn_dtype dtype, int threads)
{
    const fn_plan plan = fn_plan_moments(args, dtype, threads);
    return fn_run_rowwise(fn_active_isa->moments[dtype], args, args->shape.rows, plan.threads,
                          scratch_of(&args->shape, args->steps, dtype, 0));
}

/* ---- layer_norm_backward: sums over rows -------------------------------------------------------
 *
 * Rows are cut into blocks of FN_BACKWARD_ROWS; block b is the leaf b of a binary tree, in which
 * node i of a level is the sum of nodes 2i and 2i + 1 of the level below. A part keeps the nodes it
 * could not yet pair, like the digits of a binary counter, so that it needs O(log rows) of them. At
 * the end all parts' nodes are paired in order, and what has no partner is added from the right.
 * Which sums are formed depends on the number of rows alone. */

typedef struct {
    ptrdiff_t index;
    int level;
    double *sums; /* dweight, then dbias */
} fn_node;

typedef struct {
    fn_node *nodes;
    int count;
    double *storage; /* room for the sums of every node of this part */
    void *run[2];    /* one block's dweight and dbias, in the rows' type */
} fn_part_sums;

/* How many elements dweight and dbias have. */
static ptrdiff_t sums_cols(const fn_layer_norm_backward_args *a)
{
    return a->steps && a->steps->param_cols ? a->steps->param_cols : a->shape.cols;
}

typedef struct {
    const fn_layer_norm_backward_args *args;
    fn_dtype dtype;
    fn_part_sums *parts; /* NULL: dx alone is wanted */
    size_t scratch_bytes;
    char *scratch;
} fn_backward_call;

static int digits(ptrdiff_t n)
{
    int count = 0;
    for (; n; n >>= 1) count++;
    return count;
}

/* The last node joins its left neighbour for as long as the two have one parent. */
static void pair_up(fn_node *nodes, int *count, ptrdiff_t doubles)
{
    while (*count > 1) {
        fn_node *left = &nodes[*count - 2], *right = &nodes[*count - 1];
        if (left->level != right->level || left->index + 1 != right->index || left->index % 2)
            return;
        fn_active_isa->widen_add[FN_F64](left->sums, right->sums, doubles, 1);
        left->index /= 2;
        left->level++;
        (*count)--;
    }
}

static void backward_work(void *context, int part, ptrdiff_t first, ptrdiff_t end)
{
    const fn_backward_call *call = context;
    const fn_layer_norm_backward_args *a = call->args;
    const ptrdiff_t n = sums_cols(a);
    void *scratch = call->scratch ? call->scratch + (size_t)part * call->scratch_bytes : NULL;
    fn_part_sums none = {0}, *sums = call->parts ? &call->parts[part] : &none;
    for (ptrdiff_t block = first; block < end; block++) {
        const ptrdiff_t row0 = block * FN_BACKWARD_ROWS;
        const ptrdiff_t rest = a->shape.rows - row0;
        const ptrdiff_t rows = rest < FN_BACKWARD_ROWS ? rest : FN_BACKWARD_ROWS;
        fn_active_isa->layer_norm_backward[call->dtype](a, row0, row0 + rows, sums->run[0],
                                                        sums->run[1], scratch);
        if (!sums->nodes) continue; /* dx alone */
        double *node = sums->storage + 2 * n * sums->count;
        for (int k = 0; k < 2; k++)
            fn_active_isa->widen_add[call->dtype](node + k * n, sums->run[k], n, 0);
        sums->nodes[sums->count++] = (fn_node){block, 0, node};
        pair_up(sums->nodes, &sums->count, 2 * n);
    }
}

static void fold_parts(const fn_backward_call *call, int parts, fn_node *all)
{
    const ptrdiff_t n = sums_cols(call->args);
    int count = 0;
    for (int part = 0; part < parts; part++)
        for (int k = 0; k < call->parts[part].count; k++) {
            all[count++] = call->parts[part].nodes[k];
            pair_up(all, &count, 2 * n);
        }
    for (; count > 1; count--)
        fn_active_isa->widen_add[FN_F64](all[count - 2].sums, all[count - 1].sums, 2 * n, 1);
    void *results[2] = {call->args->dweight, call->args->dbias};
    for (int k = 0; k < 2; k++)
        if (results[k]) fn_active_isa->narrow[call->dtype](results[k], all[0].sums + k * n, n);
}

/* One block of memory, taken before anything is written: for each part its run, its nodes' sums and
 * its nodes, then room for all nodes together. A part that starts at block 0 holds one node a level,
 * another may hold two. */
static void *lay_out(fn_backward_call *call, int parts, ptrdiff_t blocks, fn_node **all)
{
    const size_t n = (size_t)sums_cols(call->args), size = (size_t)fn_size_of(call->dtype);
    const size_t nodes = (size_t)digits(blocks) * (parts > 1 ? 2 : 1) + 1;
    const size_t run_bytes = (2 * n * size + 63) / 64 * 64;
    const size_t sums_bytes = nodes * 2 * n * sizeof(double);
    const size_t part_bytes =
        (run_bytes + sums_bytes + nodes * sizeof(fn_node) + sizeof(fn_part_sums) + 63) / 64 * 64;
    char *memory = malloc((size_t)parts * (part_bytes + nodes * sizeof(fn_node)) + 64);
    if (!memory) return NULL;
    char *at = memory + (64 - (uintptr_t)memory % 64);
    call->parts = (fn_part_sums *)(at + (size_t)parts * (run_bytes + sums_bytes));
    fn_node *node = (fn_node *)(call->parts + parts);
    for (int part = 0; part < parts; part++, at += run_bytes + sums_bytes, node += nodes)
        call->parts[part] = (fn_part_sums){.nodes = node,
                                           .storage = (double *)(at + run_bytes),
                                           .run = {at, at + n * size}};
    *all = node;
    return memory;
}

/* One block: its sums are the result. What is not asked for goes to memory that is thrown away. */
static int backward_of_one_block(fn_backward_call *call)
{
    const fn_layer_norm_backward_args *a = call->args;
    const size_t bytes = (size_t)(sums_cols(a) * fn_size_of(call->dtype));
    void *unwanted = NULL;
    if (!a->shape.rows) {
        if (a->dweight) memset(a->dweight, 0, bytes);
        if (a->dbias) memset(a->dbias, 0, bytes);
        return FN_OK;
    }
    if (!a->dweight != !a->dbias) {
        unwanted = malloc(bytes);
        if (!unwanted) return FN_NO_MEMORY;
    }
    fn_active_isa->layer_norm_backward[call->dtype](a, 0, a->shape.rows,
                                                    a->dweight ? a->dweight : unwanted,
                                                    a->dbias ? a->dbias : unwanted, call->scratch);
    free(unwanted);
    return FN_OK;
}

static void split_backward(fn_backward_call *call, ptrdiff_t blocks, int parts, int threads)
{
    const fn_split split = {backward_work, call, blocks, parts};
    run_split(&split, threads);
}

static int backward_of_blocks(fn_backward_call *call, ptrdiff_t blocks, int threads)
{
    fn_node *all;
    if (!call->args->dweight && !call->args->dbias) {
        split_backward(call, blocks, threads, threads);
        return FN_OK;
    }
    void *memory = lay_out(call, threads, blocks, &all);
    if (!memory) return FN_NO_MEMORY;
    split_backward(call, blocks, threads, threads);
    fold_parts(call, threads, all);
    free(memory);
    return FN_OK;
}

static int backward_with_scratch(const fn_layer_norm_backward_args *args, fn_dtype dtype,
                                 ptrdiff_t blocks, int threads)
{
    void *block = NULL;
    fn_backward_call call = {.args = args, .dtype = dtype};
    call.scratch_bytes = scratch_of(&args->shape, args->steps, dtype, 1);
    if (call.scratch_bytes) {
        call.scratch = take_scratch(call.scratch_bytes, threads, &block);
        if (!call.scratch) return FN_NO_MEMORY;
    }
    const int status = blocks <= 1 ? backward_of_one_block(&call)
                                   : backward_of_blocks(&call, blocks, threads);
    free(block);
    return status;
}

int fn_layer_norm_backward(fn_layer_norm_backward_args *args, fn_dtype dtype, int threads)
{
    if (!args->dx.data && !args->dweight && !args->dbias) return FN_OK;
    const fn_plan plan = fn_plan_layer_norm_backward(args, dtype, threads);
    const ptrdiff_t blocks = backward_blocks(args->shape.rows);
    args->stream = plan.stream;
    args->fetch = plan.bytes >= FETCH_BYTES && !args->shape.outer_ndim;
    if (plan.threads == 1 || blocks <= 1) return backward_with_scratch(args, dtype, blocks, 1);
    const int taken = take_threads(plan.threads);
    const int status = backward_with_scratch(args, dtype, blocks, taken);
    give_back_threads(taken);
    return status;
}
