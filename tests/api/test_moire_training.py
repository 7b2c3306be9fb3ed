"""Patches of photographs."""

import torch

from qtool.api.moire_training import cut_patches


def test_patches_lie_side_by_side_and_small_pictures_give_one():
    large, small = torch.rand(3, 64, 130), torch.rand(3, 40, 50)
    patches = cut_patches([large, small], 64)
    assert [tuple(patch.shape) for patch in patches] == [(3, 64, 64)] * 2 + [(3, 40, 40)]
    assert torch.equal(patches[1], large[:, :, 64:128])
