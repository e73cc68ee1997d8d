/* channels.h: what channels.c and channels_last.c share. */
#ifndef FN_CHANNELS_H
#define FN_CHANNELS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "elements.h"

/* n elements as `dtype`: where they lie, or in `room`. */
static inline const void *as_computed(const void *data, fn_dtype type, ptrdiff_t i, ptrdiff_t n,
                                      fn_dtype dtype, void *room)
{
    const char *from = at_element(data, type, i);
    if (type == dtype) return from;
    fn_active_isa->channels.load_elements[dtype](room, from, type, n);
    return room;
}

/* What follows the strip that scratch begins with. */
static inline char *after_strip(void *scratch, fn_dtype dtype)
{
    return scratch ? (char *)scratch + FN_GROUP_COLS * fn_size_of(dtype) : NULL;
}

/* Rounded to what is computed in. */
static inline double rounded(double a, fn_dtype dtype)
{
    return dtype == FN_F64 ? a : (double)(float)a;
}

/* Elements of a row. */
static inline ptrdiff_t cols_of(const fn_channels *l) { return l->planes * l->plane; }

/* Inlined, as fmax is not: its care for NaN is not needed where these are used. */
static inline double larger(double a, double b) { return a > b ? a : b; }
static inline double smaller(double a, double b) { return a < b ? a : b; }

/* ---- where units lie, and what is known of them ------------------------------------------------ */

/* Whether channels lie side by side. */
static inline int is_last(const fn_channels *l) { return l->step > 1; }

/* How many parts of a call can be summed by themselves. */
static inline ptrdiff_t independent_of(const fn_channels *l)
{
    if (!is_last(l)) return l->units;
    return l->units * l->planes / l->step * ((l->plane + FN_CHANNEL_ROWS - 1) / FN_CHANNEL_ROWS);
}

/* The mean is pivot + shift, where pivot is a number of the type that is computed in. */
typedef struct {
    double pivot, shift, variance, rstd;
} unit_moments;

/* Sums of squares up to this leave all deviations in the range of what is computed in: no row's own
 * are larger, but what lies between rows may be. */
static inline double largest_squares(fn_dtype dtype) { return dtype == FN_F64 ? DBL_MAX : 0x1p252; }

/* rstd from the variance; false where it, or a weight times it, is out of range. */
__attribute__((noinline)) int fn_moments_fit(const fn_channel_norm_args *a, ptrdiff_t kind,
                                             unit_moments *m);
/* The statistics of unit u, where they fit, and whether it is refused, to the caller. */
__attribute__((noinline)) void fn_keep_moments(const fn_channel_norm_args *a, ptrdiff_t u, int fits,
                                               const unit_moments *m);
__attribute__((noinline)) unit_moments fn_given_moments(const fn_channel_norm_args *a,
                                                        ptrdiff_t kind);

/* sums: of each plane, of dy (x - pivot) and of dy; deviations: of x - pivot over the unit; terms[0]: the
 * pivot. Makes dweight of each plane of its first sum, and what dx takes besides dy*factor in terms; false
 * where the unit is out of range. first: the unit's first weight. */
__attribute__((noinline)) int fn_gradients_of_unit(const fn_channel_norm_backward_args *a,
                                                   ptrdiff_t first, double mean, double rstd,
                                                   double deviations, double *sums,
                                                   double terms[4]);

int fn_channels_last_norm(const fn_channel_norm_args *a, fn_plan plan);
int fn_channels_last_norm_backward(const fn_channel_norm_backward_args *a, fn_plan plan);

#endif
