"""Inputs that are not ndarrays: torch tensors, DLPack, Arrow.

They are read and written where they lie: what is no view of host memory is refused, with the call
that would make it one. Only a mask's Arrow booleans are copied, as they are packed into bits. None
of these libraries is imported before a caller hands over its objects.
A tensor that requires grad is refused, as no gradient would flow; but where torch's grad mode is
off, as in torch.no_grad(), it is read as it is.
Buffers (memoryview, array.array) need nothing from here: NumPy takes them as they are.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

#: bfloat16 where ml_dtypes is not installed: two bytes that NumPy will not take for integers.
BITS = np.dtype([("bfloat16", np.uint16)], align=True)

#: Arguments that are written to; the caller gets the very object back.
OUTPUTS = ("out", "sum_out")

#: Arguments that may be sequences of arrays. Long lists elsewhere are not worth a look.
SEQUENCES = ("weights", "biases", "out")

# What most arguments are, which settles it.
_NATIVE = (np.ndarray, np.generic, int, float, complex, str, bytes, bytearray, memoryview)
# And where they are nothing else, one look at all of them does. (type: np.float32 as a dtype.)
_PLAIN = frozenset((type(None), bool, type, *_NATIVE))


@functools.cache
def bfloat16() -> np.dtype | None:
    """ml_dtypes.bfloat16, or None where ml_dtypes is not installed."""
    try:
        return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    except ImportError:
        return None


def bfloat16_or_bits() -> np.dtype:
    """What bfloat16 arrays are of here."""
    known = bfloat16()
    return BITS if known is None else known


def is_foreign(value: Any) -> bool:
    """Whether `value` is an array that to_ndarray has to convert."""
    if value is None or isinstance(value, (*_NATIVE, list, tuple)):
        return False
    return _is_tensor(value) or _is_arrow(value) or hasattr(type(value), "__dlpack__")


def is_on_cuda(value: Any) -> bool:
    """Whether `value` is an array in CUDA memory; asks no driver and imports nothing."""
    known = _ON_CUDA.get(type(value))
    if known is None:
        known = _on_cuda_by_type(type(value))
    return known if known is False or known is True else known(value) is True


def _on_cuda_by_type(kind: type) -> bool | Callable[[Any], Any]:
    """Whether objects of a type lie there, or how to ask one of them; kept for the next one."""
    known: bool | Callable[[Any], Any] = _has_interface
    if issubclass(kind, (*_NATIVE, list, tuple)):
        known = False
    elif hasattr(kind, "is_cuda"):  # torch, whose __cuda_array_interface__ may raise
        known = _is_cuda
    elif hasattr(kind, "__dlpack_device__"):  # before the interface, which JAX's class always has
        known = _exports_cuda
    elif hasattr(kind, "__cuda_array_interface__"):  # Numba, which takes time to make it
        known = True
    if len(_ON_CUDA) > 256:  # types can be made in a loop
        _ON_CUDA.clear()
    _ON_CUDA[kind] = known
    return known


def _has_interface(value: Any) -> bool:
    return hasattr(value, "__cuda_array_interface__")


def _exports_cuda(value: Any) -> bool:
    return int(value.__dlpack_device__()[0]) in _CUDA


_is_cuda = operator.attrgetter("is_cuda")
_ON_CUDA: dict[type, bool | Callable[[Any], Any]] = {}


def to_ndarray(name: str, value: Any) -> np.ndarray:
    """The memory of `value` as an ndarray; nothing is copied but what is_packed.

    bfloat16 has ml_dtypes' type, or BITS without ml_dtypes. The result is read-only where the
    owner of the memory says so. A tensor that requires grad is read as if detached where torch's
    grad mode is off (``torch.no_grad()``, ``torch.inference_mode()``): none is wanted there.

    Raises
    ------
    TypeError, ValueError
        If `value` is no view of host memory, or requires grad while grad mode is on, or has nulls.
        `name` says which argument it was.
    """
    if _is_tensor(value):
        return _from_tensor(name, value)
    if _is_arrow(value):
        return _from_arrow(name, value)
    if is_foreign(value):
        return _from_dlpack(name, value)
    return np.asarray(value)


def wants_torch(*values: Any) -> bool:
    """Whether results go back as tensors: one of `values`, the main inputs, is a tensor."""
    return any(map(_is_tensor, values))


def from_ndarray(result: Any) -> Any:
    """`result`, an ndarray or a tuple or list with ndarrays in it, with tensors on their memory."""
    if type(result) is np.ndarray and result.dtype.kind != "V":
        return sys.modules["torch"].from_numpy(result)
    if isinstance(result, (tuple, list)):
        return type(result)(map(from_ndarray, result))
    if not isinstance(result, np.ndarray):
        return result
    torch = sys.modules["torch"]
    if is_bfloat16(result.dtype):
        return torch.from_numpy(result.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(result)


def is_bits(dtype: np.dtype) -> bool:
    """Whether `dtype` is BITS, in either byte order."""
    return dtype.kind == "V" and dtype.newbyteorder("=") == BITS


def is_bfloat16(dtype: np.dtype) -> bool:
    """Whether `dtype` is bfloat16, by ml_dtypes or as BITS."""
    if dtype.kind != "V":
        return False
    # The name first: asking ml_dtypes imports it.
    return is_bits(dtype) or (dtype.type.__name__ == "bfloat16" and dtype == bfloat16())


def widened(array: np.ndarray) -> np.ndarray:
    """The numbers that BITS stand for, as float32; other arrays as they are."""
    if not is_bits(array.dtype):
        return array
    return (array["bfloat16"].astype(np.uint32) << 16).view(np.float32)


def to_bits(array: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16, to nearest even, as BITS."""
    bits = array.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    quiet = bits >> 16 | 0x40  # NaN, whose payload rounding could empty
    return np.where(np.isnan(array), quiet, rounded).astype(np.uint16).view(BITS)


def to_odd(values: np.ndarray) -> np.ndarray:
    """float64 to float32, rounded to odd: another rounding, to fewer digits, is as if it were the
    first."""
    wide = np.ascontiguousarray(values, np.float64)
    near = wide.astype(np.float32)
    bits = near.view(np.uint32)
    bits -= np.abs(near) > np.abs(wide)
    bits |= (near != wide) & ~np.isnan(wide)
    return near


def convert(name: str, value: Any) -> Any:
    """What an op takes in the place of `value`: the same object where there is nothing to do.

    Arrays become ndarrays, also in a list or tuple of SEQUENCES; torch.float32 becomes "float32".
    """
    if type(value) in _TENSORS:
        return _from_tensor(name, value)
    if value is None or isinstance(value, _NATIVE):
        return value
    if isinstance(value, (list, tuple)):
        if name not in SEQUENCES or not any(map(is_foreign, value)):
            return value
        return [convert(f"{name}[{i}]", item) for i, item in enumerate(value)]
    if _is_a(value, "torch", "dtype"):
        return str(value).removeprefix("torch.")
    return to_ndarray(name, value) if is_foreign(value) else value


def asks_for_bits(x: Any, dtype: Any) -> bool:
    """Whether x is bfloat16 as uint16: where ``dtype="bfloat16"`` is said by name."""
    return isinstance(dtype, str) and dtype == "bfloat16" and _is_uint16(x)


def as_bits(value: Any) -> Any:
    """A uint16 array of either byte order as BITS; anything else as it is."""
    if not _is_uint16(value):
        return value
    array = value if isinstance(value, np.ndarray) else np.asarray(value)
    return array.view(BITS.newbyteorder(array.dtype.byteorder))


def _is_uint16(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return isinstance(dtype, np.dtype) and dtype.kind == "u" and dtype.itemsize == BITS.itemsize


def run(call: Callable[..., Any], names: Sequence[str], *args: Any, main: str = "x") -> Any:
    """``call(*args)``, where arguments need not be ndarrays.

    `names` are the arguments' names, for errors, and to find the `main` input and OUTPUTS.
    Results are tensors where `main` is one; an output that was given comes back as the object it
    was. `call` must return the very array that it was given to write to.
    """
    if _PLAIN.issuperset(map(type, args)):
        return _returned(call(*args), [], False)
    converted = list(map(convert, names, args))
    if all(map(operator.is_, converted, args)):
        return _returned(call(*args), [], False)
    result = call(*converted)
    outputs: list[tuple[Any, Any]] = []
    for name, array, given in zip(names, converted, args, strict=True):
        if name in OUTPUTS:
            outputs += _pairs(array, given)
    return _returned(result, outputs, wants_torch(args[names.index(main)]))


def runner(
    call: Callable[..., Any], names: Sequence[str], main: str, public: Callable[..., Any]
) -> Callable[..., Any]:
    """:func:`run` of an op whose `public` function, of the same arguments, is short for ndarrays.

    It is called where `main` is a plain tensor, with the memory of plain tensors in their places;
    what else there is to convert, it finds itself.
    """
    at = names.index(main)
    dtype_at = names.index("dtype") if "dtype" in names else None
    outputs_at = [names.index(name) for name in OUTPUTS if name in names]

    def handle(*args: Any) -> Any:
        if type(args[at]) not in _TENSORS:
            return run(call, names, *args, main=main)
        arrays = _from_plain_tensors(args) or list(map(convert, names, args))
        dtype = None if dtype_at is None else arrays[dtype_at]
        # What is BITS, by x or by its name, `public` would give away as uint16.
        if is_bits(arrays[at].dtype) or not (dtype is None or type(dtype) is type):
            return run(call, names, *args, main=main)
        result = public(*arrays)
        outputs: list[tuple[Any, Any]] = []
        for i in outputs_at:
            if args[i] is not None:
                outputs += _pairs(arrays[i], args[i])
        return _returned(result, outputs, True) if outputs else from_ndarray(result)

    return handle


def _pairs(converted: Any, given: Any) -> list[tuple[Any, Any]]:
    """Each array of an output, and what the caller gave for it."""
    if isinstance(converted, (list, tuple)):
        return list(zip(converted, given, strict=True))
    return [(converted, given)]


def _returned(result: Any, outputs: list[tuple[Any, Any]], as_tensors: bool) -> Any:
    if isinstance(result, (tuple, list)):
        return type(result)([_returned(item, outputs, as_tensors) for item in result])
    for array, given in outputs:
        if result is array and array is not None:
            _note_written(given)
            return given
    if as_tensors:
        return from_ndarray(result)
    if isinstance(result, np.ndarray) and result.dtype == BITS:
        return result.view(np.uint16)
    return result


def _is_a(value: Any, module: str, name: str) -> bool:
    """isinstance without an import: whoever has such an object has imported the module."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)


# ---- torch ---------------------------------------------------------------------------------------


def _is_tensor(value: Any) -> bool:
    return _is_a(value, "torch", "Tensor")


def _from_tensor(name: str, tensor: Any) -> np.ndarray:
    torch = sys.modules["torch"]
    if type(tensor) in _TENSORS and tensor.dtype is not torch.bfloat16:
        arrays = _from_plain_tensors((tensor,))
        if arrays is not None:
            return arrays[0]
    _TENSORS.update((torch.Tensor, torch.nn.Parameter))
    if tensor.device.type != "cpu":
        raise TypeError(f"{name}: got a tensor on device {tensor.device}, wanted one on the CPU")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else tensor.dtype
        kind = kind if tensor.layout == torch.strided else tensor.layout
        raise TypeError(f"{name}: got a tensor that is {kind}, wanted a dense one")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{name}: got a tensor that requires grad, wanted {name}.detach(): "
            "no gradient would flow through this call"
        )
    if tensor.is_neg() or tensor.is_conj():
        how = "resolve_neg" if tensor.is_neg() else "resolve_conj"
        raise TypeError(f"{name}: got a tensor that is a lazy view, wanted {name}.{how}()")
    try:
        if tensor.dtype == torch.bfloat16:
            # NumPy knows no bfloat16: the bits go over as integers of the same size.
            return tensor.detach().view(torch.int16).numpy().view(bfloat16_or_bits())
        return tensor.detach().numpy()
    except (RuntimeError, TypeError) as error:
        raise TypeError(
            f"{name}: got a {type(tensor).__name__} of {tensor.dtype} that has no memory NumPy "
            f"could read, wanted a plain tensor of a type that NumPy knows ({error})"
        ) from error


def _note_written(value: Any) -> None:
    """Tell autograd of a write, so that it will not use a tensor it has saved before."""
    if not _is_tensor(value) or value.is_inference():
        return
    autograd_graph = sys.modules["torch"].autograd.graph
    if hasattr(autograd_graph, "increment_version"):
        autograd_graph.increment_version(value)


# Plain tensors, in a fourth of the time: torch's own `numpy` refuses what _from_tensor does.

#: Their types, from the first tensor on: looking for them in torch takes longer.
_TENSORS: set[type] = set()


def _from_plain_tensors(args: Sequence[Any]) -> list[Any] | None:
    """`args` with arrays for plain tensors, the others as they are; None where one takes a closer
    look."""
    try:
        return [value.numpy() if type(value) in _TENSORS else value for value in args]
    except (RuntimeError, TypeError):
        return None


# ---- DLPack --------------------------------------------------------------------------------------

_CPU = 1
_CUDA = (2, 13)  # and managed memory
_UNSIGNED, _BFLOAT = 1, 4


class _DLTensor(ctypes.Structure):
    """dlpack.h; a capsule named "dltensor" points to what begins with one."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
    )


class _Exporter:
    """What np.from_dlpack asks for a capsule."""

    def __init__(self, capsule: Any) -> None:
        self.capsule = capsule

    def __dlpack__(self, **options: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CPU, 0


def _from_dlpack(name: str, value: Any) -> np.ndarray:
    kind = type(value).__name__
    device = int(value.__dlpack_device__()[0])
    if device != _CPU:
        raise TypeError(
            f"{name}: got a {kind} on a device of DLPack type {device}, "
            f"wanted one on the CPU (type {_CPU})"
        )
    try:
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError):
            array = _bfloat16_from_dlpack(value)
            if array is None:
                raise
            return array
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: got a {kind} that NumPy cannot read through DLPack ({error}), "
            "wanted real numbers in host memory; pass it as an ndarray"
        ) from error


def _bfloat16_from_dlpack(value: Any) -> np.ndarray | None:
    """A bfloat16 array, which NumPy refuses to import, or None where `value` is of another type."""
    capsule = value.__dlpack__()
    pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    tensor = _DLTensor.from_address(pointer_of(capsule, b"dltensor"))
    if (tensor.code, tensor.bits, tensor.lanes) != (_BFLOAT, 16, 1):
        return None
    # The struct was made for this export alone and is the importer's. Called integers of the same
    # size, its elements are taken over by NumPy, which also frees it.
    tensor.code = _UNSIGNED
    return np.from_dlpack(_Exporter(capsule)).view(bfloat16_or_bits())


# ---- Arrow ---------------------------------------------------------------------------------------


def _is_arrow(value: Any) -> bool:
    if _is_a(value, "pyarrow", "Array") or _is_a(value, "pyarrow", "ChunkedArray"):
        return True
    kind = type(value)
    exports = hasattr(kind, "__arrow_c_array__") or hasattr(kind, "__arrow_c_stream__")
    # Series and tables of other libraries, which NumPy knows how to ask, are left to NumPy.
    return exports and not hasattr(kind, "__array__")


def is_packed(name: str, value: Any) -> bool:
    """Whether `value` is booleans in Arrow's bits, which only a mask may be."""
    return name == "mask" and _is_arrow(value)


def _from_arrow(name: str, value: Any) -> np.ndarray:
    array = _one_chunk(name, _as_pyarrow(name, value))
    if array.null_count:
        raise ValueError(
            f"{name}: got an Arrow array with {array.null_count} nulls, wanted one without: "
            f"{name}.fill_null(...) or {name}.drop_null()"
        )
    types = sys.modules["pyarrow"].types
    if types.is_fixed_size_list(array.type):
        items = _from_arrow(name, array.flatten())
        return items.reshape(len(array), array.type.list_size, *items.shape[1:])
    if name == "mask" and types.is_boolean(array.type):
        return array.to_numpy(zero_copy_only=False)
    if hasattr(array, "to_numpy_ndarray"):  # fixed-shape tensors, whose storage is a list
        stored = _from_arrow(name, array.storage)
        if stored.dtype == np.bool_:
            raise TypeError(f"{name}: got an Arrow tensor of bool, wanted {name}.storage")
        return array.to_numpy_ndarray()
    if not (types.is_floating(array.type) or types.is_integer(array.type)):
        raise TypeError(
            f"{name}: got an Arrow array of {array.type}, "
            "wanted numbers or fixed-size lists of numbers"
        )
    return array.to_numpy(zero_copy_only=True)


def _as_pyarrow(name: str, value: Any) -> Any:
    try:
        pyarrow = importlib.import_module("pyarrow")
    except ImportError:
        raise TypeError(
            f"{name}: got a {type(value).__name__}, an Arrow array that takes pyarrow to read, "
            "which is not installed"
        ) from None
    if isinstance(value, (pyarrow.Array, pyarrow.ChunkedArray)):
        return value
    if hasattr(value, "__arrow_c_array__"):
        return pyarrow.array(value)
    return pyarrow.chunked_array(value)


def _one_chunk(name: str, array: Any) -> Any:
    if not hasattr(array, "num_chunks"):
        return array
    if array.num_chunks > 1:
        raise ValueError(
            f"{name}: got an Arrow array of {array.num_chunks} chunks, wanted one: "
            f"{name}.combine_chunks()"
        )
    return array.chunk(0) if array.num_chunks else array.combine_chunks()
