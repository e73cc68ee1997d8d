/* pool.c: memory for large results, kept for the next one.
 *
 * A new array of 100 MB costs more in page faults than in arithmetic: the kernel maps and zeroes
 * every page, each time. Here the memory of a freed result is kept, up to a limit, and handed to the
 * next of about its size; what is kept, but for a little, is marked MADV_FREE, so that the kernel takes
 * it back before it runs short. Smaller arrays are malloc's business.
 *
 * Only results are made here, by fastnorm/_core.pyx, which hangs these functions behind NumPy's
 * data-memory handler: such an array owns its memory like any other. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "fastnorm.h"

#ifdef __linux__
#include <sched.h>
#include <sys/mman.h>

#define HUGE_PAGE ((size_t)2 << 20)
enum { MAX_BLOCKS = 64 };
/* Kept without a mark at most: marking a block costs 3 us and more, which short calls would feel. */
#define MOST_UNMARKED ((size_t)16 << 20)

typedef struct {
    char *data; /* NULL: the place is free */
    size_t capacity;
    unsigned long freed_at; /* 0: in use */
    int unmarked;           /* kept, and not marked as the kernel's to take */
} block;

static block blocks[MAX_BLOCKS];
static size_t limit = (size_t)256 << 20, kept, unmarked;
static unsigned long clock_ticks;
static atomic_flag busy = ATOMIC_FLAG_INIT;
static _Thread_local int last_was_warm;
static _Thread_local size_t next_offset;

static void lock(void)
{
    while (atomic_flag_test_and_set_explicit(&busy, memory_order_acquire)) sched_yield();
}

static void unlock(void) { atomic_flag_clear_explicit(&busy, memory_order_release); }

/* A fork waits for the lock, so that the child's blocks are whole. */
__attribute__((constructor)) static void register_fork_handlers(void)
{
    pthread_atfork(lock, unlock, unlock);
}

/* Its place among what is kept. */
static void take(block *b)
{
    kept -= b->capacity;
    if (b->unmarked) unmarked -= b->capacity;
    b->unmarked = 0;
    b->freed_at = 0;
}

static void unmap(block *b)
{
    munmap(b->data, b->capacity);
    *b = (block){0};
}

static void drop(block *b)
{
    take(b);
    unmap(b);
}

static void keep(block *b)
{
    kept += b->capacity;
    b->freed_at = ++clock_ticks;
    b->unmarked = unmarked + b->capacity <= MOST_UNMARKED;
    if (b->unmarked)
        unmarked += b->capacity;
    else
        madvise(b->data, b->capacity, MADV_FREE);
}

/* The kept block that fits `size` best without wasting more than a quarter. */
static block *kept_block(size_t size)
{
    block *best = NULL;
    for (int i = 0; i < MAX_BLOCKS; i++) {
        block *b = &blocks[i];
        if (b->freed_at && b->capacity >= size && b->capacity / 5 * 4 <= size + HUGE_PAGE &&
            (!best || b->capacity < best->capacity))
            best = b;
    }
    return best;
}

static size_t in_pages(size_t size) { return (size + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE; }

/* Whole huge pages, so that the kernel may use them. */
static char *map_huge(size_t capacity)
{
    char *start = mmap(NULL, capacity + HUGE_PAGE, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return NULL;
    char *data = start + (HUGE_PAGE - (uintptr_t)start % HUGE_PAGE) % HUGE_PAGE;
    if (data > start) munmap(start, (size_t)(data - start));
    munmap(data + capacity, (size_t)(start + HUGE_PAGE - data));
    madvise(data, capacity, MADV_HUGEPAGE);
    return data;
}

static block *oldest_kept(void)
{
    block *oldest = NULL;
    for (int i = 0; i < MAX_BLOCKS; i++)
        if (blocks[i].freed_at && (!oldest || blocks[i].freed_at < oldest->freed_at))
            oldest = &blocks[i];
    return oldest;
}

static void keep_within(size_t most)
{
    while (kept > most) drop(oldest_kept());
}

/* A block's in a free place, or malloc's where there is none. */
static void *new_memory(size_t size, size_t offset)
{
    const size_t capacity = in_pages(size + offset);
    for (int i = 0; capacity >= size && i < MAX_BLOCKS; i++)
        if (!blocks[i].data) {
            char *data = map_huge(capacity);
            if (!data) return NULL;
            blocks[i] = (block){.data = data, .capacity = capacity};
            return data + offset;
        }
    return malloc(size);
}

/* What is kept is given up before a result goes without. */
static void *some_memory(size_t size, size_t offset)
{
    void *data = new_memory(size, offset);
    if (data || !kept) return data;
    keep_within(0);
    return new_memory(size, offset);
}

void *fn_pool_alloc(size_t size)
{
    /* Not for a page of its own: so a block is as large with an offset as without. */
    const size_t offset = in_pages(size + next_offset) == in_pages(size) ? next_offset : 0;
    next_offset = 0;
    last_was_warm = 0;
    if (size < FN_POOL_LEAST) return malloc(size); /* a finaliser's, that ran meanwhile */
    lock();
    block *b = kept_block(size + offset);
    last_was_warm = b != NULL;
    if (b) take(b);
    void *data = b ? b->data + offset : some_memory(size, offset);
    unlock();
    return data;
}

static size_t offset_of(const void *data) { return (uintptr_t)data % FN_POOL_LINE; }

static block *block_at(const void *data)
{
    for (int i = 0; i < MAX_BLOCKS; i++)
        if (blocks[i].data && blocks[i].data + offset_of(data) == data) return &blocks[i];
    return NULL;
}

void fn_pool_free(void *data)
{
    lock();
    block *b = block_at(data);
    if (b) {
        if (b->capacity <= limit)
            keep(b);
        else
            unmap(b); /* itself, not all others */
        keep_within(limit);
    }
    unlock();
    if (!b) free(data);
}

/* ndarray.resize: rare, so no more than correct. */
void *fn_pool_realloc(void *data, size_t size)
{
    lock();
    const block *b = data ? block_at(data) : NULL;
    const size_t capacity = b ? b->capacity - offset_of(data) : 0;
    unlock();
    if (data && !b) return realloc(data, size);
    if (capacity >= size && capacity) return data;
    void *moved = fn_pool_alloc(size);
    if (moved && data) {
        memcpy(moved, data, capacity);
        fn_pool_free(data);
    }
    return moved;
}

int fn_pool_last_was_warm(void) { return last_was_warm; }

void fn_pool_set_next_offset(size_t bytes) { next_offset = bytes % FN_POOL_LINE; }

int fn_pool_has(size_t size)
{
    lock();
    const int has = kept_block(size) != NULL;
    unlock();
    return has;
}

void fn_pool_set_limit(size_t bytes)
{
    lock();
    limit = bytes;
    keep_within(bytes);
    unlock();
}

size_t fn_pool_limit(void) { return limit; }

size_t fn_pool_kept(void)
{
    lock();
    const size_t bytes = kept;
    unlock();
    return bytes;
}

#else

void *fn_pool_alloc(size_t size) { return malloc(size); }
void *fn_pool_realloc(void *data, size_t size) { return realloc(data, size); }
void fn_pool_free(void *data) { free(data); }
int fn_pool_last_was_warm(void) { return 0; }
void fn_pool_set_next_offset(size_t bytes) { (void)bytes; }
int fn_pool_has(size_t size)
{
    (void)size;
    return 0;
}
void fn_pool_set_limit(size_t bytes) { (void)bytes; }
size_t fn_pool_limit(void) { return 0; }
size_t fn_pool_kept(void) { return 0; }
#endif
