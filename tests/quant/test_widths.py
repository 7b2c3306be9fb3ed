"""Widths by default, by block of code, by call and by thread."""

import copy
import threading

import pytest
import torch
from torch import nn

from qtool.errors import UsageError
from qtool.quant.bits import BitSpec
from qtool.quant.nested_layers import NestedLinear
from qtool.quant.switchable import Switchable, make_switchable
from qtool.quant.widths import Choice, Offer, bits


class Pair(nn.Module):
    """Two layers, the second one pinned."""

    def __init__(self) -> None:
        super().__init__()
        offer = Offer((2, 4, 8), (4, 8))
        for name, pinned in (("first", False), ("last", True)):
            layer = NestedLinear(
                (6, 6), name=name, offer=offer, active=BitSpec(8, 8), pinned=pinned
            )
            layer.codes.copy_(torch.arange(36).view(6, 6) * 7 - 128)
            layer.alpha.copy_(torch.tensor([16.0, 4.0, 1.0])[:, None].expand(3, 6) / 100)
            layer.input_scale.fill_(0.01)
            setattr(self, name, layer)

    def forward(self, x):
        return self.last(self.first(x))


@pytest.fixture
def model():
    return make_switchable(Pair())


@pytest.fixture
def x():
    return torch.rand(3, 6, generator=torch.Generator().manual_seed(0))


def test_a_choice_speaks_of_globs_and_the_last_one_wins():
    choice = Choice.of({"blocks.*": 4, "blocks.1.*": "w2a4"})
    assert choice.width("blocks.0.fc", pinned=True) == BitSpec(4, 8)
    assert choice.width("blocks.1.fc", pinned=False) == BitSpec(2, 4)
    assert choice.width("head", pinned=False) is None
    every = Choice.of(2)
    assert every.width("head", pinned=True) is None
    assert every.after(choice).width("blocks.1.fc", pinned=False) == BitSpec(2, 8)


def test_switching_back_gives_the_same_bits(model, x):
    fresh = make_switchable(Pair())(x)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    addresses = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    model.set_bits(2)
    low = model(x)
    model.set_bits("w8a8")
    assert torch.equal(model(x), fresh)
    assert not torch.equal(low, fresh)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
        assert buffer.data_ptr() == addresses[name]


def test_a_call_and_a_block_override_the_active_width(model, x):
    full = model(x)
    model.set_bits(2)
    low = model(x)
    model.set_bits(8)
    assert torch.equal(model(x, bits=2), low)
    assert torch.equal(model(x), full)
    with bits(2):
        assert torch.equal(model(x), low)
        assert torch.equal(model(x, bits=8), full)
        with bits({"first": "w8a8"}):
            assert torch.equal(model(x), full)
        assert torch.equal(model(x), low)
    assert model.active_bits == "w8a8"


def test_pinned_layers_change_only_when_named(model):
    model.set_bits(4)
    assert {name: str(spec) for name, spec in model.layer_bits.items()} == {
        "first": "w4a8",
        "last": "w8a8",
    }
    assert model.active_bits == "w4a8"
    model.set_bits({"last": 2})
    assert str(model.layer_bits["last"]) == "w2a8"


def test_threads_run_at_widths_of_their_own(model, x):
    expected = {width: model(x, bits=width) for width in (2, 4, 8)}
    barrier = threading.Barrier(3)
    found, failed = {}, []

    def work(width):
        try:
            with bits(width):
                for _ in range(20):
                    barrier.wait(timeout=30)
                    found.setdefault(width, []).append(model(x))
        except Exception as error:  # shown by the main thread
            failed.append(error)

    threads = [threading.Thread(target=work, args=(width,)) for width in (2, 4, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    for width, outputs in found.items():
        assert len(outputs) == 20
        assert all(torch.equal(output, expected[width]) for output in outputs)


@pytest.mark.parametrize("request_", [3, "w4a2", {"first": 3}])
def test_widths_that_are_not_there_are_refused_and_nothing_changes(model, x, request_):
    with pytest.raises(UsageError, match="cannot run at"):
        model.set_bits(request_)
    with pytest.raises(UsageError, match="cannot run at"):
        model(x, bits=request_)
    assert model.active_bits == "w8a8"


@pytest.mark.parametrize("request_", [1, 9, "w4", "four", True, 4.5])
def test_what_is_no_width_is_refused(model, request_):
    with pytest.raises(UsageError, match="not a bit-width"):
        model.set_bits(request_)


def test_a_glob_that_matches_nothing_is_refused(model):
    with pytest.raises(UsageError, match="no layer matches 'frist'"):
        model.set_bits({"frist": 4})


def test_planes_that_are_missing_are_named():
    offer = Offer((2, 4, 6, 8), (8,), planes=2)
    assert offer.present == (2, 4)
    with pytest.raises(UsageError, match="w6a8, its weights end after plane p2") as caught:
        offer.fit("one", BitSpec(6, 8))
    assert "2, 4 bits" in caught.value.remedy


@pytest.mark.parametrize("asked", [BitSpec(4, 4), BitSpec(4, 8)])
def test_tied_widths_are_one_number(asked):
    offer = Offer((2, 4, 8), (2, 4, 8), tied=True)
    assert offer.fit("body", asked) == BitSpec(4, 4)
    assert offer.fit("body", BitSpec(8, 8)) == BitSpec(8, 8)


@pytest.mark.parametrize(
    ("asked", "said"), [(BitSpec(6, 8), "w6a6"), (BitSpec(4, 2), "w4a2"), (BitSpec(8, 4), "w8a4")]
)
def test_tied_widths_that_are_not_there_are_refused(asked, said):
    with pytest.raises(UsageError, match=f"body cannot run at {said}") as caught:
        Offer((2, 4, 8), (2, 4, 8), tied=True).fit("body", asked)
    assert "w2a2, w4a4, w8a8" in caught.value.remedy


def test_models_stay_what_they_were(model):
    assert isinstance(model, Pair)
    assert isinstance(model, Switchable)
    assert make_switchable(model) is model
    assert type(copy.deepcopy(model)) is type(model)
    model.set_bits({"first": 4, "last": 2})
    assert model.active_bits == "w4a8"
    model.last.pinned = False
    assert model.active_bits == "mixed"
