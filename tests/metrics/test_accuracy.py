from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.metrics.accuracy import standard_error, topk_hits


def test_counts_hits_by_rank():
    logits = torch.tensor([[0.1, 0.9, 0.5], [3.0, 2.0, 1.0], [0.0, 0.1, 0.2]])
    assert topk_hits(logits, torch.tensor([1, 2, 1]), (1, 2, 3)) == {1: 1, 2: 2, 3: 3}


@given(seed=st.integers(0, 10_000), classes=st.integers(5, 30))
def test_equals_torch_topk_without_ties(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.stack([torch.randperm(classes, generator=generator).float() for _ in range(17)])
    labels = torch.randint(classes, (17,), generator=generator)
    for k, hits in topk_hits(logits, labels, (1, 5)).items():
        expected = (logits.topk(k).indices == labels.unsqueeze(1)).any(1).sum()
        assert hits == int(expected)


def test_of_equal_scores_the_lower_class_is_first():
    logits = torch.zeros(4, 4)
    assert topk_hits(logits, torch.arange(4), (1, 2)) == {1: 1, 2: 2}


def test_not_a_number_is_a_miss():
    logits = torch.tensor([[float("nan"), 1.0], [1.0, float("nan")], [1.0, 0.0]])
    assert topk_hits(logits, torch.tensor([0, 0, 0]), (1, 5)) == {1: 1, 5: 1}


def test_few_classes_and_empty_batches():
    assert topk_hits(torch.rand(3, 2), torch.tensor([0, 1, 1]), (5,)) == {5: 3}
    assert topk_hits(torch.rand(0, 4), torch.tensor([], dtype=torch.int64)) == {1: 0, 5: 0}


@pytest.mark.parametrize(
    ("shape", "labels", "ks"),
    [((2, 3), [0], (1,)), ((2, 3), [0, 3], (1,)), ((2, 3), [-1, 0], (1,)), ((1, 3), [0], (0,))],
)
def test_wrong_input_is_refused(shape, labels, ks):
    with pytest.raises(ValueError, match=r"labels|k starts"):
        topk_hits(torch.rand(shape), torch.tensor(labels), ks)


def test_standard_error():
    assert standard_error(0.5, 100) == pytest.approx(0.05)
    assert standard_error(1.0, 7) == 0.0
    assert math.isclose(standard_error(0.832, 500), 0.01672, rel_tol=1e-3)
    with pytest.raises(ValueError, match="n >= 1"):
        standard_error(0.5, 0)
    with pytest.raises(ValueError, match="0 <= p <= 1"):
        standard_error(50.0, 10)
