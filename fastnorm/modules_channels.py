"""Modules of arrays with channels: batch, group and instance norm."""

from __future__ import annotations

import operator
import sys
from typing import Any, ClassVar

import numpy as np

from . import _core, channels, checks, interop
from .dialects import DIALECTS, as_dialect, as_momentum
from .memory import empty
from .module_state import (
    COPIES,
    REPLACING,
    State,
    as_dtype,
    gradients,
    own_copy,
    present,
    shape_of,
    unpacked,
)


class _ChannelNorm(State):
    """What these modules share: the number and the axis of channels, eps, weight and bias."""

    def __init__(
        self, channel_count: int, eps: Any, affine: Any, channel_axis: Any, dtype: Any
    ) -> None:
        self._channels = channel_count
        self._channel_axis = _as_channel_axis(channel_axis)
        self._dtype = as_dtype(dtype)
        # Never changed but replaced, so that whoever reads it sees what belongs together.
        self._arrays: dict[str, np.ndarray | None] = {"weight": None, "bias": None}
        self.eps = eps
        if affine:
            self.weight, self.bias = np.ones(channel_count), np.zeros(channel_count)

    # ---- settings and parameters ----------------------------------------------------------------

    @property
    def eps(self) -> float:
        """Added to the variance."""
        return self._eps

    @eps.setter
    def eps(self, value: Any) -> None:
        self._eps = checks.as_eps(value)

    @property
    def channel_axis(self) -> int:
        """The axis of the input that has the channels."""
        return self._channel_axis

    @property
    def dtype(self) -> np.dtype:
        """Type of the parameters."""
        return self._dtype

    @property
    def affine(self) -> bool:
        """Whether there is a weight or a bias."""
        return bool(self.parameters())

    @property
    def weight(self) -> Any:
        """Gain, or None for ones."""
        return self._arrays["weight"]

    @weight.setter
    def weight(self, value: Any) -> None:
        self._keep({"weight": self._checked("weight", value)})

    @property
    def bias(self) -> Any:
        """Offset, or None for zeros."""
        return self._arrays["bias"]

    @bias.setter
    def bias(self, value: Any) -> None:
        self._keep({"bias": self._checked("bias", value)})

    def parameters(self) -> dict[str, np.ndarray]:
        """The parameters there are, by name: the arrays themselves."""
        arrays = self._arrays
        return present({name: arrays[name] for name in ("weight", "bias")})

    def _held(self) -> dict[str, np.ndarray]:
        return present(self._arrays)

    def _checked(self, name: str, value: Any) -> np.ndarray | None:
        return own_copy(name, value, (self._channels,), self._dtype)

    def _keep(self, checked: dict[str, Any]) -> None:
        with REPLACING:
            self._arrays = {**self._arrays, **checked}

    # ---- calls ----------------------------------------------------------------------------------

    def _near(self, x: Any) -> dict[str, Any]:
        """The arrays that calls take, where x is: those of one moment."""
        arrays = self._arrays
        if type(x) is np.ndarray or not interop.is_on_cuda(x):
            return arrays
        return {
            name: self._brought(name, array, x)
            for name, array in arrays.items()
            if name != "num_batches_tracked"
        }

    def _checked_shape(self, x: Any) -> tuple[int, ...]:
        """x's shape, which must have the channels."""
        shape, axis = shape_of(x), self._channel_axis
        if len(shape) < 2 or not -len(shape) <= axis < len(shape) or shape[axis] != self._channels:
            raise ValueError(
                f"x: got shape {shape}, wanted {self._channels} channels on axis {axis}, "
                "samples on axis 0"
            )
        return shape

    # ---- copying --------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != COPIES}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)
        self._arrays = {
            name: None if array is None else _copy(array) for name, array in self._arrays.items()
        }

    def __repr__(self) -> str:
        words = [*map(repr, self._sizes()), *(f"{k}={v!r}" for k, v in self._shown().items())]
        return f"{type(self).__name__}({', '.join(words)}, dtype={self._dtype.name})"

    def _settings(self) -> tuple[Any, ...]:
        return *self._sizes(), *self._shown().values(), self._dtype

    def _sizes(self) -> tuple[int, ...]:
        """What the constructor takes first."""
        return (self._channels,)

    def _shown(self) -> dict[str, Any]:
        """What it takes besides, but for dtype."""
        raise NotImplementedError


class GroupNorm(_ChannelNorm):
    """Group normalization: each sample by itself, its channels in groups.

    Calls are stateless: nothing of a call stays on the object, and any number of threads may call
    it at once. ``norm(x, out=None)`` is :func:`fastnorm.group_norm` with the module's parameters.

    Parameters
    ----------
    num_groups : int
        A divisor of `num_channels`.
    num_channels : int
        C, the length of the input's channel axis.
    eps : float
        Added to the variance; not negative.
    affine : bool
        Whether there is a weight, at first of ones, and a bias, at first of zeros.
    channel_axis : int
        Any axis but 0, the samples'. 1: channels first; -1: channels last.
    dtype : float16, bfloat16, float32 or float64
        Type of the parameters (bfloat16 where ml_dtypes is installed). Inputs may be of any of
        them, and results are of the input's type.

    Attributes
    ----------
    weight, bias : ndarray or None
        Of shape (C,), `dtype`, 64-byte aligned. They may be assigned to (what is assigned is
        converted) and changed in place: both take effect at the next call.

    Raises
    ------
    TypeError, ValueError
        As fastnorm.group_norm.

    References
    ----------
    Wu, He: Group Normalization, arXiv 1803.08494 (2018). Names and state dict follow
    torch.nn.GroupNorm.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> norm = fastnorm.GroupNorm(2, 4, eps=0.0)
    >>> norm(np.float32([[[1], [3], [10], [50]]]))[0, :, 0]
    array([-1.,  1., -1.,  1.], dtype=float32)
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        channel_axis: int = 1,
        dtype: Any = np.float32,
    ) -> None:
        count = _as_channels("num_channels", num_channels)
        self._num_groups = checks.as_count("num_groups", num_groups, 1, "an integer")
        if count % self._num_groups:
            raise ValueError(
                f"num_groups: got {num_groups}, wanted a divisor of {count}, num_channels"
            )
        super().__init__(count, eps, affine, channel_axis, dtype)

    @property
    def num_groups(self) -> int:
        """How many groups a sample's channels make."""
        return self._num_groups

    @property
    def num_channels(self) -> int:
        """How many channels the input has."""
        return self._channels

    def __call__(self, x: Any, out: Any = None) -> Any:
        """Normalize x's groups; see fastnorm.group_norm."""
        return self._normalised(x, out)

    def forward(self, x: Any) -> tuple[Any, tuple[Any, ...]]:
        """y, and what `backward` needs to go back from it.

        `saved` refers to x itself: do not change x in between.
        """
        y, mean, rstd = self._normalised(x, return_stats=True)
        return y, (x, mean, rstd)

    def backward(self, dy: Any, saved: tuple[Any, ...]) -> tuple[Any, dict[str, np.ndarray]]:
        """dx, and the parameters' gradients by name, from the output's gradient `dy`.

        dx is of the input's type, the parameters' gradients are float32 (float64 for float64
        input).
        """
        x, mean, rstd = unpacked(saved, 3)
        near = self._near(x)
        weight, bias = near["weight"], near["bias"]
        return gradients(
            *channels.group_norm_backward(
                dy, x, self._num_groups, mean, rstd, weight, bias, channel_axis=self._channel_axis,
                output_mask=(True, weight is not None, bias is not None),
            )
        )  # fmt: skip

    def _normalised(self, x: Any, out: Any = None, return_stats: bool = False) -> Any:
        self._checked_shape(x)
        near = self._near(x)
        return channels.group_norm(
            x, self._num_groups, near["weight"], near["bias"], self._eps,
            channel_axis=self._channel_axis, out=out, return_stats=return_stats,
        )  # fmt: skip

    def _as_op(self, x: Any, out: Any = None) -> tuple[str, dict[str, Any]]:
        self._checked_shape(x)
        near = self._near(x)
        return "group_norm", {
            "x": x, "num_groups": self._num_groups, "weight": near["weight"],
            "bias": near["bias"], "eps": self._eps, "channel_axis": self._channel_axis, "out": out,
        }  # fmt: skip

    def _sizes(self) -> tuple[int, ...]:
        return self._num_groups, self._channels

    def _shown(self) -> dict[str, Any]:
        return {"eps": self._eps, "affine": self.affine, "channel_axis": self._channel_axis}


class _TrackingNorm(_ChannelNorm):
    """What batch and instance norm share: running statistics, and two modes."""

    _may_be_missing = ("num_batches_tracked",)  # torch began to write it later than the others
    #: The function that normalises by the input's statistics.
    _op: ClassVar[str]
    _momentum: float | None

    def __init__(
        self, num_features: Any, eps: Any, momentum: Any, affine: Any, track_running_stats: Any,
        channel_axis: Any, dialect: Any, dtype: Any,
    ) -> None:  # fmt: skip
        count = _as_channels("num_features", num_features)
        as_dialect(dialect)
        self._dialect: str = dialect
        self.momentum = momentum
        self._training = True
        super().__init__(count, eps, affine, channel_axis, dtype)
        if track_running_stats:
            start = {
                "running_mean": np.zeros(count), "running_var": np.ones(count),
                "num_batches_tracked": 0,
            }  # fmt: skip
            self._keep({name: self._checked(name, value) for name, value in start.items()})

    # ---- settings, statistics and the mode ------------------------------------------------------

    @property
    def num_features(self) -> int:
        """How many channels the input has."""
        return self._channels

    @property
    def momentum(self) -> float | None:
        """How far the running statistics move, as the dialect reads it."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: Any) -> None:
        self._momentum = as_momentum(value)

    @property
    def dialect(self) -> str:
        """Whose rule the running statistics follow."""
        return self._dialect

    @property
    def track_running_stats(self) -> bool:
        """Whether there are running statistics."""
        return "running_mean" in self._arrays

    @property
    def running_mean(self) -> Any:
        """What the means of batches come to, or None."""
        return self._arrays.get("running_mean")

    @running_mean.setter
    def running_mean(self, value: Any) -> None:
        self._assign("running_mean", value)

    @property
    def running_var(self) -> Any:
        """What the variances of batches come to, or None."""
        return self._arrays.get("running_var")

    @running_var.setter
    def running_var(self, value: Any) -> None:
        self._assign("running_var", value)

    @property
    def num_batches_tracked(self) -> int | None:
        """How many batches the running statistics have seen, or None."""
        count = self._arrays.get("num_batches_tracked")
        return None if count is None else int(count)

    @num_batches_tracked.setter
    def num_batches_tracked(self, value: Any) -> None:
        self._assign("num_batches_tracked", value)

    def _assign(self, name: str, value: Any) -> None:
        if not self.track_running_stats:
            raise AttributeError(f"{name}: the module has track_running_stats=False")
        if value is None:
            raise TypeError(f"{name}: got None, wanted an array of shape ({self._channels},)")
        self._keep({name: self._checked(name, value)})

    def _checked(self, name: str, value: Any) -> np.ndarray | None:
        if name == "num_batches_tracked":
            return np.array(_as_batches(name, interop.convert(name, value)), np.int64)
        if name in ("running_mean", "running_var"):
            return own_copy(name, value, (self._channels,), checks.compute_type(self._dtype))
        return super()._checked(name, value)

    @property
    def training(self) -> bool:
        """Whether the input's own statistics normalise it, and move the running ones."""
        return self._training

    @training.setter
    def training(self, mode: Any) -> None:
        self._training = bool(mode)

    def train(self, mode: bool = True) -> Any:
        """Normalize by the input's own statistics, and move the running ones. Returns itself."""
        self.training = mode
        return self

    def eval(self) -> Any:
        """Normalize by the running statistics, where there are any. Returns itself."""
        return self.train(False)

    # ---- calls ----------------------------------------------------------------------------------

    def __call__(self, x: Any, out: Any = None) -> Any:
        """Normalize x; in training, move the running statistics."""
        near = self._near(x)
        return self._infer(x, out, near) if self._by_running(near) else self._train(x, out, near)

    def forward(self, x: Any) -> tuple[Any, tuple[Any, ...]]:
        """y, and what `backward` needs to go back from it; moves what a call does.

        `saved` refers to x itself: do not change x in between.
        """
        near = self._near(x)
        if self._by_running(near):
            mean, var = _kept(near["running_mean"]), _kept(near["running_var"])
            statistics = {"running_mean": mean, "running_var": var, "eps": self._eps}
            return self._infer(x, None, near), (x, statistics, False)
        y, mean, rstd = self._train(x, None, near, return_stats=True)
        return y, (x, {"mean": mean, "rstd": rstd}, True)

    def backward(self, dy: Any, saved: tuple[Any, ...]) -> tuple[Any, dict[str, np.ndarray]]:
        """dx, and the parameters' gradients by name, from the output's gradient `dy`.

        dx is of the input's type, the parameters' gradients are float32 (float64 for float64
        input). The gradient is of the mode that `forward` ran in.
        """
        x, known, by_input = unpacked(saved, 3)
        if type(known) is not dict:
            got = type(known).__name__
            raise TypeError(f"saved: got a {got} in it, wanted what forward returned")
        near, axis = self._near(x), self._channel_axis
        weight, bias = near["weight"], near["bias"]
        wanted = (True, weight is not None, bias is not None)
        if not by_input:
            results = channels.batch_norm_backward(
                dy, x, known.get("running_mean"), known.get("running_var"), weight, bias, False,
                known.get("eps", self._eps), channel_axis=axis, output_mask=wanted,
            )  # fmt: skip
        elif self._op == "batch_norm":
            results = channels.batch_norm_backward(
                dy, x, None, None, weight, bias, True, mean=known.get("mean"),
                rstd=known.get("rstd"), channel_axis=axis, output_mask=wanted,
            )  # fmt: skip
        else:
            results = channels.instance_norm_backward(
                dy, x, known.get("mean"), known.get("rstd"), weight, bias, channel_axis=axis,
                output_mask=wanted,
            )  # fmt: skip
        return gradients(*results)

    def _by_running(self, near: dict[str, Any]) -> bool:
        """Whether the running statistics normalise."""
        return not self._training and "running_mean" in near

    def _infer(self, x: Any, out: Any, near: dict[str, Any]) -> Any:
        """By the running statistics, which is the same for both ops."""
        self._checked_shape(x)
        return channels.batch_norm(
            x, near["running_mean"], near["running_var"], near["weight"], near["bias"],
            eps=self._eps, channel_axis=self._channel_axis, out=out,
        )  # fmt: skip

    def _train(self, x: Any, out: Any, near: dict[str, Any], return_stats: bool = False) -> Any:
        """By the input's statistics, towards which the running ones move where there are any."""
        shape = self._checked_shape(x)
        mean = var = None
        moves = self._training and "running_mean" in near
        if moves:
            # The batch's alone, in float64; what is here moves at once when all is done.
            mean = self._brought("mean", np.zeros(self._channels), x, {})
            var = self._brought("var", np.zeros(self._channels), x, {})
        dialect = self._dialect
        whole_step = 1.0 if DIALECTS[dialect].momentum_is_of_new else 0.0
        # Both ops take these in the same order. True: by the input's statistics.
        result = getattr(channels, self._op)(
            x, mean, var, near["weight"], near["bias"], True, momentum=whole_step, eps=self._eps,
            channel_axis=self._channel_axis, dialect=dialect, out=out, return_stats=return_stats,
        )  # fmt: skip
        if moves and 0 not in shape:
            self._move(_on_host(mean), _on_host(var))
        return result

    def _move(self, mean: np.ndarray, var: np.ndarray) -> None:
        """Move the running statistics to the batch's: both, or none."""
        with REPLACING:
            now: dict[str, Any] = self._arrays
            tracked = int(now["num_batches_tracked"]) + 1
            shares = self._shares(tracked)
            self._arrays = {
                **now,
                "running_mean": _moved(now["running_mean"], mean, *shares),
                "running_var": _moved(now["running_var"], var, *shares),
                "num_batches_tracked": np.array(tracked, np.int64),
            }

    def _shares(self, tracked: int) -> tuple[float, float]:
        """How much the running statistics keep of themselves, and take of the batch that is the
        `tracked`-th."""
        momentum = self._momentum
        if momentum is None:
            return 1 - 1 / tracked, 1 / tracked
        return DIALECTS[self._dialect].shares(momentum)

    def _as_op(self, x: Any, out: Any = None) -> tuple[str, dict[str, Any]]:
        self._checked_shape(x)
        near = self._near(x)
        by_running = self._by_running(near)
        flag = "training" if self._op == "batch_norm" else "use_input_stats"
        # In training the running statistics are not the op's: see _train.
        return self._op, {
            "x": x, "running_mean": near["running_mean"] if by_running else None,
            "running_var": near["running_var"] if by_running else None,
            "weight": near["weight"], "bias": near["bias"], flag: not by_running, "eps": self._eps,
            "channel_axis": self._channel_axis, "out": out,
        }  # fmt: skip

    def _settings(self) -> tuple[Any, ...]:
        return *super()._settings(), self._training

    def _shown(self) -> dict[str, Any]:
        return {
            "eps": self._eps, "momentum": self._momentum, "affine": self.affine,
            "track_running_stats": self.track_running_stats, "channel_axis": self._channel_axis,
            "dialect": self._dialect,
        }  # fmt: skip


class BatchNorm(_TrackingNorm):
    """Batch normalization of a channel over all samples and places, with running statistics.

    ``norm(x, out=None)`` is :func:`fastnorm.batch_norm` with the module's parameters. A new module
    is in training: the batch's own statistics normalise, and the running ones move towards them.
    After ``eval()`` the running ones normalise. Any number of threads may call one module; each
    moves the running statistics as a whole.

    Parameters
    ----------
    num_features : int
        C, the length of the input's channel axis.
    eps : float
        Added to the variance; not negative.
    momentum : float or None
        Any finite number, read as the dialect reads it. None: the running statistics are the means
        of all batches so far, each counting alike.
    affine : bool
        Whether there is a weight, at first of ones, and a bias, at first of zeros.
    track_running_stats : bool
        Whether there are running statistics. Without, the batch's own normalise in both modes.
    channel_axis : int
        Any axis but 0, the samples'. 1: channels first; -1: channels last.
    dialect : {"torch", "keras", "flax", "onnx"}
        As for :func:`fastnorm.batch_norm`: what momentum means, and which variance is kept. It
        changes no default: with "keras" or "flax" give ``momentum=0.99``, with "onnx" 0.9, as those
        do (0.1 would be the share of the old), with "keras" ``eps=1e-3``. (``load_norm`` does.)
    dtype : float16, bfloat16, float32 or float64
        Type of the parameters (bfloat16 where ml_dtypes is installed). Inputs may be of any of
        them, and results are of the input's type.

    Attributes
    ----------
    weight, bias : ndarray or None
        Of shape (C,), `dtype`, 64-byte aligned. They may be assigned to (what is assigned is
        converted) and changed in place: both take effect at the next call.
    running_mean, running_var : ndarray or None
        Of shape (C,), float32 (float64 where `dtype` is), at first of zeros and ones. Training puts
        new arrays in their place.
    num_batches_tracked : int or None
        How many batches have moved them.
    training : bool
        The mode, which ``train()`` and ``eval()`` set.

    Raises
    ------
    TypeError, ValueError
        As fastnorm.batch_norm.

    References
    ----------
    Ioffe, Szegedy: Batch Normalization, arXiv 1502.03167 (2015). Names and state dict follow
    torch.nn.BatchNorm2d; a batch of one element a channel is legal here, one of none changes
    nothing.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> norm = fastnorm.BatchNorm(2, momentum=0.5)
    >>> y = norm(np.float32([[0, 10], [2, 30]]))
    >>> norm.running_mean
    array([ 0.5, 10. ], dtype=float32)
    >>> norm.eval()(np.float32([[0.5, 10]]))
    array([[0., 0.]], dtype=float32)
    """

    _op = "batch_norm"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        channel_axis: int = 1,
        dialect: str = "torch",
        dtype: Any = np.float32,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, channel_axis, dialect, dtype
        )

    @property
    def momentum(self) -> float | None:
        """How far the running statistics move, as the dialect reads it; None for plain means."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: Any) -> None:
        self._momentum = None if value is None else as_momentum(value)


class InstanceNorm(_TrackingNorm):
    """Instance normalization: each channel of each sample by itself.

    ``norm(x, out=None)`` is :func:`fastnorm.instance_norm` with the module's parameters. Without
    running statistics, which is the default, both modes are the same. With them, calls in training
    move them towards the means of the instances' statistics, and after ``eval()`` they normalise.
    All else is as :class:`fastnorm.BatchNorm` has it.

    Parameters
    ----------
    num_features : int
        C, the length of the input's channel axis.
    eps, channel_axis, dialect, dtype
        As for :class:`fastnorm.BatchNorm`.
    momentum : float
        Any finite number, read as the dialect reads it.
    affine : bool
        Whether there is a weight, at first of ones, and a bias, at first of zeros.
    track_running_stats : bool
        Whether there are running statistics.

    Attributes
    ----------
    weight, bias, running_mean, running_var, num_batches_tracked, training
        As :class:`fastnorm.BatchNorm` has them. (torch's instance norm has a num_batches_tracked
        too, but leaves it at 0.)

    Raises
    ------
    TypeError, ValueError
        As fastnorm.instance_norm.

    References
    ----------
    Ulyanov, Vedaldi, Lempitsky: Instance Normalization, arXiv 1607.08022 (2016). Names and state
    dict follow torch.nn.InstanceNorm2d.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> norm = fastnorm.InstanceNorm(2, eps=0.0)
    >>> norm(np.float32([[[1, 3], [10, 50]]]))
    array([[[-1.,  1.],
            [-1.,  1.]]], dtype=float32)
    """

    _op = "instance_norm"

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        channel_axis: int = 1,
        dialect: str = "torch",
        dtype: Any = np.float32,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, channel_axis, dialect, dtype
        )


def _as_channels(name: str, value: Any) -> int:
    count = checks.as_count(name, value, 0, "an integer")
    if count > sys.maxsize:
        raise ValueError(f"{name}: got {value!r}, wanted at most {sys.maxsize}")
    return count


def _as_channel_axis(value: Any) -> int:
    try:
        axis = operator.index(value)
    except TypeError:
        raise TypeError(f"channel_axis: got {value!r}, wanted an integer") from None
    if axis == 0:
        raise ValueError("channel_axis: got 0, wanted any axis but 0, the samples'")
    return axis


def _as_batches(name: str, value: Any) -> int:
    """num_batches_tracked: an integer, or an array that holds one."""
    array = checks.as_array(name, value)
    if array.size != 1:
        raise ValueError(f"{name}: got shape {array.shape}, wanted one integer")
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: got dtype {array.dtype}, wanted an integer")
    count = int(array.reshape(()))
    if not 0 <= count <= sys.maxsize:
        raise ValueError(f"{name}: got {count}, wanted an integer of at least 0")
    return count


def _copy(array: np.ndarray) -> np.ndarray:
    """In aligned memory."""
    copy = empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def _kept(array: Any) -> Any:
    """What changes in place of a module's array do not reach; copies on devices have none."""
    return array.copy() if isinstance(array, np.ndarray) else array


def _moved(running: Any, batch: np.ndarray, kept: float, taken: float) -> np.ndarray:
    """A running statistic, moved to a batch's."""
    moved: np.ndarray = running.copy()
    _core.update_running(moved, batch, kept, taken)
    return moved


def _on_host(array: Any) -> np.ndarray:
    """What a device holds, as an ndarray."""
    if isinstance(array, np.ndarray):
        return array
    for name in ("cpu", "get", "copy_to_host"):  # torch, CuPy, Numba
        if hasattr(array, name):
            return np.asarray(getattr(array, name)())
    return np.asarray(array)
