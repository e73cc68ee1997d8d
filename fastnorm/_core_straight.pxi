# The straight paths: exact, native, aligned, C-contiguous ndarrays, without a Python frame. Each
# returns None where it does not apply.

cdef enum:
    #: From this size of x on, parameters are converted before the call, not again for each row.
    CONVERT_BYTES = 8 << 20


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


cdef struct options:
    # What an op asks for besides its arrays.
    bint rms, adds, return_stats, round_before_weight, round_sum, per_sample
    double offset


cdef object converted(object w, object dtype, double offset):
    """A parameter as the plain kernels take it."""
    if w is None:
        return None
    with np.errstate(all="ignore"):
        w = w.astype(dtype, copy=False)
        return w + dtype.type(offset) if offset else w


cdef inline void direct_steps(fn_steps *steps, fn_layer_norm_args *args, fn_output *output,
                              options *opt, object residual, object linear_bias,
                              object total) noexcept:
    """What one output asks for, of C-contiguous arrays."""
    memset(steps, 0, sizeof(steps[0]))
    steps.x = args.x
    steps.outputs = output
    steps.output_count = 1
    steps.offset = opt.offset
    steps.round_before_weight = opt.round_before_weight
    steps.round_sum = opt.round_sum
    if opt.adds:
        steps.linear_bias = rows_at(linear_bias, 0)
        steps.residual = rows_at(
            residual, args.shape.cols * cnp.PyArray_ITEMSIZE(<ndarray>residual))
        steps.sum = rows_at(total, args.shape.cols * cnp.PyArray_ITEMSIZE(<ndarray>total))


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
    cdef bint plain
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
    args.rms = opt.rms
    args.x = rows_at(x, stride)
    args.y = rows_at(y, stride)
    output.weight = rows_at(weight, 0)
    output.bias = rows_at(bias, 0)
    plain = not opt.adds and is_plain_call(&args.x, &args.y, &output.weight, &output.bias,
                                           opt.offset, NULL, dtype_of(compute))
    if (not plain and not opt.adds and typenum == compute
            and cnp.PyArray_NBYTES(x) >= <npy_intp>CONVERT_BYTES):
        weight = converted(weight, x.dtype, opt.offset)
        bias = converted(bias, x.dtype, 0)
        output.weight = rows_at(weight, 0)
        output.bias = rows_at(bias, 0)
        plain = True
    args.weight = output.weight.data
    args.bias = output.bias.data
    args.steps = NULL
    if not plain:
        output.y = args.y
        output.scales = NULL
        direct_steps(&steps, &args, &output, opt, residual, linear_bias, total)
        args.steps = &steps
    call_layer_norm(&args, dtype_of(compute))
    if opt.adds:
        if not opt.return_stats:
            return y, total
        return (y, total, rstd) if opt.rms else (y, total, mean, rstd)
    if not opt.return_stats:
        return y
    return (y, rstd) if opt.rms else (y, mean, rstd)


cdef bint is_row_number(object a, int typenum, ndarray rows, int lead, ndarray x, int at) noexcept:
    """A plain array of a number for each row: of the leading shape, or with torch's axes of length
    1, which stand where those that are normalized do."""
    cdef int d, ndim, axes = cnp.PyArray_NDIM(x) - lead
    if not is_plain(a, typenum, C_ALIGNED):
        return False
    ndim = cnp.PyArray_NDIM(<ndarray>a)
    if ndim == lead:
        return cnp.PyArray_CompareLists(cnp.PyArray_DIMS(<ndarray>a), cnp.PyArray_DIMS(rows), lead)
    if ndim != lead + axes:
        return False
    for d in range(ndim):
        if cnp.PyArray_DIM(<ndarray>a, d) != (
                1 if at - axes < d <= at else cnp.PyArray_DIM(x, d)):
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
                            object rstd, object weight, object bias, double offset, int mask,
                            bint rms):
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
    first = cnp.PyArray_NDIM(x) - axes
    if not (rms or is_row_number(mean, typenum, x, first, x, cnp.PyArray_NDIM(x) - 1)):
        return None
    if not is_row_number(rstd, typenum, x, first, x, cnp.PyArray_NDIM(x) - 1):
        return None
    stride = plain_rows(x, axes, &args.shape)
    if args.shape.rows == 0:
        return None
    if offset != 0:
        weight = converted(weight, x.dtype, offset)
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


cdef inline bint is_bool(object value) noexcept:
    return value is True or value is False


cdef inline double plain_offset(object value) noexcept:
    """A float as it is; NaN where it is none."""
    return PyFloat_AS_DOUBLE(value) if PyFloat_CheckExact(value) else NAN
