"""Estimates of what each layer's rounding costs."""

import copy

import pytest
import torch
import torch.nn.functional as F

from qtool.methods.spdfq import sensitivity
from qtool.models import vision
from qtool.quant.bits import BitSpec
from qtool.quant.plan import plan_layers

WIDTHS = (2, 4, 8)
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4)}
MODELS = {
    "vit": ("vit_tiny_patch16_224", SIZES),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
}


@pytest.fixture
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=MODELS)
def model(request, build_model):
    architecture, sizes = MODELS[request.param]
    built = build_model(architecture, num_classes=10, **sizes).requires_grad_(False)
    for parameter in built.parameters():
        if parameter.ndim > 1:
            parameter.mul_(3.0)
    return built


def plans_of(model):
    sites = [site.name for site in vision.layout(model).attentions]

    def plans_at(bits):
        spec = BitSpec(bits, bits)
        return plan_layers(model, attentions=sites, bits=spec, quantizer="table")

    return plans_at


def test_every_layer_is_judged_and_more_bits_never_cost_more(model, images):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps = []
    losses = sensitivity.layer_losses(
        model,
        vision.layout(model),
        plans_of(model),
        images,
        widths=WIDTHS,
        progress=lambda *step: steps.append(step),
    )
    assert list(losses) == list(plans_of(model)(4))
    for widths in losses.values():
        assert widths[2] >= widths[4] >= widths[8] >= 0
        assert widths[2] > widths[8]
    assert [step[1:3] for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_estimate_orders_layers_as_measured_divergence_does(build_model, images):
    architecture, sizes = MODELS["vit"]
    model = build_model(architecture, num_classes=10, **sizes).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(3.0)
    losses = sensitivity.layer_losses(
        model, vision.layout(model), plans_of(model), images, widths=(3,)
    )
    expected = F.log_softmax(model(images), dim=1)
    measured = {}
    for name in losses:
        simulated = sensitivity.simulate(
            copy.deepcopy(model), plans_of(model)(3), vision.layout(model).attentions
        ).requires_grad_(False)
        sensitivity.choose_ranges(simulated, images, vision.layout(model))
        module = simulated.get_submodule(name)
        (module.products if hasattr(module, "products") else module).enabled = True
        found = F.log_softmax(simulated(images), dim=1)
        measured[name] = float(F.kl_div(found, expected, log_target=True, reduction="batchmean"))
    names = list(losses)
    estimate = torch.tensor([losses[name][3] for name in names]).argsort().argsort().float()
    truth = torch.tensor([measured[name] for name in names]).argsort().argsort().float()
    correlation = torch.corrcoef(torch.stack((estimate, truth)))[0, 1]
    assert correlation > 0.7


def test_multiply_adds_count_products_and_weights(build_model):
    architecture, sizes = MODELS["vit"]
    model = build_model(architecture, num_classes=10, **sizes).requires_grad_(False)
    counts = sensitivity.multiply_adds(model, plans_of(model)(4), torch.zeros(1, 3, 32, 32))
    tokens, width = 17, 48
    assert counts["patch_embed.proj"] == 16 * width * 3 * 8 * 8
    assert counts["blocks.0.attn"] == 2 * tokens * tokens * width
    assert counts["blocks.0.mlp.fc1"] == tokens * width * 4 * width
    assert counts["head"] == width * 10
