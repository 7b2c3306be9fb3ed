"""How a picture becomes the input of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qtool.errors import UsageError


@dataclass(frozen=True)
class DataConfig:
    """Size, normalisation and crop; they travel with the weights.

    Attributes:
        input_size: Channels, height, width.
        mean: Mean of each channel, pixels in 0..1.
        std: Standard deviation of each channel.
        interpolation: Name of the resampling filter.
        crop_pct: Share of the resized shorter side that the centre crop keeps.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataConfig:
        """Read what `to_dict` wrote, or timm's own data configuration.

        Raises:
            UsageError: A value is absent or of the wrong kind.
        """
        try:
            channels, height, width = (int(v) for v in values["input_size"])
            return cls(
                input_size=(channels, height, width),
                mean=tuple(float(v) for v in values["mean"]),
                std=tuple(float(v) for v in values["std"]),
                interpolation=str(values["interpolation"]),
                crop_pct=float(values["crop_pct"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"the data configuration of the model is incomplete ({error!r})",
                remedy="it needs input_size, mean, std, interpolation and crop_pct",
            ) from error
