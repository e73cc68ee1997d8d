# What an ndarray is, asked in C: its type, whether the kernels may read or write it as it lies, and
# the fn_rows that says so.

cdef enum:
    C_ALIGNED = cnp.NPY_ARRAY_C_CONTIGUOUS | cnp.NPY_ARRAY_ALIGNED
    C_ALIGNED_WRITEABLE = C_ALIGNED | cnp.NPY_ARRAY_WRITEABLE

#: ml_dtypes.bfloat16's number, once somebody has used it (it is not NumPy's own); else none's.
cdef int bfloat16_number = -1


def set_bfloat16(dtype):
    """Let the straight path know this dtype as bfloat16."""
    global bfloat16_number
    bfloat16_number = dtype.num


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


cdef double EPS_F32 = 1.1920928955078125e-07
cdef double EPS_F64 = 2.220446049250313e-16


cdef inline bint is_any_parameter(object w, ndarray x, int axes) noexcept:
    """None, or a plain array of any storage type with x's trailing shape."""
    return w is None or (
        cnp.PyArray_CheckExact(w)
        and is_storage(cnp.PyArray_TYPE(<ndarray>w))
        and is_parameter(w, cnp.PyArray_TYPE(<ndarray>w), x, axes)
    )


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


cdef inline bint is_sum(object out, ndarray x, int typenum, object residual) noexcept:
    """Whether the sum may be written to `out`: it is, or shares no byte with, x, and residual."""
    return (
        is_plain(out, typenum, C_ALIGNED_WRITEABLE) and same_shape(<ndarray>out, x)
        and (out is x or apart(<ndarray>out, x))
        and (out is residual or apart(<ndarray>out, residual))
    )
