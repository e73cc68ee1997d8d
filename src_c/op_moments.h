/* op_moments.h: mean and population variance of rows of T, by layer_norm's own statistics. */

#define moments FN_OF_T(moments)
static void moments(const void *args, ptrdiff_t row0, ptrdiff_t row1)
{
    const fn_moments_args *a = args;
    for (ptrdiff_t row = row0; row < row1; row++) {
        const element *x = row_at(&a->shape, &a->x, row);
        row_stats stats;
        const element pivot = row_pivot(x, a->shape.cols);
        if (!plain_stats(x, a->shape.cols, pivot, 0, &stats))
            careful_stats(x, a->shape.cols, 0, &stats);
        if (a->mean) ((element *)a->mean)[row] = (element)stats.mean;
        if (a->variance) ((element *)a->variance)[row] = (element)stats.variance;
    }
}
