"""Calls of weight norm and unit norm.

An array is seen as (samples, outer, kinds, inner): a vector is what of a sample is of one kind. So
the kernels of weights.c take vectors that are rows, that lie side by side, or whose axes are on
both sides of the others. What lies otherwise is copied into rows.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.exceptions import AxisError

from . import _core, checks, interop
from .call import LaidReader, as_output, stand_in
from .weight_repairs import put_right, stored

# ---- checks --------------------------------------------------------------------------------------


def as_dim(dim: Any, ndim: int, wanted: str = "an integer") -> int:
    """One axis of an array of `ndim` dimensions, not negative."""
    try:
        index = operator.index(dim)
    except TypeError:
        raise TypeError(f"dim: got {dim!r}, wanted {wanted}") from None
    if not -ndim <= index < ndim:  # which may be more than NumPy's own check can take
        raise AxisError(index, ndim, "dim")
    return index % ndim


def all_but(dim: Any, ndim: int, wanted: str = "an integer") -> tuple[int, ...]:
    """All axes but one."""
    left_out = as_dim(dim, ndim, wanted)
    return tuple([d for d in range(ndim) if d != left_out])


def as_weight_axes(dim: Any) -> Callable[[int], tuple[int, ...]]:
    """Weight norm's axes, once it is known how many there are."""
    if dim is None:
        return lambda ndim: tuple(range(ndim))
    return lambda ndim: all_but(dim, ndim, "an integer or None")


def as_unit_axes(axis: Any) -> Callable[[int], tuple[int, ...]]:
    return lambda ndim: checks.as_axes(axis, ndim)


# ---- where vectors lie ---------------------------------------------------------------------------


def layout_of(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    """Samples, outer, kinds, inner; None where `axes` and the others take more turns than that."""
    lengths, at = [1, 1, 1, 1], 0
    for d, n in enumerate(shape):
        if n == 1:
            continue
        at += (d in axes) != at % 2
        if at > 3:
            return None
        lengths[at] *= n
    samples, outer, kinds, inner = lengths
    if outer * inner == 1:
        samples, kinds = 1, samples * kinds
    if kinds == 1:
        outer, inner = 1, outer * inner
    return samples, outer, kinds, inner


class VectorCall(LaidReader):
    """What the calls share: an array, and which of its axes make a vector."""

    moved_why = "the axes of its vectors lie apart"

    def __init__(
        self, name: str, value: Any, axes_of: Callable[[int], tuple[int, ...]], explained: bool
    ) -> None:
        self.explained = explained
        self.copies = []
        self.name = name
        self.source = self.floating(name, value)
        if self.source.ndim == 0:
            raise ValueError(f"{name}: got an array of 0 dimensions, wanted at least 1")
        shape = self.source.shape
        self.axes = axes_of(self.source.ndim)
        rest = tuple([d for d in range(len(shape)) if d not in self.axes])
        self.order = (*rest, *self.axes)
        self.lead = tuple([shape[d] for d in rest])
        self.kept = tuple([1 if d in self.axes else n for d, n in enumerate(shape)])
        self.n = math.prod([shape[d] for d in self.axes])
        self.count = math.prod(self.lead)
        self.dtype = self.source.dtype.newbyteorder("=")
        self.compute = checks.compute_type(self.dtype)
        layout = layout_of(shape, self.axes)
        if layout is None:
            self.moved = self.order
            layout = layout_of((self.count, self.n), (1,))
            assert layout is not None
        self.layout = layout

    @property
    def is_side_by_side(self) -> bool:
        """Whether vectors are columns, which the kernels take in the type that is computed in."""
        return self.layout[3] == 1 and self.layout[2] > 1

    def loaded(self, name: str, array: np.ndarray) -> np.ndarray:
        """An input as the kernels see it."""
        array = self.laid_out(name, array)
        if not self.is_side_by_side or array.dtype == self.compute:
            return array
        self.copies.append(f"{name} is copied: vectors side by side are {self.compute} to us")
        if self.explained:
            return stand_in(array.shape, self.compute)
        return checks.as_plain(array, self.compute)

    def room_for(self, name: str, array: np.ndarray) -> np.ndarray:
        """Where the kernels write what is to be in `array`."""
        if not self.is_side_by_side or array.dtype == self.compute:
            return self.laid_out(name, array, fill=False)
        shape = array.shape if self.moved is None else array.transpose(self.moved).shape
        if self.explained:
            return stand_in(shape, self.compute)
        return np.empty(shape, self.compute)

    def write_back(self, made: np.ndarray, out: np.ndarray) -> None:
        if made is not out:
            with np.errstate(all="ignore"):
                super().write_back(stored(made, out.dtype.newbyteorder("=")), out)

    def gains(self, g: Any) -> np.ndarray:
        """g in float64, one number for each vector."""
        array = checks.as_real("g", g)
        if array is None:
            raise TypeError("g: got None, wanted an array")
        try:
            spread = np.broadcast_to(interop.widened(array), self.kept)
        except ValueError:
            raise ValueError(
                f"g: got shape {array.shape}, wanted one that broadcasts to {self.kept}"
            ) from None
        return spread.astype(np.float64).ravel()

    def result_type(self, dtype: Any) -> np.dtype:
        if dtype is None:
            return self.dtype
        kind = checks.as_result_type(dtype)
        if kind == checks.INT8:
            raise TypeError(f"dtype: got {dtype!r}, wanted float16, bfloat16, float32 or float64")
        return kind

    def checked_output(self, out: Any, kind: np.dtype, inputs: dict[str, Any]) -> np.ndarray:
        place: np.ndarray = as_output(out, kind)
        checks.check_out("out", place, self.source.shape, kind)
        checks.check_apart("out", place, {self.name: self.source, **inputs}, (self.name,))
        return place

    def as_stats(self, numbers: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        with np.errstate(all="ignore"):
            return numbers.astype(self.compute).reshape(shape)


# ---- calls ---------------------------------------------------------------------------------------


class ForwardCall(VectorCall):
    """w, and the norms where they are wanted, of shape `stats_shape`. g None: unit norm."""

    def __init__(
        self, name: str, value: Any, axes_of: Callable[[int], tuple[int, ...]], eps: float, *,
        out: Any, dtype: Any, return_stats: Any, explained: bool, has_g: bool, g: Any = None,
    ) -> None:  # fmt: skip
        if interop.asks_for_bits(value, dtype):
            value, g, dtype = interop.as_bits(value), interop.as_bits(g), None
        super().__init__(name, value, axes_of, explained)
        self.eps = eps
        self.kind = self.result_type(dtype)
        self.g = self.gains(g) if has_g else None
        self.return_stats = bool(return_stats)
        self.stats_shape = self.kept if has_g and self.lead else self.lead
        self.w, self.warm = out, True
        if out is None:
            self.w, self.warm = self.new_result(self.kind)
            self.target = self.w
        else:
            self.target = self.checked_output(out, self.kind, {"g": g} if has_g else {})
        self.v = self.loaded(name, self.source)
        self.made = self.room_for("out", self.target)

    def kernel(self, norm: np.ndarray, refused: np.ndarray, plan: bool = False) -> Any:
        return _core.weight_norm(
            self.layout, self.compute, self.v, self.made, self.g, self.eps, norm, refused,
            warm=self.warm and self.made is self.target, plan=plan,
        )  # fmt: skip

    def plan(self) -> dict[str, Any]:
        return dict(self.kernel(np.empty(1), np.empty(1, np.uint8), plan=True))

    def run(self) -> Any:
        norm = np.zeros(self.count)
        if self.source.size:
            refused = np.empty(self.count, np.uint8)
            self.kernel(norm, refused)
            if refused.any():
                put_right(self.layout, self.v, self.made, self.g, self.eps, norm, refused, None,
                          None)  # fmt: skip
            self.write_back(self.made, self.target)
        return (self.w, self.as_stats(norm, self.stats_shape)) if self.return_stats else self.w


class BackwardCall(VectorCall):
    """dv and dg."""

    def __init__(
        self, names: tuple[str, str], grad: Any, value: Any,
        axes_of: Callable[[int], tuple[int, ...]], eps: float, norm: Any, *,
        output_mask: Any = (True, False), explained: bool, has_g: bool, g: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(names[1], value, axes_of, explained)
        grad = self.like_x(names[0], grad)
        self.eps = eps
        self.g = self.gains(g) if has_g else None
        self.g_shape = np.shape(g)
        self.norm = None
        if norm is not None:
            given = checks.as_statistic("norm", norm, self.lead, self.kept, checks.FLOAT64)
            self.norm = given.ravel()
        self.wanted = checks.as_mask(output_mask, "dv, dg")
        self.dv: np.ndarray | None = None
        self.made: np.ndarray | None = None
        self.warm = False
        self.v, self.dw = self.loaded(names[1], self.source), self.loaded(names[0], grad)
        if self.wanted[0]:
            self.dv, self.warm = self.new_result(self.dtype)
            self.made = self.room_for("dv", self.dv)

    def kernel(
        self, norm: np.ndarray, refused: np.ndarray, along: np.ndarray, plan: bool = False
    ) -> Any:
        return _core.weight_norm(
            self.layout, self.compute, self.v, self.made, self.g, self.eps, norm, refused, self.dw,
            along, given=self.norm is not None, warm=self.warm and self.made is self.dv, plan=plan,
        )  # fmt: skip

    def plan(self) -> dict[str, Any]:
        return dict(self.kernel(np.empty(1), np.empty(1, np.uint8), np.empty(1), plan=True))

    def run(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        along = np.zeros(self.count)
        if self.source.size:
            norm = np.empty(self.count) if self.norm is None else self.norm.copy()
            refused = np.empty(self.count, np.uint8)
            self.kernel(norm, refused, along)
            if refused.any():
                put_right(self.layout, self.v, self.made, self.g, self.eps, norm, refused, self.dw,
                          along)  # fmt: skip
            if self.made is not None and self.dv is not None:
                self.write_back(self.made, self.dv)
        return self.dv, self.dg(along) if self.wanted[1] else None

    def dg(self, along: np.ndarray) -> np.ndarray:
        """Summed over the axes along which g was broadcast."""
        along = along.reshape(self.kept)
        padded = (1,) * (along.ndim - len(self.g_shape)) + self.g_shape
        summed = tuple([d for d, n in enumerate(padded) if n == 1])
        with np.errstate(all="ignore"):
            return self.as_stats(along.sum(summed, keepdims=True), self.g_shape)


class UnitBackwardCall(BackwardCall):
    """dx alone."""

    def run(self) -> Any:
        return super().run()[0]
