/* no_memory.c: calls where there is no memory for what they need besides their results:
 * layer_norm_backward for its partial sums, and every op for the rows that its steps keep in between
 * (wide ones: for narrow ones the stack serves, and backward asks all the same). They must say so,
 * and have written nothing. Linked with -Wl,--wrap=malloc. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fastnorm.h"

enum { ROWS = 100, COLS = 40, WIDE_ROWS = 4, WIDE = 9000 };

static int allowed; /* allocations that still succeed */

void *__real_malloc(size_t size);
void *__wrap_malloc(size_t size);

void *__wrap_malloc(size_t size) { return allowed-- > 0 ? __real_malloc(size) : NULL; }

static float x[ROWS][COLS], mean[ROWS], rstd[ROWS];
static uint16_t half[WIDE_ROWS][WIDE]; /* zeros */

/* All that is written to. */
static struct {
    float dx[ROWS][COLS], dweight[WIDE], dbias[WIDE], mean[ROWS], rstd[ROWS];
    uint16_t y[WIDE_ROWS][WIDE];
} to;

static int untouched(void)
{
    const unsigned char *p = (const unsigned char *)&to;
    for (size_t i = 0; i < sizeof to; i++)
        if (p[i] != 0x55) return 0;
    return 1;
}

typedef struct {
    const char *op;
    ptrdiff_t rows;
    int want_dbias, parts;
} asked;

static int backward(const asked *a)
{
    fn_layer_norm_backward_args args = {
        .shape = {.rows = a->rows, .cols = COLS, .inner = 1},
        .dy = {.data = x, .stride = sizeof *x},
        .x = {.data = x, .stride = sizeof *x},
        .dx = {.data = to.dx, .stride = sizeof *to.dx},
        .mean = mean,
        .rstd = rstd,
        .dweight = to.dweight,
        .dbias = a->want_dbias ? to.dbias : NULL,
    };
    return fn_layer_norm_backward(&args, FN_F32, 1);
}

static int with_steps(const asked *a)
{
    const fn_shape shape = {.rows = WIDE_ROWS, .cols = WIDE, .inner = 1};
    const fn_rows from = {.data = half, .stride = sizeof *half, .dtype = FN_F16};
    const fn_rows into = {.data = to.y, .stride = sizeof *to.y, .dtype = FN_F16};
    const fn_output output = {.y = into};
    const fn_steps steps = {.x = from, .outputs = &output, .output_count = 1};
    fn_layer_norm_args forward =
        {.shape = shape, .x = from, .y = into, .mean = to.mean, .rstd = to.rstd, .steps = &steps};
    fn_moments_args moments = {.shape = shape,
                               .x = from,
                               .mean = to.mean,
                               .variance = to.rstd,
                               .steps = &steps};
    fn_layer_norm_backward_args back = {.shape = shape,
                                        .dy = from,
                                        .x = from,
                                        .dx = into,
                                        .mean = mean,
                                        .rstd = rstd,
                                        .dweight = to.dweight,
                                        .dbias = a->want_dbias ? to.dbias : NULL,
                                        .steps = &steps};
    if (strcmp(a->op, "moments") == 0) return fn_moments(&moments, FN_F32, 1);
    if (strcmp(a->op, "layer_norm") == 0) return fn_layer_norm(&forward, FN_F32, 1);
    return fn_layer_norm_backward(&back, FN_F32, 1);
}

static int run(const asked *a)
{
    memset(&to, 0x55, sizeof to);
    fn_force_partition(a->parts);
    return strcmp(a->op, "plain backward") ? with_steps(a) : backward(a);
}

/* Whatever the number of allocations that succeed before one does not. */
static int fails_cleanly(const asked *a)
{
    for (int most = 0;; most++) {
        allowed = most;
        const int status = run(a);
        if (status == FN_OK) return most > 0 && !untouched();
        if (status == FN_NO_MEMORY && untouched()) continue;
        printf("%s, %td rows, %d parts: status %d, %s after %d allocations\n", a->op, a->rows,
               a->parts, status, untouched() ? "nothing written" : "something written", most);
        return 0;
    }
}

int main(void)
{
    /* One block of rows needs memory only where one of the two sums is not asked for. */
    static const asked list[] = {
        {"plain backward", 9, 0, 0}, {"plain backward", ROWS, 1, 0}, {"plain backward", ROWS, 0, 3},
        {"layer_norm", 0, 0, 0},     {"layer_norm", 0, 0, 3},        {"moments", 0, 0, 2},
        {"backward", 0, 1, 0},       {"backward", 0, 0, 0},
    };
    for (int r = 0; r < ROWS; r++) {
        for (int i = 0; i < COLS; i++) x[r][i] = (float)(i * r % 7);
        rstd[r] = 1;
    }
    int right = 1;
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) right &= fails_cleanly(&list[i]);
    return !right;
}
