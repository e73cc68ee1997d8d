# Instruction sets and threads.

def isa_names():
    """Names of the instruction sets compiled in, best first."""
    return tuple(fn_isa_name(i).decode() for i in range(fn_isa_count()))


def isa_supported(name):
    """Whether this CPU, and its operating system, can run instruction set `name`."""
    return name in isa_names() and bool(fn_isa_supported(isa_names().index(name)))


def isa_active():
    """The instruction set in use."""
    return fn_isa_active().decode()


def select_isa(name=None):
    """Use instruction set `name`; None: the best this CPU has. For the whole process.

    Raises ValueError for a name that is not compiled in, RuntimeError for one the CPU lacks.
    """
    cdef bytes encoded
    cdef int status
    if name is None:
        status = fn_isa_select(NULL)
    else:
        encoded = str(name).encode()
        status = fn_isa_select(encoded)
    if status == FN_OK:
        return
    usable = ", ".join(n for n in isa_names() if isa_supported(n))
    if status == FN_UNSUPPORTED_ISA:
        raise RuntimeError(f"FASTNORM_ISA: this CPU lacks {name!r}; it has: {usable}")
    raise ValueError(f"FASTNORM_ISA: got {name!r}, wanted one of: {usable}")


def threads():
    """The numbers that bound the threads of a call: the least of them counts."""
    return {
        "max": fn_max_threads(),
        "requested": fn_requested_threads() or None,
        "openmp": fn_openmp_limit() if fn_openmp() else None,
        "affinity": fn_cpu_affinity(),
        "cpu_quota": fn_cpu_quota() or None,
    }


def set_requested_threads(int count):
    """Store what set_num_threads was given; 0 forgets it."""
    fn_set_num_threads(count)


def set_cpu_quota(int cpus):
    """Store the container's CPU quota, rounded up; 0: none."""
    fn_set_cpu_quota(cpus)


def openmp():
    """Whether OpenMP was compiled in."""
    return bool(fn_openmp())


def force_partition(int parts):
    """For tests: split every call into `parts` parts, whatever the cores; 0 ends it."""
    fn_force_partition(parts)


def use_bf16_instructions(bint use):
    """For tests: whether AVX512_BF16 is used where the CPU has it; returns whether it is."""
    return bool(fn_use_bf16_instructions(use))


select_isa(os.environ.get("FASTNORM_ISA") or None)
