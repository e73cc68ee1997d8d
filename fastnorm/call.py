"""One call of an op, checked and laid out: what the calls of all kinds share.

An op's own kind of Call decides in its constructor and computes in ``run``, so that ``explain``
shows the very decisions a call would make.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import _core, checks, interop

MACHINE_EPS = {t: float(np.finfo(t).eps) for t in checks.COMPUTED}
# What a quantised row that is 0 has as its scale.
LEAST_SCALE = np.finfo(np.float32).tiny


def eps_of(eps: Any, rms: bool, compute: np.dtype) -> float:
    """A norm's eps; RMS norm's is that of the type it is computed in, where none is given."""
    if eps is None and rms:
        return MACHINE_EPS[compute]
    return checks.as_eps(eps, " (RMS norm has no bias)" if rms else "")


class Rows:
    """An array seen as (leading..., elements...): its normalized axes last, in place.

    `array` is a view where the kernels can load its elements, else memory of its own, which `notes`
    records: a copy, or, where not to `fill`, room for what will be written back.
    """

    def __init__(
        self,
        name: str,
        source: np.ndarray,
        order: tuple[int, ...],
        notes: list[str],
        fill: bool = True,
        explained: bool = False,
    ) -> None:
        self.source = source
        self.order = order
        why = why_copied(source)
        self.copied = bool(why)
        if why:
            notes.append(f"{name} is copied: {why}")
            native = source.dtype.newbyteorder("=")
            source = stand_in(source.shape, native) if explained else np.empty(source.shape, native)
            if fill and not explained:
                np.copyto(source, self.source)
        self.stored = source
        self.array = source.transpose(order)

    def write_back(self) -> None:
        """Bring the result from the copy to where the caller wants it."""
        if self.copied:
            np.copyto(self.source, self.stored)


def why_copied(array: np.ndarray) -> str:
    """Why the kernels cannot load this array's elements; empty where they can."""
    if not array.dtype.isnative:
        return "its bytes are swapped"
    return "" if array.flags.aligned else "its elements are not aligned"


def stand_in(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """What has a new array's shape and strides, but memory for one element: for plans alone."""
    strides = [dtype.itemsize * math.prod(shape[d + 1 :]) for d in range(len(shape))]
    return np.lib.stride_tricks.as_strided(np.empty((), dtype), shape, strides)


def as_output(out: Any, dtype: np.dtype) -> Any:
    """An array to write to, as bfloat16 where the result is of BITS."""
    takes_bits = dtype == interop.BITS and isinstance(out, np.ndarray)
    return interop.as_bits(out) if takes_bits else out


class Reader:
    """A call's arrays: its main one, `source`, which errors call `name`, its like, and results.

    A call that is only `explained` takes no kept memory. `copies` has a note of each copy.
    """

    explained: bool
    copies: list[str]
    source: np.ndarray
    name: str

    def floating(self, name: str, value: Any) -> np.ndarray:
        array = checks.as_floating(name, value)
        if array.dtype.kind == "V" and not interop.is_bits(array.dtype):
            _core.set_bfloat16(array.dtype)
        if array is not value and np.asarray(value).dtype.kind in "biu":
            self.copies.append(f"{name} is copied: integers are converted to float64")
        return array

    def like_x(self, name: str, value: Any) -> np.ndarray:
        """An array of x's shape and any storage type."""
        array = self.floating(name, value)
        if array.shape != self.source.shape:
            raise ValueError(
                f"{name}: got shape {array.shape}, wanted {self.source.shape}, "
                f"the shape of {self.name}"
            )
        return array

    def new_result(self, dtype: np.dtype) -> tuple[np.ndarray, bool]:
        """An array for a result, and whether its pages are known to exist."""
        nbytes = self.source.size * dtype.itemsize
        if self.explained:
            return stand_in(self.source.shape, dtype), _core.would_be_warm(nbytes)
        return _core.new_result(self.source.shape, dtype)


class LaidReader(Reader):
    """A reader of contiguous arrays, whose axes the kernels may have to see in another order."""

    moved: tuple[int, ...] | None = None
    moved_why: str

    def laid_out(self, name: str, array: np.ndarray, fill: bool = True) -> np.ndarray:
        """The array as it is, or contiguous, native, its axes moved where they must be."""
        why = why_copied(array)
        if not why and not array.flags.c_contiguous:
            why = "it is not contiguous"
        if not why and self.moved is not None:
            why = self.moved_why
        if not why:
            return array
        self.copies.append(f"{name} is copied: {why}")
        native = array.dtype.newbyteorder("=")
        moved = array if self.moved is None else array.transpose(self.moved)
        if self.explained:
            return stand_in(moved.shape, native)
        made = np.empty(moved.shape, native)
        if fill:
            np.copyto(made, moved)
        return made

    def write_back(self, made: np.ndarray, out: np.ndarray) -> None:
        """Bring what the kernels wrote to where the caller wants it."""
        if made is not out:
            np.copyto(out if self.moved is None else out.transpose(self.moved), made)


class Call(Reader):
    """One call of an op, checked and laid out.

    An op's own constructor sets `kernel`, the function of _core with its arguments, `result`, what
    the caller gets, and `outputs`, the rows to be written back; a norm's also `options`, keywords
    of its kernel. A call that is only `explained` copies nothing and takes no kept memory.
    """

    kernel: Callable[..., Any]
    options: dict[str, Any]
    result: Any

    def __init__(
        self, x: Any, normalized_shape: Any, axis: Any, explained: bool,
        others: Sequence[np.ndarray] = (), name: str = "x", per_sample: bool = False,
    ) -> None:  # fmt: skip
        self.explained = explained
        self.copies: list[str] = []
        self.outputs: list[Rows] = []
        self.source = self.floating(name, x)
        self.name = name
        self.per_sample = per_sample
        self.axes = checks.normalized_axes(self.source, normalized_shape, axis, name)
        self.dtype = self.source.dtype.newbyteorder("=")
        self.compute = checks.compute_type(self.dtype, *[other.dtype for other in others])
        shape, first = self.source.shape, self.source.ndim - len(self.axes)
        self.is_trailing = self.axes[0] == first
        self.order = (*[d for d in range(len(shape)) if d not in self.axes], *self.axes)
        self.moved_shape = tuple([shape[d] for d in self.order])
        self.lead, self.normalized = self.moved_shape[:first], self.moved_shape[first:]

    def rows(self, name: str, source: np.ndarray, is_output: bool = False) -> np.ndarray:
        """The array as the kernels see it; an output is written back after the call."""
        rows = Rows(name, source, self.order, self.copies, not is_output, self.explained)
        if is_output:
            self.outputs.append(rows)
        return rows.array

    def parameter(self, name: str, value: Any) -> np.ndarray | None:
        """weight or bias: of the normalized shape, or with leading axes that broadcast to x's.

        One for each sample, (B, *normalized), has its tokens' axes put in.
        """
        array = checks.as_real(name, value)
        if array is None:
            return None
        if array.shape == self.normalized:
            return checks.as_plain(array, self.compute)
        before, shape = array.ndim - len(self.normalized), array.shape
        if self.per_sample and before == 1:
            shape = (shape[0], *[1] * (len(self.lead) - 1), *shape[1:])
        if not self._has_own_rows(shape):
            raise ValueError(f"{name}: got shape {array.shape}, wanted {self._wanted(before)}")
        return checks.as_stored(array, self.compute).reshape(shape)

    def _has_own_rows(self, shape: tuple[int, ...]) -> bool:
        """Whether a parameter's leading axes fit x's, and the others are the normalized ones."""
        before = len(shape) - len(self.normalized)
        ends = self.lead[max(len(self.lead) - before, 0) :]
        return (
            self.is_trailing
            and 0 < before <= len(self.lead)
            and shape[before:] == self.normalized
            and all(length in (1, end) for length, end in zip(shape, ends, strict=False))
        )

    def _wanted(self, before: int) -> str:
        if before <= 0 or not (self.lead and self.is_trailing):
            return f"{self.normalized}"
        sample = f"{self.lead[:1] + self.normalized}, one a sample, or " if self.per_sample else ""
        return f"{sample}{self.normalized}, or axes before it that broadcast to {self.lead}"

    def with_offset(self, weight: np.ndarray | None) -> np.ndarray | None:
        """A weight for all rows gets its offset here, once, so that such calls can be plain."""
        if weight is None or weight.ndim > len(self.normalized) or not self.options["offset"]:
            return weight
        offset, self.options["offset"] = self.options["offset"], 0.0
        with np.errstate(all="ignore"):
            return weight + self.compute.type(offset)

    def spread(self, array: np.ndarray | None) -> np.ndarray | None:
        """A parameter as if there were one for each row; no copy."""
        return None if array is None else np.broadcast_to(array, self.moved_shape)

    def a_row(self, dtype: np.dtype, value: Any) -> np.ndarray:
        """Room for a number for each row, which rows of length 0 keep as `value`."""
        if self.explained:
            return stand_in(self.lead, dtype)
        return np.full(self.lead, value, dtype)

    def scales(self, dtype: np.dtype) -> np.ndarray | None:
        """Room for the rows' scales, where results are of a type that has them."""
        return self.a_row(checks.FLOAT32, LEAST_SCALE) if dtype == checks.INT8 else None

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Room for a mean and an rstd or variance, which hold what rows of length 0 have."""
        return self.a_row(self.compute, 0), self.a_row(self.compute, np.nan)

    def valid(self, lengths: Any, mask: Any) -> dict[str, np.ndarray]:
        """Which elements count, as the kernels take it."""
        if lengths is not None and mask is not None:
            raise TypeError("lengths and mask: got both, wanted one")
        if lengths is not None:
            n = math.prod(self.normalized)
            return {"lengths": checks.as_lengths(lengths, self.lead, n)}
        if mask is None:
            return {}
        return {"mask": checks.as_element_mask(mask, self.source.shape).transpose(self.order)}

    def plan(self) -> dict[str, Any]:
        """What `run` would do, as _core describes it."""
        return self.kernel(plan=True)

    def run(self) -> Any:
        if self.source.size:
            self.kernel()
            for rows in self.outputs:
                rows.write_back()
        return self.result
