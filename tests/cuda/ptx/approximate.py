"""The approximate functions: rounded from float64, then moved by as many ulps as a test asks for.

How far a device may be off is documented with each instruction in the PTX ISA; DOCUMENTED_ULPS has
it in units of the last place of float32. `ex2`, `lg2` and `tanh` of the device differ from one
architecture to the next, so a kernel must be right for every error up to these.
"""

import numpy as np

from .arithmetic import flush

DOCUMENTED_ULPS = {
    "ex2": 2,
    "lg2": 2,  # absolute, 2^-22, near 1
    "rcp": 1,
    "rsqrt": 2,
    "sqrt": 2,
    "div": 2,
    "sin": 2,  # absolute, 2^-20.5 within two pi
    "cos": 2,
    "tanh": 2**12,  # relative, 2^-11
}


def _reciprocal_root(value):
    return 1 / np.sqrt(value)


FUNCTIONS = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "rsqrt": _reciprocal_root,
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "div": np.divide,
}


class Approximation:
    """What is added to approximate results: `ulps` alike, or at random up to that with a seed.

    `ulps` is a number for every function, or a dict of numbers by opcode.
    """

    def __init__(self, ulps=0, seed=None):
        self.ulps = ulps
        self.random = None if seed is None else np.random.default_rng(seed)

    def __call__(self, opcode, known, flushing, *values):
        """The function that `opcode` names, of values of the type `known`."""
        if flushing:
            values = [flush(value) for value in values]
        exact = FUNCTIONS[opcode](*(value.astype(np.float64) for value in values))
        result = self._moved(opcode, exact.astype(known.dtype))
        return flush(result) if flushing else result

    def _moved(self, opcode, result):
        ulps = self.ulps.get(opcode, 0) if isinstance(self.ulps, dict) else self.ulps
        if not ulps:
            return result
        if self.random:
            ulps = self.random.integers(-abs(ulps), abs(ulps), np.shape(result), endpoint=True)
        unit = np.spacing(np.abs(result))
        moves = np.isfinite(result) & (result != 0)
        return np.where(moves, result + (ulps * unit).astype(result.dtype), result)[()]


def coarse_reciprocal(value, square):
    """`rcp.approx.ftz.f64` and `rsqrt.approx.ftz.f64`: the upper word alone, of about 20 bits."""
    value = flush(value)
    exact = _reciprocal_root(value) if square else np.reciprocal(value)
    bits = exact.view(np.uint64) & np.uint64(0xFFFF_FFFF_0000_0000)
    return flush(bits.view(np.float64))
