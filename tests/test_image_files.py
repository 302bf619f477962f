"""Folders and archives: their cache, and whatever can be wrong with them."""

import gzip
import os
import tarfile
import tracemalloc
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import files, load, png, write_folder, write_tar

import image_files
from common import UserError
from predict import to_pixels

# The cache


def test_cache_is_used_until_the_source_changes(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "pets.tar", files())
    first = load(path)
    with monkeypatch.context() as patch:
        patch.setattr(image_files, "_decode", lambda path: pytest.fail("decoded again"))
        assert torch.equal(load(path).train_images, first.train_images)
    write_tar(path, files(train=5))
    assert len(load(path).train_images) == 10
    folder = write_folder(tmp_path / "folder", files())
    load(folder)
    (folder / "train/cat/new.png").write_bytes(png((1, 2, 3)))
    assert len(load(folder).train_images) == 9
    (folder / "train/cat/new.png").rename(folder / "train/dog/-.png")  # in the same order
    assert load(folder).train_labels.tolist() == [0] * 4 + [1] * 5
    monkeypatch.setattr(image_files, "_decode", Mock(side_effect=UserError("decoded again")))
    dog = folder / "train/dog/-.png"
    blob, time = dog.read_bytes(), dog.stat().st_mtime_ns
    for content, ns in ((blob, time + 1), (blob + b"\0", time)):
        dog.write_bytes(content)
        os.utime(dog, ns=(ns, ns))
        with pytest.raises(UserError, match="decoded again"):
            load(folder)
    dog.write_bytes(blob)
    os.utime(dog, ns=(time, time))
    load(folder)
    monkeypatch.setattr(image_files, "CACHE_FORMAT", 0)
    with pytest.raises(UserError, match="decoded again"):
        load(folder)


def test_damaged_or_forbidden_cache_is_no_obstacle(tmp_path, capsys, monkeypatch):
    path = write_tar(tmp_path / "pets.tar", files())
    load(path)
    (cache,) = (tmp_path / "cache" / "atrous").iterdir()
    blob = cache.read_bytes()
    middle = len(blob) // 2
    for damaged in (blob[:500], blob[:middle] + bytes([blob[middle] ^ 1]) + blob[middle + 1 :]):
        cache.write_bytes(damaged)
        assert len(load(path).train_images) == 8
        assert "cannot be read, decoding again" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load(path).train_images) == 8
    assert "not cached" in capsys.readouterr().err
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(image_files, "check_sums", Mock(side_effect=PermissionError("forbidden")))
    assert len(load(path).train_images) == 8
    assert "forbidden" in capsys.readouterr().err


# What is read


def test_images_of_any_mode_are_read_as_predict_reads_them(tmp_path):
    folder = write_folder(tmp_path / "pets", files(train=0))
    turned = Image.Exif()
    turned[274] = 3  # by 180°
    upper = Image.new("RGB", (32, 32))
    upper.paste("white", (0, 0, 32, 16))
    images = {
        "cat/deep.png": Image.fromarray(np.full((32, 32), 257 * 200, np.uint16)),
        "cat/dark.png": Image.fromarray(np.full((32, 32), 200, np.uint16)),
        "dog/clear.png": Image.new("RGBA", (32, 32), (0, 0, 0, 0)),
        "dog/deep and clear.png": Image.fromarray(np.full((32, 32), 7, np.uint16)),
        "dog/turned.png": upper,
    }
    for name, image in images.items():
        (folder / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(
            folder / "train" / name,
            exif=turned if "turned" in name else b"",
            **{"transparency": 7} if "deep and clear" in name else {},
        )
    read = load(folder).train_images  # by class, then name
    assert read[:, 0, 4, 4].tolist() == [1, 200, 255, 255, 0]
    for pixels, name in zip(read, sorted(images), strict=True):
        with Image.open(folder / "train" / name) as image:
            assert np.array_equal(pixels.permute(1, 2, 0), to_pixels(image))


def test_a_class_may_be_a_link_to_a_folder(tmp_path):
    folder = write_folder(tmp_path / "pets", files())
    for split in ("train", "test"):
        (folder / split / "cat").rename(tmp_path / split)
        (folder / split / "cat").symlink_to(tmp_path / split)
    dataset = load(folder)
    assert (dataset.classes, len(dataset.train_images)) == (["cat", "dog"], 8)
    (tmp_path / "train/0.png").unlink()
    assert len(load(folder).train_images) == 7


# Bad input


def without(prefix):
    return {name: blob for name, blob in files().items() if not name.startswith(prefix)}


BAD_MEMBERS = {
    "no test split": (without("test"), "it must hold train/<class>/ and test/<class>/"),
    "different classes": (without("test/dog") | {"test/bat/a.png": png(0)}, "bat, dog"),
    "one class": ({n: b for n, b in files().items() if "dog" not in n}, "only one class, cat"),
    "too large": (files() | {"train/cat/big.png": png((0, 0, 0), (33, 32))}, "big.png is 33×32"),
    "truncated": (files() | {"test/dog/x.png": png((1, 2, 3))[:60]}, "test/dog/x.png"),
    "no image": (files() | {"train/cat/notes.txt": b"hello"}, "train/cat/notes.txt"),
    "gif": (files() | {"train/cat/a.gif": png(0, mode="L", kind="GIF")}, "train/cat/a.gif"),
    "too deep": (files() | {"train/cat/deep/a.png": png(0)}, "train/cat/deep/a.png"),
    "no class": (files() | {"train/a.png": png(0)}, "train/a.png"),
    "no name": (files() | {"train/c\udcff/a.png": png(0)}, "an unprintable class name"),
    "huge": (files() | {"train/cat/a.png": bytes((1 << 20) + 1)}, "too large"),
}


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize(("members", "message"), BAD_MEMBERS.values(), ids=BAD_MEMBERS)
def test_bad_members(tmp_path, kind, members, message):
    path = tmp_path / ("bad" if kind == "folder" else "bad.tar")
    (write_folder if kind == "folder" else write_tar)(path, members)
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)
    assert not any(tmp_path.glob("cache/atrous/*"))


def test_a_folder_whose_name_no_file_could_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(write_folder(tmp_path / "p\udcffts", files()))
    with pytest.raises(UserError, match=r"its name, 'p\\udcffts', is unprintable; rename it"):
        load(Path("."))


def test_the_files_of_cifar10_have_a_flag_of_their_own(tmp_path):
    folder = write_folder(tmp_path / "cifar-10-batches-py", {"data_batch_1": b""})
    with pytest.raises(UserError, match=f"are read by --data cifar10 --data-dir {tmp_path}$"):
        load(folder)


def test_images_of_one_colour_cannot_be_normalised(tmp_path):
    members = {name: png((9, k, k)) for k, name in enumerate(files())}  # none of them red
    with pytest.raises(UserError, match="colour channel"):
        load(write_tar(tmp_path / "bad.tar", members))


@pytest.mark.parametrize("write", [write_folder, write_tar])
def test_what_a_file_manager_leaves_is_no_image(tmp_path, write):
    hidden = "train/.DS_Store", "test/cat/._0.png", "train/dog/Thumbs.db", "test/desktop.ini"
    dataset = load(write(tmp_path / "pets", files() | dict.fromkeys(hidden, b"none")))
    assert dataset.classes == ["cat", "dog"]
    assert (len(dataset.train_images), len(dataset.test_images)) == (8, 4)


def test_a_user_without_settings_or_a_home(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "pets.tar", files())
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    load(path)
    assert len(list((tmp_path / ".cache/atrous").iterdir())) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: Path("~nobody here").expanduser())
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        load(path)


def test_path_traversal_is_an_error(tmp_path):
    with pytest.raises(UserError, match="not of the form"):
        load(write_tar(tmp_path / "bad.tar", files() | {"train/../x.png": png(0)}))


def test_a_link_in_an_archive_is_an_error(tmp_path):
    path = write_tar(tmp_path / "bad.tar", files())
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("train/cat/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(UserError, match=r"link\.png is a link"):
        load(path)


def test_a_member_that_is_there_twice_is_an_error(tmp_path):
    path = write_tar(tmp_path / "bad.tar", files())
    write_tar(path, {"train/cat/0.png": png(1)}, "a")
    with pytest.raises(UserError, match="twice"):
        load(path)


def test_more_images_than_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_IMAGES", 11)
    twelve = files()
    with pytest.raises(UserError, match="more than 11 images"):
        load(write_tar(tmp_path / "pets.tar", twelve))
    twelve.popitem()
    assert len(load(write_tar(tmp_path / "few.tar", twelve)).train_images) == 8


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.xz"])
def test_no_truncated_archive_loads(tmp_path, suffix):
    path = tmp_path / f"pets{suffix}"
    write_tar(path, files(), {".tar": "w", ".tar.gz": "w:gz", ".tar.xz": "w:xz"}[suffix])
    whole = path.read_bytes()
    end = len(whole) if suffix != ".tar" else 24 * 512  # after it, a tar is padded with zeros
    for size in np.linspace(0, end - 1, 25).astype(int):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="pets"):
            load(path)


def header(kind=tarfile.REGTYPE, size=None, **pax):
    """The tar header of a file that is not an image."""
    info = tarfile.TarInfo("readme")
    info.type, info.pax_headers = kind, pax
    blocks = bytearray(info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT))
    if size:
        blocks[124:136] = size
        blocks[148:156] = b" " * 8
        blocks[148:156] = b"%06o\0 " % sum(blocks)
    return bytes(blocks)


SPARSE = {f"GNU.sparse.{key}": value for key, value in zip(("major", "minor"), "10", strict=True)}
HEADERS = {
    "as far back as its own": (header(size=b"-0000001000\0"), "claims -512 bytes|invalid offset"),
    "further back": (header(size=b"-0000003000\0"), "claims -1,536 bytes|invalid offset"),
    "sparse": (header(tarfile.GNUTYPE_SPARSE), "sparse files are not supported"),
    "sparse by pax": (
        header(**SPARSE, **{"GNU.sparse.name": "x"}),
        "sparse files are not supported",
    ),
    "text to search for ever": (header(tarfile.XHDTYPE, b"00003641100\0"), "claims 1,000,000"),
    "the end, with more behind it": (bytes(1024), "there is data after its end"),
}


@pytest.mark.parametrize(("blocks", "message"), HEADERS.values(), ids=HEADERS)
def test_no_header_hides_images_or_takes_for_ever(tmp_path, blocks, message):
    path = write_tar(tmp_path / "pets.tar", files())
    whole = path.read_bytes()
    path.write_bytes(whole[:2048] + blocks + whole[2048:])
    with pytest.raises(UserError, match=message):
        load(path)


def test_no_header_is_kept(tmp_path):
    """tarfile keeps the headers that apply to all members."""
    lines = (f"{8000} {number:07d}=".ljust(7999, "x") + "\n" for number in range(1000))
    blocks = []
    for line in lines:
        info = tarfile.TarInfo("global")
        info.type, info.size = tarfile.XGLTYPE, len(line)
        blocks += [info.tobuf(), line.encode(), bytes(-len(line) % 512), header()]
    path = write_tar(tmp_path / "pets.tar", files())
    path.write_bytes(b"".join(blocks) + path.read_bytes())
    tracemalloc.start()
    assert len(load(path).train_images) == 8
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6


def test_what_is_no_file_is_not_waited_for(tmp_path):
    folder = write_folder(tmp_path / "pets", files())
    os.mkfifo(folder / "train/cat/9.png")
    with pytest.raises(UserError, match=r"train/cat/9\.png is not a regular file"):
        load(folder)


def test_damage_that_only_the_checksum_shows(tmp_path):
    path = write_tar(tmp_path / "pets.tar", files())
    packed = bytearray(gzip.compress(path.read_bytes(), 0))  # stored, not deflated
    packed[-8300] ^= 1  # after the last image, before its block ends
    bad = tmp_path / "bad.tar.gz"
    bad.write_bytes(packed)
    with pytest.raises(UserError, match=r"bad\.tar\.gz"):
        load(bad)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no such folder or archive, and not auto"):
        load(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in train"):
        load(tmp_path / "empty")
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(UserError, match=r"is not a valid \.tar"):
        load(tmp_path / "note.txt")
