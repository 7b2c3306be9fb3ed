"""The adversarial game over moire patches."""

import pytest
import torch

from qtool.errors import QtoolError
from qtool.methods.undem.capture import Draw
from qtool.methods.undem.synthesis import (
    MoireSynthesizer,
    Probe,
    ReplayBuffer,
    SynthesisConfig,
    best_probe,
)


def game(steps=4):
    random = torch.Generator().manual_seed(0)
    moire = [torch.rand(3, 40, 40, generator=random) for _ in range(2)]
    clean = [torch.rand(3, 44, 44, generator=random) for _ in range(2)]
    config = SynthesisConfig(steps=steps, crop=32, batch_size=2, width=8, buffer=3)
    return MoireSynthesizer(moire, clean, config)


def probe(loss, belief):
    return Probe(feature=loss, content=0.0, belief=belief, variance=1.0)


def test_both_sides_learn_and_the_rate_falls_in_the_second_half():
    run = game()
    before = {name: value.clone() for name, value in run.state().items()}
    losses = run.step()
    assert set(losses) == {"adversarial", "feature", "content", "discriminator"}
    after = run.state()
    for part in ("encoder", "content", "generator", "discriminator"):
        name = next(key for key in before if key.startswith(f"{part}/") and "weight" in key)
        assert not torch.equal(before[name], after[name])
    rates = [run.painting.param_groups[0]["lr"]]
    for _ in range(3):
        run.step()
        rates.append(run.painting.param_groups[0]["lr"])
    assert rates == pytest.approx([2e-4, 2e-4, 2e-4, 1e-4])


def test_a_stopped_game_goes_on_as_if_never_stopped():
    whole, first, second = game(), game(), game()
    for run in (whole, first):
        run.step()
        run.probe()
        run.step()
    second.load_state({name: value.clone() for name, value in first.state().items()})
    for run in (whole, second):
        run.step()
    assert second.step_index == 3
    assert second.probes == whole.probes
    state = second.state()
    assert all(torch.equal(value, state[name]) for name, value in whole.state().items())


def test_the_probe_watches_the_same_crops():
    run = game()
    first, second = run.probe(), run.probe()
    assert first == second
    assert len(run.sheet()) == 12
    assert all(tile.shape == (3, 32, 32) for tile in run.sheet())


def test_a_collapsed_encoder_stops_the_training():
    run = game()
    with torch.no_grad():
        for parameter in run.encoder.parameters():
            parameter.zero_()
    with pytest.raises(QtoolError, match="collapsed"):
        run.probe()


def test_the_best_probe_is_balanced():
    assert best_probe([probe(1, 0.5), probe(2, 0.5), probe(0.1, 0.9)]) == 0
    assert best_probe([probe(1, 0.1), probe(2, 0.9)]) == 1
    assert best_probe([probe(3, 0.3), probe(2, 0.7), probe(4, 0.4)]) == 1


def test_the_buffer_fills_first_and_then_swaps():
    buffer = ReplayBuffer(2)
    draw = Draw(torch.Generator().manual_seed(0))
    first = torch.arange(2.0).view(2, 1, 1, 1)
    assert torch.equal(buffer.exchange(first, draw), first)
    seen = [float(buffer.exchange(torch.full((1, 1, 1, 1), 9.0), draw)) for _ in range(20)]
    assert {0.0, 1.0} <= set(seen)
    assert 9.0 in seen
    assert len(buffer.stored) == 2


def test_the_rate_can_follow_a_clock():
    run = game()
    for done, share in ((0.2, 1.0), (0.75, 0.5), (0.9, 0.2)):
        run.step(done)
        assert run.painting.param_groups[0]["lr"] == pytest.approx(2e-4 * share)
