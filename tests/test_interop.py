"""Inputs that are not ndarrays: read where they lie, refused by name, results of the same kind."""

import array
import ctypes
import sys

import numpy as np
import pytest

import fastnorm
from fastnorm import channels, dispatch, interop, weights

from .helpers import child
from .helpers.arrays import assert_same_bits

ROWS = np.random.default_rng(7).standard_normal((5, 12)).astype(np.float32)


def address(a):
    return a.__array_interface__["data"][0]


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed")


@pytest.fixture
def pyarrow():
    return pytest.importorskip("pyarrow", reason="pyarrow is not installed")


@pytest.fixture(params=[True, False], ids=["ml_dtypes", "no ml_dtypes"])
def bfloat16(request, monkeypatch):
    """The type of bfloat16 arrays, with ml_dtypes and without it."""
    if request.param:
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    monkeypatch.setattr(interop, "bfloat16", lambda: None)
    return interop.BITS


# ---- what is left alone --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [
    None, 1, 2.5, True, "x", b"x", np.float32(1), ROWS, np.ma.array(ROWS), [1.0, 2.0], (1, 2),
    memoryview(ROWS), array.array("f", [1, 2]), bytearray(8), object(), {}, range(3),
])  # fmt: skip
def test_what_numpy_knows_is_not_foreign(value):
    assert not interop.is_foreign(value)
    assert interop.convert("x", value) is value


def test_run_hands_on_what_is_not_foreign():
    given = (ROWS, [1.0], None, 1e-5)
    result = object()

    def call(*args):
        assert all(a is b for a, b in zip(args, given, strict=True))
        return result

    assert interop.run(call, ("x", "weight", "out", "eps"), *given) is result


@pytest.mark.parametrize("source", [
    memoryview(ROWS), memoryview(ROWS).toreadonly(), array.array("d", range(12)),
    memoryview(bytearray(48)).cast("f"),
], ids=["memoryview", "read-only", "array.array", "bytearray"])  # fmt: skip
def test_buffers(source):
    a = np.asarray(source)
    assert address(interop.to_ndarray("x", source)) == address(a)
    assert_same_bits(fastnorm.layer_norm(source), fastnorm.layer_norm(a))


def test_nothing_is_imported_for_plain_arrays():
    done = child.output("""
        import sys, numpy as np, fastnorm
        fastnorm.layer_norm(np.ones((4, 3), np.float32).T, weight=[1.0, 2.0, 3.0, 4.0])
        print(sorted({"torch", "pyarrow", "ml_dtypes"} & set(sys.modules)))
    """)
    assert done == "[]"


def test_bfloat16_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    interop.bfloat16.cache_clear()
    try:
        assert interop.bfloat16() is None
        assert interop.bfloat16_or_bits() == interop.BITS
        assert interop.is_bfloat16(interop.BITS)
        assert not interop.is_bfloat16(np.dtype(np.uint16))
    finally:
        interop.bfloat16.cache_clear()


def test_bfloat16_with_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert interop.bfloat16() == interop.bfloat16_or_bits() == ml_dtypes.bfloat16
    assert interop.is_bfloat16(np.dtype(ml_dtypes.bfloat16))
    assert not interop.is_bfloat16(np.dtype(np.float16))


# ---- DLPack --------------------------------------------------------------------------------------


_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class Exporter:
    """An array of another library, from before DLPack 1.0; of another type code, if asked for."""

    def __init__(self, a, device=1, code=None):
        self.a, self.device, self.code = a, device, code

    def __dlpack_device__(self):
        return self.device, 0

    def __dlpack__(self):
        capsule = self.a.__dlpack__()
        if self.code is not None:
            # After the pointer come device type, device id and ndim.
            at = _pointer_of(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p) + 3 * 4
            ctypes.c_uint8.from_address(at).value = self.code
        return capsule


class VersionedExporter(Exporter):
    """As libraries from DLPack 1.0 on have it."""

    def __dlpack__(self, **options):
        return self.a.__dlpack__(**options)


@pytest.mark.parametrize("kind", [Exporter, VersionedExporter])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i8"])
@pytest.mark.parametrize("layout", [np.s_[:], np.s_[::2], np.s_[:, 3:9], np.s_[0], np.s_[:0]])
def test_dlpack(kind, dtype, layout):
    a = ROWS.astype(dtype)[layout]
    assert interop.is_foreign(kind(a))
    got = interop.to_ndarray("x", kind(a))
    assert type(got) is np.ndarray
    assert got.dtype == a.dtype
    np.testing.assert_array_equal(got, a)
    assert not a.size or address(got) == address(a)


def test_dlpack_keeps_the_memory_alive():
    got = interop.to_ndarray("x", Exporter(ROWS.copy()))
    assert np.array_equal(got, ROWS)


@pytest.mark.parametrize("layout", [np.s_[:], np.s_[::2, 3:], np.s_[2], np.s_[:0]])
def test_dlpack_bfloat16(bfloat16, layout):
    bits = (ROWS.view(np.uint32) >> 16).astype(np.uint16)[layout]
    references = sys.getrefcount(bits)
    got = interop.to_ndarray("x", Exporter(bits, code=4))
    assert got.dtype == bfloat16
    np.testing.assert_array_equal(got.view(np.uint16), bits)
    assert not bits.size or address(got) == address(bits)
    assert sys.getrefcount(bits) > references
    del got
    assert sys.getrefcount(bits) == references, "the export was not given back"


def test_dlpack_of_other_types():
    for bits, code in ((ROWS.view(np.uint32), 4), (np.zeros(3, np.uint8), 10)):
        with pytest.raises(TypeError, match=r"^weight: got a Exporter that NumPy cannot read"):
            interop.to_ndarray("weight", Exporter(bits, code=code))


@pytest.mark.parametrize("device", [2, 3, 8, 10, 13])
def test_dlpack_on_other_devices(device):
    exporter = Exporter(ROWS, device)
    with pytest.raises(TypeError, match=rf"^bias: got a Exporter .*type {device}, wanted .*CPU"):
        interop.to_ndarray("bias", exporter)
    with pytest.raises(TypeError, match=r"^weight: got a Exporter .*wanted .*CPU"):
        fastnorm.layer_norm(ROWS, 12, exporter)
    if device in (2, 13):  # CUDA, which tests/cuda is about
        return
    with pytest.raises(TypeError, match=r"^x: got a Exporter .*wanted .*CPU"):
        fastnorm.layer_norm(exporter)


class Refusing(Exporter):
    def __dlpack__(self, **options):
        raise self.a


@pytest.mark.parametrize("kind", [BufferError, RuntimeError, TypeError, ValueError])
def test_dlpack_that_fails(kind):
    with pytest.raises(TypeError, match=r"^x: .*gradients here.*pass it as an ndarray") as caught:
        interop.to_ndarray("x", Refusing(kind("gradients here")))
    assert caught.value.__cause__ is not None


def test_dlpack_end_to_end():
    got = fastnorm.layer_norm(Exporter(ROWS), 12, Exporter(ROWS[0]), VersionedExporter(ROWS[1]))
    assert type(got) is np.ndarray
    assert_same_bits(got, fastnorm.layer_norm(ROWS, 12, ROWS[0], ROWS[1]))


class OfEitherDevice(VersionedExporter):
    """JAX's, whose class has what only its arrays on a GPU answer to."""

    @property
    def __cuda_array_interface__(self):
        raise AttributeError("__cuda_array_interface__ is only defined for arrays on a GPU")


def test_a_class_with_cuda_arrays_may_have_others():
    on_cpu, on_gpu = OfEitherDevice(ROWS), OfEitherDevice(ROWS, 2)
    for _ in range(2):  # the second time by what is known of the class
        assert not interop.is_on_cuda(on_cpu)
        assert interop.is_on_cuda(on_gpu)
        assert_same_bits(fastnorm.layer_norm(on_cpu), fastnorm.layer_norm(ROWS))
    images = ROWS.reshape(5, 4, 3)
    got = fastnorm.GroupNorm(2, 4)(OfEitherDevice(images))
    assert_same_bits(got, fastnorm.group_norm(images, 2))


# ---- run -----------------------------------------------------------------------------------------


def test_run_names_what_it_refuses():
    with pytest.raises(TypeError, match=r"^weights\[1\]: got a Exporter"):
        interop.run(print, ("x", "weights"), ROWS, [ROWS[0], Exporter(ROWS, 2)])


def test_run_leaves_lists_of_numbers_alone():
    names = ("x", "normalized_shape", "weights")
    assert interop.run(lambda *args: args, names, ROWS, (12,), [[1.0], None]) == (
        ROWS, (12,), [[1.0], None],
    )  # fmt: skip


def test_run_returns_the_given_output():
    """Each output is the object that was given, whatever it is."""
    outs = [VersionedExporter(np.zeros(3)), np.zeros(3)]

    def call(x, out, sum_out):
        assert all(type(a) is np.ndarray for a in (x, *out))
        return tuple(out), None, [sum_out], x

    total = np.zeros(3)
    got = interop.run(call, ("x", "out", "sum_out"), Exporter(ROWS), outs, total)
    assert got[0] == tuple(outs)
    assert got[1] is None
    assert got[2][0] is total
    assert type(got[3]) is np.ndarray


def test_run_calls_bits_integers(monkeypatch):
    """BITS is for use within; who has no ml_dtypes gets bfloat16 as uint16."""
    monkeypatch.setattr(interop, "bfloat16", lambda: None)
    bits = (ROWS.view(np.uint32) >> 16).astype(np.uint16)
    got, none = interop.run(lambda x: (x, None), ("x",), Exporter(bits, code=4))
    assert none is None
    assert got.dtype == np.uint16
    assert address(got) == address(bits)


# ---- torch ---------------------------------------------------------------------------------------

TYPES = ("float16", "float32", "float64", "int8", "int64", "uint8", "bool")


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("layout", [np.s_[:], np.s_[::2], np.s_[:, 3:9], np.s_[0], np.s_[2, 3]])
def test_tensor(torch, name, layout):
    tensor = torch.from_numpy(ROWS.copy()).to(getattr(torch, name))[layout]
    assert interop.is_foreign(tensor)
    got = interop.to_ndarray("x", tensor)
    assert (got.dtype.name, got.shape) == (name, tuple(tensor.shape))
    assert address(got) == tensor.data_ptr()
    back = interop.from_ndarray(got)
    assert back.dtype == tensor.dtype
    assert back.data_ptr() == tensor.data_ptr()
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("layout", [np.s_[:], np.s_[::2, ::3], np.s_[0], np.s_[2, 3], np.s_[:0]])
def test_tensor_of_bfloat16(torch, bfloat16, layout):
    tensor = torch.from_numpy(ROWS).to(torch.bfloat16)[layout]
    got = interop.to_ndarray("x", tensor)
    assert got.dtype == bfloat16
    assert not got.size or address(got) == tensor.data_ptr()
    widened = got.view(np.uint16).astype(np.uint32) << 16
    assert_same_bits(widened.view(np.float32), tensor.float().numpy())
    back = interop.from_ndarray(got)
    assert back.dtype == torch.bfloat16
    assert back.data_ptr() == tensor.data_ptr()
    assert torch.equal(back, tensor)


def test_tensor_layouts(torch):
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    for view in (tensor.mT, tensor.permute(2, 0, 1), tensor[0].expand(3, 3, 4), tensor[:0]):
        got = interop.to_ndarray("x", view)
        assert_same_bits(got, view.contiguous().numpy())
        assert not got.size or address(got) == view.data_ptr()


def test_parameters_and_subclasses(torch):
    class Tagged(torch.Tensor):
        pass

    for tensor in (
        torch.nn.Parameter(torch.ones(3), requires_grad=False),
        torch.ones(3).as_subclass(Tagged),
        torch.ones(3, requires_grad=True).detach(),
    ):
        assert interop.is_foreign(tensor)
        assert address(interop.to_ndarray("x", tensor)) == tensor.data_ptr()


def refused(torch):
    tensor = torch.ones(2, 3)
    yield torch.ones(2, 3, device="meta"), "device meta, wanted one on the CPU"
    yield tensor.to_sparse(), "sparse_coo, wanted a dense one"
    yield tensor.to_sparse_csr(), "sparse_csr, wanted a dense one"
    yield torch.ones(3, requires_grad=True), r"requires grad, wanted x\.detach\(\)"
    yield torch.nn.Parameter(torch.ones(3)), r"requires grad, wanted x\.detach\(\)"
    yield torch.ones(3, requires_grad=True) * 2, r"requires grad, wanted x\.detach\(\)"
    yield torch.ones(3, dtype=torch.complex64).conj(), r"wanted x\.resolve_conj\(\)"
    yield torch.ones(3, dtype=torch.complex64).conj().imag, r"wanted x\.resolve_neg\(\)"
    yield torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested, wanted a dense one"
    yield torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "qint8, wanted a dense one"
    if hasattr(torch, "float8_e4m3fn"):
        yield tensor.to(torch.float8_e4m3fn), "float8_e4m3fn .*wanted a plain tensor"


@pytest.mark.filterwarnings("ignore:.*(nested tensor|[Ss]parse|quantize).*:UserWarning")
def test_tensors_that_are_refused(torch):
    for tensor, words in refused(torch):
        with pytest.raises(TypeError, match=rf"^x: got a .*{words}"):
            interop.to_ndarray("x", tensor)
        with pytest.raises(TypeError, match=rf"^x: got a .*{words}"):
            fastnorm.layer_norm(tensor)


def test_tensor_without_memory(torch):
    def look(tensor):
        with pytest.raises(TypeError, match=r"^x: got a Tensor of torch\.float32 .*wanted a plain"):
            interop.to_ndarray("x", tensor)
        return tensor

    torch.vmap(look)(torch.ones(3, 2))


def test_half_imported_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", type(sys)("torch"))
    assert not interop.is_foreign(object())
    assert not interop.wants_torch(ROWS, object())


def test_results_are_tensors(torch):
    x, tensor = ROWS, torch.from_numpy(ROWS)
    assert interop.wants_torch(tensor)
    assert not interop.wants_torch(x, None)
    y, (a, none), items = interop.from_ndarray((x, (x, None), [x, 3, tensor]))
    for got in (y, a, items[0]):
        assert isinstance(got, torch.Tensor)
        assert got.data_ptr() == address(x)
    assert none is None
    assert items[1] == 3
    assert items[2] is tensor


def test_result_keeps_the_memory_alive(torch):
    tensor = fastnorm.layer_norm(torch.from_numpy(ROWS))
    assert_same_bits(tensor.numpy(), fastnorm.layer_norm(ROWS))


def test_torch_types_become_names(torch):
    names = ("x", "dtype")
    for name in (*TYPES, "bfloat16"):
        got = interop.run(lambda x, dtype: dtype, names, ROWS, getattr(torch, name))
        assert got == name


def test_tensor_that_autograd_saved_is_not_used_after_a_write(torch):
    """As after torch's own writes in place: an error, no wrong gradient."""
    if not hasattr(torch.autograd.graph, "increment_version"):
        pytest.skip("this torch cannot be told")
    x, w = torch.ones(2, 3), torch.ones(3, requires_grad=True)
    loss = (x * w).sum()
    fastnorm.layer_norm(x, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- torch, end to end ---------------------------------------------------------------------------


def tensors(torch, *arrays):
    return [torch.from_numpy(a.copy()) for a in arrays]


def test_layer_norm_of_tensors(torch):
    x, w, b = tensors(torch, ROWS, ROWS[0], ROWS[1])
    y = fastnorm.layer_norm(x, (12,), w, b, 1e-5)
    assert isinstance(y, torch.Tensor)
    assert_same_bits(y.numpy(), fastnorm.layer_norm(ROWS, 12, ROWS[0], ROWS[1]))
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (12,), w, b))
    assert torch.equal(x, torch.from_numpy(ROWS))


def test_normalized_shape_of_a_tensor(torch):
    (x,) = tensors(torch, ROWS)
    want = fastnorm.layer_norm(ROWS)
    for shape in (x.shape[1:], [x.shape[1]], x.shape[1]):
        assert_same_bits(fastnorm.layer_norm(x, shape).numpy(), want)


def test_statistics_and_gradients_are_tensors(torch):
    x, w, dy = tensors(torch, ROWS, ROWS[0], ROWS[::-1])
    y, mean, rstd = fastnorm.layer_norm(x, 12, w, return_stats=True)
    want = fastnorm.layer_norm(ROWS, 12, ROWS[0], return_stats=True)
    for got, a in zip((y, mean, rstd), want, strict=True):
        assert_same_bits(got.numpy(), a)
    grads = fastnorm.layer_norm_backward(
        dy, x, 12, mean, rstd, w, output_mask=(True, True, False)
    )  # fmt: skip
    assert grads[2] is None
    a = fastnorm.layer_norm_backward(ROWS[::-1].copy(), ROWS, 12, want[1], want[2], ROWS[0])
    for got, expected in zip(grads[:2], a[:2], strict=True):
        assert_same_bits(got.numpy(), expected)
    for got, expected in zip(fastnorm.moments(x), fastnorm.moments(ROWS), strict=True):
        assert_same_bits(got.numpy(), expected)


def test_x_decides_what_results_are(torch):
    x, w, b = tensors(torch, ROWS, ROWS[0], ROWS[1])
    want = fastnorm.layer_norm(ROWS, 12, ROWS[0], ROWS[1])
    mixed = fastnorm.layer_norm(ROWS, 12, w, b)
    assert type(mixed) is np.ndarray
    assert_same_bits(mixed, want)
    mixed = fastnorm.layer_norm(x, 12, ROWS[0], b)
    assert isinstance(mixed, torch.Tensor)
    assert_same_bits(mixed.numpy(), want)


def test_out_is_returned(torch):
    (x,) = tensors(torch, ROWS)
    want = fastnorm.layer_norm(ROWS)
    out = torch.empty(5, 12)
    assert fastnorm.layer_norm(x, out=out) is out
    assert_same_bits(out.numpy(), want)
    mine = np.empty_like(ROWS)
    assert fastnorm.layer_norm(x, out=mine) is mine
    assert_same_bits(mine, want)
    out = torch.empty(12, 5).T
    y, mean, _ = fastnorm.layer_norm(ROWS, out=out, return_stats=True)
    assert y is out
    assert type(mean) is np.ndarray
    assert_same_bits(out.numpy(), want)
    assert fastnorm.layer_norm(x, out=x) is x
    assert_same_bits(x.numpy(), want)


def test_out_in_inference_mode(torch):
    with torch.inference_mode():
        x = torch.ones(2, 3)
        assert fastnorm.layer_norm(x, out=x) is x
    assert not x.any()


def test_out_that_does_not_fit(torch):
    (x,) = tensors(torch, ROWS)
    for out, kind, words in (
        (torch.empty(5, 12, requires_grad=True), TypeError, r"out: .*\.detach\(\)"),
        (torch.empty(5, 12, device="meta"), TypeError, "out: .*device meta"),
        (torch.empty(5, 11), ValueError, r"out: got shape \(5, 11\)"),
        (torch.empty(5, 12, dtype=torch.float64), TypeError, "out: got dtype float64"),
        (torch.empty(1, 12).expand(5, 12), ValueError, "out: .*overlap"),
    ):
        with pytest.raises(kind, match=f"^{words}"):
            fastnorm.layer_norm(x, out=out)
    with pytest.raises(ValueError, match="out: got an array that overlaps x"):
        fastnorm.layer_norm(x[:4], out=x[1:])


def test_weight_that_requires_grad(torch):
    (x,) = tensors(torch, ROWS)
    norm = torch.nn.LayerNorm(12)
    with pytest.raises(TypeError, match=r"^weight: .*requires grad, wanted weight\.detach\(\)"):
        fastnorm.layer_norm(x, 12, norm.weight, norm.bias)
    y = fastnorm.layer_norm(x, 12, norm.weight.detach(), norm.bias.detach())
    torch.testing.assert_close(y, norm(x).detach())


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_layer_norm_of_half_tensors(torch, name):
    kind = getattr(torch, name)
    x, w, b = (t.to(kind) for t in tensors(torch, ROWS, ROWS[0], ROWS[1]))
    y, mean, rstd = fastnorm.layer_norm(x, 12, w, b, return_stats=True)
    assert (y.dtype, mean.dtype, rstd.dtype) == (kind, torch.float32, torch.float32)
    want = fastnorm.layer_norm(x.float(), 12, w.float(), b.float()).to(kind)
    assert torch.equal(y, want)
    out = torch.empty_like(x)
    assert fastnorm.layer_norm(x, 12, w, b, out=out) is out
    assert torch.equal(out, want)
    assert torch.equal(fastnorm.layer_norm(x, 12, w, b, dtype=torch.float32).to(kind), want)


def test_bfloat16_tensors_without_ml_dtypes(torch):
    done = child.output("""
        import sys
        sys.modules["ml_dtypes"] = None
        import torch, fastnorm
        x = torch.linspace(-1, 2, 60).reshape(5, 12).to(torch.bfloat16)
        y = fastnorm.layer_norm(x, out=torch.empty_like(x))
        assert torch.equal(y, fastnorm.layer_norm(x.float()).to(torch.bfloat16))
        assert torch.equal(y, fastnorm.layer_norm(x))
        assert torch.equal(y, fastnorm.layer_norm(x.float(), dtype=torch.bfloat16))
        print("done")
    """)
    assert done == "done"


def test_tensors_that_require_grad_where_none_is_wanted(torch):
    """Grad mode is off: they are read as they are, plain ones, subclasses and bfloat16."""

    class Tagged(torch.Tensor):
        pass

    (x,) = tensors(torch, ROWS)
    norm = torch.nn.LayerNorm(12)
    want = fastnorm.layer_norm(ROWS)
    for made in (x.clone(), x.as_subclass(Tagged), x.to(torch.bfloat16)):
        wanted = fastnorm.layer_norm(made.detach(), 12)
        made = made.detach().requires_grad_()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                got = fastnorm.layer_norm(made, 12, norm.weight, norm.bias)
                assert fastnorm.LayerNorm(12)(made).dtype == made.dtype
            assert not got.requires_grad
            assert torch.equal(got, wanted)
        with pytest.raises(TypeError, match=r"^x: .*requires grad, wanted x\.detach\(\)"):
            fastnorm.layer_norm(made)
    with torch.no_grad():
        out = torch.empty(5, 12, requires_grad=True)
        assert fastnorm.layer_norm(x, out=out) is out
    assert_same_bits(out.detach().numpy(), want)


def plain_calls():
    """An op's name, its arrays, and what else it takes, one of each family."""
    rng = np.random.default_rng(11)
    x, dy = (rng.standard_normal((5, 12)).astype(np.float32) for _ in range(2))
    w, b, mean, rstd = x[0] + 1, x[1], x[:, 0], abs(x[:, 1]) + 1
    images = rng.standard_normal((2, 4, 3)).astype(np.float32)
    channel, group = images[0, :, 0], abs(images[:, :2, 0])
    yield "layer_norm", {"x": x, "weight": w, "bias": b}, {"normalized_shape": (12,)}
    yield "layer_norm", {"x": x.T}, {"axis": 0, "activation": "silu", "return_stats": True}
    yield "layer_norm", {"x": x, "mask": x > 0}, {"dtype": np.float16}
    shape = {"normalized_shape": 12}
    yield "layer_norm_backward", {"dy": dy, "x": x, "mean": mean, "rstd": rstd, "weight": w}, shape
    yield "rms_norm", {"x": x, "weight": w}, {"offset": 1.0, "return_stats": True}
    yield "rms_norm_backward", {"dy": dy, "x": x, "rstd": rstd}, {
        **shape, "output_mask": (True, False),
    }  # fmt: skip
    yield "add_layer_norm", {"x": x, "residual": dy, "linear_bias": b}, {}
    yield "add_rms_norm", {"x": x, "residual": dy, "weight": w}, {"return_stats": True}
    yield "add_rms_norm_backward", {"dy": dy, "dsum": dy, "sum": x, "rstd": rstd}, shape
    yield "adaptive_layer_norm", {"x": x, "scale": x, "shift": dy}, {}
    yield "segment_rms_norm", {"x": x, "offsets": np.array([0, 2, 5]), "weight": w}, {}
    yield "moments", {"x": x[0]}, {}
    yield "batch_norm", {"x": images, "weight": channel}, {
        "running_mean": None, "running_var": None, "training": True, "return_stats": True,
    }  # fmt: skip
    yield "group_norm", {"x": images, "bias": channel}, {"num_groups": 2, "activation": "relu"}
    yield "group_norm_backward", {"dy": images, "x": images, "mean": group, "rstd": group}, {
        "num_groups": 2,
    }  # fmt: skip
    yield "adaptive_instance_norm", {"x": images, "style": images * 2}, {"ddof": 1}
    yield "weight_norm", {"v": x, "g": abs(x[:, :1])}, {"return_stats": True}
    yield "unit_norm_backward", {"dy": dy, "x": x}, {}


@pytest.mark.parametrize(("op", "arrays", "others"), list(plain_calls()))
def test_plain_tensors_give_what_arrays_do(torch, op, arrays, others):
    """Bits and shapes, in any of the types; and tensors, whichever way a call goes."""
    call = getattr(fastnorm, op)
    for kind in (np.float32, np.float64, np.float16):
        given = {name: a.astype(kind) if a.dtype == np.float32 else a for name, a in arrays.items()}
        wanted = call(**given, **others)
        got = call(**{name: torch.from_numpy(a) for name, a in given.items()}, **others)
        if not isinstance(wanted, tuple):
            wanted, got = (wanted,), (got,)
        assert type(got) is tuple
        for a, b in zip(got, wanted, strict=True):
            if b is None:
                assert a is None
                continue
            assert type(a) is torch.Tensor
            assert_same_bits(a.numpy(), b)


def test_plain_tensors_go_straight_down(torch, monkeypatch):
    """As ndarrays do: the checks of the long way are not reached."""
    x, w, dy, images = tensors(torch, ROWS, ROWS[0], ROWS[1:2], ROWS.reshape(5, 4, 3))
    fastnorm.layer_norm(x)  # the first tensor makes the type known
    y, mean, rstd = fastnorm.layer_norm(x, return_stats=True)

    def fail(*args, **options):
        raise AssertionError("the long way")

    for name in ("NormCall", "NormBackwardCall", "MomentsCall"):
        monkeypatch.setattr(dispatch, name, fail)
    for name in ("ForwardCall", "BackwardCall"):
        monkeypatch.setattr(channels, name, fail)
        monkeypatch.setattr(weights, name, fail)
    parameter = torch.nn.Parameter(w, requires_grad=False)
    fastnorm.layer_norm(x, (12,), parameter, w)
    fastnorm.layer_norm_backward(dy.expand(5, 12).contiguous(), x, 12, mean, rstd, w)
    fastnorm.rms_norm(x, 12, ROWS[0], offset=1.0)
    fastnorm.moments(x)
    fastnorm.group_norm(images, 2)
    fastnorm.unit_norm(x)
    for norm in (fastnorm.LayerNorm(12), fastnorm.RMSNorm(12)):
        norm.backward(y, norm.forward(x)[1])
    out = torch.empty_like(x)
    assert fastnorm.LayerNorm(12)(x, out) is out
    assert fastnorm.GroupNorm(2, 4)(images, out=(out := torch.empty_like(images))) is out
    with pytest.raises(AssertionError, match="the long way"):
        fastnorm.layer_norm(x, dtype=torch.float32)


def test_a_sum_of_float16_and_bfloat16_tensors(torch, bfloat16):
    """float16 decides nothing: what is bfloat16 comes back as such, with ml_dtypes or without."""
    (x,) = tensors(torch, ROWS)
    for first, second in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)):
        y, total = fastnorm.add_layer_norm(x.to(first), x.to(second))
        assert y.dtype == first
        assert total.dtype == (x.to(first) + x.to(second)).dtype


def test_module_on_tensors(torch):
    (x,) = tensors(torch, ROWS)
    norm = fastnorm.LayerNorm(12)
    norm.load_state_dict(torch.nn.LayerNorm(12).state_dict())
    y = norm(x)
    assert isinstance(y, torch.Tensor)
    assert_same_bits(y.numpy(), fastnorm.layer_norm(ROWS))
    saved = norm.forward(x)[1]
    dx, grads = norm.backward(torch.ones_like(x), saved)
    assert isinstance(dx, torch.Tensor)
    assert torch.equal(grads["bias"], torch.full((12,), 5.0))


def test_explain_on_tensors(torch):
    (x,) = tensors(torch, ROWS)
    assert fastnorm.explain("layer_norm", x) == fastnorm.explain("layer_norm", ROWS)


# ---- Arrow ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["halffloat", "float32", "float64", "int8", "uint32", "int64"])
def test_arrow(pyarrow, name):
    kind = pyarrow.type_for_alias(name)
    values = pyarrow.array(ROWS[0].astype(kind.to_pandas_dtype()))
    for source, start in ((values, 0), (values[3:9], 3), (pyarrow.chunked_array([values[1:]]), 1)):
        assert interop.is_foreign(source)
        got = interop.to_ndarray("x", source)
        assert got.dtype == kind.to_pandas_dtype()
        assert address(got) == values.buffers()[1].address + start * got.itemsize
        np.testing.assert_array_equal(got, ROWS[0].astype(got.dtype)[start : start + len(source)])


def test_arrow_lists_are_rows(pyarrow):
    flat = pyarrow.array(ROWS.ravel())
    lists = pyarrow.FixedSizeListArray.from_arrays(flat, 12)
    nested = pyarrow.FixedSizeListArray.from_arrays(
        pyarrow.FixedSizeListArray.from_arrays(flat, 4), 3
    )
    for source, want in (
        (lists, ROWS),
        (lists[1:4], ROWS[1:4]),
        (lists[:0], ROWS[:0]),
        (pyarrow.chunked_array([lists[2:]]), ROWS[2:]),
        (pyarrow.chunked_array([], lists.type), ROWS[:0]),
        (nested[1:], ROWS.reshape(5, 3, 4)[1:]),
    ):
        got = interop.to_ndarray("x", source)
        assert got.shape == want.shape
        assert_same_bits(got, want)
        start = flat.buffers()[1].address + address(want) - address(ROWS)
        assert not got.size or address(got) == start


def test_arrow_tensors(pyarrow):
    if not hasattr(pyarrow, "FixedShapeTensorArray"):
        pytest.skip("this pyarrow has no tensors")
    blocks = ROWS.reshape(5, 3, 4)
    source = pyarrow.FixedShapeTensorArray.from_numpy_ndarray(blocks)
    assert_same_bits(interop.to_ndarray("x", source), blocks)
    storage = pyarrow.array([[1.0, None]], pyarrow.list_(pyarrow.float32(), 2))
    kind = pyarrow.fixed_shape_tensor(pyarrow.float32(), (2,))
    with pytest.raises(ValueError, match=r"^x: .*1 nulls"):
        interop.to_ndarray("x", pyarrow.ExtensionArray.from_storage(kind, storage))


def test_arrow_that_is_refused(pyarrow):
    flat = pyarrow.array([1.0, None, 2.0, 3.0])
    lists = pyarrow.FixedSizeListArray.from_arrays(flat, 2)
    whole = pyarrow.array([1.0, 2.0])
    for source, kind, words in (
        (flat, ValueError, r"with 1 nulls, wanted one without: weight\.fill_null"),
        (pyarrow.chunked_array([flat]), ValueError, "with 1 nulls"),
        (pyarrow.nulls(3), ValueError, "with 3 nulls"),
        (lists, ValueError, "with 1 nulls"),
        (pyarrow.array([[1.0, 2.0], None], lists.type), ValueError, "with 1 nulls"),
        (pyarrow.chunked_array([whole, whole]), ValueError, r"2 chunks, .*\.combine_chunks\(\)"),
        (pyarrow.array(["a"]), TypeError, "of string, wanted numbers"),
        (pyarrow.array([True]), TypeError, "of bool, wanted numbers"),
        (pyarrow.array([[1.0], []]), TypeError, "of list.*wanted numbers"),
        (whole.dictionary_encode(), TypeError, "of dictionary.*wanted numbers"),
        (pyarrow.array([["a"]], pyarrow.list_(pyarrow.string(), 1)), TypeError, "of string"),
    ):
        with pytest.raises(kind, match=f"^weight: got an Arrow array .*{words}"):
            interop.to_ndarray("weight", source)
    assert address(interop.to_ndarray("weight", lists[1:])) == flat.buffers()[1].address + 16


def test_arrow_masks(pyarrow):
    """They are copied, as Arrow packs booleans into bits; other arguments are never booleans."""
    mask = (np.arange(ROWS.size) % 3 > 0).reshape(ROWS.shape)
    flat = pyarrow.array(mask.ravel())
    rows = pyarrow.FixedSizeListArray.from_arrays(flat, ROWS.shape[1])
    for given, wanted in (
        (rows, mask),
        (rows[1:2], mask[1:2]),
        (flat[3 : 3 + ROWS.shape[1]], mask.ravel()[3 : 3 + ROWS.shape[1]]),
        (pyarrow.chunked_array([flat[: ROWS.shape[1]]]), mask[0]),
        (ArrowExporter(rows), mask),
    ):
        got = fastnorm.layer_norm(ROWS, mask=given)
        assert_same_bits(got, fastnorm.layer_norm(ROWS, mask=wanted))
        plan = fastnorm.explain("layer_norm", ROWS, mask=given)
        assert plan.copies == ("mask is copied: Arrow packs booleans into bits",)
    assert fastnorm.explain("layer_norm", ROWS, mask=mask).copies == ()


def test_arrow_masks_that_are_refused(pyarrow):
    holed = pyarrow.array([True, None] * (ROWS.shape[1] // 2))
    numbers = pyarrow.array(ROWS[0])
    for given, kind, words in (
        (holed, ValueError, "an Arrow array with 6 nulls"),
        (numbers, TypeError, "dtype float32, wanted bool"),
    ):
        with pytest.raises(kind, match=f"^mask: got {words}"):
            fastnorm.layer_norm(ROWS, mask=given)
    if hasattr(pyarrow, "FixedShapeTensorArray"):
        storage = pyarrow.array([[True, False]], pyarrow.list_(pyarrow.bool_(), 2))
        kind = pyarrow.fixed_shape_tensor(pyarrow.bool_(), (2,))
        tensors = pyarrow.ExtensionArray.from_storage(kind, storage)
        with pytest.raises(TypeError, match=r"^mask: got an Arrow tensor .*mask\.storage"):
            fastnorm.layer_norm(ROWS, mask=tensors)


class ArrowExporter:
    """An array of another Arrow library."""

    def __init__(self, a):
        self.a = a

    def __arrow_c_array__(self, requested_schema=None):
        return self.a.__arrow_c_array__(requested_schema)


class ArrowStreamExporter:
    """One that comes in chunks."""

    def __init__(self, a):
        self.a = a

    def __arrow_c_stream__(self, requested_schema=None):
        return self.a.__arrow_c_stream__(requested_schema)


class WithArray(ArrowExporter):
    """A data frame, say, that tells NumPy itself what it is."""

    def __array__(self, dtype=None, copy=None):
        return np.ones(3)


def test_arrow_of_other_libraries(pyarrow):
    values = pyarrow.array(ROWS[0])
    chunked = pyarrow.chunked_array([values])
    for source in (ArrowExporter(values), ArrowStreamExporter(chunked)):
        assert interop.is_foreign(source)
        assert address(interop.to_ndarray("x", source)) == values.buffers()[1].address
    assert not interop.is_foreign(WithArray(values))


def test_arrow_without_pyarrow(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    exporter = ArrowExporter(None)
    assert interop.is_foreign(exporter)
    with pytest.raises(TypeError, match=r"^x: got a ArrowExporter.*takes pyarrow"):
        interop.to_ndarray("x", exporter)


def test_arrow_end_to_end(pyarrow):
    lists = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(ROWS.ravel()), 12)
    got = fastnorm.layer_norm(lists, 12, pyarrow.array(ROWS[0]))
    assert type(got) is np.ndarray
    assert_same_bits(got, fastnorm.layer_norm(ROWS, 12, ROWS[0]))
    with pytest.raises(ValueError, match=r"^out: .*read-only"):
        fastnorm.layer_norm(ROWS, out=lists)
    with pytest.raises(ValueError, match=r"^bias: .*nulls"):
        fastnorm.layer_norm(ROWS, bias=pyarrow.nulls(12))


@pytest.fixture
def bits(monkeypatch, rng):
    """Numbers as BITS, and as the float32 that they stand for; ml_dtypes is not installed."""
    monkeypatch.setattr(interop, "bfloat16", lambda: None)
    made = interop.to_bits(rng.standard_normal((6, 20)).astype(np.float32))
    return made, interop.widened(made)


def test_parameters_as_bits_are_no_integers(bits, rng):
    (packed, plain), x = bits, rng.standard_normal((6, 20)).astype(np.float32)
    w, wide = packed[0], plain[0]
    module = fastnorm.LayerNorm(20)
    module.weight = w
    assert_same_bits(module.weight, wide)
    assert_same_bits(fastnorm.layer_norm(x, 20, w, w), fastnorm.layer_norm(x, 20, wide, wide))
    assert_same_bits(fastnorm.layer_norm(x, 20, packed), fastnorm.layer_norm(x, 20, plain))
    assert_same_bits(
        fastnorm.segment_layer_norm(x, [0, 2, 6], w, w),
        fastnorm.segment_layer_norm(x, [0, 2, 6], wide, wide),
    )


def test_the_gradient_of_a_sum_as_bits(bits, rng):
    (packed, plain), dy = bits, rng.standard_normal((6, 20)).astype(np.float32)
    _, mean, rstd = fastnorm.layer_norm(plain, return_stats=True)
    got = fastnorm.add_layer_norm_backward(dy, plain, packed, 20, mean, rstd)[0]
    alone = fastnorm.add_layer_norm_backward(dy, None, packed, 20, mean, rstd)[0]
    assert got.dtype == alone.dtype == np.uint16
    total = interop.widened(alone.view(interop.BITS)) + plain
    assert_same_bits(got, interop.to_bits(total).view(np.uint16))


def test_results_asked_for_as_bfloat16_are_integers(bits):
    _, x = bits
    y, out = fastnorm.layer_norm(x, dtype="bfloat16"), np.empty(x.shape, np.uint16)
    assert fastnorm.layer_norm(x, dtype="bfloat16", out=out) is out
    assert y.dtype == np.uint16
    assert_same_bits(out, y)
    assert fastnorm.layer_norm(y, dtype="bfloat16", out=y) is y
    with pytest.raises(TypeError, match=r"^out: got dtype float32, wanted uint16"):
        fastnorm.layer_norm(x, dtype="bfloat16", out=np.empty_like(x))


BITS_CALLS = {
    "layer_norm": ("normalized_shape", "weight", "bias"),
    "rms_norm": ("normalized_shape", "weight"),
    "add_layer_norm": ("residual", "normalized_shape", "weight", "bias", "linear_bias"),
    "add_rms_norm": ("residual", "normalized_shape", "weight", "linear_bias"),
    "adaptive_layer_norm": ("scale", "shift", "gate", "residual"),
    "parallel_layer_norm": ("normalized_shape", "weights", "biases"),
    "segment_layer_norm": ("offsets", "weight", "bias"),
    "segment_rms_norm": ("offsets", "weight"),
}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("op", BITS_CALLS)
def test_all_that_is_uint16_beside_bits_is_bits(op, order, bfloat16, rng):
    """Parameters, addends and outputs, in either byte order, with ml_dtypes and without."""

    def made(*shape):
        bits = interop.to_bits(rng.standard_normal(shape).astype(np.float32))
        return bits.view(np.uint16).astype(f"{order}u2")

    def wide(value):
        if isinstance(value, list):
            return list(map(wide, value))
        if getattr(value, "dtype", np.int64) != np.dtype(f"{order}u2"):
            return value
        return interop.widened(value.astype(np.uint16).view(interop.BITS))

    row = {"weight", "bias", "linear_bias"}
    fixed = {"normalized_shape": 20, "offsets": [0, 2, 6]}
    given = {"x": made(6, 20)}
    for name in BITS_CALLS[op]:
        if name in fixed:
            given[name] = fixed[name]
        elif name in ("weights", "biases"):
            given[name] = [made(20), made(20)]
        else:
            given[name] = made(20) if name in row else made(6, 20)
    summed = "residual" in given
    if summed:  # else the statistics would see a sum of bfloat16, where that of float32 is exact
        given["round_sum"] = False
    call = getattr(fastnorm, op)
    got = call(**given, dtype="bfloat16")
    want = call(**{name: wide(value) for name, value in given.items()})

    def check(a, b):
        if isinstance(b, tuple):
            for one, other in zip(a, b, strict=True):
                check(one, other)
        else:
            assert a.dtype == np.uint16
            assert_same_bits(a, interop.to_bits(b).view(np.uint16))

    check(got, want)
    assert fastnorm.explain(op, **given, dtype="bfloat16").dtype == "bfloat16"
    if op == "parallel_layer_norm":
        return
    out = np.empty((6, 20), f"{order}u2")
    outputs = {"out": out, "sum_out": given["x"]} if summed else {"out": out}
    again = call(**given, **outputs, dtype="bfloat16")
    first = again[0] if summed else again
    assert first is out
    assert np.array_equal(out, got[0] if summed else got)
    if summed:
        assert again[1] is given["x"]
        assert np.array_equal(again[1], got[1])


def test_bits_are_no_masked_array():
    masked = np.ma.array(np.ones((2, 4), np.uint16), mask=np.eye(2, 4))
    with pytest.raises(TypeError, match=r"^x: got a masked array"):
        fastnorm.layer_norm(masked, dtype="bfloat16")


def test_a_sum_of_both_kinds_of_bfloat16(rng):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    stored = rng.standard_normal((2, 3, 8)).astype(ml_dtypes.bfloat16)
    bits = stored.view(np.uint16)
    got = fastnorm.add_rms_norm(bits[0], stored[1], 8, dtype="bfloat16")
    want = fastnorm.add_rms_norm(stored[0], stored[1], 8)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b.view(np.uint16))
