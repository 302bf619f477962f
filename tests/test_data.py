import http.client
import io
import pickle
import socket
import tarfile
import urllib.error
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import data
from common import UserError
from synthetic import SHAPES, shapes

CPU = torch.device("cpu")
CLASSES = ("cat", "dog")


def png(colour, size=(32, 32), mode="RGB", kind="PNG"):
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, kind)
    return file.getvalue()


def files(train=4, test=2):
    """Names and bytes of images, each of one colour, varied by class and number."""
    return {
        f"{split}/{name}/{i}.png": png((40 * i + 20 * k, 10 * i, 200 - 7 * k))
        for split, count in (("train", train), ("test", test))
        for k, name in enumerate(CLASSES)
        for i in range(count)
    }


def add(archive, members):
    for name, blob in members.items():
        info = tarfile.TarInfo(name)
        info.size = len(blob)
        archive.addfile(info, io.BytesIO(blob))


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        add(archive, members)
    return path


def write_folder(path, members):
    for name, blob in members.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(blob)
    return path


def load(path, **options):
    return data.load(str(path), path.parent / "none", CPU, **options)


@pytest.mark.parametrize(
    ("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tar.xz", "w:xz")]
)
def test_archive_and_folder_are_alike(tmp_path, suffix, mode, monkeypatch):
    folder = load(write_folder(tmp_path / "pets", files()))
    with tarfile.open(tmp_path / f"pets{suffix}", mode) as file:
        file.add(tmp_path / "pets", ".")  # with folders and "./", as `tar cf pets.tar .` does
    archive = load(tmp_path / f"pets{suffix}")
    assert archive.name == folder.name == load(tmp_path / "pets/train/..").name == "pets"
    assert archive.classes == folder.classes == list(CLASSES)
    monkeypatch.chdir(tmp_path / "pets")
    assert data.load(".", None, CPU).name == "pets"
    for field in ("train_images", "train_labels", "test_images", "test_labels", "mean", "std"):
        assert torch.equal(getattr(archive, field), getattr(folder, field))
    assert archive.train_images.dtype == torch.uint8
    assert archive.train_images.shape == (8, 3, 32, 32)
    assert archive.train_labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert archive.train_images[5, :, 7, 9].tolist() == [60, 10, 193]


def test_grey_and_jpeg_images_and_strangers_outside(tmp_path):
    members = files() | {"train/cat/grey.png": png(99, mode="L"), "README.md": b"hello"}
    members["test/dog/photo.jpg"] = png((5, 5, 5), kind="JPEG")
    dataset = load(write_tar(tmp_path / "pets.tar", members))
    assert (len(dataset.train_images), len(dataset.test_images)) == (9, 5)
    assert (dataset.train_images[4] == 99).all()


def test_statistics_are_those_of_the_training_images():
    dataset = data.load("synthetic", None, CPU)
    pixels = dataset.train_images.double()
    torch.testing.assert_close(dataset.mean.double(), pixels.mean((0, 2, 3)), rtol=1e-6, atol=0)
    std = pixels.std((0, 2, 3), correction=0)
    torch.testing.assert_close(dataset.std.double(), std, rtol=1e-6, atol=0)
    normal = data.normalize(dataset.train_images, dataset.mean, dataset.std)
    assert normal.mean((0, 2, 3)).abs().max() < 1e-3
    assert (normal.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_synthetic_images_never_change():
    images, labels = shapes(20, seed=0)
    again, _ = shapes(20, seed=0)
    assert torch.equal(images, again)
    assert not torch.equal(images, shapes(20, seed=1)[0])
    assert labels.bincount().tolist() == [2] * 10
    dataset = data.load("synthetic", None, CPU)
    assert (len(dataset.train_images), len(dataset.test_images)) == (5000, 1000)
    assert dataset.name == "synthetic"


def test_synthetic_classes_can_be_told_apart():
    """By what differs from an image's corner, and the class of the likest of other images."""

    def drawn(count, seed):
        images, labels = shapes(count, seed)
        far = (images.float() - images[:, :, :1, :1].float()).norm(dim=1)
        return (far > far.amax((1, 2), keepdim=True) / 2).flatten(1).float(), labels

    (known, classes), (new, labels) = drawn(2000, 2), drawn(500, 3)
    found = classes[torch.cdist(new, known).argmin(1)]
    assert (found == labels).view(50, 10).float().mean(0).min() > 0.8


def test_rows_lie_and_columns_stand():
    images, labels = shapes(500, seed=4)
    centre = images[..., 12:20, 12:20].float()
    down, across = centre.mean(3).std(2).mean(1), centre.mean(2).std(2).mean(1)
    for name, right in ("rows", down > across), ("columns", across > down):
        assert right[labels == SHAPES.index(name)].float().mean() > 0.9


def test_subsets_are_balanced_disjoint_and_fixed():
    whole = data.load("synthetic", None, CPU)
    dataset = data.load("synthetic", None, CPU, train_images=1003, holdout=500)
    assert dataset.test_labels.bincount().tolist() == [50] * 10
    assert set(dataset.train_labels.bincount().tolist()) == {100, 101}
    index = {image.numpy().tobytes(): i for i, image in enumerate(whole.train_images)}
    held, kept = (
        {index[image.numpy().tobytes()] for image in images}
        for images in (dataset.test_images, dataset.train_images)
    )
    assert (len(held), len(kept)) == (500, 1003)
    assert not held & kept
    torch.manual_seed(99)
    again = data.load("synthetic", None, CPU, train_images=1003, holdout=500)
    assert torch.equal(again.train_images, dataset.train_images)
    more = data.load("synthetic", None, CPU, holdout=500)
    assert torch.equal(more.test_images, dataset.test_images)
    assert len(more.train_images) == 4500
    fewer = data.load("synthetic", None, CPU, train_images=10)
    assert torch.equal(fewer.test_images, whole.test_images)
    assert not torch.equal(more.mean, whole.mean)
    with pytest.raises(UserError, match="--holdout"):
        data.load("synthetic", None, CPU, train_images=4600, holdout=500)
    with pytest.raises(UserError, match="ask for 5,001 images: synthetic has 5,000 for training"):
        data.load("synthetic", None, CPU, holdout=5000)


def test_no_class_is_left_without_a_training_image(tmp_path):
    path = write_tar(tmp_path / "pets.tar", files(train=4))
    with pytest.raises(UserError, match=r"leave no training image of cat$"):
        load(path, holdout=7)
    dataset = load(path, holdout=4)
    assert len(dataset.train_images) == 4
    assert dataset.test_images[:, 0, 0, 0].tolist() == [140, 40, 20, 80]  # in every version


# CIFAR-10


NETWORK = [
    urllib.error.URLError("no route"),
    TimeoutError("timed out"),
    ConnectionResetError("reset"),
    http.client.IncompleteRead(b""),
]


@pytest.mark.parametrize("error", NETWORK, ids=lambda error: type(error).__name__)
def test_without_a_network(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", Mock(side_effect=error))
    assert data.load("auto", tmp_path / "data", CPU).name == "synthetic"
    assert "warning: CIFAR-10 could not be downloaded" in capsys.readouterr().err
    with pytest.raises(UserError, match="--data cifar10"):
        data.load("cifar10", tmp_path / "data", CPU)


def test_a_wrong_sum_is_no_reason_to_fall_back(tmp_path, monkeypatch):
    error = RuntimeError("File not found or corrupted.")
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", Mock(side_effect=error))
    with pytest.raises(UserError, match=f"damaged .*, delete {tmp_path}/cifar-10-batches-py$"):
        data.load("auto", tmp_path, CPU)


def test_a_tilde_that_the_shell_left_is_a_name(tmp_path, monkeypatch):
    def download(self):
        assert Path(self.root).is_relative_to(tmp_path / "~")
        assert socket.getdefaulttimeout() == data.NETWORK_TIMEOUT
        raise TimeoutError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", download)
    assert data.load("auto", Path("~"), CPU).name == "synthetic"
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("source", ["auto", "cifar10"])
@pytest.mark.parametrize("name", ["cifar-10-batches-py/data_batch_1", "cifar-10-python.tar.gz"])
def test_a_damaged_copy_without_a_network_is_an_error(tmp_path, monkeypatch, source, name):
    offline = Mock(side_effect=NETWORK[0])
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"half of it")
    with pytest.raises(UserError, match=f"--data {source}: no whole copy in"):
        data.load(source, tmp_path, CPU)


def test_a_local_copy_is_read(tmp_path, monkeypatch):
    """A copy in CIFAR-10's own format, checked against its own MD5 sums, not the real ones."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import calculate_md5

    rows = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, calculate_md5(folder / name)]

    names = [f"data_batch_{i}" for i in range(1, 6)]
    labels = [i % 10 for i in range(20)]
    train = [write(name, {"data": rows, "labels": labels}) for name in names]
    test = [write("test_batch", {"data": rows[::-1], "labels": labels[::-1]})]
    meta = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", test)
    monkeypatch.setattr(
        CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]}
    )
    packed = tmp_path / "packed"
    packed.mkdir()
    archive = packed / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, folder.name)
    monkeypatch.setattr(CIFAR10, "tgz_md5", calculate_md5(archive))
    unpacked = data.load("auto", packed, CPU)
    assert {path.name for path in packed.iterdir()} == {archive.name, folder.name}
    (packed / folder.name / "test_batch").write_bytes(b"half of it")
    assert torch.equal(data.load("auto", packed, CPU).test_images, unpacked.test_images)
    dataset = data.load("auto", tmp_path, CPU)
    assert unpacked.checksum == dataset.checksum
    assert (dataset.name, dataset.classes) == ("cifar10", list("abcdefghij"))
    assert dataset.train_images.shape == (100, 3, 32, 32)
    assert dataset.train_images[3].flatten().tolist() == rows[3].tolist()
    assert dataset.train_labels[:20].tolist() == labels
    assert dataset.test_images[0].flatten().tolist() == rows[19].tolist()
