"""Batch, group and instance norm, and AdaIN: the public functions.

Shapes: x is (N, C, ...), N samples of C channels of S elements each (1 where there are no more
axes); `channel_axis` says where else the channels are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np

from . import _core, checks, interop
from .channel_backward import BackwardCall
from .channel_calls import (
    ChannelCall,
    Given,
    Running,
    as_running,
    rstd_of,
)
from .channel_forward import AdaptiveCall, ForwardCall
from .dialects import DIALECTS, as_dialect, as_momentum
from .dispatch import handler_of

Activation: TypeAlias = Literal["relu", "silu", "gelu", "gelu_tanh"] | None
Dialect: TypeAlias = Literal["torch", "keras", "flax", "onnx"]


def _is_last(x: Any, channel_axis: Any) -> bool | None:
    """Whether x's last axis is plainly the channels'; None where neither it nor the second is."""
    if type(channel_axis) is not int:
        return None
    if channel_axis == 1:
        return False
    is_last = type(x) is np.ndarray and x.ndim > 1 and channel_axis in (-1, x.ndim - 1)
    return True if is_last else None


def _are_plain(momentum: Any, dialect: Any) -> bool:
    """Whether there is nothing about these to convert or to complain of."""
    return (
        type(momentum) is float and math.isfinite(momentum)
        and type(dialect) is str and dialect in DIALECTS
    )  # fmt: skip


def batch_norm(
    x: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5, *, channel_axis: int = 1,
    dialect: Dialect = "torch", out: Any = None, dtype: Any = None, return_stats: bool = False,
    activation: Activation = None,
) -> Any:  # fmt: skip
    """Batch normalization: ``y = (x - mean) / sqrt(var + eps) * weight + bias``.

    In training, mean and (biased) variance are those of the channel in this batch, and the running
    statistics take them up; else they are the running ones.

    Parameters
    ----------
    x : array_like
        Of shape (N, C, ...), 2 axes or more, float16, bfloat16, float32 or float64 (integers and
        booleans become float64), of any layout. C-contiguous arrays are read in place (channels
        last: with ``channel_axis=-1``); others are copied, torch's channels_last memory format
        too. New results are C-contiguous.
    running_mean, running_var : array_like
        Of shape (C,). Without `training` they normalise, and both are needed; with it they are
        updated in place (ndarrays then, or None).
    weight, bias : array_like, optional
        Of shape (C,), of any real type.
    training : bool
        Whether the batch's own statistics normalise.
    momentum : float
        Any finite number; `dialect` says what it means.
    eps : float
        Added to the variance; not negative.
    channel_axis : int
        The axis of the channels: 1, or -1 for channels last, or any but the first.
    dialect : str
        How running statistics take up a batch's: "torch": ``(1 - momentum)*running +
        momentum*batch``, with the variance of n - 1; "keras", "flax", "onnx": ``momentum*running +
        (1 - momentum)*batch``, with the variance of n. It changes no default: 0.1 is then the share
        of the old.
    out : ndarray, optional
        Array for the result, of x's shape and the result's type. It may be x itself.
    dtype : dtype, optional
        Type of the result: float16, bfloat16, float32 or float64; default: x's.
    return_stats : bool
        Also return mean and ``rstd = 1 / sqrt(var + eps)``.
    activation : str, optional
        Applied to the result before it is rounded: "relu", "silu", "gelu" (by erf) or "gelu_tanh".

    Returns
    -------
    y : ndarray
        Of x's shape.
    mean, rstd : ndarray
        With `return_stats`: float64, of shape (C,); what ``batch_norm_backward`` takes.

    Raises
    ------
    TypeError, ValueError
        For types and shapes that do not fit, read-only running statistics in training, an `out`
        that overlaps an input, an eps that is negative or NaN, a momentum that is not finite, an
        unknown dialect (``numpy.exceptions.AxisError`` for a channel_axis out of range). Nothing is
        written then.

    Notes
    -----
    One element a channel is legal (y is the bias; torch raises), no elements change nothing. A
    channel that holds a NaN or an infinity becomes NaN. The statistics are right for any mean: the
    large common part of all elements is taken off before they are squared. In inference, too, x -
    mean is formed first: the usual fold to ``a*x + c`` loses digits. Channels-last arrays are
    summed in another order than channels-first ones, so the last bits may differ between the two.

    References
    ----------
    Ioffe, Szegedy: Batch Normalization, arXiv 1502.03167 (2015). Names follow
    ``torch.nn.functional.batch_norm``.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> x, mean, var = np.float32([[1, 5], [3, 5]]), np.zeros(2), np.ones(2)
    >>> fastnorm.batch_norm(x, mean, var, training=True, eps=0.0)
    array([[-1.,  0.],
           [ 1.,  0.]], dtype=float32)
    >>> mean, var
    (array([0.2, 0.5]), array([1.1, 0.9]))
    """
    last, done = _is_last(x, channel_axis), None
    if last is None or dtype is not None:
        pass
    elif training is True:
        rules = DIALECTS.get(dialect) if type(dialect) is str else None
        done = _core.straight_batch_training(
            x, running_mean, running_var, weight, bias, momentum, eps, out, activation, last,
            rules, return_stats,
        )  # fmt: skip
    elif training is False and return_stats is False and _are_plain(momentum, dialect):
        done = _core.straight_batch_inference(
            x, running_mean, running_var, weight, bias, eps, out, activation, last
        )
    if done is not None:
        return done
    return handlers["batch_norm"](
        x, running_mean, running_var, weight, bias, training, momentum, eps, channel_axis, dialect,
        out, dtype, return_stats, activation,
    )  # fmt: skip


def batch_norm_backward(
    dy: Any, x: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None,
    bias: Any = None, training: bool = False, eps: float = 1e-5, *, mean: Any = None,
    rstd: Any = None, channel_axis: int = 1, output_mask: Any = (True, True, True),
) -> Any:  # fmt: skip
    """Gradients of :func:`batch_norm`: dx, dweight and dbias.

    With ``xh = (x - mean) * rstd`` and n elements a channel, in training::

        dx = weight * rstd * (dy - sum(dy)/n - xh * sum(dy * xh)/n)
        dweight = sum(dy * xh)
        dbias = sum(dy)

    and in inference ``dx = weight * rstd * dy``, as the statistics do not depend on x.

    Parameters
    ----------
    dy, x : array_like
        Gradient of the output, and the input, of one shape.
    running_mean, running_var : array_like
        Of shape (C,): the forward call's, which are read without `training`.
    weight, training, eps, channel_axis
        The forward call's; eps is read without `training`.
    bias : array_like, optional
        Checked for its shape, otherwise unused.
    mean, rstd : array_like
        In training, what ``batch_norm(..., return_stats=True)`` returned for this x.
    output_mask : three bools
        Which of dx, dweight, dbias to compute; the others come back as None.

    Returns
    -------
    dx : ndarray or None
        Of x's shape and type.
    dweight, dbias : ndarray or None
        Of shape (C,), float32 (float64 for float64 input). Sums run in an order that depends on the
        shape alone.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm`; TypeError where the statistics that are needed are missing.

    References
    ----------
    Ioffe, Szegedy: Batch Normalization, arXiv 1502.03167 (2015).

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> x, dy = np.float32([[1, 5], [3, 6]]), np.float32([[1, 0], [0, 1]])
    >>> y, mean, rstd = fastnorm.batch_norm(x, None, None, training=True, return_stats=True)
    >>> fastnorm.batch_norm_backward(dy, x, training=True, mean=mean, rstd=rstd)[2]
    array([1., 1.], dtype=float32)
    """
    last, done = _is_last(x, channel_axis), None
    if last is None or type(eps) is not float:
        pass
    elif training is True:
        done = _core.straight_channel_backward(
            dy, x, 0, mean, rstd, weight, bias, output_mask, last, True
        )
    elif training is False and running_var is not None:
        done = _core.straight_channel_backward(
            dy, x, 0, running_mean, None, weight, bias, output_mask, last, True, running_var, eps
        )
    if done is not None:
        return done
    return handlers["batch_norm_backward"](
        dy, x, running_mean, running_var, weight, bias, training, eps, mean, rstd, channel_axis,
        output_mask,
    )  # fmt: skip


def group_norm(
    x: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *,
    channel_axis: int = 1, out: Any = None, dtype: Any = None, return_stats: bool = False,
    activation: Activation = None,
) -> Any:  # fmt: skip
    """Group normalization: ``y = (x - mean) / sqrt(var + eps) * weight + bias``.

    Mean and (population) variance are those of C / num_groups consecutive channels of one sample,
    in training and inference alike.

    Parameters
    ----------
    x, channel_axis, out, dtype, activation
        As for :func:`batch_norm`.
    num_groups : int
        A divisor of C: 1 takes all channels together, C each by itself (:func:`instance_norm`).
    weight, bias : array_like, optional
        Of shape (C,), of any real type.
    eps : float
        Added to the variance; not negative.
    return_stats : bool
        Also return mean and ``rstd = 1 / sqrt(var + eps)``.

    Returns
    -------
    y : ndarray
        Of x's shape.
    mean, rstd : ndarray
        With `return_stats`: of shape (N, num_groups), float32 (float64 for float64 input); what
        ``group_norm_backward`` takes.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm`; ValueError for a num_groups that does not divide C.

    Notes
    -----
    A sample's result depends on that sample alone, to the bit. A group that holds a NaN or an
    infinity becomes NaN.

    References
    ----------
    Wu, He: Group Normalization, arXiv 1803.08494 (2018). Names follow
    ``torch.nn.functional.group_norm``.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> fastnorm.group_norm(np.float32([[1, 3, 2, 2]]), 2, eps=0.0)
    array([[-1.,  1.,  0.,  0.]], dtype=float32)
    """
    last = _is_last(x, channel_axis)
    if last is not None and type(num_groups) is int and num_groups > 0 and dtype is None:
        done = _core.straight_channel_norm(
            x, num_groups, weight, bias, eps, out, activation, last, return_stats
        )
        if done is not None:
            return done
    return handlers["group_norm"](
        x, num_groups, weight, bias, eps, channel_axis, out, dtype, return_stats, activation
    )


def group_norm_backward(
    dy: Any, x: Any, num_groups: int, mean: Any, rstd: Any, weight: Any = None, bias: Any = None, *,
    channel_axis: int = 1, output_mask: Any = (True, True, True),
) -> Any:  # fmt: skip
    """Gradients of :func:`group_norm`: dx, dweight and dbias.

    With ``xh = (x - mean) * rstd``, ``g = dy * weight``, and means over a group::

        dx = rstd * (g - mean(g) - xh * mean(g * xh))
        dweight = sum over samples and elements of dy * xh
        dbias = sum over samples and elements of dy

    Parameters
    ----------
    dy, x : array_like
        Gradient of the output, and the input, of one shape.
    num_groups, weight, channel_axis
        The forward call's.
    mean, rstd : array_like
        Of shape (N, num_groups): what the forward call returned with ``return_stats=True``. `mean`
        is a pivot only: what rounding it lost is formed again.
    bias, output_mask
        As for :func:`batch_norm_backward`.

    Returns
    -------
    dx, dweight, dbias : ndarray or None
        As :func:`batch_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        As :func:`group_norm`.

    References
    ----------
    Wu, He: Group Normalization, arXiv 1803.08494 (2018).

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> x, dy = np.float32([[1, 3, 2, 8]]), np.float32([[1, 0, 0, 1]])
    >>> y, mean, rstd = fastnorm.group_norm(x, 2, return_stats=True)
    >>> fastnorm.group_norm_backward(dy, x, 2, mean, rstd)[2]
    array([1., 0., 0., 1.], dtype=float32)
    """
    last = _is_last(x, channel_axis)
    if last is not None and type(num_groups) is int and num_groups > 0:
        done = _core.straight_channel_backward(
            dy, x, num_groups, mean, rstd, weight, bias, output_mask, last, False
        )
        if done is not None:
            return done
    return handlers["group_norm_backward"](
        dy, x, num_groups, mean, rstd, weight, bias, channel_axis, output_mask
    )


def instance_norm(
    x: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5, *,
    channel_axis: int = 1, dialect: Dialect = "torch", out: Any = None, dtype: Any = None,
    return_stats: bool = False, activation: Activation = None,
) -> Any:  # fmt: skip
    """Instance normalization: ``y = (x - mean) / sqrt(var + eps) * weight + bias``.

    Mean and (population) variance are those of each channel of each sample.

    Parameters
    ----------
    x, channel_axis, out, dtype, activation
        As for :func:`batch_norm`.
    running_mean, running_var : array_like, optional
        Of shape (C,). With `use_input_stats` they are updated in place by the means over the
        samples of the instances' statistics; without it they normalise, and both are needed.
    weight, bias : array_like, optional
        Of shape (C,), or (N, C) for a pair a sample, of any real type.
    use_input_stats : bool
        Whether the instances' own statistics normalise.
    momentum, dialect
        As for :func:`batch_norm`.
    eps : float
        Added to the variance; not negative.
    return_stats : bool
        Also return mean and ``rstd = 1 / sqrt(var + eps)``.

    Returns
    -------
    y : ndarray
        Of x's shape.
    mean, rstd : ndarray
        With `return_stats`: of shape (N, C), float32 (float64 for float64 input); what
        ``instance_norm_backward`` takes. Without `use_input_stats`, as :func:`batch_norm`.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm`.

    References
    ----------
    Ulyanov, Vedaldi, Lempitsky: Instance Normalization, arXiv 1607.08022 (2016). Names follow
    ``torch.nn.functional.instance_norm``.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> fastnorm.instance_norm(np.float32([[[1, 3], [5, 5]]]), eps=0.0)
    array([[[-1.,  1.],
            [ 0.,  0.]]], dtype=float32)
    """
    last = _is_last(x, channel_axis)
    if (
        last is not None and use_input_stats is True and running_mean is None
        and running_var is None and dtype is None
    ):  # fmt: skip
        done = _core.straight_channel_norm(
            x, 0, weight, bias, eps, out, activation, last, return_stats
        )
        if done is not None:
            return done
    return handlers["instance_norm"](
        x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, channel_axis,
        dialect, out, dtype, return_stats, activation,
    )  # fmt: skip


def instance_norm_backward(
    dy: Any, x: Any, mean: Any, rstd: Any, weight: Any = None, bias: Any = None, *,
    channel_axis: int = 1, output_mask: Any = (True, True, True),
) -> Any:  # fmt: skip
    """Gradients of :func:`instance_norm` with the instances' own statistics: dx, dweight and dbias.

    (Of running statistics: ``batch_norm_backward`` without `training`.)

    Parameters
    ----------
    dy, x : array_like
        Gradient of the output, and the input, of one shape.
    mean, rstd : array_like
        Of shape (N, C): what the forward call returned with ``return_stats=True``.
    weight, channel_axis
        The forward call's.
    bias, output_mask
        As for :func:`batch_norm_backward`.

    Returns
    -------
    dx : ndarray or None
        Of x's shape and type.
    dweight, dbias : ndarray or None
        Of the weight's (or bias's) shape, (C,) where there is neither; float32 (float64 for float64
        input).

    Raises
    ------
    TypeError, ValueError
        As :func:`instance_norm`.

    References
    ----------
    Ulyanov, Vedaldi, Lempitsky: Instance Normalization, arXiv 1607.08022 (2016).

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> x, dy = np.float32([[[1, 3], [5, 6]]]), np.float32([[[1, 0], [1, 1]]])
    >>> y, mean, rstd = fastnorm.instance_norm(x, return_stats=True)
    >>> fastnorm.instance_norm_backward(dy, x, mean, rstd)[2]
    array([1., 2.], dtype=float32)
    """
    last = _is_last(x, channel_axis)
    if last is not None:
        done = _core.straight_channel_backward(
            dy, x, 0, mean, rstd, weight, bias, output_mask, last, False
        )
        if done is not None:
            return done
    return handlers["instance_norm_backward"](
        dy, x, mean, rstd, weight, bias, channel_axis, output_mask
    )


def adaptive_instance_norm(
    x: Any, style: Any, eps: float = 1e-5, *, ddof: int = 0, channel_axis: int = 1, out: Any = None,
    dtype: Any = None,
) -> Any:  # fmt: skip
    """AdaIN, for style transfer: ``y = std(style) * (x - mean(x)) / std(x) + mean(style)``.

    Mean and standard deviation are those of each channel of each sample.

    Parameters
    ----------
    x, channel_axis, out, dtype
        As for :func:`batch_norm`.
    style : array_like
        Of x's number of axes, samples and channels; the other axes may be of other lengths.
    eps : float
        Added to both variances before their roots; not negative.
    ddof : int
        Variances are divided by n - ddof: 0 or, as in the authors' code, 1.

    Returns
    -------
    y : ndarray
        Of x's shape.

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm`; ValueError for a ddof that leaves no elements.

    References
    ----------
    Huang, Belongie: Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization,
    arXiv 1703.06868 (2017).

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> x, style = np.float32([[[1, 3]]]), np.float32([[[10, 30, 20, 20]]])
    >>> fastnorm.adaptive_instance_norm(x, style, 0.0)
    array([[[12.928932, 27.071068]]], dtype=float32)
    """
    return handlers["adaptive_instance_norm"](x, style, eps, ddof, channel_axis, out, dtype)


# ---- their calls ---------------------------------------------------------------------------------
# Each takes what the public function of its name takes, in that order.


def _given(running_mean: Any, running_var: Any, eps: Any) -> Given:
    """Mean and rstd of running statistics, once the number of channels is known."""

    def statistics(channels: int) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for name, value in (("running_mean", running_mean), ("running_var", running_var)):
            array = as_running(name, value, channels, False)
            if array is None:
                raise TypeError(f"{name}: got None, wanted the statistics to normalise with")
            found.append(array)
        padding = checks.as_eps(eps)
        mean = np.array(interop.widened(found[0]), np.float64)
        return mean, np.ascontiguousarray(rstd_of(found[1], padding))

    return statistics


def _running(mean: Any, var: Any, momentum: Any, dialect: Any) -> Callable[[int], Running] | None:
    share, words = as_momentum(momentum), as_dialect(dialect)
    if mean is None and var is None:
        return None

    def running(channels: int) -> Running:
        return Running(
            as_running("running_mean", mean, channels, True),
            as_running("running_var", var, channels, True), share, words,
        )  # fmt: skip

    return running


def _as_bits(x: Any, dtype: Any, *arrays: Any) -> tuple[Any, ...]:
    """What goes with an x that is bfloat16 as uint16, may be so too."""
    return tuple(map(interop.as_bits, arrays)) if interop.asks_for_bits(x, dtype) else arrays


def _batch_norm(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, training: Any,
    momentum: Any, eps: Any, channel_axis: Any, dialect: Any, out: Any, dtype: Any,
    return_stats: Any, activation: Any, explained: bool = False,
) -> ChannelCall:  # fmt: skip
    running_mean, running_var = _as_bits(x, dtype, running_mean, running_var)
    running = _running(running_mean, running_var, momentum, dialect)
    return ForwardCall(
        x, channel_axis, None, weight, bias, eps, over_samples=True, dtype=dtype, out=out,
        activation=activation, return_stats=return_stats, running=running if training else None,
        given=None if training else _given(running_mean, running_var, eps),
        read={"running_mean": running_mean, "running_var": running_var}, explained=explained,
    )  # fmt: skip


def _batch_norm_backward(
    dy: Any, x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, training: Any,
    eps: Any, mean: Any, rstd: Any, channel_axis: Any, output_mask: Any, explained: bool = False,
) -> ChannelCall:  # fmt: skip
    return BackwardCall(
        dy, x, channel_axis, None, mean, rstd, weight, bias, output_mask, over_samples=True,
        given=None if training else _given(running_mean, running_var, eps), explained=explained,
    )  # fmt: skip


def _group_norm(
    x: Any, num_groups: Any, weight: Any, bias: Any, eps: Any, channel_axis: Any, out: Any,
    dtype: Any, return_stats: Any, activation: Any, explained: bool = False,
) -> ChannelCall:  # fmt: skip
    return ForwardCall(
        x, channel_axis, _wanted_groups(num_groups), weight, bias, eps, dtype=dtype, out=out,
        activation=activation, return_stats=return_stats, explained=explained,
    )  # fmt: skip


def _wanted_groups(num_groups: Any) -> Any:
    if num_groups is None:
        raise TypeError("num_groups: got None, wanted an int")
    return num_groups


def _group_norm_backward(
    dy: Any, x: Any, num_groups: Any, mean: Any, rstd: Any, weight: Any, bias: Any,
    channel_axis: Any, output_mask: Any, explained: bool = False,
) -> ChannelCall:  # fmt: skip
    return BackwardCall(
        dy, x, channel_axis, _wanted_groups(num_groups), mean, rstd, weight, bias, output_mask,
        explained=explained,
    )  # fmt: skip


def _instance_norm(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, use_input_stats: Any,
    momentum: Any, eps: Any, channel_axis: Any, dialect: Any, out: Any, dtype: Any,
    return_stats: Any, activation: Any, explained: bool = False,
) -> ChannelCall:  # fmt: skip
    running_mean, running_var = _as_bits(x, dtype, running_mean, running_var)
    running = _running(running_mean, running_var, momentum, dialect)
    return ForwardCall(
        x, channel_axis, None, weight, bias, eps, dtype=dtype, out=out, activation=activation,
        return_stats=return_stats, running=running if use_input_stats else None,
        given=None if use_input_stats else _given(running_mean, running_var, eps),
        read={"running_mean": running_mean, "running_var": running_var},
        parameters_per_sample=True, explained=explained,
    )  # fmt: skip


def _instance_norm_backward(
    dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, bias: Any, channel_axis: Any,
    output_mask: Any, explained: bool = False,
) -> ChannelCall:  # fmt: skip
    return BackwardCall(
        dy, x, channel_axis, None, mean, rstd, weight, bias, output_mask,
        parameters_per_sample=True, explained=explained,
    )  # fmt: skip


def _adaptive_instance_norm(
    x: Any, style: Any, eps: Any, ddof: Any, channel_axis: Any, out: Any, dtype: Any,
    explained: bool = False,
) -> ChannelCall:  # fmt: skip
    return AdaptiveCall(x, style, eps, ddof, channel_axis, out, dtype, explained)


CALLS: dict[str, Callable[..., ChannelCall]] = {
    call.__name__.removeprefix("_"): call
    for call in (
        _batch_norm, _batch_norm_backward, _group_norm, _group_norm_backward, _instance_norm,
        _instance_norm_backward, _adaptive_instance_norm,
    )
}  # fmt: skip
OPS = tuple(CALLS)
handlers = {name: handler_of(call) for name, call in CALLS.items()}
