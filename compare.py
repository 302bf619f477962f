"""Compare runs: whether their test accuracies differ more than by chance of seed, and their curves.

python compare.py RUN RUN… [--out comparison.png]
"""

import math
import statistics
import sys
from pathlib import Path
from typing import Any

import checkpoint
import flags
import plots
from common import Parser, UserError, going_on, with_exit_status


def half_width(first: list[float], other: list[float]) -> float | None:
    """Half the width of the 95 % confidence interval of the difference of two groups' means, by
    Student's t; None if each has one value. No third group counts: its seeds may differ by more."""
    from scipy.stats import t

    freedom = len(first) + len(other) - 2
    if not freedom:
        return None
    squares = sum((x - statistics.fmean(group)) ** 2 for group in (first, other) for x in group)
    error = math.sqrt(squares / freedom * (1 / len(first) + 1 / len(other)))
    return float(t.ppf(0.975, freedom)) * error


def table(accuracies: dict[str, list[float]]) -> str:
    """A line for each name: its number of seeds, their mean, in percent, with its standard
    deviation, and the change from the first name's, in points."""
    width, first = max(map(len, accuracies)), next(iter(accuracies.values()))
    lines = [f"{'':<{width}} seeds {'%, mean ± sd':<13}   change, 95 % interval over seeds"]
    for name, group in accuracies.items():
        spread = f" ± {100 * statistics.stdev(group):.2f}" if len(group) > 1 else ""
        line = f"{name:<{width}} {len(group):5d} {100 * statistics.fmean(group):6.2f}{spread:<7}"
        if group is not first:
            change = statistics.fmean(group) - statistics.fmean(first)
            half = half_width(first, group)
            line += f"   {100 * change:+6.2f}"
            if half:
                verdict = "within chance" if abs(change) <= half else "beyond chance"
                line += f" ± {100 * half:.2f}, {verdict}"
            elif half is None:
                line += ", one seed each"
        lines.append(line.rstrip())
    return "\n".join(lines)


def runs_of(folders: list[Path]) -> dict[str, list[Path]]:
    """Each folder's runs, or the run that it is. Raises UserError if they have not finished, or one
    is there twice."""
    runs, seen = {}, set()
    for folder in folders:
        if (folder / "config.json").exists() and not (folder / "summary.json").exists():
            raise UserError(f"{folder} has not finished: train.py {going_on(folder, 'it')}")
        runs[str(folder)] = checkpoint.runs_in(folder)
        for run in runs[str(folder)]:
            if run.resolve() in seen:
                raise UserError(f"{run} is given twice; compare each run once")
            seen.add(run.resolve())
    return runs


def refuse_other_images(summaries: dict[str, list[dict[str, Any]]]) -> None:
    known: dict[str, str] = {}
    for name, runs in summaries.items():
        for run in runs:
            known.setdefault(f"{run['images']}, {run['tested_on']}", name)
    if len(known) > 1:
        (images, name), (others, other), *_ = known.items()
        raise UserError(f"{name} is on {images}, but {other} on {others}; compare runs on the same")


def flags_of(runs: list[Path]) -> dict[str, Any]:
    """The flags that the runs of a folder share. Raises UserError if one has others, or a seed that
    another has: it is the same run again."""
    beside = flags.OF_A_PLACE | {"seed"}
    configs = [checkpoint.load_config(run)["flags"] for run in runs]
    seeds: dict[str, Path] = {}
    for run, config in zip(runs, configs, strict=True):
        if (other := seeds.setdefault(str(config.get("seed")), run)) != run:
            raise UserError(f"{run} has the seed of {other}; train it anew, with another --seed")
    own, *others = [{k: v for k, v in config.items() if k not in beside} for config in configs]
    for run, other in zip(runs[1:], others, strict=True):
        if other != own:
            raise UserError(f"{run} has other flags than {runs[0]}; move it elsewhere")
    return own


def differing_flags(used: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each name after the first: its flags that the first has otherwise."""
    (first, known), *others = used.items()
    lines = []
    for name, own in others:
        changed = [key for key in known | own if own.get(key) != known.get(key)]
        said = ", ".join(f"{flags.option(k)} {own.get(k)} ({known.get(k)})" for k in changed)
        lines.append(f"{name}: {said or 'the same flags'}")
    return [f"Other flags, in brackets those of {first}:", *lines] if lines else []


@with_exit_status
def main(argv: list[str]) -> None:
    parser = Parser(description="Compare runs with the first one.")
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="a run's folder, or --repeat's"
    )
    parser.add_argument("--out", type=Path, default="comparison.png", help="the curves' file")
    args = parser.parse_args(argv)
    if args.out.suffix not in plots.KINDS:
        raise UserError(f"--out {args.out}: the file name must end in {', '.join(plots.KINDS)}")
    runs = runs_of(args.runs)
    summaries = {name: [*map(checkpoint.load_summary, each)] for name, each in runs.items()}
    histories = {name: [*map(checkpoint.load_history, each)] for name, each in runs.items()}
    refuse_other_images(summaries)
    used = {name: flags_of(each) for name, each in runs.items()}
    accuracies = {n: [run["final_accuracy"] for run in each] for n, each in summaries.items()}
    print("\n".join([table(accuracies), *differing_flags(used)]))
    plots.comparison(args.out, histories)
    print(f"drawn: {args.out}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
