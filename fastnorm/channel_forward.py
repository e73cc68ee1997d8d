"""Forward calls of batch, group and instance norm, and AdaIN."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from . import _core, checks, interop
from .batch_statistics import moments_down
from .call import as_output
from .channel_calls import ChannelCall, Given, Running, as_groups
from .channel_repairs import activated, is_lost, put_right, store

#: Given means up to these are nothing next to an x that might leave the range with them.
FARTHEST_MEAN = {checks.FLOAT32: 2.0**100, checks.FLOAT64: 2.0**960}


class ForwardCall(ChannelCall):
    """y, and with it what statistics were asked for."""

    def __init__(
        self, x: Any, channel_axis: Any, groups: Any, weight: Any, bias: Any, eps: Any, *,
        over_samples: bool = False, dtype: Any = None, out: Any = None, activation: Any = None,
        return_stats: Any = False, given: Given | None = None,
        running: Callable[[int], Running] | None = None, parameters_per_sample: bool = False,
        read: dict[str, Any] | None = None, explained: bool = False,
    ) -> None:  # fmt: skip
        """`given`, `running`: made once the number of channels is known. `read`: what else is, by
        name, and `out` must not overlap."""
        if interop.asks_for_bits(x, dtype):
            x, dtype = interop.as_bits(x), None
            weight, bias = interop.as_bits(weight), interop.as_bits(bias)
        super().__init__(x, channel_axis, over_samples, explained)
        self.groups = self.channels if groups is None else as_groups(groups, self.channels)
        self.eps = checks.as_eps(eps)
        self.activation = activation
        self.activation_number = checks.as_activation(activation)
        self.weight = self.parameter("weight", weight, parameters_per_sample)
        self.bias = self.parameter("bias", bias, parameters_per_sample)
        self.match_parameters()
        self.y_type = self.dtype if dtype is None else checks.as_result_type(dtype)
        if self.y_type == checks.INT8:
            raise TypeError("dtype: got int8, wanted float16, bfloat16, float32 or float64")
        self.given = given(self.channels) if given else None
        self.running: Running | None = running(self.channels) if running else None
        self.return_stats = bool(return_stats)
        self.warm = True
        self.y = out
        if out is None:
            self.y, self.warm = self.new_result(self.y_type)
        y = as_output(self.y, self.y_type)
        if out is not None:
            checks.check_out("out", y, self.source.shape, self.y_type)
            checks.check_apart("out", y, {"x": x, "weight": weight, "bias": bias})
            checks.check_apart("out", y, read or {}, ())
        if self.running:
            self.running.check_apart({"out": out})
        self.target = y
        self.x = self.laid_out("x", self.source)
        self.made = self.laid_out("out", y, fill=False)

    def match_parameters(self) -> None:
        """A pair a sample for both, or for neither."""
        if self.weight is None or self.bias is None or self.weight.ndim == self.bias.ndim:
            return
        shape = (self.samples, self.channels)
        self.weight, self.bias = (
            np.ascontiguousarray(np.broadcast_to(p, shape)) for p in (self.weight, self.bias)
        )

    @property
    def per_sample(self) -> bool:
        first = self.bias if self.weight is None else self.weight
        return first is not None and first.ndim == 2

    def plan(self) -> dict[str, Any]:
        found = np.empty((3, 1))
        return self.planes(found, np.empty(1, np.uint8), plan=True)

    def planes(self, found: np.ndarray, refused: Any, **options: Any) -> Any:
        mean, variance, rstd = found
        given = self.given is not None
        if self.given:
            (mean, rstd), refused = self.given, None
            if self.per_sample:
                mean, rstd = (np.tile(a, self.samples) for a in self.given)
        layout = self.layout(self.groups, self.per_sample, given, given and not self.per_sample)
        return _core.channel_norm(
            layout, self.compute, self.x, self.made, self.weight, self.bias, mean, variance, rstd,
            refused, self.eps, self.activation_number, self.warm and self.made is self.target,
            **options,
        )  # fmt: skip

    def run(self) -> Any:
        if self.source.size == 0:
            return self.gather(self.empty_statistics() if self.return_stats else None)
        far = self.by_far_statistics()
        found = self.run_units()
        for channel, values in far:
            store(self.of_channel(self.made, channel), values)
        self.write_back(self.made, self.target)
        if self.running and found is not None:
            self.update_running(found)
        return self.gather(found)

    def of_channel(self, array: np.ndarray, channel: int) -> np.ndarray:
        """A channel of x or y as the kernels see them, (N, S): a view."""
        if self.is_last:
            return array.reshape(self.samples, self.size, self.channels)[..., channel]
        return array.reshape(self.samples, self.channels, self.size)[:, channel]

    def by_far_statistics(self) -> list[tuple[int, np.ndarray]]:
        """Channels whose given statistics would leave the range of what is computed in, with their
        results, in double precision; before anything is written: y may be x."""
        if not self.given:
            return []
        mean, rstd = self.given
        w, b = self.spread_parameters(self.samples if self.per_sample else 1)
        with np.errstate(all="ignore"):
            factors = np.abs(rstd * w)
            near = (np.abs(mean) <= FARTHEST_MEAN[self.compute]) & np.isfinite(rstd)
            near &= ((factors <= np.finfo(self.compute).max) | ~np.isfinite(w)).all(0)
            near &= ~is_lost(factors, w, self.compute).any(0)
            found = []
            for c in map(int, np.flatnonzero(~near & ~np.isnan(rstd))):
                x = interop.widened(self.of_channel(self.x, c)).astype(np.float64)
                y = (x * 0.5 - mean[c] * 0.5) * rstd[c] * 2 * w[:, c, None] + b[:, c, None]
                found.append((c, activated(y, self.activation)))
        return found

    def spread_parameters(self, lots: int) -> tuple[np.ndarray, np.ndarray]:
        """Weight and bias as doubles, (lots, C)."""
        shape = (lots, self.channels)
        w, b = (
            np.full(shape, otherwise) if p is None else np.broadcast_to(p.astype(np.float64), shape)
            for p, otherwise in ((self.weight, 1.0), (self.bias, 0.0))
        )
        return w, b

    def run_units(self) -> np.ndarray | None:
        if self.given:
            self.planes(np.empty((3, 0)), None)
            return None
        layout = self.layout(self.groups, self.per_sample, False)
        found, refused = np.empty((3, layout.units)), np.empty(layout.units, np.uint8)
        self.planes(found, refused)
        if refused.any():
            put_right(layout, self.x, self.made, self.weight, self.bias, found, refused, self.eps,
                      self.activation)  # fmt: skip
        return found

    # ---- results ---------------------------------------------------------------------------------

    def empty_statistics(self) -> np.ndarray:
        """Of units without elements: mean 0, the rest NaN."""
        lots = 1 if self.over_samples else self.samples
        found = np.full((3, lots * self.groups), np.nan)
        found[0] = 0
        return found

    def update_running(self, found: np.ndarray) -> None:
        assert self.running is not None
        mean, variance = found[:2]
        count = self.size * (self.samples if self.over_samples else 1)
        if not self.over_samples:
            mean, variance = (a.reshape(self.samples, -1).mean(0) for a in (mean, variance))
        self.running.update(mean, variance, count)

    def gather(self, found: np.ndarray | None) -> Any:
        if not self.return_stats:
            return self.y
        if self.given is not None:
            return self.y, *self.given
        assert found is not None
        mean, _, rstd = found
        if self.over_samples:
            return self.y, mean.copy(), rstd.copy()
        shape = (self.samples, self.groups)
        with np.errstate(all="ignore"):
            return self.y, *(a.reshape(shape).astype(self.compute) for a in (mean, rstd))


class AdaptiveCall(ForwardCall):
    """AdaIN: an instance norm whose parameters are the statistics of another array."""

    def __init__(
        self, x: Any, style: Any, eps: Any, ddof: Any, channel_axis: Any, out: Any, dtype: Any,
        explained: bool,
    ) -> None:  # fmt: skip
        if interop.asks_for_bits(x, dtype):
            x, style, dtype = interop.as_bits(x), interop.as_bits(style), None
        padding = checks.as_eps(eps)
        degrees = checks.as_count("ddof", ddof, 0, "an int")
        super().__init__(x, channel_axis, None, None, None, padding, dtype=dtype, out=out,
                         explained=explained)  # fmt: skip
        other = ChannelCall(style, channel_axis, False, explained, "style")
        if (other.samples, other.channels) != (self.samples, self.channels):
            raise ValueError(
                f"style: got {other.samples} samples of {other.channels} channels, wanted "
                f"{self.samples} of {self.channels}, as x has them"
            )
        if out is not None:
            checks.check_apart("out", self.target, {"style": style}, ())
        for name, size in (("x", self.size), ("style", other.size)):
            if 0 < size <= degrees and self.samples and self.channels:
                raise ValueError(f"ddof: got {degrees}, wanted less than {size}, {name}'s elements")
        if explained or not self.source.size:
            return
        # var / (n - ddof) * n + eps: the same as eps less that factor, and its root taken out.
        factor = math.sqrt((self.size - degrees) / self.size)
        self.eps = padding * factor * factor
        mean, std = moments_of(other, degrees, padding)
        with np.errstate(all="ignore"):
            self.weight = (std * factor).astype(self.compute)
            self.bias = mean.astype(self.compute)


def moments_of(call: ChannelCall, ddof: int, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and ``sqrt(var + eps)`` of each channel of each sample, (N, C), in double precision."""
    shape, n = (call.samples, call.channels), call.size
    if call.source.size == 0:
        return (np.full(shape, np.nan),) * 2
    x = call.laid_out(call.name, call.source)
    if call.is_last:
        pivot, shift, squares = moments_down(x.reshape(call.samples, n, call.channels))
    else:
        pivot, shift, squares = _core.plane_moments(x.reshape(-1, n))
    with np.errstate(all="ignore"):
        mean, variance = (pivot + shift).reshape(shape), squares.reshape(shape) / n
        return mean, np.sqrt(variance * (n / (n - ddof)) + eps)
