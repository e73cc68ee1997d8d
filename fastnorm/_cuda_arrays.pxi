# What device arrays are described by, and which library's way leads there.

# dlpack.h

cdef struct DLTensor:
    void *data
    int32_t device_type
    int32_t device_id
    int32_t ndim
    uint8_t code
    uint8_t bits
    uint16_t lanes
    int64_t *shape
    int64_t *strides
    uint64_t byte_offset

cdef struct DLManaged:
    DLTensor tensor
    void *context
    void (*deleter)(DLManaged *) noexcept

cdef struct DLVersioned:
    uint32_t major
    uint32_t minor
    void *context
    void (*deleter)(DLVersioned *) noexcept
    uint64_t flags
    DLTensor tensor

# What a type offers as __dlpack_c_exchange_api__: tensors without a Python object in between.
cdef struct DLExchange:
    uint32_t major
    uint32_t minor
    void *previous
    void *allocator
    void *managed_from_object
    void *object_from_managed
    int (*tensor_from_object)(PyObject *, DLTensor *) except -1
    int (*current_stream)(int, int32_t, void **) except -1

cdef enum:
    DL_CUDA = 2
    DL_MANAGED = 13
    DL_UINT = 1
    DL_FLOAT = 2
    DL_BFLOAT = 4
    DL_READ_ONLY = 1
    MAX_NDIM = 16
    #: Streams as the driver has them: 0 is the legacy default one.
    LEGACY = 1

cdef enum Type:
    F32
    F64
    F16
    BF16
    U16

cdef enum Kind:
    TORCH
    CUPY
    NUMBA
    CAI
    DLPACK

TYPES = ("float32", "float64", "float16", "bfloat16", "uint16")
KINDS = ("torch", "cupy", "numba", "cai", "dlpack")
WANTED = "float32, float64, float16 or bfloat16"

cdef int sizes[5]
sizes[:] = [4, 8, 2, 2, 2]

cdef struct Desc:
    uintptr_t address
    uintptr_t low, high  # the first byte, and the one after the last
    uintptr_t stream
    int64_t size
    int64_t shape[MAX_NDIM]
    int64_t strides[MAX_NDIM]
    DLManaged *managed
    DLVersioned *versioned
    int ndim
    int dtype
    int kind
    int device
    bint has_stream
    bint readonly
    bint contiguous


cdef inline void release(Desc *d) noexcept:
    """Give back what a DLPack capsule held; once."""
    cdef DLManaged *managed = d.managed
    cdef DLVersioned *versioned = d.versioned
    d.managed = NULL
    d.versioned = NULL
    if managed is not NULL and managed.deleter is not NULL:
        managed.deleter(managed)
    if versioned is not NULL and versioned.deleter is not NULL:
        versioned.deleter(versioned)


cdef inline int normalise(Desc *d, str name) except -1:
    """Size, contiguity and extent, from address, shape and strides in elements."""
    cdef int i
    cdef int64_t expected = 1, low = 0, high = 0, last, item = sizes[d.dtype]
    d.contiguous = True
    for i in range(d.ndim - 1, -1, -1):
        if d.shape[i] < 0:
            raise ValueError(f"{name}: got a length of {d.shape[i]}, wanted at least 0")
        if d.shape[i] != 1:
            if d.strides[i] != expected:
                d.contiguous = False
            last = (d.shape[i] - 1) * d.strides[i]
            if last < 0:
                low += last
            else:
                high += last
        expected *= d.shape[i]
    d.size = expected
    if d.size == 0:
        d.contiguous = True
        d.low = d.high = d.address
        return 0
    if d.address == 0:
        raise ValueError(f"{name}: got an array without memory, wanted one on a CUDA device")
    d.low = d.address + <uintptr_t>(low * item)
    d.high = d.address + <uintptr_t>((high + 1) * item)
    return 0


cdef inline void plain_strides(Desc *d) noexcept:
    cdef int i
    cdef int64_t stride = 1
    for i in range(d.ndim - 1, -1, -1):
        d.strides[i] = stride
        stride *= d.shape[i]


cdef inline int as_stream(uintptr_t stream, Desc *d) noexcept:
    # 0 and 1 are names of the same stream.
    d.stream = 0 if stream == LEGACY else stream
    d.has_stream = True
    return 0


cdef enum Relation:
    APART
    SAME
    OVERLAP

RELATIONS = ("apart", "same", "overlap")


cdef inline Relation relation(const Desc *a, const Desc *b) noexcept:
    """How two arrays lie; between first and last element, so interleaved ones overlap here."""
    cdef int i
    if a.size == 0 or b.size == 0 or a.high <= b.low or b.high <= a.low:
        return APART
    if a.address != b.address or a.ndim != b.ndim or a.dtype != b.dtype:
        return OVERLAP
    for i in range(a.ndim):
        if a.shape[i] != b.shape[i] or (a.shape[i] != 1 and a.strides[i] != b.strides[i]):
            return OVERLAP
    return SAME


cdef class Info:
    """What is known of a type of array: its library, and the cheapest way to its memory."""

    cdef Kind kind
    cdef bint is_exact  # no subclass, whose methods may do anything
    cdef DLExchange *exchange
    cdef object capsule  # keeps `exchange`
    cdef object api  # the library
    cdef object stream_of  # a function of the ordinal
    cdef dict codes  # the library's types, and
    cdef tuple dtypes  # back
    cdef object empty
    cdef bint unversioned  # its __dlpack__ takes no max_version


NO_ARRAYS = (
    type(None), bool, int, float, complex, str, bytes, bytearray, tuple, list, dict, type,
    np.ndarray, np.dtype,
)
#: type -> Info, or None for what is no array on a device. Types are few; but they could be made in
#: a loop.
cdef dict infos = dict.fromkeys(NO_ARRAYS)
cdef object UNKNOWN = object()


cdef is_a(value, str module, str name):
    """isinstance without an import: whoever has such an object has imported the module."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(value, kind)


cdef inline Info info_of(object value):
    """None where `value` is no array of a kind that could lie on a device."""
    cdef object found = found_or(infos, type(value), UNKNOWN)
    return new_info(value) if found is UNKNOWN else <Info>found


cdef Info new_info(object value):
    cdef Info info
    cls = type(value)
    if isinstance(value, (*NO_ARRAYS, np.generic)):
        return None
    info = Info.__new__(Info)
    info.exchange = NULL
    if is_a(value, "torch", "Tensor"):
        torch_info(info, cls)
    elif is_a(value, "cupy", "ndarray"):
        cupy_info(info, cls)
    elif getattr(value, "__cuda_array_interface__", None) is not None:
        from_numba = cls.__module__.partition(".")[0] in ("numba", "numba_cuda")
        info.kind = NUMBA if from_numba else CAI
        if not hasattr(cls, "__cuda_array_interface__"):
            return info  # the next one of this type may be none
    elif hasattr(cls, "__dlpack__") and hasattr(cls, "__dlpack_device__"):
        info.kind = DLPACK
    else:
        return None
    find_exchange(info, cls)
    if len(infos) >= 64:
        infos.clear()
        infos.update(dict.fromkeys(NO_ARRAYS))
    infos[cls] = info
    return info


cdef find_exchange(Info info, cls):
    cdef DLExchange *exchange
    capsule = getattr(cls, "__dlpack_c_exchange_api__", None)
    if not PyCapsule_CheckExact(capsule) or not PyCapsule_IsValid(capsule, "dlpack_exchange_api"):
        return
    exchange = <DLExchange *>PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
    while exchange is not NULL and exchange.major != 1:
        exchange = <DLExchange *>exchange.previous
    if exchange is NULL or exchange.tensor_from_object is NULL or exchange.current_stream is NULL:
        return
    # A subclass is asked by its methods, which it may have replaced.
    if "__dlpack_c_exchange_api__" in cls.__dict__ or info.is_exact:
        info.exchange = exchange
        info.capsule = capsule


cdef torch_info(Info info, cls):
    torch = sys.modules["torch"]
    info.kind = TORCH
    info.api = torch
    info.is_exact = cls is torch.Tensor or cls is getattr(
        getattr(torch, "nn", None), "Parameter", None
    )
    info.dtypes = tuple([getattr(torch, name, None) for name in TYPES])
    info.codes = {kind: code for code, kind in enumerate(info.dtypes) if kind is not None}
    info.stream_of = getattr(getattr(torch, "_C", None), "_cuda_getCurrentRawStream", None)
    if info.stream_of is None:
        info.stream_of = lambda ordinal: torch.cuda.current_stream(ordinal).cuda_stream


cdef cupy_info(Info info, cls):
    cupy = sys.modules["cupy"]
    info.kind = CUPY
    info.api = cupy
    info.is_exact = cls is cupy.ndarray
    info.dtypes = tuple(map(numpy_type, TYPES))
    info.codes = {kind: code for code, kind in enumerate(info.dtypes) if kind is not None}
    current = cupy.cuda.get_current_stream
    info.stream_of = lambda ordinal: current(ordinal).ptr
    info.empty = cupy.ndarray


def numpy_type(name):
    """A type's dtype; None for bfloat16 where nobody has imported ml_dtypes."""
    if name == "bfloat16":
        return np.dtype(sys.modules["ml_dtypes"].bfloat16) if "ml_dtypes" in sys.modules else None
    return np.dtype(name)


def is_device_array(value):
    """Whether this is an array in CUDA memory; imports nothing, asks no driver."""
    cdef Info info = info_of(value)
    if info is None:
        return False
    if info.kind == TORCH:
        return bool(value.is_cuda)
    if info.kind == DLPACK:
        return value.__dlpack_device__()[0] in (DL_CUDA, DL_MANAGED)
    return True


cdef int read_array(Desc *d, Info info, str name, object value, uintptr_t stream) except -1:
    """Fill `d`. `stream` is what a DLPack producer is told that the memory will be used on."""
    memset(d, 0, sizeof(Desc))
    d.kind = info.kind
    if info.kind == TORCH:
        return read_torch(d, info, name, value)
    if info.exchange is not NULL:
        return read_exchange(d, info, name, value)
    if info.kind == CUPY:
        return read_cupy(d, info, name, value)
    if info.kind == DLPACK:
        return read_dlpack(d, info, name, value, stream)
    return read_cai(d, name, value)
