"""Five published CIFAR-10 nets of fewer than 200,000 parameters, layer for layer; their recipes.

Each net is a table of its published rows; where they leave a choice open, the one taken is noted.
The recipes hold what was published, as flags of train.py; the rest stays at its default.
"""

from dataclasses import astuple, dataclass
from typing import Any

from torch import Tensor, nn

NORM, RELU = "norm", "relu"


@dataclass(frozen=True)
class Conv:
    """A convolution row: by default 3×3, padded by 1, without bias."""

    outputs: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    bias: bool = False


@dataclass(frozen=True)
class Drop:
    """A dropout row: `share` times the net's dropout."""

    share: float = 1.0


@dataclass(frozen=True)
class Sum:
    """Rows whose output is added to that of a shortcut from the same input."""

    rows: list
    shortcut: list


@dataclass(frozen=True)
class Linear:
    outputs: int


Row = str | Conv | Drop | Sum | Linear | nn.Module
Table = list[list[Row]]  # blocks of rows

NRD = [NORM, RELU, Drop()]
RND = [RELU, NORM, Drop()]


def pointwise(outputs: int, padding: int = 0, bias: bool = False) -> Conv:
    return Conv(outputs, kernel=1, padding=padding, bias=bias)


def net136k(classes: int) -> Table:
    """136,032 parameters, receptive field 73; published: about 85 %."""
    halving = {"stride": 2, "dilation": 2, "padding": 2}
    return [
        [Conv(24), *NRD],  # 32×32
        [Conv(24), *NRD],
        [Conv(24, **halving), *NRD],  # 16×16
        [pointwise(24), Conv(24), *NRD],
        [Conv(24, groups=24), *NRD],
        [Conv(24, groups=12, **halving), *NRD],  # 8×8
        [pointwise(48), Conv(48, dilation=2, padding=2), *NRD],
        [Conv(48, dilation=2, padding=2, groups=48), *NRD],
        [pointwise(96), Conv(96), *NRD],
        [Conv(96, groups=12), *NRD],
        [pointwise(classes), nn.AvgPool2d(8)],
    ]


def net176k(classes: int) -> Table:
    """176,234 parameters, receptive field 43 (published as > 44); published: 85.2 % at best."""
    return [
        [Conv(32), *NRD],  # 32×32
        [Conv(64), *NRD],
        [Conv(32, stride=2), *NRD],  # 16×16
        [Conv(64), *NRD],
        [Conv(96), *NRD],
        [Conv(32, stride=2), *NRD],  # 8×8
        [Conv(64, dilation=2), *NRD],  # 6×6
        [Conv(64, padding=0, groups=64), pointwise(128), NORM, RELU],  # 4×4
        [nn.AvgPool2d(4), nn.Flatten(), Linear(64), Linear(classes)],
    ]


def net190k(classes: int) -> Table:
    """190,880 parameters, receptive field 27; published: 86.10 % best, 85.46 % last of 60 epochs.

    Dropout was 0.2 in the first block, then 0.1: the recipe has 0.1, which the first row doubles.
    """
    return [
        [Sum([Conv(16), Conv(32), NORM, RELU, Drop(2)], shortcut=[pointwise(32)])],  # 32×32
        [Conv(64, stride=2, padding=0), Conv(128), *NRD],  # 15×15
        [Conv(64, dilation=2, padding=0), Conv(32, padding=0), *NRD],  # 11×11, 9×9
        [Conv(32, groups=32, bias=True), pointwise(16, bias=True), *NRD],
        [nn.AvgPool2d(9), pointwise(classes)],
    ]


def net134k(classes: int) -> Table:
    """134,722 parameters, receptive field 30; published: 85 % from epoch 43 on.

    One layer is said to be dilated, but no printout says which. Where the map shrinks from 32×32 to
    30×30, dilation 2 with padding 1 fits, as does none with padding 0: the former is taken.
    """
    halving = {"kernel": 2, "stride": 2}
    return [
        [Conv(10), *RND],  # 32×32
        [Conv(24), *RND],
        [Conv(32, dilation=2), Conv(64), *RND],  # 30×30
        [pointwise(32, padding=1), *RND],  # 32×32
        [Conv(32, **halving), Conv(64), *RND],  # 17×17
        [Conv(96), *RND],
        [Conv(64, **halving), Conv(64, groups=64), *RND],  # 9×9
        [pointwise(16, padding=1), *RND],  # 11×11
        [nn.AvgPool2d(11), pointwise(classes)],
    ]


def net150k(classes: int) -> Table:
    """150,576 parameters, receptive field 91; published: 85 % in fewer than 100 epochs.

    "Dilated convolution in all the blocks": the layers of stride 2 are dilated, though their shapes
    fit with and without; undilated the receptive field would be 61, not the published 91.
    """
    halving = {"stride": 2, "dilation": 2, "padding": 2}
    depthwise = Conv(32, groups=32, bias=True)
    return [
        [Conv(16), *NRD],  # 32×32
        [Conv(32), *NRD],
        [depthwise, pointwise(64, bias=True), NORM, RELU],
        [Conv(64, **halving), *NRD],  # 16×16
        [pointwise(16), NORM, RELU],
        [Conv(32), *NRD],
        [Conv(32), *NRD],
        [Conv(64, **halving), *NRD],  # 8×8
        [pointwise(16), NORM, RELU],
        [Conv(32), *NRD],
        [Conv(64), *NRD],
        [Conv(64, **halving), *NRD],  # 4×4
        [pointwise(16), NORM, RELU],
        [Conv(64, **halving), NORM, RELU],  # 2×2
        [nn.AdaptiveAvgPool2d(1), pointwise(classes)],
    ]


TABLES = {table.__name__: table for table in (net136k, net176k, net190k, net134k, net150k)}


class Add(nn.Module):
    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.shortcut(x)


def build(name: str, num_classes: int, dropout: float) -> nn.Sequential:
    """The net of a table, giving logits (N, num_classes) for images (N, 3, 32, 32)."""
    rows = [row for block in TABLES[name](num_classes) for row in block]
    return nn.Sequential(*_modules(rows, 3, dropout), nn.Flatten())


def _modules(rows: list[Row], channels: int, dropout: float) -> list[nn.Module]:
    modules: list[nn.Module] = []
    for row in rows:
        match row:
            case Conv():
                modules.append(nn.Conv2d(channels, *astuple(row)))
                channels = row.outputs
            case Linear(outputs):
                modules.append(nn.Linear(channels, outputs))
                channels = outputs
            case Drop(share):
                modules.append(nn.Dropout(min(share * dropout, 1)))
            case Sum(branch, shortcut):
                paths = (nn.Sequential(*_modules(r, channels, dropout)) for r in (branch, shortcut))
                modules.append(Add(*paths))
                channels = shortcut[-1].outputs
            case "norm":
                modules.append(nn.BatchNorm2d(channels))
            case "relu":
                modules.append(nn.ReLU())
            case _:
                modules.append(row)
    return modules


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
