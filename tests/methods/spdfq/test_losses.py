"""Loss terms against direct evaluation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.methods.spdfq import losses


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def attention(generator, *shape):
    return torch.randn(shape, generator=generator).softmax(-1)


def test_class_token_row_without_prefix_columns(generator):
    maps = attention(generator, 2, 3, 18, 18)
    rows = losses.class_attention(maps, class_token=True, prefix_tokens=2)
    assert torch.equal(rows, maps[:, :, 0, 2:])


def test_mean_over_queries_without_class_token(generator):
    maps = attention(generator, 2, 3, 16, 16)
    rows = losses.class_attention(maps, class_token=False, prefix_tokens=0)
    torch.testing.assert_close(rows, maps.mean(dim=2))
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 3))


def test_reduced_precision_maps_become_float32(generator):
    maps = attention(generator, 1, 1, 4, 4).bfloat16()
    assert losses.class_attention(maps, class_token=True, prefix_tokens=1).dtype == torch.float32


def test_alignment_is_a_mean_over_tokens_and_images_and_a_sum_over_heads(generator):
    rows = attention(generator, 2, 3, 17)[..., 1:]
    prior = attention(generator, 2, 3, 16)
    expected = 0.0
    for head in range(3):
        scaled = prior[:, head] * rows[:, head].sum(-1, keepdim=True)
        expected += float((rows[:, head] - scaled).square().mean())
    assert float(losses.alignment(rows, prior)) == pytest.approx(expected, rel=1e-5)


def test_alignment_is_zero_where_attention_has_the_shape_of_its_prior(generator):
    prior = attention(generator, 2, 3, 16)
    mass = torch.rand(2, 3, 1, generator=generator)
    assert float(losses.alignment(prior * mass, prior)) < 1e-14


def test_alignment_leaves_the_mass_of_the_patches_alone(generator):
    """The prior is scaled to the mass at present without a gradient through the scale."""
    rows = attention(generator, 1, 1, 16).requires_grad_()
    prior = attention(generator, 1, 1, 16)
    losses.alignment(rows, prior).backward()
    expected = 2 * (rows.detach() - prior) / 16
    torch.testing.assert_close(rows.grad, expected)
    assert float(rows.grad.sum()) == pytest.approx(0.0, abs=1e-6)


def test_soft_cross_entropy_is_bounded_by_the_entropy_of_its_targets(generator):
    targets = attention(generator, 4, 9)
    entropy = float(-(targets * targets.log()).sum(1).mean())
    assert float(losses.soft_cross_entropy(targets.log() + 3.0, targets)) == pytest.approx(entropy)
    other = torch.randn(4, 9, generator=generator)
    expected = torch.nn.functional.cross_entropy(other, targets)
    assert float(losses.soft_cross_entropy(other, targets)) == pytest.approx(float(expected))
    assert float(expected) > entropy


def test_total_variation_is_the_sum_of_four_norms():
    images = torch.zeros(1, 1, 3, 3)
    images[0, 0, 1, 1] = 2.0
    assert float(losses.total_variation(images)) == pytest.approx(4 * math.sqrt(8))
    assert float(losses.total_variation(torch.full((2, 3, 5, 4), 0.7))) == 0.0


@given(
    st.integers(1, 32),
    st.sampled_from([32, 64, 224, 384]),
    st.sampled_from([32, 224]),
    st.integers(0, 1000),
)
def test_total_variation_target_grows_like_a_norm(count, height, width, seed):
    images = torch.empty(count, 3, height, width, device="meta")
    target = losses.total_variation_target(images, generator=torch.Generator().manual_seed(seed))
    share = math.sqrt(count * height * width / (32 * 224 * 224))
    assert 2500 <= target / share <= 3000
    full = losses.total_variation_target(
        torch.empty(32, 3, 224, 224, device="meta"), generator=torch.Generator().manual_seed(seed)
    )
    assert target == pytest.approx(full * share)


def full_entropy(tokens):
    """PSAQ-ViT's equations written out: all ten points, every kernel."""
    values = []
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    similarity = (unit @ unit.mT).double()
    points = torch.linspace(float(similarity.min()), float(similarity.max()), 10).double()
    for image in similarity:
        samples = image.flatten()
        kernels = torch.exp(-((points[:, None] - samples) ** 2) / (2 * 0.01**2))
        density = kernels.mean(1) / (0.01 * math.sqrt(2 * math.pi))
        values.append(float(torch.trapezoid(-density * (density + 1e-4).log(), points)))
    return sum(values) / len(values)


@pytest.mark.parametrize("spread", [0.1, 0.3, 1.0, 3.0])
def test_patch_similarity_entropy_equals_the_full_kernel_sum(generator, spread):
    centre = torch.randn(1, 1, 6, generator=generator)
    tokens = centre + spread * torch.randn(2, 16, 6, generator=generator)
    found = float(losses.patch_similarity_entropy(tokens))
    assert found == pytest.approx(full_entropy(tokens), rel=2e-3, abs=2e-3)


def test_diverse_patches_have_more_entropy_than_alike_ones(generator):
    centre = torch.randn(1, 1, 16, generator=generator)
    noise = torch.randn(2, 25, 16, generator=generator)
    alike = losses.patch_similarity_entropy(torch.cat((centre + 0.05 * noise[:1], noise[1:])))
    diverse = losses.patch_similarity_entropy(noise)
    assert float(diverse) > float(alike)


def test_identical_patches_have_a_finite_entropy_and_gradient():
    tokens = torch.ones(1, 9, 4, requires_grad=True)
    entropy = losses.patch_similarity_entropy(tokens)
    entropy.backward()
    assert bool(entropy.isfinite())
    assert bool(tokens.grad.isfinite().all())


def test_entropy_has_a_gradient_that_raises_it(generator):
    centre = torch.randn(1, 1, 8, generator=generator)
    tokens = (centre + 0.5 * torch.randn(2, 16, 8, generator=generator)).requires_grad_()
    before = losses.patch_similarity_entropy(tokens)
    before.backward()
    step = 1e-3 * tokens.grad / tokens.grad.norm()
    with torch.no_grad():
        assert losses.patch_similarity_entropy(tokens + step) > before
