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

import numpy as np

cimport cython
cimport numpy as cnp
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_CheckExact
from cpython.list cimport PyList_AsTuple, PyList_CheckExact
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_CheckExact
from cpython.pycapsule cimport PyCapsule_New
from cpython.tuple cimport PyTuple_CheckExact, PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.math cimport NAN
from libc.stdlib cimport free, malloc
from libc.string cimport memset, strcpy
from numpy cimport ndarray, npy_intp

cnp.import_array()


cdef extern from "fastnorm.h" nogil:
    ctypedef enum fn_dtype:
        FN_F32
        FN_F64
        FN_F16
        FN_BF16
        FN_I8

    ctypedef enum fn_activation:
        FN_NO_ACTIVATION
        FN_RELU
        FN_SILU
        FN_GELU
        FN_GELU_TANH

    enum: FN_OK, FN_NO_MEMORY, FN_UNKNOWN_ISA, FN_UNSUPPORTED_ISA

    ctypedef struct fn_shape:
        Py_ssize_t rows, cols, inner, outer_ndim
        const Py_ssize_t *outer_shape
        Py_ssize_t col_ndim
        const Py_ssize_t *col_shape

    ctypedef struct fn_rows:
        void *data
        Py_ssize_t stride
        const Py_ssize_t *outer_strides
        const Py_ssize_t *col_strides
        fn_dtype dtype

    ctypedef struct fn_output:
        fn_rows weight, bias, y
        float *scales

    ctypedef struct fn_steps:
        fn_rows x, gate, linear_bias, residual, sum
        int round_sum
        const fn_output *outputs
        Py_ssize_t output_count, param_cols
        double offset
        int round_before_weight, from_output
        fn_activation activation
        const Py_ssize_t *lengths
        const Py_ssize_t *starts
        fn_rows mask

    ctypedef struct fn_layer_norm_args:
        fn_shape shape
        fn_rows x, y
        const void *weight
        const void *bias
        void *mean
        void *rstd
        double eps
        int rms, y_is_warm
        const fn_steps *steps

    ctypedef struct fn_layer_norm_backward_args:
        fn_shape shape
        fn_rows dy, x, dx
        const void *weight
        const void *mean
        const void *rstd
        void *dweight
        void *dbias
        int rms, dx_is_warm
        const fn_steps *steps

    ctypedef struct fn_moments_args:
        fn_shape shape
        fn_rows x
        void *mean
        void *variance
        const fn_steps *steps

    ctypedef struct fn_plan:
        int threads, stream
        const char *regime
        Py_ssize_t bytes

    int fn_layer_norm(fn_layer_norm_args *, fn_dtype, int)
    int fn_layer_norm_backward(fn_layer_norm_backward_args *, fn_dtype, int)
    int fn_moments(fn_moments_args *, fn_dtype, int)
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
    #: From this size of x on, parameters are converted before the call, not again for each row.
    CONVERT_BYTES = 8 << 20
    C_ALIGNED = cnp.NPY_ARRAY_C_CONTIGUOUS | cnp.NPY_ARRAY_ALIGNED
    C_ALIGNED_WRITEABLE = C_ALIGNED | cnp.NPY_ARRAY_WRITEABLE

#: What arrays may hold, as the C core lists it; tests and benchmarks iterate over these.
DTYPES = ("float32", "float64", "float16", "bfloat16")
#: What is computed in: the half types are loaded and stored only.
COMPUTE_DTYPES = ("float32", "float64")
OPS = (
    "layer_norm", "layer_norm_backward", "rms_norm", "rms_norm_backward", "add_layer_norm",
    "add_layer_norm_backward", "add_rms_norm", "add_rms_norm_backward", "adaptive_layer_norm",
    "adaptive_layer_norm_backward", "parallel_layer_norm", "segment_layer_norm",
    "segment_layer_norm_backward", "segment_rms_norm", "segment_rms_norm_backward", "moments",
)
#: Those that are defined here, and have a straight path.
STRAIGHT = (
    "layer_norm", "layer_norm_backward", "rms_norm", "rms_norm_backward", "add_layer_norm",
    "add_rms_norm", "moments",
)

#: ml_dtypes.bfloat16's number, once somebody has used it (it is not NumPy's own); else none's.
cdef int bfloat16_number = -1


def set_bfloat16(dtype):
    """Let the straight path know this dtype as bfloat16."""
    global bfloat16_number
    bfloat16_number = dtype.num


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
    cdef size_t size = size_of(typenum)
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
    if PyList_CheckExact(normalized_shape):
        normalized_shape = PyList_AsTuple(normalized_shape)
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
    cdef int overflow
    return PyLong_AsLongLongAndOverflow(length, &overflow) == dim and overflow == 0


cdef inline bint is_last(object axis, object normalized_shape) noexcept:
    """Whether `axis` says nothing that normalized_shape does not: it is None, or -1."""
    return axis is None or (
        normalized_shape is None and PyLong_CheckExact(axis) and fits(axis, -1)
    )


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
    if typenum == cnp.NPY_FLOAT32:
        return FN_F32
    if typenum == cnp.NPY_FLOAT64:
        return FN_F64
    if typenum == cnp.NPY_INT8:
        return FN_I8
    return FN_F16 if typenum == cnp.NPY_FLOAT16 else FN_BF16


cdef inline size_t size_of(int typenum) noexcept:
    if typenum == cnp.NPY_FLOAT32:
        return 4
    if typenum == cnp.NPY_FLOAT64:
        return 8
    return 1 if typenum == cnp.NPY_INT8 else 2


cdef inline bint is_storage(int typenum) noexcept:
    """Whether the kernels load and store this type."""
    return (
        typenum == cnp.NPY_FLOAT32 or typenum == cnp.NPY_FLOAT64 or typenum == cnp.NPY_FLOAT16
        or (typenum == bfloat16_number and typenum >= 0)
    )


cdef inline int compute_type(int typenum) noexcept:
    return cnp.NPY_FLOAT64 if typenum == cnp.NPY_FLOAT64 else cnp.NPY_FLOAT32


cdef inline Py_ssize_t plain_rows(ndarray x, int axes, fn_shape *shape) noexcept:
    """Fills shape for a C-contiguous array; returns the stride from row to row in bytes."""
    cdef int i, ndim = cnp.PyArray_NDIM(x)
    cdef Py_ssize_t cols = 1
    for i in range(ndim - axes, ndim):
        cols *= cnp.PyArray_DIM(x, i)
    shape.cols = cols
    shape.rows = cnp.PyArray_SIZE(x) // cols if cols else 0
    shape.outer_ndim = shape.col_ndim = 0
    return cols * cnp.PyArray_ITEMSIZE(x)


cdef inline fn_rows rows_at(object a, Py_ssize_t stride) noexcept:
    cdef fn_rows rows
    rows.data = NULL if a is None else cnp.PyArray_DATA(<ndarray>a)
    rows.stride = stride
    rows.outer_strides = rows.col_strides = NULL
    rows.dtype = FN_F32 if a is None else dtype_of(cnp.PyArray_TYPE(<ndarray>a))
    return rows


cdef inline bint is_long(fn_shape *shape, const fn_steps *steps, fn_dtype dtype,
                         int arrays) noexcept:
    """Whether a call moves enough to let go of the GIL."""
    cdef Py_ssize_t elements = shape.rows * shape.cols
    if steps is not NULL and steps.starts is not NULL:
        elements = steps.starts[shape.rows]
    return arrays * elements * (8 if dtype == FN_F64 else 4) >= GIL_BYTES


cdef int raise_no_scratch(Py_ssize_t cols) except -1:
    raise MemoryError(f"no memory for a thread's row of {cols} elements; nothing was written")


cdef inline int call_layer_norm(fn_layer_norm_args *args, fn_dtype dtype) except -1:
    cdef int status
    if is_long(&args.shape, args.steps, dtype, 2):
        with nogil:
            status = fn_layer_norm(args, dtype, 0)
    else:
        status = fn_layer_norm(args, dtype, 0)
    return raise_no_scratch(args.shape.cols) if status != FN_OK else 0


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
    args.rms = 0
    args.steps = NULL
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


# ---- the straight path of the other cases: rms, half types, a residual --------------------------

cdef double EPS_F32 = 1.1920928955078125e-07
cdef double EPS_F64 = 2.220446049250313e-16


cdef inline bint is_any_parameter(object w, ndarray x, int axes) noexcept:
    """None, or a plain array of any storage type with x's trailing shape."""
    return w is None or (
        cnp.PyArray_CheckExact(w)
        and is_storage(cnp.PyArray_TYPE(<ndarray>w))
        and is_parameter(w, cnp.PyArray_TYPE(<ndarray>w), x, axes)
    )


cdef inline bint is_of_type(object w, int typenum) noexcept:
    return w is None or cnp.PyArray_TYPE(<ndarray>w) == typenum


cdef inline int wider(int a, int b) noexcept:
    """What NumPy promotes two storage types to."""
    if a == b:
        return a
    return cnp.NPY_FLOAT64 if a == cnp.NPY_FLOAT64 or b == cnp.NPY_FLOAT64 else cnp.NPY_FLOAT32


cdef inline double eps_of(object eps, int compute) noexcept:
    """eps as a double; None means the machine epsilon. -1 where it is neither."""
    if eps is None:
        return EPS_F64 if compute == cnp.NPY_FLOAT64 else EPS_F32
    return PyFloat_AS_DOUBLE(eps) if PyFloat_CheckExact(eps) else -1


cdef struct options:
    # What an op asks for besides its arrays.
    bint rms, adds, return_stats, round_before_weight, round_sum
    double offset


cdef inline bint is_sum(object out, ndarray x, int typenum, object residual) noexcept:
    """Whether the sum may be written to `out`: it is, or shares no byte with, x, and residual."""
    return (
        is_plain(out, typenum, C_ALIGNED_WRITEABLE) and same_shape(<ndarray>out, x)
        and (out is x or apart(<ndarray>out, x))
        and (out is residual or apart(<ndarray>out, residual))
    )


cdef object converted(object w, object dtype, double offset):
    """A parameter as the plain kernels take it."""
    if w is None:
        return None
    with np.errstate(all="ignore"):
        w = w.astype(dtype, copy=False)
        return w + dtype.type(offset) if offset else w


cdef object direct_norm(
    options *opt, object x_object, object normalized_shape, object weight, object bias, object eps,
    object out, object residual, object linear_bias, object sum_out,
):
    """The straight path of any storage type, for all four norms; None where it does not apply."""
    cdef fn_layer_norm_args args
    cdef fn_steps steps
    cdef fn_output output
    cdef ndarray x, y
    cdef object total = None, mean = None, rstd = None
    cdef int typenum, compute, sum_type, axes, ndim, warm
    cdef Py_ssize_t stride
    cdef bint converts
    if not cnp.PyArray_CheckExact(x_object):
        return None
    x = <ndarray>x_object
    typenum = sum_type = cnp.PyArray_TYPE(x)
    if not is_storage(typenum) or not is_plain(x, typenum, C_ALIGNED):
        return None
    if opt.adds:
        if not cnp.PyArray_CheckExact(residual):
            return None
        sum_type = cnp.PyArray_TYPE(<ndarray>residual)
        if not is_storage(sum_type) or not is_plain(residual, sum_type, C_ALIGNED):
            return None
        if not same_shape(x, <ndarray>residual):
            return None
        sum_type = wider(typenum, sum_type)
    compute = compute_type(sum_type)
    args.eps = eps_of(eps, compute)
    axes = trailing_axes(x, normalized_shape)
    if axes < 0 or not args.eps >= 0:
        return None
    if not (is_any_parameter(weight, x, axes) and is_any_parameter(bias, x, axes)
            and is_any_parameter(linear_bias, x, axes)):
        return None
    stride = plain_rows(x, axes, &args.shape)
    if args.shape.rows == 0:
        return None
    converts = not (
        is_of_type(weight, compute) and is_of_type(bias, compute)
        and (weight is None or opt.offset == 0)
    )
    if out is None:
        y = new_array(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), typenum, &args.y_is_warm)
    else:
        if not (is_result(out, x, typenum, weight, bias) and apart(<ndarray>out, residual)
                and apart(<ndarray>out, linear_bias)):
            return None
        y = <ndarray>out
        args.y_is_warm = 1
    if opt.adds:
        if sum_out is None:
            total = new_array(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), sum_type, &warm)
            args.y_is_warm &= warm
        elif (is_sum(sum_out, x, sum_type, residual) and apart(<ndarray>sum_out, y)
              and apart(<ndarray>sum_out, weight) and apart(<ndarray>sum_out, bias)
              and apart(<ndarray>sum_out, linear_bias)):
            total = sum_out
        else:
            return None
    ndim = cnp.PyArray_NDIM(x) - axes
    args.mean = args.rstd = NULL
    if opt.return_stats:
        rstd = cnp.PyArray_EMPTY(ndim, cnp.PyArray_DIMS(x), compute, 0)
        args.rstd = cnp.PyArray_DATA(<ndarray>rstd)
        if not opt.rms:
            mean = cnp.PyArray_EMPTY(ndim, cnp.PyArray_DIMS(x), compute, 0)
            args.mean = cnp.PyArray_DATA(<ndarray>mean)
    if (converts and not opt.adds and typenum == compute
            and cnp.PyArray_NBYTES(x) >= <npy_intp>CONVERT_BYTES):
        converts = False
        weight = converted(weight, x.dtype, opt.offset)
        bias = converted(bias, x.dtype, 0)
    args.rms = opt.rms
    args.x = rows_at(x, stride)
    args.y = rows_at(y, stride)
    args.weight = parameter_data(weight)
    args.bias = parameter_data(bias)
    args.steps = NULL
    if converts or opt.adds or typenum != compute:
        memset(&steps, 0, sizeof(steps))
        memset(&output, 0, sizeof(output))
        output.y = args.y
        output.weight = rows_at(weight, 0)
        output.bias = rows_at(bias, 0)
        steps.x = args.x
        steps.outputs = &output
        steps.output_count = 1
        steps.offset = opt.offset
        steps.round_before_weight = opt.round_before_weight
        steps.round_sum = opt.round_sum
        if opt.adds:
            steps.linear_bias = rows_at(linear_bias, 0)
            steps.residual = rows_at(
                residual, args.shape.cols * cnp.PyArray_ITEMSIZE(<ndarray>residual))
            steps.sum = rows_at(total, args.shape.cols * cnp.PyArray_ITEMSIZE(<ndarray>total))
        args.steps = &steps
    call_layer_norm(&args, dtype_of(compute))
    if opt.adds:
        if not opt.return_stats:
            return y, total
        return (y, total, rstd) if opt.rms else (y, total, mean, rstd)
    if not opt.return_stats:
        return y
    return (y, rstd) if opt.rms else (y, mean, rstd)


cdef inline bint is_bool(object value) noexcept:
    return value is True or value is False


cdef inline double plain_offset(object value) noexcept:
    """A float as it is; NaN where it is none."""
    return PyFloat_AS_DOUBLE(value) if PyFloat_CheckExact(value) else NAN


# ---- layer_norm ----------------------------------------------------------------------------------

def layer_norm(x, normalized_shape=None, weight=None, bias=None, eps=1e-5, *, axis=None, out=None,
               dtype=None, return_stats=False, activation=None, lengths=None, mask=None):
    """layer_norm(x, normalized_shape=None, weight=None, bias=None, eps=1e-5, *, axis=None, \
out=None, dtype=None, return_stats=False, activation=None, lengths=None, mask=None)

    Layer normalization: ``y = (x - mean) / sqrt(var + eps) * weight + bias``.

    Mean and (population) variance are taken over the normalized axes, of each sample by itself and
    in training and inference alike: layer norm has no running statistics.

    Parameters
    ----------
    x : array_like
        float16, bfloat16, float32 or float64 of any shape and layout; integers and booleans become
        float64. The half types are worked on in float32 and rounded once, at the end. Tensors of
        torch, and what offers DLPack or Arrow's interface, are read in place; torch tensors in
        give torch tensors out.
    normalized_shape : int or sequence of int, optional
        Trailing shape to normalize over, as in ``torch.nn.functional.layer_norm``. Default: the
        last axis.
    weight, bias : array_like, optional
        Gain and offset of shape `normalized_shape` (with `axis`: the lengths of the axes in
        ascending order), of any real type. Either may be left out. With more dimensions before
        these, which broadcast against x's leading ones, rows have parameters of their own: (H, D)
        for x of shape (..., H, D) is a pair for each head.
    eps : float
        Added to the variance; not negative.
    axis : int or tuple of int, optional
        Axes to normalize over, in place of `normalized_shape`, as in Keras: any, in any number.
        Where they are not last the array is read in place (``axis=1`` of an (N, C, H, W) array is
        ConvNeXt's LayerNorm2d).
    out : ndarray, optional
        Array for the result, of x's shape and the result's type. It may be x itself, but not
        overlap an input in another way.
    dtype : dtype, optional
        Type of the result; default: x's. ``numpy.int8`` asks for dynamic quantisation, symmetric
        and with a scale a row: ``scale = max(max|y| / 127, tiny)``, ``q = rint(y / scale)``.
        ``"bfloat16"`` gives ml_dtypes' type, or uint16 where ml_dtypes is not installed; where x is
        uint16, it says that x and all that goes with it in uint16 (parameters, outputs) hold the
        bits of bfloat16, and the result is uint16.
    return_stats : bool
        Also return mean and ``rstd = 1 / sqrt(var + eps)``.
    activation : str, optional
        Applied to the result before it is rounded: "relu", "silu", "gelu" (by erf) or "gelu_tanh".
    lengths : array_like of int, optional
        Of the leading shape, or what broadcasts to it: how many elements of each row count, from
        its first on. The others have no influence and their results are 0.
    mask : array_like of bool, optional
        What broadcasts to x's shape: the elements that count. The others' results are 0.

    Returns
    -------
    y : ndarray
        Of x's shape and type, or `dtype` (`out` where given).
    scale : ndarray
        After y where `dtype` is int8: float32 of the leading shape.
    mean, rstd : ndarray
        With `return_stats`, of the leading shape, float32 (float64 for float64 input). They are
        what ``layer_norm_backward`` takes.

    Raises
    ------
    TypeError
        For a type that is not supported (complex, object, masked arrays, tensors that require a
        gradient), or `normalized_shape` and `axis`, or `lengths` and `mask`, together.
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
    cdef options opt
    if (is_last(axis, normalized_shape) and dtype is None and activation is None
            and lengths is None and mask is None and is_bool(return_stats)):
        result = direct_layer_norm(x, normalized_shape, weight, bias, eps, out,
                                   return_stats is True)
        if result is None and PyFloat_CheckExact(eps):
            memset(&opt, 0, sizeof(opt))
            opt.return_stats = return_stats is True
            result = direct_norm(&opt, x, normalized_shape, weight, bias, eps, out, None, None,
                                 None)
        if result is not None:
            return result
    return handlers["layer_norm"](x, normalized_shape, weight, bias, eps, axis, out, dtype,
                                  return_stats, activation, lengths, mask)


def rms_norm(x, normalized_shape=None, weight=None, eps=None, *, axis=None, out=None, dtype=None,
             offset=0.0, round_before_weight=False, return_stats=False, activation=None,
             lengths=None, mask=None):
    """rms_norm(x, normalized_shape=None, weight=None, eps=None, *, axis=None, out=None, \
dtype=None, offset=0.0, round_before_weight=False, return_stats=False, activation=None, \
lengths=None, mask=None)

    Root mean square normalization: ``y = x / sqrt(mean(x^2) + eps) * (weight + offset)``.

    Parameters
    ----------
    x, normalized_shape, axis, out, dtype, activation, lengths, mask
        As for :func:`layer_norm`.
    weight : array_like, optional
        Gain, as for :func:`layer_norm`; None counts as ones, whatever the offset.
    eps : float, optional
        Added to the mean square; not negative. None: the machine epsilon of the type that is
        computed in (float32's for the half types), as in torch.
    offset : float
        Added to the weight, in the type that is computed in: 1 for Gemma's ``1 + weight``.
    round_before_weight : bool
        For half types: round ``x * rstd`` to the result's type before it is multiplied by the
        weight, as Llama and ONNX do, instead of once at the end, as torch and Gemma do.
    return_stats : bool
        Also return ``rstd = 1 / sqrt(mean(x^2) + eps)``.

    Returns
    -------
    y : ndarray
        Of x's shape and type, or `dtype` (`out` where given).
    scale : ndarray
        After y where `dtype` is int8: float32 of the leading shape.
    rstd : ndarray
        With `return_stats`, of the leading shape, float32 (float64 for float64 input).

    Raises
    ------
    TypeError, ValueError
        As :func:`layer_norm`.

    References
    ----------
    Zhang, Sennrich: Root Mean Square Layer Normalization, arXiv 1910.07467 (2019).

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> fastnorm.rms_norm(np.float32([[1, 7], [0, 0]]))
    array([[0.2, 1.4],
           [0. , 0. ]], dtype=float32)
    """
    cdef options opt
    if (is_last(axis, normalized_shape) and dtype is None and activation is None
            and lengths is None and mask is None and is_bool(return_stats)
            and is_bool(round_before_weight)):
        memset(&opt, 0, sizeof(opt))
        opt.rms = True
        opt.return_stats = return_stats is True
        opt.round_before_weight = round_before_weight is True
        opt.offset = plain_offset(offset)
        if opt.offset - opt.offset == 0:
            result = direct_norm(&opt, x, normalized_shape, weight, None, eps, out, None, None,
                                 None)
            if result is not None:
                return result
    return handlers["rms_norm"](x, normalized_shape, weight, eps, axis, out, dtype, offset,
                                round_before_weight, return_stats, activation, lengths, mask)


# ---- a residual added before the norm ------------------------------------------------------------

def add_layer_norm(x, residual, normalized_shape=None, weight=None, bias=None, eps=1e-5, *,
                   axis=None, out=None, sum_out=None, dtype=None, linear_bias=None, round_sum=True,
                   return_stats=False, activation=None):
    """add_layer_norm(x, residual, normalized_shape=None, weight=None, bias=None, eps=1e-5, *, \
axis=None, out=None, sum_out=None, dtype=None, linear_bias=None, round_sum=True, \
return_stats=False, activation=None)

    Layer normalization of a sum, which is returned too: ``s = (x + linear_bias) + residual``,
    ``y = layer_norm(s)``.

    Parameters
    ----------
    x, residual : array_like
        Of one shape, of any types.
    normalized_shape, weight, bias, eps, axis, activation
        As for :func:`layer_norm`.
    out, sum_out : ndarray, optional
        Arrays for y and for the sum, of x's shape. `out` may be x, and `sum_out` x or residual
        itself; they may not overlap each other or an input in another way.
    dtype : dtype, optional
        Type of y; default: x's. As for :func:`layer_norm`, int8 included.
    linear_bias : array_like, optional
        Of the normalized shape: the bias of the linear layer that x comes from.
    round_sum : bool
        Where the sum is of a half type, whether the statistics see it as it is returned (Hugging
        Face, Liger: y is then what ``layer_norm(sum)`` gives, to the bit) or before it was rounded
        (ONNX Runtime, flash-attn).
    return_stats : bool
        Also return mean and rstd.

    Returns
    -------
    y : ndarray
        Of x's shape and type, or `dtype`; followed by its scale where that is int8.
    sum : ndarray
        Of x's shape and the wider of x's and residual's types. Each addition is rounded in
        float32 (float64 where either is float64), and the sum once more.
    mean, rstd : ndarray
        With `return_stats`, of the leading shape.

    Raises
    ------
    TypeError, ValueError
        As :func:`layer_norm`.

    References
    ----------
    ONNX Runtime's SkipLayerNormalization (whose eps is 1e-12).
    """
    cdef options opt
    if (is_last(axis, normalized_shape) and dtype is None and activation is None
            and is_bool(return_stats) and is_bool(round_sum) and PyFloat_CheckExact(eps)):
        memset(&opt, 0, sizeof(opt))
        opt.adds = True
        opt.return_stats = return_stats is True
        opt.round_sum = round_sum is True
        result = direct_norm(&opt, x, normalized_shape, weight, bias, eps, out, residual,
                             linear_bias, sum_out)
        if result is not None:
            return result
    return handlers["add_layer_norm"](x, residual, normalized_shape, weight, bias, eps, axis, out,
                                      sum_out, dtype, linear_bias, round_sum, return_stats,
                                      activation)


def add_rms_norm(x, residual, normalized_shape=None, weight=None, eps=None, *, axis=None, out=None,
                 sum_out=None, dtype=None, linear_bias=None, offset=0.0, round_before_weight=False,
                 round_sum=True, return_stats=False, activation=None):
    """add_rms_norm(x, residual, normalized_shape=None, weight=None, eps=None, *, axis=None, \
out=None, sum_out=None, dtype=None, linear_bias=None, offset=0.0, round_before_weight=False, \
round_sum=True, return_stats=False, activation=None)

    Root mean square normalization of a sum, which is returned too.

    Parameters
    ----------
    x, residual, out, sum_out, dtype, linear_bias, round_sum
        As for :func:`add_layer_norm`.
    normalized_shape, weight, eps, axis, offset, round_before_weight, return_stats, activation
        As for :func:`rms_norm`.

    Returns
    -------
    y, sum, rstd
        As :func:`add_layer_norm`, without a mean.

    Raises
    ------
    TypeError, ValueError
        As :func:`layer_norm`.

    References
    ----------
    ONNX Runtime's SkipSimplifiedLayerNormalization.
    """
    cdef options opt
    if (is_last(axis, normalized_shape) and dtype is None and activation is None
            and is_bool(return_stats) and is_bool(round_sum) and is_bool(round_before_weight)):
        memset(&opt, 0, sizeof(opt))
        opt.rms = opt.adds = True
        opt.return_stats = return_stats is True
        opt.round_sum = round_sum is True
        opt.round_before_weight = round_before_weight is True
        opt.offset = plain_offset(offset)
        if opt.offset - opt.offset == 0:
            result = direct_norm(&opt, x, normalized_shape, weight, None, eps, out, residual,
                                 linear_bias, sum_out)
            if result is not None:
                return result
    return handlers["add_rms_norm"](x, residual, normalized_shape, weight, eps, axis, out, sum_out,
                                    dtype, linear_bias, offset, round_before_weight, round_sum,
                                    return_stats, activation)


# ---- arrays of rows of any layout ----------------------------------------------------------------

cdef dict plan_dict(fn_plan plan, fn_shape shape):
    return {
        "threads": plan.threads,
        "stream": bool(plan.stream),
        "regime": plan.regime.decode(),
        "bytes": plan.bytes,
        "rows": shape.rows,
        "cols": shape.cols,
    }


@cython.auto_pickle(False)
cdef class Frame:
    """Arrays of one shape, (rows..., elements...), as the kernels walk them.

    They broadcast to the first one. Axes that one stride can walk in every array are merged, and
    axes of length 1 left out, whatever their stride says. None stands for an absent array."""

    cdef list arrays
    cdef int lead_ndim, col_ndim
    cdef Py_ssize_t lead_shape[MAX_OUTER]
    cdef Py_ssize_t col_shape[MAX_OUTER]
    cdef Py_ssize_t *strides  # of each array: its lead strides, then its column strides

    def __cinit__(self, list arrays, int lead):
        cdef ndarray first
        self.arrays = arrays
        self.strides = <Py_ssize_t *>malloc(len(arrays) * 2 * MAX_OUTER * sizeof(Py_ssize_t))
        if self.strides is NULL:
            raise MemoryError("no memory for the strides of the arguments")
        first = next(a for a in arrays if a is not None)
        self.lead_ndim = self.merge(first, 0, lead, self.lead_shape, 0)
        self.col_ndim = self.merge(first, lead, cnp.PyArray_NDIM(first), self.col_shape, MAX_OUTER)

    def __dealloc__(self):
        free(self.strides)

    cdef int merge(self, ndarray first, int begin, int end, Py_ssize_t *shape, int place):
        cdef int d, k, ndim = 0, count = <int>len(self.arrays)
        cdef Py_ssize_t *strides
        cdef bint merges
        cdef ndarray a
        for d in range(begin, end):
            if cnp.PyArray_DIM(first, d) == 1:
                continue
            merges = ndim > 0
            for k in range(count):
                if merges and self.arrays[k] is not None:
                    a = self.arrays[k]
                    strides = self.strides + 2 * MAX_OUTER * k + place
                    merges = strides[ndim - 1] == (
                        stride_in(a, d, first) * cnp.PyArray_DIM(first, d))
            if merges:
                shape[ndim - 1] *= cnp.PyArray_DIM(first, d)
            else:
                shape[ndim] = cnp.PyArray_DIM(first, d)
                ndim += 1
            for k in range(count):
                if self.arrays[k] is not None:
                    a = self.arrays[k]
                    self.strides[2 * MAX_OUTER * k + place + ndim - 1] = stride_in(a, d, first)
        return ndim

    cdef void shape(self, fn_shape *shape):
        cdef int d
        shape.rows = shape.cols = 1
        for d in range(self.lead_ndim):
            shape.rows *= self.lead_shape[d]
        for d in range(self.col_ndim):
            shape.cols *= self.col_shape[d]
        shape.outer_ndim = self.lead_ndim - 1 if self.lead_ndim > 1 else 0
        shape.inner = self.lead_shape[self.lead_ndim - 1] if self.lead_ndim else 1
        shape.outer_shape = self.lead_shape
        shape.col_ndim = self.col_ndim
        shape.col_shape = self.col_shape

    cdef bint one_stride(self, Py_ssize_t *lead) noexcept:
        """Whether an array's innermost row stride reaches all of its rows."""
        cdef int d
        cdef Py_ssize_t expected
        if self.lead_ndim < 2:
            return True
        expected = lead[self.lead_ndim - 1]
        for d in range(self.lead_ndim - 1, -1, -1):
            if lead[d] != expected:
                return False
            expected *= self.lead_shape[d]
        return True

    cdef bint contiguous(self, Py_ssize_t *cols, Py_ssize_t size) noexcept:
        cdef int d
        for d in range(self.col_ndim - 1, -1, -1):
            if cols[d] != size:
                return False
            size *= self.col_shape[d]
        return True

    cdef fn_rows rows(self, int k):
        cdef fn_rows rows
        cdef Py_ssize_t *lead = self.strides + 2 * MAX_OUTER * k
        cdef Py_ssize_t *cols = lead + MAX_OUTER
        cdef ndarray a
        memset(&rows, 0, sizeof(rows))
        if self.arrays[k] is None:
            return rows
        a = self.arrays[k]
        rows.data = cnp.PyArray_DATA(a)
        rows.stride = lead[self.lead_ndim - 1] if self.lead_ndim else 0
        rows.outer_strides = NULL if self.one_stride(lead) else lead
        rows.col_strides = NULL if self.contiguous(cols, cnp.PyArray_ITEMSIZE(a)) else cols
        rows.dtype = storage_of(a)
        return rows


cdef inline Py_ssize_t stride_in(ndarray a, int d, ndarray full) noexcept:
    """The stride of `a` along axis d of `full`, to which it broadcasts."""
    d -= cnp.PyArray_NDIM(full) - cnp.PyArray_NDIM(a)
    return cnp.PyArray_STRIDE(a, d) if d >= 0 and cnp.PyArray_DIM(a, d) > 1 else 0


cdef inline fn_dtype storage_of(ndarray a):
    """As dtype_of; what is neither NumPy's own nor a mask's byte is bfloat16, or its bits."""
    cdef int typenum = cnp.PyArray_TYPE(a)
    if typenum == cnp.NPY_BOOL:
        return FN_I8
    return dtype_of(typenum)


cdef inline bint is_plain_rows(fn_rows *rows, fn_dtype dtype) noexcept:
    return rows.dtype == dtype and rows.col_strides is NULL


cdef inline bint is_plain_parameter(fn_rows *rows, fn_dtype dtype) noexcept:
    return rows.data is NULL or (
        is_plain_rows(rows, dtype) and rows.stride == 0 and rows.outer_strides is NULL
    )


def norm_rows(int lead, object compute, object x, list outputs, double eps, *, bint rms=False,
              gate=None, linear_bias=None, residual=None, total=None, bint round_sum=True,
              double offset=0.0, bint round_before_weight=False, int activation=0, lengths=None,
              mask=None, mean=None, rstd=None, bint warm=False, bint plan=False):
    """The forward kernel on checked arrays, of shape (rows..., elements...), `lead` axes of rows.

    All are native, aligned, and of storage types; parameters broadcast to x's shape. `outputs`
    holds (weight, bias, y, scale) of each; lengths (intp), mean, rstd, scale are C-contiguous.
    With `plan`, say what would be done."""
    cdef fn_layer_norm_args args
    cdef fn_steps steps
    cdef fn_output *made
    cdef int count = <int>len(outputs), i
    cdef fn_dtype dtype = dtype_of(compute.num)
    cdef list arrays = [x, gate, linear_bias, residual, total, mask]
    for weight, bias, y, _scale in outputs:
        arrays += [weight, bias, y]
    cdef Frame frame = Frame(arrays, lead)
    memset(&args, 0, sizeof(args))
    memset(&steps, 0, sizeof(steps))
    frame.shape(&args.shape)
    made = <fn_output *>malloc((count + 1) * sizeof(fn_output))
    if made is NULL:
        raise MemoryError("no memory for the outputs")
    try:
        for i in range(count):
            made[i].weight = frame.rows(6 + 3 * i)
            made[i].bias = frame.rows(7 + 3 * i)
            made[i].y = frame.rows(8 + 3 * i)
            made[i].scales = <float *>parameter_data(outputs[i][3])
        steps.x = args.x = frame.rows(0)
        steps.gate = frame.rows(1)
        steps.linear_bias = frame.rows(2)
        steps.residual = frame.rows(3)
        steps.sum = frame.rows(4)
        steps.mask = frame.rows(5)
        steps.round_sum = round_sum
        steps.outputs = made
        steps.output_count = count
        steps.offset = offset
        steps.round_before_weight = round_before_weight
        steps.activation = <fn_activation>activation
        steps.lengths = <const Py_ssize_t *>parameter_data(lengths)
        args.mean = <void *>parameter_data(mean)
        args.rstd = <void *>parameter_data(rstd)
        args.eps = eps
        args.rms = rms
        args.y_is_warm = warm
        args.y = made[0].y
        args.weight = made[0].weight.data
        args.bias = made[0].bias.data
        if not (
            count == 1 and is_plain_rows(&args.x, dtype) and is_plain_rows(&args.y, dtype)
            and is_plain_parameter(&made[0].weight, dtype)
            and is_plain_parameter(&made[0].bias, dtype)
            and steps.gate.data is NULL and steps.linear_bias.data is NULL
            and steps.residual.data is NULL and steps.sum.data is NULL and steps.mask.data is NULL
            and steps.lengths is NULL and (offset == 0 or args.weight is NULL)
            and activation == 0
        ):
            args.steps = &steps
        if plan:
            return plan_dict(fn_plan_layer_norm(&args, dtype, 0), args.shape)
        call_layer_norm(&args, dtype)
    finally:
        free(made)


def norm_segments(object compute, ndarray x, ndarray starts, Py_ssize_t longest, weight, bias,
                  ndarray y, scale, double eps, *, bint rms=False, double offset=0.0,
                  int activation=0, mean=None, rstd=None, bint plan=False):
    """The forward kernel on packed rows: x and y contiguous, row r from element starts[r] (intp) to
    starts[r + 1], `longest` the most that one has; weight and bias of one length, which divides
    every row's."""
    cdef fn_layer_norm_args args
    cdef fn_steps steps
    cdef fn_output output
    cdef fn_dtype dtype = dtype_of(compute.num)
    memset(&args, 0, sizeof(args))
    memset(&output, 0, sizeof(output))
    packed_steps(&steps, &args.shape, x, starts, longest, weight, bias, offset, &output)
    output.y = rows_at(y, 0)
    output.scales = <float *>parameter_data(scale)
    steps.activation = <fn_activation>activation
    args.mean = <void *>parameter_data(mean)
    args.rstd = <void *>parameter_data(rstd)
    args.eps = eps
    args.rms = rms
    args.steps = &steps
    if plan:
        return plan_dict(fn_plan_layer_norm(&args, dtype, 0), args.shape)
    call_layer_norm(&args, dtype)


cdef void packed_steps(fn_steps *steps, fn_shape *shape, ndarray x, ndarray starts,
                       Py_ssize_t longest, weight, bias, double offset, fn_output *output):
    memset(steps, 0, sizeof(steps[0]))
    shape.rows = cnp.PyArray_SIZE(starts) - 1
    shape.cols = longest
    shape.outer_ndim = shape.col_ndim = 0
    output.weight = rows_at(weight, 0)
    output.bias = rows_at(bias, 0)
    steps.x = rows_at(x, 0)
    steps.outputs = output
    steps.output_count = 1
    steps.offset = offset
    steps.starts = <const Py_ssize_t *>cnp.PyArray_DATA(starts)
    if weight is not None:
        steps.param_cols = cnp.PyArray_SIZE(<ndarray>weight)
    elif bias is not None:
        steps.param_cols = cnp.PyArray_SIZE(<ndarray>bias)


# ---- layer_norm_backward -------------------------------------------------------------------------

cdef int call_backward(fn_layer_norm_backward_args *args, fn_dtype dtype):
    cdef int status
    if is_long(&args.shape, args.steps, dtype, 3):
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


cdef inline int wanted(object output_mask, int count) noexcept:
    """Bits for dx, dweight, dbias; -1 where it is not a tuple of `count` bools."""
    cdef int bits = 0, i
    cdef object item
    if not PyTuple_CheckExact(output_mask) or PyTuple_GET_SIZE(output_mask) != count:
        return -1
    for i in range(count):
        item = <object>PyTuple_GET_ITEM(output_mask, i)
        if item is True:
            bits |= 1 << i
        elif item is not False:
            return -1
    return bits


cdef object direct_backward(object dy_object, object x_object, object normalized_shape, object mean,
                            object rstd, object weight, object bias, int mask, bint rms):
    """The straight path; None where it does not apply. With `rms` there is no mean."""
    cdef fn_layer_norm_backward_args args
    cdef ndarray x
    cdef object dx = None, dweight = None, dbias = None
    cdef int typenum, axes, first
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
    if not (rms or is_statistic(mean, typenum, x, axes)):
        return None
    if not is_statistic(rstd, typenum, x, axes):
        return None
    stride = plain_rows(x, axes, &args.shape)
    if args.shape.rows == 0:
        return None
    first = cnp.PyArray_NDIM(x) - axes
    args.rms = rms
    args.dx_is_warm = 0
    args.steps = NULL
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
                        output_mask=(True, True, True), from_output=False, lengths=None,
                        mask=None):
    """layer_norm_backward(dy, x, normalized_shape, mean, rstd, weight=None, bias=None, *, \
axis=None, output_mask=(True, True, True), from_output=False, lengths=None, mask=None)

    Gradients of :func:`layer_norm`: dx, dweight and dbias.

    With ``xh = (x - mean) * rstd`` and ``g = dy * weight``::

        dx = rstd * (g - mean(g) - xh * mean(g * xh))
        dweight = sum over rows of dy * xh
        dbias = sum over rows of dy

    Parameters
    ----------
    dy, x : array_like
        Gradient of the output, and the input, of one shape, of any type and layout.
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
    from_output : bool
        `x` is what the forward call returned (without an activation), so that its input need not
        be kept: ``xh = (x - bias) / weight``, which asks for a weight without zeros. `mean` is not
        read, and may be None.
    lengths, mask : array_like, optional
        The forward call's.

    Returns
    -------
    dx : ndarray or None
        Of x's shape and type.
    dweight, dbias : ndarray or None
        Of the weight's shape, or the normalized one, in float32 (float64 for float64 input); zeros
        where there are no rows. Rows are summed in an
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
    if (is_last(axis, normalized_shape) and from_output is False and lengths is None
            and mask is None):
        result = direct_backward(dy, x, normalized_shape, mean, rstd, weight, bias,
                                 wanted(output_mask, 3), False)
        if result is not None:
            return result
    return handlers["layer_norm_backward"](dy, x, normalized_shape, mean, rstd, weight, bias, axis,
                                           output_mask, from_output, lengths, mask)


def rms_norm_backward(dy, x, normalized_shape, rstd, weight=None, *, axis=None, offset=0.0,
                      output_mask=(True, True), from_output=False, lengths=None, mask=None):
    """rms_norm_backward(dy, x, normalized_shape, rstd, weight=None, *, axis=None, offset=0.0, \
output_mask=(True, True), from_output=False, lengths=None, mask=None)

    Gradients of :func:`rms_norm`: dx and dweight.

    With ``xh = x * rstd`` and ``g = dy * (weight + offset)``::

        dx = rstd * (g - xh * mean(g * xh))
        dweight = sum over rows of dy * xh

    Parameters
    ----------
    dy, x, normalized_shape, weight, axis, from_output, lengths, mask
        As for :func:`layer_norm_backward`.
    rstd : array_like
        What ``rms_norm(x, ..., return_stats=True)`` returned.
    offset : float
        The forward call's.
    output_mask : two bools
        Which of dx and dweight to compute; the other comes back as None.

    Returns
    -------
    dx, dweight
        As :func:`layer_norm_backward`.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As :func:`layer_norm_backward`.

    References
    ----------
    Zhang, Sennrich: Root Mean Square Layer Normalization, arXiv 1910.07467 (2019).
    """
    if (is_last(axis, normalized_shape) and from_output is False and lengths is None
            and mask is None and plain_offset(offset) == 0):
        result = direct_backward(dy, x, normalized_shape, None, rstd, weight, None,
                                 wanted(output_mask, 2), True)
        if result is not None:
            return result[:2]
    return handlers["rms_norm_backward"](dy, x, normalized_shape, rstd, weight, axis, offset,
                                         output_mask, from_output, lengths, mask)


def norm_backward_rows(int lead, object compute, object dy, object x, object dx, weight, bias,
                       mean, rstd, dweight, dbias, *, bint rms=False, double offset=0.0,
                       bint from_output=False, lengths=None, mask=None, bint warm=False,
                       bint plan=False):
    """The backward kernel on arrays as norm_rows has them; dweight and dbias are C-contiguous."""
    cdef fn_layer_norm_backward_args args
    cdef fn_steps steps
    cdef fn_output output
    cdef fn_dtype dtype = dtype_of(compute.num)
    cdef Frame frame = Frame([x, dy, dx, weight, bias, mask], lead)
    memset(&args, 0, sizeof(args))
    memset(&steps, 0, sizeof(steps))
    memset(&output, 0, sizeof(output))
    frame.shape(&args.shape)
    steps.x = args.x = frame.rows(0)
    args.dy = frame.rows(1)
    args.dx = frame.rows(2)
    output.weight = frame.rows(3)
    output.bias = frame.rows(4)
    steps.mask = frame.rows(5)
    steps.outputs = &output
    steps.output_count = 1
    steps.offset = offset
    steps.from_output = from_output
    steps.lengths = <const Py_ssize_t *>parameter_data(lengths)
    args.weight = output.weight.data
    backward_results(&args, mean, rstd, dweight, dbias, rms, warm)
    if not (
        is_plain_rows(&args.x, dtype) and is_plain_rows(&args.dy, dtype)
        and (dx is None or is_plain_rows(&args.dx, dtype))
        and is_plain_parameter(&output.weight, dtype) and (offset == 0 or args.weight is NULL)
        and not from_output and steps.lengths is NULL and steps.mask.data is NULL
    ):
        args.steps = &steps
    if plan:
        return plan_dict(fn_plan_layer_norm_backward(&args, dtype, 0), args.shape)
    if call_backward(&args, dtype) != FN_OK:
        raise_no_memory(args.shape.cols)


def norm_segments_backward(object compute, ndarray dy, ndarray x, dx, ndarray starts,
                           Py_ssize_t longest, weight, mean, rstd, dweight, dbias,
                           Py_ssize_t param_cols, *, bint rms=False, double offset=0.0,
                           bint plan=False):
    """The backward kernel on packed rows, as norm_segments has them."""
    cdef fn_layer_norm_backward_args args
    cdef fn_steps steps
    cdef fn_output output
    cdef fn_dtype dtype = dtype_of(compute.num)
    memset(&args, 0, sizeof(args))
    memset(&output, 0, sizeof(output))
    packed_steps(&steps, &args.shape, x, starts, longest, weight, None, offset, &output)
    steps.param_cols = param_cols
    args.x = steps.x
    args.dy = rows_at(dy, 0)
    args.dx = rows_at(dx, 0)
    backward_results(&args, mean, rstd, dweight, dbias, rms, False)
    args.steps = &steps
    if plan:
        return plan_dict(fn_plan_layer_norm_backward(&args, dtype, 0), args.shape)
    if call_backward(&args, dtype) != FN_OK:
        raise_no_memory(args.shape.cols)


cdef void backward_results(fn_layer_norm_backward_args *args, mean, rstd, dweight, dbias, bint rms,
                           bint warm):
    args.mean = parameter_data(mean)
    args.rstd = parameter_data(rstd)
    args.dweight = <void *>parameter_data(dweight)
    args.dbias = <void *>parameter_data(dbias)
    args.rms = rms
    args.dx_is_warm = warm


# ---- moments -------------------------------------------------------------------------------------

def moments(x, axis=None):
    """moments(x, axis=None)

    Mean and population variance (ddof 0), by layer_norm's own arithmetic.

    Parameters
    ----------
    x : array_like
        Of any real type and layout; integers and booleans become float64.
    axis : int or tuple of int, optional
        Axes to reduce. Default: the last.

    Returns
    -------
    mean, variance : ndarray
        Of x's shape without those axes, float32 (float64 for float64 input). Over no elements:
        mean 0, variance NaN.

    Raises
    ------
    TypeError, ValueError
        As :func:`layer_norm`.
    """
    return handlers["moments"](x, axis)


def moments_rows(int lead, object compute, ndarray x, mean, variance, bint plan=False):
    """The kernel on a checked array, as norm_rows has it."""
    cdef fn_moments_args args
    cdef fn_steps steps
    cdef fn_dtype dtype = dtype_of(compute.num)
    cdef Frame frame = Frame([x], lead)
    cdef int status
    memset(&args, 0, sizeof(args))
    memset(&steps, 0, sizeof(steps))
    frame.shape(&args.shape)
    steps.x = args.x = frame.rows(0)
    args.mean = <void *>parameter_data(mean)
    args.variance = <void *>parameter_data(variance)
    if not is_plain_rows(&args.x, dtype):
        args.steps = &steps
    if plan:
        return plan_dict(fn_plan_moments(&args, dtype, 0), args.shape)
    if is_long(&args.shape, args.steps, dtype, 1):
        with nogil:
            status = fn_moments(&args, dtype, 0)
    else:
        status = fn_moments(&args, dtype, 0)
    if status != FN_OK:
        raise_no_scratch(args.shape.cols)


# ---- the bound call: parameters checked once -----------------------------------------------------

cdef inline bint is_own_parameter(object w, int typenum, Py_ssize_t cols) noexcept:
    """Whether a module's parameter, which was laid out for it, is still as it was."""
    return w is None or (
        cnp.PyArray_TYPE(<ndarray>w) == typenum and cnp.PyArray_SIZE(<ndarray>w) == cols
    )


@cython.auto_pickle(False)
cdef class BoundNorm:
    """What the modules are made of: parameters, and the fastest call.

    Nothing of a call stays on the object, so any number of threads may call one."""

    cdef readonly tuple normalized_shape
    cdef readonly object dtype
    cdef object _eps, _weight, _bias
    cdef options opt
    # What every call would otherwise find out again. No array is of type -1.
    cdef double eps_value
    cdef int typenum
    cdef Py_ssize_t cols

    def __init__(self, tuple normalized_shape, eps, dtype, *, bint rms=False, double offset=0.0,
                 bint round_before_weight=False):
        memset(&self.opt, 0, sizeof(self.opt))
        self.normalized_shape = normalized_shape
        self.dtype = dtype
        self.opt.rms = rms
        self.opt.offset = offset
        self.opt.round_before_weight = round_before_weight
        self.typenum = dtype.num if compute_type(dtype.num) == dtype.num else -1
        self.cols = normalized_shape[0] if len(normalized_shape) == 1 else -1
        self._set("eps", eps)
        self._set("weight", None)
        self._set("bias", None)

    def _set(self, str name, value):
        """Store a checked eps, weight or bias."""
        if name == "eps":
            self._eps = value
            self.eps_value = eps_of(value, self.typenum)
        elif name == "weight":
            self._weight = value
        else:
            self._bias = value

    def _get(self, str name):
        return {
            "eps": self._eps,
            "weight": self._weight,
            "bias": self._bias,
            "offset": self.opt.offset,
            "round_before_weight": self.opt.round_before_weight,
        }[name]

    def __call__(self, x, out=None):
        """Normalize x over its trailing `normalized_shape`; see the function of this name."""
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
            and (self.opt.offset == 0 or weight is None)
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
            args.rms = self.opt.rms
            args.steps = NULL
            args.eps = self.eps_value
            call_layer_norm(&args, dtype_of(self.typenum))
            return y
        y = direct_norm(&self.opt, x, self.normalized_shape, weight, bias, self._eps, out, None,
                        None, None)
        return self._checked_call(x, out) if y is None else y

    cdef object _checked_call(self, x, out):
        cdef object weight = self._weight, bias = self._bias
        if not cnp.PyArray_Check(x):
            weight, bias = self._beside("weight", x), self._beside("bias", x)
        if self.opt.rms:
            return rms_norm(x, self.normalized_shape, weight, self._eps, out=out,
                            offset=self.opt.offset,
                            round_before_weight=bool(self.opt.round_before_weight))
        return layer_norm(x, self.normalized_shape, weight, bias, self._eps, out=out)


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
