"""Five published CIFAR-10 nets of fewer than 200,000 parameters, layer for layer; their recipes.

Where the published rows leave a choice open, the one taken is noted. The recipes hold what was
published, as flags of train.py; the rest stays at its default.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn


def conv(
    inputs: int, outputs: int, kernel: int = 3, padding: int = 1, bias: bool = False, **options: int
) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=bias, **options)


def pointwise(inputs: int, outputs: int, padding: int = 0, bias: bool = False) -> nn.Conv2d:
    return conv(inputs, outputs, 1, padding, bias)


def norm_relu(*layers: nn.Conv2d) -> list[nn.Module]:
    return [*layers, nn.BatchNorm2d(layers[-1].out_channels), nn.ReLU()]


def norm_relu_drop(dropout: float, *layers: nn.Conv2d) -> list[nn.Module]:
    return [*norm_relu(*layers), nn.Dropout(dropout)]


class Add(nn.Module):
    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.shortcut(x)


def net136k(classes: int, dropout: float) -> nn.Sequential:
    """136,032 parameters, receptive field 73; published: about 85 %."""
    block, halving = partial(norm_relu_drop, dropout), {"stride": 2, "dilation": 2, "padding": 2}
    return nn.Sequential(
        *block(conv(3, 24)),  # 32×32
        *block(conv(24, 24)),
        *block(conv(24, 24, **halving)),  # 16×16
        *block(pointwise(24, 24), conv(24, 24)),
        *block(conv(24, 24, groups=24)),
        *block(conv(24, 24, groups=12, **halving)),  # 8×8
        *block(pointwise(24, 48), conv(48, 48, dilation=2, padding=2)),
        *block(conv(48, 48, dilation=2, padding=2, groups=48)),
        *block(pointwise(48, 96), conv(96, 96)),
        *block(conv(96, 96, groups=12)),
        pointwise(96, classes),
        nn.AvgPool2d(8),
        nn.Flatten(),
    )


def net176k(classes: int, dropout: float) -> nn.Sequential:
    """176,234 parameters, receptive field 43 (published as > 44); published: 85.2 % at best."""
    block = partial(norm_relu_drop, dropout)
    return nn.Sequential(
        *block(conv(3, 32)),  # 32×32
        *block(conv(32, 64)),
        *block(conv(64, 32, stride=2)),  # 16×16
        *block(conv(32, 64)),
        *block(conv(64, 96)),
        *block(conv(96, 32, stride=2)),  # 8×8
        *block(conv(32, 64, dilation=2)),  # 6×6
        *norm_relu(conv(64, 64, padding=0, groups=64), pointwise(64, 128)),  # 4×4
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.Linear(64, classes),
    )


def net190k(classes: int, dropout: float) -> nn.Sequential:
    """190,880 parameters, receptive field 27; published: 86.10 % best, 85.46 % last of 60 epochs.

    Dropout was 0.2 in the first block, then 0.1: the recipe has 0.1, which the first row doubles.
    """
    block = partial(norm_relu_drop, dropout)
    first = norm_relu_drop(min(2 * dropout, 1), conv(3, 16), conv(16, 32))
    return nn.Sequential(
        Add(nn.Sequential(*first), nn.Sequential(pointwise(3, 32))),  # 32×32
        *block(conv(32, 64, stride=2, padding=0), conv(64, 128)),  # 15×15
        *block(conv(128, 64, dilation=2, padding=0), conv(64, 32, padding=0)),  # 11×11, 9×9
        *block(conv(32, 32, groups=32, bias=True), pointwise(32, 16, bias=True)),
        nn.AvgPool2d(9),
        pointwise(16, classes),
        nn.Flatten(),
    )


def net134k(classes: int, dropout: float) -> nn.Sequential:
    """134,722 parameters, receptive field 30; published: 85 % from epoch 43 on.

    One layer is said to be dilated, but no printout says which. Where the map shrinks from 32×32 to
    30×30, dilation 2 with padding 1 fits, as does none with padding 0: the former is taken.
    """

    def block(*layers: nn.Conv2d) -> list[nn.Module]:  # here the norm comes after the ReLU
        norm = nn.BatchNorm2d(layers[-1].out_channels)
        return [*layers, nn.ReLU(), norm, nn.Dropout(dropout)]

    halving = {"kernel": 2, "stride": 2}
    return nn.Sequential(
        *block(conv(3, 10)),  # 32×32
        *block(conv(10, 24)),
        *block(conv(24, 32, dilation=2), conv(32, 64)),  # 30×30
        *block(pointwise(64, 32, padding=1)),  # 32×32
        *block(conv(32, 32, **halving), conv(32, 64)),  # 17×17
        *block(conv(64, 96)),
        *block(conv(96, 64, **halving), conv(64, 64, groups=64)),  # 9×9
        *block(pointwise(64, 16, padding=1)),  # 11×11
        nn.AvgPool2d(11),
        pointwise(16, classes),
        nn.Flatten(),
    )


def net150k(classes: int, dropout: float) -> nn.Sequential:
    """150,576 parameters, receptive field 91; published: 85 % in fewer than 100 epochs.

    "Dilated convolution in all the blocks": the layers of stride 2 are dilated, though their shapes
    fit with and without; undilated the receptive field would be 61, not the published 91.
    """
    block, halving = partial(norm_relu_drop, dropout), {"stride": 2, "dilation": 2, "padding": 2}
    return nn.Sequential(
        *block(conv(3, 16)),  # 32×32
        *block(conv(16, 32)),
        *norm_relu(conv(32, 32, groups=32, bias=True), pointwise(32, 64, bias=True)),
        *block(conv(64, 64, **halving)),  # 16×16
        *norm_relu(pointwise(64, 16)),
        *block(conv(16, 32)),
        *block(conv(32, 32)),
        *block(conv(32, 64, **halving)),  # 8×8
        *norm_relu(pointwise(64, 16)),
        *block(conv(16, 32)),
        *block(conv(32, 64)),
        *block(conv(64, 64, **halving)),  # 4×4
        *norm_relu(pointwise(64, 16)),
        *norm_relu(conv(16, 64, **halving)),  # 2×2
        nn.AdaptiveAvgPool2d(1),
        pointwise(64, classes),
        nn.Flatten(),
    )


NETS = {net.__name__: net for net in (net136k, net176k, net190k, net134k, net150k)}


@dataclass(frozen=True)
class Recipe:
    """What was published about a net's training, as flags of train.py, and a remark."""

    flags: dict[str, Any]
    note: str = ""


TRUNCATED = (
    "the hole's published fill is read as a fraction of 255; the published call, on uint8 images, "
    "truncated it to black"
)
RECIPES = {
    # Its authors tried both OneCycle and cyclic rates.
    "net136k": Recipe({"schedule": "onecycle", "dropout": 0.1, "cutout": 16}),
    "net176k": Recipe(
        {"optimizer": "sgd", "lr": 0.3, "momentum": 0.9, "schedule": "step", "dropout": 0.02}
        | {"flip_p": 0.5, "shift": 0.0625, "scale": 0.1, "rotate": 45.0, "affine_p": 0.5}
        | {"cutout": 16, "fill": 0.4734 * 255, "sam": 0.0},
        f"{TRUNCATED}; the published momentum was plain, here it is Nesterov's",
    ),
    # The original flipped after shift-scale-rotate; draws are symmetric, so order does not matter.
    "net190k": Recipe(
        {"batch_size": 128, "dropout": 0.1, "flip_p": 0.5}
        | {"shift": 0.05, "scale": 0.05, "rotate": 5.0, "affine_p": 0.5}
        | {"cutout": 12, "cutout_min": 1, "fill": 0.5 * 255, "cutout_p": 0.5},
        TRUNCATED,
    ),
    # The original changed colours last, the hole's too; the hole's probability is not known.
    # Brightness and contrast are albumentations' default limits, as the published call names none.
    "net134k": Recipe(
        {"batch_size": 512, "dropout": 0.02, "flip_p": 0.1}
        | {"shift": 0.05, "scale": 0.05, "rotate": 15.0, "affine_p": 0.5}
        | {"cutout": 16, "fill": 0.45 * 255, "rgb_shift": [10.0, 10.0, 15.0]}
        | {"rgb_shift_p": 0.4, "brightness": 0.2, "contrast": 0.2, "brightness_contrast_p": 0.5},
        TRUNCATED,
    ),
    "net150k": Recipe({}),
}
