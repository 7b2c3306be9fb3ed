"""The models qtool knows by a short name, and what a caller needs to know before opening one.

An alias pins an exact timm tag: in timm a bare `vit_base_patch16_224` is another set of weights
than the one the papers report. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
"""What a model's folder and its repository on the hub hold."""

Family = Literal["vit", "deit", "swin", "resnet", "mobilenet", "convnext", "demo"]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model with a short name.

    Attributes:
        alias: The short name.
        architecture: timm name with its tag, or "demo_vit".
        family: What kind of network it is.
        parameters: Number of parameters in millions.
        licence: SPDX identifier of the weights' licence.
        paper: Where the model was published.
        bundled: File name below `assets/`, or "" when the weights are a download.
    """

    alias: str
    architecture: str
    family: Family
    parameters: float
    licence: str
    paper: str
    bundled: str = ""

    @property
    def size(self) -> str:
        """Approximate size of the weights on disk, such as "88 MB"."""
        return size_text(self.parameters * 1e6 * (2 if self.bundled else 4))


def size_text(count: float) -> str:
    """Return `count` bytes in megabytes, for people."""
    return f"{count / 1e6:.1f} MB" if count < 1e7 else f"{count / 1e6:.0f} MB"


_VIT = "Steiner et al. 2021, arXiv:2106.10270"
_DEIT = "Touvron et al. 2020, arXiv:2012.12877"
_SWIN = "Liu et al. 2021, arXiv:2103.14030"
_RESNET = "Wightman et al. 2021, arXiv:2110.00476"
_APACHE = "Apache-2.0"


def _spec(
    alias: str,
    architecture: str,
    family: Family,
    parameters: float,
    paper: str,
    licence: str = _APACHE,
) -> ModelSpec:
    return ModelSpec(
        alias=alias,
        architecture=architecture,
        family=family,
        parameters=parameters,
        licence=licence,
        paper=paper,
    )


MODELS: tuple[ModelSpec, ...] = (
    ModelSpec(
        alias="demo_vit",
        architecture="demo_vit",
        family="demo",
        parameters=1.23,
        licence=_APACHE,
        paper="Dosovitskiy et al. 2020, arXiv:2010.11929 (architecture)",
        bundled="demo_vit.safetensors",
    ),
    _spec("vit_t", "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "vit", 5.7, _VIT),
    _spec("vit_s", "vit_small_patch16_224.augreg_in21k_ft_in1k", "vit", 22.1, _VIT),
    _spec("vit_b", "vit_base_patch16_224.augreg_in21k_ft_in1k", "vit", 86.6, _VIT),
    _spec("vit_l", "vit_large_patch16_224.augreg_in21k_ft_in1k", "vit", 304.3, _VIT),
    _spec("deit_t", "deit_tiny_patch16_224.fb_in1k", "deit", 5.7, _DEIT),
    _spec("deit_s", "deit_small_patch16_224.fb_in1k", "deit", 22.1, _DEIT),
    _spec("deit_b", "deit_base_patch16_224.fb_in1k", "deit", 86.6, _DEIT),
    _spec("deit_t_distilled", "deit_tiny_distilled_patch16_224.fb_in1k", "deit", 5.9, _DEIT),
    _spec("deit_s_distilled", "deit_small_distilled_patch16_224.fb_in1k", "deit", 22.4, _DEIT),
    _spec("deit_b_distilled", "deit_base_distilled_patch16_224.fb_in1k", "deit", 87.3, _DEIT),
    _spec("swin_t", "swin_tiny_patch4_window7_224.ms_in1k", "swin", 28.3, _SWIN, "MIT"),
    _spec("swin_s", "swin_small_patch4_window7_224.ms_in1k", "swin", 49.6, _SWIN, "MIT"),
    _spec("swin_b", "swin_base_patch4_window7_224.ms_in22k_ft_in1k", "swin", 87.8, _SWIN, "MIT"),
    _spec("resnet18", "resnet18.a1_in1k", "resnet", 11.7, _RESNET),
    _spec("resnet34", "resnet34.a1_in1k", "resnet", 21.8, _RESNET),
    _spec("resnet50", "resnet50.a1_in1k", "resnet", 25.6, _RESNET),
    _spec(
        "mobilenetv2",
        "mobilenetv2_100.ra_in1k",
        "mobilenet",
        3.5,
        "Sandler et al. 2018, arXiv:1801.04381",
    ),
    _spec(
        "convnext_t",
        "convnext_tiny.fb_in1k",
        "convnext",
        28.6,
        "Liu et al. 2022, arXiv:2201.03545",
    ),
)


def find(name: str) -> ModelSpec | None:
    """Return the model whose alias or exact architecture is `name`, or None."""
    for spec in MODELS:
        if name in (spec.alias, spec.architecture):
            return spec
    return None


def suggestions(name: str, *, more: tuple[str, ...] = (), limit: int = 3) -> list[str]:
    """Return known names that look like `name`, the nearest first.

    Args:
        name: What somebody typed.
        more: Further known names besides the aliases.
        limit: Longest list to return.

    Returns:
        At most `limit` names; empty when nothing is near.
    """
    known = [spec.alias for spec in MODELS]
    typed = name.lower()
    near = difflib.get_close_matches(typed, known, limit, 0.6)
    near += difflib.get_close_matches(typed, more, limit, 0.7)
    return list(dict.fromkeys(near))[:limit]
