# Arrays of torch and CuPy, and of all that have __cuda_array_interface__.

# ---- torch ---------------------------------------------------------------------------------------

cdef int read_torch(Desc *d, Info info, str name, value) except -1:
    if value.requires_grad:
        raise TypeError(
            f"{name}: got a tensor that requires grad, wanted {name}.detach(): "
            "no gradient would flow through this call"
        )
    if value.is_neg():
        raise TypeError(f"{name}: got a tensor that is a lazy view, wanted {name}.resolve_neg()")
    if not info.is_exact and (value.layout != info.api.strided or value.is_nested):
        kind = "nested" if value.is_nested else value.layout
        raise TypeError(f"{name}: got a tensor that is {kind}, wanted a dense one")
    try:
        if info.exchange is not NULL:
            return read_exchange(d, info, name, value)
        return read_tensor(d, info, name, value)
    except RuntimeError as error:  # sparse, nested, a stand-in without memory
        raise TypeError(
            f"{name}: got a {type(value).__name__} of {value.dtype} that has no plain memory, "
            f"wanted a dense tensor ({str(error).partition(chr(10))[0]})"
        ) from error


cdef int read_tensor(Desc *d, Info info, str name, value) except -1:
    cdef object code
    if not value.is_cuda:
        raise not_on_device(name, value, 0)
    code = info.codes.get(value.dtype)
    if code is None:
        raise TypeError(f"{name}: got dtype {value.dtype}, wanted {WANTED}")
    d.dtype = code
    read_lengths(d.shape, &d.ndim, value.shape, name)
    read_lengths(d.strides, &d.ndim, value.stride(), name)
    d.address = value.data_ptr()
    d.device = value.get_device()
    as_stream(info.stream_of(d.device), d)
    return normalise(d, name)


cdef inline int read_lengths(int64_t *into, int *ndim, object lengths, str name) except -1:
    cdef Py_ssize_t i, count
    if not PyTuple_Check(lengths):
        lengths = tuple(lengths)
    count = PyTuple_GET_SIZE(lengths)
    if count > MAX_NDIM:
        raise TypeError(f"{name}: got {count} dimensions, wanted at most {MAX_NDIM}")
    ndim[0] = <int>count
    for i in range(count):
        into[i] = <object>PyTuple_GET_ITEM(lengths, i)
    return 0


# ---- CuPy, __cuda_array_interface__ --------------------------------------------------------------

cdef int read_cupy(Desc *d, Info info, str name, value) except -1:
    cdef object dtype = value.dtype, memory = value.data
    cdef object code = info.codes.get(dtype)
    d.dtype = code_of(name, dtype) if code is None else code
    read_lengths(d.shape, &d.ndim, value.shape, name)
    read_lengths(d.strides, &d.ndim, value.strides, name)
    in_elements(d, name)
    d.address = memory.ptr
    d.device = memory.device_id
    as_stream(info.stream_of(d.device), d)
    return normalise(d, name)


cdef int code_of(str name, dtype) except -1:
    """A NumPy dtype's number."""
    # The name first: ml_dtypes' type need not have been there when its owner was.
    if dtype.name in TYPES and dtype.isnative:
        return TYPES.index(dtype.name)
    raise TypeError(f"{name}: got dtype {dtype}, wanted {WANTED}")


cdef inline int in_elements(Desc *d, str name) except -1:
    """Strides out of bytes."""
    cdef int i
    cdef int64_t item = sizes[d.dtype]
    for i in range(d.ndim):
        if d.strides[i] % item and d.shape[i] > 1:
            raise ValueError(
                f"{name}: got a stride of {d.strides[i]} bytes, wanted a multiple of {item}, "
                "the size of an element"
            )
        d.strides[i] = d.strides[i] // item
    return 0


CAI_TYPES = {"<f4": F32, "<f8": F64, "<f2": F16, "<u2": U16}


cdef int read_cai(Desc *d, str name, value) except -1:
    cdef dict described = value.__cuda_array_interface__
    cdef object code = CAI_TYPES.get(described["typestr"])
    if described.get("version", 0) < 2:
        raise TypeError(
            f"{name}: got version {described.get('version')} of __cuda_array_interface__, wanted 2 "
            "or later"
        )
    if described.get("mask") is not None:
        raise TypeError(f"{name}: got a masked array, wanted a plain one: a mask would be ignored")
    d.dtype = cai_type(name, value, described["typestr"]) if code is None else code
    read_lengths(d.shape, &d.ndim, described["shape"], name)
    strides = described.get("strides")
    if strides is None:
        plain_strides(d)
    else:
        count = d.ndim
        read_lengths(d.strides, &d.ndim, strides, name)
        if count != d.ndim:
            raise ValueError(f"{name}: got {d.ndim} strides for {count} dimensions")
        in_elements(d, name)
    address, d.readonly = described["data"]
    d.address = address or 0
    read_cai_stream(d, name, described.get("stream"))
    normalise(d, name)
    return find_owner(d, name)


cdef int cai_type(str name, value, typestr) except -1:
    # Two bytes of no kind that NumPy knows: bfloat16, where the owner says so.
    dtype = getattr(value, "dtype", None)
    if typestr in ("<V2", "|V2") and str(dtype).rpartition(".")[2] == "bfloat16":
        return BF16
    raise TypeError(
        f"{name}: got an array of type {typestr!r} (dtype {dtype}), wanted {WANTED}"
    )


cdef int read_cai_stream(Desc *d, str name, stream) except -1:
    if stream is None:
        return 0  # ready, whichever the stream
    if stream <= 0:
        raise ValueError(
            f"{name}: got stream {stream} in __cuda_array_interface__, wanted None, 1 (the legacy "
            "default stream), 2 (the per-thread one) or a handle"
        )
    return as_stream(stream, d)


cdef int find_owner(Desc *d, str name) except -1:
    """The device of memory that comes without one; one device needs no question."""
    cdef int number = 0, ordinal, code
    cdef bint pushed = False
    if device_count <= 1 or d.size == 0:
        return 0
    hold_context(0)
    code = enter(0, &pushed)
    if code == 0:
        code = driver.pointer(&number, 9, d.address)
        leave(pushed)
    if code:
        raise ValueError(
            f"{name}: got the address {d.address:#x}, which the driver does not know as memory of "
            f"a CUDA device ({describe_code(code)})"
        )
    for ordinal in range(device_count):
        if device_table[ordinal].number == number:
            d.device = ordinal
    return 0
