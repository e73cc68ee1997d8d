# Weight norm and unit norm: the struct of weights.c, filled from arrays that weight_calls.py has
# checked; and the calls that are plain enough to go straight down.

cdef enum:
    #: NumPy's own.
    MAX_DIMS = 64

#: Who does what a call refused: (layout, v, w, g, eps, norm, refused, dw, along).
cdef object careful_vectors = None


def register_careful_vectors(function):
    """Let `function` do the vectors that straight calls refuse."""
    global careful_vectors
    careful_vectors = function


cdef int call_weight_norm(fn_weight_norm_args *args, fn_dtype dtype) except -1:
    cdef int status
    cdef Py_ssize_t elements = args.samples * args.outer * args.kinds * args.inner
    if moves_much(elements, dtype, 2 if args.dw is NULL else 3):
        with nogil:
            status = fn_weight_norm(args, dtype, 0)
    else:
        status = fn_weight_norm(args, dtype, 0)
    return raise_no_room(status)


def weight_norm(layout, compute, ndarray v, w, g, double eps, ndarray norm, ndarray refused,
                dw=None, along=None, *, bint given=False, bint warm=False, bint plan=False):
    """w from v, or where there is a dw, dv in w (or None) and `along`: contiguous arrays seen as
    `layout`, (samples, outer, kinds, inner). g (or None), norm and along: doubles; norm is read
    where it is `given`, else written."""
    cdef fn_weight_norm_args args
    cdef fn_dtype dtype = dtype_of(compute.num)
    memset(&args, 0, sizeof(args))
    args.samples, args.outer, args.kinds, args.inner = layout
    args.v, args.dw = cnp.PyArray_DATA(v), parameter_data(dw)
    args.w = <void *>parameter_data(w)
    args.v_type = args.w_type = args.dw_type = storage_of(v)
    if w is not None:
        args.w_type = storage_of(w)
    if dw is not None:
        args.dw_type = storage_of(dw)
    args.g, args.g_type = parameter_data(g), FN_F64
    args.eps = eps
    args.norm = <double *>cnp.PyArray_DATA(norm)
    args.along = <double *>parameter_data(along)
    args.refused = <unsigned char *>cnp.PyArray_DATA(refused)
    args.given = given
    args.w_is_warm = warm
    if plan:
        return plan_dict(fn_plan_weight_norm(&args, dtype, 0), args.samples * args.kinds,
                         args.outer * args.inner)
    call_weight_norm(&args, dtype)


# ---- straight down -------------------------------------------------------------------------------

cdef struct vectors:
    fn_weight_norm_args args
    fn_dtype dtype
    int typenum
    #: The axis of weight norm's kinds, or -1 for none; the first of unit norm's axes, and what
    #: follows the last.
    int axis, end
    Py_ssize_t count


cdef inline bint plain_vectors(object v, vectors *s) noexcept:
    """Whether v is a plain array of what is computed in, not empty."""
    if not cnp.PyArray_CheckExact(v) or cnp.PyArray_NDIM(<ndarray>v) == 0:
        return False
    memset(s, 0, sizeof(s[0]))
    s.typenum = cnp.PyArray_TYPE(<ndarray>v)
    if s.typenum != cnp.NPY_FLOAT32 and s.typenum != cnp.NPY_FLOAT64:
        return False
    s.dtype = dtype_of(s.typenum)
    s.args.v = cnp.PyArray_DATA(<ndarray>v)
    s.args.v_type = s.args.w_type = s.args.dw_type = s.args.g_type = s.dtype
    return is_plain(v, s.typenum, C_ALIGNED) and cnp.PyArray_SIZE(<ndarray>v) != 0


cdef inline bint plain_axis(object axis, ndarray v, int *into) noexcept:
    cdef int overflow, ndim = cnp.PyArray_NDIM(v)
    cdef long long index
    if not PyLong_CheckExact(axis):
        return False
    index = PyLong_AsLongLongAndOverflow(axis, &overflow)
    if overflow or index < -ndim or index >= ndim:
        return False
    into[0] = <int>(index + ndim if index < 0 else index)
    return True


cdef bint plain_axes(object axis, ndarray x, vectors *s) noexcept:
    """Whether these are an int, or ascending ints one after the other."""
    cdef int i, at
    if not PyTuple_CheckExact(axis):
        s.end = plain_axis(axis, x, &s.axis) and s.axis + 1
        return s.end != 0
    if PyTuple_GET_SIZE(axis) == 0 or not plain_axis(axis[0], x, &s.axis):
        return False
    s.end = s.axis + <int>PyTuple_GET_SIZE(axis)
    for i in range(s.axis + 1, s.end):
        if not plain_axis(axis[i - s.axis], x, &at) or at != i:
            return False
    return True


cdef inline void lay_out(ndarray v, Py_ssize_t samples, Py_ssize_t outer, Py_ssize_t kinds,
                         Py_ssize_t inner, vectors *s) noexcept:
    """As VectorCall.layout of weight_calls.py has it."""
    if outer * inner == 1:
        kinds, samples = kinds * samples, 1
    if kinds == 1:
        inner, outer = inner * outer, 1
    s.args.samples, s.args.outer, s.args.kinds, s.args.inner = samples, outer, kinds, inner
    s.count = samples * kinds


cdef inline Py_ssize_t product_of(ndarray v, int first, int end) noexcept:
    cdef Py_ssize_t product = 1
    cdef int d
    for d in range(first, end):
        product *= cnp.PyArray_DIM(v, d)
    return product


cdef bint weight_layout(object v, object dim, vectors *s) noexcept:
    """Whether all is plain about these; where vectors lie."""
    cdef int ndim
    if not plain_vectors(v, s):
        return False
    ndim = cnp.PyArray_NDIM(<ndarray>v)
    s.args.eps = -1
    if dim is None:
        s.axis = -1
        lay_out(<ndarray>v, 1, 1, 1, cnp.PyArray_SIZE(<ndarray>v), s)
        return True
    if not plain_axis(dim, <ndarray>v, &s.axis):
        return False
    lay_out(<ndarray>v, 1, product_of(<ndarray>v, 0, s.axis),
            cnp.PyArray_DIM(<ndarray>v, s.axis), product_of(<ndarray>v, s.axis + 1, ndim), s)
    return True


cdef bint unit_layout(object x, object axis, object eps, vectors *s) noexcept:
    if not plain_vectors(x, s) or not PyFloat_CheckExact(eps):
        return False
    if not plain_axes(axis, <ndarray>x, s):
        return False
    s.args.eps = PyFloat_AS_DOUBLE(eps)
    lay_out(<ndarray>x, product_of(<ndarray>x, 0, s.axis), product_of(<ndarray>x, s.axis, s.end),
            product_of(<ndarray>x, s.end, cnp.PyArray_NDIM(<ndarray>x)), 1, s)
    return s.args.eps >= 0


cdef int kept_shape(ndarray v, int axis, npy_intp *dims) noexcept:
    """Of g: v's axes with 1 in the place of all but one; () where there is none."""
    cdef int d, ndim = cnp.PyArray_NDIM(v)
    for d in range(ndim):
        dims[d] = cnp.PyArray_DIM(v, d) if d == axis else 1
    return 0 if axis < 0 else ndim


cdef int lead_shape(ndarray x, const vectors *s, npy_intp *dims) noexcept:
    """Of unit norm's norms: x's axes but the vectors'."""
    cdef int d, ndim = 0
    for d in range(cnp.PyArray_NDIM(x)):
        if d < s.axis or d >= s.end:
            dims[ndim] = cnp.PyArray_DIM(x, d)
            ndim += 1
    return ndim


cdef bint is_plain_of_shape(object a, int typenum, int ndim, const npy_intp *dims) noexcept:
    cdef int d
    if not is_plain(a, typenum, C_ALIGNED) or cnp.PyArray_NDIM(<ndarray>a) != ndim:
        return False
    for d in range(ndim):
        if cnp.PyArray_DIM(<ndarray>a, d) != dims[d]:
            return False
    return True


cdef ndarray new_numbers(vectors *s, bint backward):
    """Room for what the vectors' numbers are: norm, along, refused."""
    cdef npy_intp n = s.count * (2 if backward else 1) + s.count // 8 + 1
    array = cnp.PyArray_EMPTY(1, &n, cnp.NPY_FLOAT64, 0)
    s.args.norm = <double *>cnp.PyArray_DATA(array)
    s.args.along = s.args.norm + s.count
    s.args.refused = <unsigned char *>(s.args.norm + s.count * (2 if backward else 1))
    return array


cdef int run_vectors(vectors *s, ndarray v, object w, object g, ndarray numbers,
                     object dw) except -1:
    cdef Py_ssize_t n = s.count
    call_weight_norm(&s.args, s.dtype)
    if memchr(s.args.refused, 1, n) is not NULL:
        layout = s.args.samples, s.args.outer, s.args.kinds, s.args.inner
        refused = numbers[n if dw is None else 2 * n :].view(np.uint8)[:n]
        along = None if dw is None else numbers[n : 2 * n]
        careful_vectors(layout, v, w, g, s.args.eps, numbers[:n], refused, dw, along)
    return 0


cdef ndarray rounded(const double *numbers, Py_ssize_t n, int typenum, int ndim, npy_intp *dims):
    """Doubles as an array of what is computed in."""
    cdef Py_ssize_t i
    cdef void *into
    array = cnp.PyArray_EMPTY(ndim, dims, typenum, 0)
    into = cnp.PyArray_DATA(array)
    for i in range(n):
        if typenum == cnp.NPY_FLOAT64:
            (<double *>into)[i] = numbers[i]
        else:
            (<float *>into)[i] = <float>numbers[i]
    return array


cdef object straight_forward(vectors *s, ndarray v, object g, object out, object return_stats,
                             bint kept):
    """`kept`: the norms' shape is weight norm's."""
    cdef npy_intp[MAX_DIMS] dims
    cdef ndarray w, numbers
    cdef int ndim
    if not is_bool(return_stats) or not (out is None or is_result(out, v, s.typenum, g, None)):
        return None
    if out is None:
        w = new_array(cnp.PyArray_NDIM(v), cnp.PyArray_DIMS(v), s.typenum, &s.args.w_is_warm)
    else:
        w, s.args.w_is_warm = out, 1
    s.args.w = cnp.PyArray_DATA(w)
    s.args.g = parameter_data(g)
    numbers = new_numbers(s, False)
    run_vectors(s, v, w, g, numbers, None)
    if return_stats is False:
        return w
    ndim = kept_shape(v, s.axis, dims) if kept else lead_shape(v, s, dims)
    return w, rounded(s.args.norm, s.count, s.typenum, ndim, dims)


def straight_weight_norm(v, g, dim, out, return_stats):
    """w, or (w, norm), where all is plain, else None."""
    cdef vectors s
    cdef npy_intp[MAX_DIMS] dims
    cdef int ndim
    if not weight_layout(v, dim, &s):
        return None
    ndim = kept_shape(<ndarray>v, s.axis, dims)
    if not is_plain_of_shape(g, s.typenum, ndim, dims):
        return None
    return straight_forward(&s, <ndarray>v, g, out, return_stats, True)


def straight_unit_norm(x, axis, eps, out, return_stats):
    """y, or (y, norm), where all is plain, else None."""
    cdef vectors s
    if not unit_layout(x, axis, eps, &s):
        return None
    return straight_forward(&s, <ndarray>x, None, out, return_stats, False)


cdef object straight_backward(vectors *s, ndarray v, object g, object dw, object norm, int ndim,
                              npy_intp *dims, int mask):
    """(dv, dg); norm: of shape `dims`, or None."""
    cdef ndarray numbers
    cdef object dv = None, dg = None
    if not is_plain(dw, s.typenum, C_ALIGNED) or not same_shape(<ndarray>dw, v):
        return None
    if not (norm is None or is_plain_of_shape(norm, s.typenum, ndim, dims)):
        return None
    if mask & 1:
        dv = new_array(cnp.PyArray_NDIM(v), cnp.PyArray_DIMS(v), s.typenum, &s.args.w_is_warm)
    s.args.w, s.args.g = <void *>parameter_data(dv), parameter_data(g)
    s.args.dw = cnp.PyArray_DATA(<ndarray>dw)
    numbers = new_numbers(s, True)
    s.args.given = norm is not None and as_doubles(norm, s.count, s.args.norm)
    run_vectors(s, v, dv, g, numbers, dw)
    if mask & 2:
        dg = rounded(s.args.along, s.count, s.typenum, ndim, dims)
    return dv, dg


def straight_weight_norm_backward(dw, v, g, dim, norm, output_mask):
    """(dv, dg) where all is plain, else None."""
    cdef vectors s
    cdef npy_intp[MAX_DIMS] dims
    cdef int ndim, mask = wanted(output_mask, 2)
    if mask <= 0 or not weight_layout(v, dim, &s):
        return None
    ndim = kept_shape(<ndarray>v, s.axis, dims)
    if not is_plain_of_shape(g, s.typenum, ndim, dims):
        return None
    return straight_backward(&s, <ndarray>v, g, dw, norm, ndim, dims, mask)


def straight_unit_norm_backward(dy, x, axis, eps, norm):
    """dx where all is plain, else None."""
    cdef vectors s
    cdef npy_intp[MAX_DIMS] dims
    cdef int ndim
    if not unit_layout(x, axis, eps, &s):
        return None
    ndim = lead_shape(<ndarray>x, &s, dims)
    done = straight_backward(&s, <ndarray>x, None, dy, norm, ndim, dims, 1)
    return None if done is None else done[0]
