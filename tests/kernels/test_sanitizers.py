"""Every kernel file on small layers: the same bits in three scheduling orders, and no sanitizer complains."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.gpu_layer_problems import LayerProblem
from convservice_backends.cuda.algorithms import NAMES
from convservice_emulator.build import Compiler
from convservice_emulator.recording import Recorded, replay
from convservice_emulator.sanitizers import Sanitizer
from tests.kernels.samples import EVERY, SAMPLES, Sample, recorded, recorded_copy

ORDERS = (0, 1, 2)

each_sample = pytest.mark.parametrize("sample", EVERY, ids=str)


def assert_same(launch: Recorded, buffers: tuple[np.ndarray, ...], where: str) -> None:
    """What a run left in a launch's buffers is what was recorded."""
    for buffer, found in zip(launch.buffers, buffers, strict=True):
        assert np.array_equal(found, buffer.after), f"{launch.kernel.name} {where}"


def test_every_algorithm_has_a_sample() -> None:
    assert {sample.algorithm for sample in SAMPLES} == set(NAMES)


@each_sample
def test_three_orders_give_the_same_bits(compiler: Compiler, sample: Sample | LayerProblem) -> None:
    for launch in recorded(compiler, sample):
        for order in ORDERS:
            for seed in (1, 2) if order == 2 else (1,):
                found = replay(compiler, launch, order=order, seed=seed)
                assert_same(launch, found, f"in order {order}")


@pytest.mark.slow
@each_sample
def test_a_sanitizer_has_nothing_to_say(
    compiler: Compiler, sanitizer: Sanitizer, sample: Sample | LayerProblem
) -> None:
    for launch in recorded(compiler, sample):
        report = sanitizer.run(launch)
        assert not report.text, f"{launch.kernel.name}: {report.text}"
        assert_same(launch, report.buffers, "under a sanitizer")


@pytest.mark.parametrize("rounded", [False, True], ids=["copied", "rounded"])
def test_a_sanitizer_has_nothing_to_say_of_copies(
    compiler: Compiler, sanitizer: Sanitizer, rounded: bool
) -> None:
    launch = recorded_copy(compiler, rounded)
    report = sanitizer.run(launch)
    assert not report.text
    assert_same(launch, report.buffers, "under a sanitizer")
