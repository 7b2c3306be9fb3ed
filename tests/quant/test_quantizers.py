"""Ranges, codes and gradients; the engine's operations are the oracle of the codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.engine import ops
from qtool.quant import quantizers
from qtool.quant.plan import LOG2_MAX_BITS

WIDTHS = range(2, 9)
LOG2_WIDTHS = range(2, LOG2_MAX_BITS + 1)


def drawn(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def squared_error(values, scale, zero, bits):
    levels = quantizers.uniform_levels(values, scale, zero, bits=bits)
    return float((levels * scale - values).square().mean())


floats = st.floats(-1e6, 1e6, width=32)
scales = st.floats(2**-13, 2**13, width=32)


@given(st.lists(floats, min_size=1, max_size=20), scales, st.integers(2, 8), st.integers(0, 255))
def test_uniform_levels_are_the_codes_of_the_engine(values, scale, bits, zero):
    x, step = torch.tensor(values), torch.tensor([scale])
    zero_point = torch.tensor([zero % 2**bits], dtype=torch.int32)
    levels = quantizers.uniform_levels(x, step, zero_point, bits=bits)
    codes = ops.quantize_uniform(x, step, zero_point, bits=bits)
    assert torch.equal(levels, codes.float() - zero_point)


@given(
    st.lists(st.floats(0, 2, width=32), min_size=1, max_size=20),
    st.floats(2**-10, 2, width=32),
    st.sampled_from(LOG2_WIDTHS),
)
def test_log2_levels_are_the_codes_of_the_engine(values, scale, bits):
    x, step = torch.tensor(values), torch.tensor([scale])
    codes = ops.quantize_log2(x, step, bits=bits).float()
    expected = torch.exp2(-codes).masked_fill(codes == 2**bits - 1, 0.0)
    assert torch.equal(quantizers.log2_levels(x, step, bits=bits), expected)


@pytest.mark.parametrize("bits", LOG2_WIDTHS)
def test_log2_is_exact_on_powers_of_two_and_its_top_code_is_zero(bits):
    top = 2**bits - 1
    powers = torch.exp2(-torch.arange(top, dtype=torch.float32))
    scale = torch.tensor([0.375])
    assert torch.equal(quantizers.log2_levels(powers * scale, scale, bits=bits), powers)
    beyond = torch.tensor([2.0**-top, 2.0 ** -(top + 1), 0.0])
    assert not quantizers.log2_levels(beyond * scale, scale, bits=bits).any()


def test_log2_rounds_in_the_exponent():
    x = torch.tensor([1.5, 1.0, 0.72, 0.70, 0.36, 0.35])
    levels = quantizers.log2_levels(x, torch.ones(1), bits=4)
    assert levels.tolist() == [1.0, 1.0, 1.0, 0.5, 0.5, 0.25]


def test_rounding_passes_gradients_straight_through():
    x = torch.tensor([0.2, 0.5, 1.5, -2.7], requires_grad=True)
    zero = torch.tensor([100], dtype=torch.int32)
    levels = quantizers.uniform_levels(x, torch.ones(1), zero, bits=8)
    assert levels.tolist() == [0.0, 0.0, 2.0, -3.0]
    levels.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.grad.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_uniform_gradient_stops_where_values_are_clipped():
    x = torch.tensor([-5.0, -0.6, 0.3, 1.4, 9.0], requires_grad=True)
    scale, zero = torch.tensor([0.5]), torch.tensor([2], dtype=torch.int32)
    (quantizers.uniform_levels(x, scale, zero, bits=3) * scale).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


def test_log2_gradient_stops_where_values_become_zero():
    x = torch.tensor([0.9, 0.3, 0.06, 0.0], requires_grad=True)
    scale = torch.tensor([2.0])
    (quantizers.log2_levels(x, scale, bits=2) * scale).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 0.0, 0.0]


@given(floats, floats, st.integers(2, 8))
def test_a_range_covers_its_ends_and_has_an_exact_zero(first, second, bits):
    low, high = torch.tensor([min(first, second)]), torch.tensor([max(first, second)])
    scale, zero = quantizers.uniform_parameters(low, high, bits=bits)
    assert scale.dtype == torch.float32
    assert zero.dtype == torch.int32
    assert float(scale) > 0
    assert 0 <= int(zero) <= 2**bits - 1
    ends = torch.cat((low, high, torch.zeros(1)))
    restored = quantizers.uniform_levels(ends, scale, zero, bits=bits) * scale
    assert float(restored[2]) == 0.0
    # Rounding the zero point moves the range by half a step at most.
    assert float((restored - ends).abs().max()) <= 1.001 * float(scale)


@pytest.mark.parametrize("bits", WIDTHS)
def test_searched_activation_range_beats_the_extremes(bits):
    values = drawn(4000)
    values[7] = 60.0
    found = squared_error(values, *quantizers.search_activation_range(values, bits=bits), bits)
    extremes = quantizers.uniform_parameters(values.min()[None], values.max()[None], bits=bits)
    assert found <= squared_error(values, *extremes, bits)


def test_searched_activation_range_leaves_an_outlier_out():
    values = drawn(50_000)
    values[7] = 50.0
    scale, _ = quantizers.search_activation_range(values, bits=4)
    assert float(scale) * 15 < 30.0


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(50),
        torch.full((50,), 0.3),
        torch.full((50,), -0.3),
        torch.tensor([2.0]),
        torch.tensor([1e-20, -1e-20]),
    ],
    ids=["zeros", "constant", "negative constant", "single value", "tiny"],
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_degenerate_activations_keep_their_values(values, bits):
    scale, zero = quantizers.search_activation_range(values, bits=bits)
    assert scale.shape == zero.shape == (1,)
    assert float(scale) > 0
    restored = quantizers.uniform_levels(values, scale, zero, bits=bits) * scale
    torch.testing.assert_close(restored, values, atol=1e-8, rtol=1e-5)


def test_a_large_tensor_is_sampled_evenly():
    values = torch.cat([drawn(100_000), drawn(100_000, seed=1, scale=5.0)])
    scale, zero = quantizers.search_activation_range(values, bits=8)
    assert squared_error(values, scale, zero, 8) < 0.01
    assert float(scale) * 255 > 15.0


@pytest.mark.parametrize("bits", WIDTHS)
def test_searched_weight_range_beats_the_extremes_in_every_channel(bits):
    weight = drawn(6, 200)
    weight[0, 3] = 12.0
    scale, zero = quantizers.search_weight_range(weight, bits=bits)
    low, high = weight.amin(1), weight.amax(1)
    if bits == 8:  # spread evenly around zero
        assert set(zero.tolist()) == {128}
        low, high = -weight.abs().amax(1), weight.abs().amax(1) * 127 / 128
    extremes = quantizers.uniform_parameters(low, high, bits=bits)
    for row in range(6):
        best = squared_error(weight[row], scale[row], zero[row], bits)
        assert best <= squared_error(weight[row], extremes[0][row], extremes[1][row], bits)


def test_channels_are_searched_independently():
    weight = drawn(5, 64) * torch.tensor([0.01, 1.0, 100.0, 1.0, 0.0])[:, None]
    scale, zero = quantizers.search_weight_range(weight, bits=4)
    assert bool((scale > 0).all())
    for row in range(5):
        alone = quantizers.search_weight_range(weight[row : row + 1], bits=4)
        assert (scale[row], zero[row]) == (alone[0][0], alone[1][0])


def test_a_channel_of_zeros_stays_zero():
    scale, zero = quantizers.search_weight_range(torch.zeros(2, 16), bits=3)
    levels = quantizers.uniform_levels(torch.zeros(2, 16), scale[:, None], zero[:, None], bits=3)
    assert scale.isfinite().all()
    assert not levels.any()


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_searched_log2_scale_beats_the_maximum(bits):
    values = (drawn(400, 17) * 3).softmax(-1)

    def error(scale):
        levels = quantizers.log2_levels(values, scale, bits=bits)
        return float((levels * scale - values).square().mean())

    scale = quantizers.search_log2_scale(values, bits=bits)
    assert scale.shape == (1,)
    assert error(scale) <= error(values.max()[None])


def test_log2_scale_of_zeros_is_positive():
    assert float(quantizers.search_log2_scale(torch.zeros(20), bits=4)) > 0


def looking_at_one_place(every: int) -> torch.Tensor:
    """Attention of 40,000 queries over 50 keys: even, but one in `every` looks at one key."""
    scores = drawn(40_000, 50)
    scores[every // 2 :: every, 7] = 12.0
    return scores.softmax(-1)


def test_rare_large_values_keep_their_place_in_the_range():
    # 10 of 2,000,000 values: an even sample of 65,536 holds none of them.
    values = looking_at_one_place(4000)
    scale, zero = quantizers.search_activation_range(values, bits=8)
    full = quantizers.uniform_parameters(values.min()[None], values.max()[None], bits=8)
    assert squared_error(values, scale, zero, 8) <= squared_error(values, *full, 8)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 3000),
    width=st.integers(1, 40),
    kept=st.integers(1, 2000),
    seed=st.integers(0, 9),
)
def test_a_sample_stands_for_every_row_and_holds_the_extremes(rows, width, kept, seed):
    x = drawn(rows, width, seed=seed)
    found, counts = quantizers.sampled_rows(x, values=kept)
    assert found.shape == (len(counts), width)
    assert float(counts.sum()) == pytest.approx(rows, rel=1e-5)
    assert float(found.max()) == float(x.max())
    assert float(found.min()) == float(x.min())
    assert len(found) <= max(64, kept // width) + 1


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.integers(-50, 50), min_size=1, max_size=40), share=st.floats(0, 1))
def test_counted_quantiles_are_those_of_the_repeated_values(values, share):
    x = torch.tensor(values, dtype=torch.float32)
    counts = torch.arange(1, len(x) + 1).float()
    repeated = torch.repeat_interleave(x, counts.int())
    (found,) = quantizers.quantiles(x, counts, [share])
    plain = quantizers.quantiles(repeated, torch.ones(len(repeated)), [share])[0]
    assert float(found) == float(plain)
    assert float((repeated <= found).float().mean()) >= share - 1e-6


@pytest.mark.parametrize("table", [None, torch.arange(256).to(torch.uint8) // 16 * 16])
def test_unrounded_values_pass_as_they_are_and_so_do_their_gradients(table):
    x = drawn(64, 32, scale=4.0).requires_grad_()
    scale, zero = torch.tensor([0.03]), torch.tensor([100], dtype=torch.int32)
    kept = quantizers.random_mask(x, 0.5, generator=torch.Generator().manual_seed(0))
    mixed = quantizers.activation_levels(x, scale, zero, table, bits=8, unrounded=kept)
    plain = quantizers.activation_levels(x, scale, zero, table, bits=8)
    assert torch.equal(mixed[kept], (x / scale)[kept])
    assert torch.equal(mixed[~kept], plain[~kept])
    (gradient,) = torch.autograd.grad(mixed.sum(), x)
    (inside,) = torch.autograd.grad(plain.sum(), x)
    torch.testing.assert_close(gradient[kept], torch.full_like(gradient[kept], 1 / 0.03))
    assert torch.equal(gradient[~kept], inside[~kept])
    assert not inside[~kept].all()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_random_mask_has_the_share_that_was_asked_for(share):
    mask = quantizers.random_mask(
        torch.empty(333, 301), share, generator=torch.Generator().manual_seed(3)
    )
    assert mask.shape == (333, 301)
    assert mask.dtype == torch.bool
    assert float(mask.float().mean()) == pytest.approx(share, abs=0.01)
    again = quantizers.random_mask(
        torch.empty(333, 301), share, generator=torch.Generator().manual_seed(3)
    )
    assert torch.equal(mask, again)
