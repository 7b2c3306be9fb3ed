"""What is worked out once from a stored tensor and kept as long as it lives.

Weights stay packed in the model; in what form a backend multiplies them best is its own affair. A
tensor that was written to since counts as another one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Form = TypeVar("Form")


class _Kept(NamedTuple):
    """A derived form, with the other tensors it came from and the state they all were in."""

    others: tuple[Tensor, ...]
    versions: tuple[int, ...]
    form: Any


_kept = WeakTensorKeyDictionary()
_version: Callable[[Tensor], int] = operator.attrgetter("_version")


def versions_of(tensors: Iterable[Tensor]) -> tuple[int, ...] | None:
    """How often each tensor was written to; None where one of inference mode does not count it."""
    found = tuple(tensors)
    return None if any(map(Tensor.is_inference, found)) else tuple(map(_version, found))


def derived(make: Callable[..., Form], source: Tensor, *others: Tensor) -> Form:
    """`make(source, *others)`, from memory if nothing changed since it was made.

    Tensors made under `torch.inference_mode` count no changes and are not remembered.
    """
    versions = versions_of((source, *others))
    if versions is None:
        return make(source, *others)
    forms = _kept.get(source)
    if forms is None:
        forms = _kept[source] = {}
    kept = forms.get(make)
    if (
        kept is None
        or kept.versions != versions
        or any(one is not other for one, other in zip(kept.others, others, strict=True))
    ):
        with torch.inference_mode(False):  # what is kept may be used outside of it
            kept = forms[make] = _Kept(others, versions, make(source, *others))
    form: Form = kept.form
    return form
