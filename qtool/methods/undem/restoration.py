"""Taking moire out of one picture with a demoire network, however large the picture is.

What is computed is the change, not the picture: a pixel the network leaves alone keeps every bit.
Pictures are display-encoded sRGB, (3, H, W), mostly in 0..1; colours outside sRGB may lie outside.

Reference: Zhong et al. 2024, "Learning image demoireing from unpaired real data",
arXiv:2401.02719, for the task; tiles, blending and colour keeping are qtool's own.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from qtool.methods.undem.tiles import LARGEST, SMALLEST, Axis, mirrored, plan_axis

Read = Callable[[Tensor, Tensor], Tensor]
"""Gives the rows and columns with these indices as (3, rows, columns)."""

_SEAM_LIMIT = 2 / 255
_TILED_FROM = 4
"""Pictures of fewer tiles than this are not worth cutting up: the overlap costs more."""

_OVERLAP, _LOCAL_OVERLAP = 8, 16
"""Parts of a tile's side that neighbours share one of. BandGate's tiles of 512 that share 32 pixels
instead of 64 differ as little from the whole picture on average."""

_FIT_SAMPLES = 400_000
_KEPT_SHARE = 0.8
_FIT_ROUNDS = 2
_RIDGE = 1e-3

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a network wants to change in a picture.

    Attributes:
        values: (3, H, W), float32, on the CPU: to be added to the picture.
        tile: Largest side of the tiles, 0 when the picture went through whole.
        seam: Mean absolute difference of neighbouring tiles where they overlap, in 0..1.
    """

    values: Tensor
    tile: int
    seam: float


class BadOutputError(ValueError):
    """The network gave something that cannot be a picture."""


@dataclass(frozen=True, kw_only=True)
class Restorer:
    """A network, and how to run it.

    Attributes:
        network: Takes (B, 3, H, W) and returns several pictures.
        result: Index of the one of full size.
        multiple: What height and width must be multiples of.
        bytes_per_pixel: Memory that one pixel of input takes at the peak.
        device: Where to compute.
        bfloat16: Whether convolutions run in bfloat16.
        batch_size: Tiles computed together.
        tile: Side of the tiles that large pictures are fastest in, of a network that sees little
            around a pixel; 0 takes pictures whole.
    """

    network: nn.Module
    result: int
    multiple: int
    bytes_per_pixel: int
    device: torch.device
    bfloat16: bool = False
    batch_size: int = 1
    tile: int = 0

    def change(
        self,
        read: Read,
        height: int,
        width: int,
        *,
        tile: int | None = None,
        overlap: int | None = None,
        memory: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Change:
        """Compute what the network would change.

        Args:
            read: Gives parts of the picture.
            height: H.
            width: W.
            tile: Side of tiles, never replaced by another; 0 for the whole picture; None takes
                what is fastest and fits, halved when memory runs out, and doubled once if
                neighbours disagree and memory allows it.
            overlap: Pixels that neighbouring tiles share; None for an eighth of a tile, a sixteenth
                where the network sees little around a pixel.
            memory: Bytes that computing may take; None for no bound.
            progress: Told how many of how many tiles are done.

        Raises:
            BadOutputError: The result is not finite, or constant where the picture is not.
            MemoryError: It does not fit into memory.
        """
        room = memory if memory is not None else 1 << 62
        compute = partial(
            self._tiled,
            read,
            height,
            width,
            overlap=overlap,
            progress=progress,
            shrink=tile is None,
        )
        sides = [tile] if tile is not None else self._sides(height, width, room)
        found = self._first_that_fits(sides, compute)
        if tile is None and found.seam > _SEAM_LIMIT:
            side = 2 * found.tile
            if side < max(height, width) and side * side * self.bytes_per_pixel <= room:
                log.info("tiles of %d disagree, trying %d", found.tile, side)
                with suppress(MemoryError):
                    found = self._first_that_fits([side], compute)
        if found.seam > _SEAM_LIMIT:
            log.warning("tiles disagree by %.1f steps of 8 bits where they meet", 255 * found.seam)
        return found

    def _first_that_fits(self, sides: Sequence[int], compute: Callable[[int], Change]) -> Change:
        """The change in tiles of the first of these sides for which memory suffices."""
        cause: BaseException | None = None
        for side in sides:
            try:
                return compute(side)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                cause = error
            log.info("out of memory with %s", f"tiles of {side}" if side else "the whole picture")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        raise MemoryError("out of memory") from cause

    def _sides(self, height: int, width: int, room: int) -> list[int]:
        """Sides to try, 0 for the whole picture."""
        faster = 0 < _TILED_FROM * self.tile**2 < height * width
        sides = [0] if height * width * self.bytes_per_pixel <= room and not faster else []
        side = self.tile or LARGEST
        while side >= SMALLEST:
            fits = side * side * self.bytes_per_pixel <= room
            if side < max(height, width) and (fits or side == SMALLEST):
                sides.append(side)
            side //= 2
        return sides or [0]

    def _tiled(
        self,
        read: Read,
        height: int,
        width: int,
        side: int,
        *,
        overlap: int | None,
        progress: Callable[[int, int], None] | None,
        shrink: bool,
    ) -> Change:
        usual = side // (_LOCAL_OVERLAP if self.tile else _OVERLAP)
        shared = usual if overlap is None else min(overlap, side // 2)
        rows, columns = (
            plan_axis(length, tile=side, overlap=shared, multiple=self.multiple, shrink=shrink)
            for length in (height, width)
        )
        values = torch.zeros(3, height, width)
        places = list(itertools.product(range(len(rows.starts)), range(len(columns.starts))))
        seams: list[float] = []
        before: dict[int, Tensor] = {}
        done = 0
        for batch in _batches(places, self.batch_size):
            tiles = torch.stack(
                [
                    read(
                        mirrored(rows.starts[row], rows.size, height),
                        mirrored(columns.starts[column], columns.size, width),
                    )
                    for row, column in batch
                ]
            )
            for (row, column), part in zip(batch, self._run(tiles), strict=True):
                if column:
                    seams.append(_disagreement(before[row], part, columns, column))
                before = {row: part}
                _add(values, part, rows, columns, row, column)
                done += 1
                if progress is not None:
                    progress(done, len(places))
        _check(values, read)
        seam = sum(seams) / len(seams) if seams else 0.0
        return Change(values=values, tile=side, seam=seam)

    def _run(self, tiles: Tensor) -> Tensor:
        """Change of each tile: (B, 3, h, w) to the same, on the CPU."""
        picture = tiles.to(self.device, memory_format=torch.channels_last).clamp(0, 1)
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16),
        ):
            output: Tensor = self.network(picture)[self.result]
            return (output.float().clamp(0, 1) - picture).cpu()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of PyTorch or Python means that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return "out of memory" in text or "can't allocate memory" in text


def colour_fit(picture: Tensor, change: Tensor) -> Tensor:
    """The colour matrix that takes a restored picture back to the tone it was photographed in.

    A 3 x 4 matrix from the restored colours to those of the photograph, fitted on pixels whose
    difference is below the 80th percentile, so that bands do not bend it.

    Args:
        picture: (3, N): colours of the photograph.
        change: (3, N): what the network adds to them.

    Returns:
        (3, 4): three columns of gains, one of offsets; the identity where nothing changes.
    """
    step = max(1, picture.shape[1] // _FIT_SAMPLES)
    wanted = picture[:, ::step].double()
    colours = wanted + change[:, ::step].double()
    colours = torch.cat((colours, torch.ones_like(colours[:1])))
    identity = torch.eye(3, 4, dtype=torch.float64)
    if not change.any():
        return identity.float()
    matrix = identity
    for _ in range(_FIT_ROUNDS):
        difference = (matrix @ colours - wanted).abs().sum(dim=0)
        kept = difference <= difference.quantile(_KEPT_SHARE)
        x, y = colours[:, kept], wanted[:, kept]
        # The ridge draws what the colours of one picture leave open towards no change.
        ridge = _RIDGE * x.shape[1] * torch.eye(4, dtype=torch.float64)
        ridge[3, 3] *= 0.1
        matrix = torch.linalg.solve(x @ x.T + ridge, x @ y.T + ridge @ identity.T).T
    return matrix.float()


def apply_change(
    picture: Tensor, change: Tensor, *, matrix: Tensor | None, strength: float
) -> Tensor:
    """The change that is made in the end, (3, ...) to the same.

    Args:
        picture: Colours of the photograph.
        change: What the network adds.
        matrix: The colour matrix that follows, from `colour_fit`; None for none.
        strength: Share of the change that is made, 0..1.
    """
    if matrix is not None:
        restored = picture + change
        turned = torch.tensordot(matrix[:, :3], restored, dims=1)
        change = turned + matrix[:, 3].view(3, *(1,) * (picture.ndim - 1)) - picture
    return strength * change


def _batches(places: Sequence[tuple[int, int]], size: int) -> Iterator[Sequence[tuple[int, int]]]:
    for start in range(0, len(places), size):
        yield places[start : start + size]


def _add(values: Tensor, part: Tensor, rows: Axis, columns: Axis, row: int, column: int) -> None:
    top, left = rows.starts[row], columns.starts[column]
    area = values[:, top : top + rows.size, left : left + columns.size]
    height, width = area.shape[1:]
    down = rows.weights(row)[:height].view(-1, 1)
    across = columns.weights(column)[:width]
    area += part[:, :height, :width] * down * across


def _disagreement(left: Tensor, right: Tensor, columns: Axis, column: int) -> float:
    shared = columns.starts[column - 1] + columns.size - columns.starts[column]
    return float((left[:, :, -shared:] - right[:, :, :shared]).abs().mean())


def _check(values: Tensor, read: Read) -> None:
    """Refuse what cannot be a restored picture."""
    if not bool(values.isfinite().all()):
        raise BadOutputError("the network gave values that are not numbers")
    rows = torch.linspace(0, values.shape[1] - 1, min(values.shape[1], 64)).long()
    columns = torch.linspace(0, values.shape[2] - 1, min(values.shape[2], 64)).long()
    before = read(rows, columns)
    after = before + values[:, rows][:, :, columns]
    if _spread(before) > 0.02 and _spread(after) < 1e-3:
        raise BadOutputError("the network gave a picture of one colour")


def _spread(picture: Tensor) -> float:
    return float(picture.std(dim=(1, 2), correction=0).max())
