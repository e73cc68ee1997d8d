# Kernels: a function of the driver's, and how its arguments are laid out.

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
