/* split.h: what the files that make calls share: how many threads a call is worth, and its split. */
#ifndef FN_SPLIT_H
#define FN_SPLIT_H

#include "isa.h"

/* Outputs from this size on are written past the cache. It is about a core's share of the last cache
 * on today's servers; what cpuid says of that share cannot be trusted in a virtual machine. */
#define STREAM_BYTES ((ptrdiff_t)8 << 20)

/* Rows narrower than this are dearer to write by whole lines, one row at a time, than it saves; in
 * arrays far beyond the cache it saves more. */
#define STREAM_ROW_BYTES(bytes) ((bytes) >= 4 * STREAM_BYTES ? 512 : 1024)

/* Calls that move this much do not stay in the L2 cache: rows to come are fetched while others are
 * computed. */
#define FETCH_BYTES ((ptrdiff_t)1 << 19)

/* How many of `threads` (0: of all there are) a call that moves so many bytes, in so many units that are
 * independent of each other, is worth. */
int fn_planned_threads(ptrdiff_t bytes, ptrdiff_t units, int threads);

typedef void fn_row_kernel(const void *args, ptrdiff_t, ptrdiff_t, void *scratch);

/* The kernel over 0 .. rows - 1, cut over threads that have so many bytes of scratch each (a multiple of
 * 64): FN_OK, or FN_NO_MEMORY before anything is done. */
int fn_run_rowwise(fn_row_kernel *kernel, const void *args, ptrdiff_t rows, int threads,
                   size_t scratch_bytes);

#endif
