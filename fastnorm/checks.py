"""Checks of arguments: what the straight path in _core does not take comes through here.

Each function returns what the kernels need, or raises an error that names the argument, what was
got and what was wanted. Nothing is written to any output before all of them have passed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.exceptions import AxisError, TooHardError
from numpy.lib.array_utils import normalize_axis_tuple

from . import interop

FLOAT16, FLOAT32, FLOAT64, INT8 = (np.dtype(t) for t in ("f2", "f4", "f8", "i1"))
#: What is computed in; the half types are loaded and stored only.
COMPUTED = (FLOAT32, FLOAT64)
# A type's number is the same in either byte order.
_STORED = frozenset(t.num for t in (FLOAT16, *COMPUTED))
#: NumPy's own of the types that results may be asked for as.
RESULT_TYPES = (FLOAT16, *COMPUTED, INT8)

ACTIVATIONS = {None: 0, "relu": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4}  # as fastnorm.h has them

# How long NumPy may think about whether two arrays overlap; its annotations know of 0 and -1 alone.
MAX_WORK: Any = 1 << 20


def as_array(name: str, value: Any) -> np.ndarray:
    """`value` as a base-class ndarray of any type."""
    if type(value) is np.ndarray:
        return value
    if is_masked(value):
        raise TypeError(
            f"{name}: got a masked array, wanted an ndarray: a mask would be ignored; "
            f"pass {name}.filled(...), or {name}.data with mask=~{name}.mask"
        )
    if hasattr(value, "__cuda_array_interface__"):
        raise TypeError(f"{name}: got an array on a CUDA device, wanted one in host memory")
    try:
        return np.asarray(value)
    except ValueError as error:  # lists of different lengths
        raise ValueError(f"{name}: {error}") from None


def is_masked(value: Any) -> bool:
    """Whether `value` is a masked array. numpy.ma is slow to import: plain arrays do without it."""
    subclass = isinstance(value, np.ndarray) and type(value) is not np.ndarray
    return subclass and isinstance(value, np.ma.MaskedArray)


def is_storage(dtype: np.dtype) -> bool:
    """Whether the kernels load and store this type, in either byte order."""
    return dtype.num in _STORED or interop.is_bfloat16(dtype)


def as_floating(name: str, value: Any) -> np.ndarray:
    """`value` in a storage type of either byte order; integers and booleans become float64."""
    if value is None:
        raise TypeError(f"{name}: got None, wanted an array")
    array = as_array(name, value)
    if array.dtype.kind in "biu":
        return array.astype(np.float64)
    if not is_storage(array.dtype):
        raise TypeError(
            f"{name}: got dtype {array.dtype}, wanted float16, bfloat16, float32 or float64 "
            "(or integers, which become float64)"
        )
    return array


def compute_type(*dtypes: np.dtype) -> np.dtype:
    """float64 where one of them is, else float32."""
    return FLOAT64 if FLOAT64.num in [dtype.num for dtype in dtypes] else FLOAT32


def wider(a: np.dtype, b: np.dtype) -> np.dtype:
    """What NumPy promotes two storage types to, in native order."""
    a, b = a.newbyteorder("="), b.newbyteorder("=")
    same = a == b or (interop.is_bfloat16(a) and interop.is_bfloat16(b))
    return a if same else compute_type(a, b)


def as_result_type(dtype: Any) -> np.dtype:
    """`dtype=` of a call: a storage type, or int8."""
    if isinstance(dtype, str) and dtype == "bfloat16":
        return interop.bfloat16_or_bits()
    try:
        wanted = np.dtype(dtype)
    except TypeError:
        wanted = np.dtype(object)
    if wanted == INT8 or (is_storage(wanted) and wanted.isnative):
        return wanted
    raise TypeError(f"dtype: got {dtype!r}, wanted float16, bfloat16, float32, float64 or int8")


def as_activation(activation: Any) -> int:
    """The kernels' number of an activation."""
    if activation is None or isinstance(activation, str):
        if activation in ACTIVATIONS:
            return ACTIVATIONS[activation]
        names = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ValueError(f"activation: got {activation!r}, wanted one of: {names}")
    raise TypeError(f"activation: got {type(activation).__name__}, wanted a name or None")


def as_offset(offset: Any) -> float:
    """A finite float."""
    try:
        value = float(operator.pos(offset))
    except (TypeError, ValueError):
        raise TypeError(f"offset: got {_in_short(offset)}, wanted a number") from None
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"offset: got {offset!r}, wanted a finite number")
    return value


def as_eps(eps: Any, hint: str = "") -> float:
    """A float that is not negative and not NaN; `hint` is for who gave something else."""
    try:
        value = float(operator.pos(eps))  # which text has not
    except (TypeError, ValueError):
        raise TypeError(f"eps: got {_in_short(eps)}, wanted a number of at least 0{hint}") from None
    except OverflowError:
        raise ValueError(f"eps: got {eps!r}, wanted a number that a float holds") from None
    if not value >= 0:
        raise ValueError(f"eps: got {eps!r}, wanted a number of at least 0")
    return value


def as_count(name: str, value: Any, least: int, wanted: str) -> int:
    """An integer of at least `least`; `wanted` is what an error says of it."""
    message = f"{name}: got {_in_short(value)}, wanted {wanted} of at least {least}"
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(message) from None
    if count < least:
        raise ValueError(message)
    return count


def as_shape(name: str, value: Any) -> tuple[int, ...]:
    """An int or a sequence of ints as a tuple of lengths."""
    shape = _as_ints(name, value)
    if any(length < 0 for length in shape):
        raise ValueError(f"{name}: got {value!r}, wanted lengths of at least 0")
    return shape


def as_axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """An int or a sequence of ints as axes of an array of `ndim` dimensions, ascending."""
    given = _as_ints("axis", axis)
    for item in given:
        if not -ndim <= item < ndim:  # which may be more than NumPy's own check can take
            raise AxisError(item, ndim, "axis")
    axes = normalize_axis_tuple(given, ndim, argname="axis", allow_duplicate=True)
    if not axes:
        raise ValueError("axis: got (), wanted at least one axis")
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis: got {axis!r} for {ndim} dimensions, wanted each axis once")
    return tuple(sorted(axes))


def _as_ints(name: str, value: Any) -> tuple[int, ...]:
    is_text = isinstance(value, (str, bytes, bytearray))
    items = value if isinstance(value, Iterable) and not is_text else (value,)
    try:
        return tuple(operator.index(item) for item in items)
    except TypeError:
        raise TypeError(
            f"{name}: got {_in_short(value)}, wanted an int or a sequence of ints"
        ) from None


def _in_short(value: Any) -> str:
    """An array by its type and shape: a weight in the place of a shape, or of eps, is a likely
    slip."""
    shape = getattr(value, "shape", ())
    if isinstance(shape, tuple) and shape and hasattr(value, "dtype"):
        return f"a {value.dtype} array of shape {tuple(shape)}"
    return repr(value)


def normalized_axes(
    x: np.ndarray, normalized_shape: Any, axis: Any, name: str = "x"
) -> tuple[int, ...]:
    """The axes of x to normalize over, ascending; `name` is what errors call it."""
    if normalized_shape is not None and axis is not None:
        raise TypeError(
            f"normalized_shape and axis: got both ({normalized_shape!r} and {axis!r}), wanted one"
        )
    if x.ndim == 0:
        raise ValueError(f"{name}: got an array of 0 dimensions, wanted at least 1")
    if axis is not None:
        return as_axes(axis, x.ndim)
    if normalized_shape is None:
        return (x.ndim - 1,)
    shape = as_shape("normalized_shape", normalized_shape)
    if not shape:
        raise ValueError("normalized_shape: got (), wanted at least one length")
    if x.shape[-len(shape) :] != shape:
        raise ValueError(
            f"normalized_shape: got {shape} for {name} of shape {x.shape}, wanted {name}'s "
            f"trailing shape {x.shape[-len(shape) :]}"
        )
    return tuple(range(x.ndim - len(shape), x.ndim))


def as_parameter(
    name: str, value: Any, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray | None:
    """weight or bias as a contiguous array of `dtype`; None stays None."""
    array = as_real(name, value)
    if array is None:
        return None
    if array.shape != shape:
        raise ValueError(f"{name}: got shape {array.shape}, wanted {shape}")
    return as_plain(array, dtype)


def as_plain(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Numbers as a contiguous, aligned array of `dtype`; what is one already as it is."""
    if array.dtype == dtype and array.flags.c_contiguous and array.flags.aligned:
        return array
    with np.errstate(all="ignore"):
        array = interop.widened(array).astype(dtype, copy=False)
    return np.require(array, requirements=("C", "A"))


def as_real(name: str, value: Any) -> np.ndarray | None:
    """A parameter of any real type; None stays None."""
    if value is None:
        return None
    array = as_array(name, value)
    if array.dtype.kind not in "fbiu" and not interop.is_bfloat16(array.dtype):
        raise TypeError(f"{name}: got dtype {array.dtype}, wanted a real number type")
    return array


def as_stored(array: np.ndarray, compute: np.dtype) -> np.ndarray:
    """A parameter as the kernels load it: native, aligned, of a storage type."""
    if is_storage(array.dtype) and array.dtype.isnative and array.flags.aligned:
        return array
    return as_plain(array, compute)


def as_statistic(
    name: str, value: Any, lead: tuple[int, ...], kept: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """mean or rstd of the leading shape, or with axes of length 1 kept, as a plain array."""
    array = as_floating(name, value)
    if array.shape not in (lead, kept):
        also = f" (or {kept})" if kept != lead else ""
        raise ValueError(f"{name}: got shape {array.shape}, wanted {lead}{also}")
    return as_plain(array, dtype).reshape(lead)


def as_lengths(value: Any, lead: tuple[int, ...], n: int) -> np.ndarray:
    """How many elements of each row count, as a contiguous intp array of the leading shape.

    It is a copy, and the copy is checked: another thread may write to the caller's array while the
    kernels, which trust these numbers, run without the GIL.
    """
    array = as_array("lengths", value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"lengths: got dtype {array.dtype}, wanted integers")
    array = np.array(_broadcast("lengths", array, lead), order="C")
    if array.size and not (array.min() >= 0 and array.max() <= n):
        raise ValueError(
            f"lengths: got values from {array.min()} to {array.max()}, wanted 0 to {n}, "
            "the number of normalized elements"
        )
    return array.astype(np.intp, copy=False)


def as_element_mask(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Which elements count, as a bool view of x's shape."""
    array = as_array("mask", value)
    if array.dtype != np.bool_:
        raise TypeError(f"mask: got dtype {array.dtype}, wanted bool")
    return _broadcast("mask", array, shape)


def _broadcast(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.shape == shape:
        return array
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        message = f"{name}: got shape {array.shape}, wanted one that broadcasts to {shape}"
        raise ValueError(message) from None


def as_offsets(value: Any, total: int) -> np.ndarray:
    """Where packed rows begin and end: ascending from 0 to x's length; a copy, as lengths are."""
    array = as_array("offsets", value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"offsets: got dtype {array.dtype}, wanted integers")
    if array.ndim != 1 or not array.size:
        raise ValueError(f"offsets: got shape {array.shape}, wanted one axis of at least 1")
    offsets = np.array(array, dtype=np.intp)
    if offsets[0] != 0 or offsets[-1] != total or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"offsets: got {array!r}, wanted integers that ascend from 0 to {total}, x's length"
        )
    return offsets


def as_mask(output_mask: Any, names: str = "dx, dweight, dbias") -> tuple[bool, ...]:
    """As many truth values as there are names."""
    count = names.count(",") + 1
    try:
        mask = tuple(bool(item) for item in output_mask)
    except (TypeError, ValueError):  # rows of an array are no truth values
        mask = ()
    if len(mask) != count:
        words = {2: "two", 3: "three"}[count]
        raise ValueError(f"output_mask: got {output_mask!r}, wanted {words} truth values: {names}")
    return mask


def check_out(name: str, out: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """A result of this shape and type must fit into `out`."""
    if not isinstance(out, np.ndarray) or is_masked(out):
        raise TypeError(f"{name}: got {type(out).__name__}, wanted an ndarray")
    if out.dtype.newbyteorder("=") != dtype:
        wanted = "uint16" if dtype == interop.BITS else dtype
        which = "sum" if name == "sum_out" else "result"
        raise TypeError(f"{name}: got dtype {out.dtype}, wanted {wanted}, the type of the {which}")
    if out.shape != shape:
        raise ValueError(f"{name}: got shape {out.shape}, wanted {shape}, the shape of x")
    if not out.flags.writeable:
        raise ValueError(f"{name}: got a read-only array, wanted a writeable one")
    if overlaps_itself(out):
        raise ValueError(
            f"{name}: got an array whose elements overlap in memory, wanted each in a place of its "
            "own"
        )


def check_apart(
    name: str, out: np.ndarray, inputs: dict[str, Any], allowed: tuple[str, ...] = ("x",)
) -> None:
    """`out` may be the very elements of what is `allowed`, but share no memory in another way."""
    for other, value in inputs.items():
        if value is None or (value is out and other in allowed):
            continue
        # A buffer that is not an ndarray shares its memory all the same.
        array = np.asarray(value)
        if not np.may_share_memory(out, array):
            continue
        if other in allowed and is_same_memory(out, array):
            continue
        if shares_memory(out, array):
            raise ValueError(
                f"{name}: got an array that overlaps {other}, wanted "
                f"{' or '.join(allowed) + ' itself or ' if allowed else ''}memory of its own"
            )


def is_same_memory(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether a and b are the same elements in the same places."""
    return (
        a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
        and a.shape == b.shape
        and all(s == t for s, t, n in zip(a.strides, b.strides, a.shape, strict=True) if n > 1)
        and a.dtype == b.dtype
    )


def shares_memory(a: np.ndarray, b: np.ndarray) -> bool:
    """np.shares_memory; arrays too intricate to tell count as overlapping."""
    try:
        return np.shares_memory(a, b, max_work=MAX_WORK)
    except TooHardError:
        return True


def overlaps_itself(array: np.ndarray) -> bool:
    """Whether two elements may share memory: each stride must step over all that lies within."""
    if array.flags.c_contiguous:
        return False
    extent = array.itemsize
    steps = sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1)
    for stride, length in steps:
        if stride < extent:
            return array.size > 0
        extent += stride * (length - 1)
    return False
