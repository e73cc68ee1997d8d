# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, freethreading_compatible=True
"""The one file that touches the C kernels.

A call whose arguments are exact, native, aligned, C-contiguous ndarrays of one type goes straight
down: at 100 ns a row one Python frame would cost half as much again, and a typed memoryview more
than the row. Every other call goes to the handler that fastnorm.dispatch registers here at import;
it checks, converts, and comes back through the ``*_rows`` functions. So all error messages live
there, and this file knows nothing of devices.
"""

import os

cimport cython
cimport numpy as cnp
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.exc cimport PyErr_Clear
from cpython.long cimport PyLong_AsSsize_t, PyLong_CheckExact
from cpython.pycapsule cimport PyCapsule_New
from cpython.tuple cimport PyTuple_CheckExact, PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.string cimport memset, strcpy
from numpy cimport ndarray, npy_intp

cnp.import_array()


cdef extern from "fastnorm.h" nogil:
    ctypedef enum fn_dtype:
        FN_F32
        FN_F64

    enum: FN_OK, FN_NO_MEMORY, FN_UNKNOWN_ISA, FN_UNSUPPORTED_ISA

    ctypedef struct fn_shape:
        Py_ssize_t rows, cols, inner, outer_ndim
        const Py_ssize_t *outer_shape

    ctypedef struct fn_rows:
        void *data
        Py_ssize_t stride
        const Py_ssize_t *outer_strides

    ctypedef struct fn_layer_norm_args:
        fn_shape shape
        fn_rows x, y
        const void *weight
        const void *bias
        void *mean
        void *rstd
        double eps
        int y_is_warm

    ctypedef struct fn_layer_norm_backward_args:
        fn_shape shape
        fn_rows dy, x, dx
        const void *weight
        const void *mean
        const void *rstd
        void *dweight
        void *dbias
        int dx_is_warm

    ctypedef struct fn_moments_args:
        fn_shape shape
        fn_rows x
        void *mean
        void *variance

    ctypedef struct fn_plan:
        int threads, stream
        const char *regime
        Py_ssize_t bytes

    void fn_layer_norm(fn_layer_norm_args *, fn_dtype, int)
    int fn_layer_norm_backward(fn_layer_norm_backward_args *, fn_dtype, int)
    void fn_moments(fn_moments_args *, fn_dtype, int)
    fn_plan fn_plan_layer_norm(const fn_layer_norm_args *, fn_dtype, int)
    fn_plan fn_plan_layer_norm_backward(const fn_layer_norm_backward_args *, fn_dtype, int)
    fn_plan fn_plan_moments(const fn_moments_args *, fn_dtype, int)

    const size_t FN_POOL_LEAST
    void *fn_pool_alloc(size_t)
    void *fn_pool_realloc(void *, size_t)
    void fn_pool_free(void *)
    int fn_pool_last_was_warm()
    int fn_pool_has(size_t)
    void fn_pool_set_limit(size_t)
    size_t fn_pool_limit()
    size_t fn_pool_kept()

    int fn_isa_count()
    const char *fn_isa_name(int)
    int fn_isa_supported(int)
    const char *fn_isa_active()
    int fn_isa_select(const char *)

    int fn_openmp()
    void fn_set_cpu_quota(int)
    int fn_cpu_quota()
    int fn_cpu_affinity()
    int fn_openmp_limit()
    void fn_set_num_threads(int)
    int fn_requested_threads()
    int fn_max_threads()
    void fn_force_partition(int)


cdef extern from "numpy/arrayobject.h":
    ctypedef struct PyDataMemAllocator:
        void *ctx
        void *(*malloc)(void *, size_t) noexcept
        void *(*calloc)(void *, size_t, size_t) noexcept
        void *(*realloc)(void *, void *, size_t) noexcept
        void (*free)(void *, void *, size_t) noexcept

    ctypedef struct PyDataMem_Handler:
        char name[127]
        unsigned char version
        PyDataMemAllocator allocator

    object PyDataMem_SetHandler(object)


cdef enum:
    MAX_OUTER = 64
    #: A call that moves fewer bytes keeps the GIL. Letting go of it costs nothing by itself, but
    #: with another busy thread a call waits 5 ms, the switch interval, to get it back; so only
    #: calls of some 50 us and more do.
    GIL_BYTES = 1 << 20
    C_ALIGNED = cnp.NPY_ARRAY_C_CONTIGUOUS | cnp.NPY_ARRAY_ALIGNED
    C_ALIGNED_WRITEABLE = C_ALIGNED | cnp.NPY_ARRAY_WRITEABLE

#: What exists, as the C core lists it; tests and benchmarks iterate over these.
OPS = ("layer_norm", "layer_norm_backward", "moments")
DTYPES = ("float32", "float64")


# ---- memory for results --------------------------------------------------------------------------

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


cdef inline ndarray new_array(int ndim, npy_intp *dims, int typenum, int *warm):
    """An uninitialised array; `warm` says whether its pages are known to exist."""
    cdef size_t size = 8 if typenum == cnp.NPY_FLOAT64 else 4
    cdef int i
    warm[0] = 0
    for i in range(ndim):
        size *= <size_t>dims[i]
    if size < FN_POOL_LEAST:
        return cnp.PyArray_EMPTY(ndim, dims, typenum, 0)
    return pooled_array(ndim, dims, typenum, warm)


cdef ndarray pooled_array(int ndim, npy_intp *dims, int typenum, int *warm):
    cdef object before = PyDataMem_SetHandler(pool_capsule)
    try:
        array = cnp.PyArray_EMPTY(ndim, dims, typenum, 0)
        warm[0] = fn_pool_last_was_warm()
    finally:
        PyDataMem_SetHandler(before)
    return array


def new_result(ndarray like):
    """An uninitialised array of like's shape and type, and whether its pages are known to exist."""
    cdef int warm
    array = new_array(cnp.PyArray_NDIM(like), cnp.PyArray_DIMS(like), cnp.PyArray_TYPE(like), &warm)
    return array, bool(warm)


def would_be_warm(size_t size):
    """Whether a new result of so many bytes would get memory that is kept."""
    return size >= FN_POOL_LEAST and bool(fn_pool_has(size))


def pool():
    """Bytes of freed results that are kept for the next one, and the most that may be."""
    return {"kept": fn_pool_kept(), "limit": fn_pool_limit()}


def set_pool_limit(size_t limit):
    """The most bytes of freed results to keep; 0 keeps none."""
    fn_pool_set_limit(limit)


# ---- tests for the straight path -----------------------------------------------------------------

cdef inline bint is_plain(object a, int typenum, int flags) noexcept:
    # The exact type keeps masked arrays and matrices out, the byte order '>f4', whose type number
    # is float32's too.
    return (
        cnp.PyArray_CheckExact(a)
        and cnp.PyArray_TYPE(<ndarray>a) == typenum
        and (cnp.PyArray_FLAGS(<ndarray>a) & flags) == flags
        and cnp.PyArray_ISNOTSWAPPED(<ndarray>a)
    )


cdef inline int trailing_axes(ndarray x, object normalized_shape) except -2:
    """How many axes of x normalized_shape names; -1 where it does not plainly fit."""
    cdef int count, ndim = cnp.PyArray_NDIM(x), i
    cdef npy_intp *dims = cnp.PyArray_DIMS(x)
    cdef object length
    if normalized_shape is None:
        return 1 if ndim else -1
    if PyLong_CheckExact(normalized_shape):
        return 1 if ndim and fits(normalized_shape, dims[ndim - 1]) else -1
    if not PyTuple_CheckExact(normalized_shape):
        return -1
    count = <int>PyTuple_GET_SIZE(normalized_shape)
    if count == 0 or count > ndim:
        return -1
    for i in range(count):
        length = <object>PyTuple_GET_ITEM(normalized_shape, i)
        if not PyLong_CheckExact(length) or not fits(length, dims[ndim - count + i]):
            return -1
    return count


cdef inline bint fits(object length, npy_intp dim) noexcept:
    cdef Py_ssize_t value = PyLong_AsSsize_t(length)
    if value == -1:
        PyErr_Clear()
    return value == dim


cdef inline bint is_parameter(object w, int typenum, ndarray x, int axes) noexcept:
    """None, or a plain array of x's type with x's trailing shape."""
    cdef int i, first = cnp.PyArray_NDIM(x) - axes
    if w is None:
        return True
    if not is_plain(w, typenum, C_ALIGNED) or cnp.PyArray_NDIM(<ndarray>w) != axes:
        return False
    for i in range(axes):
        if cnp.PyArray_DIM(<ndarray>w, i) != cnp.PyArray_DIM(x, first + i):
            return False
    return True


cdef inline bint same_shape(ndarray a, ndarray b) noexcept:
    cdef int i, ndim = cnp.PyArray_NDIM(a)
    if cnp.PyArray_NDIM(b) != ndim:
        return False
    for i in range(ndim):
        if cnp.PyArray_DIM(a, i) != cnp.PyArray_DIM(b, i):
            return False
    return True


cdef inline bint apart(ndarray a, object other) noexcept:
    """Whether two C-contiguous arrays share no byte."""
    cdef char *a0 = <char *>cnp.PyArray_DATA(a)
    cdef char *b0
    if other is None:
        return True
    b0 = <char *>cnp.PyArray_DATA(<ndarray>other)
    return (
        a0 + cnp.PyArray_NBYTES(a) <= b0 or b0 + cnp.PyArray_NBYTES(<ndarray>other) <= a0
    )


cdef inline bint is_result(object out, ndarray x, int typenum, object weight,
                           object bias) noexcept:
    """Whether the result may be written to `out`: x itself, or its like elsewhere."""
    return (
        is_plain(out, typenum, C_ALIGNED_WRITEABLE)
        and (out is x or (same_shape(<ndarray>out, x) and apart(<ndarray>out, x)))
        and apart(<ndarray>out, weight)
        and apart(<ndarray>out, bias)
    )


cdef inline const void *parameter_data(object w) noexcept:
    return NULL if w is None else cnp.PyArray_DATA(<ndarray>w)


cdef inline fn_dtype dtype_of(int typenum) noexcept:
    return FN_F64 if typenum == cnp.NPY_FLOAT64 else FN_F32


cdef inline Py_ssize_t plain_rows(ndarray x, int axes, fn_shape *shape) noexcept:
    """Fills shape for a C-contiguous array; returns the stride from row to row in bytes."""
    cdef int i, ndim = cnp.PyArray_NDIM(x)
    cdef Py_ssize_t cols = 1
    for i in range(ndim - axes, ndim):
        cols *= cnp.PyArray_DIM(x, i)
    shape.cols = cols
    shape.rows = cnp.PyArray_SIZE(x) // cols if cols else 0
    shape.outer_ndim = 0
    return cols * cnp.PyArray_ITEMSIZE(x)


cdef inline fn_rows rows_at(object a, Py_ssize_t stride) noexcept:
    cdef fn_rows rows
    rows.data = NULL if a is None else cnp.PyArray_DATA(<ndarray>a)
    rows.stride = stride
    return rows


cdef inline void call_layer_norm(fn_layer_norm_args *args, fn_dtype dtype):
    if 2 * args.shape.rows * args.shape.cols * (8 if dtype == FN_F64 else 4) >= GIL_BYTES:
        with nogil:
            fn_layer_norm(args, dtype, 0)
    else:
        fn_layer_norm(args, dtype, 0)


# ---- layer_norm ----------------------------------------------------------------------------------


cdef dict handlers = {}


def register(name, handler):
    """Let `handler` take the calls of op `name` that cannot go straight down."""
    handlers[name] = handler


cdef inline object direct_layer_norm(
    object x_object, object normalized_shape, object weight, object bias, object eps, object out,
    bint return_stats,
):
    """The straight path; None where it does not apply."""
    cdef fn_layer_norm_args args
    cdef ndarray x, y
    cdef object mean = None, rstd = None
    cdef int typenum, axes
    cdef Py_ssize_t stride
    if not cnp.PyArray_CheckExact(x_object):
        return None
    x = <ndarray>x_object
    typenum = cnp.PyArray_TYPE(x)
    if typenum != cnp.NPY_FLOAT32 and typenum != cnp.NPY_FLOAT64:
        return None
    if not is_plain(x, typenum, C_ALIGNED) or not PyFloat_CheckExact(eps):
        return None
    args.eps = PyFloat_AS_DOUBLE(eps)
    axes = trailing_axes(x, normalized_shape)
    if axes < 0 or not args.eps >= 0:
        return None
    if not is_parameter(weight, typenum, x, axes) or not is_parameter(bias, typenum, x, axes):
        return None
    stride = plain_rows(x, axes, &args.shape)
    if args.shape.rows == 0:
        return None
    if out is None:
        y = new_array(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), typenum, &args.y_is_warm)
    else:
        if not is_result(out, x, typenum, weight, bias):
            return None
        y = <ndarray>out
        args.y_is_warm = 1
    args.mean = args.rstd = NULL
    if return_stats:
        mean = cnp.PyArray_EMPTY(cnp.PyArray_NDIM(x) - axes, cnp.PyArray_DIMS(x), typenum, 0)
        rstd = cnp.PyArray_EMPTY(cnp.PyArray_NDIM(x) - axes, cnp.PyArray_DIMS(x), typenum, 0)
        args.mean = cnp.PyArray_DATA(<ndarray>mean)
        args.rstd = cnp.PyArray_DATA(<ndarray>rstd)
    args.x = rows_at(x, stride)
    args.y = rows_at(y, stride)
    args.weight = parameter_data(weight)
    args.bias = parameter_data(bias)
    call_layer_norm(&args, dtype_of(typenum))
    return (y, mean, rstd) if return_stats else y


def layer_norm(x, normalized_shape=None, weight=None, bias=None, eps=1e-5, *, axis=None, out=None,
               return_stats=False):
    """layer_norm(x, normalized_shape=None, weight=None, bias=None, eps=1e-5, *, axis=None, \
out=None, return_stats=False)

    Layer normalization: ``y = (x - mean) / sqrt(var + eps) * weight + bias``.

    Mean and (population) variance are taken over the normalized axes, of each sample by itself and
    in training and inference alike: layer norm has no running statistics.

    Parameters
    ----------
    x : array_like
        float32 or float64 of any shape; integers and booleans become float64. Leading axes may
        have any strides; other layouts are copied (``fastnorm.explain`` says when).
    normalized_shape : int or sequence of int, optional
        Trailing shape to normalize over, as in ``torch.nn.functional.layer_norm``. Default: the
        last axis.
    weight, bias : array_like, optional
        Gain and offset of shape `normalized_shape` (with `axis`: the lengths of the axes in
        ascending order), of any float type. Either may be left out.
    eps : float
        Added to the variance; not negative.
    axis : int or tuple of int, optional
        Axes to normalize over, in place of `normalized_shape`, as in Keras.
    out : ndarray, optional
        Array for the result, of x's shape and type. It may be x itself, but not overlap an input
        in another way.
    return_stats : bool
        Also return mean and ``rstd = 1 / sqrt(var + eps)``.

    Returns
    -------
    y : ndarray
        Of x's shape and type (`out` where given).
    mean, rstd : ndarray
        With `return_stats`, of the leading shape and x's type. They are what
        ``layer_norm_backward`` takes.

    Raises
    ------
    TypeError
        For a type that is not supported (complex, object, float16, masked arrays), or
        `normalized_shape` and `axis` together.
    ValueError
        For shapes that do not fit, an axis out of range or repeated (``numpy.exceptions.AxisError``
        where it is out of range), an eps that is negative or NaN, and an `out` that is read-only
        or overlaps an input. Nothing is written then.

    Notes
    -----
    A row's result depends on that row, the parameters and eps alone: not on the batch, the number
    of threads, alignment, strides, `out` or the CPU's instruction set. A row that holds a NaN or
    an infinity becomes NaN; a constant row gives exactly `bias`, for eps = 0 too. Rows of length 0
    have mean 0 and rstd NaN.

    Arrays that start at a multiple of 64 bytes (``fastnorm.empty``) are 15 to 50 percent faster
    in the L1 cache than others.

    References
    ----------
    Ba, Kiros, Hinton: Layer Normalization, arXiv 1607.06450 (2016).

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> fastnorm.layer_norm(np.float32([[1, 2, 3], [4, 4, 4]]), eps=0.0)
    array([[-1.2247449,  0.       ,  1.2247449],
           [ 0.       ,  0.       ,  0.       ]], dtype=float32)
    """
    if axis is None and (return_stats is True or return_stats is False):
        result = direct_layer_norm(x, normalized_shape, weight, bias, eps, out,
                                   return_stats is True)
        if result is not None:
            return result
    return handlers["layer_norm"](x, normalized_shape, weight, bias, eps, axis, out, return_stats)


# ---- arrays of rows with any leading strides -----------------------------------------------------

cdef struct leading:
    # The leading axes of up to three arrays of one shape: axes that one stride can walk in all of
    # them are merged, and axes of length 1 left out, whatever their stride says.
    int ndim
    Py_ssize_t shape[MAX_OUTER]
    Py_ssize_t strides[3][MAX_OUTER]


cdef void merge_leading(leading *lead, tuple arrays):
    cdef ndarray first = arrays[0], a
    cdef int d, k, count = <int>len(arrays)
    cdef bint merges
    lead.ndim = 0
    for d in range(cnp.PyArray_NDIM(first) - 1):
        if cnp.PyArray_DIM(first, d) == 1:
            continue
        merges = lead.ndim > 0
        for k in range(count):
            a = arrays[k]
            if merges:
                merges = lead.strides[k][lead.ndim - 1] == (
                    cnp.PyArray_STRIDE(a, d) * cnp.PyArray_DIM(a, d)
                )
        if merges:
            lead.shape[lead.ndim - 1] *= cnp.PyArray_DIM(first, d)
        else:
            lead.shape[lead.ndim] = cnp.PyArray_DIM(first, d)
            lead.ndim += 1
        for k in range(count):
            lead.strides[k][lead.ndim - 1] = cnp.PyArray_STRIDE(<ndarray>arrays[k], d)


cdef void shape_of(leading *lead, ndarray x, fn_shape *shape):
    cdef int d
    shape.cols = cnp.PyArray_DIM(x, cnp.PyArray_NDIM(x) - 1)
    shape.rows = 1
    for d in range(lead.ndim):
        shape.rows *= lead.shape[d]
    shape.outer_ndim = lead.ndim - 1 if lead.ndim > 1 else 0
    shape.inner = lead.shape[lead.ndim - 1] if lead.ndim else 1
    shape.outer_shape = lead.shape


cdef fn_rows rows_of(leading *lead, object a, int k):
    cdef fn_rows rows
    rows.data = cnp.PyArray_DATA(<ndarray>a)
    rows.stride = lead.strides[k][lead.ndim - 1] if lead.ndim else 0
    rows.outer_strides = lead.strides[k]
    return rows


cdef dict plan_dict(fn_plan plan, fn_shape shape):
    return {
        "threads": plan.threads,
        "stream": bool(plan.stream),
        "regime": plan.regime.decode(),
        "bytes": plan.bytes,
        "rows": shape.rows,
        "cols": shape.cols,
    }


def layer_norm_rows(ndarray x, ndarray y, weight, bias, double eps, mean, rstd, bint warm,
                    bint plan=False):
    """The kernel on checked arrays: x and y of shape (..., n), rows contiguous, leading strides
    free; the others contiguous, of x's type, or None. With `plan`, say what would be done."""
    cdef fn_layer_norm_args args
    cdef leading lead
    cdef fn_dtype dtype = dtype_of(cnp.PyArray_TYPE(x))
    merge_leading(&lead, (x, y))
    shape_of(&lead, x, &args.shape)
    args.x = rows_of(&lead, x, 0)
    args.y = rows_of(&lead, y, 1)
    args.weight = parameter_data(weight)
    args.bias = parameter_data(bias)
    args.mean = <void *>parameter_data(mean)
    args.rstd = <void *>parameter_data(rstd)
    args.eps = eps
    args.y_is_warm = warm
    if plan:
        return plan_dict(fn_plan_layer_norm(&args, dtype, 0), args.shape)
    call_layer_norm(&args, dtype)


# ---- layer_norm_backward -------------------------------------------------------------------------

cdef int call_backward(fn_layer_norm_backward_args *args, fn_dtype dtype):
    cdef int status
    if 3 * args.shape.rows * args.shape.cols * (8 if dtype == FN_F64 else 4) >= GIL_BYTES:
        with nogil:
            status = fn_layer_norm_backward(args, dtype, 0)
    else:
        status = fn_layer_norm_backward(args, dtype, 0)
    return status


cdef int raise_no_memory(Py_ssize_t cols) except -1:
    raise MemoryError(
        f"layer_norm_backward: no memory for the partial sums of dweight and dbias ({cols} columns)"
    )


cdef inline bint is_statistic(object a, int typenum, ndarray x, int axes) noexcept:
    """A plain array of x's leading shape, with or without torch's trailing ones."""
    cdef int i, lead = cnp.PyArray_NDIM(x) - axes, ndim
    if not is_plain(a, typenum, C_ALIGNED):
        return False
    ndim = cnp.PyArray_NDIM(<ndarray>a)
    if ndim != lead and ndim != cnp.PyArray_NDIM(x):
        return False
    for i in range(ndim):
        if cnp.PyArray_DIM(<ndarray>a, i) != (cnp.PyArray_DIM(x, i) if i < lead else 1):
            return False
    return True


cdef inline int wanted(object output_mask) noexcept:
    """Bits for dx, dweight, dbias; -1 where it is not a tuple of three bools."""
    cdef int bits = 0, i
    cdef object item
    if not PyTuple_CheckExact(output_mask) or PyTuple_GET_SIZE(output_mask) != 3:
        return -1
    for i in range(3):
        item = <object>PyTuple_GET_ITEM(output_mask, i)
        if item is True:
            bits |= 1 << i
        elif item is not False:
            return -1
    return bits


cdef object direct_backward(object dy_object, object x_object, object normalized_shape, object mean,
                            object rstd, object weight, object bias, object output_mask):
    cdef fn_layer_norm_backward_args args
    cdef ndarray x
    cdef object dx = None, dweight = None, dbias = None
    cdef int typenum, axes, mask = wanted(output_mask), first
    cdef Py_ssize_t stride
    if mask <= 0 or not cnp.PyArray_CheckExact(x_object):
        return None
    x = <ndarray>x_object
    typenum = cnp.PyArray_TYPE(x)
    if typenum != cnp.NPY_FLOAT32 and typenum != cnp.NPY_FLOAT64:
        return None
    if not is_plain(x, typenum, C_ALIGNED) or not is_plain(dy_object, typenum, C_ALIGNED):
        return None
    axes = trailing_axes(x, normalized_shape)
    if axes < 0 or not same_shape(x, <ndarray>dy_object):
        return None
    if not is_parameter(weight, typenum, x, axes) or not is_parameter(bias, typenum, x, axes):
        return None
    if not is_statistic(mean, typenum, x, axes) or not is_statistic(rstd, typenum, x, axes):
        return None
    stride = plain_rows(x, axes, &args.shape)
    if args.shape.rows == 0:
        return None
    first = cnp.PyArray_NDIM(x) - axes
    args.dx_is_warm = 0
    if mask & 1:
        dx = new_array(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), typenum, &args.dx_is_warm)
    if mask & 2:
        dweight = cnp.PyArray_EMPTY(axes, cnp.PyArray_DIMS(x) + first, typenum, 0)
    if mask & 4:
        dbias = cnp.PyArray_EMPTY(axes, cnp.PyArray_DIMS(x) + first, typenum, 0)
    args.x = rows_at(x, stride)
    args.dy = rows_at(dy_object, stride)
    args.dx = rows_at(dx, stride)
    args.weight = parameter_data(weight)
    args.mean = parameter_data(mean)
    args.rstd = parameter_data(rstd)
    args.dweight = <void *>parameter_data(dweight)
    args.dbias = <void *>parameter_data(dbias)
    if call_backward(&args, dtype_of(typenum)) != FN_OK:
        raise_no_memory(args.shape.cols)
    return dx, dweight, dbias


def layer_norm_backward(dy, x, normalized_shape, mean, rstd, weight=None, bias=None, *, axis=None,
                        output_mask=(True, True, True)):
    """layer_norm_backward(dy, x, normalized_shape, mean, rstd, weight=None, bias=None, *, \
axis=None, output_mask=(True, True, True))

    Gradients of :func:`layer_norm`: dx, dweight and dbias.

    With ``xh = (x - mean) * rstd`` and ``g = dy * weight``::

        dx = rstd * (g - mean(g) - xh * mean(g * xh))
        dweight = sum over rows of dy * xh
        dbias = sum over rows of dy

    Parameters
    ----------
    dy, x : array_like
        Gradient of the output, and the input, of one shape, float32 or float64.
    normalized_shape : int, sequence of int or None
        As for the forward call (None: the last axis, or what `axis` names).
    mean, rstd : array_like
        What ``layer_norm(x, ..., return_stats=True)`` returned for this x, with or without torch's
        trailing axes of length 1. `mean` is a pivot only: what rounding it lost is formed again.
    weight : array_like, optional
        The forward call's; None counts as ones.
    bias : array_like, optional
        Checked for its shape, otherwise unused (as torch's `native_layer_norm_backward`).
    axis : int or tuple of int, optional
        In place of `normalized_shape`.
    output_mask : three bools
        Which of dx, dweight, dbias to compute; the others come back as None.

    Returns
    -------
    dx : ndarray or None
        Of x's shape and type.
    dweight, dbias : ndarray or None
        Of the normalized shape and x's type; zeros where there are no rows. Rows are summed in an
        order that depends on their number alone, so the result is the same for every number of
        threads.

    Raises
    ------
    TypeError, ValueError
        As :func:`layer_norm`.
    MemoryError
        Where there is no room for the partial sums: log2(rows / 16) times 16 bytes a column and
        thread, about. Nothing has been computed then.

    References
    ----------
    Ba, Kiros, Hinton: Layer Normalization, arXiv 1607.06450 (2016).
    """
    if axis is None:
        result = direct_backward(dy, x, normalized_shape, mean, rstd, weight, bias, output_mask)
        if result is not None:
            return result
    return handlers["layer_norm_backward"](dy, x, normalized_shape, mean, rstd, weight, bias, axis,
                                           output_mask)


def layer_norm_backward_rows(ndarray dy, ndarray x, dx, mean, rstd, weight, dweight, dbias,
                             bint plan=False, bint warm=False):
    """The kernel on checked arrays: dy, x and dx of shape (..., n), as layer_norm_rows has them."""
    cdef fn_layer_norm_backward_args args
    cdef leading lead
    cdef fn_dtype dtype = dtype_of(cnp.PyArray_TYPE(x))
    merge_leading(&lead, (dy, x) if dx is None else (dy, x, dx))
    shape_of(&lead, x, &args.shape)
    args.dy = rows_of(&lead, dy, 0)
    args.x = rows_of(&lead, x, 1)
    args.dx = rows_at(None, 0) if dx is None else rows_of(&lead, dx, 2)
    args.weight = parameter_data(weight)
    args.mean = parameter_data(mean)
    args.rstd = parameter_data(rstd)
    args.dweight = <void *>parameter_data(dweight)
    args.dbias = <void *>parameter_data(dbias)
    args.dx_is_warm = warm
    if plan:
        return plan_dict(fn_plan_layer_norm_backward(&args, dtype, 0), args.shape)
    if call_backward(&args, dtype) != FN_OK:
        raise_no_memory(args.shape.cols)


# ---- moments -------------------------------------------------------------------------------------

def moments(x, axis=None):
    """moments(x, axis=None)

    Mean and population variance (ddof 0), by layer_norm's own arithmetic.

    Parameters
    ----------
    x : array_like
        float32 or float64; integers and booleans become float64.
    axis : int or tuple of int, optional
        Axes to reduce. Default: the last.

    Returns
    -------
    mean, variance : ndarray
        Of x's shape without those axes and x's type. Over no elements: mean 0, variance NaN.

    Raises
    ------
    TypeError, ValueError
        As :func:`layer_norm`.
    """
    return handlers["moments"](x, axis)


def moments_rows(ndarray x, mean, variance, bint plan=False):
    """The kernel on checked arrays, as layer_norm_rows has them."""
    cdef fn_moments_args args
    cdef leading lead
    cdef fn_dtype dtype = dtype_of(cnp.PyArray_TYPE(x))
    merge_leading(&lead, (x,))
    shape_of(&lead, x, &args.shape)
    args.x = rows_of(&lead, x, 0)
    args.mean = <void *>parameter_data(mean)
    args.variance = <void *>parameter_data(variance)
    if plan:
        return plan_dict(fn_plan_moments(&args, dtype, 0), args.shape)
    if args.shape.rows * args.shape.cols * (8 if dtype == FN_F64 else 4) >= GIL_BYTES:
        with nogil:
            fn_moments(&args, dtype, 0)
    else:
        fn_moments(&args, dtype, 0)


# ---- the bound call: parameters checked once -----------------------------------------------------

cdef inline bint is_own_parameter(object w, int typenum, Py_ssize_t cols) noexcept:
    """Whether a module's parameter, which was laid out for it, is still as it was."""
    return w is None or (
        cnp.PyArray_TYPE(<ndarray>w) == typenum and cnp.PyArray_SIZE(<ndarray>w) == cols
    )


@cython.auto_pickle(False)
cdef class BoundLayerNorm:
    """What fastnorm.LayerNorm is made of: parameters, and the fastest call.

    Nothing of a call stays on the object, so any number of threads may call one."""

    cdef readonly tuple normalized_shape
    cdef readonly object dtype
    cdef object _eps, _weight, _bias
    # What every call would otherwise find out again.
    cdef double eps_value
    cdef int typenum
    cdef Py_ssize_t cols

    def __init__(self, tuple normalized_shape, double eps, dtype):
        self.normalized_shape = normalized_shape
        self.dtype = dtype
        self.typenum = cnp.NPY_FLOAT64 if dtype.itemsize == 8 else cnp.NPY_FLOAT32
        self.cols = normalized_shape[0] if len(normalized_shape) == 1 else -1
        self._set("eps", eps)
        self._set("weight", None)
        self._set("bias", None)

    def _set(self, str name, value):
        """Store a checked eps, weight or bias."""
        if name == "eps":
            self._eps = value
            self.eps_value = value
        elif name == "weight":
            self._weight = value
        else:
            self._bias = value

    def _get(self, str name):
        return {"eps": self._eps, "weight": self._weight, "bias": self._bias}[name]

    def __call__(self, x, out=None):
        """Normalize x over its trailing `normalized_shape`; see fastnorm.layer_norm."""
        cdef fn_layer_norm_args args
        cdef ndarray y
        # References of our own: another thread may assign to the parameters meanwhile.
        cdef object weight = self._weight, bias = self._bias
        if (
            is_plain(x, self.typenum, C_ALIGNED)
            and cnp.PyArray_NDIM(<ndarray>x) > 0
            and cnp.PyArray_DIM(<ndarray>x, cnp.PyArray_NDIM(<ndarray>x) - 1) == self.cols
            and is_own_parameter(weight, self.typenum, self.cols)
            and is_own_parameter(bias, self.typenum, self.cols)
            and cnp.PyArray_SIZE(<ndarray>x) > 0
        ):
            if out is None:
                y = new_array(cnp.PyArray_NDIM(<ndarray>x), cnp.PyArray_DIMS(<ndarray>x),
                              self.typenum, &args.y_is_warm)
            elif is_result(out, <ndarray>x, self.typenum, weight, bias):
                y = <ndarray>out
                args.y_is_warm = 1
            else:
                return self._checked_call(x, out)
            args.x = rows_at(x, plain_rows(<ndarray>x, 1, &args.shape))
            args.y = rows_at(y, args.x.stride)
            args.weight = parameter_data(weight)
            args.bias = parameter_data(bias)
            args.mean = args.rstd = NULL
            args.eps = self.eps_value
            call_layer_norm(&args, dtype_of(self.typenum))
            return y
        return self._checked_call(x, out)

    cdef object _checked_call(self, x, out):
        result = direct_layer_norm(x, self.normalized_shape, self._weight, self._bias, self._eps,
                                   out, False)
        if result is not None:
            return result
        return handlers["layer_norm"](x, self.normalized_shape, self._weight, self._bias, self._eps,
                                      None, out, False)


# ---- instruction sets and threads ----------------------------------------------------------------

def isa_names():
    """Names of the instruction sets compiled in, best first."""
    return tuple(fn_isa_name(i).decode() for i in range(fn_isa_count()))


def isa_supported(name):
    """Whether this CPU, and its operating system, can run instruction set `name`."""
    return name in isa_names() and bool(fn_isa_supported(isa_names().index(name)))


def isa_active():
    """The instruction set in use."""
    return fn_isa_active().decode()


def select_isa(name=None):
    """Use instruction set `name`; None: the best this CPU has. For the whole process.

    Raises ValueError for a name that is not compiled in, RuntimeError for one the CPU lacks.
    """
    cdef bytes encoded
    cdef int status
    if name is None:
        status = fn_isa_select(NULL)
    else:
        encoded = str(name).encode()
        status = fn_isa_select(encoded)
    if status == FN_OK:
        return
    usable = ", ".join(n for n in isa_names() if isa_supported(n))
    if status == FN_UNSUPPORTED_ISA:
        raise RuntimeError(f"FASTNORM_ISA: this CPU lacks {name!r}; it has: {usable}")
    raise ValueError(f"FASTNORM_ISA: got {name!r}, wanted one of: {usable}")


def threads():
    """The numbers that bound the threads of a call: the least of them counts."""
    return {
        "max": fn_max_threads(),
        "requested": fn_requested_threads() or None,
        "openmp": fn_openmp_limit() if fn_openmp() else None,
        "affinity": fn_cpu_affinity(),
        "cpu_quota": fn_cpu_quota() or None,
    }


def set_requested_threads(int count):
    """Store what set_num_threads was given; 0 forgets it."""
    fn_set_num_threads(count)


def set_cpu_quota(int cpus):
    """Store the container's CPU quota, rounded up; 0: none."""
    fn_set_cpu_quota(cpus)


def openmp():
    """Whether OpenMP was compiled in."""
    return bool(fn_openmp())


def force_partition(int parts):
    """For tests: split every call into `parts` parts, whatever the cores; 0 ends it."""
    fn_force_partition(parts)


select_isa(os.environ.get("FASTNORM_ISA") or None)
