# Down to the kernels: whether a call is plain, whether it lets go of the GIL, what it raises.

cdef enum:
    #: A call that moves fewer bytes keeps the GIL. Letting go of it costs nothing by itself, but
    #: with another busy thread a call waits 5 ms, the switch interval, to get it back; so only
    #: calls of some 50 us and more do.
    GIL_BYTES = 1 << 20


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


cdef inline bint is_plain_call(const fn_rows *x, const fn_rows *y, const fn_rows *weight,
                               const fn_rows *bias, double offset, const fn_steps *steps,
                               fn_dtype dtype) noexcept:
    """Whether the kernels need no steps: rows as they are computed, parameters that all of them
    share, and nothing else asked. No `bias`: it is not read; no `steps`: nothing else there is."""
    return (
        is_plain_rows(x, dtype) and is_plain_rows(y, dtype)
        and is_plain_parameter(weight, dtype) and (offset == 0 or weight.data is NULL)
        and (bias is NULL or is_plain_parameter(bias, dtype))
        and (steps is NULL or not asks_more(steps))
    )


cdef inline bint is_plain_rows(const fn_rows *rows, fn_dtype dtype) noexcept:
    """Absent, or contiguous rows of the type that is computed in."""
    return rows.data is NULL or (rows.dtype == dtype and rows.col_strides is NULL)


cdef inline bint is_plain_parameter(const fn_rows *rows, fn_dtype dtype) noexcept:
    """Absent, or a plain row that all rows share."""
    return rows.data is NULL or (
        is_plain_rows(rows, dtype) and rows.stride == 0 and rows.outer_strides is NULL
    )


cdef inline bint asks_more(const fn_steps *steps) noexcept:
    """Whether there is a step that is not about how the rows and their parameters lie."""
    return (
        steps.gate.data is not NULL or steps.linear_bias.data is not NULL
        or steps.residual.data is not NULL or steps.sum.data is not NULL
        or steps.output_count > 1 or steps.activation != FN_NO_ACTIVATION or steps.from_output
        or steps.lengths is not NULL or steps.starts is not NULL or steps.mask.data is not NULL
    )


cdef dict plan_dict(fn_plan plan, Py_ssize_t rows, Py_ssize_t cols):
    return {
        "threads": plan.threads,
        "stream": bool(plan.stream),
        "regime": plan.regime.decode(),
        "bytes": plan.bytes,
        "rows": rows,
        "cols": cols,
    }
