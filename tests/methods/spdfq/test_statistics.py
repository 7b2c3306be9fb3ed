"""BatchNorm statistics as a guide of synthesis, and synthesis without any guide."""

import pytest
import torch
from torch import nn

from qtool.methods.spdfq import batch as batches
from qtool.methods.spdfq import statistics
from qtool.methods.spdfq.batch import SynthesisConfig
from qtool.methods.spdfq.synthesis import batches as synthesized
from qtool.methods.spdfq.synthesis import merged
from qtool.models import vision

COUNT = 3


class KilledError(Exception):
    """Stands for whatever ends a process in the middle."""


def run(model, **options):
    config = {"steps": 4, **options.pop("config", {})}
    made = synthesized(
        model,
        vision.layout(model),
        count=COUNT,
        size=(32, 32),
        num_classes=10,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        config=SynthesisConfig(**config),
        **options,
    )
    return merged(list(made))


def test_the_distance_counts_in_remembered_standard_deviations():
    norm = nn.BatchNorm2d(2, eps=0.0)
    norm.running_mean.copy_(torch.tensor([1.0, 0.0]))
    norm.running_var.copy_(torch.tensor([4.0, 1.0]))
    x = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 2, 3, 3)
    # First channel: mean off by half a deviation, deviation half as large; second: both right.
    expected = (0.5**2 + 0.5**2) / 2
    assert float(statistics.distance(x, norm)) == pytest.approx(expected)


def test_a_norm_that_has_seen_nothing_is_no_guide(build_model, trained_norms):
    model = build_model("test_resnet", num_classes=10)
    assert statistics.remembered(model) == []
    trained_norms(model)
    assert len(statistics.remembered(model)) == 15
    model.bn1.running_mean.zero_()
    model.bn1.running_var.fill_(1.0)
    assert "bn1" not in statistics.remembered(model)


def test_only_the_first_pictures_are_measured(build_convolutional):
    model = build_convolutional("resnet")
    names = statistics.remembered(model)
    first, second = torch.rand(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with statistics.measured(model, names, count=3) as alone:
            model(first)
        with statistics.measured(model, names, count=3) as together:
            model(torch.cat((first, 5 * second)))
    assert len(alone) == len(names)
    torch.testing.assert_close(torch.stack(together), torch.stack(alone))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_images_move_towards_the_statistics(build_convolutional, monkeypatch):
    """The statistics are those of smooth pictures; the run starts from others."""
    monkeypatch.setattr(batches, "JITTER", 0.0)
    model = build_convolutional("resnet")
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(16, 3, 4, 4, generator=generator)
    pictures = nn.functional.interpolate(coarse, (32, 32), mode="bilinear")
    for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model(pictures)
    model.eval()
    config = {"steps": 30, "variation_weight": 0.0, "learning_rate": 0.05}
    made = run(model, config={**config, "alignment_weight": 100.0})
    first, last = made.history[0]["statistics"], made.history[-1]["statistics"]
    assert last < first / 2
    without = run(model, config={**config, "alignment_weight": 0.0})
    assert without.history[-1]["statistics"] > 1.5 * last


@pytest.mark.parametrize(("family", "guide"), [("resnet", {"statistics"}), ("convnext", set())])
def test_networks_without_attention_have_the_same_interface(build_convolutional, family, guide):
    made = run(build_convolutional(family))
    assert made.images.shape == (COUNT, 3, 32, 32)
    assert made.priors == {}
    assert made.boxes
    assert made.patch_agreement.shape == (len(made.boxes),)
    for record in made.history:
        assert set(record) == guide | {"classification", "variation", "step"}
    assert float(made.images.min()) >= -2.0
    assert float(made.images.max()) <= 2.0


@pytest.mark.parametrize("family", ["mobilenet", "convnext"])
def test_an_interrupted_run_ends_with_the_same_images(build_convolutional, monkeypatch, family):
    monkeypatch.setattr(batches, "_CHECKPOINT_EVERY", 1)
    model = build_convolutional(family)
    whole = run(model)
    saved = {}

    def keep(index, state):
        saved[index] = state
        if int(state["step"]) == 3:
            raise KilledError

    with pytest.raises(KilledError):
        run(model, checkpoint=keep)
    resumed = run(model, resume=saved.get)
    assert torch.equal(resumed.images, whole.images)
    assert resumed.history == whole.history
