/* elements.h: elements of arrays by their type, the bounds of what is computed in, and what ends a call
 * past the cache: what channels.c, channels_last.c and weights.c share. */
#ifndef FN_ELEMENTS_H
#define FN_ELEMENTS_H

#include <float.h>
#include <stdatomic.h>

#include "split.h"

/* Of what is short enough to be repeated, which -Os would not do. */
#define FN_INLINE static inline __attribute__((always_inline))

static inline const char *at_element(const void *data, fn_dtype type, ptrdiff_t i)
{
    return (const char *)data + i * fn_size_of(type);
}

/* Of floats or doubles; `otherwise` where there are none. */
static inline double number_at(const void *data, fn_dtype dtype, ptrdiff_t i, double otherwise)
{
    if (!data) return otherwise;
    return dtype == FN_F64 ? ((const double *)data)[i] : (double)((const float *)data)[i];
}

static inline double largest_of(fn_dtype dtype)
{
    return dtype == FN_F64 ? DBL_MAX : (double)FLT_MAX;
}

static inline double least_of(fn_dtype dtype)
{
    return dtype == FN_F64 ? DBL_MIN : (double)FLT_MIN;
}

/* Mean squares below this may have lost digits to underflow of the squares. */
static inline double least_variance(fn_dtype dtype) { return dtype == FN_F64 ? 0x1p-600 : 0x1p-80; }

static inline size_t bytes_of(ptrdiff_t elements, fn_dtype dtype)
{
    return ((size_t)elements * (size_t)fn_size_of(dtype) + 63) / 64 * 64;
}

/* What becomes of x (and dy) by plane_pass, an activation after it, as another type where asked for. */
typedef struct {
    void *y;
    fn_dtype y_type, dtype;
    fn_activation activation;
    char *strip;
    int stream;
    ptrdiff_t ahead; /* elements to what is to be fetched meanwhile; 0: nothing */
    fn_held_line held[FN_HELD_LINES];
} fn_plane_result;

/* `count` planes of n elements, more than one of them only if they are short and share a strip; element i
 * of all is their first. (channels.c) */
void fn_finish_planes(fn_plane_result *r, const char *x, const char *dy, ptrdiff_t i, ptrdiff_t n,
                      ptrdiff_t count, const double (*terms)[4]);

/* What was written past the cache is there for all threads that wait for this one; so is what was `held`
 * back of lines that nothing more came for. */
static inline void end_stream(int stream, fn_held_line *held)
{
    if (!stream) return;
    for (int k = 0; held && k < FN_HELD_LINES; k++) fn_let_go(&held[k]);
    atomic_thread_fence(memory_order_seq_cst);
}

#endif
