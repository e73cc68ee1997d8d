"""The errors of ops on channels, as fastnorm.accuracy_channels counts them, and the cases that are
timed: what fastnorm computes is within what is allowed, and what is wrong is not."""

import math

import numpy as np
import pytest

from fastnorm import accuracy, accuracy_channels, cases, contenders, reference_channels
from fastnorm.channels import OPS

SHAPES = (5, 6), (3, 64, 7), (2, 12, 4, 5), (2, 4, 3, 2, 5)


def results_of(case):
    return contenders.contenders(case, providers=("fastnorm",))["fastnorm new"].results()


def test_every_op_has_a_case():
    assert set(cases.CHANNELS.values()) == set(OPS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("op", cases.CHANNELS)
def test_cases_are_right(op, dtype, shape):
    case = cases.Case(op, shape, dtype)
    for contender in contenders.contenders(case, providers=("fastnorm", "numpy")).values():
        error = case.largest_error(contender.results())
        times = 1 if contender.provider == "fastnorm" else 10
        assert error <= times * cases.allowed_error(op, dtype), contender.name


@pytest.mark.parametrize("op", cases.CHANNELS)
def test_a_wrong_element_is_found(op):
    case = cases.Case(op, (3, 64, 4, 5), "float32")
    results = results_of(case)
    for k, result in enumerate(results):
        wrong = [r.copy() for r in results]
        at = tuple(n // 2 for n in result.shape)
        wrong[k][at] += 1e-3 * np.abs(result).max()
        assert case.largest_error(tuple(wrong)) > 1e-5, k
        wrong[k][at] = np.nan
        assert case.largest_error(tuple(wrong)) == math.inf, k


def test_running_statistics_are_put_back():
    """What a call in training changed: the second result is checked from where the first began."""
    case = cases.Case("batch_norm_training", (4, 8, 3), "float32")
    contender = contenders.contenders(case, providers=("fastnorm",))["fastnorm out"]
    first, second = contender.results(), contender.results()
    assert len(first) == 3
    for a, b in zip(first[1:], second[1:], strict=True):
        np.testing.assert_array_equal(a, b)
    before = case.arrays["running_mean"]
    assert not np.array_equal(first[1], before)
    assert accuracy_channels.running_error(
        first[1:], (before, case.arrays["running_var"]), case.x
    ) <= accuracy.bound(np.float32)
    # Two updates are not one.
    twice = contenders.contenders(case, providers=("fastnorm",))["fastnorm out"]
    eval(twice.statement, twice.names)
    eval(twice.statement, twice.names)
    found = tuple(memory for memory, _ in twice.changed)
    assert (
        accuracy_channels.running_error(found, (before, case.arrays["running_var"]), case.x) > 1e-3
    )


def test_units_of_errors(rng):
    """An error of y is counted in the unit's largest |xh|, and in chunks as at once."""
    x = rng.standard_normal((4, 6, 5)).astype(np.float32)
    weight, bias = rng.standard_normal((2, 6)).astype(np.float32)
    y = reference_channels.batch_norm(x, None, None, weight, bias, training=True)
    xh = reference_channels.batch_norm(x, None, None, training=True)
    y[1, 2, 3] += 1e-3
    largest = max(1, np.abs(xh[:, 2]).max())
    expected = 1e-3 / (abs(weight[2]) * largest + abs(bias[2]))
    found = accuracy_channels.batch_norm_error(y, x, None, weight, bias)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("op", [op for op in cases.CHANNELS if "adaptive" not in op])
def test_chunks(op, monkeypatch):
    case = cases.Case(op, (5, 6, 3, 4), "float32")
    results = results_of(case)
    whole = case.largest_error(results)
    monkeypatch.setattr(accuracy, "CHUNK", 70)
    assert case.largest_error(results) == pytest.approx(whole)
