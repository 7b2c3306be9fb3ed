"""Where on the screen a sensor sample looks: a pinhole camera before a tilted plane."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Pose:
    """A camera before a screen.

    Attributes:
        scale: Sensor samples per screen pixel, straight on at the centre of the sensor.
        yaw: Degrees.
        pitch: Degrees.
        roll: Degrees.
        focal: Focal length in sensor widths.
        distortion: k1 of r' = r (1 + k1 r^2), with r in half sensor widths.
        centre_x: Centre of the part of the sensor that is looked at, in sensor widths from the
            middle.
        centre_y: The same, downwards.
        phase_x: Shift of the screen, in screen pixels.
        phase_y: The same, downwards.
        width: Samples along the whole sensor.
    """

    scale: float = 2.0
    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    focal: float = 1.2
    distortion: float = 0.0
    centre_x: float = 0.0
    centre_y: float = 0.0
    phase_x: float = 0.0
    phase_y: float = 0.0
    width: int = 4000


def screen_points(
    pose: Pose, height: int, width: int, *, samples: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Map sub-samples of a part of the sensor to the screen.

    Args:
        pose: The camera.
        height: Sensor samples of the part, downwards.
        width: Sensor samples of the part.
        samples: Sub-samples along each side of a sensor sample.
        device: Where to compute.

    Returns:
        Horizontal and vertical positions in screen pixels, each of shape (height * samples,
        width * samples); (0, 0) is where the centre of the part looks, but for the phase.
    """
    across = (torch.arange(width * samples, device=device) + 0.5) / samples - width / 2
    down = (torch.arange(height * samples, device=device) + 0.5) / samples - height / 2
    x = (across / pose.width + pose.centre_x)[None, :].expand(len(down), -1)
    y = (down / pose.width + pose.centre_y)[:, None].expand(-1, len(across))
    u, v = _intersect(pose, x.double(), y.double())
    centre = (
        torch.full((1, 1), place, dtype=torch.float64, device=device)
        for place in (pose.centre_x, pose.centre_y)
    )
    middle_u, middle_v = _intersect(pose, *centre)
    return (u - middle_u + pose.phase_x).float(), (v - middle_v + pose.phase_y).float()


def _intersect(pose: Pose, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    stretch = 1 + pose.distortion * 4 * (x * x + y * y)
    ray_x, ray_y = x * stretch / pose.focal, y * stretch / pose.focal
    right, below, normal = _axes(pose)
    distance = pose.focal * pose.width / pose.scale
    reach = distance * normal[2] / (ray_x * normal[0] + ray_y * normal[1] + normal[2])
    hit_x, hit_y, hit_z = reach * ray_x, reach * ray_y, reach - distance
    return (
        hit_x * right[0] + hit_y * right[1] + hit_z * right[2],
        hit_x * below[0] + hit_y * below[1] + hit_z * below[2],
    )


def _axes(pose: Pose) -> tuple[list[float], list[float], list[float]]:
    """The screen's axes and its normal in the camera's frame: roll after yaw after pitch."""
    yaw, pitch, roll = (math.radians(angle) for angle in (pose.yaw, pose.pitch, pose.roll))
    turn_x = torch.tensor(
        [
            [1.0, 0.0, 0.0],
            [0.0, math.cos(pitch), -math.sin(pitch)],
            [0.0, math.sin(pitch), math.cos(pitch)],
        ]
    )
    turn_y = torch.tensor(
        [
            [math.cos(yaw), 0.0, math.sin(yaw)],
            [0.0, 1.0, 0.0],
            [-math.sin(yaw), 0.0, math.cos(yaw)],
        ]
    )
    turn_z = torch.tensor(
        [
            [math.cos(roll), -math.sin(roll), 0.0],
            [math.sin(roll), math.cos(roll), 0.0],
            [0.0, 0.0, 1.0],
        ]
    )
    columns = (turn_z @ turn_y @ turn_x).T.tolist()
    return columns[0], columns[1], columns[2]
