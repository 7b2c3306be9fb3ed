"""The widest setting teaches, and learns nothing from it."""

import pytest
import torch

from qtool.methods.multiquant.distillation import loss_weight, teacher_of, width_loss

LABELS = torch.tensor([0, 2])


def logits(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, generator=generator, requires_grad=True)


def test_the_widest_learns_from_labels_alone():
    found = width_loss(logits(0), LABELS, None)
    assert torch.equal(found, torch.nn.functional.cross_entropy(logits(0), LABELS))


def test_others_learn_half_from_labels_and_half_from_the_teacher():
    teacher, student = logits(0), logits(1)
    found = width_loss(student, LABELS, teacher_of(teacher))
    log = student.log_softmax(dim=1)
    hard = -log[torch.arange(2), LABELS].mean()
    soft = -(teacher.softmax(dim=1) * log).sum(dim=1).mean()
    assert float(found.detach()) == pytest.approx(float((0.5 * hard + 0.5 * soft).detach()))


def test_no_gradient_reaches_the_teacher():
    teacher, student = logits(0), logits(1)
    width_loss(student, LABELS, teacher_of(teacher)).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize(("widths", "expected"), [(1, 1), (4, 1), (7, 4 / 7)])
def test_many_widths_do_not_lengthen_the_step(widths, expected):
    assert loss_weight(widths) == expected
