"""Plans run by the PTX interpreter on NumPy arrays, without ops, driver or device."""

import functools
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from fastnorm import accuracy
from fastnorm.cuda import compiler, plan

from .ptx import Kernel, Memory, launch

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
DTYPES["bfloat16"] = BFLOAT16
CAPABILITY = (9, 0)


@functools.cache
def ptx(spec, capability=CAPABILITY):
    return compiler.ptx_of(spec, capability)


@functools.cache
def kernel(spec):
    return Kernel(ptx(spec), compiler.entry_name(spec))


def name_of(array):
    return array.dtype.name


@dataclass
class Call:
    """Arrays by operand: rows as (rows, cols) arrays that may have a distance, parameters as
    (count, cols), the rest as they are."""

    arrays: dict
    misalign: int = 0
    #: div and mod of parameters whose rows differ.
    steps: dict = field(default_factory=dict)
    #: Distance of the rows of an operand, in elements.
    strides: dict = field(default_factory=dict)
    numbers: dict = field(default_factory=dict)

    @property
    def shape(self):
        return next(a.shape for name, a in self.arrays.items() if name in plan.ROW_OPERANDS)

    @property
    def types(self):
        return {name: name_of(array) for name, array in self.arrays.items()}

    def alignment(self):
        found = [16, self.misalign or 16]
        for name, array in self.arrays.items():
            rows = name in plan.ROW_OPERANDS and self.shape[0] > 1
            if rows or name in self.steps:
                found.append(self.stride(name) * array.itemsize)
        return int(np.gcd.reduce(found))

    def stride(self, name):
        return self.strides.get(name, self.shape[1])

    def per_row(self):
        return {name: name in self.steps for name in self.arrays}

    def plan(self, make, **options):
        rows, cols = self.shape
        return make(rows, cols, self.types, alignment=self.alignment(), per_row=self.per_row(),
                    **options)  # fmt: skip

    def run(self, planned, outputs, **options):
        """Launch the plan's steps; the results by name, and what each step did."""
        flat = {name: self.laid_out(name, array) for name, array in self.arrays.items()}
        for name, count, kind in planned.workspace:
            flat[name] = np.zeros(count, DTYPES[kind])
        fresh = [*outputs, *[name for name, *_ in planned.workspace]]
        shifts = {name: self.misalign // a.itemsize * a.itemsize for name, a in flat.items()}
        memory = Memory(flat, misalign=shifts, unwritten=fresh)
        rows, cols = self.shape
        values = {"rows": rows, "cols": cols, "eps": 1e-5, "offset": 0.0, **self.numbers}
        for name in self.arrays:
            values[f"{name}_stride"] = self.stride(name)
            values[f"{name}_div"], values[f"{name}_mod"] = self.steps.get(name, (1, 1))
        stats = []
        for step in planned.steps:
            given = [memory[name] if name in flat else values[name] for name in step.arguments]
            stats.append(launch(kernel(step.spec), step.grid, step.block, given, memory,
                                shared=step.shared, **options))  # fmt: skip
        return {name: self.gathered(name, memory.read(name)) for name in outputs}, stats

    def laid_out(self, name, array):
        if name not in plan.ROW_OPERANDS:
            return np.ascontiguousarray(array).reshape(-1)
        rows, cols = array.shape
        stride = self.stride(name)
        flat = np.zeros(max((rows - 1) * stride + cols, 0), array.dtype)
        self.rows_of(flat, name)[...] = array
        return flat

    def rows_of(self, flat, name):
        rows, cols = self.shape
        steps = (self.stride(name) * flat.itemsize, flat.itemsize)
        return np.lib.stride_tricks.as_strided(flat, (rows, cols), steps)

    def gathered(self, name, flat):
        if name not in plan.ROW_OPERANDS:
            return flat.reshape(self.arrays[name].shape)
        return self.rows_of(flat, name).copy()


# ---- results ------------------------------------------------------------------------------------

F2, F4, F8 = np.dtype("f2"), np.dtype("f4"), np.dtype("f8")
WIDE = np.longdouble


def compute_type(dtype):
    return F8 if dtype == F8 else F4


def random(shape, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def assert_near(got, want, precise=1e-6, terms=None):
    """Within `precise` of the scale of each row, or of `terms`, and half an ulp of a half type."""
    wide, dtype = got.astype(WIDE), got.dtype
    assert (np.isnan(wide) == np.isnan(want)).all()
    finite = np.isfinite(want)
    want = np.where(finite, want, 0)
    scale = terms if terms is not None else np.maximum(1, np.abs(want).max(-1, keepdims=True))
    allowed = precise * scale + np.zeros(want.shape)
    if dtype.itemsize == 2:
        allowed = allowed + 0.5 * accuracy.ulp(want.astype(float), dtype)
    error = np.abs(np.where(finite, wide, 0) - want)
    assert (error <= allowed).all(), (error / allowed).max()
