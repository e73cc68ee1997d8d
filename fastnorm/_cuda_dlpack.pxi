# Arrays by DLPack: capsules of both kinds, and its C exchange table.

cdef int read_exchange(Desc *d, Info info, str name, value) except -1:
    cdef DLTensor tensor
    cdef void *stream = NULL
    info.exchange.tensor_from_object(<PyObject *>value, &tensor)
    read_dltensor(d, &tensor, name, value)
    info.exchange.current_stream(DL_CUDA, d.device, &stream)
    as_stream(<uintptr_t>stream, d)
    return 0


cdef int read_dlpack(Desc *d, Info info, str name, value, uintptr_t stream) except -1:
    kind, _ = value.__dlpack_device__()
    if kind != DL_CUDA and kind != DL_MANAGED:
        raise not_on_device(name, value, kind)
    capsule = export_capsule(info, name, value, stream if stream else LEGACY)
    take_capsule(d, name, value, capsule)
    try:
        return read_dltensor(d, tensor_of(d), name, value)
    except BaseException:
        release(d)
        raise


cdef not_on_device(str name, value, int kind):
    device = getattr(value, "device", None)
    where = f"a device of DLPack type {kind}" if device is None else f"device {device}"
    return TypeError(
        f"{name}: got a {type(value).__name__} on {where}, wanted one on a CUDA device, as the "
        "other arrays are"
    )


cdef export_capsule(Info info, str name, value, uintptr_t stream):
    """The producer makes `stream` wait for the contents, where it has to."""
    try:
        if not info.unversioned:
            try:
                return value.__dlpack__(stream=stream, max_version=(1, 1))
            except TypeError:
                capsule = value.__dlpack__(stream=stream)
                info.unversioned = True  # of before DLPack 1.0
                return capsule
        return value.__dlpack__(stream=stream)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: got a {type(value).__name__} that does not export its memory by DLPack "
            f"({error})"
        ) from error


cdef int take_capsule(Desc *d, str name, value, capsule) except -1:
    """Become the owner of what the capsule holds: from here on, the deleter is ours to call."""
    if PyCapsule_CheckExact(capsule):
        if PyCapsule_IsValid(capsule, "dltensor_versioned"):
            d.versioned = <DLVersioned *>PyCapsule_GetPointer(capsule, "dltensor_versioned")
            PyCapsule_SetName(capsule, "used_dltensor_versioned")
            return 0
        if PyCapsule_IsValid(capsule, "dltensor"):
            d.managed = <DLManaged *>PyCapsule_GetPointer(capsule, "dltensor")
            PyCapsule_SetName(capsule, "used_dltensor")
            return 0
    raise TypeError(
        f"{name}: got a {type(value).__name__} whose __dlpack__ gives no fresh DLPack capsule"
    )


cdef DLTensor *tensor_of(Desc *d) noexcept:
    """NULL where the struct is of a version whose layout is not known here."""
    if d.managed is not NULL:
        return &d.managed.tensor
    d.readonly = d.versioned.flags & DL_READ_ONLY
    return &d.versioned.tensor if d.versioned.major == 1 else NULL


cdef int read_dltensor(Desc *d, DLTensor *tensor, str name, value) except -1:
    cdef int i
    if tensor is NULL:
        raise TypeError(
            f"{name}: got a {type(value).__name__} that exports DLPack {d.versioned.major}."
            f"{d.versioned.minor}, wanted 1.x"
        )
    if tensor.device_type != DL_CUDA and tensor.device_type != DL_MANAGED:
        raise not_on_device(name, value, tensor.device_type)
    if tensor.ndim > MAX_NDIM:
        raise TypeError(f"{name}: got {tensor.ndim} dimensions, wanted at most {MAX_NDIM}")
    d.dtype = dlpack_type(tensor)
    if d.dtype < 0:
        dtype = getattr(value, "dtype", None)
        code = f"DLPack type code {tensor.code}, {tensor.bits} bits, {tensor.lanes} lanes"
        raise TypeError(f"{name}: got dtype {code if dtype is None else dtype}, wanted {WANTED}")
    d.ndim = tensor.ndim
    d.address = <uintptr_t>tensor.data + tensor.byte_offset
    d.device = tensor.device_id
    for i in range(d.ndim):
        d.shape[i] = tensor.shape[i]
    if tensor.strides is NULL:
        plain_strides(d)
    else:
        for i in range(d.ndim):
            d.strides[i] = tensor.strides[i]
    return normalise(d, name)


cdef int dlpack_type(const DLTensor *tensor) noexcept:
    if tensor.lanes != 1:
        return -1
    if tensor.code == DL_FLOAT:
        if tensor.bits == 32:
            return F32
        return F16 if tensor.bits == 16 else F64 if tensor.bits == 64 else -1
    if tensor.bits == 16:
        return BF16 if tensor.code == DL_BFLOAT else U16 if tensor.code == DL_UINT else -1
    return -1
