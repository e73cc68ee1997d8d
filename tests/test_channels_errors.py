"""Batch, group, instance norm and AdaIN: bad arguments. The fitting exception, which names the
argument, what was got and what was wanted, and nothing written."""

import re

import numpy as np
import pytest

import fastnorm

X = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
C = np.ones(4, np.float32)
NC = np.ones((3, 4), np.float32)
VALID = {
    "batch_norm": {"x": X, "running_mean": C, "running_var": C, "weight": C, "bias": C},
    "batch_norm_backward": {"dy": X, "x": X, "running_mean": C, "running_var": C, "weight": C,
                            "bias": C},
    "group_norm": {"x": X, "num_groups": 2, "weight": C, "bias": C},
    "group_norm_backward": {"dy": X, "x": X, "num_groups": 2, "mean": NC[:, :2], "rstd": NC[:, :2],
                            "weight": C, "bias": C},
    "instance_norm": {"x": X, "running_mean": C, "running_var": C, "weight": C, "bias": C},
    "instance_norm_backward": {"dy": X, "x": X, "mean": NC, "rstd": NC, "weight": C, "bias": C},
    "adaptive_instance_norm": {"x": X, "style": X},
}  # fmt: skip
WITH_OUT = tuple(op for op in VALID if not op.endswith("_backward"))
RUNNING = ("batch_norm", "instance_norm")
ARRAYS = ("dy", "style", "mean", "rstd", "running_mean", "running_var", "weight", "bias")


def bad_arrays():
    for op, valid in VALID.items():
        yield op, {"x": None}, TypeError
        for x in (X + 0j, X.astype(object), X.astype(str), np.ma.array(X), X.astype(np.longdouble)):
            yield op, {"x": x}, TypeError
        for x in (np.float32(1), X[0, 0]):
            yield op, {"x": x}, ValueError
        for name in ARRAYS:
            if name in valid:
                good = valid[name]
                for bad in (good + 0j, good.astype(object), np.ma.array(good)):
                    yield op, {name: bad}, TypeError
                short = good[:, :-1] if name == "style" else good[..., :-1]
                for bad in (short, good[:0], np.ones((2, *good.shape), "f4")):
                    yield op, {name: bad}, ValueError
                if not name.startswith("running_"):
                    yield op, {name: 1.0}, ValueError
        for name in {"dy", "style"} & valid.keys():
            yield op, {name: None}, TypeError
    for name in ("mean", "rstd"):
        for op in ("group_norm_backward", "instance_norm_backward"):
            yield op, {name: None}, TypeError
        both = {"mean": C, "rstd": C, "training": True}
        yield (
            "batch_norm_backward",
            {name: None, **{k: v for k, v in both.items() if k != name}},
            TypeError,
        )
    for name in ("running_mean", "running_var"):
        yield "batch_norm", {name: None}, TypeError
        yield "batch_norm_backward", {name: None}, TypeError
        yield "instance_norm", {name: None, "use_input_stats": False}, TypeError
        yield "batch_norm", {name: [1.0] * 4, "training": True}, TypeError
        yield "instance_norm", {name: [1.0] * 4}, TypeError
        yield "batch_norm", {name: C[:3], "training": True}, ValueError
        yield "instance_norm", {name: C.astype(int)}, TypeError
        yield "batch_norm", {name: C.astype(int), "training": True}, TypeError
        yield "batch_norm", {name: np.broadcast_to(C[:1], 4), "training": True}, ValueError
    for op in ("batch_norm", "group_norm", "batch_norm_backward", "group_norm_backward"):
        yield op, {"weight": NC}, ValueError
        yield op, {"bias": NC}, ValueError


def bad_options():
    for op, valid in VALID.items():
        for axis in (0, 3, -3, -4, 2**70):
            yield op, {"channel_axis": axis}, ValueError
        for axis in (1.0, None, "1", (1,)):
            yield op, {"channel_axis": axis}, TypeError
        if "num_groups" in valid:
            for groups in (0, -1, 3, 5, 2**70):
                yield op, {"num_groups": groups}, ValueError
            for groups in (2.0, None, "2"):
                yield op, {"num_groups": groups}, TypeError
        if op in WITH_OUT or op == "batch_norm_backward":
            for eps in (-1e-5, np.nan, -np.inf):
                yield op, {"eps": eps}, ValueError
            for eps in ("1e-5", None, 1j):
                yield op, {"eps": eps}, TypeError
        if op in WITH_OUT:
            for kind in ("complex64", np.int16, ">f4", object, "a word"):
                yield op, {"dtype": kind}, TypeError
            for out in (X.tolist(), 1.0, np.ma.array(X), np.zeros(X.shape), np.zeros(X.shape, int)):
                yield op, {"out": out}, TypeError
            read_only = X.copy()
            read_only.flags.writeable = False
            same = np.lib.stride_tricks.as_strided(X.copy(), X.shape, (0, 20, 4))
            for out in (np.zeros((3, 4, 4), "f4"), read_only, same):
                yield op, {"out": out}, ValueError
        if op.endswith("_backward"):
            for mask in ([True] * 2, (), None, True):
                yield op, {"output_mask": mask}, ValueError
    for op in WITH_OUT[:3]:
        yield op, {"activation": "swish"}, ValueError
        yield op, {"activation": 1}, TypeError
    for op in RUNNING:
        for momentum in (np.nan, np.inf, -np.inf):
            yield op, {"momentum": momentum}, ValueError
        for momentum in ("0.1", None, 1j, [0.1]):
            yield op, {"momentum": momentum}, TypeError
        for dialect in ("Torch", "tf", ""):
            yield op, {"dialect": dialect}, ValueError
        for dialect in (None, 1, b"torch"):
            yield op, {"dialect": dialect}, TypeError
    for ddof in (-1, 5, 2**70):
        yield "adaptive_instance_norm", {"ddof": ddof}, ValueError
    for ddof in (0.5, None, "1"):
        yield "adaptive_instance_norm", {"ddof": ddof}, TypeError


def cases(table):
    def words(change):
        (name, value), *_ = change.items()
        shown = f"{value.dtype}{value.shape}" if isinstance(value, np.ndarray) else repr(value)
        return f"{name} {type(value).__name__} {shown[:20]}"

    return pytest.mark.parametrize(
        ("op", "change", "exception"),
        [pytest.param(*row, id=f"{row[0]}-{words(row[1])}") for row in table],
    )


def copied(arguments):
    return {k: v.copy() if type(v) is np.ndarray else v for k, v in arguments.items()}


@cases([*bad_arrays(), *bad_options()])
def test_errors(op, change, exception):
    (name, _), *_ = change.items()
    arguments = copied(VALID[op]) | change
    if op in WITH_OUT:
        arguments.setdefault("out", np.full(X.shape, 7, np.float32))
    if op == "batch_norm" and not name.startswith("running_"):
        arguments["training"] = True
    arrays = {k: v for k, v in arguments.items() if type(v) is np.ndarray}
    before = {k: v.tobytes() for k, v in arrays.items()}
    with pytest.raises(exception) as caught:
        getattr(fastnorm, op)(**arguments)
    message = str(caught.value)
    said = rf"{name}: (got .*wanted |axis .* is out of bounds )"
    assert re.match(said, message, re.DOTALL), message
    for k, array in arrays.items():
        assert array.tobytes() == before[k], f"{k} was written to"


@pytest.mark.parametrize("op", VALID)
def test_the_valid_arguments_are_valid(op):
    result = getattr(fastnorm, op)(**copied(VALID[op]))
    first = result[0] if isinstance(result, tuple) else result
    assert first.shape == X.shape
