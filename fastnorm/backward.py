"""Backward calls: dx, dweight and dbias of any norm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import _core, checks, interop
from .call import Call


class NormBackwardCall(Call):
    """One backward call of a norm: dx, dweight, dbias (rms: without the last)."""

    def __init__(
        self,
        dy: Any,
        x: Any,
        normalized_shape: Any,
        axis: Any,
        mean: Any,
        rstd: Any,
        weight: Any,
        bias: Any,
        output_mask: Any,
        *,
        rms: bool = False,
        offset: Any = 0.0,
        from_output: Any = False,
        lengths: Any = None,
        mask: Any = None,
        names: tuple[str, str] = ("x", "weight"),
        per_sample: bool = False,
        explained: bool = False,
    ) -> None:
        super().__init__(x, normalized_shape, axis, explained, name=names[0], per_sample=per_sample)
        grad = self.like_x("dy", dy)
        w, b = self.parameter(names[1], weight), self.parameter("bias", bias)
        self.options = {
            "rms": rms, "offset": checks.as_offset(offset), "from_output": bool(from_output),
            **self.valid(lengths, mask),
        }  # fmt: skip
        if self.dtype == self.compute:  # half types have steps in any case
            w = self.with_offset(w)
        no_mean = rms or from_output
        m = None if no_mean else self.statistic("mean", mean)
        r = self.statistic("rstd", rstd)
        wanted = checks.as_mask(output_mask, "dx, dweight" if rms else "dx, dweight, dbias")
        want_dx, want_dweight, want_dbias = (*wanted, False)[:3]
        dx, self.warm = self.new_result(self.dtype) if want_dx else (None, False)
        shapes = [p.shape if p is not None else None for p in (w, b)]
        self.dweight = self.gradient(want_dweight, shapes[0] or shapes[1])
        self.dbias = self.gradient(want_dbias, shapes[1] or shapes[0])
        self.own = self._own_rows()
        if self.own:
            w, b = self.spread(w), self.spread(b)
        self.more: np.ndarray | None = None
        self.stats: list[Any] = [m, r]
        self.arrays: list[Any] = [
            self.rows("dy", grad),
            self.rows(self.name, self.source),
            None if dx is None else self.rows("dx", dx, is_output=True),
            w,
            b,
        ]
        self.result = (dx, self.dweight, self.dbias)[: 2 if rms else 3]

    def add_to_dx(self, name: str, more: Any) -> None:
        """A gradient that reaches x by another way, added after the norm's is rounded."""
        self.more = self.rows(name, self.like_x(name, more))

    def statistic(self, name: str, value: Any) -> np.ndarray:
        shape = self.source.shape
        kept = tuple([1 if d in self.axes else length for d, length in enumerate(shape)])
        return checks.as_statistic(name, value, self.lead, kept, self.compute)

    def gradient(self, wanted: bool, shape: tuple[int, ...] | None) -> np.ndarray | None:
        return np.zeros(shape or self.normalized, self.compute) if wanted else None

    def kernel(self, plan: bool = False) -> Any:
        """The kernel, once for the rows of each pair of parameters."""
        with np.errstate(all="ignore"):
            for index in _each(self.own) if self.own else [()]:
                said = self._part(index, plan)
                if plan:
                    return said | {"parts": math.prod(self.own)}
            dx = self.arrays[2]
            if self.more is not None and dx is not None:
                self._add(dx, interop.widened(self.more))
        return None

    def _add(self, dx: np.ndarray, more: np.ndarray) -> None:
        if dx.dtype == interop.BITS:
            total = np.add(interop.widened(dx), more, dtype=np.float32, casting="same_kind")
            dx[...] = interop.to_bits(total)
        else:
            np.add(dx, more, out=dx, dtype=self.compute, casting="same_kind")

    def _part(self, index: tuple[Any, ...], plan: bool) -> Any:
        """The kernel on the rows at `index`."""
        own: dict[str, Any] = {
            name: np.ascontiguousarray(self.options[name][index])
            for name in ("lengths", "mask") if index and name in self.options
        }  # fmt: skip
        arrays, stats = self.arrays, self.stats
        if index:
            arrays = [None if a is None else a[index] for a in arrays]
            stats = [None if s is None else np.ascontiguousarray(s[index]) for s in stats]
        places = [self._sums_of(total, index) for total in (self.dweight, self.dbias)]
        sums = places
        if index:
            sums = [None if place is None else np.zeros_like(place) for place in places]
        said: Any = _core.norm_backward_rows(
            arrays[1].ndim - len(self.normalized), self.compute, *arrays, *stats, *sums,
            warm=self.warm, plan=plan, **(self.options | own),
        )  # fmt: skip
        for place, part in zip(places, sums, strict=True):
            if index and place is not None and not plan:
                place += part  # which several parts share where the other parameter has more axes
        return said

    def _own_rows(self) -> tuple[int, ...]:
        """Along which leading axes dweight or dbias differ, by length; (): along none."""
        own = [1] * len(self.lead)
        for total in (self.dweight, self.dbias):
            if total is not None:
                before = total.shape[: total.ndim - len(self.normalized)]
                for d, length in enumerate(before, len(self.lead) - len(before)):
                    own[d] = max(own[d], length)
        return tuple(own) if max(own, default=1) > 1 else ()

    def _sums_of(self, total: np.ndarray | None, index: tuple[Any, ...]) -> np.ndarray | None:
        """The place in dweight or dbias for the rows at `index`."""
        if total is None or not index:
            return total
        before = total.ndim - len(self.normalized)
        steps = index[len(self.lead) - before :]
        return total[tuple(
            i if total.shape[d] > 1 and not isinstance(i, slice) else 0
            for d, i in enumerate(steps)
        )]  # fmt: skip


def _each(own: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """Indices of leading axes: one number where a parameter has several, else all."""
    for numbers in np.ndindex(*own):
        yield tuple(
            slice(None) if length == 1 else i for i, length in zip(numbers, own, strict=True)
        )
