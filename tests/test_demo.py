"""python -m fastnorm demo: the network learns, what it normalises is checked, claims are judged by
what was measured."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the extra [demo] is not installed")
pytest.importorskip("matplotlib", reason="the extra [demo] is not installed")
pytest.importorskip("rich", reason="the extra [demo] is not installed")

from fastnorm import demo, demo_network, demo_report, demo_training
from fastnorm.demo_network import Checks, Network, cross_entropy

NORMS = list(demo_training.NORMS)


@pytest.fixture(scope="module")
def few():
    """64 digits of each kind."""
    data = demo_training.digits()
    return demo_training.Digits(
        *(getattr(data, f.name).cut(0, 64) for f in dataclasses.fields(data))
    )


def test_digits_are_whole_batches_and_disjoint():
    data = demo_training.digits()
    counts = [len(split.labels) for split in (data.learn, data.choose, data.test)]
    assert counts == [832, 192, 768]
    assert not any(count % max(demo_training.BATCH_SIZES) for count in counts)


# ---- the network --------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_goes_down_the_gradient(norm, few):
    """The change of the loss, by the change of a weight, of a norm's weight and of a bias."""
    images, labels = few.learn.images[:16], few.learn.labels[:16]
    network = Network(norm, seed=3)
    loss = network.step(images, labels, np.float32(0.05))
    assert loss == pytest.approx(np.log(10), rel=0.7)
    after = cross_entropy(network.logits(images, 16), labels)[0]
    assert after < loss
    rate = np.float32(1e-3)
    parameters = [*network.weights, *network.biases]
    parameters += [p for n in network.norms for p in n.layer.parameters().values()]
    before = [p.copy() for p in parameters]
    loss = network.step(images, labels, rate)
    gradients = [(b - p).astype(np.float64) / rate for b, p in zip(before, parameters, strict=True)]
    # Along the gradient the loss falls as fast as the gradient says.
    expected = rate * sum((g**2).sum() for g in gradients)
    change = loss - cross_entropy(network.logits(images, 16), labels)[0]
    assert change == pytest.approx(expected, rel=0.1)


def test_layer_norm_needs_no_batch(few):
    network = Network("layer", seed=3)
    images = few.test.images
    np.testing.assert_allclose(network.logits(images, 1), network.logits(images), atol=1e-5)


def test_batch_norm_of_one_is_its_bias(few):
    """Whatever the image: so a network cannot learn from batches of one."""
    network = Network("batch", seed=3)
    logits = network.logits(few.test.images, 1)
    assert np.ptp(logits, axis=0).max() == 0
    assert np.ptp(network.logits(few.test.images, 4), axis=0).max() > 0.1


def test_tests_leave_batch_norm_as_it_is(few):
    network = Network("batch", seed=3)
    network.step(few.learn.images, few.learn.labels, np.float32(0.1))
    layer = network.norms[0].layer
    before = layer.running_mean.copy(), layer.running_var.copy()
    network.logits(few.test.images, 4)
    network.logits(few.test.images)
    np.testing.assert_array_equal(layer.running_mean, before[0])
    np.testing.assert_array_equal(layer.running_var, before[1])
    assert layer.training


# ---- checks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_call_is_checked(norm, batch_size, few, monkeypatch):
    monkeypatch.setattr(demo_network, "KEPT", 1000)
    checks = Checks()
    demo_training.Run(norm, batch_size, 0.3, 1, checks).train(few, epochs=1)
    steps, tests = 64 // batch_size, 64 // batch_size
    op = "layer_norm" if norm == "layer" else "batch_norm_training"
    # Two norms. Inference: the test, and the digits to choose by.
    in_inference = 2 * 2
    forward = 2 * (steps + tests)
    assert checks.counts[f"{op}_backward"] == 2 * steps
    if norm == "layer":
        assert checks.counts[op] == forward + in_inference
    else:
        assert checks.counts[op] == forward
        assert checks.counts["batch_norm"] == in_inference
    assert checks.passed


@pytest.mark.parametrize("what", ["y", "dx", "weight"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a_wrong_result_is_found(norm, what, few):
    checks = Checks()
    network = Network(norm, 1, checks)
    checked = network.norms[1]
    right = checked.layer

    class Wrong:
        """The module, with one element of one result a little off."""

        def __getattr__(self, name):
            return getattr(right, name)

        def forward(self, x):
            y, saved = right.forward(x)
            y[0, 5] += 1e-4 * (what == "y")
            return y, saved

        def backward(self, dy, saved):
            dx, grads = right.backward(dy, saved)
            dx[0, 5] += 1e-3 * (what == "dx")
            grads["weight"][5] += 1e-3 * (what == "weight")
            return dx, grads

    checked.layer = Wrong()
    checked.is_batch_norm = norm == "batch"
    network.step(few.learn.images, few.learn.labels, np.float32(0.1))
    network.check()
    assert not checks.passed


# ---- what is reported ---------------------------------------------------------------------------


def settings_of(accuracies):
    """Settings whose runs have these shares right: by norm and batch size, (training, inference)
    of each seed."""
    settings = []
    for (norm, size), runs in accuracies.items():
        made = [
            demo_training.Run(norm, size, 1.0, seed, None, [0.1], [training], [inference])
            for seed, (training, inference) in enumerate(runs)
        ]
        settings.append(demo_training.Setting(norm, size, 1.0, made, Checks()))
    return settings


def same(*shares):
    return [(share, share) for share in shares]


AS_CLAIMED = {
    ("none", 1): same(0.95, 0.96, 0.97),
    ("layer", 1): same(0.96, 0.97, 0.981),
    ("batch", 1): same(0.1, 0.11, 0.08),
    ("none", 4): same(0.95, 0.96, 0.97),
    ("layer", 4): same(0.961, 0.969, 0.98),
    ("batch", 4): [(0.8, 0.93), (0.81, 0.94), (0.82, 0.951)],
    ("none", 64): same(0.94, 0.95, 0.96),
    ("layer", 64): same(0.95, 0.961, 0.97),
    ("batch", 64): [(0.96, 0.97), (0.97, 0.98), (0.98, 0.989)],
}


def verdicts(accuracies):
    return [claim.verdict for claim in demo_report.claims(settings_of(accuracies))]


def test_claims():
    assert verdicts(AS_CLAIMED) == ["shown"] * 5


@pytest.mark.parametrize(
    ("which", "runs", "claim", "verdict"),
    [
        (("layer", 1), same(0.86, 0.87, 0.88), 0, "in part"),
        (("layer", 4), [(0.9, 0.961), (0.9, 0.97), (0.9, 0.98)], 1, "refuted"),
        (("batch", 4), [(0.98, 0.93), (0.99, 0.94), (1.0, 0.95)], 2, "in part"),
        (("batch", 4), [(0.8, 0.98), (0.81, 0.99), (0.82, 1.0)], 3, "in part"),
        (("batch", 1), same(0.5, 0.55, 0.6), 4, "refuted"),
    ],
)
def test_claims_can_be_refuted(which, runs, claim, verdict):
    expected = ["shown"] * 5
    expected[claim] = verdict
    assert verdicts(AS_CLAIMED | {which: runs}) == expected


def test_the_command(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "QUICK_EPOCHS", 1)
    monkeypatch.setattr(demo, "digits", lambda: few)
    monkeypatch.setattr(demo, "measure_speed", lambda seconds, tick: SPEEDS)
    plot = tmp_path / "demo.png"
    assert demo.run(str(plot), quick=True) == 0
    printed = capsys.readouterr().out
    for words in ("no norm", "layer norm", "batch norm", "training mode", "within 1e-06"):
        assert words in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


SPEEDS = [
    demo_report.Speed(size, op, 1e-6, 2e-6, 2.0)
    for size in demo_training.BATCH_SIZES
    for op in demo_network.OPS
]


def test_a_failed_check_is_reported(few, capsys):
    wrong = Checks()
    wrong.add("layer_norm", 0.5)
    runs = [demo_training.Run("layer", 4, 1.0, 1, wrong, [0.1], [0.9], [0.9])]
    assert demo.report([demo_training.Setting("layer", 4, 1.0, runs, wrong)]) == 1
    assert "FAILED: batch size 4, layer norm: errors layer_norm 5.0e-01" in capsys.readouterr().out
