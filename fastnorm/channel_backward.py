"""Backward calls of batch, group and instance norm."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _core, checks
from .channel_calls import ChannelCall, Given, as_groups
from .channel_repairs import Layout, gradients, store


class BackwardCall(ChannelCall):
    """dx, dweight and dbias."""

    def __init__(
        self, dy: Any, x: Any, channel_axis: Any, groups: Any, mean: Any, rstd: Any, weight: Any,
        bias: Any, output_mask: Any, *, over_samples: bool = False, given: Given | None = None,
        parameters_per_sample: bool = False, explained: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(x, channel_axis, over_samples, explained)
        self.groups = self.channels if groups is None else as_groups(groups, self.channels)
        dy = self.like_x("dy", dy)
        self.weight = self.parameter("weight", weight, parameters_per_sample)
        bias = self.parameter("bias", bias, parameters_per_sample)
        # What is not given has the other's shape.
        first, second = (bias if self.weight is None else self.weight), bias
        second = first if second is None else second
        self.weight_sums_per_sample = first is not None and first.ndim == 2
        self.bias_sums_per_sample = second is not None and second.ndim == 2
        self.per_sample = self.weight is not None and self.weight.ndim == 2
        self.wanted = checks.as_mask(output_mask)
        self.given = given is not None
        if given is not None:
            self.mean, self.rstd = given(self.channels)
        else:
            shape = (self.channels,) if over_samples else (self.samples, self.groups)
            self.mean, self.rstd = (
                self.statistic(name, value, shape)
                for name, value in (("mean", mean), ("rstd", rstd))
            )
        self.dx: np.ndarray | None = None
        self.warm = False
        if self.wanted[0]:
            self.dx, self.warm = self.new_result(self.dtype)
        self.x, self.dy = self.laid_out("x", self.source), self.laid_out("dy", dy)
        self.made = self.dx
        if self.dx is not None and self.moved is not None:
            self.made = self.laid_out("dx", self.dx, fill=False)

    def statistic(self, name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
        if value is None:
            raise TypeError(f"{name}: got None, wanted what return_stats=True returned")
        array = checks.as_floating(name, value)
        if array.shape != shape:
            raise ValueError(f"{name}: got shape {array.shape}, wanted {shape}")
        return checks.as_plain(array, checks.FLOAT64)

    def plan(self) -> dict[str, Any]:
        return self.planes(np.empty(1), np.empty(1, np.uint8), plan=True)

    def planes(self, sums: np.ndarray, refused: np.ndarray, **options: Any) -> Any:
        return _core.channel_norm_backward(
            self.layout(self.groups, self.per_sample, self.given), self.compute, self.dy, self.x,
            self.made, self.weight, self.mean.reshape(-1), self.rstd.reshape(-1), sums, refused,
            self.given, self.warm and self.made is self.dx, **options,
        )  # fmt: skip

    def run(self) -> Any:
        if self.source.size == 0:
            lots = 1 if self.over_samples else self.samples
            return self.gather(np.zeros((lots, self.channels, 2)))
        sums = self.run_units()
        if self.dx is not None and self.made is not None:
            self.write_back(self.made, self.dx)
        return self.gather(sums)

    def run_units(self) -> np.ndarray:
        """Sums of dy*xh and dy: (lots, C, 2)."""
        layout = self.layout(self.groups, self.per_sample, self.given)
        planes = layout.planes
        sums, refused = np.empty((layout.units, planes, 2)), np.empty(layout.units, np.uint8)
        self.planes(sums, refused)
        for u in np.flatnonzero(refused):
            self.put_right(layout, int(u), sums[u])
        return sums.reshape(-1, self.channels, 2)

    def put_right(self, layout: Layout, u: int, sums: np.ndarray) -> None:
        """A unit that the kernel refused."""
        planes = layout.planes
        kind = u % layout.kinds
        own = kind if self.given else u
        w: Any = 1.0
        if self.weight is not None:
            part = self.weight.reshape(-1)[kind * planes : (kind + 1) * planes]
            w = part.astype(np.float64)[:, None]
        mean, rstd = float(self.mean.reshape(-1)[own]), float(self.rstd.reshape(-1)[own])
        done = gradients(layout.unit(self.dy, u), layout.unit(self.x, u), w, mean, rstd, self.given,
                         (0, 2))  # fmt: skip
        sums[:, 0], sums[:, 1] = done.dweight, done.dbias
        if self.made is not None:
            store(layout.unit(self.made, u), done.dx)

    # ---- results ---------------------------------------------------------------------------------

    def gather(self, sums: np.ndarray) -> tuple[Any, Any, Any]:
        """Each parameter's gradient has its shape."""
        dweight, dbias = _core.total_over_samples(sums, self.compute)
        with np.errstate(all="ignore"):
            if self.weight_sums_per_sample:
                dweight = np.ascontiguousarray(sums[..., 0].astype(self.compute))
            if self.bias_sums_per_sample:
                dbias = np.ascontiguousarray(sums[..., 1].astype(self.compute))
        return self.dx, dweight if self.wanted[1] else None, dbias if self.wanted[2] else None
