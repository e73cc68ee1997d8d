"""Checks of arguments: what the straight path in _core does not take comes through here.

Each function returns what the kernels need, or raises an error that names the argument, what was
got and what was wanted. Nothing is written to any output before all of them have passed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.exceptions import TooHardError
from numpy.lib.array_utils import normalize_axis_tuple

SUPPORTED = (np.dtype(np.float32), np.dtype(np.float64))

# How long NumPy may think about whether two arrays overlap; its annotations know of 0 and -1 alone.
MAX_WORK: Any = 1 << 20


def as_array(name: str, value: Any) -> np.ndarray:
    """`value` as a base-class ndarray of any type."""
    if is_masked(value):
        raise TypeError(
            f"{name}: got a masked array, wanted an ndarray: a mask would be ignored; "
            "pass x.filled(...)"
        )
    if hasattr(value, "__cuda_array_interface__"):
        raise TypeError(f"{name}: got an array on a CUDA device, wanted one in host memory")
    return np.asarray(value)


def is_masked(value: Any) -> bool:
    """Whether `value` is a masked array. numpy.ma is slow to import: plain arrays do without it."""
    subclass = isinstance(value, np.ndarray) and type(value) is not np.ndarray
    return subclass and isinstance(value, np.ma.MaskedArray)


def as_floating(name: str, value: Any) -> np.ndarray:
    """`value` as float32 or float64 of either byte order; integers and booleans become float64."""
    array = as_array(name, value)
    if array.dtype.kind in "biu":
        return array.astype(np.float64)
    native = array.dtype.newbyteorder("=")
    if native not in SUPPORTED:
        raise TypeError(
            f"{name}: got dtype {array.dtype}, wanted float32 or float64 "
            "(or integers, which become float64)"
        )
    return array


def as_eps(eps: Any) -> float:
    """A float that is not negative and not NaN."""
    try:
        value = float(operator.pos(eps))  # which text has not
    except (TypeError, ValueError):
        raise TypeError(f"eps: got {eps!r}, wanted a number of at least 0") from None
    if not value >= 0:
        raise ValueError(f"eps: got {eps!r}, wanted a number of at least 0")
    return value


def as_count(name: str, value: Any, least: int, wanted: str) -> int:
    """An integer of at least `least`; `wanted` is what an error says of it."""
    message = f"{name}: got {value!r}, wanted {wanted} of at least {least}"
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
    axes = normalize_axis_tuple(_as_ints("axis", axis), ndim, argname="axis", allow_duplicate=True)
    if not axes:
        raise ValueError("axis: got (), wanted at least one axis")
    if len(set(axes)) < len(axes):
        raise ValueError(f"axis: got {axis!r} for {ndim} dimensions, wanted each axis once")
    return tuple(sorted(axes))


def _as_ints(name: str, value: Any) -> tuple[int, ...]:
    items = value if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    try:
        return tuple(operator.index(item) for item in items)
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, wanted an int or a sequence of ints") from None


def normalized_axes(x: np.ndarray, normalized_shape: Any, axis: Any) -> tuple[int, ...]:
    """The axes to normalize over, ascending."""
    if normalized_shape is not None and axis is not None:
        raise TypeError(
            f"normalized_shape and axis: got both ({normalized_shape!r} and {axis!r}), wanted one"
        )
    if x.ndim == 0:
        raise ValueError("x: got an array of 0 dimensions, wanted at least 1")
    if axis is not None:
        return as_axes(axis, x.ndim)
    if normalized_shape is None:
        return (x.ndim - 1,)
    shape = as_shape("normalized_shape", normalized_shape)
    if not shape:
        raise ValueError("normalized_shape: got (), wanted at least one length")
    if x.shape[-len(shape) :] != shape:
        raise ValueError(
            f"normalized_shape: got {shape} for x of shape {x.shape}, wanted x's trailing shape "
            f"{x.shape[-len(shape) :]}"
        )
    return tuple(range(x.ndim - len(shape), x.ndim))


def as_parameter(
    name: str, value: Any, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray | None:
    """weight or bias as a contiguous array of `dtype`; None stays None."""
    if value is None:
        return None
    array = as_array(name, value)
    if array.dtype.kind not in "fbiu":
        raise TypeError(f"{name}: got dtype {array.dtype}, wanted a real number type")
    if array.shape != shape:
        raise ValueError(f"{name}: got shape {array.shape}, wanted {shape}")
    with np.errstate(over="ignore"):
        return np.require(array.astype(dtype, copy=False), requirements=("C", "A"))


def as_statistic(name: str, value: Any, x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """mean or rstd, with or without kept axes of length 1, as a contiguous array of x's type."""
    array = as_floating(name, value)
    dtype = x.dtype.newbyteorder("=")
    lead = tuple(length for d, length in enumerate(x.shape) if d not in axes)
    kept = tuple(1 if d in axes else length for d, length in enumerate(x.shape))
    if array.shape not in (lead, kept):
        raise ValueError(f"{name}: got shape {array.shape}, wanted {lead} (or {kept})")
    array = np.require(array.astype(dtype, copy=False), requirements=("C", "A"))
    return array.reshape(lead)


def as_mask(output_mask: Any) -> tuple[bool, bool, bool]:
    """Three truth values."""
    try:
        mask = tuple(bool(item) for item in output_mask)
    except TypeError:
        mask = ()
    if len(mask) != 3:
        raise ValueError(
            f"output_mask: got {output_mask!r}, wanted three truth values: dx, dweight, dbias"
        )
    return mask


def check_out(out: Any, x: np.ndarray) -> None:
    """A result of x's shape and type must fit into `out`."""
    if not isinstance(out, np.ndarray) or is_masked(out):
        raise TypeError(f"out: got {type(out).__name__}, wanted an ndarray")
    dtype = x.dtype.newbyteorder("=")
    if out.dtype.newbyteorder("=") != dtype:
        raise TypeError(f"out: got dtype {out.dtype}, wanted {dtype}, the type of the result")
    if out.shape != x.shape:
        raise ValueError(f"out: got shape {out.shape}, wanted {x.shape}, the shape of x")
    if not out.flags.writeable:
        raise ValueError("out: got a read-only array, wanted a writeable one")
    if overlaps_itself(out):
        raise ValueError(
            "out: got an array whose elements overlap in memory, wanted each in a place of its own"
        )


def check_apart(out: np.ndarray, inputs: dict[str, Any]) -> None:
    """`out` may be x's very elements, but share no memory with an input in another way."""
    for name, value in inputs.items():
        # A buffer that is not an ndarray shares its memory all the same.
        array = np.asarray(value)
        if not np.may_share_memory(out, array) or (name == "x" and is_same_memory(out, array)):
            continue
        if shares_memory(out, array):
            raise ValueError(
                f"out: got an array that overlaps {name}, wanted x itself or memory of its own"
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
    extent = array.itemsize
    steps = sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1)
    for stride, length in steps:
        if stride < extent:
            return array.size > 0
        extent += stride * (length - 1)
    return False
