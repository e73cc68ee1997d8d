"""The fake driver, which stands in for a device in every test that is not marked gpu."""

import functools
import gc
import os

import pytest

from fastnorm import _cuda

from . import driver as fakes


@pytest.fixture(scope="session", autouse=True)
def compiled_once():
    """Compiling is most of what these tests do: each kernel once, and no garbage is looked for
    among all that a session holds meanwhile."""
    from fastnorm.cuda import compiler

    compile_ = compiler.ptx_of

    @functools.cache
    def ptx_of(spec, capability):
        gc.disable()
        try:
            return compile_(spec, capability)
        finally:
            gc.enable()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "ptx_of", ptx_of)
        yield


@pytest.fixture(scope="session")
def driver_library(tmp_path_factory):
    """The fake driver's path."""
    return fakes.compiled(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="session")
def loaded_driver(driver_library):
    """The fake driver of two devices, as this process's."""
    if not _cuda.is_loaded():
        os.environ["FAKE_CUDA_DEVICES"] = "2"  # which it reads once
        _cuda.forget_failure()
        _cuda.load(str(driver_library))
        del os.environ["FAKE_CUDA_DEVICES"]
    assert _cuda.driver_path() == str(driver_library)
    return fakes.Driver(driver_library)


@pytest.fixture
def driver(loaded_driver):
    """The fake driver, which remembers nothing; no context is current before or after."""
    loaded_driver.reset()
    yield loaded_driver
    assert loaded_driver.library.fake_depth() == 0
    assert loaded_driver.library.fake_capture_mode() == 0
    assert loaded_driver.live("events") == 0
    loaded_driver.reset()


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Of each kernel that is compiled, by its entry: the PTX and its layout."""
    import fastnorm
    from fastnorm.cuda import compiler, launch, ops, plan

    found = {}
    compile_ = compiler.compile

    def compiled(spec, capability):
        image = compile_(spec, capability)
        found[image.entry] = image.code, "".join(plan.layout(spec))
        return image

    def forget():
        launch.clear()
        for name in ops.NAMES:
            fastnorm.cuda.op(name).clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "compile", compiled)
        patch.setenv("FASTNORM_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        forget()
        yield found
    forget()
