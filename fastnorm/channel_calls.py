"""Calls of batch, group and instance norm: what those forward and backward share.

An array is seen as (N, C, S), planes of S contiguous elements that the kernels of channels.c take
where they lie (channels first), or, where the channels are the last axis, as rows of channels
(N, M, C). What lies otherwise is copied. A *unit* is what has statistics of its own: a channel of
all samples, a group of a sample's channels, a plane.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.exceptions import AxisError

from . import _core, checks, interop
from .call import LaidReader
from .channel_repairs import Layout, store
from .dialects import Dialect

#: Statistics that are given, once the number of channels is known.
Given: TypeAlias = Callable[[int], tuple[np.ndarray, np.ndarray]]

# ---- checks --------------------------------------------------------------------------------------


def as_channel_axis(value: Any, ndim: int) -> int:
    """The axis of the channels, not negative."""
    try:
        axis = operator.index(value)
    except TypeError:
        raise TypeError(f"channel_axis: got {value!r}, wanted an int") from None
    if not -ndim <= axis < ndim:
        raise AxisError(axis, ndim, "channel_axis")
    if axis % ndim == 0:
        raise ValueError(f"channel_axis: got {value!r}, the axis of the samples, wanted another")
    return axis % ndim


def as_groups(value: Any, channels: int) -> int:
    groups = checks.as_count("num_groups", value, 1, "an int")
    if channels % groups:
        raise ValueError(
            f"num_groups: got {groups} for {channels} channels, wanted a divisor of their number"
        )
    return groups


def as_running(name: str, value: Any, channels: int, written: bool) -> np.ndarray | None:
    """Running statistics: an array of the channels, which is written to in training."""
    if value is None:
        return None
    if not isinstance(value, np.ndarray) or checks.is_masked(value):
        if written:
            raise TypeError(f"{name}: got {type(value).__name__}, wanted an ndarray to update")
        value = checks.as_array(name, value)
    if not checks.is_storage(value.dtype):
        if written:
            raise TypeError(f"{name}: got dtype {value.dtype}, wanted a floating type")
        value = checks.as_floating(name, value)
    if value.shape != (channels,):
        raise ValueError(f"{name}: got shape {value.shape}, wanted {(channels,)}")
    if written and not value.flags.writeable:
        raise ValueError(f"{name}: got a read-only array, wanted a writeable one: it is updated")
    return value


class Running(NamedTuple):
    """Running statistics, and how they take up new ones."""

    mean: np.ndarray | None
    var: np.ndarray | None
    momentum: float
    dialect: Dialect

    def check_apart(self, others: dict[str, Any]) -> None:
        """What is updated shares no memory with anything else that is written."""
        for name, array in (("running_mean", self.mean), ("running_var", self.var)):
            if array is not None:
                checks.check_apart(name, array, others, ())
        if self.mean is not None and self.var is not None:
            checks.check_apart("running_var", self.var, {"running_mean": self.mean}, ())

    def update(self, mean: np.ndarray, variance: np.ndarray, count: int) -> None:
        """From the mean and the biased variance of `count` elements a channel."""
        kept, taken = self.dialect.shares(self.momentum)
        variance = variance * self.dialect.variance_factor(count)
        for running, batch in ((self.mean, mean), (self.var, variance)):
            if running is None:
                continue
            if not interop.is_bits(running.dtype):
                _core.update_running(running, np.ascontiguousarray(batch), kept, taken)
                continue
            with np.errstate(all="ignore"):
                old = interop.widened(running).astype(np.float64)
                store(running, kept * old + taken * batch)


def rstd_of(variance: np.ndarray, eps: float) -> np.ndarray:
    """1/sqrt(variance + eps) in double precision."""
    with np.errstate(all="ignore"):
        return np.asarray(1.0 / np.sqrt(interop.widened(variance).astype(np.float64) + eps))


# ---- a call --------------------------------------------------------------------------------------


class ChannelCall(LaidReader):
    """What the calls share: x as the kernels see it, its channels first where axes lie around them.
    `over_samples`: batch norm, whose units take in all axes but the channels'."""

    groups: int
    moved_why = "axes lie before and after its channels"

    def __init__(
        self, x: Any, channel_axis: Any, over_samples: bool, explained: bool, name: str = "x"
    ) -> None:
        self.explained = explained
        self.copies = []
        self.name = name
        self.source = self.floating(name, x)
        shape = self.source.shape
        if self.source.ndim < 2:
            raise ValueError(
                f"{name}: got {self.source.ndim} dimensions, wanted samples and channels"
            )
        self.axis = as_channel_axis(channel_axis, self.source.ndim)
        self.samples, self.channels = shape[0], shape[self.axis]
        before, after = math.prod(shape[1 : self.axis]), math.prod(shape[self.axis + 1 :])
        if over_samples:
            self.samples, before = self.samples * before, 1
        self.size = before * after
        self.is_last = after == 1
        if before > 1 and after > 1:
            others = [d for d in range(1, len(shape)) if d != self.axis]
            self.moved = (0, self.axis, *others)
        self.over_samples = over_samples
        self.dtype = self.source.dtype.newbyteorder("=")
        self.compute = checks.compute_type(self.dtype)

    def parameter(self, name: str, value: Any, per_sample: bool = False) -> np.ndarray | None:
        """weight or bias: (C,), or where allowed (N, C)."""
        array = checks.as_real(name, value)
        if array is None:
            return None
        wanted = (self.channels,)
        if array.shape == wanted or (per_sample and array.shape == (self.samples, *wanted)):
            return checks.as_plain(array, self.compute)
        also = f" or {(self.samples, *wanted)}" if per_sample else ""
        raise ValueError(f"{name}: got shape {array.shape}, wanted {wanted}{also}")

    # ---- where units lie -------------------------------------------------------------------------

    def layout(
        self, groups: int, per_sample: bool, given: bool, one_sample: bool = False
    ) -> Layout:
        """given: statistics are each channel's, so planes may go in the order they lie in.
        one_sample: no sample has numbers of its own, so rows of channels may go as one sample's."""
        channels, size, samples = self.channels, self.size, self.samples
        if (self.over_samples or one_sample) and self.is_last:
            samples, size = 1, samples * size
        elif self.over_samples and not given:
            return Layout(channels, size, samples, channels * size, 1, size, channels, 1)
        units, planes = samples * groups, channels // max(groups, 1)
        kinds = units if per_sample else groups
        # A unit of planes of one element is a row.
        step = channels if self.is_last and (size > 1 or planes == 1) else 1
        return Layout(units, planes * size, 1, 0, planes, size, kinds, step)
