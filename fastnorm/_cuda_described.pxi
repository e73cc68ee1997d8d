# Descriptions as Python sees them.

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
