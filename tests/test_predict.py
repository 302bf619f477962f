import io
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import EpsImagePlugin, Image
from test_checkpoint import model_file
from test_data import files, write_folder

import checkpoint
import image_files
import predict

CLASSES = ["red", "green", "blue", "none"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose net finds the strongest colour: its logits are the channels' means, and −99."""
    folder = tmp_path_factory.mktemp("run")
    model_file(folder / "model.pt", "net136k", CLASSES, mean=[127.5] * 3, std=[64.0] * 3)
    return folder


@pytest.fixture(autouse=True)
def strongest_colour(monkeypatch):
    def forward(net, x, precision):
        assert precision == "fp32"
        return F.pad(4 * x.mean((2, 3)), (0, 1), value=-99)

    monkeypatch.setattr(predict.step, "forward", forward)


def save(path, colour, mode="RGB", size=(32, 32), **options):
    Image.new(mode, size, colour).save(path, **options)
    return str(path)


def classified(capsys, *arguments):
    status = predict.main([*map(str, arguments), "--json", "--device", "cpu"])
    printed = capsys.readouterr()
    results = {one["image"]: one["predictions"] for one in json.loads(printed.out)}
    return status, results, printed.err


def test_any_size_and_mode(run, tmp_path, capsys):
    files = {
        save(tmp_path / "a.png", (250, 9, 9), size=(640, 480)): "red",
        save(tmp_path / "b.jpg", (9, 250, 9), size=(7, 90)): "green",
        save(tmp_path / "c.png", (9, 9, 250, 255), "RGBA"): "blue",
        save(tmp_path / "d.gif", (9, 250, 9), size=(100, 3)): "green",
        save(tmp_path / "e.jpg", (255, 0, 255, 0), "CMYK"): "green",
        save(tmp_path / "f.bmp", (250, 9, 9)): "red",
    }
    status, results, error = classified(capsys, run, *files, "--top", "9")
    assert (status, error) == (0, "")
    assert {name: best[0]["class"] for name, best in results.items()} == files
    for best in results.values():
        assert [set(one) for one in best] == [{"class", "probability"}] * 4
        values = [one["probability"] for one in best]
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1, abs=1e-5)


def test_images_are_normalised_as_the_net_was_trained(run, tmp_path, capsys):
    name = save(tmp_path / "a.png", (143, 127, 127))  # 16 levels brighter: a quarter of std
    _, results, _ = classified(capsys, run, name)
    assert len(results[name]) == 3
    assert results[name][0]["probability"] == pytest.approx(np.e / (np.e + 2))


def pixels(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG" if not options else "JPEG", **options)
    return predict.to_pixels(Image.open(io.BytesIO(file.getvalue()))).astype(int)


@pytest.mark.filterwarnings("error")
def test_what_the_net_gets():
    assert pixels(Image.new("L", (9, 9), 77))[5, 5].tolist() == [77] * 3
    assert pixels(Image.new("1", (9, 9), 1))[5, 5].tolist() == [255] * 3
    for floats in (np.full((40, 40), 99.0), np.full((40, 40), 257 * 99.0)):
        image = Image.fromarray(floats.astype(np.float32))
        assert predict.to_pixels(image)[5, 5].tolist() == [99] * 3
    assert predict.to_pixels(Image.fromarray(np.ones((9, 9), np.int32)))[5, 5].tolist() == [1] * 3
    below = Image.fromarray(np.full((9, 9), -0.02, np.float32))
    assert predict.to_pixels(below)[5, 5].tolist() == [0] * 3
    fractions = np.full((40, 40), 0.2, np.float32)
    fractions[0, :4] = np.inf, -np.inf, np.nan, 1
    assert predict.to_pixels(Image.fromarray(fractions))[5, 5].tolist() == [51] * 3
    dark = Image.fromarray(np.full((9, 9), 200, ">u2"))
    assert (dark.mode, predict.to_pixels(dark)[5, 5].tolist()) == ("I;16B", [1] * 3)
    for mode, clear in (("P", 0), ("P", b"\0\x80"), ("RGB", (0, 0, 0))):
        image = Image.new(mode, (32, 32), 0)
        image.info["transparency"] = clear
        assert pixels(image)[5, 5].tolist() == [255] * 3


def test_the_central_square_is_resized_with_anti_aliasing():
    wide = np.zeros((64, 128, 3), dtype=np.uint8)
    wide[:, :32], wide[:, 96:] = 255, 255  # outside the central square
    for image in (wide, wide.transpose(1, 0, 2)):
        assert pixels(Image.fromarray(image))[1:-1, 1:-1].max() < 30
    checks = (np.indices((320, 320)).sum(0) % 2 * 255).astype(np.uint8)
    for mode in ("L", "P", "RGBA"):
        grey = pixels(Image.fromarray(checks).convert(mode))
        assert abs(grey - 127).max() < 12


def test_exif_rotation_is_honoured():
    image = Image.new("RGB", (64, 64))
    image.paste((255, 255, 255), (0, 0, 64, 32))  # the upper half
    exif = Image.Exif()
    exif[274] = 6  # turn by 90° clockwise
    strange = b"Exif\0\0II*\0\x08\0\0\0\2\0"  # with text as its unit of resolution
    strange += struct.pack("<HHIIHHI4sI", 274, 3, 1, 6, 296, 2, 2, b"x", 0)
    for kind in (exif, strange):
        turned = pixels(image, exif=kind, quality=95)
        assert turned[:, 20:].min() > 200
        assert turned[:, :12].max() < 55
    assert pixels(image, exif=b"Exif\0\0none", quality=95)[:12].min() > 200


def test_folders_and_standard_input(run, tmp_path, capsys, monkeypatch):
    tmp_path /= ".hidden"  # but asked for
    (tmp_path / "in").mkdir(parents=True)
    save(tmp_path / "in/x.png", (250, 9, 9))
    save(tmp_path / "y.JPG", (9, 250, 9), format="JPEG")
    (tmp_path / "notes.txt").write_text("no image, and not taken for one")
    (tmp_path / "holiday.png").mkdir()
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (9, 9, 250)).save(file, "PNG")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.getvalue())))
    status, results, _ = classified(capsys, run, tmp_path, "-")
    assert status == 0
    assert [(Path(name).name, best[0]["class"]) for name, best in results.items()] == [
        ("x.png", "red"),
        ("y.JPG", "green"),
        ("-", "blue"),
    ]


def test_closed_standard_input_is_skipped(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    status, results, error = classified(capsys, run, "-")
    assert (status, results) == (1, {})
    assert error.startswith("skipped: -: ")


def test_as_a_command(run, tmp_path):
    """With the real net, in a separate process, and a file name that is not UTF-8."""
    name = os.fsencode(tmp_path) + b"/\xff.png"
    Path(os.fsdecode(save(tmp_path / "a.png", (250, 9, 9)))).rename(os.fsdecode(name))
    command = [sys.executable, "predict.py", str(run), name, "--device", "cpu"]
    root, strict = Path(predict.__file__).parent, {"PYTHONIOENCODING": "utf-8:strict"}
    result = subprocess.run(command, capture_output=True, cwd=root, env=os.environ | strict)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"\\udcff.png" in result.stdout
    net, _ = checkpoint.load_net(run / "model.pt")
    inputs = (torch.tensor([250.0, 9, 9]).view(1, 3, 1, 1).expand(1, 3, 32, 32) - 127.5) / 64
    with torch.no_grad():
        expected = net(inputs).softmax(1).max().item()
    percent = float(re.search(rb" ([\d.]+)%", result.stdout)[1])
    assert percent == pytest.approx(100 * expected, abs=0.06)


def test_a_bad_file_is_skipped(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = save(tmp_path / "good.png", (9, 250, 9))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/notes.pdf").touch()
    bad = tmp_path / "b\x1bad.png"
    bad.write_bytes(Path(good).read_bytes()[:60])
    status, results, error = classified(capsys, run, bad, "gone.png", "", "x" * 300, "notes", good)
    assert (status, list(results)) == (1, [good])
    names = ("b\\x1bad.png", "gone.png", "", "x" * 300, "notes")
    for name, line in zip(names, error.splitlines(), strict=True):
        assert line.removeprefix("skipped: ").removeprefix(f"{tmp_path}/").startswith(f"{name}: ")
    assert line.endswith("notes: no images in that folder")
    bad.write_bytes(b"no image")
    said = f"skipped: {tmp_path}/b\\x1bad.png: unknown image format\n"
    assert classified(capsys, run, bad)[2] == said
    damaged = bytearray(Path(good).read_bytes())
    damaged[45] ^= 0xFF  # in its pixels
    bad.write_bytes(damaged)
    status, results, error = classified(capsys, run, bad)
    assert (status, results) == (1, {})
    assert error.endswith("b\\x1bad.png: broken data stream when reading image file\n")


def test_what_would_start_a_program_or_is_hidden_is_not_read(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("started"))
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "b.eps").write_bytes((tmp_path / "a.jpg").read_bytes())
    (tmp_path / "._c.jpg").write_bytes(b"of a Mac")
    (tmp_path / ".thumbnails").mkdir()
    (tmp_path / ".thumbnails/a.jpg").write_bytes(b"of a file manager")
    fields = {(3, 60): b"\1\0", (3, 20): b"\0\x09", (3, 30): b"\0\x09", (3, 120): b"\5"}
    fields[8, 10] = (tmp_path / "a.jpg").read_bytes()
    iptc = (bytes([28, *key]) + len(value).to_bytes(2) + value for key, value in fields.items())
    (tmp_path / "d.jpg").write_bytes(b"".join(iptc))  # holds a.jpg
    assert predict.main([str(run), str(tmp_path / "a.jpg"), str(tmp_path)]) == 1
    skipped = capsys.readouterr().err.splitlines()
    assert skipped == [f"skipped: {tmp_path}/{x}.jpg: unknown image format" for x in "aad"]


def test_what_decodes_to_too_much_is_skipped(run, tmp_path, capsys, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # Pillow warns above this
    large = save(tmp_path / "large.png", (9, 250, 9), size=(150, 100))
    larger = save(tmp_path / "larger.png", (9, 250, 9), size=(150, 150))
    status, results, error = classified(capsys, run, large, larger)
    assert (status, list(results)) == (1, [large])
    assert error.startswith(f"skipped: {larger}: ")
    assert error.count("\n") == 1
    bombs = Image.DecompressionBombWarning
    assert not [each for each in recwarn if issubclass(each.category, bombs)]


def test_damaged_exif_is_not_warned_of(run, tmp_path, capsys, recwarn):
    exif = Image.Exif()
    exif[0x10E], path = "a description", tmp_path / "a.jpg"
    Image.new("RGB", (32, 32)).save(path, exif=exif.tobytes()[:-9])
    assert predict.main([str(run), str(path)]) == 0
    write_folder(tmp_path / "pets", files() | {"train/cat/9.jpg": path.read_bytes()})
    image_files.read(tmp_path / "pets")
    assert not capsys.readouterr().err
    assert not list(recwarn)


def test_text_is_aligned_and_printed_batch_by_batch(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, "BATCH", 2)
    colours = {"red": (250, 9, 9), "green": (9, 250, 9)}
    best = ["red", "green", "green", "red", "green"]
    names = [save(tmp_path / f"{'x' * k}.png", colours[name]) for k, name in enumerate(best, 1)]
    real, printed = predict.readable, []

    def watched(*arguments):
        for each in real(*arguments):
            printed.append(capsys.readouterr().out)
            yield each

    monkeypatch.setattr(predict, "readable", watched)
    assert predict.main([str(run), *names, "--top", "2", "--device", "cpu"]) == 0
    printed.append(capsys.readouterr().out)
    assert [text.count("\n") for text in printed] == [0, 0, 2, 0, 2, 1]
    lines = "".join(printed).splitlines()
    assert [line.split()[-1] for line in lines] == names
    assert len({line.index("%") for line in lines}) == 1
    assert [line.split()[0] for line in lines] == best
    assert all(line.count("%") == 2 for line in lines)


def test_a_net_under_another_name(run, tmp_path, capsys, refused):
    image, net = save(tmp_path / "a.png", (250, 9, 9)), tmp_path / "net.pt"
    net.write_bytes((run / "model.pt").read_bytes())
    assert predict.main([str(net), str(image)]) == predict.main([str(run), str(image)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert "nte.pt does not exist" in refused(predict.main, run / "nte.pt", image)


def test_mistakes_are_one_line(run, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in (
        [run, "x", "--device", "cuda"],
        [run],
        [tmp_path / "nowhere", "x.png"],
        [run, "x", "--top", "0"],
    ):
        refused(predict.main, *arguments)


def test_a_folder_gives_every_kind_of_file_that_can_be_read_alone(run, tmp_path, capsys):
    file = save(tmp_path / "stereo.mpo", "red")
    assert predict.main([str(run), file]) == 0
    assert predict.main([str(run), str(tmp_path)]) == 0
    alone, inside = capsys.readouterr().out.splitlines()
    assert alone == inside
