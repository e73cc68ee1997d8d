/* op_moments.h: mean and population variance of rows of T, by layer_norm's own statistics. */

#define moments FN_OF_T(moments)
static void moments(const void *args, ptrdiff_t row0, ptrdiff_t row1, void *scratch)
{
    const fn_moments_args *a = args;
    workspace space;
    if (a->steps) space = workspace_in(scratch, &a->shape, a->steps, 0);
    for (ptrdiff_t row = row0; row < row1; row++) {
        ptrdiff_t n = a->shape.cols;
        const element *x = a->steps ? prologue(&a->shape, a->steps, NULL, row, space.rooms, &n)
                                    : row_at(&a->shape, &a->x, row);
        row_stats stats;
        const element pivot = row_pivot(x, n);
        if (!plain_stats(x, n, pivot, 0, 0, &stats)) careful_stats(x, n, 0, 0, &stats);
        if (a->mean) ((element *)a->mean)[row] = (element)stats.mean;
        if (a->variance) ((element *)a->variance)[row] = (element)stats.variance;
    }
}
