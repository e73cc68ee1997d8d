# Packed rows, which differ in length.

def norm_segments(object compute, ndarray x, ndarray starts, Py_ssize_t longest, weight, bias,
                  ndarray y, scale, double eps, *, bint rms=False, double offset=0.0,
                  int activation=0, mean=None, rstd=None, bint warm=False, bint plan=False):
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
    args.y_is_warm = warm
    args.steps = &steps
    if plan:
        return plan_dict(fn_plan_layer_norm(&args, dtype, 0), args.shape.rows, args.shape.cols)
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
        return plan_dict(fn_plan_layer_norm_backward(&args, dtype, 0), args.shape.rows,
                         args.shape.cols)
    if call_backward(&args, dtype) != FN_OK:
        raise_no_memory(args.shape.cols)


# ---- straight down -------------------------------------------------------------------------------

cdef object checked_starts(object offsets, Py_ssize_t total, Py_ssize_t features,
                           Py_ssize_t *longest):
    """Where rows begin, in elements, from plain offsets that ascend from 0 to `total`, else None. A
    copy, which is what is checked: another thread may write to the array meanwhile."""
    cdef Py_ssize_t i, n, row, before = 0
    cdef Py_ssize_t *start
    if not is_plain(offsets, cnp.NPY_INTP, C_ALIGNED) or cnp.PyArray_NDIM(<ndarray>offsets) != 1:
        return None
    copied = cnp.PyArray_NewCopy(<ndarray>offsets, cnp.NPY_CORDER)
    start = <Py_ssize_t *>cnp.PyArray_DATA(<ndarray>copied)
    n = cnp.PyArray_SIZE(<ndarray>copied)
    if n == 0 or start[0] != 0 or start[n - 1] != total:
        return None
    longest[0] = 0
    for i in range(1, n):
        row = start[i] - before
        if start[i] < before:
            return None
        before = start[i]
        start[i] *= features
        longest[0] = max(longest[0], row * features)
    return copied


def straight_segments(x, offsets, weight, bias, eps, activation, bint rms, offset):
    """y of plain packed rows; None where this path does not apply."""
    cdef ndarray packed, y
    cdef int typenum, compute, axes, warm
    cdef Py_ssize_t longest, features = 1, d
    cdef double epsilon, added = plain_offset(offset)
    if not cnp.PyArray_CheckExact(x) or cnp.PyArray_SIZE(<ndarray>x) == 0:
        return None
    packed = <ndarray>x
    typenum, axes = cnp.PyArray_TYPE(packed), cnp.PyArray_NDIM(packed) - 1
    if not (is_storage(typenum) and is_plain(packed, typenum, C_ALIGNED)) or axes < 0:
        return None
    compute = compute_type(typenum)
    epsilon = eps_of(eps, compute) if rms or eps is not None else -1
    kind = activations.get(activation) if activation is None or type(activation) is str else None
    if not epsilon >= 0 or kind is None or added - added != 0:
        return None
    if not (is_parameter(weight, compute, packed, axes)
            and is_parameter(bias, compute, packed, axes)):
        return None
    for d in range(1, axes + 1):
        features *= cnp.PyArray_DIM(packed, d)
    starts = checked_starts(offsets, cnp.PyArray_DIM(packed, 0), features, &longest)
    if starts is None:
        return None
    y = new_array(cnp.PyArray_NDIM(packed), cnp.PyArray_DIMS(packed), typenum, &warm)
    norm_segments(cnp.PyArray_DescrFromType(compute), packed, starts, longest, weight, bias, y,
                  None, epsilon, rms=rms, offset=added, activation=kind, warm=warm)
    return y
