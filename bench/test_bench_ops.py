"""Every op, dtype and shape, with one thread and with two: ``pytest bench`` (pytest-benchmark).

Each call that was timed is checked afterwards, so that nothing wrong is ever called fast. Times are
never compared with a limit. A call goes through a lambda, which adds some 40 ns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import fastnorm
from fastnorm import _core, bench, cases, channels, contenders

THREADS = (1, 2)


@pytest.fixture(params=THREADS, ids=lambda n: f"{n}-threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """What the library may use; a skip where this machine has less."""
    before = fastnorm.get_num_threads()
    if request.param > before:
        pytest.skip(f"needs {request.param} CPUs, there are {before}")
    with fastnorm.num_threads(request.param):
        yield request.param


# There are more than a thousand of them: a fifth of a second each, not a second.
@pytest.mark.benchmark(max_time=0.2)
@pytest.mark.parametrize("shape", bench.SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("dtype", _core.DTYPES)
@pytest.mark.parametrize("op", [op for op in _core.OPS if op not in cases.CHANNELS])
def test_op(
    benchmark: Callable[..., Any], op: str, dtype: str, shape: tuple[int, ...], threads: int
) -> None:
    run(benchmark, op, dtype, shape, threads)


@pytest.mark.benchmark(max_time=0.2)
@pytest.mark.parametrize("shape", bench.IMAGES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", _core.DTYPES)
@pytest.mark.parametrize("op", cases.CHANNELS)
def test_op_of_channels(
    benchmark: Callable[..., Any], op: str, dtype: str, shape: tuple[int, ...], threads: int
) -> None:
    run(benchmark, op, dtype, shape, threads)


def run(
    benchmark: Callable[..., Any], op: str, dtype: str, shape: tuple[int, ...], threads: int
) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="NumPy has no bfloat16 of its own")
    case = cases.Case(op, shape, dtype)
    found = contenders.contenders(case, threads, providers=("fastnorm",))
    call = found.get("fastnorm out", found["fastnorm new"])
    benchmark.group = f"{op} {dtype} {case.name}"  # type: ignore[attr-defined]
    benchmark(eval(f"lambda: {call.statement}", call.names))
    assert case.largest_error(call.results()) <= cases.allowed_error(op, dtype)


def test_every_op_of_channels_is_timed() -> None:
    assert set(cases.CHANNELS.values()) == set(channels.OPS)
