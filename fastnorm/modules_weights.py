"""Modules that hold a weight in another form: WeightNorm, SpectralNorm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np

from . import checks, interop
from .module_state import REPLACING, IncompatibleKeys, State, as_dtype, own_copy, unpacked
from .weight_calls import as_dim
from .weights import (
    spectral_norm,
    spectral_norm_backward,
    unit_norm,
    weight_norm,
    weight_norm_backward,
)

_Self = TypeVar("_Self", bound="_Reparametrized")

#: How often SpectralNorm's vectors are improved before anybody uses them, as in torch.
_FIRST_ITERATIONS = 15


class _Reparametrized(State):
    """What both share: arrays by name, of which the weight is made, and copies.

    All arrays change at once: a call that runs meanwhile sees the old ones or the new ones.
    """

    #: Other names of the arrays in state dicts: those of torch's parametrizations.
    _aliases: ClassVar[dict[str, str]]

    def __init__(self, shape: tuple[int, ...], dim: int | None, dtype: np.dtype) -> None:
        self._shape, self._dim, self._dtype = shape, dim, dtype
        self._arrays: dict[str, np.ndarray] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return self._shape

    @property
    def dim(self) -> int | None:
        """The axis of the weight's rows."""
        return self._dim

    @property
    def dtype(self) -> np.dtype:
        """The parameters' type."""
        return self._dtype

    def _held(self) -> dict[str, np.ndarray]:
        return dict(self._arrays)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the arrays, by name."""
        raise NotImplementedError

    def _type_of(self, name: str) -> np.dtype:
        return self._dtype

    def _checked(self, name: str, value: Any) -> np.ndarray:
        shape = self._shapes()[name]
        checked = own_copy(name, value, shape, self._type_of(name))
        if checked is None:
            raise TypeError(f"{name}: got None, wanted an array of shape {shape}")
        return checked

    def _keep(self, checked: dict[str, Any]) -> None:
        with REPLACING:
            self._arrays = {**self._arrays, **checked}

    def _assign(self, name: str, value: Any) -> None:
        self._keep({name: self._checked(name, value)})

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True
    ) -> IncompatibleKeys:
        if isinstance(state_dict, Mapping):
            # An array under both of its names stays there twice, one of them unexpected.
            named = {}
            for key, value in state_dict.items():
                ours = self._aliases.get(key, key)
                named[key if ours in state_dict else ours] = value
            state_dict = named
        return super().load_state_dict(state_dict, strict)

    # ---- copying --------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[Any, ...]:
        own = {name: value for name, value in self.__dict__.items() if name[:1] != "_"}
        return _rebuild, (type(self), *self._settings(), self._held()), own or None

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        """Give back what a subclass, or its user, has added."""
        self.__dict__.update(attributes)


class WeightNorm(_Reparametrized):
    """A weight as lengths and directions: ``weight = weight_g * weight_v / ||weight_v||``.

    ``m()``, or ``m.weight``, is the weight. Calls are stateless: any number of threads may call it
    at once.

    Parameters
    ----------
    weight : array_like
        The weight to begin with: its directions are weight_v, its norms weight_g.
    dim : int, optional
        As for :func:`fastnorm.weight_norm`: 0 for linear layers and convolutions, None for one
        norm of all.
    dtype : dtype, optional
        Type of the parameters: float16, bfloat16 (where ml_dtypes is installed), float32 or
        float64. Default: the weight's.

    Attributes
    ----------
    weight_g, weight_v : ndarray
        They may be assigned to (what is assigned is converted) and changed in place: both take
        effect at the next call. So may `weight`, which sets both.

    Raises
    ------
    TypeError, ValueError
        As fastnorm.weight_norm.

    References
    ----------
    Salimans, Kingma: Weight Normalization, arXiv 1602.07868 (2016). The state dict is that of
    torch.nn.utils.weight_norm; the names of torch.nn.utils.parametrizations.weight_norm are taken
    too.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> m = fastnorm.WeightNorm(np.float32([[2, 2, 2, 2], [0, 2, 0, 0]]))
    >>> m.weight_g = [[8], [1]]
    >>> m()
    array([[4., 4., 4., 4.],
           [0., 1., 0., 0.]], dtype=float32)
    """

    _aliases: ClassVar[dict[str, str]] = {
        "parametrizations.weight.original0": "weight_g",
        "parametrizations.weight.original1": "weight_v",
    }

    def __init__(self, weight: Any, dim: int | None = 0, *, dtype: Any = None) -> None:
        array, kind = _as_weight(weight, dtype)
        norm = weight_norm(array, 1.0, dim, return_stats=True)[1]
        super().__init__(array.shape, None if dim is None else as_dim(dim, array.ndim), kind)
        self._keep({n: self._checked(n, a) for n, a in (("weight_g", norm), ("weight_v", array))})

    @property
    def weight_g(self) -> np.ndarray:
        """The lengths: of the weight's axes, with 1 in the place of all but `dim`."""
        return self._arrays["weight_g"]

    @weight_g.setter
    def weight_g(self, value: Any) -> None:
        self._assign("weight_g", value)

    @property
    def weight_v(self) -> np.ndarray:
        """The directions, of the weight's shape."""
        return self._arrays["weight_v"]

    @weight_v.setter
    def weight_v(self, value: Any) -> None:
        self._assign("weight_v", value)

    @property
    def weight(self) -> Any:
        """The weight. What is assigned to it is taken apart."""
        return self()

    @weight.setter
    def weight(self, value: Any) -> None:
        v = own_copy("weight", value, self._shape, self._dtype)
        if v is None:
            raise TypeError(f"weight: got None, wanted an array of shape {self._shape}")
        norm = weight_norm(v, 1.0, self._dim, return_stats=True)[1]
        self._keep({"weight_v": v, "weight_g": self._checked("weight_g", norm)})

    def parameters(self) -> dict[str, np.ndarray]:
        return self._held()

    def __call__(self, out: Any = None) -> Any:
        """The weight, in `out` if there is one."""
        now = self._arrays
        return weight_norm(now["weight_v"], now["weight_g"], self._dim, out=out)

    def forward(self) -> tuple[Any, tuple[Any, ...]]:
        """The weight, and what `backward` needs to go back from it.

        `saved` refers to the parameters themselves: do not change them in between.
        """
        v, g = self._arrays["weight_v"], self._arrays["weight_g"]
        w, norm = weight_norm(v, g, self._dim, return_stats=True)
        return w, (v, g, norm)

    def backward(self, dw: Any, saved: tuple[Any, ...]) -> dict[str, np.ndarray]:
        """The parameters' gradients by name, from the weight's gradient `dw`.

        weight_g's is float32 (float64 for float64 parameters), weight_v's of the parameters' type.
        """
        v, g, norm = unpacked(saved, 3)
        dv, dg = weight_norm_backward(dw, v, g, self._dim, norm=norm)
        return {"weight_g": dg, "weight_v": dv}

    def bake(self) -> np.ndarray:
        """The plain weight, for inference without this module."""
        return self()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        ndim, dim = len(self._shape), self._dim
        kept = () if dim is None else (*(1,) * dim, self._shape[dim], *(1,) * (ndim - dim - 1))
        return {"weight_g": kept, "weight_v": self._shape}

    def _settings(self) -> tuple[Any, ...]:
        return self._shape, self._dim, self._dtype, {}

    def __repr__(self) -> str:
        return f"WeightNorm({self._shape}, dim={self._dim}, dtype={self._dtype.name})"


class SpectralNorm(_Reparametrized):
    """A weight over its largest singular value, which power iteration follows.

    ``m()``, or ``m.weight``, is the weight. In training, as at first, each call improves the
    vectors weight_u and weight_v by `n_power_iterations`, whatever other threads do; in inference
    (``eval()``) nothing is changed.

    Parameters
    ----------
    weight : array_like
        The weight to begin with.
    n_power_iterations : int
        At least 1.
    eps : float
        As for :func:`fastnorm.spectral_norm`.
    dim : int
        The axis of the matrix's rows: 0 for linear layers and convolutions, 1 for transposed ones.
    dtype : dtype, optional
        Type of the weight, as for :class:`WeightNorm`. The vectors are float32, or float64.
    rng : int or numpy.random.Generator
        Where the vectors begin. They are improved 15 times before anybody uses them.

    Attributes
    ----------
    weight_orig, weight_u, weight_v : ndarray
        They may be assigned to (what is assigned is converted) and changed in place: both take
        effect at the next call. What is assigned to `weight` is weight_orig.
    training : bool
        Set by ``train()`` and ``eval()``.

    Raises
    ------
    TypeError, ValueError
        As fastnorm.spectral_norm.

    References
    ----------
    Miyato et al.: Spectral Normalization for Generative Adversarial Networks, arXiv 1802.05957
    (2018). The state dict is that of torch.nn.utils.spectral_norm; the names of
    torch.nn.utils.parametrizations.spectral_norm are taken too.

    Examples
    --------
    >>> import numpy as np, fastnorm
    >>> m = fastnorm.SpectralNorm(np.float32([[4, 0], [0, 1]])).eval()
    >>> m()
    array([[1.  , 0.  ],
           [0.  , 0.25]], dtype=float32)
    """

    _aliases: ClassVar[dict[str, str]] = {
        "parametrizations.weight.original": "weight_orig",
        "parametrizations.weight.0._u": "weight_u",
        "parametrizations.weight.0._v": "weight_v",
    }

    def __init__(
        self,
        weight: Any,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        dim: int = 0,
        *,
        dtype: Any = None,
        rng: Any = 0,
    ) -> None:
        array, kind = _as_weight(weight, dtype)
        rows = as_dim(dim, array.ndim)
        super().__init__(array.shape, rows, kind)
        self._training = True
        self.n_power_iterations = n_power_iterations
        self.eps = eps
        begin = {"weight_orig": array, **self._first_vectors(array, np.random.default_rng(rng))}
        self._keep({name: self._checked(name, value) for name, value in begin.items()})

    def _first_vectors(self, weight: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
        u, v = (unit_norm(rng.standard_normal(n)) for n in self._lengths())
        if np.any(weight):  # zeros would make zeros of them, for ever
            _, _, u, v = spectral_norm(weight, u, v, _FIRST_ITERATIONS, self.eps, self._rows())
        return {"weight_u": u, "weight_v": v}

    # ---- settings -------------------------------------------------------------------------------

    @property
    def n_power_iterations(self) -> int:
        """How often a call in training improves the vectors."""
        return self._iterations

    @n_power_iterations.setter
    def n_power_iterations(self, value: int) -> None:
        self._iterations = checks.as_count("n_power_iterations", value, 1, "a number")

    @property
    def eps(self) -> float:
        """What vectors are divided by where their norm is less."""
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps = checks.as_eps(value)

    @property
    def training(self) -> bool:
        """Whether a call improves the vectors."""
        return self._training

    def train(self, mode: bool = True) -> SpectralNorm:
        """Improve the vectors at each call from now on, or, with False, no more; the module."""
        self._training = bool(mode)
        return self

    def eval(self) -> SpectralNorm:
        """Change nothing at calls from now on; the module."""
        return self.train(False)

    # ---- arrays ---------------------------------------------------------------------------------

    @property
    def weight_orig(self) -> np.ndarray:
        """The weight as it is learnt."""
        return self._arrays["weight_orig"]

    @weight_orig.setter
    def weight_orig(self, value: Any) -> None:
        self._assign("weight_orig", value)

    @property
    def weight_u(self) -> np.ndarray:
        """The first left singular vector, so far as it is known."""
        return self._arrays["weight_u"]

    @weight_u.setter
    def weight_u(self, value: Any) -> None:
        self._assign("weight_u", value)

    @property
    def weight_v(self) -> np.ndarray:
        """The first right singular vector, so far as it is known."""
        return self._arrays["weight_v"]

    @weight_v.setter
    def weight_v(self, value: Any) -> None:
        self._assign("weight_v", value)

    @property
    def weight(self) -> Any:
        """The weight, as a call forms it. What is assigned to it is weight_orig."""
        return self()

    @weight.setter
    def weight(self, value: Any) -> None:
        self._assign("weight_orig", value)

    def parameters(self) -> dict[str, np.ndarray]:
        """The parameter, by name: the array itself. The vectors are none."""
        return {"weight_orig": self.weight_orig}

    # ---- calls ----------------------------------------------------------------------------------

    def __call__(self, out: Any = None) -> Any:
        """The weight, in `out` if there is one."""
        return self._normalised(self._training, out)[0]

    def forward(self) -> tuple[Any, tuple[Any, ...]]:
        """The weight, and what `backward` needs to go back from it.

        `saved` refers to weight_orig itself: do not change it in between.
        """
        return self._normalised(self._training)

    def backward(self, dw: Any, saved: tuple[Any, ...]) -> dict[str, np.ndarray]:
        """The gradient of weight_orig, by name, from the weight's gradient `dw`."""
        weight, u, v, sigma = unpacked(saved, 4)
        return {"weight_orig": spectral_norm_backward(dw, weight, u, v, sigma, self._rows())}

    def bake(self) -> np.ndarray:
        """The plain weight, for inference without this module; in training too, nothing changes."""
        return self._normalised(False)[0]

    def _normalised(self, improves: bool, out: Any = None) -> tuple[Any, tuple[Any, ...]]:
        """The weight, and what `backward` needs; `improves`: the vectors too, which are kept."""
        if not improves:
            return self._formed_of(self._arrays, 0, out)
        while True:  # again where another thread was first, whose vectors are to be improved then
            now = self._arrays
            y, saved = self._formed_of(now, self._iterations, out)
            with REPLACING:
                if self._arrays is now:
                    self._arrays = {**now, "weight_u": saved[1], "weight_v": saved[2]}
                    return y, saved

    def _formed_of(
        self, now: dict[str, np.ndarray], count: int, out: Any
    ) -> tuple[Any, tuple[Any, ...]]:
        """The same of these arrays, after so many iterations."""
        y, sigma, u, v = spectral_norm(
            now["weight_orig"], now["weight_u"], now["weight_v"], count, self._eps, self._rows(),
            out=out,
        )  # fmt: skip
        return y, (now["weight_orig"], u, v, sigma)

    # ---- what the base class asks for -----------------------------------------------------------

    def _rows(self) -> int:
        assert self._dim is not None
        return self._dim

    def _lengths(self) -> tuple[int, int]:
        """Of the two vectors."""
        rest = self._shape[: self._rows()] + self._shape[self._rows() + 1 :]
        return self._shape[self._rows()], math.prod(rest)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        rows, cols = self._lengths()
        return {"weight_orig": self._shape, "weight_u": (rows,), "weight_v": (cols,)}

    def _type_of(self, name: str) -> np.dtype:
        return self._dtype if name == "weight_orig" else checks.compute_type(self._dtype)

    def _settings(self) -> tuple[Any, ...]:
        more = {"_iterations": self._iterations, "_eps": self._eps, "_training": self._training}
        return self._shape, self._dim, self._dtype, more

    def __repr__(self) -> str:
        return (
            f"SpectralNorm({self._shape}, n_power_iterations={self._iterations}, eps={self._eps}, "
            f"dim={self._dim}, dtype={self._dtype.name})"
        )


def _as_weight(weight: Any, dtype: Any) -> tuple[np.ndarray, np.dtype]:
    """The weight as an ndarray of any storage type, and its parameters' type."""
    array = checks.as_floating("weight", interop.convert("weight", weight))
    return array, as_dtype(array.dtype.newbyteorder("=") if dtype is None else dtype)


def _rebuild(
    cls: type[_Self], shape: tuple[int, ...], dim: int | None, dtype: np.dtype,
    more: dict[str, Any], arrays: dict[str, np.ndarray],
) -> _Self:  # fmt: skip
    """Undo __reduce__; a subclass's constructor may take other arguments."""
    module = cls.__new__(cls)
    _Reparametrized.__init__(module, shape, dim, dtype)
    module.__dict__.update(more)
    module._keep({name: module._checked(name, array) for name, array in arrays.items()})
    return module
