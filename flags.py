"""Every knob of a run, with its default and its bounds."""

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

import checkpoint
import model
import zoo
from augment import BORDERS, Policy
from common import SIZE, Parser, UserError, number
from machine import DEVICES, DTYPES


def make_parser() -> Parser:
    parser = Parser(
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train a CIFAR-10 net with fewer than 200,000 parameters.",
    )
    count, share = number(int, 1, 10**9), number(float, 0, 1)
    largest = 1e30  # still a float32 after Muon's factors
    flag = parser.add_argument_group("data").add_argument
    flag("--data", default="auto", help="auto, cifar10, synthetic, or a folder or archive")
    flag("--data-dir", default="data", help="where CIFAR-10 is stored or downloaded to")
    flag("--train-images", type=count, help="train on a class-balanced subset of this size")
    flag("--holdout", type=number(int, 0), default=0, help="training images to test on instead")

    flag = parser.add_argument_group("net").add_argument
    flag(
        "--net", default="atrous", choices=model.NETS, help="atrous (mirror-invariant) or published"
    )
    flag("--dropout", type=number(float, 0, 0.99), default=0.0, help="dropout probability")

    flag = parser.add_argument_group("training").add_argument
    flag("--recipe", choices=zoo.RECIPES, help="published, for any --net; your flags override it")
    flag("--epochs", type=count, default=40, help="passes over the training images")
    flag("--batch-size", type=count, default=256, help="images per step, over all processes")
    flag(
        "--optimizer",
        choices=("muon", "sgd"),
        default="muon",
        help="muon: for dense and 1×1 convolutions, SGD for the rest",
    )
    rate = number(float, 0, largest, above=True)
    flag("--lr", type=rate, default=0.4, help="SGD's peak; Muon's: 1/10")
    schedules = ("onecycle", "cyclic", "step")
    flag("--schedule", choices=schedules, default="onecycle", help="learning rate schedule")
    flag("--momentum", type=number(float, 0, 0.999), default=0.9, help="Nesterov momentum")
    flag("--weight-decay", type=number(float, 0, largest), default=5e-4, help="SGD's; Muon's: ×200")
    flag("--label-smoothing", type=share, default=0.0, help="share spread over all classes")
    flag("--sam", type=number(float, 0), default=0.1, help="SAM radius, last quarter of epochs")
    some = number(float, 0, 1, above=True)
    flag("--target", type=some, help="report when test accuracy first reaches this fraction")

    flag = parser.add_argument_group("augmentation").add_argument
    ways = ("device", "albumentations", "none")
    flag("--augment", choices=ways, default="device", help="albumentations: in a DataLoader")
    flag("--workers", type=number(int, 0, 256), default=2, help="for --augment albumentations")
    flag("--flip-p", type=share, help="probability of a flip")
    flag("--shift", type=share, help="whole pixels, less than this share of the width")
    flag("--scale", type=number(float, 0, 0.9), help="largest change, x and y drawn independently")
    flag("--rotate", type=number(float, 0, 180), help="largest angle, degrees")
    flag("--affine-p", type=share, help="probability of shift, scale and rotation")
    flag("--border", choices=BORDERS, help="what lies outside an image")
    flag("--cutout", type=number(int, 0, SIZE), help="largest side of the hole, pixels")
    flag("--cutout-min", type=number(int, 1), help="smallest side; None: same as --cutout")
    flag("--cutout-p", type=share, help="probability of a hole")
    level = number(float, 0, 255)
    flag("--fill", type=level, help="level of hole and constant border; None: the training mean")
    flag("--rgb-shift", type=level, nargs=3, help="largest shift of each channel, levels")
    flag("--rgb-shift-p", type=share, help="probability of an RGB shift")
    flag("--brightness", type=share, help="largest change, fraction of 255")
    flag("--contrast", type=share, help="largest change of the contrast factor")
    flag("--brightness-contrast-p", type=share, help="probability of changing both")
    parser.set_defaults(**vars(Policy()) | {"rgb_shift": list(Policy.rgb_shift)})

    flag = parser.add_argument_group("run").add_argument
    flag("--device", choices=DEVICES, default="auto", help="auto: cuda if available, else cpu")
    precision = "auto: set by device; on a GPU fp32 rounds to TF32 in convolutions"
    flag("--precision", choices=("auto", *DTYPES), default="auto", help=precision)
    flag("--deterministic", action="store_true", help="bit-identical runs on a GPU too; slower")
    flag("--eager", action="store_true", help="no CUDA graph: launch each operation separately")
    flag("--compile", action="store_true", help="use torch.compile; slow to start")
    flag("--seed", type=number(int, 0, 2**31), default=0, help="for weights, image order and draws")
    flag("--repeat", type=number(int, 1, 1000), default=1, help="seeds to train: DIR/s0, DIR/s1, …")
    flag("--out", metavar="DIR", help="run folder; None: runs/<net>-<data>-s<seed>")
    flag("--resume", metavar="DIR", help="continue the run in DIR, with its own flags")
    return parser


def option(name: str) -> str:
    """The flag as typed on the command line."""
    return "--" + name.replace("_", "-")


MAY_CHANGE = {"resume", "data", "data_dir", "device", "workers"}
OF_A_PLACE = MAY_CHANGE | {"out"}
COLOURS = (  # the share of images changed, then the limits; all 0 by default
    ("rgb_shift_p", "rgb_shift"),
    ("brightness_contrast_p", "brightness", "contrast"),
)


def parse_flags(argv: list[str]) -> Namespace:
    """The flags; with --resume, the run's own, of which only those in MAY_CHANGE may be changed."""
    for text in argv:
        if not text.isprintable():
            raise UserError(f"{text!a} has unprintable characters; rename it")
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume is None:
        if args.recipe is not None:
            parser.set_defaults(**zoo.RECIPES[args.recipe].flags)
            args = parser.parse_args(argv)
        for name in vars(Policy()):
            if args.augment == "none" and vars(args)[name] != parser.get_default(name):
                raise UserError(f"{option(name)} does nothing with --augment none: omit either")
        if args.cutout and args.cutout_min is not None and args.cutout_min > args.cutout:
            raise UserError(f"--cutout-min {args.cutout_min}: larger than --cutout {args.cutout}")
        for share, *limits in COLOURS:
            on = [name for name in (share, *limits) if vars(args)[name] not in (0, [0, 0, 0])]
            given = [name for name in on if vars(args)[name] != parser.get_default(name)]
            if given and (share not in on or on == [share]):
                missing = limits[0] if on == [share] else share
                raise UserError(f"{option(given[0])} does nothing alone: set {option(missing)} too")
        return args
    flags = flags_of_run(Path(args.resume), parser)
    args = parser.parse_args(argv, Namespace(**flags))
    for name, value in vars(args).items():
        if name not in MAY_CHANGE and value != flags[name]:
            raise UserError(
                f"{option(name)} {value}: the run in {args.resume} has {flags[name]} and "
                "keeps it; start a new run in another --out"
            )
    return args


def flags_of_run(run: Path, parser: Parser) -> dict[str, Any]:
    """The flags in a run's config. Raises UserError if `parser` would not accept them."""
    flags = checkpoint.load_config(run)["flags"]
    if other := flags.keys() ^ vars(parser.parse_args([])).keys():
        names = ", ".join(sorted(other))
        raise UserError(
            f"{run / 'config.json'} is from another version of atrous (flags differ: {names}): "
            "use that one"
        )
    try:
        parsed = vars(parser.parse_args(spelled(flags)))
        for name, value in flags.items():
            if parsed[name] != value:
                raise UserError(f"{name} cannot be {value}")
    except UserError as error:
        raise UserError(f"{run / 'config.json'} is damaged: {error}") from error
    return parsed


def spelled(flags: dict[str, Any]) -> list[str]:
    """The flags as typed on the command line."""
    argv: list[str] = []
    for name, value in flags.items():
        if isinstance(value, list):
            argv += [option(name), *map(str, value)]
        elif value is True:
            argv.append(option(name))
        elif value is not None and value is not False:
            argv.append(f"{option(name)}={value}")
    return argv


def identity(args: Namespace) -> dict[str, Any]:
    """The flags that stay the same when a run is resumed, wherever its folder is by then."""
    return {name: value for name, value in vars(args).items() if name not in OF_A_PLACE}


def policy_of(args: Namespace) -> Policy:
    values = {name: getattr(args, name) for name in vars(Policy())}
    return Policy(**values | {"rgb_shift": tuple(args.rgb_shift)})
