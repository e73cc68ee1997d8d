/* isa.h: what an instruction set's object file exports: one table of kernels. */
#ifndef FN_ISA_H
#define FN_ISA_H

#include "fastnorm.h"

/* Rows whose dweight and dbias are summed in the rows' own type, one after the other; such partial
 * sums are then added in double. Sixteen keep the error of the worst case (equal terms) below
 * 16/2 half ulps, and cost a sixteenth of a pass in double. */
#define FN_BACKWARD_ROWS 16

typedef struct {
    const char *name;
    ptrdiff_t narrow_cols[FN_DTYPE_COUNT]; /* rows up to this width go in registers */
    /* The op's arguments, then the rows first .. end - 1 to do. */
    void (*layer_norm[FN_DTYPE_COUNT])(const void *, ptrdiff_t, ptrdiff_t);
    void (*moments[FN_DTYPE_COUNT])(const void *, ptrdiff_t, ptrdiff_t);
    /* At most FN_BACKWARD_ROWS rows where the sums over them, the last two, are not NULL. */
    void (*layer_norm_backward[FN_DTYPE_COUNT])(const void *, ptrdiff_t, ptrdiff_t, void *, void *);
    /* into[i] (+)= from[i] in double, and back. */
    void (*widen_add[FN_DTYPE_COUNT])(double *into, const void *from, ptrdiff_t n, int add);
    void (*narrow[FN_DTYPE_COUNT])(void *into, const double *from, ptrdiff_t n);
} fn_isa;

extern const fn_isa *fn_active_isa;

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
    if (shape->outer_ndim) return row_at_outer(shape, rows, row);
    return (char *)rows->data + row * rows->stride;
}

#endif
