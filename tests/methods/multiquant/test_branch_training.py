"""Training of branches: steps, what moves, and going on after an interruption."""

import pytest
import torch

from qtool.methods.multiquant import branch_training
from qtool.methods.multiquant.branch_training import (
    BranchTrainer,
    BranchTraining,
    accuracy,
    rate_at,
)
from qtool.methods.multiquant.branches import branched, freeze, observe
from qtool.methods.processes import processes, rank
from qtool.models.residual import residual_layout

SIZE = (3, 8, 8)
WIDTHS = (2, 4, 8)


def batch(seed=0, count=12):
    """Noisy pictures whose strongest channel is their class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randn(count, *SIZE, generator=generator) * 0.5
    images[torch.arange(count), labels] += 1
    return images, labels


@pytest.fixture
def trainer(tiny_resnet):
    def make(*, steps=4, rate=0.02, **options):
        network, _ = branched(
            tiny_resnet, residual_layout(tiny_resnet, input_size=SIZE), widths=WIDTHS
        )
        observe(network, batch()[0])
        config = BranchTraining(steps=steps, learning_rate=rate, **options)
        return BranchTrainer(network, config)

    return make


def test_the_rate_falls_by_half_a_cosine():
    assert rate_at(0, 10) == 1
    assert rate_at(5, 10) == pytest.approx(0.5)
    assert rate_at(10, 10) == pytest.approx(0)


def test_training_learns_at_every_width(trainer):
    made = trainer(steps=12, rate=0.05)
    first = made.step(*batch(0))
    for seed in range(1, 12):
        last = made.step(*batch(seed))
    assert list(first) == [8, 4, 2]
    assert all(last[width] < 0.7 * first[width] for width in WIDTHS)
    batches = [batch(100), batch(101)]
    found = accuracy(made.network.eval(), batches)
    assert min(found.values()) > 0.6
    assert accuracy(freeze(made.network), batches) == found


def test_branches_that_always_run_together_stay_apart(trainer):
    made = trainer(steps=6)
    for seed in range(6):
        made.step(*batch(seed))
    second, third = (made.network.body(k).unit("layer1.0.conv1").weight for k in (1, 2))
    assert not torch.equal(second, third)
    assert float((second - third).detach().abs().max()) > 1e-3


def test_everything_moves(trainer):
    made = trainer()
    before = {name: p.detach().clone() for name, p in made.network.named_parameters()}
    made.step(*batch())
    still = [name for name, p in made.network.named_parameters() if torch.equal(p, before[name])]
    assert still == []


def test_the_widest_setting_teaches_unless_it_is_switched_off(trainer, monkeypatch):
    seen = []
    plain = branch_training.width_loss

    def watched(logits, labels, teacher):
        seen.append(teacher)
        return plain(logits, labels, teacher)

    monkeypatch.setattr(branch_training, "width_loss", watched)
    trainer().step(*batch())
    assert seen[0] is None
    assert seen[1] is seen[2]
    assert not seen[1].requires_grad
    seen.clear()
    trainer(distill=False).step(*batch())
    assert seen == [None] * 3


def test_an_interrupted_training_goes_on_as_if_it_never_stopped(trainer):
    whole = trainer()
    for seed in range(4):
        whole.step(*batch(seed))
    half = trainer()
    for seed in range(2):
        half.step(*batch(seed))
    state = half.state()
    rest = trainer()
    rest.load_state(state)
    assert rest.step_index == 2
    for seed in (2, 3):
        rest.step(*batch(seed))
    expected, found = whole.state(), rest.state()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_one_process_shares_nothing(trainer):
    made = trainer()
    before = [buffer.clone() for buffer in made.network.buffers()]
    made.share_statistics()
    pairs = zip(before, made.network.buffers(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert (rank(), processes()) == (0, 1)


def test_nothing_measured_is_nothing_right(trainer):
    assert accuracy(trainer().network, []) == {2: 0.0, 4: 0.0, 8: 0.0}
