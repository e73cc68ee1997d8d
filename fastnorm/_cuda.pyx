# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False, freethreading_compatible=True
"""The CUDA driver, found at run time, and what a call on device arrays costs the host.

Nothing of CUDA is needed to build this file, and nothing is loaded before the first array on a
device comes. Arrays are described where they lie, by whichever of their library's interfaces costs
least; an Op finds what it has to do by the bytes of that description, and launches without a Python
frame. No function here waits for the device.
"""

import os
import sys
import threading

import numpy as np

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_Check
from cpython.list cimport PyList_CheckExact
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_Check
from cpython.object cimport PyObject
from cpython.pycapsule cimport (
    PyCapsule_CheckExact, PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_SetName,
)
from cpython.tuple cimport PyTuple_Check, PyTuple_GET_ITEM, PyTuple_GET_SIZE
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset


cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object, Py_ssize_t *) except NULL


cdef extern from *:
    """
    /* A reference of its own: another thread may drop the dict's. */
    static CYTHON_INLINE PyObject *found_or(PyObject *dict, PyObject *key, PyObject *otherwise)
    {
        PyObject *found;
    #if PY_VERSION_HEX >= 0x030D0000
        if (PyDict_GetItemRef(dict, key, &found) < 0)
            return NULL;
    #else
        found = PyDict_GetItemWithError(dict, key);
        if (found == NULL && PyErr_Occurred())
            return NULL;
        Py_XINCREF(found);
    #endif
        return found ? found : Py_NewRef(otherwise);
    }
    """
    object found_or(dict, object, object)


cdef extern from "dlfcn.h" nogil:
    void *dlopen(const char *, int)
    void *dlsym(void *, const char *)
    const char *dlerror()
    int RTLD_NOW, RTLD_LOCAL


cdef extern from "pthread.h" nogil:
    int pthread_atfork(void (*)() noexcept nogil, void (*)() noexcept nogil,
                       void (*)() noexcept nogil)


# ---- the driver ----------------------------------------------------------------------------------
# Types and numbers as cuda.h has them; handles are all void *, the driver's int is int.

ctypedef void *Handle
ctypedef int (*f_init)(unsigned int) noexcept nogil
ctypedef int (*f_version)(int *) noexcept nogil
ctypedef int (*f_device)(int *, int) noexcept nogil
ctypedef int (*f_name)(char *, int, int) noexcept nogil
ctypedef int (*f_attribute)(int *, int, int) noexcept nogil
ctypedef int (*f_retain)(Handle *, int) noexcept nogil
ctypedef int (*f_get)(Handle *) noexcept nogil
ctypedef int (*f_give)(Handle) noexcept nogil
ctypedef int (*f_module)(Handle *, const void *, unsigned int, int *, void **) noexcept nogil
ctypedef int (*f_function)(Handle *, Handle, const char *) noexcept nogil
ctypedef int (*f_function_get)(int *, int, Handle) noexcept nogil
ctypedef int (*f_function_set)(Handle, int, int) noexcept nogil
ctypedef int (*f_launch)(Handle, unsigned int, unsigned int, unsigned int, unsigned int,
                         unsigned int, unsigned int, unsigned int, Handle, void **,
                         void **) noexcept nogil
ctypedef int (*f_event)(Handle *, unsigned int) noexcept nogil
ctypedef int (*f_record)(Handle, Handle) noexcept nogil
ctypedef int (*f_wait)(Handle, Handle, unsigned int) noexcept nogil
ctypedef int (*f_capturing)(Handle, int *) noexcept nogil
ctypedef int (*f_exchange)(int *) noexcept nogil
ctypedef int (*f_pool)(Handle *, const void *) noexcept nogil
ctypedef int (*f_pool_set)(Handle, int, void *) noexcept nogil
ctypedef int (*f_alloc)(uintptr_t *, size_t, Handle, Handle) noexcept nogil
ctypedef int (*f_free)(uintptr_t, Handle) noexcept nogil
ctypedef int (*f_pointer)(void *, int, uintptr_t) noexcept nogil
ctypedef int (*f_text)(int, const char **) noexcept nogil

cdef struct Driver:
    f_init init
    f_version version
    f_version count
    f_device device
    f_name name
    f_attribute attribute
    f_retain retain
    f_get current
    f_give push
    f_get pop
    f_module load
    f_give unload
    f_function function
    f_function_get function_get
    f_function_set function_set
    f_launch launch
    f_event event
    f_give event_free
    f_record record
    f_wait wait
    f_capturing capturing
    f_exchange exchange
    f_pool pool
    f_pool_set pool_set
    f_alloc alloc
    f_free free
    f_pointer pointer
    f_text error_name
    f_text error_text

cdef enum:
    OUT_OF_MEMORY = 2
    NOT_INITIALIZED = 3
    NO_DEVICE = 100
    # Not the driver's: a stream is not part of the graph that is being captured.
    NOT_CAPTURED = -1
    NO_POOLS = -2
    MULTIPROCESSORS = 16
    MAJOR = 75
    MINOR = 76
    POOLS = 115
    MAX_DEVICES = 64
    #: What a block's shared memory may be without asking for more.
    SHARED_PLAIN = 48 << 10
    #: Freed temporaries that a device keeps for the next call.
    KEPT_BYTES = 64 << 20
    LOG_BYTES = 4096

cdef struct Device:
    int number
    int multiprocessors
    int major
    int minor
    bint pools
    Handle context
    Handle pool

cdef Driver driver
cdef Device device_table[MAX_DEVICES]
cdef int device_count = 0
#: Nothing below it is touched before this is true.
cdef bint is_ready = False
#: Whether this process, or one that it was forked from, has begun to use the driver.
cdef bint was_used = False
cdef bint was_forked = False
cdef int module_count = 0
cdef void *library = NULL
cdef object library_path = ""
cdef object failure = None
#: Another launcher, where there is no driver for us: see set_substitute.
cdef object substitute = None
cdef object lock = threading.RLock()


cdef void note_fork() noexcept nogil:
    global was_forked
    was_forked = was_used


pthread_atfork(NULL, NULL, note_fork)

FORKED = (
    "CUDA was used before this process was forked, and cannot be used in the child: start it by "
    "multiprocessing's 'spawn' or 'forkserver'"
)


class DriverError(RuntimeError):
    """A driver call that failed; `code` is the driver's number, 0 where there is no driver."""

    def __init__(self, message, code=0):
        super().__init__(message)
        self.code = code

    def __reduce__(self):
        return type(self), (self.args[0], self.code)


cdef describe_code(int code):
    cdef const char *name = NULL
    cdef const char *text = NULL
    if driver.error_name is NULL or driver.error_name(code, &name) or name is NULL:
        return f"CUDA error {code}"
    if driver.error_text is NULL or driver.error_text(code, &text) or text is NULL:
        return f"CUDA error {code} ({name.decode()})"
    return f"CUDA error {code} ({name.decode()}: {text.decode()})"


cdef error_of(int code, str what):
    if code == NOT_CAPTURED:
        return DriverError(
            f"{what}: a graph is being captured on the call's stream, and an array is ready on "
            "another one that is not part of the capture: let the capturing stream wait for it "
            "before the capture begins, or capture both"
        )
    if code == NO_POOLS:
        return DriverError(
            f"{what}: the call needs temporary memory on its stream, which this driver or device "
            "cannot give (stream-ordered memory pools)"
        )
    if code == OUT_OF_MEMORY:
        return MemoryError(f"{what}: {describe_code(code)}")
    return DriverError(f"{what}: {describe_code(code)}", code)


cdef int check(int code, str what) except -1:
    if code:
        raise error_of(code, what)
    return 0


cdef void *symbol(bytes name, list missing):
    cdef void *found = dlsym(library, name)
    if found is NULL:
        missing.append(name.decode())
    return found


cdef find_symbols():
    """Fill `driver`; the names that are missing and that nothing goes without."""
    missing, spare = [], []
    driver.init = <f_init>symbol(b"cuInit", missing)
    driver.version = <f_version>symbol(b"cuDriverGetVersion", missing)
    driver.count = <f_version>symbol(b"cuDeviceGetCount", missing)
    driver.device = <f_device>symbol(b"cuDeviceGet", missing)
    driver.name = <f_name>symbol(b"cuDeviceGetName", missing)
    driver.attribute = <f_attribute>symbol(b"cuDeviceGetAttribute", missing)
    driver.retain = <f_retain>symbol(b"cuDevicePrimaryCtxRetain", missing)
    driver.current = <f_get>symbol(b"cuCtxGetCurrent", missing)
    driver.push = <f_give>symbol(b"cuCtxPushCurrent_v2", missing)
    driver.pop = <f_get>symbol(b"cuCtxPopCurrent_v2", missing)
    driver.load = <f_module>symbol(b"cuModuleLoadDataEx", missing)
    driver.unload = <f_give>symbol(b"cuModuleUnload", missing)
    driver.function = <f_function>symbol(b"cuModuleGetFunction", missing)
    driver.function_get = <f_function_get>symbol(b"cuFuncGetAttribute", missing)
    driver.function_set = <f_function_set>symbol(b"cuFuncSetAttribute", missing)
    driver.launch = <f_launch>symbol(b"cuLaunchKernel", missing)
    driver.event = <f_event>symbol(b"cuEventCreate", missing)
    driver.event_free = <f_give>symbol(b"cuEventDestroy_v2", missing)
    driver.record = <f_record>symbol(b"cuEventRecord", missing)
    driver.wait = <f_wait>symbol(b"cuStreamWaitEvent", missing)
    driver.capturing = <f_capturing>symbol(b"cuStreamIsCapturing", missing)
    driver.pointer = <f_pointer>symbol(b"cuPointerGetAttribute", missing)
    driver.error_name = <f_text>symbol(b"cuGetErrorName", missing)
    driver.error_text = <f_text>symbol(b"cuGetErrorString", missing)
    # Of drivers before 11.2; what needs them says so.
    driver.exchange = <f_exchange>symbol(b"cuThreadExchangeStreamCaptureMode", spare)
    driver.pool = <f_pool>symbol(b"cuMemPoolCreate", spare)
    driver.pool_set = <f_pool_set>symbol(b"cuMemPoolSetAttribute", spare)
    driver.alloc = <f_alloc>symbol(b"cuMemAllocFromPoolAsync", spare)
    driver.free = <f_free>symbol(b"cuMemFreeAsync", spare)
    return missing


cdef find_device(int ordinal):
    cdef Device *device = &device_table[ordinal]
    cdef int pools = 0
    memset(device, 0, sizeof(Device))
    check(driver.device(&device.number, ordinal), f"device {ordinal}")
    check(driver.attribute(&device.major, MAJOR, device.number), f"device {ordinal}")
    check(driver.attribute(&device.minor, MINOR, device.number), f"device {ordinal}")
    check(
        driver.attribute(&device.multiprocessors, MULTIPROCESSORS, device.number),
        f"device {ordinal}",
    )
    # A driver that does not know the question has no pools.
    device.pools = (
        driver.attribute(&pools, POOLS, device.number) == 0 and pools
        and driver.pool is not NULL and driver.pool_set is not NULL and driver.alloc is not NULL
        and driver.free is not NULL
    )


cdef start(str path):
    """Open and initialise the driver, or raise what `load` raises."""
    global library, device_count
    cdef int code, count = 0, ordinal
    cdef bytes encoded = os.fsencode(path)
    cdef const char *name = encoded
    with nogil:
        library = dlopen(name, RTLD_NOW | RTLD_LOCAL)
    if library is NULL:
        why = dlerror().decode(errors="replace")
        raise DriverError(f"the CUDA driver could not be loaded: {why}")
    missing = find_symbols()
    if missing:
        raise DriverError(
            f"the CUDA driver {path} lacks {', '.join(missing)}: it is too old, or no CUDA driver"
        )
    with nogil:
        code = driver.init(0)
    if code == NO_DEVICE:
        raise DriverError(f"the CUDA driver {path} finds no CUDA device", code)
    if code == NOT_INITIALIZED:  # somebody else used it before the fork
        raise DriverError(FORKED, code)
    check(code, f"the CUDA driver {path} does not start")
    check(driver.count(&count), f"the CUDA driver {path} does not count its devices")
    if count == 0:
        raise DriverError(f"the CUDA driver {path} finds no CUDA device", NO_DEVICE)
    device_count = min(count, MAX_DEVICES)
    for ordinal in range(device_count):
        find_device(ordinal)


def load(path=None):
    """Load and initialise the driver, once; later calls do nothing.

    `path` or FASTNORM_CUDA_DRIVER or libcuda.so.1. DriverError with one sentence that says why not.
    """
    global is_ready, was_used, failure, library_path
    if was_forked:
        raise DriverError(FORKED, NOT_INITIALIZED)
    if is_ready:
        return
    was_used = True
    with lock:
        if is_ready:
            return
        if failure is not None:
            raise DriverError(*failure)
        path = path or os.environ.get("FASTNORM_CUDA_DRIVER") or "libcuda.so.1"
        try:
            start(path)
        except DriverError as error:
            # The library stays open: drivers do not like to be closed.
            failure = (error.args[0], error.code)
            # A fork does no harm to what never was.
            was_used = error.code not in (0, NO_DEVICE, NOT_INITIALIZED)
            raise
        library_path = path
        is_ready = True


def is_loaded():
    return bool(is_ready)


def forget_failure():
    """Let the next load try again; without it a failure is remembered and raised again."""
    global failure
    with lock:
        failure = None


def set_substitute(launcher):
    """What does the driver's work for an Op where we have no driver; None: nothing does.

    It has order(waiting, awaited), of streams, and room(nbytes, device, stream), which gives an
    object that keeps the memory and its address. Kernels of such entries have a launch of theirs.
    """
    global substitute
    substitute = launcher


def driver_path():
    return library_path


def driver_version():
    """As the driver counts: 13000 is 13.0."""
    cdef int version = 0
    load()
    check(driver.version(&version), "the driver's version")
    return version


def devices():
    """Of each device: ordinal, name, compute capability, multiprocessors."""
    cdef char name[256]
    cdef int ordinal
    found = []
    load()
    for ordinal in range(device_count):
        device = device_table[ordinal]
        check(driver.name(name, sizeof(name), device.number), f"device {ordinal}")
        capability = (device.major, device.minor)
        found.append((ordinal, (<bytes>name).decode(), capability, device.multiprocessors))
    return found


def handles():
    """What is held of the driver: contexts, modules, pools."""
    cdef int ordinal, contexts = 0, pools = 0
    for ordinal in range(device_count):
        contexts += device_table[ordinal].context is not NULL
        pools += device_table[ordinal].pool is not NULL
    return {"contexts": contexts, "modules": module_count, "pools": pools}


cdef int enter(int ordinal, bint *pushed) noexcept nogil:
    """Make the device's primary context, which torch and CuPy use too, current."""
    cdef Device *device = &device_table[ordinal]
    cdef Handle now = NULL
    cdef int code
    pushed[0] = False
    code = driver.current(&now)
    if code == 0 and now is not device.context:
        code = driver.push(device.context)
        pushed[0] = code == 0
    return code


cdef void leave(bint pushed) noexcept nogil:
    cdef Handle ours
    if pushed:
        driver.pop(&ours)


cdef int hold_context(int ordinal) except -1:
    """The primary context is taken once, for as long as the process lives."""
    cdef Handle context = NULL
    cdef int code
    cdef Device *device
    if not 0 <= ordinal < device_count:
        raise DriverError(f"device {ordinal}: the driver has {device_count}, counted from 0")
    device = &device_table[ordinal]
    if device.context is NULL:
        with lock:
            if device.context is NULL:
                with nogil:
                    code = driver.retain(&context, device.number)
                check(code, f"device {ordinal}")
                device.context = context
    return 0


cdef struct PoolProperties:
    int kind
    int handle_types
    int location
    int ordinal
    void *security
    size_t most
    uint16_t usage
    uint8_t reserved[54]


cdef int hold_pool(Device *device) except -1:
    """A pool of our own, which keeps what is freed: the device's default one gives it back at
    every synchronisation, and asking for it again takes longer than most kernels."""
    cdef PoolProperties properties
    cdef Handle pool = NULL
    cdef uint64_t threshold = KEPT_BYTES
    cdef int mode = 2, code
    if device.pool is not NULL:
        return 0
    if not device.pools:
        raise error_of(NO_POOLS, "workspace")
    with lock:
        if device.pool is not NULL:
            return 0
        memset(&properties, 0, sizeof(properties))
        properties.kind = 1  # pinned, as all device memory is
        properties.location = 1  # on a device
        properties.ordinal = device.number
        relax(&mode)
        code = driver.pool(&pool, &properties)
        if code == 0:
            code = driver.pool_set(pool, 4, &threshold)
        relax(&mode)
        check(code, "workspace")
        device.pool = pool
    return 0


cdef void relax(int *mode) noexcept nogil:
    """What only prepares must not end a capture; called twice with the same variable."""
    if driver.exchange is not NULL:
        driver.exchange(mode)


cdef inline int ready() except -1:
    if was_forked:
        raise DriverError(FORKED, NOT_INITIALIZED)
    if not is_ready and substitute is None:
        load()
    return 0


# ---- arrays --------------------------------------------------------------------------------------
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


# ---- DLPack --------------------------------------------------------------------------------------

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


# ---- descriptions that Python sees ---------------------------------------------------------------

cdef class Array:
    """A device array as its owner describes it; nothing is copied, nothing waits."""

    cdef Desc d
    cdef readonly str name
    cdef readonly object owner
    cdef Info info

    def __dealloc__(self):
        release(&self.d)

    def __repr__(self):
        return f"<{self.name}: {self.kind} {self.dtype} {self.shape} on device {self.device}>"

    @property
    def address(self):
        return self.d.address

    @property
    def shape(self):
        return tuple([self.d.shape[i] for i in range(self.d.ndim)])

    @property
    def strides(self):
        """In elements; None where the array is C-contiguous."""
        if self.d.contiguous:
            return None
        return tuple([self.d.strides[i] for i in range(self.d.ndim)])

    @property
    def ndim(self):
        return self.d.ndim

    @property
    def size(self):
        return self.d.size

    @property
    def itemsize(self):
        return sizes[self.d.dtype]

    @property
    def nbytes(self):
        return self.d.size * sizes[self.d.dtype]

    @property
    def dtype(self):
        return TYPES[self.d.dtype]

    @property
    def alignment(self):
        """The largest power of two up to 16 that divides the address."""
        return 1 << alignment_of(&self.d)

    @property
    def device(self):
        return self.d.device

    @property
    def stream(self):
        """The stream that its contents are ready on; None where they are ready on any."""
        return self.d.stream if self.d.has_stream else None

    @property
    def readonly(self):
        return bool(self.d.readonly)

    @property
    def kind(self):
        return KINDS[self.d.kind]

    @property
    def can_make(self):
        """Whether the owner's library is known, so that results can be made in its kind."""
        known = self.d.kind in (TORCH, CUPY)
        return known or (self.d.kind == NUMBA and "numba.cuda" in sys.modules)


cdef inline int alignment_of(const Desc *d) noexcept:
    cdef int power = 0
    while power < 4 and not (d.address >> power) & 1:
        power += 1
    return power


cdef Array new_array(str name, object owner, Info info):
    cdef Array array = Array.__new__(Array)
    array.name, array.owner, array.info = name, owner, info
    return array


def describe(str name not None, value):
    """An array's description; TypeError or ValueError, which name it, where it can not be used."""
    cdef Info info = info_of(value)
    cdef Array array
    if info is None:
        raise TypeError(
            f"{name}: got {type(value).__name__}, wanted an array on a CUDA device: a torch "
            "tensor, a CuPy array, or one with __cuda_array_interface__ or DLPack"
        )
    array = new_array(name, value, info)
    read_array(&array.d, info, name, value, LEGACY)
    return array


def overlap(Array a not None, Array b not None):
    """Of the memory between first and last element: "same" is the very same elements."""
    return RELATIONS[relation(&a.d, &b.d)]


# ---- kernels -------------------------------------------------------------------------------------

cdef enum:
    #: The driver takes 4 KB of parameters.
    MAX_WORDS = 512
    ARRAY_WORDS = 7

cdef class Kernel:
    """A loaded function and how its parameters lie: `layout` has a letter for each argument.

    "a" is a 1-D array as Numba passes it (7 words), "q" int64, "f" float32, "d" float64.
    """

    cdef readonly str entry
    cdef readonly int device
    cdef readonly str layout
    cdef readonly dict attributes
    cdef Handle module
    cdef Handle function
    cdef int words
    cdef int shared  # what a block may have without another word to the driver
    cdef int shared_static

    def __init__(self, int device, bytes image not None, str entry not None, layout):
        if self.module is not NULL:
            raise TypeError("a Kernel is loaded once")
        self.layout = layout.decode() if isinstance(layout, bytes) else "".join(layout)
        if set(self.layout) - set("aqfd"):
            raise ValueError(f"layout: got {self.layout!r}, wanted letters of 'aqfd'")
        self.words = len(self.layout) + (ARRAY_WORDS - 1) * self.layout.count("a")
        if self.words > MAX_WORDS:
            raise ValueError(f"layout: got {self.words} words, wanted at most {MAX_WORDS}")
        self.entry, self.device = entry, device
        ready()
        hold_context(device)
        self.read_image(image)

    cdef read_image(self, bytes image):
        global module_count
        cdef const char *code = image
        cdef bytes name = self.entry.encode()
        cdef const char *entry = name
        cdef char log[LOG_BYTES]
        cdef int options[2]
        cdef void *values[2]
        cdef int status, mode = 2
        cdef bint pushed = False
        options[:] = [5, 6]  # the error log of the driver's compiler, and its size
        values[:] = [<void *>log, <void *><uintptr_t>LOG_BYTES]
        log[0] = 0
        with nogil:
            status = enter(self.device, &pushed)
            if status == 0:
                relax(&mode)
                status = driver.load(&self.module, code, 2, options, values)
                if status == 0:
                    status = driver.function(&self.function, self.module, entry)
                relax(&mode)
                leave(pushed)
        if self.module is not NULL:
            module_count += 1
        if status:
            log[LOG_BYTES - 1] = 0
            said = (<bytes>log).decode(errors="replace").strip()
            raise error_of(status, f"kernel {self.entry}{': ' + said if said else ''}")
        self.attributes = {
            "threads": self.ask(0), "shared": self.ask(1), "local": self.ask(3),
            "registers": self.ask(4),
        }
        self.shared_static = self.attributes["shared"]
        self.shared = max(SHARED_PLAIN - self.shared_static, 0)

    cdef int ask(self, int attribute) except -1:
        cdef int value = 0, status
        cdef bint pushed = False
        status = enter(self.device, &pushed)
        if status == 0:
            status = driver.function_get(&value, attribute, self.function)
            leave(pushed)
        check(status, f"kernel {self.entry}")
        return value

    def __dealloc__(self):
        global module_count
        cdef bint pushed = False
        if self.module is NULL:
            return
        module_count -= 1
        # What a forked child has of its parent's is not its own.
        if not was_forked and enter(self.device, &pushed) == 0:
            driver.unload(self.module)
            leave(pushed)

    cdef int reserve(self, int shared) except -1:
        """More than 48 KB of shared memory has to be asked for, once."""
        cdef int status
        cdef bint pushed = False
        if shared <= self.shared:
            return 0
        with lock:
            if shared <= self.shared:
                return 0
            status = enter(self.device, &pushed)
            if status == 0:
                status = driver.function_set(self.function, 8, shared)
                leave(pushed)
            check(status, f"kernel {self.entry}: {shared} bytes of shared memory")
            self.shared = shared
        return 0

    def launch(self, int grid, int block, int shared, uintptr_t stream, args):
        """`args`: an Array, (address, size, itemsize) or None for "a"; numbers for the others."""
        cdef int64_t words[MAX_WORDS]
        cdef void *params[MAX_WORDS]
        cdef int i, status
        cdef bint pushed = False
        ready()
        fill_words(words, self.layout, args, None)
        self.reserve(shared)
        for i in range(self.words):
            params[i] = &words[i]
        with nogil:
            status = enter(self.device, &pushed)
            if status == 0:
                status = driver.launch(
                    self.function, grid, 1, 1, block, 1, 1, shared, <Handle>stream, params, NULL
                )
                leave(pushed)
        check(status, f"kernel {self.entry}")


cdef int fill_words(int64_t *words, str layout, args, list patches) except -1:
    """Parameters as the kernel reads them; `patches` gets (word, source, index) of addresses."""
    cdef int at = 0
    cdef float single
    cdef double double_
    args = tuple(args)
    if len(args) != len(layout):
        raise ValueError(f"got {len(args)} arguments, wanted {len(layout)}: {layout!r}")
    for letter, arg in zip(layout, args):
        if letter == "a":
            at += fill_array(words + at, at, arg, patches)
            continue
        words[at] = 0
        if letter == "q":
            words[at] = arg
        elif letter == "f":
            single = arg
            memcpy(&words[at], &single, sizeof(single))
        else:
            double_ = arg
            memcpy(&words[at], &double_, sizeof(double_))
        at += 1
    return 0


cdef int fill_array(int64_t *words, int at, arg, list patches) except -1:
    """meminfo, parent, size, itemsize, data, shape, stride: a 1-D array as Numba has it."""
    memset(words, 0, ARRAY_WORDS * sizeof(int64_t))
    if arg is None:
        return ARRAY_WORDS
    if isinstance(arg, Array):
        arg = (arg.address, arg.size, arg.itemsize)
    if patches is None:
        address, size, itemsize = arg
        words[4] = <int64_t><uintptr_t>address
    else:
        source, index, size, itemsize = arg
        patches.append((at + 4, source, index))
    words[2] = words[5] = size
    words[3] = words[6] = itemsize
    return ARRAY_WORDS


# ---- kept calls ----------------------------------------------------------------------------------

cdef enum:
    MAX_ARGS = 24
    MAX_NEW = 8
    MAX_WORK = 8
    KEY_BYTES = 2048
    #: Kinds of calls are few; eps or offset that change at every call would not be.
    MAX_KEPT = 4096
    WORK_ALIGNMENT = 256

cdef enum Source:
    FROM_ARG
    FROM_NEW
    FROM_WORK

SOURCES = {"arg": FROM_ARG, "new": FROM_NEW, "work": FROM_WORK}

cdef struct Patch:
    int word
    int source
    int index

cdef struct Step:
    Handle function
    unsigned int grid, block, shared
    int first_word, words
    int first_patch, patches

# A call's arguments, read once.
cdef struct Frame:
    Desc *descs
    int index[MAX_ARGS]  # of an argument's Desc; -1: it is none
    int count
    int main
    size_t length
    bint keep
    char key[KEY_BYTES]


cdef inline void put(Frame *f, const void *data, size_t size) noexcept:
    if f.length + size > KEY_BYTES:
        f.keep = False
        return
    memcpy(f.key + f.length, data, size)
    f.length += size


cdef inline void put_mark(Frame *f, char mark) noexcept:
    put(f, &mark, 1)


cdef int put_option(Frame *f, object value, list held) except -1:
    """An option's value; what could change later, or is of no known kind, is not kept."""
    cdef int64_t number
    cdef double real
    cdef int overflow = 0
    cdef const char *text
    cdef Py_ssize_t size
    cdef PyObject *address
    if value is None:
        put_mark(f, b"N")
    elif value is True:
        put_mark(f, b"T")
    elif value is False:
        put_mark(f, b"F")
    elif PyLong_Check(value):
        number = PyLong_AsLongLongAndOverflow(value, &overflow)
        if overflow:
            f.keep = False
        put_mark(f, b"i")
        put(f, &number, sizeof(number))
    elif PyFloat_Check(value):
        real = PyFloat_AS_DOUBLE(value)
        put_mark(f, b"f")
        put(f, &real, sizeof(real))
    elif PyTuple_Check(value) or PyList_CheckExact(value):
        size = len(value)
        put_mark(f, b"(")
        put(f, &size, sizeof(size))
        for item in value:
            put_option(f, item, held)
    elif type(value) is str:
        text = PyUnicode_AsUTF8AndSize(value, &size)
        put_mark(f, b"s")
        put(f, &size, sizeof(size))
        put(f, text, size)
    elif isinstance(value, np.generic):
        put_option(f, plain_item(value), held)
    elif isinstance(value, (type, np.dtype)) or is_a(value, "torch", "dtype"):
        # Known by its address, and held as long as that is.
        address = <PyObject *>value
        put_mark(f, b"o")
        put(f, &address, sizeof(address))
        held.append(value)
    else:
        f.keep = False
    return 0


cdef plain_item(value):
    item = value.item()
    return item if isinstance(item, (bool, int, float, str)) else object()


cdef inline void put_array(Frame *f, const Desc *d) noexcept:
    cdef char facts[8]
    facts[:] = [
        b"a", d.dtype, d.kind, d.ndim, alignment_of(d), d.readonly, d.contiguous,
        <char>d.device,
    ]
    put(f, facts, sizeof(facts))
    put(f, d.shape, d.ndim * sizeof(int64_t))
    if not d.contiguous:
        put(f, d.strides, d.ndim * sizeof(int64_t))


cdef class Entry:
    """All that a call does, once its arguments are known but for their addresses.

    Parameters
    ----------
    steps
        (kernel, grid, block, shared, arguments): `arguments` in the kernel's order, for each "a"
        ("arg" or "new" or "work", index, length, itemsize) or None, numbers for the others. A
        kernel that is no Kernel is called as its `launch` is.
    new
        (shape, type) of each new result, made by the library of the call's main array.
    workspace
        Bytes of each temporary; aligned to 256.
    result
        ("arg" or "new", index) or None, or a list of these, which makes the result a tuple.
    """

    cdef Step *steps
    cdef Patch *patches
    cdef int64_t *words
    cdef int step_count
    cdef int64_t device  # that the kernels are loaded on; -1: there are none
    cdef tuple kernels
    cdef tuple foreign  # the steps, where another launcher has them
    cdef tuple new
    cdef size_t work_offsets[MAX_WORK]
    cdef size_t work_bytes
    cdef bint is_tuple
    cdef tuple result
    cdef tuple held

    def __init__(self, steps, new, workspace, result):
        if self.kernels is not None:
            raise TypeError("an Entry is made once")
        steps, workspace = tuple(steps), tuple(workspace)
        self.kernels = tuple([step[0] for step in steps])
        self.new = tuple([(tuple(shape), TYPES.index(kind)) for shape, kind in new])
        if len(self.new) > MAX_NEW or len(workspace) > MAX_WORK:
            raise ValueError(f"an Entry has at most {MAX_NEW} results, {MAX_WORK} temporaries")
        self.work_bytes = 0
        for i, nbytes in enumerate(workspace):
            self.work_offsets[i] = self.work_bytes
            self.work_bytes += (nbytes + WORK_ALIGNMENT - 1) // WORK_ALIGNMENT * WORK_ALIGNMENT
        self.is_tuple = isinstance(result, list)
        self.result = tuple(
            [
                None if item is None else (SOURCES[item[0]], int(item[1]))
                for item in (result if self.is_tuple else [result])
            ]
        )
        self.device = -1
        if all(isinstance(kernel, Kernel) for kernel in self.kernels):
            self.pack(steps, len(workspace))
        else:
            self.foreign = steps

    cdef pack(self, tuple steps, int temporaries):
        cdef Kernel kernel
        cdef int at = 0, word = 0, i
        cdef list patches = [], own
        words = sum([(<Kernel>kernel_).words for kernel_ in self.kernels])
        self.steps = <Step *>calloc(len(steps) + 1, sizeof(Step))
        self.words = <int64_t *>calloc(words + 1, sizeof(int64_t))
        if self.steps is NULL or self.words is NULL:
            raise MemoryError("a kept call")
        for kernel, grid, block, shared, arguments in steps:
            own = []
            fill_words(self.words + word, kernel.layout, arguments, own)
            kernel.reserve(shared)
            self.device = kernel.device
            self.steps[at] = Step(
                kernel.function, grid, block, shared, word, kernel.words, len(patches), len(own)
            )
            word += kernel.words
            at += 1
            patches += own
        self.step_count = at
        self.patches = <Patch *>calloc(len(patches) + 1, sizeof(Patch))
        if self.patches is NULL:
            raise MemoryError("a kept call")
        limits = (MAX_ARGS, len(self.new), temporaries)
        for i, (word, source, index) in enumerate(patches):
            if not 0 <= index < limits[SOURCES[source]]:
                raise ValueError(f"got {source} {index}, wanted one that the call has")
            self.patches[i] = Patch(word, SOURCES[source], index)

    def __dealloc__(self):
        free(self.steps)
        free(self.patches)
        free(self.words)

    cdef object run(self, Frame *f, tuple args):
        cdef uintptr_t news[MAX_NEW]
        cdef uintptr_t stream, work = 0
        cdef Desc *main
        cdef Info info
        cdef int i, status
        cdef list made = []
        cdef object room = None
        if f.main < 0:
            raise TypeError("got no array on a CUDA device")
        main = &f.descs[f.index[f.main]]
        stream = main.stream
        info = info_of(args[f.main])
        owner = args[f.main]
        i = 0
        for shape, code in self.new:
            array = new_result(info, main, owner, shape, code)
            news[i] = address_of(info, array)
            made.append(array)
            i += 1
        if self.foreign is not None and self.foreign:
            self.run_foreign(f, stream, main.device, news)
        elif self.step_count:
            if self.device != main.device:
                raise DriverError(f"kernels of device {self.device} on device {main.device}")
            if self.work_bytes:
                if info.kind == TORCH:  # whose allocator orders by stream and knows of captures
                    room = owner.new_empty((self.work_bytes,), dtype=info.api.uint8)
                    work = room.data_ptr()
                else:
                    hold_pool(&device_table[main.device])
            with nogil:
                status = launch_all(self, f, stream, news, work)
            if status:
                raise error_of(status, self.words_of_failure())
        if not self.is_tuple:
            return self.item(self.result[0], args, made)
        return tuple([self.item(item, args, made) for item in self.result])

    cdef inline object item(self, item, tuple args, list made):
        if item is None:
            return None
        source, index = item
        return made[index] if source == FROM_NEW else args[index]

    cdef words_of_failure(self):
        return "launching " + ", ".join([(<Kernel>kernel).entry for kernel in self.kernels])

    cdef run_foreign(self, Frame *f, uintptr_t stream, int device, uintptr_t *news):
        cdef uintptr_t work = 0
        cdef int i
        if substitute is None:
            raise DriverError("there is no CUDA driver, and nothing in its place")
        others = {f.descs[i].stream for i in range(f.count) if is_elsewhere(&f.descs[i], stream)}
        for other in others:
            substitute.order(stream, other)
        room = None
        if self.work_bytes:
            room, work = substitute.room(self.work_bytes, device, stream)
        for kernel, grid, block, shared, arguments in self.foreign:
            placed = []
            for arg in arguments:
                if isinstance(arg, tuple):
                    source, index, size, itemsize = arg
                    address = self.place(f, SOURCES[source], index, news, work)
                    arg = (address, size, itemsize)
                placed.append(arg)
            kernel.launch(grid, block, shared, stream, tuple(placed))
        for other in others:
            substitute.order(other, stream)

    cdef inline uintptr_t place(
        self, Frame *f, int source, int index, uintptr_t *news, uintptr_t work
    ) noexcept nogil:
        if source == FROM_ARG:
            return f.descs[f.index[index]].address if f.index[index] >= 0 else 0
        if source == FROM_NEW:
            return news[index]
        return work + self.work_offsets[index]


cdef inline bint is_elsewhere(const Desc *d, uintptr_t stream) noexcept nogil:
    return d.has_stream and d.stream != stream and d.size != 0


cdef int launch_all(
    Entry entry, Frame *f, uintptr_t stream, uintptr_t *news, uintptr_t work
) noexcept nogil:
    """Everything that goes to the driver; the first error, after which all is left in order."""
    cdef Device *device = &device_table[entry.device]
    cdef uintptr_t room = 0
    cdef bint pushed, apart = False
    cdef int i, status, late
    status = enter(<int>entry.device, &pushed)
    if status:
        return status
    for i in range(f.count):
        apart |= is_elsewhere(&f.descs[i], stream)
    if apart:
        status = order_streams(f, stream, True)
    if status == 0 and entry.work_bytes and work == 0:
        status = driver.alloc(&room, entry.work_bytes, device.pool, <Handle>stream)
        work = room
    i = 0
    while status == 0 and i < entry.step_count:
        status = launch_one(entry, &entry.steps[i], f, <Handle>stream, news, work)
        i += 1
    if room:
        late = driver.free(room, <Handle>stream)
        status = status if status else late
    if apart and status == 0:
        # What their owners do next with these arrays comes after what was done here.
        status = order_streams(f, stream, False)
    leave(pushed)
    return status


cdef inline int launch_one(
    Entry entry, Step *step, Frame *f, Handle stream, uintptr_t *news, uintptr_t work
) noexcept nogil:
    cdef int64_t words[MAX_WORDS]
    cdef void *params[MAX_WORDS]
    cdef Patch *patch
    cdef int i
    memcpy(words, entry.words + step.first_word, step.words * sizeof(int64_t))
    for i in range(step.patches):
        patch = &entry.patches[step.first_patch + i]
        words[patch.word] = <int64_t>entry.place(f, patch.source, patch.index, news, work)
    for i in range(step.words):
        params[i] = &words[i]
    return driver.launch(
        step.function, step.grid, 1, 1, step.block, 1, 1, step.shared, stream, params, NULL
    )


cdef int order_streams(Frame *f, uintptr_t stream, bint before) noexcept nogil:
    """Our stream waits for those that arrays are ready on; or, after the call, they for ours."""
    cdef int i, k, status = 0
    cdef bint seen
    for i in range(f.count):
        if not is_elsewhere(&f.descs[i], stream):
            continue
        seen = False
        for k in range(i):
            seen |= is_elsewhere(&f.descs[k], stream) and f.descs[k].stream == f.descs[i].stream
        if seen:
            continue
        if before:
            status = order(<Handle>stream, <Handle>f.descs[i].stream)
        else:
            status = order(<Handle>f.descs[i].stream, <Handle>stream)
        if status:
            return status
    return 0


cdef int order(Handle waiting, Handle awaited) noexcept nogil:
    """`waiting` goes on after what `awaited` has been given so far; the host does not wait."""
    cdef Handle event = NULL
    cdef int status, late, ours = 0, theirs = 0
    status = driver.capturing(waiting, &ours)
    if status == 0 and ours:
        # An event from outside would end the capture: look before.
        if driver.capturing(awaited, &theirs) or not theirs:
            return NOT_CAPTURED
    if status == 0:
        status = driver.event(&event, 2)  # without a time
    if status:
        return status
    status = driver.record(event, awaited)
    if status == 0:
        status = driver.wait(waiting, event, 0)
    late = driver.event_free(event)
    return status if status else late


# ---- new results ---------------------------------------------------------------------------------

cdef object new_result(Info info, const Desc *main, owner, tuple shape, int code):
    """An array of the main one's kind, on its device and stream."""
    if info.kind == TORCH:
        if info.is_exact and code == main.dtype and main.contiguous and same_shape(main, shape):
            return info.api.empty_like(owner)
        return owner.new_empty(shape, dtype=info.dtypes[code])
    if info.kind == CUPY:
        if device_count > 1:
            with info.api.cuda.Device(main.device):
                return info.empty(shape, result_type(info, owner, main, code))
        return info.empty(shape, result_type(info, owner, main, code))
    if info.kind == NUMBA and "numba.cuda" in sys.modules:
        return new_numba(main, shape, result_type(info, owner, main, code))
    raise TypeError(
        f"out: got None for a {type(owner).__name__}, of which fastnorm can make no other: wanted "
        "an array to write to"
    )


cdef inline bint same_shape(const Desc *d, tuple shape) noexcept:
    cdef int i
    if PyTuple_GET_SIZE(shape) != d.ndim:
        return False
    for i in range(d.ndim):
        if <int64_t>(<object>PyTuple_GET_ITEM(shape, i)) != d.shape[i]:
            return False
    return True


cdef result_type(Info info, owner, const Desc *main, int code):
    if code == main.dtype:
        return owner.dtype
    dtype = numpy_type(TYPES[code]) if info.dtypes is None else info.dtypes[code]
    if dtype is None:
        dtype = numpy_type(TYPES[code])
    if dtype is None:
        raise TypeError("dtype: got bfloat16, wanted one that ml_dtypes has been imported for")
    return dtype


cdef new_numba(const Desc *main, tuple shape, dtype):
    cuda = sys.modules["numba.cuda"]
    stream = cuda.external_stream(main.stream) if main.stream else 0
    if device_count > 1:
        with cuda.gpus[main.device]:
            return cuda.device_array(shape, dtype, stream=stream)
    return cuda.device_array(shape, dtype, stream=stream)


cdef uintptr_t address_of(Info info, array) except? 0:
    if info.kind == TORCH:
        return array.data_ptr()
    if info.kind == CUPY:
        return array.data.ptr
    return array.__cuda_array_interface__["data"][0] or 0


# ---- calls ---------------------------------------------------------------------------------------

cdef class Op:
    """An op's kept calls.

    A call's arguments, by position, are device arrays and options. Two calls that differ in
    nothing but the arrays' addresses (of the same alignment) share an entry: types, shapes,
    strides, devices, kinds, whether read-only, all options, and how each of `written` overlaps the
    other arrays are what an entry is found by. `build` makes it: it gets the arguments with an
    Array in the place of each device array, checks them, and raises, or returns the Entry, which
    must not depend on an address.

    Parameters
    ----------
    names
        Of the arguments.
    main
        Which argument decides the kind of new results, the device and the stream.
    written
        Which arguments are written to.
    """

    cdef readonly str name
    cdef tuple names
    cdef object build
    cdef int main
    cdef uint32_t written
    cdef dict kept

    def __init__(self, str name not None, names, build, *, int main=0, written=()):
        self.name, self.names, self.build, self.main = name, tuple(names), build, main
        if len(self.names) > MAX_ARGS:
            raise ValueError(f"names: got {len(self.names)}, wanted at most {MAX_ARGS}")
        self.written = 0
        for i in written:
            self.written |= 1 << i
        self.kept = {}

    def __len__(self):
        """How many entries are kept."""
        return len(self.kept)

    def clear(self):
        self.kept.clear()

    def __call__(self, *args):
        cdef Frame f
        cdef Desc descs[MAX_ARGS]
        cdef list held = []
        cdef Entry entry
        cdef int i
        if PyTuple_GET_SIZE(args) != PyTuple_GET_SIZE(self.names):
            raise TypeError(f"{self.name}: got {len(args)} arguments, wanted {len(self.names)}")
        ready()
        f.descs = descs
        f.count = 0
        f.length = 0
        f.keep = True
        f.main = -1
        try:
            self.read(&f, args, held)
            entry = self.entry(&f, args, held)
            result = entry.run(&f, args)
            if self.written:
                self.note_written(&f, args)
            return result
        finally:
            for i in range(f.count):
                release(&descs[i])

    cdef int read(self, Frame *f, tuple args, list held) except -1:
        """Describe the arrays, the main one first, and write down what the entry is found by."""
        cdef Py_ssize_t i, count = PyTuple_GET_SIZE(args)
        cdef object value
        for i in range(count):
            f.index[i] = -1
        if info_of(args[self.main]) is not None:
            self.read_arg(f, args, self.main)
        for i in range(count):
            value = <object>PyTuple_GET_ITEM(args, i)
            if value is None or value is True or value is False:
                put_option(f, value, held)
                continue
            if i != self.main and info_of(value) is not None:
                self.read_arg(f, args, i)
            if f.index[i] >= 0:
                put_array(f, &f.descs[f.index[i]])
            else:
                put_option(f, value, held)
        if self.written:
            self.put_relations(f, count)
        return 0

    cdef int read_arg(self, Frame *f, tuple args, Py_ssize_t i) except -1:
        cdef Desc *d = &f.descs[f.count]
        cdef uintptr_t stream = LEGACY
        if f.main >= 0 and f.descs[f.index[f.main]].stream:
            stream = f.descs[f.index[f.main]].stream
        value = args[i]
        read_array(d, info_of(value), <str>self.names[i], value, stream)
        f.index[i] = f.count
        f.count += 1
        if f.main < 0:
            f.main = <int>i
        return 0

    cdef void put_relations(self, Frame *f, Py_ssize_t count) noexcept:
        cdef Py_ssize_t i, k
        cdef Relation how
        for i in range(count):
            if not self.written >> i & 1 or f.index[i] < 0:
                continue
            for k in range(count):
                if k == i or f.index[k] < 0:
                    continue
                how = relation(&f.descs[f.index[i]], &f.descs[f.index[k]])
                put_mark(f, <char>how)
                if how == OVERLAP:
                    f.keep = False

    cdef Entry entry(self, Frame *f, tuple args, list held):
        cdef Entry entry
        cdef object found
        key = None
        if f.keep:
            key = PyBytes_FromStringAndSize(f.key, f.length)
            found = found_or(self.kept, key, None)
            if found is not None:
                return <Entry>found
        entry = self.build(*self.described(f, args))
        if f.keep:
            entry.held = tuple(held)
            if len(self.kept) >= MAX_KEPT:
                self.kept.clear()
            self.kept[key] = entry
        return entry

    cdef list described(self, Frame *f, tuple args):
        cdef Array array
        cdef list values = list(args)
        cdef Py_ssize_t i
        for i in range(len(values)):
            if f.index[i] < 0:
                continue
            array = new_array(self.names[i], values[i], info_of(values[i]))
            array.d = f.descs[f.index[i]]
            # The capsule stays the call's.
            array.d.managed = NULL
            array.d.versioned = NULL
            values[i] = array
        return values

    cdef int note_written(self, Frame *f, tuple args) except -1:
        """Tell autograd of a write, so that it will not use a tensor it has saved before."""
        cdef Py_ssize_t i
        for i in range(PyTuple_GET_SIZE(args)):
            if self.written >> i & 1 and f.index[i] >= 0:
                if f.descs[f.index[i]].kind == TORCH:
                    increment_version(args[i])
        return 0


cdef int increment_version(value) except -1:
    graph = getattr(sys.modules["torch"].autograd, "graph", None)
    count = getattr(graph, "increment_version", None)
    if count is not None and not value.is_inference():
        count(value)
    return 0
