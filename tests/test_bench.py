import copy
import json
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch.nn.functional as F
from test_data import files, png, write_tar
from test_fields import Wrap, conv
from torch import nn

import bench
import checkpoint
import flags
import plots
import step
from common import Terminated
from graph import trace
from model import build


@pytest.fixture
def arguments(tmp_path, monkeypatch, no_pictures):
    """Two nets, few images, small batches; results go to the test's own folder."""
    two = {name: bench.model.NETS[name] for name in ("atrous", "net136k")}
    monkeypatch.setattr(bench.model, "NETS", two)
    parser = flags.make_parser()
    parser.set_defaults(batch_size=32)
    monkeypatch.setattr(flags, "make_parser", lambda: copy.deepcopy(parser))
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    colours = {"cat": (200, 40, 90), "dog": (30, 90, 160)}
    members = {
        f"{split}/{name}/{i}.png": png(tuple(c + i % 50 for c in colour))
        for split, count in (("train", 32), ("test", 5))
        for name, colour in colours.items()
        for i in range(count)
    }
    archive = write_tar(tmp_path / "pets.tar", members)
    out = ["--out", str(tmp_path / "runs"), "--device", "cpu"]
    return ["nets", "--data", str(archive), "--epochs", "1", *out]


@pytest.fixture
def briefly(monkeypatch):
    """Run everything, but only once; report two batches per second, a millisecond per image and
    phase, and for a step one more kernel, with a long name and time."""
    rates, phases, kernels = bench.measure.rates, bench.measure.phase_seconds, bench.measure.kernels

    def two_a_second(ways, device, **_):
        return dict.fromkeys(rates(ways, device, warm_up=0, count=1, rounds=1), 2.0)

    def a_millisecond(every, device, _):
        return dict.fromkeys(phases(every, device, rounds=1), 0.001)

    def one_more(*jobs, **_):
        return [{"name": "long" * 20, "count": 10.0, "seconds": 1.5}, *kernels(*jobs, rounds=2)]

    monkeypatch.setattr(bench, "CORES", 2)
    monkeypatch.setattr(bench.ways, "BATCH", 32)
    monkeypatch.setattr(bench.measure, "rates", two_a_second)
    monkeypatch.setattr(bench.measure, "phase_seconds", a_millisecond)
    monkeypatch.setattr(bench.measure, "kernels", one_more)


def result(folder, name):
    (path,) = (folder / "results").glob(f"{name}-cpu-*.json")
    content = json.loads(path.read_text())
    assert content["device"].startswith("CPU")
    assert re.match(r"python bench\.py \w+ .*--device cpu", content["command"])
    assert content["versions"]["torch"]
    return content


def test_an_epoch_and_its_phases(arguments, briefly, tmp_path, capsys, monkeypatch):
    what = [*arguments[1:3], "--net", "net136k", "--batch-size", "64", "32"]
    what += ["--device", "cpu"]
    radii, make_step = [], step.make_step
    monkeypatch.setattr(step, "make_step", lambda *of: radii.append(of[3:]) or make_step(*of))
    assert bench.main(["epoch", *what]) == 0
    assert (0.1,) in radii
    _, title, heading, *rows = capsys.readouterr().out.splitlines()[:5]
    match = re.match(r"seconds for 50,000 images, net136k on pets, (bf16|fp32); CPU", title)
    assert [len(row) for row in rows] == [len(heading)] * 2
    content = result(tmp_path, "epoch-net136k")
    layers, dtype = trace(build("net136k", 2)).layers, bench.DTYPES[match[1]]
    ceilings = bench.measure.Ceilings(**content["ceilings"])
    for row, batch, said in zip(content["batch_sizes"], (32, 64), rows, strict=True):
        columns = row["epoch_seconds"], *[50.0] * 5, row["floor_seconds"]
        ratio = f"{columns[0] / columns[-1]:.1f}"
        assert said.split()[:9] == [str(batch), *[f"{each:.3f}" for each in columns], ratio]
        assert row["batch_size"] == batch
        assert row["epoch_seconds"] == 50_000 / batch / 2
        phases = ["gather", "augment", "forward", "backward", "optimiser"]
        assert row["phases_seconds"] == dict.fromkeys(phases, 50.0)
        floor = bench.measure.floor_seconds(layers, batch, dtype, ceilings)
        assert row["floor_seconds"] == 50_000 / batch * floor
        assert row["peak_memory_bytes"] > 2**27
        assert said.endswith(f" {row['peak_memory_bytes'] / 2**20:,.0f} MiB")
    ways = content["ways_epoch_seconds"]
    assert next(iter(ways)) == "ours"
    others = {"ours, sharpness-aware", "albumentations, 2 workers", "plain loop, fp32"}
    assert others | {f"plain loop, {match[1]}"} < set(ways)
    assert set(ways.values()) == {50_000 / 32 / 2}
    assert bench.format_ways({"a": 2.0, "b": 6.0}).endswith(" 3.00 ×")


def test_phases_are_kept_if_a_way_fails(arguments, briefly, tmp_path, monkeypatch):
    def fail(*_):
        raise ModuleNotFoundError("albumentations")

    monkeypatch.setattr(bench, "epoch_ways", fail)
    what = [*arguments[1:3], "--net", "net136k", "--batch-size", "32", "--device", "cpu"]
    with pytest.raises(ModuleNotFoundError):
        bench.main(["epoch", *what])
    assert result(tmp_path, "epoch-net136k")["batch_sizes"]


def test_every_layer_beside_its_floor(arguments, briefly, tmp_path, capsys):
    assert bench.main(["layers", *arguments[1:3], "--net", "net136k", "--device", "cpu"]) == 0
    _, title, heading, *rows, _ = capsys.readouterr().out.splitlines()
    assert title.startswith("ms per layer, batches of 32, net136k on pets")
    layers = trace(build("net136k", 2)).layers
    assert [row.split()[:2] for row in rows] == [[layer.name, layer.kind] for layer in layers]
    assert max(map(len, [heading, *rows])) <= 80
    content = result(tmp_path, "layers-net136k")
    assert content["data"] == "pets"
    for row, layer, said in zip(content["layers"], layers, rows, strict=True):
        if layer.multiply_adds:
            assert said.endswith(f"{64 * 0.001 / row['floor_seconds']:6.1f} ×")
        assert row["forward_seconds"] == row["backward_seconds"] == 32 * 0.001
        assert said.split()[4:7] == ["32.000", "32.000", f"{1000 * row['floor_seconds']:.3f}"]
        assert (row["floor_seconds"] > 0) is (layer.multiply_adds > 0)


def test_a_pooling_that_is_no_module_has_no_line(arguments, briefly, tmp_path, monkeypatch):
    def pooled(m, x):
        return m.b(F.avg_pool2d(m.a(x), 2).mean((2, 3)))

    net = Wrap(pooled, conv(3, 4, 3), nn.Linear(4, 2))
    monkeypatch.setattr(bench.model, "build", lambda *_: net)
    assert bench.main(["layers", *arguments[1:3], "--device", "cpu"]) == 0
    assert [row["name"] for row in result(tmp_path, "layers")["layers"]] == ["a", "b"]


def test_a_net_that_begins_with_a_pooling(arguments, briefly, tmp_path, monkeypatch):
    layers = nn.AvgPool2d(2), conv(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    monkeypatch.setattr(bench.model, "build", lambda *_: nn.Sequential(*layers))
    assert bench.main(["layers", *arguments[1:3], "--device", "cpu"]) == 0
    names = [row["name"] for row in result(tmp_path, "layers")["layers"]]
    assert {"0", "1", "4"} <= set(names)


def test_what_a_step_is_made_of(arguments, briefly, tmp_path, capsys):
    assert bench.main(["kernels", *arguments[1:3], "--net", "net136k", "--device", "cpu"]) == 0
    *said, total, _ = capsys.readouterr().out.splitlines()[2:]
    assert max(map(len, [*said, total])) <= 80
    content = result(tmp_path, "kernels-net136k")
    seconds = sum(row["seconds"] for row in content["kernels"])
    assert total == f"{1e6 * seconds:9.1f}         in total; a step takes 500000.0 µs"
    assert content["step_seconds"] == 1 / 2
    rows = content["kernels"]
    norms = sum(layer.kind == "BatchNorm2d" for layer in trace(build("net136k", 10)).layers)
    (backward,) = [row for row in rows if row["name"] == "aten::native_batch_norm_backward"]
    assert backward["count"] == norms
    taken = {row["name"]: row["seconds"] for row in rows}
    assert taken["aten::conv2d"] < taken["aten::mkldnn_convolution"]
    assert 0 < backward["seconds"] < sum(row["seconds"] for row in rows)
    assert rows == sorted(rows, key=lambda row: -row["seconds"])


def test_augmentations(arguments, briefly, tmp_path, capsys, monkeypatch):
    pytest.importorskip("kornia", reason="pip install -r requirements-extra.txt")
    rates = bench.measure.rates
    monkeypatch.setattr(bench.measure, "rates", lambda *of, **how: rates(*of, **how) | {"ours": 4})
    assert bench.main(["augment", *arguments[1:3], "--device", "cpu"]) == 0
    _, _, ours, *others, _ = capsys.readouterr().out.splitlines()
    assert re.fullmatch("ours +128 images/s +1.0 × our time", ours)
    assert all(re.search(" 64 images/s +2.0 × our time$", other) for other in others)
    rates = result(tmp_path, "augment")["images_per_second"]
    assert [*rates.values()] == [4 * 32, *[2 * 32] * len(others)]


def test_a_missing_package_is_one_line(monkeypatch, refused):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = "kornia is missing: pip install -r requirements-extra.txt"
    assert said in refused(bench.main, "augment")


@pytest.mark.parametrize(("device", "epochs"), [("cpu", 1), ("cuda", 40)])
def test_the_second_start_is_warm(device, epochs, arguments, monkeypatch, capsys):
    run = {"first_step_seconds": 1.0, "total_seconds": 3.0, "peak_memory_bytes": 2**30}
    ran = Mock(side_effect=lambda *_, **__: {**run})
    monkeypatch.setattr(bench.measure, "whole_run", ran)
    monkeypatch.setattr(bench, "choose_device", bench.torch.device)
    summary = {"training_seconds": 2.0, "data": "pets", "device": "CPU"}
    monkeypatch.setattr(bench.checkpoint, "load_summary", lambda _: summary)
    assert bench.main(["startup", "--device", device]) == 0
    cold, warm = ran.call_args_list
    assert cold.kwargs == warm.kwargs  # the same caches
    assert f"--epochs {epochs} " in " ".join(warm.args[0])
    *_, cold, warm, _ = capsys.readouterr().out.splitlines()
    for row, cache in ((cold, "cold"), (warm, "warm")):
        assert row.split() == [cache, "1.00", "s", "2.00", "s", "3.00", "s", "1,024", "MiB"]


@pytest.mark.slow
def test_startup(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("step.py").write_text("a module of the user's")
    archive = write_tar(tmp_path / "more.tar", files(train=128))  # for a batch of 256
    what = ["--data", str(archive), "--net", "net136k", "--device", "cpu"]
    assert bench.main(["startup", *what]) == 0
    content = result(tmp_path, "startup-net136k")
    assert content["epochs"] == 1
    for row in content["cache"].values():
        seconds = row["first_step_seconds"], row["total_seconds"]
        assert 0 < seconds[0] < seconds[1]
        assert row["epochs_seconds"] < row["total_seconds"]
        assert row["peak_memory_bytes"] > 2**27
    assert bench.main(["startup", "--data", "missing.tar"]) == 2


def test_all_trains_no_variants(monkeypatch):
    called = []
    for name in ("epoch", "layers", "kernels", "augment", "startup", "trainings"):
        monkeypatch.setattr(bench, f"bench_{name}", lambda *_, name=name: called.append(name))
    monkeypatch.setattr(bench, "versions", lambda: called.append("versions"))
    monkeypatch.setattr(bench, "require", called.append)
    assert bench.main(["all"]) == 0
    assert called == ["versions", "kornia", "epoch", "layers", "kernels", "startup", "augment"]


def test_nets_side_by_side(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("plots.comparison", drawn := Mock())
    assert bench.main([*arguments, "--repeat", "2"]) == 0
    *_, heading, first, second, _ = capsys.readouterr().out.splitlines()
    assert len(heading) == len(first) == len(second)
    assert (first.split()[0], second.split()[0]) == ("atrous", "net136k")
    assert "±" in second
    content = result(tmp_path, "nets")
    assert content["title"] == "nets on pets, 2 seeds"
    for row, name in zip(content["nets"], ("atrous", "net136k"), strict=True):
        assert row["net"] == name
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        final = [run["final_accuracy"] for run in row["runs"]]
        assert row["final_accuracy"]["mean"] == pytest.approx(sum(final) / 2)
        assert row["runs"][0]["recipe"] is None
        for key in ("final_accuracy", "flip_accuracy", "best_accuracy", "training_seconds"):
            one, other = (run[key] for run in row["runs"])
            assert row[key]["sd"] == pytest.approx(abs(one - other) / 2**0.5)
        folders = [tmp_path / f"runs/{name}/s{seed}" for seed in (0, 1)]
        histories = [checkpoint.load_history(folder) for folder in folders]
        seconds = [history[0]["seconds"] for history in histories]
        assert row["median_epoch_seconds"] == pytest.approx(sum(seconds) / 2)
        assert drawn.call_args.args[1][name] == histories


def test_each_figure_in_its_column():
    accuracies = {"final_accuracy": {"mean": 0.1, "sd": None}}
    accuracies["flip_accuracy"] = {"mean": 0.2, "sd": 0.01}
    row = {"name": "n", "parameters": 1, "epochs": 2, **accuracies, "median_epoch_seconds": 3}
    table = bench.trials.table([row | {"training_seconds": {"mean": 4}}])
    assert table.split()[-9:] == ["n", "1", "2", "10.00%", "20.00%", "±", "1.00%", "3.00", "4.0"]


def test_own_recipes_and_going_on(arguments, tmp_path, capsys):
    assert bench.main(["recipes", *arguments[1:]]) == 0
    recipes = [row["runs"][0]["recipe"] for row in result(tmp_path, "recipes")["recipes"]]
    assert recipes == [None, "net136k"]
    metrics = (tmp_path / "runs/net136k/s0/metrics.jsonl").read_text()
    assert bench.main(["recipes", *arguments[1:]]) == 0
    assert (tmp_path / "runs/net136k/s0/metrics.jsonl").read_text() == metrics
    for epochs, said in ("2", "atrous/s0 holds a run with --epochs 1"), ("1", "--dropout 0.1"):
        assert bench.main(["nets", "--epochs", epochs, *arguments[1:3], *arguments[5:]]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("end", "status"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_an_interrupted_comparison_says_how_to_go_on(arguments, monkeypatch, capsys, end, status):
    def interrupted(*_):
        raise end("--resume s0 continues")  # as train.py would say

    monkeypatch.setattr("train.run_all", interrupted)
    assert bench.main(arguments) == status
    assert capsys.readouterr().err.endswith(
        ": the same command continues after the last finished epoch\n"
    )


@pytest.mark.slow
def test_all_but_one_ingredient(arguments, tmp_path, capsys):
    assert bench.main(["ingredients", *arguments[1:]]) == 0
    rows = result(tmp_path, "ingredients")["ingredients"]
    heading, first, _, without_affine, *_ = capsys.readouterr().out.splitlines()[-10:]
    assert len(heading) == len(first) <= 80
    assert first.startswith("the default ")
    assert without_affine.startswith("no affine ")
    folders = [tmp_path / "runs" / row["name"].replace(" ", "-") / "s0" for row in rows]
    default, *others = [checkpoint.load_config(folder)["flags"] for folder in folders]
    changed = [{name for name in default if flags[name] != default[name]} for flags in others]
    left_out = ["flip_p", "affine_p", "cutout_p", "weight_decay", "schedule", "optimizer", "sam"]
    assert changed == [{name, "out"} for name in left_out]
    assert all(not flags[name] for flags, name in zip(others[:4], left_out, strict=False))


def test_lengths(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("plots.comparison", drawn := Mock(wraps=plots.comparison))
    assert bench.main(["lengths", *arguments[1:3], "--epochs", "1", "3", *arguments[5:]]) == 0
    rows = result(tmp_path, "lengths")["lengths"]
    assert [row["epochs"] for row in rows] == [1, 3]
    assert [(len(row["runs"]), row["final_accuracy"]["sd"]) for row in rows] == [(1, None)] * 2
    histories = drawn.call_args.args[1].values()
    assert [[len(seed) for seed in seeds] for seeds in histories] == [[1], [3]]
    *_, ((*epochs,),) = histories
    assert rows[1]["median_epoch_seconds"] == sorted(line["seconds"] for line in epochs)[1]
    (picture,) = (tmp_path / "results").glob("lengths-*.png")
    assert picture.stat().st_size > 10_000


def test_fewer_images_than_a_batch(tmp_path, refused):
    archive = write_tar(tmp_path / "few.tar", files())
    for size, needed in ("8", 256), ("300", 300):  # batches of 256 are timed, too
        line = refused(bench.main, "epoch", "--batch-size", size, "--data", archive)
        assert line.endswith(f"fewer training images than a batch of {needed}")


def test_how_long_trainings_are_unless_it_is_said(monkeypatch):
    monkeypatch.setattr(bench, "bench_trainings", begun := Mock(return_value=None))
    lengths = dict.fromkeys(("nets", "recipes", "ingredients"), 40)
    for what, epochs in (lengths | {"lengths": [8, 15, 40, 100]}).items():
        assert bench.main([what]) == 0
        args = begun.call_args.args[0]
        assert (args.epochs, args.repeat, args.out) == (epochs, 1, f"runs/{what}")


def test_mistakes_are_one_line(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    wrong = [[], ["cars"], ["nets", "--epochs", "0"], ["epoch", "--batch-size", "x"]]
    wrong += [[what, "--data", "missing.tar"] for what in ("nets", "epoch", "augment", "all")]
    for arguments in wrong:
        refused(bench.main, *arguments)
    assert not Path("runs/nets").exists()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for what in ("nets", "layers", "augment"):
        line = refused(bench.main, what, "--data", "missing.tar", "--device", "cuda")
        assert "--device cuda: not available here" in line
