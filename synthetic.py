"""Generated images of ten learnable classes, for a run without network access."""

import torch
from torch import Tensor

from common import SIZE

SHAPES = ("disk", "ring", "square", "frame", "triangle")
SHAPES += ("cross", "rows", "columns", "checks", "dots")


def shapes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images uint8 (count, 3, 32, 32) and labels int64 (count,), equally many of each class: noisy
    SHAPES in two random colours, of random size and place, always the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    labels = torch.arange(count) % len(SHAPES)
    pixel = torch.arange(SIZE, dtype=torch.float32)
    x = pixel.view(1, 1, -1) - uniform(12, 19, 1, 1)
    y = pixel.view(1, -1, 1) - uniform(12, 19, 1, 1)
    r = uniform(7, 11, 1, 1)
    circle, box = (x**2 + y**2).sqrt() / r, torch.maximum(x.abs(), y.abs()) / r
    row, column = (y / r * 5).sin(), (x / r * 5).sin()
    masks = (
        circle < 1,
        (circle < 1) & (circle > 0.6),
        box < 0.85,
        (box < 0.9) & (box > 0.55),
        (y < 0.8 * r) & (y > 2 * x.abs() - 0.9 * r),
        (torch.minimum(x.abs(), y.abs()) < 0.25 * r) & (box < 1),
        (row > 0) & (box < 1.2),
        (column > 0) & (box < 1.2),
        (row * column > 0) & (box < 1.2),
        (row > 0.3) & (column > 0.3) & (box < 1.2),
    )
    mask = torch.stack([m.expand(count, SIZE, SIZE) for m in masks])[labels, torch.arange(count)]
    back, front = uniform(0, 255, 3, 1, 1), uniform(0, 255, 3, 1, 1)
    noise = 25 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    images = torch.where(mask.unsqueeze(1), front, back) + noise
    return images.clamp(0, 255).to(torch.uint8), labels
