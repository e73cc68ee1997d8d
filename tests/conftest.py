"""Options and fixtures that every test may use."""

import os

# Tests split calls into more parts than there are cores. Threads that spin while they wait would
# take the cores from those that work; this is read when OpenMP is loaded, so it comes first.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import pytest

import fastnorm
from fastnorm import _core


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the whole sweep of test_accuracy.py")
    parser.addoption("--gpu", action="store_true", help="the tests marked gpu, and no others")


def pytest_collection_modifyitems(config, items):
    """A process has one CUDA driver: the device's own for tests marked gpu, a fake for the rest."""
    asked = config.getoption("--gpu")
    wanted = [item for item in items if (item.get_closest_marker("gpu") is not None) == asked]
    if asked:
        config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
        items[:] = wanted
        return
    skip = pytest.mark.skip(reason="runs on a CUDA device: make test-gpu")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


def pytest_report_header():
    isas = [f"{n}{'' if _core.isa_supported(n) else ' (not here)'}" for n in _core.isa_names()]
    return f"fastnorm: {fastnorm.__file__}, isas: {', '.join(isas)}, active: {_core.isa_active()}"


@pytest.fixture
def full(request):
    """Whether --full was asked for."""
    return request.config.getoption("--full")


@pytest.fixture
def rng():
    return np.random.default_rng(20240229)


@pytest.fixture(params=_core.COMPUTE_DTYPES)
def dtype(request):
    """Every x type, in turn."""
    return np.dtype(request.param)


@pytest.fixture(params=_core.isa_names())
def isa(request):
    """Every instruction set, selected in turn. test_dispatch.py fails where none can run."""
    name, before = request.param, _core.isa_active()
    if not _core.isa_supported(name):
        pytest.skip(f"this CPU lacks {name}")
    _core.select_isa(name)
    yield name
    _core.select_isa(before)


@pytest.fixture
def partition():
    """A function that splits every call into so many parts; undone after the test."""
    yield _core.force_partition
    _core.force_partition(0)
