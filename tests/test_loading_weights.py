"""load_norm for weights in another form: what torch and Flax save, read into the same weight."""

import importlib
import warnings

import numpy as np
import pytest

from fastnorm import interop, reference_weights
from fastnorm.loading import load_norm
from fastnorm.modules_weights import SpectralNorm, WeightNorm

from .helpers.arrays import assert_same_bits

EPS = np.finfo(np.float64).eps
BIAS = {"conv.bias": np.zeros(6), "conv.inner.weight": np.ones(3), "weight_g": np.ones(1)}
BOTH = pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.manual_seed(20240229)
    return torch


def optional(name):
    """A library whose own imports may warn of what it likes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed")


@pytest.fixture
def linen():
    optional("jax")
    return optional("flax.linen")


def assert_close(got, want):
    want = np.asarray(want)
    assert np.asarray(got).shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * np.abs(want).max())


# ---- vectors that are easily checked -------------------------------------------------------------

V = np.float32([[2, 2, 2, 2], [0, 2, 0, 0]])
W = np.float32([[4, 4, 4, 4], [0, 1, 0, 0]])


@pytest.mark.parametrize("keys", [
    ("conv.weight_g", "conv.weight_v"),
    ("conv.parametrizations.weight.original0", "conv.parametrizations.weight.original1"),
])  # fmt: skip
def test_weight_norm_of_torch(keys):
    g, v = keys
    norm = load_norm("weight_norm", {**BIAS, g: [[8], [1]], v: V}, prefix="conv")
    assert type(norm) is WeightNorm
    assert (norm.dim, norm.dtype) == (0, np.float32)
    assert_same_bits(norm(), W)
    assert_same_bits((norm.weight_g, norm.weight_v), (np.float32([[8], [1]]), V))


@pytest.mark.parametrize("keys", [
    ("conv.weight_orig", "conv.weight_u", "conv.weight_v"),
    tuple(f"conv.parametrizations.weight.{end}" for end in ("original", "0._u", "0._v")),
])  # fmt: skip
def test_spectral_norm_of_torch(keys):
    """In inference the vectors are taken as they are, though they be far from the end."""
    saved = dict(zip(keys, (np.float32([[4, 2], [0, 1]]), [0, 1], [0, 1]), strict=True))
    norm = load_norm("spectral_norm", {**BIAS, **saved}, prefix="conv/", dtype=np.float64)
    assert type(norm) is SpectralNorm
    assert (norm.training, norm.dim, norm.eps, norm.n_power_iterations) == (True, 0, 1e-12, 1)
    assert_same_bits(norm.bake(), np.float64([[4, 2], [0, 1]]))
    assert_same_bits(norm.eval()(), norm.bake())
    assert_same_bits(norm.weight_u, np.float64([0, 1]))
    assert_same_bits(norm.weight_v, np.float64([0, 1]))


FLAX = {
    "params": {
        "net": {
            "Dense_0": {"kernel": np.ones((3, 5)), "bias": np.zeros(5)},
            "Dense_1": {"kernel": V.T, "bias": np.zeros(2)},
            "WeightNorm_0": {"Dense_1/kernel/scale": np.float32([8, 1])},
        },
        "Dense_1": {"kernel": np.ones((3, 5))},
    }
}


def test_weight_norm_of_flax():
    """The scale lies with the wrapper, which may be outside of what it wraps."""
    norm = load_norm("weight_norm", FLAX, prefix="net.Dense_1", dialect="flax")
    assert norm.dim == 1
    assert_same_bits(norm(), np.ascontiguousarray(W.T))
    assert_same_bits((norm.weight_g, norm.weight_v), (np.float32([[8, 1]]), V.T.copy()))
    net = FLAX["params"]["net"]
    outside = {"params": {"net": {"Dense_1": net["Dense_1"]}}}
    outside["params"]["WeightNorm_3"] = {"net/Dense_1/kernel/scale": np.float32([8, 1])}
    assert load_norm("weight_norm", outside, prefix="net/Dense_1", dialect="flax") == norm
    alone = {"layer_instance": net["Dense_1"], "layer_instance/kernel/scale": np.float32([8, 1])}
    assert load_norm("weight_norm", alone, prefix="layer_instance", dialect="flax") == norm
    flat = {"net/Dense_1/kernel": V.T, "net/W/Dense_1/kernel/scale": np.float32([8, 1])}
    assert load_norm("weight_norm", flat, prefix="net.Dense_1", dialect="flax") == norm


def test_layers_of_the_same_name_in_flax():
    """What lies beside a weight is that one's, not of a layer further up."""
    own = {"layer_instance": {"kernel": V.T}, "layer_instance/kernel/scale": np.float32([8, 1])}
    inner = {"layer_instance": {"kernel": V.T}, "layer_instance/kernel/scale": np.zeros(2)}
    saved = {"layers_1": own, "layers_0": {"layers_1": inner}}
    norm = load_norm("weight_norm", saved, prefix="layers_1.layer_instance", dialect="flax")
    assert_same_bits(norm(), np.ascontiguousarray(W.T))
    del own["layer_instance/kernel/scale"]
    with pytest.raises(KeyError, match=r"wanted 'kernel\.scale' with them"):
        load_norm("weight_norm", saved, prefix="layers_1.layer_instance", dialect="flax")


def test_the_scale_of_other_axes():
    saved = {"d.kernel": V, "d.kernel.scale": np.float32([8, 1])}
    norm = load_norm("weight_norm", saved, prefix="d", dialect="flax", dim=0)
    assert_same_bits(norm(), W)
    whole = {"d.kernel": V, "d.kernel.scale": np.float32(3)}
    norm = load_norm("weight_norm", whole, prefix="d", dialect="flax")
    assert norm.dim is None
    assert_close(norm(), 3 * V.astype(np.float64) / np.sqrt(20))


def test_the_eps_of_flax():
    """It is in the lengths, where it can be seen at all."""
    saved = {"d.kernel": np.float64([[3e-6, 30.0], [4e-6, 40.0]]), "d.kernel.scale": np.ones(2)}
    norm = load_norm("weight_norm", saved, prefix="d", dialect="flax")
    scale = np.sqrt((saved["d.kernel"] ** 2).sum(axis=0) + 1e-12)
    # Some ten roundings on either side.
    np.testing.assert_allclose(norm(), saved["d.kernel"] / scale, rtol=10 * EPS)
    assert_same_bits(norm.weight_v, saved["d.kernel"])
    plain = load_norm("weight_norm", saved, prefix="d", dialect="flax", eps=0)
    assert_same_bits(plain.weight_g, np.ones((1, 2)))


@pytest.mark.parametrize("steps", [1, 3])
def test_spectral_norm_of_flax(steps, rng):
    """It keeps u alone, and improves it in inference too, which changes nothing."""
    kernel, u = rng.standard_normal((2, 3, 4)), rng.standard_normal((1, 4))
    saved = {
        "params": {"Conv_0": {"kernel": kernel, "bias": np.ones(4)}},
        "batch_stats": {"SN": {"Conv_0/kernel/u": u, "Conv_0/kernel/sigma": np.ones(())}},
    }
    norm = load_norm(
        "spectral_norm", saved, prefix="Conv_0", dialect="flax", n_power_iterations=steps
    )
    assert (norm.dim, norm.eps, norm.n_power_iterations) == (2, 1e-12, steps)
    want = reference_weights.spectral_norm(kernel, u[0], None, steps, 1e-12, 2)
    np.testing.assert_allclose(norm.eval()(), want[0], rtol=1e-12)
    # Flax's eps shortens a vector of length l by eps/(2 l^2), and no length is less than this.
    least = np.linalg.svd(kernel.reshape(-1, 4), compute_uv=False)[-1]
    np.testing.assert_allclose(norm.weight_u, want[2], rtol=1e-12 / least**2)
    np.testing.assert_allclose(norm.weight_v, want[3], rtol=1e-12 / least**2)


def test_the_eps_of_flax_in_its_vectors():
    """It shortens both, so that a small weight is divided by less."""
    saved = {"d.kernel": np.float64([[3e-6], [4e-6]]), "d.kernel.u": np.float64([[1]])}
    norm = load_norm("spectral_norm", saved, prefix="d", dialect="flax")
    v = saved["d.kernel"][:, 0] / np.sqrt(25e-12 + 1e-12)
    sigma = v @ saved["d.kernel"][:, 0]  # 25e-6 / sqrt(26), which is what u is made of too
    u = sigma / np.sqrt(sigma**2 + 1e-12)
    # Some twenty roundings on either side.
    np.testing.assert_allclose(norm.bake(), saved["d.kernel"] / (sigma * u), rtol=20 * EPS)


# ---- which axis, which name ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4, 4), (2, 1, 3), (1, 1, 5), (1, 1, 1)])
@pytest.mark.parametrize("dim", [0, 1, 2, None])
def test_the_axis_of_lengths(shape, dim, rng):
    """The shape of weight_g says it, square or not; where all of it is 1 there is one norm."""
    made = WeightNorm(rng.standard_normal(shape), dim)
    norm = load_norm("weight_norm", made.state_dict())
    assert_same_bits(norm(), made())
    if np.prod(shape) > made.weight_g.size > 1:
        assert norm == made


@pytest.mark.parametrize(("shape", "dim"), [((4, 3), 0), ((3, 4, 2), 1), ((4, 4), 0), ((4,), 0)])
def test_the_axis_of_vectors(shape, dim, rng):
    made = SpectralNorm(rng.standard_normal(shape), dim=dim)
    assert load_norm("spectral_norm", made.state_dict()) == made


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_an_axis_that_is_given(dim, rng):
    made = SpectralNorm(rng.standard_normal((4, 4, 4)), dim=dim)
    assert load_norm("spectral_norm", made.state_dict(), dim=dim) == made
    made = WeightNorm(rng.standard_normal((4, 4, 4)), dim)
    assert load_norm("weight_norm", made.state_dict(), dim=dim) == made


def test_a_weight_of_another_name(rng):
    """One of several of a layer: an LSTM's recurrent weight."""
    made = {name: WeightNorm(rng.standard_normal((4, 3))) for name in ("weight_ih", "weight_hh")}
    saved = {f"lstm.{name}{end}": getattr(norm, f"weight{end}")
             for name, norm in made.items() for end in ("_g", "_v")}  # fmt: skip
    for name, norm in made.items():
        assert load_norm("weight_norm", saved, prefix="lstm", name=name) == norm


@BOTH
def test_types_of_parameters(kind, rng):
    """float32 but for float64's, unless it is said; the vectors are never of a half type."""
    made = {"weight_norm": WeightNorm, "spectral_norm": SpectralNorm}[kind](np.eye(3))
    for dtype in (np.float16, np.float32, np.float64):
        saved = {name: array.astype(dtype) for name, array in made.state_dict().items()}
        norm = load_norm(kind, saved)
        assert norm.dtype == (np.float64 if dtype == np.float64 else np.float32)
        assert norm().dtype == norm.dtype
    assert load_norm(kind, saved, dtype=np.float16).dtype == np.float16


def test_bfloat16_as_bits():
    """As a safetensors file has it where ml_dtypes is not installed."""
    bits = (V.view(np.uint32) >> 16).astype(np.uint16).view(interop.BITS)
    norm = load_norm("weight_norm", {"weight_v": bits, "weight_g": np.float32([[8], [1]])})
    assert_same_bits(norm(), W)
    saved = {"d.kernel": bits, "d.kernel.scale": np.ones(4, np.float32)}
    with pytest.raises(ValueError, match=r"^weight_v: got shape"):
        load_norm("spectral_norm", {"weight_orig": bits, "weight_u": [1, 0], "weight_v": [1]})
    assert load_norm("weight_norm", saved, prefix="d", dialect="flax").dtype == np.float32


def test_a_file(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    path = tmp_path / "model.safetensors"
    saved = {"conv.weight_g": np.float32([[8], [1]]), "conv.weight_v": V, "x": np.ones(2, np.uint8)}
    safetensors.save_file(saved, path)
    assert_same_bits(load_norm("weight_norm", path, prefix="conv")(), W)


# ---- torch itself --------------------------------------------------------------------------------

FUNCTIONS = ["utils", "utils.parametrizations"]


def normed(torch, where, kind, layer, **options):
    """torch's own, the older one of which warns that it is."""
    function = getattr(importlib.import_module(f"torch.nn.{where}"), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return function(layer, **options)


def layers(torch):
    return [
        torch.nn.Linear(5, 5), torch.nn.Linear(7, 4), torch.nn.Conv1d(3, 6, 5),
        torch.nn.Conv2d(4, 3, 3), torch.nn.ConvTranspose2d(4, 6, 3), torch.nn.Embedding(9, 4),
    ]  # fmt: skip


def inferred(where, layer):
    """The weight that a layer has in inference; the older functions form it before a call."""
    layer.eval()
    if where == "utils":
        [form] = layer._forward_pre_hooks.values()
        form(layer, None)
    return layer.weight.detach().numpy()


@pytest.mark.parametrize("where", FUNCTIONS)
@BOTH
def test_torch_itself(kind, where, torch):
    for layer in layers(torch):
        made = normed(torch, where, kind, layer)
        for parameter in made.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)  # as if trained
        model = torch.nn.Sequential(torch.nn.ReLU(), made)
        norm = load_norm(kind, model.state_dict(), prefix="1")
        assert_close(norm.bake(), inferred(where, made))
        by_name = dict(made.named_parameters()) | dict(made.named_buffers())
        assert load_norm(kind, by_name) == norm


@pytest.mark.parametrize("where", FUNCTIONS)
@pytest.mark.parametrize("dim", [None, -1, 0, 1, 2, 3])
def test_axes_of_torch(where, dim, torch):
    """Where -1 is not the last axis but none, as the shape of weight_g says."""
    made = normed(torch, where, "weight_norm", torch.nn.Conv2d(4, 4, 4), dim=dim)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    norm = load_norm("weight_norm", made.state_dict())
    assert norm.dim == (None if dim == -1 else dim)
    assert_close(norm(), inferred(where, made))


@pytest.mark.parametrize("where", FUNCTIONS)
def test_square_layers_of_torch(where, torch):
    """Nothing tells a convolution from a transposed one of as many channels."""
    for dim, layer in enumerate((torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
        made = normed(torch, where, "spectral_norm", layer(4, 4, 3))
        with pytest.raises(TypeError, match=r"^dim: got nothing, wanted 1 for a transposed"):
            load_norm("spectral_norm", made.state_dict())
        norm = load_norm("spectral_norm", made.state_dict(), dim=dim)
        assert_close(norm.bake(), inferred(where, made))


def test_names_of_torch(torch):
    made = normed(torch, "utils", "weight_norm", torch.nn.LSTM(4, 3), name="weight_hh_l0")
    torch.nn.init.normal_(made.weight_hh_l0_g)
    norm = load_norm("weight_norm", made.state_dict(), name="weight_hh_l0")
    want = torch._weight_norm(made.weight_hh_l0_v, made.weight_hh_l0_g, 0).detach()
    assert_close(norm(), want)


def test_training_goes_on_as_in_torch(torch):
    """By the older function, whose iteration is in the same order."""
    made = normed(torch, "utils", "spectral_norm", torch.nn.Linear(7, 4), n_power_iterations=2)
    norm = load_norm("spectral_norm", made.state_dict(), n_power_iterations=2)
    made(torch.ones(7))
    assert_close(norm(), made.weight.detach())
    assert_close(norm.weight_u, made.weight_u)


def test_two_parametrizations_of_torch(torch):
    """Of which either by itself would be another weight."""
    made = normed(torch, FUNCTIONS[1], "weight_norm", torch.nn.Linear(7, 4))
    normed(torch, FUNCTIONS[1], "spectral_norm", made)
    for kind in ("weight_norm", "spectral_norm"):
        with pytest.raises(KeyError, match=r"got 'parametrizations\.weight\.\S*' at the top, want"):
            load_norm(kind, made.state_dict())


# ---- Flax itself ---------------------------------------------------------------------------------


def variables_of(module, rng, *given, **options):
    jax = importlib.import_module("jax")
    variables = module.init(jax.random.key(0), *given, **options)
    return jax.tree.map(lambda a: rng.standard_normal(a.shape).astype("f4"), variables)


def bias_of(variables, *path):
    for name in ("params", *path):
        variables = variables[name]
    return variables["bias"]


@pytest.mark.parametrize("axes", [-1, 0, None])
def test_weight_norm_of_flax_itself(axes, linen, rng):
    wrapped = linen.Sequential([
        linen.Dense(4), linen.WeightNorm(linen.Dense(5), feature_axes=axes),
    ])  # fmt: skip
    x = rng.standard_normal((3, 2)).astype(np.float32)
    variables = variables_of(wrapped, rng, x)
    place = ("layers_1", "layer_instance")
    options = {"dim": 0} if axes == 0 else {}
    norm = load_norm("weight_norm", variables, prefix=".".join(place), dialect="flax", **options)
    within = linen.Dense(4).apply({"params": variables["params"]["layers_0"]}, x)
    assert_close(
        np.asarray(within) @ norm() + bias_of(variables, *place), wrapped.apply(variables, x)
    )


def test_a_weight_norm_within_a_module_of_flax(linen, rng):
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.WeightNorm(linen.Conv(4, (3,)))(linen.Dense(2)(x))

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            return Net()(linen.WeightNorm(Net())(x))

    x = rng.standard_normal((2, 5, 3)).astype(np.float32)
    variables = variables_of(Net(), rng, x)
    assert list(variables["params"]) == ["Conv_0", "Dense_0", "WeightNorm_0"]
    norm = load_norm("weight_norm", variables, prefix="Conv_0", dialect="flax")
    rest = linen.Dense(2).apply({"params": variables["params"]["Dense_0"]}, x)
    conv = {"params": {"kernel": norm(), "bias": bias_of(variables, "Conv_0")}}
    assert_close(linen.Conv(4, (3,)).apply(conv, rest), Net().apply(variables, x))

    both = variables_of(Model(), rng, x)
    outer = load_norm("weight_norm", both, prefix="Net_1.Dense_0", dialect="flax")
    assert_same_bits(
        outer.weight_g[0], both["params"]["WeightNorm_0"]["Net_1/Dense_0/kernel/scale"]
    )
    with pytest.raises(KeyError, match=r"got both .*, wanted one weight_g"):
        load_norm("weight_norm", both, prefix="Net_1.Conv_0", dialect="flax")


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("scale", [1, 1e-5])
def test_spectral_norm_of_flax_itself(steps, scale, linen, rng):
    """Of small weights too, where its eps is seen."""
    wrapped = linen.SpectralNorm(linen.Conv(4, (3, 3)), n_steps=steps)
    x = rng.standard_normal((2, 5, 5, 3)).astype(np.float32)
    variables = variables_of(wrapped, rng, x, update_stats=False)
    kernel = variables["params"]["layer_instance"]["kernel"]
    variables["params"]["layer_instance"]["kernel"] = scale * kernel
    norm = load_norm(
        "spectral_norm", variables, prefix="layer_instance", dialect="flax",
        n_power_iterations=steps,
    )  # fmt: skip
    conv = {"params": {"kernel": norm.bake(), "bias": bias_of(variables, "layer_instance")}}
    want = wrapped.apply(variables, x, update_stats=False)
    assert_close(linen.Conv(4, (3, 3)).apply(conv, x), want)


def test_spectral_norm_of_flax_embeddings(linen, rng):
    wrapped = linen.SpectralNorm(linen.Embed(7, 4))
    x = np.arange(7)
    variables = variables_of(wrapped, rng, x, update_stats=False)
    norm = load_norm(
        "spectral_norm", variables, prefix="layer_instance", dialect="flax", name="embedding"
    )
    assert_close(norm.bake(), wrapped.apply(variables, x, update_stats=False))


# ---- Keras itself --------------------------------------------------------------------------------


def test_keras_infers_with_the_kernel_as_it_is(monkeypatch, rng):
    """Which is why there is nothing to load from it."""
    monkeypatch.setenv("KERAS_BACKEND", "numpy")
    keras = optional("keras")
    layer = keras.layers.SpectralNormalization(keras.layers.Dense(4))
    x = rng.standard_normal((3, 5)).astype(np.float32)
    layer(x, training=True)
    kernel = rng.standard_normal((5, 4)).astype(np.float32)
    layer.layer.kernel.assign(kernel)
    assert_close(layer(x), x @ kernel)
    assert not hasattr(keras.layers, "WeightNormalization")


# ---- errors --------------------------------------------------------------------------------------

GV = {"weight_g": np.ones((4, 1)), "weight_v": np.ones((4, 3))}
HALVES = {"weight_g": np.ones((4, 1)), "parametrizations.weight.original1": np.ones((4, 3))}
OUV = {"weight_orig": np.ones((4, 3)), "weight_u": np.ones(4), "weight_v": np.ones(3)}
SCALED = {"d.kernel": np.ones((4, 3)), "d.kernel.scale": np.ones(3)}
ALONG = {"d.kernel": np.ones((4, 3)), "d.kernel.u": np.ones((1, 3))}
SECOND = {"parametrizations.weight.1._u": np.ones(4)}
FLAX_AT_D = {"prefix": "d", "dialect": "flax"}


def without(saved, name):
    return {key: array for key, array in saved.items() if key != name}


@pytest.mark.parametrize(("kind", "saved", "options", "error", "message"), [
    ("weight_norm", GV, {"dialect": "keras"}, ValueError,
     "dialect: got 'keras' for 'weight_norm', wanted 'torch' or 'flax': it has none"),
    ("weight_norm", GV, {"dialect": "onnx"}, ValueError,
     "dialect: got 'onnx' for 'weight_norm', wanted 'torch' or 'flax': it has none"),
    ("spectral_norm", OUV, {"dialect": "keras"}, ValueError,
     "dialect: got 'keras' for 'spectral_norm', wanted 'torch' or 'flax': Keras infers with the"),
    ("weight_norm", GV, {"name": 1}, TypeError, "name: got int, wanted text"),
    ("weight_norm", GV, {"name": "kernel"}, KeyError,
     ".parameters: got nothing at the top, wanted some of .'kernel_g', 'kernel_v'"),
    ("weight_norm", {}, {}, KeyError, ".parameters: got nothing at the top, wanted some of"),
    ("weight_norm", GV, {"prefix": "conv"}, KeyError, ".parameters: got nothing at conv, wanted"),
    ("weight_norm", without(GV, "weight_g"), {}, KeyError,
     r".parameters: got \['weight_v'\], wanted 'weight_g' with them"),
    ("weight_norm", OUV, {}, KeyError,
     r".parameters: got \['weight_v'\], wanted 'weight_g' with them"),
    ("spectral_norm", without(OUV, "weight_v"), {}, KeyError,
     r".parameters: got \['weight_orig', 'weight_u'\], wanted 'weight_v' with them"),
    ("spectral_norm", {**OUV, **SECOND}, {}, KeyError,
     r".parameters: got 'parametrizations\.weight\.1\._u' at the top, wanted no other than"),
    ("weight_norm", {**GV, "parametrizations.weight.original0": 1}, {}, KeyError,
     ".parameters: got both 'weight_g' and 'parametrizations.weight.original0', wanted one"),
    ("weight_norm", HALVES, {}, KeyError,
     r".parameters: got \['parametrizations\S+original1', 'weight_g'\] at the top, wanted all of"),
    ("weight_norm", {**GV, "weight_g": np.ones((3, 1))}, {}, ValueError,
     r"weight_g: got shape \(3, 1\), wanted \(4, 1\)"),
    ("weight_norm", {**GV, "weight_g": np.ones(4)}, {}, ValueError,
     r"weight_g: got shape \(4,\), wanted \(4, 1\)"),
    ("weight_norm", GV, {"dim": 1}, ValueError, r"weight_g: got shape \(4, 1\), wanted \(1, 3\)"),
    ("weight_norm", GV, {"dim": 2}, ValueError, "dim: axis 2 is out of bounds"),
    ("weight_norm", {**GV, "weight_v": None}, {}, TypeError, "weight_v: got None, wanted an array"),
    ("weight_norm", GV, {"eps": -1}, ValueError, "eps: got -1, wanted a number of at least 0"),
    ("weight_norm", GV, {"epsilon": 1}, TypeError, ".*unexpected keyword argument 'epsilon'"),
    ("spectral_norm", {**OUV, "weight_u": np.ones(5)}, {}, ValueError,
     r"weight_u: got shape \(5,\), wanted \(4,\)"),
    ("spectral_norm", {**OUV, "weight_v": np.ones(4)}, {}, ValueError,
     r"weight_v: got shape \(4,\), wanted \(3,\)"),
    ("spectral_norm", {**OUV, "weight_orig": np.ones((4, 4, 2))}, {}, TypeError,
     "dim: got nothing, wanted 1 for a transposed convolution, else 0, as a weight of shape"),
    ("spectral_norm", OUV, {"n_power_iterations": 0}, ValueError, "n_power_iterations: got 0, wan"),
    ("weight_norm", without(SCALED, "d.kernel.scale"), FLAX_AT_D, KeyError,
     r".parameters: got \['d\.kernel'\], wanted 'kernel\.scale' with them"),
    ("weight_norm", {**SCALED, "d.kernel.scale": np.ones(4)}, FLAX_AT_D, ValueError,
     r"weight_g: got shape \(4,\), wanted \(1, 3\)"),
    ("weight_norm", {**SCALED, "d.kernel.scale": np.ones((4, 3))}, FLAX_AT_D, ValueError,
     r"weight_g: got shape \(4, 3\), wanted \(1, 3\)"),
    ("weight_norm", {**SCALED, "d.kernel": np.eye(4, 3)[::-1] * [1, 1, 0]}, FLAX_AT_D, ValueError,
     "weight_v: got a vector of zeros, wanted none"),
    ("spectral_norm", ALONG, {**FLAX_AT_D, "dim": 0}, TypeError,
     "dim: got 0, wanted nothing: Flax takes the kernel's last axis"),
    ("spectral_norm", {**ALONG, "d.kernel": np.zeros((4, 3))}, FLAX_AT_D, ValueError,
     "weight_orig: got a singular value of 0, wanted another"),
    ("spectral_norm", {**ALONG, "d.kernel.u": np.ones((1, 4))}, FLAX_AT_D, ValueError,
     r"weight_u: got shape \(1, 4\), wanted \(1, 3\)"),
])  # fmt: skip
def test_errors(kind, saved, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        load_norm(kind, saved, **options)
