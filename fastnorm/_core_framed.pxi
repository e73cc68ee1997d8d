# Nearly straight: one norm of an array of any layout, along trailing axes or one other, with an
# activation and a result of any type. It goes down as dispatch.py would send it, through norm_rows,
# but is checked here, in a tenth of the time.

cdef enum:
    #: From this size of x on, what the long way takes for its checks is soon made up for.
    LONG_WAY_BYTES = 1 << 20

#: Types that a result may be asked for as, by what NumPy calls them; the numbers of activations.
cdef dict result_types = {}
cdef dict activations = {}


def register_names(types, kinds):
    """Let results be asked for as these types, and activations by the names of `kinds`."""
    for dtype in types:
        result_types[dtype] = result_types[dtype.type] = dtype.num
    activations.update(kinds)


cdef inline bint is_loadable(object a) noexcept:
    """Whether the kernels load this array's elements where they lie."""
    return (
        cnp.PyArray_CheckExact(a) and is_storage(cnp.PyArray_TYPE(<ndarray>a))
        and cnp.PyArray_ISALIGNED(<ndarray>a) and cnp.PyArray_ISNOTSWAPPED(<ndarray>a)
    )


cdef inline int named_axis(ndarray x, object axis) noexcept:
    """The axis that a plain int names; -1 where it does not."""
    cdef int overflow, ndim = cnp.PyArray_NDIM(x)
    cdef long long value
    if not PyLong_CheckExact(axis):
        return -1
    value = PyLong_AsLongLongAndOverflow(axis, &overflow)
    if value < 0:
        value += ndim
    return <int>value if overflow == 0 and 0 <= value < ndim else -1


cdef int normalized_axes(ndarray x, object normalized_shape, object axis, int *at) except -2:
    """How many axes are normalized, of which at[0] is the last one; -1 where that is not plain."""
    at[0] = cnp.PyArray_NDIM(x) - 1
    if axis is None:
        return trailing_axes(x, normalized_shape)
    at[0] = named_axis(x, axis) if normalized_shape is None else -1
    return 1 if at[0] >= 0 else -1


cdef int result_type(ndarray x, object dtype) except -2:
    """The number of the type that is asked for; -1 where that takes a closer look."""
    if dtype is None:
        return cnp.PyArray_TYPE(x)
    if type(dtype) is type or (isinstance(dtype, np.dtype) and dtype.kind in "fi"):
        return result_types.get(dtype, -1)
    return -1


cdef object axis_last(ndarray a, int axis):
    """The array with this axis moved to the end."""
    cdef npy_intp order[MAX_OUTER]
    cdef cnp.PyArray_Dims dims
    cdef int d, ndim = cnp.PyArray_NDIM(a)
    if axis == ndim - 1:
        return a
    for d in range(ndim - 1):
        order[d] = d + (d >= axis)
    order[ndim - 1] = axis
    dims.ptr, dims.len = order, ndim
    return cnp.PyArray_Transpose(a, &dims)


cdef bint is_framed_parameter(object w, ndarray rows, int axes, int most) noexcept:
    """None, or an array of any layout of rows' trailing shape, after up to `most` axes that
    broadcast to its leading ones."""
    cdef int d, before, lead = cnp.PyArray_NDIM(rows) - axes
    cdef npy_intp length
    if w is None:
        return True
    if not is_loadable(w):
        return False
    before = cnp.PyArray_NDIM(<ndarray>w) - axes
    if before < 0 or before > most:
        return False
    for d in range(before + axes):
        length = cnp.PyArray_DIM(<ndarray>w, d)
        if length != cnp.PyArray_DIM(rows, lead - before + d) and not (d < before and length == 1):
            return False
    return True


cdef inline bint is_worth_converting(ndarray x, int compute, object weight, object bias,
                                     double offset) noexcept:
    """Whether parameters that are not plain, or have an offset, had better be made so first."""
    return cnp.PyArray_NBYTES(x) >= <npy_intp>LONG_WAY_BYTES and not (
        (weight is None or (offset == 0 and is_plain(weight, compute, C_ALIGNED)))
        and (bias is None or is_plain(bias, compute, C_ALIGNED))
    )


cdef object for_each_sample(object w, ndarray x, int axes):
    """A parameter of a row for each sample, (B, *normalized), with its tokens' axes put in."""
    cdef npy_intp shape[MAX_OUTER]
    cdef cnp.PyArray_Dims dims
    cdef int d, ndim = cnp.PyArray_NDIM(x)
    if not is_loadable(w) or cnp.PyArray_NDIM(<ndarray>w) != axes + 1 or ndim <= axes + 1:
        return w
    shape[0] = cnp.PyArray_DIM(<ndarray>w, 0)
    for d in range(1, ndim):
        shape[d] = 1 if d < ndim - axes else cnp.PyArray_DIM(<ndarray>w, d - (ndim - axes) + 1)
    dims.ptr, dims.len = shape, ndim
    return cnp.PyArray_Newshape(<ndarray>w, &dims, cnp.NPY_CORDER)


cdef object checked_lengths(object lengths, ndarray rows, int lead):
    """A copy of plain lengths, one for each row and in range; None where they are not. It is the
    copy that is checked: another thread may write to the array meanwhile."""
    cdef Py_ssize_t i, cols = 1
    cdef const Py_ssize_t *length
    cdef int d
    if not (is_plain(lengths, cnp.NPY_INTP, C_ALIGNED)
            and cnp.PyArray_NDIM(<ndarray>lengths) == lead
            and cnp.PyArray_CompareLists(cnp.PyArray_DIMS(<ndarray>lengths),
                                         cnp.PyArray_DIMS(rows), lead)):
        return None
    for d in range(lead, cnp.PyArray_NDIM(rows)):
        cols *= cnp.PyArray_DIM(rows, d)
    copied = cnp.PyArray_NewCopy(<ndarray>lengths, cnp.NPY_CORDER)
    length = <const Py_ssize_t *>cnp.PyArray_DATA(<ndarray>copied)
    for i in range(cnp.PyArray_SIZE(<ndarray>copied)):
        if not 0 <= length[i] <= cols:
            return None
    return copied


cdef inline bint is_element_mask(object mask, ndarray x) noexcept:
    return (
        cnp.PyArray_CheckExact(mask) and cnp.PyArray_TYPE(<ndarray>mask) == cnp.NPY_BOOL
        and same_shape(<ndarray>mask, x)
    )


cdef object framed_norm(options *opt, object x_object, object normalized_shape, object axis,
                        object weight, object bias, object eps, object out, object dtype,
                        object activation, object lengths, object mask):
    """y, or (y, scale, mean, rstd) less what there is not; None where this path does not apply."""
    cdef ndarray x, rows
    cdef object y, scale = None, mean = None, rstd = None
    cdef int typenum, compute, axes, at, lead, most, warm = 1
    cdef double epsilon
    if not is_loadable(x_object) or cnp.PyArray_SIZE(<ndarray>x_object) == 0:
        return None
    if not (activation is None or type(activation) is str):
        return None
    x = <ndarray>x_object
    axes = normalized_axes(x, normalized_shape, axis, &at)
    typenum = result_type(x, dtype)
    kind = activations.get(activation)
    compute = compute_type(cnp.PyArray_TYPE(x))
    epsilon = eps_of(eps, compute)
    if axes < 0 or typenum < 0 or kind is None or not epsilon >= 0:
        return None
    rows = axis_last(x, at)
    lead = cnp.PyArray_NDIM(x) - axes
    if opt.per_sample:
        weight, bias = for_each_sample(weight, x, axes), for_each_sample(bias, x, axes)
    most = lead if at == cnp.PyArray_NDIM(x) - 1 else 0
    if not (is_framed_parameter(weight, rows, axes, most)
            and is_framed_parameter(bias, rows, axes, most)):
        return None
    if lengths is not None or mask is not None:
        # Rows of length 0 leave what was in their statistics and scales.
        if opt.return_stats or typenum == cnp.NPY_INT8 or (lengths is not None) == (
                mask is not None) or out is not None:
            return None
        if lengths is None:
            if not is_element_mask(mask, x):
                return None
            mask = axis_last(<ndarray>mask, at)
        else:
            lengths = checked_lengths(lengths, rows, lead)
            if lengths is None:
                return None
    if is_worth_converting(x, compute, weight, bias, opt.offset):
        return None
    if out is None:
        y = new_array_for(x, at, typenum, &warm)
    elif is_plain(x, cnp.PyArray_TYPE(x), C_ALIGNED) and is_apart_result(out, x, typenum, weight,
                                                                         bias):
        y = out
    else:
        return None
    if typenum == cnp.NPY_INT8:
        scale = cnp.PyArray_EMPTY(lead, cnp.PyArray_DIMS(rows), cnp.NPY_FLOAT32, 0)
    if opt.return_stats:
        rstd = cnp.PyArray_EMPTY(lead, cnp.PyArray_DIMS(rows), compute, 0)
        if not opt.rms:
            mean = cnp.PyArray_EMPTY(lead, cnp.PyArray_DIMS(rows), compute, 0)
    norm_rows(lead, cnp.PyArray_DescrFromType(compute), rows,
              [(weight, bias, axis_last(<ndarray>y, at), scale)], epsilon, rms=opt.rms,
              offset=opt.offset, round_before_weight=opt.round_before_weight, activation=kind,
              lengths=lengths, mask=mask, mean=mean, rstd=rstd, warm=warm)
    if scale is None and rstd is None:
        return y
    return tuple([part for part in (y, scale, mean, rstd) if part is not None])


cdef inline ndarray new_array_for(ndarray x, int axis, int typenum, int *warm):
    """For what is normalised along an axis. Columns are read and written by whole lines where the
    result's elements lie in lines as x's do; for rows a line's begin is best."""
    cdef size_t offset = 0
    if (axis != cnp.PyArray_NDIM(x) - 1 and cnp.PyArray_IS_C_CONTIGUOUS(x)
            and size_of(typenum) == <size_t>cnp.PyArray_ITEMSIZE(x)):
        offset = <size_t>cnp.PyArray_DATA(x)
    return new_array(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), typenum, warm, offset)


cdef inline bint is_apart_result(object out, ndarray x, int typenum, object weight,
                                 object bias) noexcept:
    """As is_result has it, where parameters may be of any layout."""
    return (
        (weight is None or cnp.PyArray_IS_C_CONTIGUOUS(<ndarray>weight))
        and (bias is None or cnp.PyArray_IS_C_CONTIGUOUS(<ndarray>bias))
        and is_result(out, x, typenum, weight, bias)
    )


cdef object framed_backward(object dy, object x_object, object normalized_shape, object axis,
                            object mean, object rstd, object weight, object bias, double offset,
                            int mask, bint rms):
    """(dx, dweight, dbias), None for what is not wanted; None where this path does not apply."""
    cdef ndarray x, rows
    cdef object dx = None, dweight = None, dbias = None, dx_rows = None
    cdef int compute, axes, at, lead, warm = 0
    if mask <= 0 or not is_loadable(x_object) or not is_loadable(dy):
        return None
    x = <ndarray>x_object
    if cnp.PyArray_SIZE(x) == 0 or not same_shape(x, <ndarray>dy):
        return None
    axes = normalized_axes(x, normalized_shape, axis, &at)
    if axes < 0:
        return None
    compute = compute_type(cnp.PyArray_TYPE(x))
    rows = axis_last(x, at)
    lead = cnp.PyArray_NDIM(x) - axes
    if not (is_framed_parameter(weight, rows, axes, 0)
            and is_framed_parameter(bias, rows, axes, 0)):
        return None
    if is_worth_converting(x, compute, weight, None, offset):
        return None
    if not (rms or is_row_number(mean, compute, rows, lead, x, at)):
        return None
    if not is_row_number(rstd, compute, rows, lead, x, at):
        return None
    if mask & 1:
        dx = new_array_for(x, at, cnp.PyArray_TYPE(x), &warm)
        dx_rows = axis_last(<ndarray>dx, at)
    if mask & 2:
        dweight = cnp.PyArray_EMPTY(axes, cnp.PyArray_DIMS(rows) + lead, compute, 0)
    if mask & 4:
        dbias = cnp.PyArray_EMPTY(axes, cnp.PyArray_DIMS(rows) + lead, compute, 0)
    norm_backward_rows(lead, cnp.PyArray_DescrFromType(compute), axis_last(<ndarray>dy, at), rows,
                       dx_rows, weight, None, None if rms else mean, rstd, dweight, dbias, rms=rms,
                       offset=offset, warm=warm)
    return dx, dweight, dbias


cdef inline bint asks_no_more(object axis, object normalized_shape, object dtype,
                              object activation, object lengths, object mask) noexcept:
    """Whether a norm has no more to do than the straight paths do."""
    return (
        is_last(axis, normalized_shape) and dtype is None and activation is None
        and lengths is None and mask is None
    )


cdef object plain_norm(options *opt, object x, object normalized_shape, object axis, object weight,
                       object bias, object eps, object out, object dtype, object activation,
                       object lengths, object mask):
    """The straight path, or the nearly straight one; None where neither applies."""
    result = None
    if asks_no_more(axis, normalized_shape, dtype, activation, lengths, mask):
        result = direct_norm(opt, x, normalized_shape, weight, bias, eps, out, None, None, None)
    if result is not None:
        return result
    return framed_norm(opt, x, normalized_shape, axis, weight, bias, eps, out, dtype, activation,
                       lengths, mask)


cdef object plain_backward(object dy, object x, object normalized_shape, object axis, object mean,
                           object rstd, object weight, object bias, double offset, int mask,
                           bint rms):
    """The same of gradients."""
    result = None
    if is_last(axis, normalized_shape):
        result = direct_backward(dy, x, normalized_shape, mean, rstd, weight, bias, offset, mask,
                                 rms)
    if result is not None:
        return result
    return framed_backward(dy, x, normalized_shape, axis, mean, rstd, weight, bias, offset, mask,
                           rms)


def straight_adaptive(x, scale, shift, normalized_shape, eps, out, dtype, return_stats, activation):
    """adaptive_layer_norm without a residual, on arrays; None where this path does not apply."""
    cdef options opt
    if scale is None or not is_bool(return_stats) or not PyFloat_CheckExact(eps):
        return None
    memset(&opt, 0, sizeof(opt))
    opt.return_stats = return_stats is True
    opt.per_sample = True
    opt.offset = 1.0
    return framed_norm(&opt, x, normalized_shape, None, scale, shift, eps, out, dtype, activation,
                       None, None)


cdef object framed_moments(object x_object, object axis):
    """(mean, variance); None where this path does not apply."""
    cdef ndarray x, rows
    cdef int at, compute, lead
    if not is_loadable(x_object) or cnp.PyArray_SIZE(<ndarray>x_object) == 0:
        return None
    x = <ndarray>x_object
    lead = cnp.PyArray_NDIM(x) - 1
    if normalized_axes(x, None, axis, &at) < 0:
        return None
    compute = compute_type(cnp.PyArray_TYPE(x))
    rows = axis_last(x, at)
    mean = cnp.PyArray_EMPTY(lead, cnp.PyArray_DIMS(rows), compute, 0)
    variance = cnp.PyArray_EMPTY(lead, cnp.PyArray_DIMS(rows), compute, 0)
    moments_rows(lead, cnp.PyArray_DescrFromType(compute), rows, mean, variance)
    return mean, variance
