"""What all modules share: arrays by name, state dicts, comparison, copies on devices."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from . import checks, interop
from .memory import empty
from .threads import lock_across_forks

#: The attribute for copies of parameters on devices, which belong to no pickle.
COPIES = "_copies_on_devices"


#: Held while a module's arrays are replaced: some microseconds. One for all, so that a fork can
#: wait for it.
REPLACING = lock_across_forks()


class IncompatibleKeys(NamedTuple):
    """What `load_state_dict` passed over, as torch names it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class State:
    """Arrays under torch's key names.

    A module says what it holds (`parameters`, `_held`), what it is made of besides (`_settings`),
    how it takes a value for an array (`_checked`, which may raise), and where it puts what was
    checked (`_keep`, which may not).
    """

    #: Keys that a state dict may lack though it is strict; they stay as they are.
    _may_be_missing: ClassVar[tuple[str, ...]] = ()

    def parameters(self) -> dict[str, np.ndarray]:
        """The parameters there are, by name: the arrays themselves."""
        raise NotImplementedError

    def _held(self) -> dict[str, np.ndarray]:
        """All that a state dict has."""
        return self.parameters()

    def _settings(self) -> tuple[Any, ...]:
        """What the object is made of, but its arrays."""
        raise NotImplementedError

    def _checked(self, name: str, value: Any) -> Any:
        """A copy of `value` as the module holds it."""
        raise NotImplementedError

    def _keep(self, checked: dict[str, Any]) -> None:
        """Hold what `_checked` returned, all at once."""
        raise NotImplementedError

    # ---- state dicts ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of the parameters, and of what else is kept, under torch's key names."""
        return {name: array.copy() for name, array in self._held().items()}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True
    ) -> IncompatibleKeys:
        """Take the parameters from `state_dict`, as torch's module of this name saves them.

        Parameters
        ----------
        state_dict : mapping of str to array_like
            Values of any real type; they are converted, and copied.
        strict : bool
            Whether the keys must be exactly those of the parameters there are. Else what is
            missing stays as it is, and what is unknown is passed over.

        Returns
        -------
        missing_keys, unexpected_keys : list of str
            A named tuple; both are empty where `strict`.

        Raises
        ------
        KeyError
            If `strict` and keys are missing or unknown.
        TypeError, ValueError
            If a value does not fit. Nothing has been changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: got {type(state_dict).__name__}, wanted a mapping")
        held, got = self._held(), list(state_dict)
        missing = [name for name in held if name not in got]
        unexpected = [key for key in got if key not in held]
        if strict:
            missing = [name for name in missing if name not in self._may_be_missing]
            if missing or unexpected:
                raise KeyError(f"state_dict: got keys {sorted(got)}, wanted {sorted(held)}")
        loaded = {name: state_dict[name] for name in held if name in got}
        for name, value in loaded.items():
            if value is None:
                shape = held[name].shape
                raise TypeError(f"{name}: got None, wanted an array of shape {shape}")
        self._keep({name: self._checked(name, value) for name, value in loaded.items()})
        return IncompatibleKeys(missing, unexpected)

    # ---- copies on devices ----------------------------------------------------------------------

    def _brought(
        self, name: str, array: np.ndarray | None, x: Any, copies: dict[Any, Any] | None = None
    ) -> Any:
        """An array where x is: itself, or a copy on x's device (see LayerNorm). `copies` are those
        it may be found among, at first the module's."""
        if array is None or type(x) is np.ndarray or not interop.is_on_cuda(x):
            return array
        kept = self.__dict__.setdefault(COPIES, {}) if copies is None else copies
        place = importlib.import_module(".cuda.parameters", __package__)
        return place.beside(kept, name, array, x)

    # ---- comparing ------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        assert isinstance(other, State)
        mine, others = self._held(), other._held()
        return (
            self._settings() == other._settings()
            and mine.keys() == others.keys()
            and all(np.array_equal(array, others[name]) for name, array in mine.items())
        )

    __hash__ = None  # type: ignore[assignment]


def own_copy(name: str, value: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
    """A copy in aligned memory of its own, so that nobody else's change reaches it."""
    checked = checks.as_parameter(name, interop.convert(name, value), shape, dtype)
    if checked is None:
        return None
    parameter = empty(checked.shape, checked.dtype)
    parameter[...] = checked
    return parameter


def as_dtype(dtype: Any) -> np.dtype:
    """A type that parameters can be of."""
    wanted = "wanted float16, bfloat16 (with ml_dtypes installed), float32 or float64"
    try:
        kind = checks.as_result_type(interop.convert("dtype", dtype))
    except TypeError:
        raise TypeError(f"dtype: got {dtype!r}, {wanted}") from None
    # Bits that NumPy does not take for numbers would be no parameters to work with.
    if dtype is None or kind in (checks.INT8, interop.BITS):
        raise TypeError(f"dtype: got {dtype!r}, {wanted}")
    return kind


def unpacked(saved: Any, count: int) -> tuple[Any, ...]:
    """What forward returned as the second of its results."""
    if not isinstance(saved, (tuple, list)) or len(saved) != count:
        got = "None" if saved is None else type(saved).__name__
        raise TypeError(f"saved: got {got}, wanted what forward returned, a tuple of {count}")
    return tuple(saved)


def shape_of(x: Any) -> tuple[int, ...]:
    """x's shape, wherever x lies and whatever it is."""
    if type(x) is np.ndarray:
        return x.shape
    return tuple(x.shape) if interop.is_on_cuda(x) else np.shape(interop.convert("x", x))


def gradients(dx: Any, dweight: Any, dbias: Any = None) -> tuple[Any, dict[str, np.ndarray]]:
    """What `backward` returns: dx, and the gradients of the parameters there are, by name."""
    named = {}
    if dweight is not None:
        named["weight"] = dweight
    if dbias is not None:
        named["bias"] = dbias
    return dx, named


def present(named: dict[str, Any]) -> dict[str, np.ndarray]:
    """What is not None."""
    return {name: array for name, array in named.items() if array is not None}
