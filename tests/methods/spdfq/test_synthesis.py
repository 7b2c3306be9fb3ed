"""Synthesis of calibration images on tiny random models."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qtool.engine import training
from qtool.errors import CheckpointError
from qtool.methods.spdfq import batch as batches
from qtool.methods.spdfq import losses
from qtool.methods.spdfq.batch import BatchSynthesizer, SynthesisConfig, learning_rate_at
from qtool.methods.spdfq.priors import magnified
from qtool.methods.spdfq.synthesis import batches as synthesized
from qtool.methods.spdfq.synthesis import merged
from qtool.models import vision

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COUNT = 3


class KilledError(Exception):
    """Stands for whatever ends a process in the middle."""


@pytest.fixture
def vit(tiny_vit):
    """The tiny model with attention sharp enough to be moved by pixels."""
    return sharpened(tiny_vit)


def sharpened(model):
    model.requires_grad_(False)
    for site in vision.layout(model).attentions:
        model.get_submodule(site.name).qkv.weight.mul_(12.0)
    return model


def run(
    model, *, count=COUNT, batch_size=32, resume=None, checkpoint=None, progress=None, **config
):
    made = synthesized(
        model,
        vision.layout(model),
        count=count,
        size=(32, 32),
        num_classes=10,
        mean=MEAN,
        std=STD,
        config=SynthesisConfig(**{"steps": 4, **config}),
        batch_size=batch_size,
        resume=None if resume is None else resume.get,
        checkpoint=checkpoint,
        progress=progress,
    )
    return merged(list(made))


def batch(model, *, count=COUNT, **config):
    return BatchSynthesizer(
        model,
        vision.layout(model),
        count=count,
        size=(32, 32),
        num_classes=10,
        mean=MEAN,
        std=STD,
        config=SynthesisConfig(**{"steps": 4, **config}),
    )


@pytest.mark.parametrize("method", ["spdfq", "psaq", "noise"])
def test_all_methods_have_one_interface(vit, method):
    made = run(vit, method=method)
    assert made.images.shape == (COUNT, 3, 32, 32)
    assert made.labels.shape == (COUNT, 10)
    torch.testing.assert_close(made.labels.sum(1), torch.ones(COUNT))
    assert made.agreement.shape == (COUNT,)
    assert made.agreement.dtype == made.patch_agreement.dtype == torch.bool
    assert made.patch_agreement.shape == (len(made.boxes),)
    assert bool(made.boxes) == (method == "spdfq")
    assert bool(made.priors) == (method == "spdfq")
    terms = {"spdfq": {"alignment"}, "psaq": {"entropy"}, "noise": set()}[method]
    common = {"classification", "variation", "step"}
    assert [set(record) for record in made.history] == [terms | common] * (
        0 if method == "noise" else 2
    )


def test_patch_similarity_entropy_can_join_attention_alignment(tiny_vit):
    plain, joined = (
        run(tiny_vit, steps=30, learning_rate=0.1, entropy_weight=weight) for weight in (0.0, 20.0)
    )
    assert set(joined.history[0]) - set(plain.history[0]) == {"entropy"}
    assert joined.history[-1]["entropy"] > joined.history[0]["entropy"]
    assert not torch.equal(plain.images, joined.images)


PARTS = ("alignment", "patches", "soft-labels", "spectrum")


@pytest.mark.parametrize("kept", [(), *((part,) for part in PARTS), PARTS[:2], PARTS[1:3], PARTS])
def test_each_part_can_be_left_out_alone_or_with_others(vit, kept):
    made = run(vit, ablate=tuple(part for part in PARTS if part not in kept))
    assert bool(made.priors) == ("alignment" in made.history[0]) == ("alignment" in kept)
    assert bool(made.boxes) == ("patches" in kept)
    assert bool((made.labels.amax(dim=1) < 1.0).all()) == ("soft-labels" in kept)
    torch.testing.assert_close(made.labels.sum(1), torch.ones(COUNT))
    if "soft-labels" not in kept:
        chosen = made.labels.argmax(dim=1).tolist()
        boxes = {box.image: box.label for box in reversed(made.boxes)}
        assert not boxes or chosen == [boxes[image] for image in range(COUNT)]


def test_ablated_images_can_be_made_with_entropy_and_resumed(vit):
    states = {}
    config = {"ablate": ("alignment",), "entropy_weight": 1.0, "steps": 4}

    def kill(index, state):
        states[index] = state
        raise KilledError

    whole = run(vit, **config)
    assert set(whole.history[0]) == {"entropy", "classification", "variation", "step"}
    with pytest.raises(KilledError):
        run(vit, checkpoint=kill, **config)
    assert torch.equal(run(vit, resume=states, **config).images, whole.images)


def test_noise_is_standard_normal_and_left_alone(vit):
    made = run(vit, method="noise", count=8)
    assert float(made.images.mean()) == pytest.approx(0.0, abs=0.05)
    assert float(made.images.std()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("method", ["spdfq", "psaq"])
def test_pixels_stay_within_what_a_picture_can_show(vit, method):
    made = run(vit, method=method, learning_rate=2.0, steps=6)
    for channel in range(3):
        pixels = made.images[:, channel] * STD[channel] + MEAN[channel]
        assert float(pixels.min()) == pytest.approx(0.0, abs=1e-6)
        assert float(pixels.max()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("method", ["spdfq", "psaq", "noise"])
def test_the_same_seed_gives_the_same_images(vit, method):
    first, again = run(vit, method=method), run(vit, method=method)
    assert torch.equal(first.images, again.images)
    assert first.boxes == again.boxes
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, run(vit, method=method, seed=1).images)


@pytest.mark.parametrize("seed", [2**40, 2**63 - 1])
def test_large_seeds_are_seeds_too(vit, seed):
    made = run(vit, count=1, steps=1, seed=seed)
    assert torch.equal(made.images, run(vit, count=1, steps=1, seed=seed).images)


def test_every_batch_has_a_seed_of_its_own(vit):
    made = run(vit, count=5, batch_size=2)
    assert len(made.images) == 5
    assert torch.equal(made.images[:2], run(vit, count=2).images)
    assert not torch.equal(made.images[:2], made.images[2:4])
    assert {box.image for box in made.boxes} == set(range(5))
    assert {tuple(prior.shape) for prior in made.priors.values()} == {(5, 2, 16)}


@pytest.mark.parametrize(
    "config",
    [
        {"method": "spdfq"},
        {"method": "spdfq", "patches_per_step": 2},
        {"method": "spdfq", "alignment_weight": 3.0},
        {"method": "spdfq", "entropy_weight": 1.0},
        {"method": "psaq"},
    ],
    ids=["spdfq", "some patches", "given weight", "entropy too", "psaq"],
)
@pytest.mark.parametrize("last_step", [1, 3, 5])
def test_an_interrupted_run_ends_with_the_same_images(vit, monkeypatch, config, last_step):
    """Three of six steps belong to each round of the schedule."""
    monkeypatch.setattr(batches, "_CHECKPOINT_EVERY", 1)
    whole = run(vit, steps=6, **config)
    saved = {}

    def keep(index, state):
        saved[index] = state
        if int(state["step"]) == last_step:
            raise KilledError

    with pytest.raises(KilledError):
        run(vit, steps=6, checkpoint=keep, **config)
    torch.manual_seed(99)
    resumed = run(vit, steps=6, resume=saved, **config)
    assert torch.equal(resumed.images, whole.images)
    assert torch.equal(resumed.labels, whole.labels)
    assert resumed.boxes == whole.boxes
    assert resumed.history[-1] == whole.history[-1]


def test_a_run_interrupted_in_its_second_batch_ends_with_the_same_images(vit, monkeypatch):
    monkeypatch.setattr(batches, "_CHECKPOINT_EVERY", 1)
    whole = run(vit, count=4, batch_size=2)
    saved = {}

    def keep(index, state):
        saved[index] = state
        if index == 1 and int(state["step"]) == 2:
            raise KilledError

    with pytest.raises(KilledError):
        run(vit, count=4, batch_size=2, checkpoint=keep)
    taken = []
    resumed = run(
        vit,
        count=4,
        batch_size=2,
        resume=saved,
        progress=lambda stage, done, total, note="": taken.append((stage, done, total)),
    )
    assert torch.equal(resumed.images, whole.images)
    assert taken == [("synthesize", 7, 8), ("synthesize", 8, 8)]


def test_a_state_of_other_images_is_refused(vit):
    with pytest.raises(CheckpointError, match="another size or number"):
        batch(vit, count=2).load_state(batch(vit, count=3).state())


def test_the_model_is_left_as_it_was(vit):
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    fused = [block.attn.fused_attn for block in vit.blocks]
    for method in ("spdfq", "psaq"):
        run(vit, method=method, steps=2)
    assert all(parameter.grad is None for parameter in vit.parameters())
    assert not any(parameter.requires_grad for parameter in vit.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    assert [block.attn.fused_attn for block in vit.blocks] == fused
    assert not any(module._forward_pre_hooks for module in vit.modules())
    assert not vit.training


def test_an_error_in_the_middle_leaves_no_hooks(vit, monkeypatch):
    def fail(*_, **__):
        raise KilledError

    fused = [block.attn.fused_attn for block in vit.blocks]
    monkeypatch.setattr(vit, "forward", fail)
    with pytest.raises(KilledError):
        run(vit)
    assert [block.attn.fused_attn for block in vit.blocks] == fused
    assert not any(module._forward_pre_hooks for module in vit.modules())


def test_a_patch_has_no_gradient_outside_its_box(vit):
    maker = batch(vit, count=4)
    for index, box in enumerate(maker.boxes):
        maker.pixels.grad = None
        logits = vit(magnified(maker.pixels, [box]))
        losses.soft_cross_entropy(logits, maker._patch_labels[index : index + 1]).backward()
        inside = torch.zeros(4, 1, 32, 32, dtype=torch.bool)
        rows, columns = slice(box.top, box.top + box.side), slice(box.left, box.left + box.side)
        inside[box.image, :, rows, columns] = True
        gradient = maker.pixels.grad
        assert not gradient.masked_select(~inside.expand_as(gradient)).any()
        assert gradient.masked_select(inside.expand_as(gradient)).ne(0).float().mean() > 0.9


def test_patches_are_blown_up_crops(vit):
    maker = batch(vit, count=4)
    patches = magnified(maker.pixels, maker.boxes)
    assert patches.shape == (len(maker.boxes), 3, 32, 32)
    for patch, box in zip(patches, maker.boxes, strict=True):
        rows, columns = slice(box.top, box.top + box.side), slice(box.left, box.left + box.side)
        crop = maker.pixels[box.image, :, rows, columns]
        assert float(patch.detach().amax()) <= float(crop.detach().amax()) + 1e-6
        torch.testing.assert_close(patch[:, 0, 0], crop[:, 0, 0])
        torch.testing.assert_close(patch[:, -1, -1], crop[:, -1, -1])


def test_a_large_weight_aligns_attention_with_its_priors(vit, monkeypatch):
    monkeypatch.setattr(batches, "JITTER", 0.0)
    config = {"variation_weight": 0.0, "learning_rate": 0.05}
    made = run(vit, steps=100, alignment_weight=1e5, **config)
    first, last = made.history[0]["alignment"], made.history[-1]["alignment"]
    assert last < first / 3
    without = run(vit, steps=100, alignment_weight=0.0, **config)
    assert without.history[-1]["alignment"] > 2 * last


def test_classification_and_variation_approach_their_targets(vit):
    made = run(vit, steps=60, method="spdfq", alignment_weight=0.0)
    first, last = made.history[0], made.history[-1]
    assert last["classification"] < first["classification"]
    assert last["variation"] < first["variation"]


def test_the_weight_levels_both_terms_by_a_power_of_ten(vit):
    maker = batch(vit)
    record = maker.step()
    assert maker.alignment_weight in (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
    ratio = record["classification"] / (maker.alignment_weight * record["alignment"])
    assert 1.0 <= ratio < 10.0 or maker.alignment_weight in (1.0, 1e5)
    given = batch(vit, alignment_weight=7.0)
    given.step()
    assert given.alignment_weight == 7.0


def test_only_some_patches_take_part_in_a_step(vit):
    seen = []
    handle = vit.patch_embed.register_forward_pre_hook(
        lambda _, inputs: seen.append(len(inputs[0]))
    )
    few, everything = batch(vit, count=4, patches_per_step=2), batch(vit, count=4)
    assert len(everything.boxes) > 2
    few.step()
    assert sum(seen) == 4 + 2
    seen.clear()
    everything.step()
    handle.remove()
    assert sum(seen) == 4 + len(everything.boxes)


@pytest.mark.parametrize("config", [{}, {"entropy_weight": 1.0}, {"method": "psaq"}])
@pytest.mark.parametrize("model", ["tiny_vit", "tiny_swin"])
def test_passes_of_few_images_give_what_one_pass_gives(request, monkeypatch, model, config):
    network = sharpened(request.getfixturevalue(model))
    found = []
    for chunk in (2, 100):
        monkeypatch.setattr(batches, "_CHUNK_PIXELS", chunk * 32 * 32)
        maker = batch(network, count=5, **config)
        record = maker.step()
        found.append((record, maker.pixels.grad.clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", ["spdfq", "psaq"])
def test_only_the_classes_asked_for_are_drawn(vit, method):
    made = run(vit, count=12, method=method, steps=1, classes=(2, 7))
    assert set(made.labels.argmax(1).tolist()) == {2, 7}
    assert {box.label for box in made.boxes} <= {2, 7}


def test_agreement_is_what_the_model_says(vit):
    made = run(vit, count=6)
    with torch.no_grad():
        choice = vit(made.images).argmax(1).tolist()
    intended = [{box.label for box in made.boxes if box.image == i} for i in range(6)]
    assert made.agreement.tolist() == [
        c in names for c, names in zip(choice, intended, strict=True)
    ]


@pytest.mark.parametrize(
    ("architecture", "more", "tokens"),
    [
        ("deit_tiny_distilled_patch16_224", {}, 16),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}, 16),
        ("vit_tiny_patch16_224", {"reg_tokens": 4}, 16),
    ],
    ids=["distilled", "average pooling", "registers"],
)
@pytest.mark.parametrize("method", ["spdfq", "psaq"])
def test_other_token_layouts(build_model, architecture, more, tokens, method):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = sharpened(build_model(architecture, num_classes=10, **sizes, **more))
    made = run(model, method=method, steps=2)
    assert bool(made.images.isfinite().all())
    if method == "spdfq":
        assert {name: tuple(p.shape) for name, p in made.priors.items()} == {
            "blocks.1.attn": (COUNT, 2, tokens)
        }


def test_windows_have_priors_of_their_own(tiny_swin):
    made = run(sharpened(tiny_swin), steps=2)
    assert {name: tuple(prior.shape) for name, prior in made.priors.items()} == {
        "layers.0.blocks.1.attn": (4 * COUNT, 2, 16),
        "layers.1.blocks.0.attn": (COUNT, 4, 16),
    }
    for prior in made.priors.values():
        torch.testing.assert_close(prior.sum(-1), torch.ones(prior.shape[:2]))


def test_reduced_precision_products_give_finite_images(vit):
    made = run(vit, bfloat16=True)
    assert made.images.dtype == torch.float32
    assert bool(made.images.isfinite().all())


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 200, 1000])
def test_the_step_size_rises_and_falls_twice(steps):
    rates = [learning_rate_at(step, steps=steps, peak=0.2) for step in range(steps)]
    assert all(0.0 < rate <= 0.2 for rate in rates)
    assert rates.count(0.2) >= 1
    if steps >= 200:
        half = steps // 2
        assert rates[:half] == rates[half:]
        assert rates.index(0.2) == half // 5 - 1
        assert rates[half - 1] < 0.001


@pytest.mark.parametrize("method", ["spdfq", "psaq"])
def test_a_resumed_run_keeps_priors_and_history(vit, monkeypatch, method):
    monkeypatch.setattr(batches, "_CHECKPOINT_EVERY", 1)
    whole = run(vit, count=4, batch_size=2, method=method)
    saved = {}

    def keep(index, state):
        saved[index] = state
        if index == 1 and int(state["step"]) == 2:
            raise KilledError

    with pytest.raises(KilledError):
        run(vit, count=4, batch_size=2, checkpoint=keep, method=method)
    resumed = run(vit, count=4, batch_size=2, resume=saved, method=method)
    assert resumed.history == whole.history
    assert set(resumed.priors) == set(whole.priors)
    for name, prior in whole.priors.items():
        assert torch.equal(resumed.priors[name], prior)


def test_pixels_start_with_the_spectrum_of_photographs_or_without(vit):
    natural, white = (batch(vit, ablate=ablate).pixels for ablate in ((), ("spectrum",)))
    smoothness = [
        float(torch.corrcoef(torch.stack([x[..., 1:].flatten(), x[..., :-1].flatten()]))[0, 1])
        for x in (natural.detach(), white.detach())
    ]
    assert smoothness[0] > 0.5
    assert abs(smoothness[1]) < 0.1


class Operations(TorchDispatchMode):
    """Takes down what is computed, with the shapes of the results."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        shape = tuple(result.shape) if isinstance(result, torch.Tensor) else None
        self.seen.append((str(function), shape))
        return result


@pytest.mark.parametrize("patches", [None, COUNT])
def test_steps_can_be_replayed_as_a_graph(vit, patches):
    synthesizer = batch(vit, patches_per_step=patches)
    synthesizer.step()
    seen = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn((2 * COUNT, 3, 32, 32), generator=generator)
        targets = torch.randn((2 * COUNT, 10), generator=generator).softmax(dim=1)
        with Operations() as operations:
            synthesizer._compute(inputs, targets)
        seen.append(operations.seen)
    assert seen[0] == seen[1]
    names = {name for name, _ in seen[0]}
    # What reads values back, gives results of unknown size, or brings constants from the host.
    for forbidden in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "unique"):
        assert not [name for name in names if forbidden in name], forbidden


def test_steps_touch_nothing_outside_of_the_device(vit):
    synthesizer = batch(vit)
    synthesizer.step()
    mode = FakeTensorMode()

    def on_gpu(x):
        return FakeTensor(mode, x.detach().to("meta"), torch.device("cuda"))

    for module in vit.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(on_gpu(parameter), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, on_gpu(buffer))
    synthesizer.device = torch.device("cuda")
    synthesizer.labels = on_gpu(synthesizer.labels)
    synthesizer.priors = [on_gpu(prior) for prior in synthesizer.priors]
    inputs, targets = on_gpu(torch.zeros(2 * COUNT, 3, 32, 32)), on_gpu(torch.zeros(2 * COUNT, 10))
    with mode, torch.no_grad():
        terms = synthesizer._spdfq_terms(inputs, targets)
    assert {name: value.device.type for name, value in terms.items()} == {
        "alignment": "cuda",
        "classification": "cuda",
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_replays_steps_to_the_same_images(vit, device):
    config = {"steps": 12, "patches_per_step": COUNT}
    replayed, called = (batch(vit.to(device), **config) for _ in range(2))
    called._gradient.active = False
    for _ in range(12):
        replayed.step()
        called.step()
    assert replayed.replays
    assert not called.replays
    torch.testing.assert_close(replayed.pixels, called.pixels, atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("config", "recorded"),
    [({}, True), ({"method": "psaq"}, False), ({"entropy_weight": 1}, False)],
)
def test_a_gpu_records_steps_that_read_nothing_back(vit, config, recorded):
    synthesizer = batch(vit, **config)
    assert not synthesizer._gradient.active
    synthesizer.device = torch.device("cuda")
    assert synthesizer._recorded().active == recorded
    with pytest.MonkeyPatch.context() as patch:  # with kernels the entropy reads nothing back
        patch.setattr(training, "has_kernels", lambda _: True)
        assert synthesizer._recorded().active
