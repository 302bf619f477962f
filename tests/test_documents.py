"""README's examples run, links lead somewhere, and every result says where it is from."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "results/accuracy.md", "results/speed.md", "trained/card.md")


def test_the_examples_in_python_run(tmp_path, monkeypatch, images):
    pytest.importorskip("onnxruntime", reason="pip install -r requirements-extra.txt")
    monkeypatch.chdir(tmp_path)
    Path("trained").symlink_to(ROOT / "trained")
    for number in range(6):
        Path("photos/cat").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50 + number, 40)).save(f"photos/cat/{number}.webp")
    exif = Image.Exif()
    exif[274] = 6  # held upright, stored sideways
    Image.linear_gradient("L").crop((0, 0, 256, 200)).convert("RGB").save("photo.jpg", exif=exif)
    given: list[np.ndarray] = []
    found = {"images": images, "labels": torch.zeros(len(images), dtype=torch.int64)}
    for example in re.findall("```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        if "download=True" not in example:
            exec(example, found)
            if "probabilities" in found:
                assert found.pop("probabilities").shape == (1, 10)
                given.append(found["pixels"].astype(int))
    assert [len(list(Path("mine", split, "cat").iterdir())) for split in ("train", "test")] == [
        4,
        2,
    ]
    assert np.abs(given[0] - given[1]).max() < 9
    assert found["inputs"].shape == (len(images) % 256, 3, 32, 32)


def anchors(document):
    """Those that GitHub makes of a document's headings."""
    headings = re.findall("^#+ (.*)$", document.read_text().lower(), re.MULTILINE)
    return {re.sub("[^a-z0-9 -]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    document = ROOT / name
    for link in re.findall(r"\]\((?!http)(.*?)\)", document.read_text()):
        file, _, anchor = link.partition("#")
        target = document.parent / file if file else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_results_say_where_they_are_from():
    for path in (ROOT / "results").glob("*.json"):
        facts = json.loads(path.read_text()).keys()
        assert facts >= {"command", "device", "versions", "data"}, path
