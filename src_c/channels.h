/* channels.h: what channels.c and channels_last.c share. */
#ifndef FN_CHANNELS_H
#define FN_CHANNELS_H

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>

#include "split.h"

/* Reads and writes of elements, by the types of the arrays. */
static inline const char *at_element(const void *data, fn_dtype type, ptrdiff_t i)
{
    return (const char *)data + i * fn_size_of(type);
}

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

static inline double number_at(const void *data, fn_dtype dtype, ptrdiff_t i, double otherwise)
{
    if (!data) return otherwise;
    return dtype == FN_F64 ? ((const double *)data)[i] : (double)((const float *)data)[i];
}

static inline double largest_of(fn_dtype dtype)
{
    return dtype == FN_F64 ? DBL_MAX : (double)FLT_MAX;
}

/* Rounded to what is computed in. */
static inline double rounded(double a, fn_dtype dtype)
{
    return dtype == FN_F64 ? a : (double)(float)a;
}

static inline double least_of(fn_dtype dtype)
{
    return dtype == FN_F64 ? DBL_MIN : (double)FLT_MIN;
}

/* What was written past the cache is there for all threads that wait for this one. */
static inline void fence(int stream)
{
    if (stream) atomic_thread_fence(memory_order_seq_cst);
}

/* Elements of a row. */
static inline ptrdiff_t cols_of(const fn_channels *l) { return l->planes * l->plane; }

/* Inlined, as fmax is not: its care for NaN is not needed where these are used. */
static inline double larger(double a, double b) { return a > b ? a : b; }
static inline double smaller(double a, double b) { return a < b ? a : b; }

static inline size_t bytes_of(ptrdiff_t elements, fn_dtype dtype)
{
    return ((size_t)elements * (size_t)fn_size_of(dtype) + 63) / 64 * 64;
}

#endif
