/* isa.h: what an instruction set's object file exports: one table of kernels. */
#ifndef FN_ISA_H
#define FN_ISA_H

#include "fastnorm.h"

/* Rows whose dweight and dbias are summed in the rows' own type, one after the other; such partial
 * sums are then added in double. Sixteen keep the error of the worst case (equal terms) below
 * 16/2 half ulps, and cost a sixteenth of a pass in double. */
#define FN_BACKWARD_ROWS 16

/* Channels last: rows of a block, whose sums are formed in T. */
#define FN_CHANNEL_ROWS 64

/* Mean (pivot + shift, which T alone would not hold) and variance of a row. */
typedef struct {
    double pivot, shift, variance;
} fn_row_moments;

/* A cache line of which bytes from .. to - 1 are known, held back until it is whole: a part of a line
 * cannot go past the cache. */
typedef struct {
    _Alignas(64) char bytes[64];
    char *line; /* NULL: nothing is held */
    ptrdiff_t from, to;
} fn_held_line;

/* Two are held at a time: what a plane begins with, if it is not what the one before ended with, and what
 * it ends with. So planes that share lines are to come in ascending order. */
enum { FN_HELD_LINES = 2 };

void fn_let_go(fn_held_line *held);
fn_held_line *fn_held_line_at(fn_held_line held[FN_HELD_LINES], char *line, ptrdiff_t from,
                              ptrdiff_t to);

/* Planes of at most FN_SHORT_PLANE elements are summed, and written, up to FN_PLANES by one call: what a
 * call costs, and the last steps of a sum, are a third of a plane of 49. */
enum { FN_PLANES = 8, FN_SHORT_PLANE = 256 };

/* What channels.c is made of (op_channels.h): no ranges of rows, but one strip, row or block each. */
typedef struct {
    void (*load_elements[FN_DTYPE_COUNT])(void *into, const void *from, fn_dtype, ptrdiff_t n);
    void (*store_elements[FN_DTYPE_COUNT])(void *into, fn_dtype, void *from, ptrdiff_t n,
                                           fn_activation);
    int (*row_moments[FN_DTYPE_COUNT])(const void *x, ptrdiff_t n, double eps, fn_row_moments *);
    double (*row_squares[FN_DTYPE_COUNT])(const void *x, ptrdiff_t n);
    void (*plane_dots[FN_DTYPE_COUNT])(const void *x, const void *dy, ptrdiff_t n, double pivot,
                                       double sums[3]);
    void (*planes_dots[FN_DTYPE_COUNT])(const void *x, const void *dy, ptrdiff_t n, int planes,
                                        const double *pivots, int step, double sums[3 * FN_PLANES]);
    void (*plane_pass[FN_DTYPE_COUNT])(const void *x, const void *dy, void *y, ptrdiff_t n,
                                       const double terms[4], fn_held_line *, ptrdiff_t ahead);
    void (*planes_pass[FN_DTYPE_COUNT])(const void *x, const void *dy, void *y, ptrdiff_t n,
                                        int planes, const double (*terms)[4]);
    void (*columns_pass[FN_DTYPE_COUNT])(const void *x, const void *dy, void *y, ptrdiff_t n,
                                         const void *const terms[4], int stream);
    void (*column_terms[FN_DTYPE_COUNT])(const double m[3], const double *mean, const double *rstd,
                                         const void *w, const void *b, ptrdiff_t n,
                                         void *const terms[3]);
    void (*channel_sums[FN_DTYPE_COUNT])(const void *x, const void *dy, ptrdiff_t step,
                                         ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t ahead,
                                         const void *pivots, void *into, ptrdiff_t apart);
} fn_channel_table;

typedef struct {
    const char *name;
    ptrdiff_t narrow_cols[FN_DTYPE_COUNT]; /* rows up to this width go in registers */
    /* The op's arguments, the rows first .. end - 1 to do, and, where there are steps, the scratch
     * that they ask for below. layer_norm_columns is layer_norm where rows lie side by side. */
    void (*layer_norm[FN_DTYPE_COUNT])(const void *, ptrdiff_t, ptrdiff_t, void *);
    void (*layer_norm_columns[FN_DTYPE_COUNT])(const void *, ptrdiff_t, ptrdiff_t, void *);
    void (*moments[FN_DTYPE_COUNT])(const void *, ptrdiff_t, ptrdiff_t, void *);
    /* At most FN_BACKWARD_ROWS rows where the sums over them, the last two, are not NULL. */
    void (*layer_norm_backward[FN_DTYPE_COUNT])(const void *, ptrdiff_t, ptrdiff_t, void *, void *,
                                                void *);
    /* into[i] (+)= from[i] in double, and back. */
    void (*widen_add[FN_DTYPE_COUNT])(double *into, const void *from, ptrdiff_t n, int add);
    void (*narrow[FN_DTYPE_COUNT])(void *into, const double *from, ptrdiff_t n);
    void (*rstds)(double *values, double eps, ptrdiff_t n); /* 1/sqrt(value + eps), in place */
    fn_channel_table channels;
} fn_isa;

extern const fn_isa *fn_active_isa;

/* Whether kernels may use AVX512_BF16 as well, which is no set of its own: the bits are the same. */
extern int fn_has_bf16_instructions;

/* Whether and when a kernel asks for the rows to come (fn_layer_norm_args.fetch). */
enum { FN_NO_FETCH, FN_FETCH_IN_PASSES, FN_FETCH_BETWEEN_PASSES };

/* ---- scratch for steps ------------------------------------------------------------------------ */

/* Rows of at most this many elements go in groups (a block, in row.h's words). */
#define FN_GROUP_COLS 1024
/* A group has four rows where they are short, else two: those and the rows that follow them would
 * crowd each other out of L1. */
#define FN_FOUR_ROWS_BYTES 1024
/* Wider rows overlap, two at a time, up to this size. */
#define FN_OVERLAP_BYTES ((ptrdiff_t)5 << 10)

/* How many rows are in flight at a time, so how many rooms a thread needs for what becomes of them
 * before they are normalised. */
static inline int fn_rows_in_flight(const fn_shape *shape, ptrdiff_t size)
{
    const ptrdiff_t bytes = shape->cols * size;
    int rows = bytes <= FN_OVERLAP_BYTES ? 2 : 1;
    if (shape->cols <= FN_GROUP_COLS) rows = bytes <= FN_FOUR_ROWS_BYTES ? 8 : 4;
    return shape->rows < rows ? (int)shape->rows : rows;
}

/* Elements from one room to the next: at least 64 more than a row, four vectors, which rounding to int8
 * may overwrite, and packing one of them; and not a multiple of 4,096 bytes, at which loads and stores
 * get into each other's way. */
static inline ptrdiff_t fn_room_stride(ptrdiff_t cols) { return cols / 64 * 64 + 128; }

/* Parameters that repeat within a row are laid out often enough to fill a strip. */
static inline ptrdiff_t fn_tile(ptrdiff_t cols, ptrdiff_t param_cols)
{
    if (!param_cols || param_cols >= cols) return cols;
    return param_cols >= FN_GROUP_COLS ? param_cols : FN_GROUP_COLS / param_cols * param_cols;
}

/* Rooms that a call needs: forward, for the rows in flight and a row of results; backward, for x
 * and dy, and where the sums see something else than the pass does, for that too. */
static inline int fn_rooms(const fn_shape *shape, const fn_steps *steps, ptrdiff_t size,
                           int backward)
{
    if (backward) return steps->mask.data || steps->starts ? 4 : 2;
    return fn_rows_in_flight(shape, size) + 1;
}

/* Rooms; the parameters of each output, with a note of what they were converted from; in a backward
 * call of rows in which parameters repeat, their sums in double. */
static inline size_t fn_scratch_bytes(const fn_shape *shape, const fn_steps *steps, ptrdiff_t size,
                                      int backward)
{
    const ptrdiff_t count = 2 * steps->output_count;
    const ptrdiff_t tile = fn_room_stride(fn_tile(shape->cols, steps->param_cols));
    const ptrdiff_t rooms = fn_rooms(shape, steps, size, backward) * fn_room_stride(shape->cols);
    const ptrdiff_t notes = (count * (ptrdiff_t)sizeof(void *) + 63) / 64 * 64;
    const ptrdiff_t params = steps->param_cols ? steps->param_cols : shape->cols;
    const ptrdiff_t sums = backward && steps->starts ? 2 * params * (ptrdiff_t)sizeof(double) : 0;
    return (size_t)((rooms + count * tile) * size + notes + sums);
}

/* ---- where things lie ------------------------------------------------------------------------- */

static inline ptrdiff_t fn_size_of(fn_dtype dtype)
{
    return dtype == FN_F64 ? 8 : dtype == FN_F32 ? 4 : dtype == FN_I8 ? 1 : 2;
}

/* Where element i of a row lies, in bytes from the first, and how many elements follow it, itself
 * counted, at the stride of the innermost dimension. */
static __attribute__((noinline, unused)) ptrdiff_t run_at(const fn_shape *shape,
                                                          const ptrdiff_t *strides, ptrdiff_t i,
                                                          ptrdiff_t *left)
{
    ptrdiff_t offset = 0;
    ptrdiff_t d = shape->col_ndim - 1;
    *left = shape->col_shape[d] - i % shape->col_shape[d];
    for (; d >= 0; d--) {
        offset += i % shape->col_shape[d] * strides[d];
        i /= shape->col_shape[d];
    }
    return offset;
}

static __attribute__((noinline, unused)) void *row_at_outer(const fn_shape *shape,
                                                            const fn_rows *rows, ptrdiff_t row)
{
    char *data = (char *)rows->data + row % shape->inner * rows->stride;
    ptrdiff_t outer = row / shape->inner;
    for (ptrdiff_t d = shape->outer_ndim - 1; d >= 0; d--) {
        data += outer % shape->outer_shape[d] * rows->outer_strides[d];
        outer /= shape->outer_shape[d];
    }
    return data;
}

static inline void *row_at(const fn_shape *shape, const fn_rows *rows, ptrdiff_t row)
{
    if (shape->outer_ndim && rows->outer_strides) return row_at_outer(shape, rows, row);
    return (char *)rows->data + row * rows->stride;
}

#endif
