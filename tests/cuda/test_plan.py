"""Plans: which kernels a call takes, for every width; no device and no compiler."""

import ast
import itertools
import math
from pathlib import Path

import pytest

from fastnorm.cuda import plan

TYPES = tuple(plan.SIZES)
WIDTHS = (*range(1, 2049), *range(2050, 70_001, 127), 4096, 8192, 16_384, 32_768, 65_536, 131_072)
#: Rows that are held in registers are read once: so many bytes of them at least.
READ_ONCE_BYTES = 64 << 10


def forward(rows, cols, kind="float32", alignment=16, rms=False, **more):
    types = {"x": kind, "weight": "float32", "bias": "float32", "y": kind}
    return plan.forward(rows, cols, types, alignment=alignment, rms=rms, **more)


def backward(rows, cols, kind="float32", alignment=16, rms=False, sums=True, **more):
    compute = plan.compute_type(kind)
    types = {"dy": kind, "x": kind, "weight": "float32", "mean": compute, "rstd": compute}
    types |= {"dx": kind}
    if sums:
        types |= {"dweight": compute, "dbias": compute}
    return plan.backward(rows, cols, types, alignment=alignment, rms=rms, **more)


def steps_of(rows, cols, kind, alignment):
    plans = forward(rows, cols, kind, alignment), backward(rows, cols, kind, alignment)
    return [step for each in plans for step in each.steps]


def test_it_imports_no_compiler():
    """Plans are made where there is no Numba."""
    tree = ast.parse(Path(plan.__file__).read_text())
    names = [
        node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
    ] + [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
         for alias in node.names]  # fmt: skip
    assert set(names) <= {"__future__", "math", "typing", "collections.abc"}


@pytest.mark.parametrize("kind", TYPES)
def test_every_width_is_covered_within_a_device_s_limits(kind):
    for cols, alignment in itertools.product(WIDTHS, (16, 8, 4, 2)):
        if alignment < plan.SIZES[kind]:
            continue
        for step in steps_of(1000, cols, kind, alignment):
            spec = step.spec
            assert 1 <= step.block <= plan.MAX_THREADS, (cols, spec)
            assert step.block == spec.threads * spec.rows
            assert step.block >= plan.WARP or spec.threads * spec.rows % plan.WARP == 0, spec
            assert 1 <= step.grid < 2**31
            assert spec.access <= 16
            assert cols % spec.elements == 0, "a chunk never lies half past a row's end"


@pytest.mark.parametrize("kind", TYPES)
def test_a_row_in_registers_fits_its_tile(kind):
    """Chunks of the tile reach the row's end, and no power of two less would."""
    for cols in WIDTHS:
        [step] = forward(1000, cols, kind).steps
        spec = step.spec
        if spec.kernel == "forward":
            assert spec.threads * spec.vectors * spec.elements >= cols
            assert spec.threads * (spec.vectors - 1) * spec.elements < cols


@pytest.mark.parametrize("kind", TYPES)
def test_rows_of_64_kb_are_read_once_by_16_bytes(kind):
    size = plan.SIZES[kind]
    for cols in range(16 // size, READ_ONCE_BYTES // size + 1, 16 // size):
        [step] = forward(100, cols, kind).steps
        assert step.spec.kernel == "forward", cols
        assert step.spec.elements * size == 16, cols


def test_a_row_s_kernel_does_not_depend_on_how_many_there_are():
    for cols in WIDTHS:
        specs = {step.spec for rows in (1, 2, 33, 10**6) for step in forward(rows, cols).steps}
        assert len(specs) == 1, cols


def test_specs_are_few():
    """A kernel takes a second to compile: widths share them."""
    specs = {step.spec for cols in range(8, 65_537, 8) for step in forward(100, cols).steps}
    assert len(specs) <= 64


@pytest.mark.parametrize("rows", [1, 7, 128, 4096, 32_768, 2**31 - 1, 2**33])
@pytest.mark.parametrize("cols", [1, 100, 768, 4096, 8192, 32_768, 100_000])
def test_all_rows_get_a_block(rows, cols):
    """Of the forward call; the grid ends at 2^31 - 1 blocks."""
    [step] = forward(rows, cols).steps
    if step.spec.kernel == "forward" and rows <= 2**31 - 1:
        assert step.grid * step.spec.rows >= rows
    assert step.grid >= 1


@pytest.mark.parametrize("cols", [8, 256, 768, 1024, 4096, 8192, 20_000])
def test_partial_sums_follow_from_the_shape_alone(cols):
    """And are little next to x and dy, which are read for them."""
    for rows in (1, 64, 4096, 32_768, 262_144):
        made = backward(rows, cols)
        assert made == backward(rows, cols)
        elements = sum(count for name, count, _ in made.workspace if name.endswith("partials"))
        assert elements <= max(rows * cols, 2 * cols), (rows, cols)
        assert rows < 32_768 or elements <= rows * cols // 25, (rows, cols)


def test_frozen_parameters_cost_no_sums():
    made = backward(4096, 1024, sums=False)
    assert len(made.steps) == 1
    assert not made.workspace


@pytest.mark.parametrize(("rows", "cols"), [(0, 5), (5, 0), (0, 0)])
def test_no_elements(rows, cols):
    """Statistics and sums are filled, where they have elements; nothing else is launched."""
    types = {"x": "float32", "y": "float32", "mean": "float32", "rstd": "float32"}
    made = plan.forward(rows, cols, types, alignment=16, rms=False)
    assert all(step.spec.kernel == "fill" for step in made.steps)
    assert len(made.steps) == (2 if rows else 0)
    made = backward(rows, cols)
    assert len(made.steps) == (2 if cols else 0)


@pytest.mark.parametrize("make", [forward, backward])
def test_arguments_and_layout_agree(make):
    for cols in (1, 96, 768, 20_000, 200_000):
        for step in make(100, cols).steps:
            names, kinds = plan.arguments(step.spec), plan.layout(step.spec)
            assert len(names) == len(kinds) == len(step.arguments)
            arrays = {name for name, _ in step.spec.types}
            assert {name for name, kind in zip(names, kinds, strict=True) if kind == "a"} == arrays


@pytest.mark.parametrize("alignment", [16, 8, 4, 2])
def test_what_lies_badly_is_moved_by_less(alignment):
    for kind in TYPES:
        if alignment >= plan.SIZES[kind]:
            [step] = forward(10, 1024, kind, alignment).steps
            assert step.spec.access <= max(alignment, plan.SIZES[kind])
            assert math.gcd(step.spec.elements, 1024) == step.spec.elements
