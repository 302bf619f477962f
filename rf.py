"""Receptive field of any module: theoretical, from its traced graph; effective, from gradients.

python rf.py [--net NAME] [--json]
python rf.py --effective RUN
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

import model
from common import SIZE, Parser, UserError, with_exit_status
from graph import effective_receptive_field, trace


def receptive_field(module: nn.Module, input_shape: tuple[int, int, int] = (3, 32, 32)) -> int:
    """Side in pixels, the longer one if the axes differ, of the theoretical receptive field of the
    map that enters the global pooling.

    For a net that pools inside, as squeeze-and-excitation does, it grows with `input_shape`. Raises
    a UserError that names the node if the graph holds an operator that this cannot account for.
    """
    return max(trace(module, input_shape).receptive_field)


# The command line


def show_layers(name: str, as_json: bool) -> None:
    net = model.build(name, 10)
    traced = trace(net)
    parameters = sum(p.numel() for p in net.parameters())
    side = max(traced.receptive_field)
    if as_json:
        totals = {"parameters": parameters, "multiply_adds": traced.multiply_adds}
        layers = [asdict(layer) for layer in traced.layers]
        print(json.dumps({"net": name, **totals, "receptive_field": side, "layers": layers}))
        return
    width = max(len(layer.name) for layer in traced.layers)
    wide = max(len(layer.kind) for layer in traced.layers)
    print(
        f"{'layer':<{width}} {'kind':<{wide}} ker str dil grp {'output':>8} jump field "
        f"{'weights':>7} {'mult-adds':>10}"
    )
    for layer in traced.layers:
        print(
            f"{layer.name:<{width}} {layer.kind:<{wide}} {_sides(layer.kernel):>3} "
            f"{_sides(layer.stride):>3} {_sides(layer.dilation):>3} {layer.groups:3d} "
            f"{'×'.join(map(str, layer.output)):>8} {_sides(layer.jump):>4} "
            f"{_sides(layer.receptive_field):>5} {layer.parameters:7,d} {layer.multiply_adds:10,d}"
        )
    print(
        f"\n{name}: {parameters:,} parameters, {traced.multiply_adds:,} multiply-adds, "
        f"receptive field {side}"
    )


def _sides(pair: tuple[int, int] | None) -> str:
    if pair is None:
        return "all"
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}×{pair[1]}"


def show_effective(run: Path) -> None:
    """Measure the effective field of a run's net on some 1,000 of its test images, mirrored at the
    borders as far as the theoretical field reaches; draw it as RUN/effective_rf.png."""
    import checkpoint
    import data
    import machine
    import plots

    machine.keep_freed_memory()
    net, content = checkpoint.load_net(run / "model.pt")
    dataset = checkpoint.load_data(run)
    images = dataset.test_images[:: max(1, len(dataset.test_images) // 1000)]  # of every class
    traced = trace(net)
    jump = max(field.jump for field in traced.fields)
    low, high = zip(*(f.extent(SIZE // f.jump // 2) for f in traced.fields), strict=True)
    margin = max(-min(low), max(high) - SIZE + 1, 0)
    margin = (margin // jump + 1) * jump
    inputs = data.normalize(images, dataset.mean, dataset.std).numpy()
    sides = ((0, 0), (0, 0), (margin, margin), (margin, margin))
    inputs = torch.from_numpy(np.pad(inputs, sides, mode="reflect"))
    heat = effective_receptive_field(traced.features, inputs)
    within = slice(margin, margin + SIZE)
    share = (heat[within, within].sum() / heat.sum()).item()
    side = (heat > (1 - 0.9545) * heat.max()).sum().sqrt().item()  # Luo et al.'s two deviations
    with torch.no_grad():
        centre = [size // 2 for size in traced.features(inputs[:1]).shape[2:]]
    square = [f.extent(index) for f, index in zip(traced.fields, centre, strict=True)]
    title = f"{content['net']} on {dataset.name}: gradient of a central unit before pooling"
    plots.effective_field(run / "effective_rf.png", heat.numpy(), margin, square, title)
    print(
        f"{content['net']} on {len(images):,} of the {dataset.tested_on} of {dataset.name}\n"
        f"theoretical receptive field  {max(traced.receptive_field)} pixels\n"
        f"effective receptive field    {side:.1f} pixels: root of the area where the gradient "
        f"exceeds 4.55 % of its maximum\n"
        f"gradient mass inside 32×32   {share:.1%}\n"
        f"picture                      {run / 'effective_rf.png'}"
    )


@with_exit_status
def main(argv: list[str]) -> None:
    parser = Parser(description="Receptive field of a net, layer by layer.")
    parser.add_argument("--net", choices=model.NETS, help="net to list (default: atrous)")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--json", action="store_true", help="print JSON only")
    either.add_argument("--effective", metavar="RUN", type=Path, help="effective field of RUN")
    args = parser.parse_args(argv)
    if args.effective and args.net:
        raise UserError(f"--net {args.net}: the run in {args.effective} has its own; omit --net")
    if args.effective:
        show_effective(args.effective)
    else:
        show_layers(args.net or "atrous", args.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
