"""What a run leaves behind: metrics, net, predictions, pictures, summary, each written whole."""

import json
import statistics
import textwrap
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

import checkpoint
import data
import zoo
from common import written_whole

FILES = ("config.json", "metrics.jsonl", "last.pt", "model.pt", "predictions.npy", "summary.json")
FILES += ("card.md", "curves.png", "augmented.png", "mistakes.png", "confusion.png", "classes.png")


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The fraction of rows of logits (N, classes) that are largest at their label (N,)."""
    return (logits.argmax(1) == labels).sum().item() / len(labels)


def write_history(folder: Path, history: list[dict[str, Any]]) -> None:
    with written_whole(folder / "metrics.jsonl") as file:
        file.writelines((json.dumps(line) + "\n").encode() for line in history)


def write_json(path: Path, content: dict[str, Any]) -> None:
    with written_whole(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def write_outcome(
    folder: Path,
    net: nn.Module,
    dataset: data.Dataset,
    args: Namespace,
    history: list[dict[str, Any]],
    predictions: list[Tensor],
    examples: tuple[Tensor, Tensor],
) -> dict[str, Any]:
    """Write a trained `net`, its predictions and its pictures. Returns its accuracies.

    `predictions` are logits (N, classes) of the test images and of their mirror images; `examples`
    are training images as the net gets them, float32 (N, 3, 32, 32), and their labels.
    """
    import plots

    logits, mirrored = predictions
    with written_whole(folder / "predictions.npy") as file:
        np.save(file, logits.cpu().numpy())
    content = {
        "net": args.net,
        "dropout": args.dropout,
        "classes": dataset.classes,
        "mean": dataset.mean.tolist(),
        "std": dataset.std.tolist(),
        "state_dict": {key: value.cpu() for key, value in net.state_dict().items()},
    }
    checkpoint.save(folder / "model.pt", content)
    plots.draw_run(folder, vars(args), dataset, logits.cpu().numpy(), history)
    plots.examples(folder / "augmented.png", dataset, *examples)
    best = max(history, key=lambda line: line["test_accuracy"])
    labels = dataset.test_labels
    return {
        "class_accuracy": {
            name: accuracy(logits[labels == k], labels[labels == k])
            for k, name in enumerate(dataset.classes)
            if (labels == k).any()  # --holdout may leave a class out
        },
        "final_accuracy": accuracy(logits, labels),
        "best_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "flip_accuracy": accuracy(logits + mirrored, labels),
    }


HEADER = (
    f"{'epoch':>5} {'lr':>9} {'train loss':>10} {'train acc':>9} "
    f"{'test loss':>9} {'test acc':>8} {'seconds':>8} {'images/s':>9}"
)


def format_line(line: dict[str, float]) -> str:
    """An epoch's line under HEADER."""
    return (
        f"{line['epoch']:5d} {line['lr']:9.5f} {line['train_loss']:10.4f} "
        f"{line['train_accuracy']:9.2%} {line['test_loss']:9.4f} {line['test_accuracy']:8.2%} "
        f"{line['seconds']:8.2f} {line['images_per_second']:9,.0f}"
    )


def place(facts: dict[str, Any]) -> str:
    """What a run is computed on, and how."""
    processes = f", {facts['processes']} processes" if facts["processes"] > 1 else ""
    return f"{facts['device']}, {facts['precision']}{processes}"


def announce(facts: dict[str, Any], dataset: data.Dataset, folder: Path) -> None:
    """Print what a run is about to do."""
    print(
        f"device     {place(facts)}\n"
        f"data       {dataset.name}: {len(dataset.train_images):,} training images, "
        f"{dataset.tested_on}\n"
        f"net        {facts['net']}: {facts['parameters']:,} parameters, receptive field "
        f"{facts['receptive_field']}, {facts['multiply_adds'] / 1e6:.1f} M multiply-adds\n"
        f"run        {folder}"
    )


OF_A_RECIPE = "batch_size optimizer lr schedule momentum weight_decay label_smoothing dropout sam"
OF_A_RECIPE += " flip_p shift scale rotate affine_p border cutout cutout_p fill"


def describe_recipe(args: Namespace) -> str:
    """What --recipe set, what of that other flags changed, and what was never published."""
    recipe, values = zoo.RECIPES[args.recipe], vars(args)
    published = recipe.flags
    kept = [name for name in published if values[name] == published[name]]
    changed = [name for name in published if name not in kept]
    rest = [name for name in OF_A_RECIPE.split() if name not in published]

    def listed(names: list[str]) -> str:
        said = {name: "mean" if values[name] is None else values[name] for name in names}
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in said.items())

    sentences = (
        f"published: {listed(kept) or 'nothing'}",
        changed and f"changed here: {listed(changed)}",
        f"not published: {listed(rest)}",
        recipe.note,
    )
    wrap = textwrap.TextWrapper(80, initial_indent=11 * " ", subsequent_indent=13 * " ").fill
    return "\n".join([f"recipe     {args.recipe}", *map(wrap, filter(None, sentences))])


def show(summary: dict[str, Any]) -> None:
    """Print a run's summary."""
    print(
        f"\nfinal test accuracy   {summary['final_accuracy']:.2%} on {summary['data']}, "
        f"{summary['tested_on']}"
        f"\nwith flip averaging   {summary['flip_accuracy']:.2%}"
        f"\nbest, in epoch {summary['best_epoch']:<6} {summary['best_accuracy']:.2%}"
        f"\ntotal                 {summary['total_seconds']:.1f} s"
    )
    if summary["target"]:
        when = "not reached"
        if reached := summary["target_reached"]:
            when = f"in epoch {reached['epoch']}, {reached['seconds']:.1f} s from the first step"
        print(f"target {summary['target']:<14.2%} {when}")


def write_card(folder: Path, summary: dict[str, Any], flags: dict[str, Any]) -> None:
    """Write the model card, `card.md`: what was trained, how, on what, and how good it is."""
    shown = {k.replace("|", r"\|"): share for k, share in summary["class_accuracy"].items()}
    shares = "\n".join(f"| {name} | {share:.1%} |" for name, share in shown.items())
    given = ", ".join(f"`{key} {value}`" for key, value in flags.items() if value is not None)
    text = f"""# {summary["net"]} on {summary["data"]}

A convolutional net for 32×32 colour images, trained and tested only on `{summary["data"]}`;
other images, sizes and cameras are untested.

| | |
|---|---|
| trained on | {summary["images"]} |
| accuracy on {summary["tested_on"]}, last epoch | {summary["final_accuracy"]:.2%} |
| … averaged with the mirror image | {summary["flip_accuracy"]:.2%} |
| … best epoch ({summary["best_epoch"]}) | {summary["best_accuracy"]:.2%} |
| parameters | {summary["parameters"]:,} |
| multiply-adds per image | {summary["multiply_adds"]:,} |
| theoretical receptive field | {summary["receptive_field"]} pixels |
| epochs, seed | {summary["epochs"]}, {summary["seed"]} |
| recipe | {summary["recipe"] or "train.py's own"} |
| device | {place(summary)}, {summary["total_seconds"]:.0f} s |
| versions | {", ".join(f"{k} {v}" for k, v in summary["versions"].items())} |

```
{summary["command"]}
```

| class | accuracy |
|---|---|
{shares}

All flags that have a value: {given}.
"""
    with written_whole(folder / "card.md") as file:
        file.write(text.encode())


def write_repeats(folder: Path, summaries: list[dict[str, Any]]) -> None:
    """Print mean and standard deviation over --repeat's seeds; write them to `summary.json`."""
    result = {"seeds": [summary["seed"] for summary in summaries]}
    for key in ("final_accuracy", "best_accuracy", "flip_accuracy", "total_seconds"):
        values = [summary[key] for summary in summaries]
        mean, sd = statistics.fmean(values), statistics.stdev(values)
        result[key] = {"mean": mean, "sd": sd, "values": values}
    shared = ("data", "images", "tested_on", "net", "parameters", "device", "precision", "epochs")
    shared += ("command", "versions")
    write_json(folder / "summary.json", result | {key: summaries[0][key] for key in shared})
    final = result["final_accuracy"]
    print(
        f"\n{len(summaries)} seeds: final test accuracy {final['mean']:.2%} ± {final['sd']:.2%} "
        f"(standard deviation) on {summaries[0]['data']}, {summaries[0]['tested_on']}"
    )
