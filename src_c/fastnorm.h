/* fastnorm.h: the public C interface of the fastnorm kernels.
 *
 * The contract, for every op and every instruction set:
 *
 *   - A row's result depends on the row, the parameters and eps alone: not on the number of rows,
 *     the row's place, the number of threads, alignment, strides or the instruction set.
 *   - Kernels never allocate. Calls with steps may, for their scratch, and fn_layer_norm_backward
 *     for its sums: before anything is written, and they say so by what they return.
 *   - Nothing here checks pointers: `x` holds rows x cols readable elements, `y` as many writable
 *     ones. Checking belongs to the caller (for Python: fastnorm/_core.pyx).
 *
 * The order of every rounding is written down in row.h.
 */
#ifndef FASTNORM_H
#define FASTNORM_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- What exists: one list each, from which tables, tests and benchmarks are made ------------- */

#define FN_OPS(X) X(layer_norm) X(layer_norm_backward) X(moments)

/* What arrays hold. The first two are also what is computed in; the half types and int8 exist in
 * loads and stores only (int8 in stores only). */
#define FN_DTYPES(X) X(f32) X(f64)
typedef enum { FN_F32, FN_F64, FN_F16, FN_BF16, FN_I8 } fn_dtype;
enum { FN_DTYPE_COUNT = 2 };

enum { FN_OK = 0, FN_NO_MEMORY = 1, FN_UNKNOWN_ISA = 2, FN_UNSUPPORTED_ISA = 3 };

typedef enum { FN_NO_ACTIVATION, FN_RELU, FN_SILU, FN_GELU, FN_GELU_TANH } fn_activation;

/* ---- Arguments -------------------------------------------------------------------------------- */

/* How many rows there are, and how they are counted: row r is the r-th in C order over the outer
 * dimensions and, innermost, `inner` rows that lie one stride apart. outer_ndim == 0: one stride
 * reaches every row, and inner and outer_shape are not read. col_shape: the dimensions whose
 * elements, in C order, make a row, where an array's col_strides ask for them. */
typedef struct {
    ptrdiff_t rows, cols;
    ptrdiff_t inner;
    ptrdiff_t outer_ndim;
    const ptrdiff_t *outer_shape;
    ptrdiff_t col_ndim;
    const ptrdiff_t *col_shape;
} fn_shape;

/* One array of rows. Strides are in bytes and may be zero or negative. outer_strides == NULL: one
 * stride reaches every row of this array, whatever the others need. col_strides == NULL: the
 * `cols` elements of a row are contiguous. dtype is read where the array is a step's. */
typedef struct {
    void *data;
    ptrdiff_t stride;
    const ptrdiff_t *outer_strides;
    const ptrdiff_t *col_strides;
    fn_dtype dtype;
} fn_rows;

/* A pair of parameters and the result they make: y = xh * (weight + offset) + bias. */
typedef struct {
    fn_rows weight, bias; /* data NULL: ones, zeros */
    fn_rows y;
    float *scales; /* one a row, where y holds FN_I8 */
} fn_output;

/* What is done to a row before its statistics are formed and after it is normalised: everything
 * but the plain case, which is contiguous rows of the type that is computed in. */
typedef struct {
    /* s = (gate * x + linear_bias) + residual, in the compute type; absent where data is NULL. */
    fn_rows x, gate, linear_bias, residual;
    fn_rows sum;   /* s is written here, where data is not NULL */
    int round_sum; /* the statistics see s as `sum` holds it */
    const fn_output *outputs;
    ptrdiff_t output_count;
    ptrdiff_t param_cols; /* parameters repeat after so many elements; 0: after cols */
    double offset;
    int round_before_weight; /* xh is rounded to y's type before it is multiplied */
    int from_output;         /* backward: x holds y, xh = (y - bias) / weight */
    fn_activation activation;
    /* Rows of fewer elements than cols, the rest of y being 0: lengths[row] first ones of each, or
     * where mask is not 0 (bytes); or rows that follow one another in memory, row r from element
     * starts[r] to starts[r + 1]. */
    const ptrdiff_t *lengths, *starts;
    fn_rows mask;
} fn_steps;

/* y = (x - mean) * rstd * weight + bias. weight and bias: cols elements of x's type, or NULL;
 * mean and rstd: rows elements of x's type to be written, or NULL. y may be x itself. */
typedef struct {
    fn_shape shape;
    fn_rows x, y;
    const void *weight, *bias;
    void *mean, *rstd;
    double eps;
    int rms;               /* root mean square: the mean counts as 0 */
    int y_is_warm;         /* y's pages exist already: they may be written past the cache */
    const fn_steps *steps; /* NULL: plain. Else x, y, weight and bias are the steps' */
    /* Set by the library: whether y is written past the cache, how rows are fetched ahead (isa.h), and
     * whether x is too large for any cache. */
    int stream, fetch, from_memory;
    int stream_rooms; /* groups with steps write past the cache: straight, or from a room */
} fn_layer_norm_args;

/* dx, dweight and dbias from dy. mean and rstd: rows elements as layer_norm wrote them; weight:
 * cols elements or NULL for ones; dx.data, dweight, dbias: NULL where not wanted. With steps, dy,
 * x and dx may be of any type and layout, and steps->outputs[0] has weight and bias. */
typedef struct {
    fn_shape shape;
    fn_rows dy, x, dx;
    const void *weight, *mean, *rstd;
    void *dweight, *dbias;
    int rms;
    int dx_is_warm;
    const fn_steps *steps;
    int stream, fetch; /* set by the library */
} fn_layer_norm_backward_args;

/* Mean and population variance of each row; either may be NULL. */
typedef struct {
    fn_shape shape;
    fn_rows x;
    void *mean, *variance;
    const fn_steps *steps;
} fn_moments_args;

/* Group, instance and batch norm. A unit is what has statistics of its own: `rows` rows, row_stride
 * apart, of `planes` planes of `plane` contiguous elements, each of which has a weight and a bias. Unit u
 * begins at u * stride. Strides count elements, and hold for x, y, dy and dx alike, which may be of any
 * type that is loaded. Unit u is of kind u % kinds: a kind has its own parameters, `planes` of each, and
 * given statistics.
 *
 * step above 1: channels last. The elements of a plane lie so many apart, and side by side with those of
 * the other planes: a sample is `plane` rows of `step` channels, of step / planes units, and samples follow
 * one another. rows is 1 then; stride and row_stride are not read. */
typedef struct {
    ptrdiff_t units, stride, rows, row_stride, planes, plane, kinds, step;
} fn_channels;

/* y = (x - mean) * rstd * weight + bias. weight and bias are of the type that is computed in, or NULL.
 * mean, variance, rstd: of each unit, to be written; where they are `given`, of each kind, to be read
 * (no variance). refused: 1 for units out of range, whose y is not written and whose statistics mean
 * nothing, else 0; where statistics are given it is not used. */
typedef struct {
    fn_channels layout;
    const void *x;
    void *y;
    fn_dtype x_type, y_type;
    const void *weight, *bias;
    double *mean, *variance, *rstd;
    unsigned char *refused;
    double eps;
    int given;
    fn_activation activation;
    int y_is_warm;
    int stream; /* set by the library, as are how far to fetch ahead and what is computed in */
    ptrdiff_t fetch;
    fn_dtype dtype;
} fn_channel_norm_args;

/* dx (of x's type, or NULL) and sums: of each unit's planes dweight and dbias. given: mean and rstd are
 * each kind's and do not depend on x. */
typedef struct {
    fn_channels layout;
    const void *dy, *x;
    void *dx;
    fn_dtype dy_type, x_type;
    const void *weight;
    const double *mean, *rstd;
    double *sums;
    unsigned char *refused;
    int given;
    int dx_is_warm;
    int stream; /* set by the library, as are how far to fetch ahead and what is computed in */
    ptrdiff_t fetch;
    fn_dtype dtype;
} fn_channel_norm_backward_args;

/* Channels last, moments alone: of each channel of each sample of `rows` rows of `cols` channels: pivot,
 * shift and the sum of squared deviations from the mean, which is pivot + shift: three arrays of
 * samples x cols, one after the other. */
typedef struct {
    ptrdiff_t samples, rows, cols;
    const void *x;
    fn_dtype x_type;
    double *sums;
} fn_channels_last_moments_args;

/* Of each of `rows` rows of `cols` contiguous elements: pivot, shift and squared deviations as above,
 * `rows` numbers of each. */
typedef struct {
    ptrdiff_t rows, cols;
    const void *x;
    fn_dtype x_type;
    double *sums;
    fn_dtype dtype; /* set by the library: what is computed in */
} fn_plane_moments_args;

/* Weight norm: vectors over their norms, times g. v, dw and w have one shape, (samples, outer, kinds,
 * inner), and are contiguous; a vector is what of a sample is of one kind: outer x inner elements.
 * Forward (dw NULL): w = v*g/norm. Backward: w is dv = g/norm*(dw - v*along/norm), or NULL, and along[u]
 * is sum(dw*v)/norm. Where inner is 1 and there are several kinds, all are of the type that is computed
 * in. g: of each vector, or NULL for ones. eps: vectors whose norm is less are divided by it (unit norm); negative: none are,
 * and a vector of zeros is refused. norm: of each vector, to be written, or, where `given`, read.
 * refused: 1 for vectors out of range, of which nothing is written, else 0; in w, where it is v itself,
 * they stay as they are. */
typedef struct {
    ptrdiff_t samples, outer, kinds, inner;
    const void *v, *dw;
    void *w;
    fn_dtype v_type, dw_type, w_type;
    const void *g;
    fn_dtype g_type; /* FN_F32 or FN_F64 */
    double eps;
    double *norm, *along;
    unsigned char *refused;
    int given;
    int w_is_warm;
    int stream; /* set by the library, as are columns that go together and what is computed in */
    ptrdiff_t panel;
    fn_dtype dtype;
} fn_weight_norm_args;

/* ---- Calls: `threads` is the most that may be used; 0 leaves it to the library. dtype is what is
 * computed in, FN_F32 or FN_F64. Where there are steps, there may be no memory for their scratch:
 * then nothing has been written. --------------------------------------------------------------- */

int fn_layer_norm(fn_layer_norm_args *args, fn_dtype dtype, int threads);
int fn_layer_norm_backward(fn_layer_norm_backward_args *args, fn_dtype dtype, int threads);
int fn_moments(fn_moments_args *args, fn_dtype dtype, int threads);
int fn_channel_norm(fn_channel_norm_args *args, fn_dtype dtype, int threads);
/* 1/sqrt(variance + eps) of each, in place. */
void fn_rstds(double *variances, double eps, ptrdiff_t n);
int fn_channel_norm_backward(fn_channel_norm_backward_args *args, fn_dtype dtype, int threads);
int fn_channels_last_moments(const fn_channels_last_moments_args *args, fn_dtype dtype,
                             int threads);
int fn_plane_moments(fn_plane_moments_args *args, fn_dtype dtype, int threads);
int fn_weight_norm(fn_weight_norm_args *args, fn_dtype dtype, int threads);

/* What a call would do; `bytes` counts what it reads and writes. The calls decide by the same
 * functions. */
typedef struct {
    int threads;
    int stream;         /* non-temporal stores */
    const char *regime; /* a static string */
    ptrdiff_t bytes;
} fn_plan;

fn_plan fn_plan_layer_norm(const fn_layer_norm_args *args, fn_dtype dtype, int threads);
fn_plan fn_plan_layer_norm_backward(const fn_layer_norm_backward_args *args, fn_dtype dtype,
                                    int threads);
fn_plan fn_plan_moments(const fn_moments_args *args, fn_dtype dtype, int threads);
fn_plan fn_plan_channel_norm(const fn_channel_norm_args *args, fn_dtype dtype, int threads);
fn_plan fn_plan_channel_norm_backward(const fn_channel_norm_backward_args *args, fn_dtype dtype,
                                      int threads);
fn_plan fn_plan_weight_norm(const fn_weight_norm_args *args, fn_dtype dtype, int threads);

/* ---- Instruction sets ------------------------------------------------------------------------- */

int fn_isa_count(void);             /* how many are compiled in, best first */
const char *fn_isa_name(int index); /* NULL past the end */
int fn_isa_supported(int index);    /* whether this CPU and its OS can run it */
const char *fn_isa_active(void);
int fn_isa_select(const char *name); /* NULL: the best supported; FN_OK or FN_..._ISA */

/* ---- Threads ---------------------------------------------------------------------------------- */

int fn_openmp(void);             /* whether OpenMP was compiled in */
void fn_set_cpu_quota(int cpus); /* the container's CPU quota, rounded up; 0: none */
int fn_cpu_quota(void);
int fn_cpu_affinity(void);            /* CPUs this thread may run on */
int fn_openmp_limit(void);            /* omp_get_max_threads() of this thread; 1 without OpenMP */
void fn_set_num_threads(int threads); /* 0: forget it */
int fn_requested_threads(void);       /* what was set, or 0 */
int fn_max_threads(void);             /* the least of all of these and OpenMP's own limit */
/* For tests: whether AVX512_BF16 is used where the CPU has it (the default); returns whether it is. */
int fn_use_bf16_instructions(int use);
void fn_force_partition(int parts); /* for tests: split every call into so many parts; 0: off */

/* ---- Memory for large results, kept for the next one (pool.c) ---------------------------------- */

#define FN_POOL_LEAST ((size_t)1 << 20) /* smaller arrays gain nothing */
#define FN_POOL_LINE ((size_t)64)       /* bytes of a line, where a block begins unless asked */

void *fn_pool_alloc(size_t size); /* NULL: no memory */
void *fn_pool_realloc(void *data, size_t size);
void fn_pool_free(void *data);
/* The next block that this thread gets begins so far beyond a line, where its pages have room. */
void fn_pool_set_next_offset(size_t bytes);
int fn_pool_last_was_warm(void);      /* whether this thread's last block had its pages already */
int fn_pool_has(size_t size);         /* whether a block would be warm */
void fn_pool_set_limit(size_t bytes); /* the most that is kept; 0: nothing */
size_t fn_pool_limit(void);
size_t fn_pool_kept(void);

#ifdef __cplusplus
}
#endif
#endif
