# Kept calls: found by the bytes that describe them, launched without a Python frame.

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
