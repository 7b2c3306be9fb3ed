"""Calibration for all widths at once, and what is measured on the way."""

import copy

import pytest
import torch

from qtool.methods.multiquant import sensitivity
from qtool.methods.multiquant.nested import NestedConfig, calibrate, freeze, simulate
from qtool.methods.multiquant.sensitivity import sensitivities
from qtool.models import vision
from qtool.quant.bits import BitSpec
from qtool.quant.plan import plan_layers
from qtool.quant.switchable import layers_of
from qtool.quant.widths import Offer, bits

OFFER = Offer((2, 4, 8), (4, 8))
WIDTHS = ("w8a8", "w4a8", "w4a4", "w2a8")


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def prepared(model, quantizer="uniform"):
    """The float model, its simulation and its layout."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim > 1:
            parameter.mul_(4)
    layout = vision.layout(model)
    names = [site.name for site in layout.attentions]
    plans = plan_layers(model, attentions=names, bits=BitSpec(8, 8))
    simulated = simulate(
        copy.deepcopy(model), plans, layout.attentions, offer=OFFER, quantizer=quantizer
    )
    return simulated, layout


def run(simulated, model, layout, images, **options):
    return calibrate(
        simulated,
        model,
        images,
        layout.units,
        offer=OFFER,
        config=NestedConfig(batch_size=2, **options),
        norms=layout.norms,
    )


@pytest.mark.parametrize("kind", ["tiny_vit", "tiny_swin"])
def test_integers_equal_what_was_calibrated_at_every_width(request, images, kind):
    model = request.getfixturevalue(kind)
    simulated, layout = prepared(model)
    records = run(simulated, model, layout, images, steps=2)
    assert [record.name for record in records] == list(layout.units)
    expected = {}
    for width in WIDTHS:
        with bits(width), torch.no_grad():
            expected[width] = simulated(images)
    frozen = freeze(simulated)
    errors = {}
    for width, logits in expected.items():
        with bits(width), torch.no_grad():
            assert torch.equal(frozen(images), logits), width
        errors[width] = float((logits - model(images)).square().mean())
    assert errors["w8a8"] < errors["w4a8"] < errors["w2a8"]
    for record in records:
        assert record.after.keys() == record.before.keys() >= {*WIDTHS}
        assert record.before["w8a8"] < record.before["w4a8"] < record.before["w2a8"]


def test_training_brings_blocks_nearer_and_the_same_seed_gives_the_same(tiny_vit, images):
    results = []
    for _ in range(2):
        simulated, layout = prepared(copy.deepcopy(tiny_vit))
        results.append(run(simulated, prepared_float(tiny_vit), layout, images, steps=20))
    assert results[0] == results[1]
    gains = [
        record.before[width] / record.after[width]
        for record in results[0][1:3]
        for width in ("w8a8", "w4a8", "w4a4")
    ]
    assert sum(gains) / len(gains) > 1.005


def prepared_float(model):
    model = copy.deepcopy(model)
    prepared(model)
    return model


def test_sensitivities_fall_with_the_width(tiny_vit, images):
    simulated, layout = prepared(tiny_vit)
    run(simulated, prepared_float(tiny_vit), layout, images, steps=0)
    names = [name for name, layer in layers_of(simulated).items() if layer.offer.weight]
    costs = sensitivities(simulated, images, names, OFFER.weight)
    assert list(costs) == names
    for own in costs.values():
        assert own == sorted(own, reverse=True)
        assert own[-1] == 0.0
        assert own[0] > 0.0


def test_widths_between_measured_ones_take_the_geometric_mean():
    assert sensitivity._filled({2: 4.0, 4: 1.0, 5: 0.5, 6: 0.0}, (2, 3, 4, 5, 6)) == [
        4.0,
        2.0,
        1.0,
        0.5,
        0.0,
    ]
