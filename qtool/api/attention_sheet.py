"""Where a model looks in synthesized images, beside where it was asked to look."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.api.synthesize import denormalised, sheet_png
from qtool.methods.spdfq.taps import summary_attention
from qtool.models import vision

_IMAGES = 4
_HEADS = 2


def attention_png(
    opened: vision.OpenedModel, pixels: Tensor, priors: dict[str, Tensor]
) -> bytes | None:
    """Rows of an image, then attention and prior of some heads of the last block.

    Args:
        opened: The float model.
        pixels: Synthesized images, (N, 3, H, W), normalised.
        priors: Per attention site, (N, heads, tokens).

    Returns:
        A PNG file's bytes, or None where there is no map of the whole picture: without priors, and
        in models that attend within windows.
    """
    layout = vision.layout(opened.model)
    sites = [s for s in layout.attentions if s.kind == "tokens" and s.name in priors]
    if not sites:
        return None
    site = sites[-1]
    shown = pixels[:_IMAGES]
    (attention,) = summary_attention(opened.model, shown, sites=[site], layout=layout)
    prior = priors[site.name][: len(shown)].to(attention.device)
    visible = denormalised(shown.cpu(), opened.data)
    cells: list[Tensor] = []
    captions: list[str] = []
    for index, picture in enumerate(visible):
        cells.append(picture)
        captions.append(f"image {index}")
        for head in range(min(_HEADS, attention.shape[1])):
            for kind, maps in (("attention", attention), ("prior", prior)):
                cells.append(_shown(maps[index, head].cpu(), site.grid, picture))
                captions.append(f"head {head} {kind}")
    columns = 1 + 2 * min(_HEADS, attention.shape[1])
    return sheet_png(torch.stack(cells), captions=captions, columns=columns)


def _shown(row: Tensor, grid: tuple[int, int], picture: Tensor) -> Tensor:
    """A map (tokens,) as a grey picture, its largest value white."""
    field = row.view(1, 1, *grid) / row.max().clamp_min(1e-12)
    wide = F.interpolate(field, size=picture.shape[-2:], mode="nearest")
    return wide[0].expand_as(picture)
