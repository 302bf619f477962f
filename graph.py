"""The traced graph of any module: its layers, which pixels each map depends on, and how much."""

import copy
import io
import math
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from common import UserError, first_line
from fields import NOTHING, Field, Fields, union
from mirror import MirrorNorm

POOLINGS = (nn.AvgPool2d, nn.MaxPool2d, nn.LPPool2d)
ADAPTIVE = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
PADDINGS = (nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d)
POINTWISE = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.Identity, nn.PReLU, nn.ReLU, nn.ReLU6)
POINTWISE += (nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus)
POINTWISE += (nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh)
POINTWISE += (nn.Dropout, nn.Dropout2d, nn.AlphaDropout)
POINTWISE += (nn.GroupNorm,)  # but for its statistics: see `trace`
# Functions and methods by name; in a sum or product of maps, every operand counts.
POINTWISE_NAMES = {
    *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus"),
    *("sigmoid", "tanh", "hardsigmoid", "hardswish", "hardtanh", "clamp", "dropout", "dropout2d"),
    "stochastic_depth",  # torchvision's
    *("abs", "neg", "exp", "sqrt", "rsqrt", "square", "pow", "maximum", "minimum"),
    *("add", "sub", "mul", "div", "truediv"),
    *("contiguous", "clone", "detach", "float", "half", "bfloat16", "to", "type"),
}
VIEWS = {"getitem", "contiguous", "detach", "to", "type", "float", "flatten", "view", "reshape"}
UNTRUE = "its graph computes something else, for example where `x += …` changes a shared tensor"
REDUCTIONS = {"mean", "sum", "amax", "amin"}
ON_CHANNELS = {"cat": 1, "chunk": 2, "split": 2}  # the position of their argument `dim`
POOLING_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation")


@dataclass(frozen=True)
class Layer:
    """A layer with a window or parameters; pairs are (y, x). Jump and receptive field are None
    after the global pooling, where every value sees the whole image."""

    name: str
    kind: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    input: tuple[int, ...]  # channels, height, width
    output: tuple[int, ...]
    jump: tuple[int, int] | None
    receptive_field: tuple[int, int] | None
    parameters: int
    multiply_adds: int  # per image; 0 except for convolutions and Linear


@dataclass(frozen=True)
class Trace:
    """What a net is made of. `receptive_field` (y, x) and `fields` are those of the map that enters
    its global pooling, or of its output if nothing is pooled; `features` computes that map from
    images, `both` that map and the net's output."""

    layers: list[Layer]
    receptive_field: tuple[int, int]
    fields: Fields
    features: fx.GraphModule
    both: fx.GraphModule

    @property
    def multiply_adds(self) -> int:
        return sum(layer.multiply_adds for layer in self.layers)


class Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, MirrorNorm) or super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module, input_shape: tuple[int, int, int] = (3, 32, 32)) -> Trace:
    """Layers and receptive field of `module` for images of `input_shape`.

    Where branches meet, the union of their fields counts. What depends on a global pooling inside
    the net, as the gates of squeeze-and-excitation do, sees the whole image; so do the statistics
    of GroupNorm, which are left out. Raises a UserError that names the node if the graph holds an
    operator that this cannot account for.
    """
    graph = _graph_of(module, input_shape)
    fields: dict[fx.Node, Fields | None] = {}  # None: no longer a map, its layout is lost
    layers, sliding = [], []
    for node in graph.graph.nodes:
        sliding += [n for n in node.all_input_nodes if _slides(fields[n])]
        if node.op == "placeholder":
            start = Field({1: (0, 0)})
            fields[node] = start, start
        elif node.op != "output":
            target = graph.get_submodule(node.target) if node.op == "call_module" else node.target
            try:
                fields[node] = _fields_behind(node, target, fields, input_shape)
            except (TypeError, ValueError) as error:  # a computed argument, such as x.size(2)
                raise _unaccounted(node, target) from error
            if node.all_input_nodes and _is_layer(node, target):
                layers.append(_layer(node, target, fields[node]))
    if not sliding:
        raise UserError("receptive field: the net's output does not depend on its input's pixels")
    # The largest; among equals, the last used, which enters the global pooling.
    last = max(reversed(sliding), key=lambda n: max(_size(fields[n], _shape(n))))
    features, both = (_returning(graph, last.name, and_output) for and_output in (False, True))
    return Trace(layers, _size(fields[last], _shape(last)), fields[last], features, both)


def _graph_of(module: nn.Module, input_shape: tuple[int, int, int]) -> fx.GraphModule:
    """The graph of a copy of `module`, its nodes with their shapes, proven to compute the same."""
    try:
        module = copy.deepcopy(module).cpu().eval()
        if Tracer().is_leaf_module(module, ""):
            module = nn.Sequential(module)  # tracing enters the root, even a lone Conv2d
        graph = fx.GraphModule(module, Tracer().trace(module))
        graph.graph.eliminate_dead_code()  # if it did something, in place, that is noticed below
        outputs = []
        with torch.no_grad(), torch.random.fork_rng([]), redirect_stderr(io.StringIO()):
            for run in (module, ShapeProp(graph).propagate):  # ShapeProp prints tracebacks
                torch.default_generator.manual_seed(0)
                outputs.append(run(torch.rand(1, *input_shape)))
        torch.testing.assert_close(*outputs, equal_nan=True, msg=UNTRUE)
    except Exception as error:  # a user's net can fail in any way
        raise UserError(
            f"receptive field: the net cannot be traced: {first_line(error)}"
        ) from error
    return graph


def effective_receptive_field(features: nn.Module, inputs: Tensor) -> Tensor:
    """Mean absolute gradient (H, W) of the central unit of `features`, summed over its channels,
    with respect to the pixels of inputs float32 (N, 3, H, W) (Luo et al. 2016, "Understanding the
    Effective Receptive Field in Deep Convolutional Neural Networks")."""
    heat = torch.zeros(inputs.shape[2:])
    for batch in inputs.split(100):
        batch = batch.clone().requires_grad_()
        maps = features(batch)
        centre = maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2].sum()
        heat += torch.autograd.grad(centre, batch)[0].abs().sum((0, 1))
    return heat / len(inputs)


def _returning(graph: fx.GraphModule, name: str, and_output: bool) -> fx.GraphModule:
    """`graph`, with the same layers, returning the value of the node `name`, alone or with its own
    output."""
    copied = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    value = next(node for node in copied.graph.nodes if node.name == name)
    output = copied.graph.output_node()
    output.args = ((value, *output.args),) if and_output else (value,)
    copied.graph.eliminate_dead_code()
    copied.recompile()
    return copied


def _fields_behind(
    node: fx.Node, target: Any, fields: dict, input_shape: tuple[int, int, int]
) -> Fields | None:
    """The fields of a node's output: NOTHING if it depends on no pixel, None if it is no longer a
    map, as after `flatten`. Raises UserError where neither these nor a map's are certain."""
    if _changes_others(node, target):
        raise _unaccounted(node, target)
    inputs, after = [n for n in node.all_input_nodes if fields[n] != NOTHING], _shape(node)
    if not inputs or after is None:  # a constant, or no tensor
        return NOTHING
    known = [fields[n] for n in inputs if fields[n] is not None]
    sliding = [n for n in inputs if _slides(fields[n])]
    if not sliding and len(known) == len(inputs):  # all behind a global pooling, as gates are
        return union(known)
    if len(after) != 4 and not _reduces(node, target, {2, 3}):  # flattened here
        reduced = {_name(n.target) for n in node.users} <= REDUCTIONS
        if sliding and len(after) > 2 and not reduced:  # tokens, which later nodes may mix
            raise _unaccounted(node, target)
        return None
    if len(known) < len(inputs):  # flattened before
        if sliding or after[2:] != (1, 1):  # a map again, of values from unknown places
            raise _unaccounted(node, target)
        return None
    before, (y, x) = _shape(sliding[0]), known[0]
    if _pools_globally(node, target):
        return y.pooled(before[2], input_shape[1]), x.pooled(before[3], input_shape[2])
    if window := _window(node, target):
        along_y, along_x = zip(*window, strict=True)
        return y.through(*along_y), x.through(*along_x)
    if any(_shape(n)[2:] != after[2:] for n in sliding):
        raise _unaccounted(node, target)
    name = _name(target)
    if (
        (isinstance(target, POINTWISE) and getattr(target, "track_running_stats", True))
        or name in POINTWISE_NAMES
        or _reduces(node, target, {1})
        or (name in ON_CHANNELS and _argument(node, ON_CHANNELS[name], "dim") in (1, -3))
        or (name == "getitem" and isinstance(node.args[1], int))  # of chunks
    ):
        return union(known)
    raise _unaccounted(node, target)


def _changes_others(node: fx.Node, target: Any) -> bool:
    """Whether this node may change in place what others use, unseen by the graph."""
    if node.op != "call_method" or not target.endswith("_"):
        return "out" in node.kwargs
    changed = node.args[0]
    view = len(node.all_input_nodes) > 1 and _name(changed.target) in VIEWS
    return view or max(changed.users) is not node


def _window(node: fx.Node, target: Any) -> tuple[tuple[int, int], ...] | None:
    """Kernel, stride, dilation and padding before the map, each (y, x); None without a window."""
    name, one = _name(target), (1, 1)
    before, after = (_shape(n)[2:] for n in (node.all_input_nodes[0], node))
    if isinstance(target, ADAPTIVE) or name in ("adaptive_avg_pool2d", "adaptive_max_pool2d"):
        if any(b % a for b, a in zip(before, after, strict=True)):
            raise _unaccounted(node, target)  # windows of several sizes
        kernel = tuple(b // a for b, a in zip(before, after, strict=True))
        return kernel, kernel, one, (0, 0)
    if isinstance(target, (nn.Conv2d, *POOLINGS)):
        options = {key: getattr(target, key, None) for key in POOLING_ARGUMENTS}
    elif name in ("avg_pool2d", "max_pool2d"):
        known = POOLING_ARGUMENTS[: 5 if name == "max_pool2d" else 4]  # avg's fifth: ceil_mode
        options = dict(zip(known, node.args, strict=False)) | node.kwargs
    elif isinstance(target, PADDINGS) or name == "pad":
        left, _, top, *_ = *(getattr(target, "padding", None) or _argument(node, 1, "pad")), 0
        return one, one, one, (top, left)
    elif name == "getitem" and len(after) == 2 and (slices := _spatial_slices(node)):
        return one, tuple(s.step or 1 for s in slices), one, tuple(-(s.start or 0) for s in slices)
    else:
        return None
    kernel, dilation = _pair(options["kernel_size"]), _pair(options.get("dilation") or 1)
    padding = options.get("padding") or 0
    if padding == "same":
        padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    padding = _pair(0 if padding == "valid" else padding)
    return kernel, _pair(options.get("stride") or kernel), dilation, padding


def _pools_globally(node: fx.Node, target: Any) -> bool:
    if _reduces(node, target, {2, 3}):
        return True
    if "pool" not in _name(target).lower():
        return False
    window, whole = _window(node, target), _shape(node.all_input_nodes[0])[2:]
    return window is not None and window[0] == whole and window[3] == (0, 0)


def _reduces(node: fx.Node, target: Any, dims: set[int]) -> bool:
    """Whether this is a mean, sum, maximum or minimum of a map over `dims` (of 0 to 3)."""
    if _name(target) not in REDUCTIONS or len(_shape(node.all_input_nodes[0])) != 4:
        return False
    given = _argument(node, 1, "dim")
    given = range(4) if given is None else [given] if isinstance(given, int) else given
    return {dim % 4 for dim in given} - {0} == dims


def _spatial_slices(node: fx.Node) -> list[slice] | None:
    """The spatial slices of `x[:, :, ::2, ::2]` and the like; None if not all are plain slices."""
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = index[:at] + (slice(None),) * (5 - len(index)) + index[at + 1 :]
    index = [*index, *[slice(None)] * (4 - len(index))]
    plain = all(isinstance(s, slice) for s in index)
    return index[2:] if plain and all((s.start or 0) >= 0 for s in index[2:]) else None


def _is_layer(node: fx.Node, target: Any) -> bool:
    if isinstance(target, nn.Module):
        return any(True for _ in target.parameters()) or _window(node, target) is not None
    return node.op == "call_function" and _name(target).endswith("pool2d")


def _layer(node: fx.Node, target: Any, fields: Fields | None) -> Layer:
    kernel, stride, dilation, _ = _window(node, target) or [(1, 1)] * 4
    output = _shape(node)[1:]
    convolves = isinstance(target, nn.Conv1d | nn.Conv2d | nn.Linear)
    places = output[:-1] if isinstance(target, nn.Linear) else output[1:]
    slides = _slides(fields)
    return Layer(
        name=str(node.target) if node.op == "call_module" else node.name,
        kind=_name(target),
        kernel=kernel,
        stride=stride,
        dilation=dilation,
        groups=getattr(target, "groups", 1),
        input=_shape(node.all_input_nodes[0])[1:],
        output=output,
        jump=(fields[0].jump, fields[1].jump) if slides else None,
        receptive_field=_size(fields, _shape(node)) if slides else None,
        parameters=sum(p.numel() for p in getattr(target, "parameters", list)()),
        multiply_adds=target.weight.numel() * math.prod(places) if convolves else 0,
    )


def _size(fields: Fields, shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of the field of the central output of a map of `shape`."""
    ends = (field.extent(size // 2) for field, size in zip(fields, shape[2:], strict=True))
    y, x = (high - low + 1 for low, high in ends)
    return y, x


def _slides(fields: Fields | None) -> bool:
    return fields is not None and any(field.jump for field in fields)


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a node's tensor, or of the first of several, as of `chunk`; None without one."""
    meta = node.meta.get("tensor_meta")
    while isinstance(meta, tuple | list) and not hasattr(meta, "shape"):
        meta = meta[0] if meta else None
    return None if meta is None else tuple(meta.shape)


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _name(target: Any) -> str:
    if isinstance(target, nn.Module):
        return type(target).__name__.removeprefix("Parametrized")
    return (target if isinstance(target, str) else target.__name__).rstrip("_")


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    y, x = (value, value) if isinstance(value, int) else value
    return y, x


def _unaccounted(node: fx.Node, target: Any) -> UserError:
    return UserError(
        f"receptive field: node {node.name} ({node.op} {_name(target)}) is not supported"
    )
