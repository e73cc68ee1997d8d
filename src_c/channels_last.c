/* channels_last.c: group, instance and batch norm where the channels lie side by side, over the rows and
 * blocks of op_channels.h. No arithmetic on elements is done in this file. */
#include "channels.h"

/* Columns of a block that are converted at a time. */
enum { TILE_COLS = 64 };

/* Rows row0 .. of `cols` columns from column j on: where they lie, or in `room`; *step: from row to row. */
static const void *tile_at(const fn_channels_last_args *a, const void *data, fn_dtype type,
                           ptrdiff_t row0, ptrdiff_t rows, ptrdiff_t j, ptrdiff_t cols, char *room,
                           ptrdiff_t *step)
{
    *step = a->cols;
    if (type == a->dtype) return at_element(data, type, row0 * a->cols + j);
    *step = TILE_COLS;
    for (ptrdiff_t r = 0; r < rows; r++)
        as_computed(data, type, (row0 + r) * a->cols + j, cols, a->dtype,
                    room + r * TILE_COLS * fn_size_of(a->dtype));
    return room;
}

/* Both kinds of sums; blocks are numbered sample by sample. */
static void channels_last_sums(const void *args, ptrdiff_t block0, ptrdiff_t block1, void *scratch)
{
    const fn_channels_last_args *a = args;
    const fn_channel_table *table = &fn_active_isa->channels;
    const ptrdiff_t each = (a->sample + a->block - 1) / a->block, size = fn_size_of(a->dtype);
    char *rooms[2] = {scratch, scratch ? (char *)scratch + TILE_COLS * a->block * size : NULL};
    for (ptrdiff_t b = block0; b < block1; b++) {
        const ptrdiff_t skipped = b % each * a->block, row0 = b / each * a->sample + skipped;
        const ptrdiff_t rows = a->sample - skipped < a->block ? a->sample - skipped : a->block;
        for (ptrdiff_t j = 0, n; j < a->cols; j += n) {
            n = a->cols - j < TILE_COLS ? a->cols - j : TILE_COLS;
            ptrdiff_t step, dy_step;
            double *into[3];
            for (int k = 0; k < 3; k++) into[k] = a->sums + (k * a->blocks + b) * a->cols + j;
            const void *x = tile_at(a, a->x, a->x_type, row0, rows, j, n, rooms[0], &step);
            if (!a->dy) {
                table->column_moments[a->dtype](x, step, rows, n, into);
                continue;
            }
            const void *dy = tile_at(a, a->dy, a->dy_type, row0, rows, j, n, rooms[1], &dy_step);
            const void *pivots = at_element(a->terms[0], a->dtype, b / each * a->cols + j);
            table->column_dots[a->dtype](x, dy, step, dy_step, rows, n, pivots, into);
        }
    }
}

static void channels_last(const void *args, ptrdiff_t row0, ptrdiff_t row1, void *scratch)
{
    const fn_channels_last_args *a = args;
    const fn_channel_table *table = &fn_active_isa->channels;
    char *strip = scratch, *room = after_strip(scratch, a->dtype),
         *dy_room = after_strip(room, a->dtype);
    const int direct = a->y_type == a->dtype && !a->activation;
    for (ptrdiff_t row = row0; row < row1; row++)
        for (ptrdiff_t j = 0, n; j < a->cols; j += n) {
            n = a->cols - j < FN_GROUP_COLS ? a->cols - j : FN_GROUP_COLS;
            const ptrdiff_t at = row * a->cols + j, own = row / a->sample * a->cols + j;
            const void *x = as_computed(a->x, a->x_type, at, n, a->dtype, room);
            const void *dy = NULL, *terms[4] = {0};
            if (a->dy) dy = as_computed(a->dy, a->dy_type, at, n, a->dtype, dy_room);
            for (int k = 0; k < (dy ? 4 : 3); k++)
                terms[k] = at_element(a->terms[k], a->dtype, own);
            char *y = (char *)a->y + at * fn_size_of(a->y_type);
            table->columns_pass[a->dtype](x, dy, direct ? y : strip, n, terms);
            if (!direct) table->store_elements[a->dtype](y, a->y_type, strip, n, a->activation);
        }
}

/* ---- calls ------------------------------------------------------------------------------------ */

fn_plan fn_plan_channels_last(const fn_channels_last_args *a, fn_dtype dtype, int threads)
{
    (void)dtype;
    const ptrdiff_t bytes = a->rows * a->cols *
                            (fn_size_of(a->x_type) + (a->dy ? fn_size_of(a->dy_type) : 0) +
                             (a->y ? fn_size_of(a->y_type) : 0));
    return (fn_plan){.threads = fn_planned_threads(bytes, a->y ? a->rows : a->blocks, threads),
                     .regime = "channels last",
                     .bytes = bytes};
}

static int sums_of_blocks(fn_channels_last_args *a, fn_dtype dtype, int threads)
{
    const fn_plan plan = fn_plan_channels_last(a, dtype, threads);
    const int plain = a->x_type == dtype && (!a->dy || a->dy_type == dtype);
    a->dtype = dtype;
    return fn_run_rowwise(channels_last_sums, a, a->blocks, plan.threads,
                          plain ? 0 : bytes_of(2 * TILE_COLS * a->block, dtype));
}

int fn_channels_last_moments(fn_channels_last_args *a, fn_dtype dtype, int threads)
{
    a->dy = a->y = NULL;
    return sums_of_blocks(a, dtype, threads);
}

int fn_channels_last_dots(fn_channels_last_args *a, fn_dtype dtype, int threads)
{
    a->y = NULL;
    return sums_of_blocks(a, dtype, threads);
}

int fn_channels_last(fn_channels_last_args *a, fn_dtype dtype, int threads)
{
    const fn_plan plan = fn_plan_channels_last(a, dtype, threads);
    const int plain = a->x_type == dtype && a->y_type == dtype && !a->activation &&
                      (!a->dy || a->dy_type == dtype);
    a->dtype = dtype;
    return fn_run_rowwise(channels_last, a, a->rows, plan.threads,
                          plain ? 0 : bytes_of(3 * FN_GROUP_COLS, dtype));
}
