"""What has a GPU is paid for by those who use one: imports, the driver, work on the host."""

import json

import pytest

from ..helpers import child

ABSENT = ("numba", "llvmlite", "torch", "cupy", "triton", "fastnorm.cuda", "fastnorm._cuda")


def test_import_loads_nothing_for_devices():
    found = child.output(f"""
        import json, sys, fastnorm
        print(json.dumps([name for name in sys.modules if name.startswith({ABSENT})]))
    """)
    assert json.loads(found) == []


def test_calls_of_the_host_load_nothing_for_devices():
    found = child.output(f"""
        import json, sys, numpy as np, fastnorm
        x = np.ones((3, 4), np.float32)
        for array in (x, x.astype(np.float16), x.tolist(), memoryview(x), x.T, x.view(np.recarray)):
            fastnorm.layer_norm(array)
        _, mean, rstd = fastnorm.layer_norm(x, return_stats=True)
        fastnorm.layer_norm_backward(x, x.copy("F"), 4, mean, rstd)
        fastnorm.add_rms_norm(x, x)
        norm = fastnorm.LayerNorm(4)
        norm.backward(*norm.forward(x))
        norm(x.tolist())
        fastnorm.explain("rms_norm", x)
        try:
            fastnorm.layer_norm(x, weight=x[:2])
        except ValueError:
            pass
        print(json.dumps([name for name in sys.modules if name.startswith({ABSENT})]))
    """)
    assert json.loads(found) == []


def test_the_extension_loads_no_driver(tmp_path):
    """Neither at import nor to look at an array; a missing one is no error before a call."""
    child.output(f"""
        import os
        os.environ["FASTNORM_CUDA_DRIVER"] = {str(tmp_path / "none.so")!r}
        import fastnorm.cuda
        from fastnorm import _cuda
        assert not _cuda.is_device_array([1.0])
        assert not _cuda.is_loaded()
        assert not fastnorm.cuda.is_available()
        assert "none.so" in fastnorm.cuda.why_not()
    """)


def test_the_package_for_devices_imports_no_compiler():
    """A warm process finds its kernels on disk, and pays for no compiler."""
    found = child.output("""
        import json, sys, fastnorm.cuda
        print(json.dumps([name for name in sys.modules if name.startswith(("numba", "llvmlite"))]))
    """)
    assert json.loads(found) == []


def test_a_warm_process_compiles_nothing(driver_library, tmp_path):
    pytest.importorskip("numba", reason="numba, which compiles the kernels, is not installed")
    from fastnorm.cuda import compiler

    if compiler.available():
        pytest.skip(compiler.available())
    code = """
        import sys, numpy as np, fastnorm
        class Array:
            def __init__(self, values):
                self.values = np.asarray(values, np.float32)
            @property
            def __cuda_array_interface__(self):
                return self.values.__array_interface__ | {"version": 3, "stream": None}
        x = np.ones((3, 4), np.float32)
        fastnorm.layer_norm(Array(x), out=Array(x))
        print("numba" in sys.modules)
    """
    environment = {"FASTNORM_CUDA_DRIVER": driver_library, "FASTNORM_CACHE_DIR": tmp_path}
    environment = {name: str(value) for name, value in environment.items()}
    assert child.output(code, **environment) == "True"
    assert child.output(code, **environment) == "False"


@pytest.mark.parametrize("driver", ["none.so", "broken.so"])
def test_work_on_the_host_is_untouched_by_a_driver_that_does_not_work(driver, tmp_path):
    (tmp_path / "broken.so").write_bytes(b"\x7fELF, and nothing more")
    child.output(f"""
        import os
        os.environ["FASTNORM_CUDA_DRIVER"] = {str(tmp_path / driver)!r}
        import numpy as np, fastnorm, fastnorm.cuda
        assert not fastnorm.cuda.is_available()
        x = np.arange(12, dtype=np.float32).reshape(3, 4)
        y = fastnorm.layer_norm(x)
        assert np.allclose(y, fastnorm.reference.layer_norm(x), atol=1e-6)
        config = fastnorm.show_config("dicts")["cuda"]
        assert config["driver"] is None and config["devices"] == [] and config["why_not"]
    """)


def test_a_forked_child_of_a_process_that_used_a_device_works_on_the_host(driver_library):
    """And says why it cannot work on the device."""
    done = child.output(
        """
        import os, sys, numpy as np, fastnorm
        from fastnorm import _cuda
        _cuda.load()
        x = np.ones((3, 4), np.float32)
        fastnorm.layer_norm(x)
        child = os.fork()
        if not child:
            fastnorm.layer_norm(x)
            try:
                _cuda.load()
            except RuntimeError as error:
                os._exit(7 if "fork" in str(error) else 1)
            os._exit(1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
        FASTNORM_CUDA_DRIVER=str(driver_library),
    )
    assert done == "7"
