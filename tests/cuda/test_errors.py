"""What cannot be done on a device: said by name, with what was wanted, before any launch."""

import numpy as np
import pytest

import fastnorm
from fastnorm import _core, dispatch

from ..helpers import child
from ..helpers.arguments import valid

pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
from . import libraries
from .libraries import CPUTensor, Exporter, Interface, Tensor, placed

OPS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "adaptive_layer_norm")
BACKWARD = tuple(f"{op}_backward" for op in OPS)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, driver):
    """The libraries, and a driver on which nothing has been launched at the end."""
    libraries.install(monkeypatch)
    yield
    assert driver.launches() == []


def on_device(arguments, kind=Tensor, device=0):
    """The ndarrays among arguments, as arrays of a device."""
    return {
        name: kind(placed(value), device) if isinstance(value, np.ndarray) else value
        for name, value in arguments.items()
    }


def spoilt(op, exception, name, change, *words, kind=Tensor):
    """`op` with the argument `name` changed must raise; its message begins with the name."""
    arguments = on_device(valid(op), kind)
    arguments |= change(arguments) if callable(change) else change
    with pytest.raises(exception) as caught:
        getattr(fastnorm, op)(**arguments)
    message = str(caught.value)
    assert message.startswith(f"{name}: got "), message
    for word in ("wanted", *words):
        assert word in message


def arrays_of(op):
    return [name for name, value in valid(op).items() if isinstance(value, np.ndarray)]


def main_of(op):
    return "sum" if "sum" in valid(op) else "x"


CASES = [(op, name) for op in OPS + BACKWARD for name in arrays_of(op) if name != main_of(op)]


@pytest.mark.parametrize(("op", "name"), CASES)
def test_arrays_of_the_host_beside_those_of_a_device(op, name):
    value = valid(op)[name]
    spoilt(op, TypeError, name, {name: value}, "ndarray", "host memory", "CUDA device 0",
           f"where {main_of(op)} is")  # fmt: skip
    spoilt(op, TypeError, name, {name: value.tolist()}, "list")
    spoilt(op, TypeError, name, {name: CPUTensor(placed(value))}, "cpu")


@pytest.mark.parametrize(("op", "name"), CASES)
def test_arrays_of_several_devices(op, name):
    other = Tensor(placed(valid(op)[name]), 1)
    spoilt(op, ValueError, name, {name: other}, "device 1", "device 0")


@pytest.mark.parametrize("op", [op for op in OPS + BACKWARD if main_of(op) == "x"])
def test_host_calls_with_arrays_of_a_device(op):
    """The main array decides; what lies on a device beside it is refused by name."""
    for name in arrays_of(op):
        if name == "x":
            continue
        arguments = valid(op)
        arguments[name] = Interface(placed(arguments[name]))
        with pytest.raises(TypeError, match=rf"^{name}: .*CUDA.*wanted one in host memory"):
            getattr(fastnorm, op)(**arguments)


@pytest.mark.parametrize("op", sorted(set(_core.OPS) - {*OPS, *BACKWARD}))
def test_ops_of_the_host_alone(op):
    with pytest.raises(TypeError, match=f"^{op}: got an array on a CUDA device, wanted .*host"):
        getattr(fastnorm, op)(**on_device(valid(op)))


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "layer_norm_backward",
                                "rms_norm_backward"])  # fmt: skip
@pytest.mark.parametrize("name", ["lengths", "mask"])
def test_rows_count_as_a_whole(op, name):
    spoilt(op, TypeError, name, {name: np.ones((2, 3), int)}, "None", "CUDA device")


@pytest.mark.parametrize("op", OPS)
def test_int8_is_of_the_host_alone(op):
    spoilt(op, TypeError, "dtype", {"dtype": np.int8}, "int8", "float16, bfloat16, float32")


@pytest.mark.parametrize("op", ["layer_norm_backward", "rms_norm_backward"])
def test_from_output_is_of_the_host_alone(op):
    spoilt(op, TypeError, "from_output", {"from_output": True}, "x, mean and rstd")


@pytest.mark.parametrize("op", [op for op in OPS + BACKWARD if not op.startswith("adaptive")])
@pytest.mark.parametrize("axis", [0, 1, (0, 2)])
def test_axes_that_are_not_the_last_ones(op, axis):
    spoilt(op, ValueError, "axis", {"normalized_shape": None, "axis": axis}, str(axis), "last axes")


@pytest.mark.parametrize("op", OPS + BACKWARD)
def test_rows_that_are_not_contiguous(op):
    main = main_of(op)
    wide = placed(np.ones((2, 3, 8), np.float32))
    spoilt(op, ValueError, main, {main: Tensor(wide[..., ::2])}, f"{main}.contiguous()")
    # Rows at two distances.
    many = placed(np.ones((2, 4, 4), np.float32))
    spoilt(op, ValueError, main, {main: Tensor(many[:, :3])}, f"{main}.contiguous()")


def test_a_contiguous_copy_is_asked_for_in_the_librarys_words():
    wide = placed(np.ones((6, 8), np.float32))[:, ::2]
    for kind, words in (
        (libraries.ndarray, r"cupy.ascontiguousarray\(x\)"),
        (Interface, "a contiguous array"),
    ):
        with pytest.raises(ValueError, match=f"^x: got .*{words}$"):
            fastnorm.layer_norm(kind(wide), out=kind(placed(np.ones((6, 4), np.float32))))


@pytest.mark.parametrize("op", OPS)
def test_parameters_that_are_not_contiguous(op):
    name = "scale" if op.startswith("adaptive") else "weight"
    shape = (2, 8) if name == "scale" else (8,)
    wide = placed(np.ones(shape, np.float32))[..., ::2]
    spoilt(op, ValueError, name, {name: Tensor(wide)}, f"{name}.contiguous()")


@pytest.mark.parametrize("op", OPS + BACKWARD)
def test_shapes_that_do_not_fit(op):
    for name in arrays_of(op):
        if name in ("x", "sum"):
            continue
        spoilt(op, ValueError, name, {name: Tensor(placed(np.ones((5, 7), np.float32)))}, "(5, 7)")
    spoilt(op, ValueError, "normalized_shape", {"normalized_shape": 9}, "(9,)", "(2, 3, 4)")


@pytest.mark.parametrize("op", OPS)
def test_the_words_for_shapes_are_the_hosts(op):
    """Whatever the CPU refuses is refused in the same words."""
    for change in (
        {"normalized_shape": 9},
        {"normalized_shape": "ab"},
        {"eps": -1.0},
        {"eps": "x"},
        {"activation": "tanh"},
        {"activation": 3},
        {"dtype": "int32"},
        {"dtype": "nonsense"},
    ):
        arguments = valid(op) | change
        with pytest.raises((TypeError, ValueError)) as wanted:
            getattr(fastnorm, op)(**arguments)
        with pytest.raises(type(wanted.value)) as got:
            getattr(fastnorm, op)(**on_device(arguments))
        assert str(got.value).replace("CUDA", "") == str(wanted.value)


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "rms_norm_backward"])
def test_offsets_that_are_no_numbers(op):
    spoilt(op, TypeError, "offset", {"offset": "1"}, "a number")
    spoilt(op, ValueError, "offset", {"offset": float("inf")}, "finite")


@pytest.mark.parametrize("op", BACKWARD)
def test_masks_of_outputs(op):
    spoilt(op, ValueError, "output_mask", {"output_mask": (True,)}, "truth values")


@pytest.mark.parametrize("op", OPS + BACKWARD)
@pytest.mark.parametrize("kind", ["int64", "complex64", "bool", "uint16"])
def test_types_that_are_not_computed(op, kind):
    main = main_of(op)
    array = libraries.ndarray(np.ones((2, 3, 4), kind))
    spoilt(op, TypeError, main, {main: array}, kind, kind=libraries.ndarray)


@pytest.mark.parametrize("op", OPS)
def test_out(op):
    def with_out(array, **more):
        return {"out": array, **more}

    spoilt(op, TypeError, "out", with_out(np.ones((2, 3, 4), np.float32)), "host memory")
    spoilt(op, TypeError, "out", with_out(Tensor(placed(np.ones((2, 3, 4), np.float16)))),
           "float16", "float32, the type of the result")  # fmt: skip
    spoilt(op, ValueError, "out", with_out(Tensor(placed(np.ones((6, 4), np.float32)))), "(6, 4)")
    repeated = np.broadcast_to(placed(np.ones(4, np.float32)), (2, 3, 4))
    spoilt(op, ValueError, "out", with_out(Tensor(repeated)), "a place of its own")
    fixed = placed(np.ones((2, 3, 4), np.float32))
    fixed.flags.writeable = False
    spoilt(op, ValueError, "out", with_out(Interface(fixed)), "read-only", kind=Interface)


@pytest.mark.parametrize("op", OPS)
def test_out_that_overlaps(op):
    buffer = placed(np.ones(100, np.float32))
    shifted = Tensor(buffer[4:28].reshape(2, 3, 4))
    x = Tensor(buffer[:24].reshape(2, 3, 4))
    spoilt(op, ValueError, "out", {"x": x, "out": shifted}, "overlaps x", "memory of its own")
    if "residual" in valid(op):
        spoilt(op, ValueError, "out", lambda a: {"out": a["residual"]}, "overlaps residual")
        both = Tensor(placed(np.ones((2, 3, 4), np.float32)))
        spoilt(op, ValueError, "out", {"out": both, "sum_out": both}, "overlaps sum_out")
        spoilt(op, ValueError, "sum_out", {"x": x, "sum_out": shifted}, "overlaps x")


@pytest.mark.parametrize("name", ["gate", "sum_out"])
def test_what_goes_with_a_residual(name):
    x = np.ones((2, 3, 4), np.float32)
    value = x if name == "sum_out" else x[:, 0]
    alone = {"residual": None, "gate": None, name: Tensor(placed(value))}
    spoilt("adaptive_layer_norm", TypeError, name, alone, "both or neither")
    for op in ("add_layer_norm", "add_rms_norm"):
        spoilt(op, TypeError, "residual", {"residual": None})


@pytest.mark.parametrize("op", BACKWARD)
def test_statistics(op):
    for name in ("mean", "rstd"):
        if name not in valid(op):
            continue
        spoilt(op, TypeError, name, {name: None}, "an array")
        spoilt(op, TypeError, name, {name: Tensor(placed(np.ones((2, 3), np.float16)))},
               "float16", "float32")  # fmt: skip
        spoilt(op, ValueError, name, {name: Tensor(placed(np.ones(6, np.float32)))}, "(2, 3)")


@pytest.mark.parametrize("kind", [Interface, Exporter])
def test_libraries_that_are_not_known_make_no_results(kind):
    pytest.importorskip("numba", reason="numba is not installed")  # the kernel comes first
    arguments = on_device(valid("layer_norm"), kind)
    with pytest.raises(TypeError, match=r"^out: got None for a \w+, .*wanted an array to write to"):
        fastnorm.layer_norm(**arguments)


def test_tensors_that_require_grad():
    x = Tensor(placed(np.ones((3, 4), np.float32)))
    x.requires_grad = True
    with pytest.raises(TypeError, match=r"^x: got a tensor that requires grad, wanted x\.detach"):
        fastnorm.layer_norm(x)


def test_modules():
    norm = fastnorm.LayerNorm(4)
    x = Tensor(placed(np.ones((3, 4), np.float32)))
    with pytest.raises(TypeError, match=r"^x: got a Exporter, wanted an array of torch, CuPy or"):
        norm(Exporter(placed(np.ones((3, 4), np.float32))))
    with pytest.raises(ValueError, match=r"^normalized_shape: "):
        norm(Tensor(placed(np.ones((3, 5), np.float32))))
    with pytest.raises(ValueError, match=r"^x: got shape \(3, 4\), wanted \(N, 3, \.\.\.\)"):
        fastnorm.LayerNorm2d(3)(x)
    with pytest.raises(ValueError, match=r"^axis: .*last axes"):
        fastnorm.LayerNorm2d(3)(Tensor(placed(np.ones((2, 3, 4), np.float32))))


@pytest.mark.parametrize("op", OPS + BACKWARD)
def test_explain_raises_what_the_call_raises(op):
    arguments = on_device(valid(op)) | {"normalized_shape": 9}
    with pytest.raises(ValueError, match=r"^normalized_shape: got \(9,\)"):
        fastnorm.explain(op, **arguments)


# ---- without a driver, a device, a compiler ------------------------------------------------------

CALL = """
    import numpy as np, fastnorm

    class Array:
        def __init__(self, values):
            self.values = np.asarray(values, np.float32)
        @property
        def __cuda_array_interface__(self):
            return self.values.__array_interface__ | {"version": 3, "stream": None}

    x = np.ones((3, 4), np.float32)
    y = fastnorm.layer_norm(x)
    def attempt():
        try:
            fastnorm.layer_norm(Array(x), out=Array(x))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        raise AssertionError("no error")
    said = attempt()
    assert attempt() == said
    assert np.array_equal(fastnorm.layer_norm(x), y)
    assert fastnorm.show_config("dicts")["cuda"]["available"] is False
    print(said)
    print(fastnorm.show_config("dicts")["cuda"]["why_not"])
"""


def test_no_driver(tmp_path):
    said, why = child.output(CALL, FASTNORM_CUDA_DRIVER=str(tmp_path / "none.so")).splitlines()
    assert said.startswith("DriverError: the CUDA driver could not be loaded: ")
    assert why == said.removeprefix("DriverError: ")


def test_no_device(driver_library):
    said, why = child.output(
        CALL, FASTNORM_CUDA_DRIVER=str(driver_library), FAKE_CUDA_DEVICES="0"
    ).splitlines()
    assert "finds no CUDA device" in said
    assert why in said


def test_a_driver_that_does_not_start(driver_library):
    said, _ = child.output(
        CALL, FASTNORM_CUDA_DRIVER=str(driver_library), FAKE_CUDA_FAIL="cuInit:999"
    ).splitlines()
    assert said.startswith("DriverError: ")
    assert "999" in said


def test_no_compiler(driver_library, tmp_path):
    """Where Numba cannot be imported."""
    without = 'import sys; sys.modules["numba"] = None\n' + CALL.replace("\n    ", "\n")
    said, why = child.output(
        without, FASTNORM_CUDA_DRIVER=str(driver_library), FASTNORM_CACHE_DIR=str(tmp_path)
    ).splitlines()
    assert "umba" in said
    assert "umba" in why


def test_calls_of_the_host_do_not_look_for_a_driver(tmp_path):
    """Not even those of tensors and of arrays with DLPack."""
    child.output(f"""
        import os, sys
        os.environ["FASTNORM_CUDA_DRIVER"] = {str(tmp_path / "none.so")!r}
        import numpy as np, fastnorm
        x = np.ones((3, 4), np.float32)
        class Exporter:
            def __dlpack__(self, **options): return x.__dlpack__(**options)
            def __dlpack_device__(self): return x.__dlpack_device__()
        fastnorm.layer_norm(Exporter())
        fastnorm.layer_norm([[1.0, 2.0]])
        fastnorm.LayerNorm(4)(Exporter())
        fastnorm.explain("layer_norm", x)
        assert not [n for n in sys.modules if n.startswith(("fastnorm.cuda", "fastnorm._cuda"))]
    """)


def test_every_op_is_here_or_there():
    from fastnorm.cuda import ops
    from fastnorm.cuda.signatures import CHANNELS

    of_rows = set(ops.NAMES) - set(CHANNELS)
    assert {*OPS, *BACKWARD} == of_rows
    assert of_rows <= set(dispatch.CALLS)
