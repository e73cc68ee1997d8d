"""The trainings of ``python -m fastnorm demo``: which there are, and what is measured of each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from fastnorm.demo_network import Checks, Network, cross_entropy

Array = NDArray[Any]

NORMS = {"none": "no norm", "layer": "layer norm", "batch": "batch norm"}
BATCH_SIZES = (1, 4, 64)
# What is tried as the learning rate of batches of 64.
RATES = (0.3, 1.0, 3.0)


def learning_rates(rate: float, batch_size: int, epoch: int, epochs: int, steps: int) -> Array:
    """Of the steps of an epoch, (steps,) float32.

    The mean gradient of a smaller batch is noisier by the root of its size. The rates fall to 0 in
    the course of the training, so that what is tested at its end is not the noise of its last step.
    """
    left = 1 - (epoch + np.arange(steps) / steps) / epochs
    return (rate * np.sqrt(batch_size / 64) * left).astype(np.float32)


# ---- data ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    images: Array  # (count, 64) float32 in [0, 1]
    labels: Array  # (count,) int

    def cut(self, first: int, last: int) -> Split:
        return Split(self.images[first:last], self.labels[first:last])


@dataclass(frozen=True)
class Digits:
    """All are multiples of 64, so that every image is in a whole batch of any size."""

    learn: Split
    choose: Split
    test: Split


def digits() -> Digits:
    """Of 1,797: 832 to learn from, 192 to choose the learning rate by, 768 to test on."""
    data = load_digits()
    order = np.random.default_rng(1).permutation(len(data.target))
    everything = Split((data.data / 16).astype(np.float32)[order], data.target[order])
    return Digits(*(everything.cut(*ends) for ends in ((0, 832), (832, 1024), (1024, 1792))))


# ---- trainings ----------------------------------------------------------------------------------


@dataclass
class Run:
    """One training: what happened in each epoch."""

    norm: str
    batch_size: int
    rate: float
    seed: int
    checks: Checks | None = None
    loss: list[float] = field(default_factory=list)
    in_training: list[float] = field(
        default_factory=list
    )  # test accuracy by the batches' statistics
    in_inference: list[float] = field(default_factory=list)
    loss_of_choice: float = np.inf  # of the images to choose by, after the last epoch

    def train(self, data: Digits, epochs: int) -> Run:
        network = Network(self.norm, self.seed, self.checks)
        shuffles = np.random.default_rng(self.seed)
        for epoch in range(epochs):
            order = shuffles.permutation(len(data.learn.labels)).reshape(-1, self.batch_size)
            rates = learning_rates(self.rate, self.batch_size, epoch, epochs, len(order))
            losses = [
                network.step(data.learn.images[batch], data.learn.labels[batch], rate)
                for batch, rate in zip(order, rates, strict=True)
            ]
            self.loss.append(statistics.fmean(losses))
            for accuracies, size in (
                (self.in_training, self.batch_size),
                (self.in_inference, None),
            ):
                guesses = network.logits(data.test.images, size).argmax(1)
                accuracies.append(float(np.mean(guesses == data.test.labels)))
        self.loss_of_choice, _ = cross_entropy(
            network.logits(data.choose.images), data.choose.labels
        )
        network.check()
        return self


@dataclass
class Setting:
    """A norm and a batch size: the trainings at the learning rate that was chosen for it."""

    norm: str
    batch_size: int
    rate: float
    runs: list[Run]
    checks: Checks

    @property
    def name(self) -> str:
        return f"batch size {self.batch_size}, {NORMS[self.norm]}"

    @property
    def first_rate(self) -> float:
        """The learning rate of the first step."""
        return float(learning_rates(self.rate, self.batch_size, 0, 1, 1)[0])

    def of(self, what: str) -> Array:
        """`loss`, `in_training` or `in_inference` after the last epoch, of each seed."""
        return np.array([getattr(run, what)[-1] for run in self.runs])

    def mean(self, what: str) -> float:
        return float(self.of(what).mean())

    def range(self, what: str) -> tuple[float, float]:
        return float(self.of(what).min()), float(self.of(what).max())


def measure_setting(
    norm: str,
    batch_size: int,
    data: Digits,
    epochs: int,
    seeds: Sequence[int],
    tick: Callable[[], None],
) -> Setting:
    """The first seed chooses the rate: that of the least loss on images that are not tested on."""

    checks = Checks()

    def train(rate: float, seed: int) -> Run:
        checked = checks if seed == seeds[-1] else None
        run = Run(norm, batch_size, rate, seed, checked).train(data, epochs)
        tick()
        return run

    tried = [train(rate, seeds[0]) for rate in RATES]
    chosen = min(tried, key=lambda run: run.loss_of_choice)
    runs = [chosen, *(train(chosen.rate, seed) for seed in seeds[1:])]
    return Setting(norm, batch_size, chosen.rate, runs, checks)
