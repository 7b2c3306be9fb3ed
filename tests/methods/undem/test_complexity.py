"""Complexity of patches, and groups of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.methods.undem import complexity


def test_the_frequency_of_an_impulse():
    x = torch.zeros(1, 3, 7, 7)
    x[..., 3, 3] = 10 / 255
    strength = complexity.edges(x)[0, 0]
    assert strength[2, 2] == strength[2, 4] == strength[4, 2] == strength[4, 4] == 20
    assert strength[3, 3] == 80
    assert float(complexity.frequency(x)) == pytest.approx(160 / 49)


def test_edges_stop_at_255():
    x = torch.zeros(1, 3, 7, 7)
    x[..., 3, 3] = 1.0
    assert float(complexity.edges(x).max()) == 255


def test_grey_has_no_colour_and_colours_do_not_wrap():
    grey = torch.full((1, 3, 32, 32), 0.4)
    assert float(complexity.colourfulness(grey)) == 0
    # R < G: in 8 bits R - G would wrap to 205.
    green = torch.tensor([100.0, 151.0, 100.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32) / 255
    expected = 0.3 * (51**2 + 25.5**2) ** 0.5
    assert float(complexity.colourfulness(green)) == pytest.approx(expected, rel=1e-4)


@given(st.integers(4, 60), st.sampled_from([1, 2, 4]), st.integers(0, 1000))
def test_groups_are_equal_and_ordered(total, groups, seed):
    random = torch.Generator().manual_seed(seed)
    frequencies = torch.rand(total, generator=random) * 100 + 1
    colours = torch.rand(total, generator=random) * 80 + 1
    grouping, numbers = complexity.group_patches(frequencies, colours, groups=groups)
    sizes = numbers.bincount(minlength=groups)
    assert int(sizes.max() - sizes.min()) <= 1
    if grouping is None:
        assert groups == 1
        return
    product, ratio = frequencies * colours, frequencies / colours
    assert float(product[numbers == 0].max()) <= float(product[numbers > 0].min())
    for group in range(1, groups - 1):
        assert float(ratio[numbers == group].max()) <= float(ratio[numbers == group + 1].min())
    assert grouping.count == groups
    assert torch.equal(grouping.group_of(frequencies, colours), numbers)


def test_too_few_patches_are_refused_or_merged():
    with pytest.raises(ValueError, match="2 patches"):
        complexity.group_patches(torch.ones(2), torch.ones(2), groups=4)
    assert complexity.affordable_groups(1600, 4) == 4
    assert complexity.affordable_groups(1599, 4) == 2
    assert complexity.affordable_groups(10, 4) == 1


def test_patches_cover_a_picture_and_its_border():
    assert list(complexity.patch_boxes(512, 1920, patch=(512, 480))) == [
        (0, 0),
        (0, 480),
        (0, 960),
        (0, 1440),
    ]
    assert list(complexity.patch_boxes(100, 300, patch=(100, 100))) == [(0, 0), (0, 100), (0, 200)]
    assert list(complexity.patch_boxes(100, 290, patch=(100, 100))) == [(0, 0), (0, 100)]
    assert list(complexity.patch_boxes(100, 297, patch=(100, 100))) == [(0, 0), (0, 100), (0, 197)]
    assert list(complexity.patch_boxes(50, 300, patch=(100, 100))) == []
