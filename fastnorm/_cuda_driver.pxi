# The driver, found and asked once: devices, contexts, memory pools.

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
