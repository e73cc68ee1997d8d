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

/* rstd from the variance; false where it is out of range. */
FN_INLINE int rstd_fits(const fn_channel_norm_args *a, unit_moments *m)
{
    const double padded = m->variance + a->eps;
    m->rstd = 1.0 / sqrt(padded);
    return !(padded < least_variance(a->dtype) || m->variance > DBL_MAX);
}

/* Whether w*rstd has lost digits to the least numbers, though the weight is nowhere near them. */
FN_INLINE int is_lost(double w, double rstd, fn_dtype dtype)
{
    return fabs(w * rstd) < least_of(dtype) && fabs(w) >= (dtype == FN_F64 ? 0x1p-960 : 0x1p-100);
}

/* Whether w*rstd stays in range if w does. */
FN_INLINE int weight_fits(double w, double rstd, fn_dtype dtype)
{
    return !(fabs(w * rstd) > largest_of(dtype) && fabs(w) <= DBL_MAX) && !is_lost(w, rstd, dtype);
}

/* The statistics of unit u, which count where they fit, and whether it is refused, to the caller. */
FN_INLINE void keep_moments(const fn_channel_norm_args *a, ptrdiff_t u, int fits,
                            const unit_moments *m)
{
    a->refused[u] = !fits;
    a->mean[u] = m->pivot + m->shift;
    a->variance[u] = m->variance;
    a->rstd[u] = m->rstd;
}

__attribute__((noinline)) unit_moments fn_given_moments(const fn_channel_norm_args *a,
                                                        ptrdiff_t kind);

/* ---- gradients -------------------------------------------------------------------------------- */

/* Of a call: the elements of a unit, and what its numbers may be. */
typedef struct {
    fn_dtype dtype;
    double per_n, most;
    double least_sum, least_sum_by_rstd; /* the larger of the first and the second times rstd */
    double least_term;
} gradient_bounds;

FN_INLINE gradient_bounds gradient_bounds_of(const fn_channel_norm_backward_args *a)
{
    const fn_channels *l = &a->layout;
    const double n = (double)l->rows * (double)cols_of(l), least = least_of(a->dtype);
    return (gradient_bounds){.dtype = a->dtype,
                             .per_n = 1.0 / n,
                             .most = largest_of(a->dtype),
                             .least_sum = a->dtype == FN_F64 ? 0x1p-900 : 0x1p-90,
                             .least_sum_by_rstd = 4 * least * (double)l->rows * (double)l->plane,
                             .least_term = least * sqrt(n)};
}

/* Of a unit: what is the same for its planes, and what is added up over them. fits: while nothing was out
 * of range. */
typedef struct {
    double rstd, center; /* the mean less the pivot */
    double least_sum, g, gx, largest;
    int fits;
} unit_gradients;

/* deviations: of x - pivot over the unit. Square roots of variances within the bounds leave their squares,
 * times a gradient, in range. */
FN_INLINE unit_gradients begun_gradients(const fn_channel_norm_backward_args *a,
                                         const gradient_bounds *b, double mean, double rstd,
                                         double pivot, double deviations)
{
    const double bound = b->dtype == FN_F64 ? 0x1p301 : 0x1p41;
    return (unit_gradients){.rstd = rstd,
                            .center = a->given ? mean - pivot : deviations * b->per_n,
                            .least_sum = larger(b->least_sum_by_rstd * rstd, b->least_sum),
                            .fits = (1 <= rstd * bound) & (rstd <= bound)};
}

/* Whether two sums of a plane, of dy and of dy times xh, lost nothing to either end of the range.
 * Products of dy and 1/rstd may underflow by half a least number each: next to `least`, that is
 * nothing. */
FN_INLINE int sums_are_safe(double dy, double dyx, double least, double most)
{
    const double largest = larger(fabs(dyx), fabs(dy)); /* NaN if dy is one */
    return (dyx == dyx) & ((largest == 0) | ((largest >= least) & (largest <= most)));
}

/* sums: of a plane, of dy (x - pivot), which becomes dweight, and of dy. */
FN_INLINE void add_plane(const gradient_bounds *b, double w, unit_gradients *u, double *sums)
{
    const double dy = sums[1], dyx = sums[0] * u->rstd;
    u->fits &= sums_are_safe(dy, dyx, u->least_sum, b->most) & (fabs(w * u->rstd) <= b->most) &
               !is_lost(w, u->rstd, b->dtype);
    u->largest = larger(u->largest, larger(fabs(dy), fabs(dyx)));
    sums[0] = (sums[0] - u->center * dy) * u->rstd;
    u->g += w * dy;
    u->gx += w * sums[0];
}

/* What dx takes besides dy*factor, in terms; false where the unit is out of range, or where they are not
 * rounded to T's digits as T's least number stands in the way. */
FN_INLINE int finish_gradients(const fn_channel_norm_backward_args *a, const gradient_bounds *b,
                               const unit_gradients *u, double terms[4])
{
    const double rstd = u->rstd, least = smaller(rstd, rstd * rstd) * (u->largest * b->per_n);
    if (a->given) return u->fits;
    terms[3] = -rstd * rstd * (u->gx * b->per_n);
    terms[2] = -rstd * (u->g * b->per_n) - u->center * terms[3];
    return u->fits & (fabs(terms[3]) <= b->most) & (fabs(terms[2]) <= b->most) &
           (((terms[2] == 0) & (terms[3] == 0)) | (least >= b->least_term));
}

int fn_channels_last_norm(const fn_channel_norm_args *a, fn_plan plan);
int fn_channels_last_norm_backward(const fn_channel_norm_backward_args *a, fn_plan plan);

#endif
