# The general path: checked arrays of any layout and storage types, as dispatch.py hands them down.

cdef enum:
    MAX_OUTER = 64


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
        if not is_plain_call(&args.x, &args.y, &made[0].weight, &made[0].bias, offset, &steps,
                             dtype):
            args.steps = &steps
        if plan:
            return plan_dict(fn_plan_layer_norm(&args, dtype, 0), args.shape.rows, args.shape.cols)
        call_layer_norm(&args, dtype)
    finally:
        free(made)


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
        is_plain_rows(&args.dy, dtype)
        and is_plain_call(&args.x, &args.dx, &output.weight, NULL, offset, &steps, dtype)
    ):
        args.steps = &steps
    if plan:
        return plan_dict(fn_plan_layer_norm_backward(&args, dtype, 0), args.shape.rows,
                         args.shape.cols)
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
        return plan_dict(fn_plan_moments(&args, dtype, 0), args.shape.rows, args.shape.cols)
    if is_long(&args.shape, args.steps, dtype, 1):
        with nogil:
            status = fn_moments(&args, dtype, 0)
    else:
        status = fn_moments(&args, dtype, 0)
    if status != FN_OK:
        raise_no_scratch(args.shape.cols)
