"""Augmentation as batched tensor ops: *sample* every image's parameters, then *apply* them.

The semantics are those of albumentations 2.0.8 with OpenCV 5, checked in tests/test_augment.py and
tests/test_sample.py. Images are (N, C, W, W), in any unit; W = 32 in this project.

To add a change of your own: its parameters in `Policy`, with flags in flags.py (in `COLOURS` there
too if both a probability and its limits are 0 by default) and in README's table of them; what is
drawn in `Params` and `sample`, the change itself in `apply`. One that computes new levels belongs
to `Colours`, `sample_colours`, `jitter_colours` and `Policy.changes_colours` instead. Then the same
in `reference.compose`, if its probability is not 0, for --augment albumentations, and in
tests/test_augment.py, test_sample.py and test_step.py. Finish interrupted runs first, as they keep
their set of flags, and train what you compare with anew: one more draw changes those after it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BORDERS = ("reflect101", "constant")


@dataclass(frozen=True)
class Policy:
    """What may be drawn for an image, and with what probability."""

    flip_p: float = 0.5
    shift: float = 0.125  # shifts are whole pixels, fewer than this fraction of the width
    scale: float = 0.1  # largest change of scale, x and y drawn independently
    rotate: float = 15.0  # largest angle, degrees
    affine_p: float = 0.5
    border: str = "reflect101"  # what lies outside the image: its mirror image, or the fill
    cutout: int = 16  # largest side of the hole, pixels
    cutout_min: int | None = None  # smallest side, from 1; x and y drawn separately; None: largest
    cutout_p: float = 0.25
    # Level of hole and a constant border, None for the images' mean; callers of `apply` pass it
    fill: float | None = None
    rgb_shift: tuple[float, float, float] = (0.0, 0.0, 0.0)  # largest shift per channel, levels
    rgb_shift_p: float = 0.0
    brightness: float = 0.0  # largest change, as a fraction of 255
    contrast: float = 0.0  # largest change of the contrast factor
    brightness_contrast_p: float = 0.0

    @property
    def changes_colours(self) -> bool:
        """Whether `jitter_colours` may do anything."""
        return bool(self.rgb_shift_p or self.brightness_contrast_p)


@dataclass(frozen=True)
class Params:
    """Drawn parameters of N images. Angle, scale and shift are drawn for all, and used only where
    `affine` is true; the hole of an image that drew none is all zeros."""

    flip: Tensor  # bool (N,)
    affine: Tensor  # bool (N,)
    angle: Tensor  # float32 (N,), degrees
    scale: Tensor  # float32 (N, 2): x, y
    shift: Tensor  # float32 (N, 2): x, y, whole pixels
    hole: Tensor  # int64 (N, 4): x_min, y_min, x_max, y_max, the last two exclusive


@dataclass(frozen=True)
class Colours:
    """Drawn colour changes of N images: 0 (`alpha`: 1) for an image that drew none."""

    rgb_shift: Tensor  # float32 (N, 3), whole levels
    alpha: Tensor  # float32 (N,), contrast factor
    beta: Tensor  # float32 (N,), brightness, levels


def sample(policy: Policy, count: int, size: int, device: torch.device) -> Params:
    """Parameters for `count` images of `size`×`size` pixels, from the device's default generator.

    Raises ValueError if the hole is larger than the images.
    """
    if policy.cutout > size:
        raise ValueError(f"a hole of {policy.cutout} pixels does not fit into {size}")
    smallest = min(policy.cutout, policy.cutout_min or policy.cutout)
    sides = torch.randint(smallest, policy.cutout + 1, (count, 2), device=device)
    corner = torch.randint(2**31, (count, 2), device=device) % (size - sides + 1)
    hole = torch.cat([corner, corner + sides], dim=1)
    return Params(
        flip=_drawn(policy.flip_p, count, device),
        affine=_drawn(policy.affine_p, count, device),
        angle=_symmetric((count,), device) * policy.rotate,
        scale=1 + _symmetric((count, 2), device) * policy.scale,
        shift=(_symmetric((count, 2), device) * policy.shift * size).trunc(),
        hole=hole * _drawn(policy.cutout_p, count, device).unsqueeze(1),
    )


def sample_colours(policy: Policy, count: int, device: torch.device) -> Colours:
    """Colour changes for `count` images, from the device's default generator."""
    channels = zip(_symmetric((count, 3), device).unbind(1), policy.rgb_shift, strict=True)
    shift = torch.stack([draw * limit for draw, limit in channels], dim=1).trunc()
    drawn = _drawn(policy.brightness_contrast_p, count, device)
    return Colours(
        rgb_shift=shift * _drawn(policy.rgb_shift_p, count, device).unsqueeze(1),
        alpha=1 + _symmetric((count,), device) * policy.contrast * drawn,
        beta=_symmetric((count,), device) * policy.brightness * 255 * drawn,
    )


def jitter_colours(images: Tensor, colours: Colours) -> Tensor:
    """Apply RGB shift, then brightness and contrast, to images uint8 or float (N, 3, H, W) in 0–255
    units. Returns float32 of whole levels in [0, 255], as albumentations computes on uint8."""
    shifted = (images + colours.rgb_shift.view(-1, 3, 1, 1)).clamp(0, 255)
    changed = shifted * colours.alpha.view(-1, 1, 1, 1) + colours.beta.view(-1, 1, 1, 1)
    return changed.clamp(0, 255).floor()


def apply(
    images: Tensor, params: Params, fill: float | Tensor, border: str = "reflect101"
) -> Tensor:
    """Apply flip, shift-scale-rotate and cutout to images (N, C, W, W), in any unit; float32.

    `fill`, a number or (C, 1, 1) in the images' unit, is the hole's colour and, if `border` is
    "constant", what lies outside the image. Computed in float32 even under autocast: an image that
    draws nothing, or only a flip or a hole, keeps its values exactly. Raises ValueError for a
    `border` that is not one of BORDERS, images of another shape, or parameters of another number.
    """
    if border not in BORDERS:
        raise ValueError(f"border {border!r} is not one of {BORDERS}")
    if images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images {tuple(images.shape)} are not (N, C, W, W)")
    if len(images) != len(params.flip):
        raise ValueError(f"{len(images)} images, but parameters of {len(params.flip)}")
    size = images.shape[-1]

    def warp(images: Tensor, theta: Tensor) -> Tensor:
        grid = sampling_grid(theta, size)
        if border == "reflect101":
            return F.grid_sample(images, grid, padding_mode="reflection", align_corners=True)
        return F.grid_sample(images - fill, grid, padding_mode="zeros", align_corners=True) + fill

    def cut(images: Tensor, hole: Tensor) -> Tensor:
        return torch.where(_inside(hole, size), fill, images)

    images = images.to(torch.float32, copy=True)
    if isinstance(fill, Tensor):
        fill = fill.to(images)
    images = _where(params.flip, lambda images: images.flip(3), images)
    images = _where(params.affine, warp, images, inverse_matrix(params, size))
    return _where(params.hole[:, 2] > 0, cut, images, params.hole)


def inverse_matrix(params: Params, size: int) -> Tensor:
    """`theta` float32 (N, 2, 3), which maps output to input positions, both −1 at the first pixel's
    centre and 1 at the last's.

    The inverse of scale, then rotation, then shift about the centre k = (size − 1)/2, as
    `albumentations.Affine` 2.0.8 composes them; positive angles turn counter-clockwise.
    """
    angle = params.angle.deg2rad()
    sine, cosine = angle.sin(), angle.cos()
    inverse = torch.stack([cosine, -sine, sine, cosine], dim=1).view(-1, 2, 2)
    inverse = inverse / params.scale.unsqueeze(2)
    offset = -(inverse * params.shift.unsqueeze(1)).sum(2, keepdim=True) / ((size - 1) / 2)
    return torch.cat([inverse, offset], dim=2)


def sampling_grid(theta: Tensor, size: int) -> Tensor:
    """`affine_grid(theta, (N, C, size, size), align_corners=True)` (N, size, size, 2), written out
    without a matrix product: faster, and neither autocast nor TF32 can round the positions."""
    x = torch.linspace(-1, 1, size, device=theta.device)
    column_x, column_y, offset = (c.view(-1, 2, 1, 1) for c in theta.unbind(2))
    planes = column_x * x + (column_y * x.unsqueeze(1) + offset)
    return planes.permute(0, 2, 3, 1)


def _symmetric(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.rand(shape, device=device) * 2 - 1


def _drawn(p: float, count: int, device: torch.device) -> Tensor:
    return torch.rand(count, device=device) < p


def _where(drawn: Tensor, change: Callable[..., Tensor], images: Tensor, *params: Tensor) -> Tensor:
    """Apply `change` to the images whose `drawn`, bool (N,), is true, each with its own `params`
    (N, …). A CPU computes only those, in place; a GPU computes all and selects, since asking it
    which they are would mean waiting for it."""
    if images.device.type != "cpu":
        return torch.where(drawn.view(-1, 1, 1, 1), change(images, *params), images)
    index = drawn.nonzero().squeeze(1)
    chosen = (each[index] for each in params)
    return images.index_copy_(0, index, change(images.index_select(0, index), *chosen))


def _inside(hole: Tensor, size: int) -> Tensor:
    """Bool (N, 1, size, size): the pixels inside each image's hole."""
    line = torch.arange(size, device=hole.device)
    low, high = hole[:, :2].unsqueeze(2), hole[:, 2:].unsqueeze(2)
    inside_x, inside_y = ((line >= low) & (line < high)).unbind(1)
    return (inside_y.unsqueeze(2) & inside_x.unsqueeze(1)).unsqueeze(1)
