import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from scipy.stats import ttest_ind

import checkpoint
import compare
import plots

LINE = dict.fromkeys(("lr", "train_loss", "train_accuracy", "test_loss"), 0.5)


def write_run(folder, accuracy, given=(), **facts):
    folder.mkdir(parents=True)
    flags = dict.fromkeys(("seed", "out", "data", "data_dir", "device"), str(folder))
    flags |= {"sam": 0.1, "rgb_shift": [0, 0, 0], "fill": None} | dict(given)
    (folder / "config.json").write_text(json.dumps({"flags": flags}))
    known = dict.fromkeys((*checkpoint.SUMMARY, "training_seconds", "total_seconds"), 1)
    known |= {"images": "60 images", "tested_on": "test split", "final_accuracy": accuracy}
    known |= {"best_accuracy": 0.9, "flip_accuracy": 0.9}
    (folder / "summary.json").write_text(json.dumps(known | facts))
    lines = [{"epoch": k + 1, "test_accuracy": accuracy, "seconds": 2, **LINE} for k in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, accuracy in ((0, 0.9), (10, 0.92), (9, 0.91)):
        write_run(Path(f"still/s{seed}"), accuracy)
    for seed, accuracy in ((0, 0.93), (1, 0.95)):
        other = {"sam": 0.0, "rgb_shift": [9, 9, 9], "fill": 0.5}
        write_run(Path(f"moved/s{seed}"), accuracy, other)
    write_run(Path("alone"), 0.9101)
    return ["still", "moved", "alone"]


def test_the_interval_is_that_of_a_t_test():
    first, other = [0.9, 0.91, 0.92], [0.93, 0.95]
    low, high = ttest_ind(other, first).confidence_interval()
    assert compare.half_width(first, other) == pytest.approx((high - low) / 2)
    assert compare.half_width([0, 2, 1], [5]) == pytest.approx(4.3027 * (4 / 3) ** 0.5, rel=1e-4)
    assert compare.half_width([0.9], [0.91]) is None


def test_an_erratic_run_changes_no_other_verdict(folders, capsys):
    def line_of_moved(names):
        assert compare.main(names) == 0
        return next(x for x in capsys.readouterr().out.splitlines() if x.startswith("moved "))

    alone = line_of_moved(["still", "moved"])
    for seed, accuracy in ((0, 0.1), (1, 0.8)):
        write_run(Path(f"erratic/s{seed}"), accuracy)
    assert line_of_moved(["still", "moved", "erratic"]).split() == alone.split()


def test_a_long_path_leaves_room_for_the_curves(tmp_path, recwarn):
    run = tmp_path / ("long" * 50)
    write_run(run, 0.9)
    assert compare.main([str(run), "--out", str(tmp_path / "c.png")]) == 0
    assert not list(recwarn)


def test_runs_and_repeated_runs_side_by_side(folders, monkeypatch, capsys):
    drawn, comparison = {}, plots.comparison
    monkeypatch.setattr(plots, "comparison", lambda *of: drawn.update(of[1]) or comparison(*of))
    assert compare.main(folders) == 0
    heading, *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["still", "3", "91.00", "±", "1.00"],
        ["moved", "2", "94.00", "±", "1.41", "+3.00", "±", "3.35,", "within", "chance"],
        ["alone", "1", "91.01", "+0.01", "±", "4.97,", "within", "chance"],
    ]
    assert heading.index("change") <= lines[1].index("+3.00") < len(heading) <= 80
    assert lines[3:] == [
        "Other flags, in brackets those of still:",
        "moved: --sam 0.0 (0.1), --rgb-shift [9, 9, 9] ([0, 0, 0]), --fill 0.5 (None)",
        "alone: the same flags",
    ]
    assert last == "drawn: comparison.png"
    shown = {
        name: [[line["test_accuracy"] for line in history] for history in histories]
        for name, histories in drawn.items()
    }
    assert shown == {
        "still": [[0.9] * 3, [0.91] * 3, [0.92] * 3],  # seeds 0, 9 and 10
        "moved": [[0.93] * 3, [0.95] * 3],
        "alone": [[0.9101] * 3],
    }
    assert Path("comparison.png").stat().st_size > 10_000


def test_a_difference_beyond_chance(folders, capsys):
    write_run(Path("worse/s0"), 0.7, {"new_flag": 1})
    assert compare.main([*folders, "worse", "--out", "c.pdf"]) == 0
    said = capsys.readouterr().out
    assert "-21.00 ± 4.97, beyond chance" in said
    assert said.endswith("\nworse: --new-flag 1 (None)\ndrawn: c.pdf\n")
    assert Path("c.pdf").read_bytes().startswith(b"%PDF")
    assert compare.main(["worse", "alone"]) == 0
    assert "\nalone: --new-flag None (1)\n" in capsys.readouterr().out


def test_what_tells_nothing_about_chance(folders, capsys):
    write_run(Path("lone"), 0.92)
    assert compare.main(["alone", "lone"]) == 0  # one seed each
    _, _, line, *others, _ = capsys.readouterr().out.splitlines()
    assert line.split() == ["lone", "1", "92.00", "+0.99,", "one", "seed", "each"]
    assert others == ["Other flags, in brackets those of alone:", "lone: the same flags"]
    for seed in range(2):
        write_run(Path(f"same/s{seed}"), 0.92)
    assert compare.main(["same", "alone"]) == 0  # seeds that happen to be equal
    assert capsys.readouterr().out.splitlines()[2].split() == ["alone", "1", "91.01", "-0.99"]


def test_mistakes_are_one_line(folders, refused):
    error = partial(refused, compare.main)
    assert "--out a.gif: the file name must end in .png" in error("still", "--out", "a.gif")
    assert "nowhere/summary.json does not exist" in error("still", "nowhere")
    Path("link").symlink_to("still")
    for twice in (["still", "still"], ["still", "moved", "still/s0"], ["link", "still"]):
        assert "still/s0 is given twice" in error(*twice)
    write_run(Path("held"), 0.9, tested_on="5,000 held-out training images")
    expected = "still is on 60 images, test split, but held on 60 images, 5,000 held-out training "
    assert f"{expected}images; compare runs on the same" in error("still", "moved", "held")
    write_run(Path("other"), 0.9, images="70 images")
    assert "but other on 70 images, test split" in error("still", "other")
    write_run(Path("still/s11"), 0.9, {"sam": 0.0})
    assert "still/s11 has other flags than still/s0; move it elsewhere" in error("still", "alone")
    shutil.rmtree("still/s11")
    write_run(Path("still/s12"), 0.9, {"seed": "still/s9"})
    assert "still/s12 has the seed of still/s9; train it anew" in error("still", "alone")
    shutil.rmtree("still/s12")
    Path("moved/config.json").touch()
    assert "moved has not finished: train.py --resume moved continues it" in error("still", "moved")
    Path("moved/config.json").unlink()
    for damaged in ("x", None, float("nan")):
        write_run(Path(f"{damaged}/s1"), damaged)
        expected = f"{damaged}/s1/summary.json is damaged: final_accuracy is {damaged!r}"
        assert expected in error(f"{damaged}")
    metrics = Path("alone/metrics.jsonl")
    for key in ("epoch", "seconds", "test_accuracy", *LINE):
        line = json.loads(metrics.read_text().splitlines()[0])
        (Path("moved/s1") / metrics.name).write_text(json.dumps(line | {key: "x"}))
        assert f"moved/s1/metrics.jsonl is damaged: {key} is 'x'" in error("still", "moved")
    (Path("moved/s1") / metrics.name).write_text("")
    assert "moved/s1/metrics.jsonl is damaged: it is empty" in error("still", "moved")
    assert not list(Path().glob("*.p*"))
