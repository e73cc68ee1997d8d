/* no_memory.c: layer_norm_backward where there is no memory for its partial sums. It must say so,
 * and have written nothing. Linked with -Wl,--wrap=malloc. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fastnorm.h"

enum { ROWS = 100, COLS = 40 };

static int allowed; /* allocations that still succeed */

void *__real_malloc(size_t size);
void *__wrap_malloc(size_t size);

void *__wrap_malloc(size_t size) { return allowed-- > 0 ? __real_malloc(size) : NULL; }

static float x[ROWS][COLS], dx[ROWS][COLS], mean[ROWS], rstd[ROWS], dweight[COLS], dbias[COLS];

static int untouched(const void *array, size_t bytes)
{
    const unsigned char *p = array;
    for (size_t i = 0; i < bytes; i++)
        if (p[i] != 0x55) return 0;
    return 1;
}

static int backward(ptrdiff_t rows, int want_dbias, int parts)
{
    fn_layer_norm_backward_args args = {
        .shape = {.rows = rows, .cols = COLS, .inner = 1},
        .dy = {.data = x, .stride = sizeof *x},
        .x = {.data = x, .stride = sizeof *x},
        .dx = {.data = dx, .stride = sizeof *dx},
        .mean = mean,
        .rstd = rstd,
        .dweight = dweight,
        .dbias = want_dbias ? dbias : NULL,
    };
    memset(dx, 0x55, sizeof dx);
    memset(dweight, 0x55, sizeof dweight);
    memset(dbias, 0x55, sizeof dbias);
    fn_force_partition(parts);
    return fn_layer_norm_backward(&args, FN_F32, 1);
}

static int fails_cleanly(ptrdiff_t rows, int want_dbias, int parts)
{
    allowed = 0;
    const int status = backward(rows, want_dbias, parts);
    const int clean = untouched(dx, sizeof dx) && untouched(dweight, sizeof dweight) &&
                      untouched(dbias, sizeof dbias);
    allowed = 1000;
    const int then = backward(rows, want_dbias, parts);
    if (status == FN_NO_MEMORY && clean && then == FN_OK) return 1;
    printf("rows %td parts %d: status %d, %s, then %d\n", rows, parts, status,
           clean ? "nothing written" : "something written", then);
    return 0;
}

int main(void)
{
    for (int r = 0; r < ROWS; r++) {
        for (int i = 0; i < COLS; i++) x[r][i] = (float)(i * r % 7);
        rstd[r] = 1;
    }
    /* One block of rows needs memory only where one of the two sums is not asked for. */
    return !(fails_cleanly(9, 0, 0) & fails_cleanly(ROWS, 1, 0) & fails_cleanly(ROWS, 0, 3));
}
