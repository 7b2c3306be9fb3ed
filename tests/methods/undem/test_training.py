"""Training of a demoire network: it learns, and can be stopped anywhere."""

import pytest
import torch
from torch import nn

from qtool.methods.undem.batches import Batch
from qtool.methods.undem.training import (
    RestorationTrainer,
    TrainingConfig,
    held_out_psnr,
    rate_at,
    result_of,
)


class Halves(nn.Module):
    """One convolution, and the same at half size: what a demoire network looks like."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        full = x + self.conv(x)
        return nn.functional.avg_pool2d(full, 2), full


class Darker:
    """Pictures that are to become brighter by a tenth."""

    def __init__(self, kept=1.0):
        self.kept = kept

    def draw(self, count, generator):
        clean = torch.rand(count, 3, 8, 8, generator=generator)
        return Batch(moire=clean - 0.1, clean=clean, kept=torch.full((count,), self.kept))


def trainer(steps=60, **options):
    config = TrainingConfig(steps=steps, batch_size=4, learning_rate=0.02, warmup=5)
    return RestorationTrainer(Halves(), Darker(**options), config)


def test_the_rate_rises_then_falls():
    rates = [rate_at(step, steps=100, warmup=10) for step in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.01, abs=1e-3)


def test_training_learns():
    run = trainer(steps=150)
    before = held_out_psnr(run.average, Darker(), count=8, seed=1)
    losses = [run.step() for _ in range(150)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert held_out_psnr(run.average, Darker(), count=8, seed=1) > before + 3


def test_a_stopped_run_goes_on_as_if_never_stopped():
    whole, first, second = trainer(), trainer(), trainer()
    for _ in range(8):
        whole.step()
    for _ in range(3):
        first.step()
    second.load_state({name: value.clone() for name, value in first.state().items()})
    assert second.step_index == 3
    for _ in range(5):
        second.step()
    assert all(torch.equal(value, second.state()[name]) for name, value in whole.state().items())


def test_a_batch_without_kept_samples_changes_nothing():
    run = trainer(kept=0.0)
    before = run.network.conv.weight.clone()
    assert run.step() is None
    assert torch.equal(run.network.conv.weight, before)
    assert run.step_index == 1


def test_the_result_is_the_output_of_the_inputs_size():
    x = torch.rand(1, 3, 8, 8)
    assert result_of((torch.rand(1, 3, 4, 4), x), x) is x


def test_the_rate_can_follow_a_clock():
    def rate(step, done):
        return rate_at(step, steps=100, warmup=10, done=done)

    assert rate(4, 0.0) == 0.5
    assert rate(500, 0.0) == 1.0
    assert rate(20, 1.0) == pytest.approx(0.01)
    assert rate(20, 2.0) == pytest.approx(0.01)
