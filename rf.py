"""Receptive field of a net, from its traced graph."""

import copy
import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from common import UserError

POINTWISE_MODULES = (nn.BatchNorm2d, nn.ReLU, nn.Dropout, nn.Dropout2d, nn.Identity)
POINTWISE_FUNCTIONS = (torch.relu, F.relu, F.dropout)
UNIONS = (operator.add, operator.iadd, torch.add, operator.mul, operator.imul, torch.mul)
WINDOWS = (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d)


@dataclass(frozen=True)
class Field:
    """Along one axis, output i depends on the inputs i·jump + low to i·jump + high."""

    jump: int = 1
    low: int = 0
    high: int = 0

    @property
    def size(self) -> int:
        return self.high - self.low + 1

    def through(self, kernel: int, stride: int, dilation: int, padding: int) -> "Field":
        """The field after a window of `kernel` taps (Araujo et al. 2019, "Computing Receptive
        Fields of Convolutional Neural Networks")."""
        low, high = -padding, dilation * (kernel - 1) - padding
        return Field(self.jump * stride, self.low + self.jump * low, self.high + self.jump * high)


@dataclass(frozen=True)
class Layer:
    """A convolution, pooling or linear layer: two values where the axes can differ, (y, x)."""

    name: str
    kind: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    output: tuple[int, ...]  # channels, height, width
    jump: tuple[int, int]
    receptive_field: tuple[int, int]
    parameters: int
    multiply_adds: int  # per image


@dataclass(frozen=True)
class Trace:
    """What a net is made of; `receptive_field` (y, x) is that of the global pooling's input, or of
    the last map where nothing is pooled."""

    layers: list[Layer]
    receptive_field: tuple[int, int]

    @property
    def multiply_adds(self) -> int:
        return sum(layer.multiply_adds for layer in self.layers)


def receptive_field(module: nn.Module) -> int:
    """Side of the receptive field in pixels, the longer one where the axes differ.

    Raises UserError that names the node where the graph holds an operator this cannot account for.
    """
    return max(trace(module).receptive_field)


def trace(module: nn.Module, input_shape: tuple[int, int, int] = (3, 32, 32)) -> Trace:
    """Layers and receptive field of `module` for images of `input_shape`; errors as above."""
    module = copy.deepcopy(module).cpu().eval()
    if not list(module.children()):
        module = nn.Sequential(module)  # tracing looks into the root, even into a lone Conv2d
    graph = fx.symbolic_trace(module)
    with torch.no_grad():
        ShapeProp(graph).propagate(torch.zeros(1, *input_shape))
    modules = dict(graph.named_modules())
    fields: dict[fx.Node, tuple[Field, Field] | None] = {}  # None: no map any more
    layers, last = [], (Field(), Field())
    pooled = False
    for node in graph.graph.nodes:
        if node.op == "output":
            continue
        target = modules[node.target] if node.op == "call_module" else node.target
        if node.op == "placeholder":
            fields[node] = (Field(), Field())
        elif _pools_globally(node, target):
            fields[node], pooled = None, True
        else:
            fields[node] = _field_after(node, target, fields)
        if not pooled and fields[node] is not None:
            last = fields[node]
        if isinstance(target, (*WINDOWS, nn.Linear)):
            layers.append(_layer(node, target, last))
    return Trace(layers, (last[0].size, last[1].size))


def _field_after(node: fx.Node, target: object, fields: dict) -> tuple[Field, Field] | None:
    inputs = [fields[n] for n in node.all_input_nodes]
    if all(field is None for field in inputs):
        return None
    maps = [field for field in inputs if field is not None]
    if isinstance(target, WINDOWS) and not getattr(target, "ceil_mode", False):
        kernel, stride, dilation, padding = (
            _pair(getattr(target, key, 1))
            for key in ("kernel_size", "stride", "dilation", "padding")
        )
        return tuple(
            maps[0][axis].through(kernel[axis], stride[axis], dilation[axis], padding[axis])
            for axis in (0, 1)
        )
    if isinstance(target, POINTWISE_MODULES) or target in POINTWISE_FUNCTIONS:
        return maps[0]
    if target in UNIONS and len({(y.jump, x.jump) for y, x in maps}) == 1:
        return tuple(
            Field(axis[0].jump, min(f.low for f in axis), max(f.high for f in axis))
            for axis in zip(*maps, strict=True)
        )
    raise UserError(f"receptive field: node {node.name} ({node.op} {target}) is not accounted for")


def _pools_globally(node: fx.Node, target: object) -> bool:
    before = [n.meta["tensor_meta"].shape for n in node.all_input_nodes]
    after = node.meta["tensor_meta"].shape
    averages = isinstance(target, nn.AvgPool2d | nn.AdaptiveAvgPool2d) or target in (
        "mean",
        torch.mean,
    )
    return (
        averages and len(before[0]) == 4 and before[0][2:] != (1, 1) and after[2:] in ((), (1, 1))
    )


def _layer(node: fx.Node, target: nn.Module, field: tuple[Field, Field]) -> Layer:
    output = tuple(node.meta["tensor_meta"].shape[1:])
    weights = getattr(target, "weight", None)
    positions = output[1] * output[2] if len(output) == 3 else 1
    return Layer(
        name=str(node.target),
        kind=type(target).__name__,
        kernel=_pair(getattr(target, "kernel_size", 1)),
        stride=_pair(getattr(target, "stride", 1)),
        dilation=_pair(getattr(target, "dilation", 1)),
        groups=getattr(target, "groups", 1),
        output=output,
        jump=(field[0].jump, field[1].jump),
        receptive_field=(field[0].size, field[1].size),
        parameters=sum(p.numel() for p in target.parameters()),
        multiply_adds=0 if weights is None else weights.numel() * positions,
    )


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
