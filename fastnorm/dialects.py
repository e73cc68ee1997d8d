"""How torch, Keras, Flax and ONNX keep running statistics, what lies between them, and folding."""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from . import checks, interop
from .checks import FLOAT64

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: What folding is computed in, before one rounding.
Doubles: TypeAlias = "NDArray[np.float64]"


class Dialect(NamedTuple):
    """What a library means by momentum and variance, and what it takes where nothing is said."""

    #: Whether momentum is what is new's share, rather than what was there's.
    momentum_is_of_new: bool
    #: Whether the running variance takes the batch's unbiased one, n / (n - 1) times the variance.
    is_unbiased: bool
    momentum: float
    channel_axis: int
    eps: Mapping[str, float | None]

    def shares(self, momentum: float) -> tuple[float, float]:
        """What is kept of a running statistic, and taken of a batch's."""
        if self.momentum_is_of_new:
            return 1 - momentum, momentum
        return momentum, 1 - momentum

    def variance_factor(self, count: int) -> float:
        """What makes of a batch's biased variance, of `count` elements, the one that is taken."""
        return count / (count - 1) if self.is_unbiased and count > 1 else 1.0


def _eps(norms: float, **others: float | None) -> Mapping[str, float | None]:
    names = (
        "layer_norm", "layer_norm_2d", "rms_norm", "batch_norm", "group_norm", "instance_norm",
    )  # fmt: skip
    return MappingProxyType({**dict.fromkeys(names, norms), **others})


DIALECTS: Mapping[str, Dialect] = MappingProxyType({
    "torch": Dialect(True, True, 0.1, 1, _eps(
        1e-5, layer_norm_2d=1e-6, rms_norm=None, weight_norm=None, spectral_norm=1e-12,
    )),
    "keras": Dialect(False, False, 0.99, -1, _eps(1e-3, rms_norm=1e-6)),
    "flax": Dialect(False, False, 0.99, -1, _eps(
        1e-6, batch_norm=1e-5, weight_norm=1e-12, spectral_norm=1e-12,
    )),
    "onnx": Dialect(False, False, 0.9, 1, _eps(1e-5)),
})  # fmt: skip


def as_dialect(name: Any, argument: str = "dialect") -> Dialect:
    """The dialect of this name."""
    if not isinstance(name, str):
        raise TypeError(f"{argument}: got {type(name).__name__}, wanted a name")
    if name not in DIALECTS:
        names = ", ".join(repr(known) for known in DIALECTS)
        raise ValueError(f"{argument}: got {name!r}, wanted one of: {names}")
    return DIALECTS[name]


def as_momentum(value: Any) -> float:
    """A finite float."""
    message = f"momentum: got {value!r}, wanted a finite number"
    try:
        momentum = float(operator.pos(value))  # which text has not
    except (TypeError, ValueError):
        raise TypeError(message) from None
    except OverflowError:
        raise ValueError(message) from None
    if not math.isfinite(momentum):
        raise ValueError(message)
    return momentum


def convert_momentum(momentum: float, source: str, target: str) -> float:
    """The momentum by which `target` does what `source` does with `momentum`.

    In torch it is the share of what is new: ``run = (1 - momentum) run + momentum batch``. In
    Keras, Flax and ONNX it is the share of what was there: ``run = momentum run + (1 - momentum)
    batch``. So torch's 0.1 is 0.9 elsewhere.

    Parameters
    ----------
    momentum : float
        Any finite number. Torch's None, a mean of all batches alike, exists nowhere else.
    source, target : {"torch", "keras", "flax", "onnx"}

    Returns
    -------
    float
        `momentum`, or 1 less it, in decimals: 0.99 becomes 0.01.

    Raises
    ------
    TypeError, ValueError
        If a dialect is unknown, or momentum not a finite number.

    Examples
    --------
    >>> import fastnorm
    >>> fastnorm.convert_momentum(0.99, "keras", "torch")
    0.01
    """
    given, wanted = as_dialect(source, "source"), as_dialect(target, "target")
    value = as_momentum(momentum)
    if given.momentum_is_of_new == wanted.momentum_is_of_new:
        return value
    decimal = importlib.import_module("decimal").Decimal
    return float(1 - decimal(repr(value)))


def convert_running_var(running_var: Any, source: str, target: str, n: int) -> Any:
    """The running variance that `target` would have kept where `source` kept `running_var`.

    Torch keeps variances of batches as unbiased estimates, ``n / (n - 1)`` times what the batch was
    normalised with; Keras, Flax and ONNX keep the latter. Means do not differ.

    This is for a model whose training goes on elsewhere, or to compare what was kept. To infer as
    the model did where it was trained, take its running variance as it is.

    Parameters
    ----------
    running_var : array_like
    source, target : {"torch", "keras", "flax", "onnx"}
    n : int
        How many elements of a channel the batches had: N times the lengths of the other axes. Of
        one element there is no unbiased estimate: nothing changes.

    Returns
    -------
    ndarray
        A new array of running_var's shape and type, computed in float64 and rounded once.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of such a type, a dialect unknown, or n less than 1.

    References
    ----------
    torch.nn.BatchNorm2d; keras.layers.BatchNormalization; flax.linen.BatchNorm; ONNX's
    BatchNormalization.

    Examples
    --------
    >>> import fastnorm
    >>> fastnorm.convert_running_var([1.0, 2.0], "keras", "torch", n=5)
    array([1.25, 2.5 ])
    """

    def converted(given: Any) -> np.ndarray:
        variance = checks.as_floating("running_var", given)
        wide = checks.as_plain(variance, FLOAT64)
        if is_unbiased and not was_unbiased and count > 1:
            wide = wide * count / (count - 1)
        elif was_unbiased and not is_unbiased and count > 1:
            wide = wide * (count - 1) / count
        return _stored(wide, variance.dtype)

    was_unbiased = as_dialect(source, "source").is_unbiased
    is_unbiased = as_dialect(target, "target").is_unbiased
    count = checks.as_count("n", n, 1, "an integer")
    return interop.run(converted, ("running_var",), running_var, main="running_var")


# ---- folding -------------------------------------------------------------------------------------


def fold_batch_norm(
    running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> tuple[Any, Any]:
    """Scale and shift that do what a batch norm does in inference: ``y = x scale + shift``.

    ``scale = weight / sqrt(running_var + eps)`` and ``shift = bias - running_mean scale``. The fold
    loses digits where the mean is large beside the standard deviation, as x scale and shift are
    large then and their sum is not: with float32, a mean of 1e6 standard deviations costs an error
    of 7.5e-2 in an output of unit scale. :func:`fastnorm.batch_norm` does not fold: it subtracts
    the mean first. This function is for export.

    Parameters
    ----------
    running_mean, running_var : array_like
        Of shape (C,).
    weight, bias : array_like, optional
        Of shape (C,); ones and zeros where left out.
    eps : float
        Added to the variance; not negative.

    Returns
    -------
    scale, shift : ndarray
        Of shape (C,), computed in float64 and rounded once: to float64 if an argument is of that
        type, else to float32.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of such a type or shape.

    References
    ----------
    Ioffe, Szegedy: Batch Normalization, arXiv 1502.03167 (2015), section 3.1.

    Examples
    --------
    >>> import fastnorm
    >>> scale, shift = fastnorm.fold_batch_norm([1.0], [4.0], weight=[6.0], eps=0)
    >>> scale, shift
    (array([3.]), array([-3.]))
    """

    def folded(*given: Any) -> tuple[np.ndarray, np.ndarray]:
        arrays = [checks.as_real(name, value) for name, value in zip(names, given, strict=True)]
        scale, mean, shift = _scale_mean_shift(*given, eps=eps)
        dtype = checks.compute_type(*[a.dtype for a in arrays if a is not None])
        with np.errstate(all="ignore"):
            return _stored(scale, dtype), _stored(shift - mean * scale, dtype)

    names = ("running_mean", "running_var", "weight", "bias")
    return interop.run(
        folded, names, running_mean, running_var, weight, bias, main="running_mean"
    )  # fmt: skip


def fold_into_linear(
    weight: Any, bias: Any, running_mean: Any, running_var: Any, norm_weight: Any = None,
    norm_bias: Any = None, eps: float = 1e-5, *, axis: int = 0,
) -> tuple[Any, Any]:  # fmt: skip
    """Weight and bias of one linear layer that does what it and a batch norm after it do.

    For inference elsewhere: the fold loses digits where the norm's mean is large beside its
    standard deviation (:func:`fastnorm.fold_batch_norm` has the numbers), which the norm itself,
    :func:`fastnorm.batch_norm`, does not.

    Parameters
    ----------
    weight : array_like
        Of shape (out, in), as torch and ONNX have it; with ``axis=-1`` (in, out), as Keras and
        Flax.
    bias : array_like or None
        Of shape (out,); None counts as zeros.
    running_mean, running_var : array_like
        Of shape (out,).
    norm_weight, norm_bias : array_like, optional
        The norm's own, of shape (out,); ones and zeros where left out.
    eps : float
        Added to the variance; not negative.
    axis : int
        Where weight has the outputs.

    Returns
    -------
    weight, bias : ndarray
        New arrays of weight's shape and type, and of shape (out,) and bias's type, or weight's
        where there is no bias. Computed in float64 and rounded once. Tensors where weight is one.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of such a type or shape.

    References
    ----------
    torch.nn.utils.fusion.fuse_linear_bn_weights.

    Examples
    --------
    >>> import fastnorm
    >>> fastnorm.fold_into_linear([[1.0, 2.0]], None, [1.0], [4.0], eps=0)
    (array([[0.5, 1. ]]), array([-0.5]))
    """

    def folded(*given: Any) -> tuple[np.ndarray, np.ndarray]:
        if np.ndim(given[0]) != 2:
            shape = np.shape(given[0])
            raise ValueError(f"weight: got shape {shape}, wanted two axes, outputs and inputs")
        return _folded(*given, eps=eps, axis=axis, groups=1)

    return _fold(folded, weight, bias, running_mean, running_var, norm_weight, norm_bias)


def fold_into_conv(
    weight: Any, bias: Any, running_mean: Any, running_var: Any, norm_weight: Any = None,
    norm_bias: Any = None, eps: float = 1e-5, *, axis: int = 0, groups: int = 1,
) -> tuple[Any, Any]:  # fmt: skip
    """Weight and bias of one convolution that does what it and a batch norm after it do.

    For inference elsewhere: the fold loses digits where the norm's mean is large beside its
    standard deviation (:func:`fastnorm.fold_batch_norm` has the numbers), which the norm itself,
    :func:`fastnorm.batch_norm`, does not.

    Parameters
    ----------
    weight : array_like
        Of shape (out, in / groups, ...), as torch and ONNX have it. Of a transposed convolution,
        ``axis=1``: (in, out / groups, ...). Of Keras and Flax, ``axis=-1``: (..., in, out), or
        ``axis=-2`` where a transposed one is (..., out, in).
    bias, running_mean, running_var, norm_weight, norm_bias, eps
        As :func:`fastnorm.fold_into_linear` has them.
    axis : int
        Where weight has the outputs.
    groups : int
        Of the convolution. It matters where weight has the outputs of one group on `axis` and the
        inputs of all on axis 0, as torch's transposed convolutions have; elsewhere it may be left
        out.

    Returns
    -------
    weight, bias : ndarray
        As :func:`fastnorm.fold_into_linear` has them.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of such a type or shape.

    References
    ----------
    torch.nn.utils.fusion.fuse_conv_bn_weights.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> weight = np.ones((8, 3, 5, 5), np.float32)
    >>> weight, bias = fastnorm.fold_into_conv(weight, None, np.zeros(8), np.full(8, 4.0), eps=0)
    >>> weight.shape, float(weight[0, 0, 0, 0]), bias.shape
    ((8, 3, 5, 5), 0.5, (8,))
    """

    def folded(*given: Any) -> tuple[np.ndarray, np.ndarray]:
        if np.ndim(given[0]) < 2:
            shape = np.shape(given[0])
            raise ValueError(f"weight: got shape {shape}, wanted at least outputs and inputs")
        count = checks.as_count("groups", groups, 1, "an integer")
        return _folded(*given, eps=eps, axis=axis, groups=count)

    return _fold(folded, weight, bias, running_mean, running_var, norm_weight, norm_bias)


def _fold(call: Any, *given: Any) -> Any:
    names = ("weight", "bias", "running_mean", "running_var", "norm_weight", "norm_bias")
    return interop.run(call, names, *given, main="weight")


def _folded(
    weight: Any, bias: Any, running_mean: Any, running_var: Any, norm_weight: Any, norm_bias: Any,
    *, eps: Any, axis: Any, groups: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    scale, mean, shift = _scale_mean_shift(
        running_mean, running_var, norm_weight, norm_bias, eps=eps, prefix="norm_"
    )
    kernel, given = checks.as_floating("weight", weight), checks.as_real("bias", bias)
    offset = checks.as_parameter("bias", bias, scale.shape, FLOAT64)
    spread = _spread(scale, kernel.shape, axis, groups)
    wide = checks.as_plain(kernel, FLOAT64)
    dtype = kernel.dtype if given is None or given.dtype.kind in "biu" else given.dtype
    with np.errstate(all="ignore"):
        new_bias = ((0 if offset is None else offset) - mean) * scale + shift
        return _stored(wide * spread, kernel.dtype), _stored(new_bias, dtype)


def _spread(scale: Doubles, shape: tuple[int, ...], axis: Any, groups: int) -> Doubles:
    """A scale for each output as what multiplies a weight of this shape."""
    [where] = checks.as_axes(checks.as_count("axis", axis, -len(shape), "an integer"), len(shape))
    here, channels = shape[where], scale.size
    beside = [1] * len(shape)
    beside[where] = here
    if here == channels:
        return scale.reshape(beside)
    if here * groups != channels or where == 0 or shape[0] % groups:
        raise ValueError(
            f"weight: got shape {shape}, wanted {channels} outputs on axis {axis}"
            + (f", or inputs on axis 0 and {channels / groups:g} outputs" if groups > 1 else "")
        )
    # A group's inputs lie together on axis 0, and meet that group's outputs alone.
    beside[0] = groups
    return np.repeat(scale.reshape(beside), shape[0] // groups, axis=0)


def _scale_mean_shift(
    running_mean: Any, running_var: Any, weight: Any, bias: Any, *, eps: Any, prefix: str = "",
) -> tuple[Doubles, Doubles, Doubles]:  # fmt: skip
    """What inference is made of, ``(x - mean) scale + shift``, in float64."""
    variance = checks.as_real("running_var", running_var)
    if variance is None or variance.ndim != 1:
        got = "None" if variance is None else f"shape {variance.shape}"
        raise ValueError(f"running_var: got {got}, wanted one axis, of channels")
    shape, margin = variance.shape, checks.as_eps(eps)
    mean = checks.as_parameter("running_mean", running_mean, shape, FLOAT64)
    if mean is None:
        raise ValueError(f"running_mean: got None, wanted shape {shape}")
    gain = checks.as_parameter(f"{prefix}weight", weight, shape, FLOAT64)
    shift = checks.as_parameter(f"{prefix}bias", bias, shape, FLOAT64)
    with np.errstate(all="ignore"):
        scale = (1.0 if gain is None else gain) / np.sqrt(
            checks.as_plain(variance, FLOAT64) + margin
        )
    return scale, mean, np.zeros(shape) if shift is None else shift


def _stored(values: Doubles, dtype: np.dtype) -> np.ndarray:
    """float64 rounded once to a storage type, in native order."""
    with np.errstate(all="ignore"):
        if not interop.is_bfloat16(dtype):
            return values.astype(dtype.newbyteorder("="))
        near = interop.to_odd(values)
        return interop.to_bits(near) if interop.is_bits(dtype) else near.astype(dtype)
