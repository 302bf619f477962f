"""Damaged and hostile input of every kind, through main(argv): each is refused, with one line and
status 2, or read as the undamaged original."""

import gzip
import io
import json
import lzma
import os
import random
import struct
import tarfile
import zipfile
import zlib
from contextlib import suppress

import pytest
import torch
from PIL import PngImagePlugin
from test_data import add, files, png, write_tar
from torch.utils._pytree import tree_leaves

import checkpoint
import image_files
import train
from common import UserError
from flags import make_parser, option
from model import build

MEMBERS = files(train=6, test=3)
ON_A_CPU = ("--device", "cpu", "--batch-size", "1")
PACKERS = {"tar": bytes, "tar.gz": gzip.compress, "tar.xz": lzma.compress}


def archive(members, *others):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        add(tar, members)
        for info in others:
            tar.addfile(info)
    return file.getvalue()


WHOLE = archive(MEMBERS)


def flipped(blob, chance):
    position = chance.randrange(len(blob))
    changed = bytes([blob[position] ^ (1 << chance.randrange(8))])
    return blob[:position] + changed + blob[position + 1 :]


def damaged_archive(seed):
    """The suffix and the bytes of an archive with one thing wrong."""
    chance = random.Random(seed)
    suffix = chance.choice(list(PACKERS))
    pack = PACKERS[suffix]
    kind = seed % 12
    chosen = chance.choice(list(MEMBERS))
    if kind in (0, 1):
        blob = pack(WHOLE)
        return suffix, blob[: chance.randrange(len(blob))]
    if kind in (2, 3, 4):
        return suffix, flipped(pack(WHOLE), chance)
    if kind == 5:
        return suffix, pack(archive(MEMBERS | {chosen: flipped(MEMBERS[chosen], chance)}))
    if kind == 6:
        return suffix, pack(archive(MEMBERS | {chosen: chance.randbytes(chance.randrange(5000))}))
    if kind == 7:
        side = chance.choice([(31, 32), (32, 33), (1, 1), (640, 480)])
        return suffix, pack(archive(MEMBERS | {chosen: png((1, 2, 3), side)}))
    if kind == 8:
        strange = chance.choice(["../", "/", "train/../../", "test/cat/x/", "train//", "./../"])
        return suffix, pack(archive(MEMBERS | {strange + "evil.png": MEMBERS[chosen]}))
    if kind == 9:
        return suffix, pack(archive(dict(chance.sample(list(MEMBERS.items()), len(MEMBERS)))))
    if kind == 10:
        info = tarfile.TarInfo(f"train/cat/{seed}.png")
        info.type = chance.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
        info.linkname = chance.choice([chosen, "/etc/passwd", "../../../secret"])
        return suffix, pack(archive(MEMBERS, info))
    start = WHOLE.index(chosen.encode())  # a header, with or without a matching checksum
    header = bytearray(WHOLE[start : start + 512])
    header[124:136] = chance.choice([b"77777777777\0", b"-0000000001\0", b"\x80" + b"\xff" * 11])
    if chance.random() < 0.5:
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    return suffix, pack(WHOLE[:start] + bytes(header) + WHOLE[start + 512 :])


class Hostile:
    """Unpickled carelessly, this would run code."""

    def __reduce__(self):
        return print, ("hostile code ran",)


@pytest.fixture
def loaded(monkeypatch):
    """What main(argv) would train on; nothing is trained."""
    seen = []
    monkeypatch.setattr(train, "run", lambda args, command, dataset, start: seen.append(dataset))
    return seen


def ends_in_one_line(argv, capsys):
    """Whether main(argv) refused it; if so, with status 2, one line and no traceback."""
    status = train.main([str(argument) for argument in argv])
    printed = capsys.readouterr()
    assert "hostile code ran" not in printed.out
    lines = [x for x in printed.err.splitlines() if not x.startswith("data read")]
    if status == 0:
        return False
    assert status == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert len(lines[0]) < 1000
    return True


@pytest.mark.parametrize("start", range(0, 300, 20))
def test_archives(tmp_path, monkeypatch, capsys, loaded, start):
    (tmp_path / "pristine.tar").write_bytes(WHOLE)
    assert train.main(["--data", str(tmp_path / "pristine.tar"), *ON_A_CPU]) == 0
    pristine = loaded.pop()
    capsys.readouterr()
    refused = 0
    for seed in range(start, start + 20):
        suffix, blob = damaged_archive(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        path = folder / f"pets.{suffix}"
        path.write_bytes(blob)
        monkeypatch.chdir(folder)
        if ends_in_one_line(["--data", path, *ON_A_CPU], capsys):
            refused += 1
        else:  # the damage does not matter: the same images are read
            dataset = loaded.pop()
            for name in ("train_images", "train_labels", "test_images", "test_labels"):
                assert torch.equal(getattr(dataset, name), getattr(pristine, name)), seed
            assert dataset.classes == pristine.classes
        assert [file.name for file in folder.iterdir()] == [path.name]
    assert refused >= 10


def png_of(width, height, pixels, *extra):
    file, header = io.BytesIO(), struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for part in ((b"IHDR", header), *extra, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")):
        PngImagePlugin.putchunk(file, *part)
    return b"\x89PNG\r\n\x1a\n" + file.getvalue()


ROWS = (b"\0" + b"\1\2\3" * 32) * 32


def with_a_bomb(kind):
    return png_of(32, 32, ROWS, (kind, b"a\0\0" + zlib.compress(b"a" * 10**8)))


BOMBS = {  # built only where they are used
    "declared huge": lambda: png_of(60_000, 60_000, ROWS),
    "too many pixels": lambda: png_of(32, 32, b"\0" * 200_000_000),
    "text bomb": lambda: with_a_bomb(b"zTXt"),
    "profile bomb": lambda: with_a_bomb(b"iCCP"),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_bombs_in_an_image(tmp_path, capsys, loaded, bomb):
    import tracemalloc

    path = write_tar(tmp_path / "bomb.tar", MEMBERS | {"train/cat/0.png": bomb()})
    tracemalloc.start()
    refused = ends_in_one_line(["--data", path, *ON_A_CPU], capsys)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6
    if not refused:  # read as the 32×32 image that it also is
        assert loaded[0].train_images.shape == (12, 3, 32, 32)


def test_archive_bombs(tmp_path, capsys, loaded, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_ARCHIVE_BYTES", 1 << 24)
    zeros = tarfile.TarInfo("elsewhere/zeros")
    zeros.size = 1 << 40
    part = tarfile.TarInfo("elsewhere/part")
    part.size = 1 << 23
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 1 << 32
    empty = tarfile.TarInfo("elsewhere/empty").tobuf()
    for blob, refusal in (
        (zeros.tobuf() + WHOLE, "unpacks to over"),
        (empty + long_name.tobuf() + WHOLE, "claims 4,294,967,296 bytes"),
        (WHOLE + bytes(1 << 25), "unpacks to over"),
        ((part.tobuf() + bytes(1 << 23)) * 3 + WHOLE, "unpacks to over"),
        (empty * (1 << 15) + bytes(1 << 25) + WHOLE, "unpacks to over"),
    ):
        path = tmp_path / "bomb.tar.xz"
        path.write_bytes(lzma.compress(blob, preset=0))
        assert train.main(["--data", str(path), *ON_A_CPU]) == 2
        assert refusal in capsys.readouterr().err


def test_checkpoints(tmp_path, capsys, no_pictures):
    """A damaged `last.pt` is refused, unless the changed bytes hold nothing."""
    folder = tmp_path / "run"
    small = ["--data", "synthetic", "--train-images", "40", "--holdout", "10", "--device", "cpu"]
    small += ["--batch-size", "40", "--net", "net136k", "--epochs", "1", "--out", folder]
    assert train.main([*map(str, small)]) == 0
    (folder / "summary.json").unlink()  # as if the run had not finished
    capsys.readouterr()
    whole = (folder / "last.pt").read_bytes()
    expected = checkpoint.load(folder / "last.pt")
    chance = random.Random(0)
    foreign = io.BytesIO()
    ours = {"format": checkpoint.FORMAT}
    torch.save({**ours, "data": "synthetic", "net": build("atrous", 10).state_dict()}, foreign)
    pickled = io.BytesIO()
    torch.save({**ours, "code": Hostile()}, pickled)
    half = whole[: len(whole) // 2]
    smaller = io.BytesIO()  # a bomb could be hidden in a compressed member
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(smaller, "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    for blob in (b"PK", *(f.getvalue() for f in (foreign, pickled, smaller)), WHOLE, half):
        (folder / "last.pt").write_bytes(blob)
        assert ends_in_one_line(["--resume", folder], capsys)
    for _ in range(20):
        (folder / "last.pt").write_bytes(whole[: chance.randrange(len(whole))])
        assert ends_in_one_line(["--resume", folder], capsys)
    for _ in range(60):
        (folder / "last.pt").write_bytes(flipped(whole, chance))
        with suppress(UserError):
            content = checkpoint.load(folder / "last.pt")
            for one, other in zip(tree_leaves(content), tree_leaves(expected), strict=True):
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_no_other_image_is_read_from_a_damaged_one(tmp_path):
    """Each 1-bit flip of a PNG file is refused or changes no pixel."""
    name, blob = next(iter(MEMBERS.items()))
    whole = image_files._pixels(name, blob)
    for bit in range(8 * len(blob)):
        changed = bytearray(blob)
        changed[bit // 8] ^= 1 << bit % 8
        with suppress(UserError):
            assert (image_files._pixels(name, bytes(changed)) == whole).all()


def test_what_has_no_end(tmp_path, capsys):
    os.mkfifo(tmp_path / "pets.tar")
    for source in (tmp_path / "pets.tar", "/dev/zero"):
        assert ends_in_one_line(["--data", source], capsys)


def test_flag_values(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    flags = [option(name) for name in vars(make_parser().parse_args([]))]
    for flag in flags:
        any_text = flag in ("--data", "--data-dir", "--out", "--resume")
        for value in ("", "nan", "-1", "1e999", "\0", "ä" * 300, "[]"):
            line = refused(train.main, "--data", "missing.tar", f"{flag}={value}")
            assert any_text or flag in line, (flag, value)
    assert not list(tmp_path.iterdir())


def test_configurations(tmp_path, capsys, refused):
    flags = ('{"flags": []}', '{"flags": 3}', '{"flags": {"epochs": "x"}}')
    for text in ("", "[]", "{}", "\0", *flags):
        (tmp_path / "config.json").write_text(text)
        assert ends_in_one_line(["--resume", tmp_path], capsys), text
    flags = vars(make_parser().parse_args(["--data", "synthetic"]))
    for name, value in {
        "data": 5,
        "cutout": 56,
        "batch_size": None,
        "epochs": 0,
        "precision": "bg16",
        "dropout": 8.0,
        "rgb_shift": [0.0],
        "sam": True,
        "unknown": 1,
        "help": True,
        "strange": False,
    }.items():
        (tmp_path / "config.json").write_text(json.dumps({"flags": flags | {name: value}}))
        assert "config.json is" in refused(train.main, "--resume", tmp_path), name
    (tmp_path / "config.json").write_text("[" * 200_000)
    assert ends_in_one_line(["--resume", tmp_path], capsys)
