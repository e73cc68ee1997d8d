# Memory for results, which comes from the pool where it is large; what else the pool is asked.

cdef void *pool_malloc(void *ctx, size_t size) noexcept:
    return fn_pool_alloc(size)


cdef void *pool_calloc(void *ctx, size_t count, size_t size) noexcept:
    cdef void *data = NULL if size and count > <size_t>-1 // size else fn_pool_alloc(count * size)
    if data is not NULL:
        memset(data, 0, count * size)
    return data


cdef void *pool_realloc(void *ctx, void *old, size_t size) noexcept:
    # Only ndarray.resize comes here, which knows how much of the old block is its own.
    return fn_pool_realloc(old, size)


cdef void pool_free(void *ctx, void *data, size_t size) noexcept:
    fn_pool_free(data)


cdef PyDataMem_Handler pool_handler
strcpy(pool_handler.name, b"fastnorm_pool")
pool_handler.version = 1
pool_handler.allocator.ctx = NULL
pool_handler.allocator.malloc = pool_malloc
pool_handler.allocator.calloc = pool_calloc
pool_handler.allocator.realloc = pool_realloc
pool_handler.allocator.free = pool_free
cdef object pool_capsule = PyCapsule_New(&pool_handler, b"mem_handler", NULL)


cdef inline ndarray new_array(int ndim, npy_intp *dims, int typenum, int *warm, size_t offset=0):
    """An uninitialised array; `warm` says whether its pages are known to exist. offset: bytes from
    a cache line on, where a large one had better begin."""
    cdef size_t size = size_of(typenum)
    cdef int i
    warm[0] = 0
    for i in range(ndim):
        size *= <size_t>dims[i]
    if size < FN_POOL_LEAST:
        return cnp.PyArray_EMPTY(ndim, dims, typenum, 0)
    return pooled_array(ndim, dims, typenum, warm, offset)


cdef ndarray pooled_array(int ndim, npy_intp *dims, int typenum, int *warm, size_t offset):
    cdef object before = PyDataMem_SetHandler(pool_capsule)
    try:
        fn_pool_set_next_offset(offset)
        array = cnp.PyArray_EMPTY(ndim, dims, typenum, 0)
        warm[0] = fn_pool_last_was_warm()
    finally:
        fn_pool_set_next_offset(0)
        PyDataMem_SetHandler(before)
    return array


def new_result(tuple shape, cnp.dtype dtype):
    """An uninitialised array, and whether its pages are known to exist."""
    cdef object before
    cdef size_t size = dtype.itemsize
    for length in shape:
        size *= length
    if size < FN_POOL_LEAST:
        return np.empty(shape, dtype), False
    before = PyDataMem_SetHandler(pool_capsule)
    try:
        array = np.empty(shape, dtype)
        return array, bool(fn_pool_last_was_warm())
    finally:
        PyDataMem_SetHandler(before)


def would_be_warm(size_t size):
    """Whether a new result of so many bytes would get memory that is kept."""
    return size >= FN_POOL_LEAST and bool(fn_pool_has(size))


def pool():
    """Bytes of freed results that are kept for the next one, and the most that may be."""
    return {"kept": fn_pool_kept(), "limit": fn_pool_limit()}


def set_pool_limit(size_t limit):
    """The most bytes of freed results to keep; 0 keeps none."""
    fn_pool_set_limit(limit)
