"""Tensors carried from unit to unit."""

import pytest
import torch
from torch import nn

from qtool.methods.streams import Stream, unit_calls
from qtool.models import vision


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_streams_start_over_only_where_a_unit_does_not_follow(tiny_vit, images):
    layout = vision.layout(tiny_vit)
    calls = unit_calls(tiny_vit, layout.units, images[:1])
    assert [call.chained for call in calls.values()] == [False, False, True, False]
    stream = Stream(tiny_vit, images, calls, batch_size=3)
    caught = {}
    for name in layout.units:
        hook = tiny_vit.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: caught.__setitem__(name, args[0])
        )
        with torch.no_grad():
            tiny_vit(images)
        hook.remove()
    for name in layout.units:
        x = stream.enter(name)
        torch.testing.assert_close(x, caught[name])
        stream.leave(stream.apply(name, x))
    stream.leave(None)
    torch.testing.assert_close(stream.enter("blocks.1"), caught["blocks.1"])


class Steps(nn.Module):
    """Three units: the second follows the first unless its output is changed in between."""

    def __init__(self, change):
        super().__init__()
        self.change = change
        self.one, self.two, self.unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.two(self.change(self.one(x)))


@pytest.mark.parametrize(
    ("change", "chained"),
    [(lambda x: x, True), (lambda x: x + 1, False), (lambda x: x.add_(1), False)],
)
def test_a_tensor_changed_on_the_way_is_not_carried_on(change, chained):
    model = Steps(change)
    rows = torch.ones(2, 3)
    calls = unit_calls(model, ["one", "two"], rows)
    assert calls["two"].chained is chained
    stream = Stream(model, rows, calls, batch_size=1)
    stream.leave(stream.apply("one", stream.enter("one")))
    with torch.no_grad():
        expected = change(model.one(rows))
    torch.testing.assert_close(stream.enter("two"), expected)


def test_a_unit_outside_the_forward_pass_is_a_mistake_in_the_layout():
    with pytest.raises(AssertionError, match="unused"):
        unit_calls(Steps(nn.Identity()), ["one", "unused"], torch.ones(2, 3))
