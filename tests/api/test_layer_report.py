"""What quantization cost, layer by layer."""

import copy
import math

import pytest
import torch

from qtool.api import layer_report
from qtool.engine import dispatch
from qtool.methods.spdfq.reconstruction import (
    ReconstructionConfig,
    freeze,
    reconstruct,
    simulate,
)
from qtool.models import vision
from qtool.quant.bits import BitSpec
from qtool.quant.plan import plan_layers


def measured(model, reference, plans, images):
    losses = dict.fromkeys(plans, 0.5)
    return layer_report.measure(model, reference, plans, images, losses=losses)


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def quantized(images):
    """The integer model and the plan of a float one."""

    def run(reference, bits, **rules):
        layout = vision.layout(reference)
        names = [site.name for site in layout.attentions]
        reference.requires_grad_(False)
        plans = plan_layers(reference, attentions=names, bits=BitSpec.parse(bits), **rules)
        model = simulate(copy.deepcopy(reference), plans, layout.attentions)
        config = ReconstructionConfig(steps=0)
        reconstruct(model, reference, images, layout.units, config=config)
        return freeze(model), plans

    return run


@pytest.mark.parametrize("fixture", ["tiny_vit", "tiny_swin"])
def test_every_layer_has_its_bits_backend_and_errors(request, quantized, images, fixture):
    reference = request.getfixturevalue(fixture)
    model, plans = quantized(reference, "w4a6", keep=[("*.fc1", BitSpec(8, 8))])
    with dispatch.use_backend("reference"):
        records = measured(model, reference, plans, images)
    assert [record["layer"] for record in records] == list(plans)
    for record in records:
        plan = plans[record["layer"]]
        attention = plan.kind == "attention"
        assert record["kind"] == plan.kind
        expected = f"a{plan.input_bits}" if attention else f"w{plan.weight_bits}a{plan.input_bits}"
        assert record["bits"] == expected
        assert record["backend"] == "reference"
        assert 0 < record["output_error"] < 0.2
        assert record["output_sqnr_db"] == pytest.approx(
            -10 * math.log10(record["output_error"]), abs=0.01
        )
        assert record["estimated_cost"] == 0.5
        assert (record["weight_error"] is None) == attention
    errors = {record["layer"]: record["weight_error"] for record in records}
    assert all(
        error < 0.1 * errors[name.replace("fc1", "fc2")]
        for name, error in errors.items()
        if name.endswith("fc1")
    )


def test_fewer_bits_cost_more(quantized, images, tiny_vit):
    costs = []
    for bits in ("w8a8", "w4a4", "w2a2"):
        model, plans = quantized(tiny_vit, bits)
        records = measured(model, tiny_vit, plans, images)
        costs.append(sum(record["output_error"] for record in records))
    assert costs == sorted(costs)


def test_backends_are_those_that_multiply(quantized, images, tiny_vit):
    model, plans = quantized(tiny_vit, "w4a4")
    with dispatch.use_backend("reference"):
        found = layer_report.backends(model, plans, images)
    assert found == dict.fromkeys(plans, "reference")
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_errors_are_shown_in_per_cent():
    assert layer_report.shown(0.01234) == "1.23 %"
    assert layer_report.shown(None) == ""


def test_the_costliest_layers_come_first():
    losses = {"a": 0.1, "b": 3.0, "c": 0.2}
    assert layer_report.costliest(losses, 2) == ["b", "c"]
