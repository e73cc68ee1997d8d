"""Calls on packed rows, which differ in length: forward and backward."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from . import _core, checks, interop
from .call import Call, as_output, eps_of, stand_in, why_copied


class SegmentsCall(Call):
    """What calls on packed rows share: x of shape (total, *features), one row a segment."""

    def __init__(self, x: Any, offsets: Any, explained: bool) -> None:
        ndim = checks.as_array("x", x).ndim
        super().__init__(x, None, tuple(range(ndim)), explained)
        self.features = self.source.shape[1:]
        self.offsets = checks.as_offsets(offsets, self.source.shape[0])
        self.lead = (self.offsets.size - 1,)
        self.starts = self.offsets * math.prod(self.features)
        self.longest = int(np.diff(self.starts).max(initial=0))

    def packed(self, name: str, array: np.ndarray) -> np.ndarray:
        """The array as one run of memory."""
        if not self.is_copied(name, array):
            return array
        dtype = array.dtype.newbyteorder("=")
        if self.explained:
            return stand_in(array.shape, dtype)
        return np.require(array, dtype, ("C", "A"))

    def is_copied(self, name: str, array: np.ndarray) -> bool:
        """Whether this is more than one run of elements that the kernels can load; notes why."""
        why = why_copied(array)
        if not why and not array.flags.c_contiguous:
            why = "it is not contiguous"
        if why:
            self.copies.append(f"{name} is copied: {why}")
        return bool(why)

    def feature_parameter(self, name: str, value: Any) -> np.ndarray | None:
        array = checks.as_parameter(name, value, self.features, self.compute)
        return None if array is None else array.reshape(-1)

    def statistic(self, name: str, value: Any) -> np.ndarray:
        return checks.as_statistic(name, value, self.lead, self.lead, self.compute)


class SegmentNormCall(SegmentsCall):
    """One forward call on packed rows."""

    def __init__(
        self, x: Any, offsets: Any, weight: Any, bias: Any, eps: Any, out: Any, dtype: Any,
        return_stats: Any, activation: Any, *, rms: bool = False, offset: Any = 0.0,
        explained: bool = False,
    ) -> None:  # fmt: skip
        given = out
        if interop.asks_for_bits(x, dtype):
            x, dtype = interop.as_bits(x), None
            weight, bias = interop.as_bits(weight), interop.as_bits(bias)
        super().__init__(x, offsets, explained)
        w, b = self.feature_parameter("weight", weight), self.feature_parameter("bias", bias)
        y_type = self.dtype if dtype is None else checks.as_result_type(dtype)
        padding = eps_of(eps, rms, self.compute)
        if out is not None:
            out = as_output(out, y_type)
            checks.check_out("out", out, self.source.shape, y_type)
            inputs = {"x": x, "weight": weight, "bias": bias, "offsets": offsets}
            checks.check_apart("out", out, inputs)
        packed_x = self.packed("x", self.source)
        direct = out is not None and not self.is_copied("out", out)
        made: tuple[np.ndarray, bool] = (out, True) if direct else self.new_result(y_type)
        self.y, warm = made
        self.out = self.y if out is None else out
        scale = self.scales(y_type)
        mean, rstd = self.statistics() if return_stats else (None, None)
        self.kernel = partial(
            _core.norm_segments, self.compute, packed_x, self.starts,
            self.longest, w, b, self.y, scale, padding, rms=rms,
            offset=checks.as_offset(offset), activation=checks.as_activation(activation),
            mean=None if rms else mean, rstd=rstd, warm=warm,
        )  # fmt: skip
        parts = [self.out if given is None else given, scale, None if rms else mean, rstd]
        kept = [part for part in parts if part is not None]
        self.result = kept[0] if len(kept) == 1 else tuple(kept)

    def run(self) -> Any:
        super().run()
        if self.out is not self.y:
            np.copyto(self.out, self.y)
        return self.result


class SegmentNormBackwardCall(SegmentsCall):
    """One backward call on packed rows."""

    def __init__(
        self, dy: Any, x: Any, offsets: Any, mean: Any, rstd: Any, weight: Any, bias: Any,
        output_mask: Any, *, rms: bool = False, offset: Any = 0.0, explained: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(x, offsets, explained)
        grad = self.like_x("dy", dy)
        w = self.feature_parameter("weight", weight)
        self.feature_parameter("bias", bias)
        m = None if rms else self.statistic("mean", mean)
        r = self.statistic("rstd", rstd)
        wanted = checks.as_mask(output_mask, "dx, dweight" if rms else "dx, dweight, dbias")
        want_dx, want_dweight, want_dbias = (*wanted, False)[:3]
        dx = self.new_result(self.dtype)[0] if want_dx else None
        dweight, dbias = (
            np.zeros(self.features, self.compute) if want else None
            for want in (want_dweight, want_dbias)
        )
        self.kernel = partial(
            _core.norm_segments_backward, self.compute, self.packed("dy", grad),
            self.packed("x", self.source), dx, self.starts, self.longest,
            w, m, r, dweight, dbias, math.prod(self.features), rms=rms,
            offset=checks.as_offset(offset),
        )  # fmt: skip
        self.result = (dx, dweight, dbias)[: 2 if rms else 3]
