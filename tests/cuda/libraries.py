"""Arrays of other libraries, as fastnorm sees them: they say that their memory is a CUDA device's,
and it is the host's. `host(array)` is that memory as an ndarray."""

import ctypes
import sys
import types

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
#: Where memory begins, as every library's allocator has it.
ALIGNMENT = 256


def memory(shape, dtype, offset=0):
    """Aligned memory full of NaN, or `offset` elements past where it is aligned."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.empty(count * dtype.itemsize + 2 * ALIGNMENT, np.uint8)
    start = -raw.__array_interface__["data"][0] % ALIGNMENT + offset * dtype.itemsize
    made = raw[start : start + count * dtype.itemsize].view(dtype).reshape(shape)
    made[...] = np.nan if dtype.kind in "fV" else 0
    return made


def placed(values, offset=0):
    """A copy of `values` in such memory."""
    made = memory(values.shape, values.dtype, offset)
    made[...] = values
    return made


def address(array):
    return array.__array_interface__["data"][0]


def host(array):
    return array.memory


class _Array:
    """What the libraries' arrays share: memory, a device and a stream, by name."""

    def __init__(self, array, device=0):
        self.memory, self.ordinal = array, device

    @property
    def shape(self):
        return self.memory.shape

    def __getitem__(self, key):
        return type(self)(self.memory[key], self.ordinal)


# ---- torch --------------------------------------------------------------------------------------


class dtype:
    def __init__(self, name):
        self.name = name

    def __repr__(self):
        return f"torch.{self.name}"


TYPES = {name: dtype(name) for name in
         ("float32", "float64", "float16", "bfloat16", "int64", "uint8")}  # fmt: skip
BY_NUMPY = {np.dtype(name if name != "bfloat16" else BFLOAT16): kind
            for name, kind in TYPES.items()}  # fmt: skip


class Tensor(_Array):
    is_cuda = True
    requires_grad = False
    is_nested = False
    layout = "strided"

    def is_neg(self):
        return False

    def is_inference(self):
        return False

    @property
    def device(self):
        return f"cuda:{self.ordinal}"

    @property
    def dtype(self):
        return BY_NUMPY[self.memory.dtype]

    def stride(self):
        return tuple(step // self.memory.itemsize for step in self.memory.strides)

    def data_ptr(self):
        return address(self.memory)

    def get_device(self):
        return self.ordinal

    def new_empty(self, shape, dtype=None):
        kind = next(k for k, known in BY_NUMPY.items() if known is (dtype or self.dtype))
        return Tensor(memory(shape, kind), self.ordinal)

    def to(self, where):
        return Tensor(placed(self.memory), int(str(where).rpartition(":")[2]))


class CPUTensor(Tensor):
    is_cuda = False
    device = "cpu"


#: Each device's current stream.
STREAMS = {}


def _torch_like():
    """A module with as much of torch as is asked for."""
    torch = types.ModuleType("torch")
    torch.Tensor, torch.dtype, torch.strided = Tensor, dtype, "strided"
    torch.nn = types.SimpleNamespace(Parameter=type("Parameter", (Tensor,), {}))
    for name, kind in TYPES.items():
        setattr(torch, name, kind)
    torch._C = types.SimpleNamespace(_cuda_getCurrentRawStream=lambda d: STREAMS.get(d, 0))
    torch.empty_like = lambda tensor: tensor.new_empty(tensor.shape)
    torch.from_numpy = lambda array: Tensor(array)
    torch.autograd = types.SimpleNamespace(graph=None)
    return torch


# ---- CuPy ---------------------------------------------------------------------------------------


class ndarray(_Array):
    def __init__(self, array, dtype=None, device=0):
        made = array if isinstance(array, np.ndarray) else memory(array, dtype)
        super().__init__(made, device)

    def __getitem__(self, key):
        return ndarray(self.memory[key], device=self.ordinal)

    @property
    def dtype(self):
        return self.memory.dtype

    @property
    def strides(self):
        return self.memory.strides

    @property
    def data(self):
        return types.SimpleNamespace(ptr=address(self.memory), device_id=self.ordinal)

    @property
    def __cuda_array_interface__(self):
        return _interface(self.memory)


class _Stream:
    def __init__(self, handle):
        self.ptr = handle
        self.waits = 0

    def synchronize(self):
        self.waits += 1


class _Device:
    def __init__(self, ordinal):
        self.ordinal = ordinal

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        return None


def _cupy_like():
    cupy = types.ModuleType("cupy")
    cupy.ndarray = ndarray
    cupy.cuda = types.SimpleNamespace(
        get_current_stream=lambda device=0: _Stream(STREAMS.get(device, 0)), Device=_Device
    )
    cupy.asarray = lambda array: ndarray(placed(array))
    return cupy


# ---- arrays known by an interface ---------------------------------------------------------------


def _interface(array, stream=None, **more):
    return {
        "version": 3, "shape": array.shape, "typestr": array.dtype.str, "strides": array.strides,
        "data": (address(array), not array.flags.writeable), "stream": stream, **more,
    }  # fmt: skip


class Interface(_Array):
    """__cuda_array_interface__ and nothing else, but for the dtype that bfloat16 is known by."""

    stream = None

    @property
    def dtype(self):
        return self.memory.dtype

    @property
    def __cuda_array_interface__(self):
        return _interface(self.memory, self.stream)


class DeviceNDArray(Interface):
    """As Numba's, which is known by its module."""

    __module__ = "numba.cuda.cudadrv.devicearray"


def _device_array(shape, dtype, stream=0):
    return DeviceNDArray(memory(shape, dtype))


_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_CUDA, _BFLOAT = 2, 4


class Exporter(_Array):
    """DLPack, as before 1.0, and nothing else; `asked` are the streams it was told of."""

    def __init__(self, array, device=0):
        super().__init__(array, device)
        self.asked = []

    def __dlpack_device__(self):
        return _CUDA, self.ordinal

    def __dlpack__(self, stream=None):
        self.asked.append(stream)
        bits = self.memory.dtype.kind == "V" or self.memory.dtype == BFLOAT16
        capsule = (self.memory.view(np.uint16) if bits else self.memory).__dlpack__()
        self._rename(capsule, bits)
        return capsule

    def _rename(self, capsule, bits):
        # After the pointer come device type, device number, ndim, and the type's code.
        at = _pointer_of(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)
        place = (ctypes.c_int32 * 2).from_address(at)
        place[0], place[1] = _CUDA, self.ordinal
        if bits:
            ctypes.c_uint8.from_address(at + 3 * 4).value = _BFLOAT


#: Whose results fastnorm can make, and all.
MAKING = {"torch": Tensor, "cupy": ndarray, "numba": DeviceNDArray}
KINDS = MAKING | {"interface": Interface, "dlpack": Exporter}


# One of each: what is found out of a type's library is kept as long as the type.
MODULES = {"torch": _torch_like(), "cupy": _cupy_like()}


def install(monkeypatch):
    """The modules, as if the caller had imported them; Numba makes arrays of the host's memory."""
    for name, module in MODULES.items():
        monkeypatch.setitem(sys.modules, name, module)
    if "numba.cuda" in sys.modules:
        numba_cuda = sys.modules["numba.cuda"]
        monkeypatch.setattr(numba_cuda, "device_array", _device_array)
        monkeypatch.setattr(numba_cuda, "gpus", [_Device(0), _Device(1)])
    STREAMS.clear()
