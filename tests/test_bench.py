import json
from pathlib import Path

import pytest
from test_data import png, write_tar

import bench


@pytest.fixture
def arguments(tmp_path, monkeypatch, no_pictures):
    """Two nets, few images; results go to a folder of the test's own."""
    monkeypatch.setattr(bench.model, "NETS", ("atrous", "net136k"))
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "bench.py"))
    colours = {"cat": (200, 40, 90), "dog": (30, 90, 160)}
    members = {
        f"{split}/{name}/{i}.png": png(tuple(c + i % 50 for c in colour))
        for split, count in (("train", 260), ("test", 5))
        for name, colour in colours.items()
        for i in range(count)
    }
    archive = write_tar(tmp_path / "pets.tar", members)
    out = ["--out", str(tmp_path / "runs"), "--device", "cpu"]
    return ["nets", "--data", str(archive), "--epochs", "1", *out]


def test_nets_side_by_side(arguments, tmp_path, capsys):
    assert bench.main([*arguments, "--repeat", "2"]) == 0
    *_, heading, first, second, _ = capsys.readouterr().out.splitlines()
    assert len(heading) == len(first) == len(second)
    assert (first.split()[0], second.split()[0]) == ("atrous", "net136k")
    assert "±" in second
    (path,) = (tmp_path / "results").glob("nets-cpu-*.json")
    result = json.loads(path.read_text())
    assert result["title"] == "1 epochs on pets, 2 seeds, one recipe, train.py's defaults"
    for row, name in zip(result["nets"], ("atrous", "net136k"), strict=True):
        assert row["net"] == name
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        final = [run["final_accuracy"] for run in row["runs"]]
        assert row["final_accuracy"]["mean"] == pytest.approx(sum(final) / 2)
        assert row["runs"][0]["recipe"] is None
        assert row["median_epoch_seconds"] > 0


def test_own_recipes_and_going_on(arguments, tmp_path, capsys):
    assert bench.main([*arguments, "--own-recipes"]) == 0
    (path,) = (tmp_path / "results").glob("nets-own-recipes-*.json")
    recipes = [row["runs"][0]["recipe"] for row in json.loads(path.read_text())["nets"]]
    assert recipes == [None, "net136k"]
    metrics = (tmp_path / "runs/net136k/s0/metrics.jsonl").read_text()
    assert bench.main([*arguments, "--own-recipes"]) == 0
    assert (tmp_path / "runs/net136k/s0/metrics.jsonl").read_text() == metrics
    assert bench.main(["nets", "--epochs", "2", *arguments[5:]]) == 2
    assert "--epochs 2: the run in" in capsys.readouterr().err.splitlines()[-1]


def test_mistakes_are_one_line(capsys):
    for arguments in ([], ["cars"], ["nets", "--epochs", "0"], ["nets", "--data", "missing.tar"]):
        assert bench.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
    assert not Path("runs/nets").exists()
