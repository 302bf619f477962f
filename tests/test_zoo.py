"""The published nets against their printed rows, and their recipes from outside."""

from pathlib import Path

import pytest
import torch
from torch import nn

import flags
import report
import zoo
from common import UserError
from graph import trace
from model import build
from rf import receptive_field

KNOWN = {  # parameters, receptive field before the pooling, multiply-adds in millions
    "net136k": (136_032, 73, 16.4),
    "net176k": (176_234, 43, 45.9),
    "net190k": (190_880, 27, 36.5),
    "net134k": (134_722, 30, 52.0),
    "net150k": (150_576, 91, 24.2),
}


def published_rows(name):
    text = (Path(__file__).parent / "published_nets.txt").read_text()
    blocks = (block.split("\n") for block in text.split("\n\n"))
    (rows,) = (rows for heading, *rows in blocks if heading == name)
    return [
        (kind, shape, int(n.replace(",", "")))
        for kind, shape, n in map(str.split, filter(None, rows))
    ]


def rows_of(net):
    """Kind, output and parameters of every layer, in the order of their calls."""
    rows = []

    def note(module, inputs, output):
        shape = "×".join(map(str, output.shape[1:]))
        rows.append((type(module).__name__, shape, sum(p.numel() for p in module.parameters())))

    for module in net.modules():
        if not list(module.children()) and not isinstance(module, nn.Flatten):
            module.register_forward_hook(note)
    net.eval()(torch.zeros(2, 3, 32, 32))
    return rows


@pytest.mark.parametrize("name", KNOWN)
def test_every_printed_row(name):
    assert rows_of(build(name, 10, 0.1)) == published_rows(name)


@pytest.mark.parametrize("name", KNOWN)
def test_totals(name):
    parameters, field, millions = KNOWN[name]
    net = build(name, 10)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert receptive_field(net) == field
    assert round(trace(net).multiply_adds / 1e6, 1) == millions


@pytest.mark.parametrize("name", KNOWN)
def test_logits_and_gradients(name):
    net = build(name, 4)
    logits = net(torch.randn(8, 3, 32, 32))
    assert logits.shape == (8, 4)
    assert (logits < 0).any()  # no activation or softmax after the classifier
    nn.functional.cross_entropy(logits, torch.arange(8) % 4).backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


def dropouts(name, dropout):
    return [m.p for m in build(name, 10, dropout).modules() if isinstance(m, nn.Dropout)]


def test_dropout():
    assert dropouts("net190k", 0.1) == [0.2, 0.1, 0.1, 0.1]
    assert set(dropouts("net190k", 0.9)) == {0.9, 1}
    for name in KNOWN.keys() - {"net190k"}:
        assert set(dropouts(name, 0.02)) == {0.02}


# Recipes


def test_a_recipe_sets_what_was_published_and_flags_win():
    args = flags.parse_flags(["--recipe", "net176k", "--lr", "0.1"])
    assert (args.recipe, args.net, args.lr, args.schedule) == ("net176k", "atrous", 0.1, "step")
    assert (args.rotate, args.shift, args.scale, args.dropout) == (45, 0.0625, 0.1, 0.02)
    assert args.fill == pytest.approx(120.7, abs=0.05)
    default = flags.parse_flags([])
    assert args.batch_size == default.batch_size
    assert flags.parse_flags(["--recipe", "net176k", "--augment", "none"]).augment == "none"


@pytest.mark.parametrize("name", KNOWN)
def test_a_recipe_is_within_the_flags_own_bounds(name):
    """Every published value is accepted as a flag and parsed to what the recipe has."""
    argv = flags.spelled(zoo.RECIPES[name].flags)
    given, by_recipe = (vars(flags.parse_flags(a)) for a in (argv, ["--recipe", name]))
    assert given | {"recipe": name} == by_recipe


def test_what_a_recipe_prints():
    args = flags.parse_flags(["--recipe", "net190k", "--flip-p", "0.25"])
    printed = report.describe_recipe(args)
    assert max(map(len, printed.splitlines())) <= 80
    text = " ".join(printed.split())
    published, changed, missing = (
        text.replace("not published:", "|").replace("changed here:", "|").split("|")
    )
    assert "net190k published: batch size 128, dropout 0.1" in published
    assert "cutout min 1" in published
    assert changed.strip() == "flip p 0.25"
    assert "lr 0.4, schedule onecycle, momentum 0.9, weight decay" in missing
    as_published = report.describe_recipe(flags.parse_flags(["--recipe", "net136k"]))
    assert "fill mean" in as_published
    assert "changed" not in as_published
    assert "dropout" not in missing
    assert "truncated it to black" in missing
    nothing = flags.parse_flags(["--recipe", "net150k"])
    assert "published: nothing" in report.describe_recipe(nothing)


def test_a_mistake_beside_a_recipe():
    with pytest.raises(UserError, match="--cutout-min 13: larger than --cutout 12"):
        flags.parse_flags(["--recipe", "net190k", "--cutout-min", "13"])
