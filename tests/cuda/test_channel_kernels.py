"""The kernels of batch, group and instance norm, their PTX executed by the interpreter: against
float64, to the bit on repeat, and what they move."""

import numpy as np
import pytest

pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
pytest.importorskip("numba.cuda", reason="numba, which compiles the kernels, is not installed")

from fastnorm.cuda import channel_plan, compiler, plan

from . import running
from .ptx import Memory, launch
from .running import BFLOAT16, F4, F8, WIDE, assert_near, random

if compiler.available():
    pytest.skip(compiler.available(), allow_module_level=True)

EPS = 1e-5


def run(planned, arrays, outputs, **numbers):
    """Launch the plan's steps on arrays; the results by name, and what each step moved."""
    flat = {name: np.ascontiguousarray(a).reshape(-1).copy() for name, a in arrays.items()}
    for name, count, kind in planned.workspace:
        flat[name] = np.zeros(count, running.DTYPES[kind])
    written = [name for name in outputs if not name.startswith("running")]
    memory = Memory(flat, unwritten=[*written, *[name for name, *_ in planned.workspace]])
    values = {"eps": EPS, "offset": 0.0} | numbers | dict(planned.numbers)
    stats = []
    for step in planned.steps:
        given = [memory[name] if name in flat else values[name] for name in step.arguments]
        stats.append(launch(running.kernel(step.spec), step.grid, step.block, given, memory,
                            shared=step.shared))  # fmt: skip
    return {name: memory.read(name).reshape(arrays[name].shape) for name in outputs}, stats


def types_of(arrays):
    return {name: array.dtype.name for name, array in arrays.items()}


def alignment_of(x, cols):
    return int(np.gcd(16, cols * x.itemsize))


def made(shape, dtype, seed=0):
    return (random(shape, F8, seed) + 0.5).astype(dtype)


# ---- rows: group and instance norm, channels first -----------------------------------------------


class Groups:
    """x (samples, channels, run) in groups of channels, as rows."""

    def __init__(self, samples, channels, groups, run, dtype=F4, parameters=F4, pairs=False):
        self.x, self.dy = (made((samples, channels, run), dtype, seed) for seed in (0, 1))
        shape = (samples, channels) if pairs else channels
        self.weight, self.bias = made(shape, parameters, 2), made(shape, parameters, 3)
        self.samples, self.groups, self.pairs = samples, groups, pairs
        self.rows, self.each, self.run = samples * groups, channels // groups, run
        self.cols = self.each * run
        self.alignment = alignment_of(self.x, self.cols)
        self.own = self.mod > 1
        wide = self.x.astype(WIDE).reshape(samples, groups, -1)
        self.mean = wide.mean(-1, keepdims=True)
        self.rstd = 1 / np.sqrt(wide.var(-1, keepdims=True) + WIDE(EPS))
        self.xh = (wide - self.mean) * self.rstd

    @property
    def mod(self):
        return self.rows if self.pairs else self.groups

    def numbers(self):
        strides = dict.fromkeys(("x_stride", "y_stride", "dy_stride", "dx_stride"), self.cols)
        steps = {"weight_div": 1, "weight_mod": self.mod, "bias_div": 1, "bias_mod": self.mod}
        return {"rows": self.rows, "cols": self.cols, "channels": self.each, **strides, **steps,
                **plan.run_numbers(self.run)}  # fmt: skip

    def by_channel(self, parameter):
        return parameter.astype(WIDE).reshape(-1, parameter.shape[-1], 1)

    def check_forward(self):
        compute = running.compute_type(self.x.dtype)
        arrays = {"x": self.x, "weight": self.weight, "bias": self.bias, "y": np.zeros_like(self.x)}
        arrays |= {name: np.zeros(self.rows, compute) for name in ("mean", "rstd")}
        planned = plan.forward(
            self.rows, self.cols, types_of(arrays), alignment=self.alignment, rms=False,
            return_stats=True, per_row={"weight": self.own, "bias": self.own}, run=self.run,
        )  # fmt: skip
        got, stats = run(planned, arrays, ["y", "mean", "rstd"], **self.numbers())
        y = self.xh.reshape(self.x.shape) * self.by_channel(self.weight)
        assert_near(got["y"], y + self.by_channel(self.bias), self.precise)
        np.testing.assert_allclose(got["rstd"], self.rstd.ravel().astype(F8), rtol=1e-6)
        return planned.steps[0].spec, stats[0]

    @property
    def precise(self):
        return 1e-13 if self.x.dtype == F8 else 1e-6

    def check_backward(self):
        compute = running.compute_type(self.x.dtype)
        arrays = {"dy": self.dy, "x": self.x, "weight": self.weight, "dx": np.zeros_like(self.x)}
        arrays["mean"] = self.mean.ravel().astype(compute)
        arrays["rstd"] = self.rstd.ravel().astype(compute)
        for name in ("dweight", "dbias"):
            arrays[name] = np.zeros(self.weight.shape, compute)
        planned = channel_plan.group_backward(
            self.samples, self.groups, self.each, self.run, types_of(arrays),
            alignment=self.alignment, own=self.own, pairs=self.pairs,
        )  # fmt: skip
        got, stats = run(planned, arrays, ["dx", "dweight", "dbias"], **self.numbers())
        dy, xh = self.dy.astype(WIDE), self.xh
        g = (dy * self.by_channel(self.weight)).reshape(xh.shape)
        dx = g - g.mean(-1, keepdims=True) - xh * (g * xh).mean(-1, keepdims=True)
        terms = (self.rstd * np.abs(g).max(-1, keepdims=True) + 0 * g).reshape(dy.shape)
        assert_near(got["dx"], (self.rstd * dx).reshape(dy.shape), self.precise, terms)
        over = 2 if self.pairs else (0, 2)
        for name, part in (("dweight", dy * xh.reshape(dy.shape)), ("dbias", dy)):
            size = np.maximum(np.abs(part), np.abs(dy)).sum(over)
            assert_near(got[name], part.sum(over), self.precise, size)
        return planned, stats


def test_groups_read_each_element_once():
    """A chunk has one channel here, whose weight is one number."""
    groups = Groups(3, 12, 4, 20)
    spec, moved = groups.check_forward()
    assert spec.flags == ("each:bias", "each:weight", "runs")
    count = groups.x.nbytes // 16
    assert moved["x"].loads == moved["y"].stores == {16: count}
    assert moved["weight"].loads == moved["bias"].loads == {4: count}
    planned, stats = groups.check_backward()
    assert [step.spec.kernel for step in planned.steps] == ["backward", "plane_sums", "reduce"]
    for moved in stats[:2]:
        assert moved["x"].loads == moved["dy"].loads == {16: count}
    assert stats[0]["dx"].stores == {16: count}


@pytest.mark.parametrize(("dtype", "parameters"), [(BFLOAT16, F4), (F8, F8)], ids=str)
def test_chunks_of_several_channels(dtype, parameters):
    groups = Groups(2, 12, 3, 7, dtype, parameters)
    assert "mixed" in groups.check_forward()[0].flags
    groups.check_backward()


def test_a_pair_of_parameters_a_sample():
    groups = Groups(2, 6, 6, 24, pairs=True)
    groups.check_forward()
    planned, _ = groups.check_backward()
    assert [step.spec.kernel for step in planned.steps] == ["backward", "plane_sums"]


def test_groups_of_wide_rows():
    groups = Groups(1, 4, 2, 17000)
    assert groups.check_forward()[0].kernel == "forward_wide"
    planned, _ = groups.check_backward()
    assert planned.steps[0].spec.kernel == "backward_wide"


# ---- batch norm, and groups of channels that come last -------------------------------------------


class Batch:
    """x (outer, rows, channels, run): statistics of a channel, or of a group, of each `outer`."""

    def __init__(self, outer, rows, width, run, groups=0, dtype=F4, change=None):
        self.layout = channel_plan.Layout(outer, rows, width, run)
        shape = (outer, rows, width, run)
        self.x, self.dy = made(shape, F8), made(shape, dtype, 1)
        self.x = (self.x if change is None else change(self.x)).astype(dtype)
        self.weight, self.bias = made(width, F4, 2), made(width, F4, 3)
        self.groups, self.of_batch = groups or width, not groups
        self.alignment = alignment_of(self.x, width * run)
        self.statistic = F8 if self.of_batch else running.compute_type(self.x.dtype)
        wide = self.grouped(self.x)
        with np.errstate(invalid="ignore"):
            self.mean, self.var = wide.mean((1, 3), keepdims=True), wide.var((1, 3), keepdims=True)
        self.count = wide.shape[1] * wide.shape[3]

    def grouped(self, array):
        outer, rows, _, _ = self.x.shape
        return array.astype(WIDE).reshape(outer, rows, self.groups, -1)

    def channels(self, parameter):
        return np.broadcast_to(parameter.astype(WIDE)[:, None], self.x.shape[2:])

    def check_forward(self, dialect=None, eps=EPS, precise=1e-6):
        arrays = {"x": self.x, "weight": self.weight, "bias": self.bias, "y": np.zeros_like(self.x)}
        size = self.layout.outer * self.groups
        arrays |= {name: np.zeros(size, self.statistic) for name in ("mean", "rstd")}
        numbers = {"keep": 0.0, "take": 0.0, "bessel": 1.0}
        if dialect:
            arrays |= {"running_mean": made(size, F4, 4), "running_var": made(size, F4, 5) ** 2}
            numbers = {"keep": 0.75, "take": 0.25, "bessel": self.count / (self.count - 1)}
        planned = channel_plan.batch(
            self.layout, types_of(arrays), alignment=self.alignment, training=True,
            groups=0 if self.of_batch else self.groups,
        )  # fmt: skip
        outputs = [name for name in arrays if name not in ("x", "weight", "bias")]
        got, stats = run(planned, arrays, outputs, eps=eps, **numbers)
        rstd = 1 / np.sqrt(self.var + WIDE(eps))
        xh = ((self.grouped(self.x) - self.mean) * rstd).reshape(self.x.shape)
        y = xh * self.channels(self.weight) + self.channels(self.bias)
        assert_near(got["y"], y, precise, np.maximum(1, np.abs(y).max((1, 3), keepdims=True)))
        np.testing.assert_allclose(got["rstd"].astype(WIDE), rstd.ravel(), rtol=precise)
        spread = np.abs(self.mean) + 1 / rstd
        assert_near(got["mean"], self.mean.ravel(), precise, spread.ravel())
        if dialect:
            for name, batch in (("mean", self.mean), ("var", self.var * numbers["bessel"])):
                old = arrays[f"running_{name}"]
                want = 0.75 * old.astype(WIDE) + 0.25 * batch.ravel()
                np.testing.assert_allclose(got[f"running_{name}"], want.astype(F4), rtol=3e-6)
        return planned, stats, got

    def check_backward(self, known=True, training=True, precise=1e-6):
        rstd = 1 / np.sqrt(self.var + WIDE(EPS))
        arrays = {"dy": self.dy, "x": self.x, "weight": self.weight, "dx": np.zeros_like(self.x)}
        if known:
            arrays |= {"mean": self.mean.ravel().astype(self.statistic),
                       "rstd": rstd.ravel().astype(self.statistic)}  # fmt: skip
        elif not training:
            arrays |= {"running_mean": self.mean.ravel().astype(F4) + F4.type(0.25),
                       "running_var": self.var.ravel().astype(F4)}  # fmt: skip
        compute = running.compute_type(self.x.dtype)
        arrays |= {name: np.zeros(self.layout.width, compute) for name in ("dweight", "dbias")}
        planned = channel_plan.batch_backward(
            self.layout, types_of(arrays), alignment=self.alignment, training=training,
            groups=0 if self.of_batch else self.groups, known=known,
        )  # fmt: skip
        numbers = {"keep": 0.0, "take": 0.0, "bessel": 1.0}
        got, stats = run(planned, arrays, ["dx", "dweight", "dbias"], **numbers)
        mean = self.mean
        if "running_mean" in arrays:
            mean = arrays["running_mean"].astype(WIDE)[:, None]
            rstd = 1 / np.sqrt(arrays["running_var"].astype(WIDE)[:, None] + WIDE(EPS))
        dy, xh = self.dy.astype(WIDE), (self.grouped(self.x) - mean) * rstd
        g = self.grouped(dy * self.channels(self.weight))
        dx = g
        if training:
            dx = g - g.mean((1, 3), keepdims=True)
            dx = dx - xh * (g * xh).mean((1, 3), keepdims=True)
        terms = rstd * np.abs(g).max((1, 3), keepdims=True) * np.maximum(1, np.abs(xh)) + 0 * g
        assert_near(got["dx"], (rstd * dx).reshape(dy.shape), precise, terms.reshape(dy.shape))
        for name, part in (("dweight", dy * xh.reshape(dy.shape)), ("dbias", dy)):
            size = np.maximum(np.abs(part), np.abs(dy)).sum((0, 1, 3))
            assert_near(got[name], part.sum((0, 1, 3)), precise, size)
        return planned, stats


def kernels_of(planned):
    return [step.spec.kernel for step in planned.steps]


def test_batches_of_planes():
    batch = Batch(1, 6, 5, 12)
    planned, stats, _ = batch.check_forward("torch")
    assert kernels_of(planned) == ["forward", "merge", "apply"]
    count = batch.x.nbytes // 16
    assert stats[0]["x"].loads == stats[2]["x"].loads == stats[2]["y"].stores == {16: count}
    planned, stats = batch.check_backward()
    assert kernels_of(planned) == ["plane_sums", "merge_sums", "apply_backward"]
    for moved in (stats[0], stats[2]):
        assert moved["x"].loads == moved["dy"].loads == {16: count}
    assert stats[2]["dx"].stores == {16: count}


def test_batches_of_columns():
    batch = Batch(1, 150, 24, 1)
    planned, stats, _ = batch.check_forward("torch")
    assert kernels_of(planned) == ["column_moments", "merge", "apply"]
    count = batch.x.nbytes // 16
    assert stats[0]["x"].loads == stats[2]["x"].loads == stats[2]["y"].stores == {16: count}
    planned, stats = batch.check_backward()
    assert kernels_of(planned) == ["column_sums", "merge_sums", "apply_backward"]
    assert stats[0]["x"].loads == stats[2]["dy"].loads == {16: count}


@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (1, 70, 5, 1)], ids=["planes", "columns"])
def test_batches_of_bfloat16(shape):
    """Planes whose chunks are of several channels, and columns of single elements."""
    batch = Batch(*shape, dtype=BFLOAT16)
    batch.check_forward()
    batch.check_backward(known=False)


def test_batches_of_float64():
    batch = Batch(1, 3, 5, 8, dtype=F8)
    batch.check_forward(precise=1e-13)
    batch.check_backward(precise=1e-13)


def test_gradients_of_running_statistics():
    batch = Batch(1, 6, 5, 12)
    planned, _ = batch.check_backward(known=False, training=False)
    assert kernels_of(planned) == ["prepare", "plane_sums", "merge_sums", "prepare", "apply"]


def hard(x):
    """A channel each: large means, numbers that are huge or tiny, and one number alone."""
    scales = np.array([1, 1, 1e37, 1e-30, 0]).reshape(5, 1)
    means = np.array([1e6, -3e4, 0, 0, 0.1]).reshape(5, 1)
    return x * scales + means


@pytest.mark.parametrize("shape", [(1, 6, 5, 12), (1, 70, 5, 1)], ids=["planes", "columns"])
@pytest.mark.parametrize("eps", [EPS, 1e-36])
def test_hard_channels(shape, eps):
    batch = Batch(*shape, change=hard)
    _, _, got = batch.check_forward(eps=eps)
    assert (got["y"][:, :, 4] == batch.bias[4]).all()


def test_one_element_a_channel():
    batch = Batch(1, 1, 24, 1)  # of kernels that are compiled above
    _, _, got = batch.check_forward()
    assert (got["y"].ravel() == batch.bias).all()


def test_a_channel_that_is_not_finite():
    def spoil(x):
        x[0, 1, 2, 3] = np.nan
        return x

    batch = Batch(1, 6, 5, 12, change=spoil)
    arrays = {"x": batch.x, "y": np.zeros_like(batch.x)}
    planned = channel_plan.batch(batch.layout, types_of(arrays), alignment=16, training=True)
    got, _ = run(planned, arrays, ["y"], keep=0.0, take=0.0, bessel=1.0)
    assert np.isnan(got["y"][:, :, 2]).all()
    assert np.isfinite(np.delete(got["y"], 2, axis=2)).all()


@pytest.mark.parametrize("groups", [3, 12], ids=["groups", "instances"])
def test_groups_of_channels_that_come_last(groups):
    """Batches' kernels, a sample at a time; means are corrected in the gradients too."""
    batch = Batch(3, 70, 12, 1, groups=groups, change=lambda x: x + 1000)
    batch.check_forward()
    planned, _ = batch.check_backward(precise=3e-6)
    assert kernels_of(planned) == ["column_sums", "merge_sums", "reduce", "apply_backward"]


def test_running_statistics_of_instances():
    x = made((4, 5, 12), F4)
    arrays = {"x": x, "running_mean": np.zeros(5, F4), "running_var": np.ones(5, F8)}
    builder = channel_plan.averages(channel_plan.Layout(1, 4, 5, 12), types_of(arrays),
                                    alignment=16)  # fmt: skip
    got, _ = run(builder.done("", 16, ""), arrays, ["running_mean", "running_var"], keep=0.75,
                 take=0.25, bessel=12 / 11)  # fmt: skip
    wide = x.astype(F8)
    np.testing.assert_allclose(got["running_mean"], 0.25 * wide.mean((0, 2)), rtol=1e-6)
    want = 0.75 + 0.25 * wide.var(2, ddof=1).mean(0)
    np.testing.assert_allclose(got["running_var"], want, rtol=1e-6)


def test_the_same_bits_on_repeat():
    batch = Batch(1, 70, 5, 12)
    first, second = (batch.check_forward()[2] for _ in range(2))
    for name, array in first.items():
        assert array.tobytes() == second[name].tobytes()
