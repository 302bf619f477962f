"""augment.py against albumentations 2.0.8, image by image.

Differences are in levels, 0–255. OpenCV 4 interpolates in steps of 1/32 pixel: with it, the
tolerances of interpolated values widen to 4 levels. `--images ARCHIVE` compares on real images.
"""

import ast
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import augment
import reference  # takes albumentations offline before importing it
from augment import (
    BORDERS,
    Params,
    Policy,
    apply,
    inverse_matrix,
    jitter_colours,
    sample,
    sample_colours,
    sampling_grid,
)
from reference import A

CPU = torch.device("cpu")
EVERYTHING = Policy(affine_p=0.7, cutout_p=0.7)
FILL = torch.tensor([125.25, 122.5, 113.75])  # exact in float32, not whole levels
TRUE_BILINEAR = int(cv2.__version__.split(".")[0]) >= 5
FLOAT_TOLERANCE = 0.01 if TRUE_BILINEAR else 4.5


@pytest.fixture(scope="module")
def params():
    torch.manual_seed(1)
    return sample(EVERYTHING, 1000, 32, CPU)


def some(params, index):
    return type(params)(**{name: values[index] for name, values in vars(params).items()})


def by_albumentations(images, params, border, dtype, fill):
    """Each image, put through transforms that albumentations builds from its parameters."""
    results = []
    for index, image in enumerate(images.permute(0, 2, 3, 1).numpy().astype(dtype)):
        one = some(params, index)
        transforms = [A.HorizontalFlip(p=float(one.flip))]
        if one.affine:
            (scale_x, scale_y), (x, y) = one.scale.tolist(), one.shift.int().tolist()
            angle = float(one.angle)
            transforms.append(
                A.Affine(
                    scale={"x": (scale_x, scale_x), "y": (scale_y, scale_y)},
                    translate_px={"x": (x, x), "y": (y, y)},
                    rotate=(angle, angle),
                    border_mode=reference.BORDER_MODES[border],
                    fill=fill.tolist(),
                    p=1,
                )
            )
        for transform in transforms:
            image = transform(image=image)["image"]
        if one.hole.any():
            dropout = A.CoarseDropout(fill=fill.tolist())
            image = dropout.apply(np.ascontiguousarray(image), one.hole.numpy()[None], seed=0)
        results.append(np.ascontiguousarray(image))
    return torch.from_numpy(np.stack(results)).permute(0, 3, 1, 2)


def ours(images, params, border="reflect101", fill=FILL):
    return apply(images, params, fill.view(-1, 1, 1), border)


def test_a_fill_of_another_type(images, params):
    images, params = images[:50], some(params, slice(50))
    for border in BORDERS:
        found = ours(images, params, border, FILL.double())
        assert found.dtype == torch.float32
        assert torch.equal(found, ours(images, params, border))


@pytest.mark.parametrize("border", BORDERS)
def test_float_images_equal_albumentations(images, params, border):
    expected = by_albumentations(images, params, border, np.float32, FILL)
    result = ours(images, params, border)
    difference = (result - expected).abs()
    print(f"{border}, float32: max {difference.max():.5f}, mean {difference.mean():.6f} levels")
    assert difference.max() <= FLOAT_TOLERANCE
    assert torch.equal(result[~params.affine], expected[~params.affine])


@pytest.mark.parametrize("border", BORDERS)
def test_uint8_images_equal_albumentations(images, params, border):
    fill = FILL.trunc()  # albumentations truncates a fill on uint8 images
    expected = by_albumentations(images, params, border, np.uint8, fill).int()
    result = ours(images, params, border, fill).round().int()
    difference = (result - expected).abs()
    share = (difference > 0).float().mean()
    print(f"{border}, uint8: max {difference.max()}, {share:.1e} of the values differ")
    assert difference.max() <= (1 if TRUE_BILINEAR else 5)
    assert share <= (1e-4 if TRUE_BILINEAR else 0.3)
    assert torch.equal(result[~params.affine], expected[~params.affine])


def flipped_last(images, params):
    result = ours(images, replace(params, flip=torch.zeros_like(params.flip)))
    return torch.where(params.flip.view(-1, 1, 1, 1), result.flip(3), result)


WRONG = {
    "turned the other way": lambda i, p: ours(i, replace(p, angle=-p.angle)),
    "half a pixel off": lambda i, p: ours(i, replace(p, shift=p.shift + 0.5)),
    "hole a pixel off": lambda i, p: ours(i, replace(p, hole=p.hole + p.hole.any(1, True))),
    "flipped last": flipped_last,
    "the other border": lambda i, p: ours(i, p, "constant"),
    "axes of scale swapped": lambda i, p: ours(i, replace(p, scale=p.scale.flip(1))),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_the_comparison_catches(images, params, wrong):
    few = slice(0, 200)
    expected = by_albumentations(images[few], some(params, few), "reflect101", np.float32, FILL)
    difference = (wrong(images[few], some(params, few)) - expected).abs()
    assert difference.max() > 50
    assert difference.mean() > 0.5


def test_colours_equal_albumentations(images):
    torch.manual_seed(2)
    policy = Policy(
        rgb_shift=(10, 10, 15),
        rgb_shift_p=0.6,
        brightness=0.2,
        contrast=0.2,
        brightness_contrast_p=0.6,
    )
    colours = sample_colours(policy, len(images), CPU)
    result = jitter_colours(images, colours)
    for index, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        one = some(colours, index)
        # plus a quarter level, truncated again later: a whole level / 255 · 255 may round down
        shifts = ((one.rgb_shift + 0.25 * one.rgb_shift.sign()) / 255).tolist()
        if any(shifts):
            image = A.RGBShift(*((s, s) for s in shifts), p=1)(image=image)["image"]
        alpha, beta = one.alpha.item(), one.beta.item()
        if (alpha, beta) != (1, 0):
            limits = (beta / 255, beta / 255), (alpha - 1, alpha - 1)
            image = A.RandomBrightnessContrast(*limits, p=1)(image=image)["image"]
        difference = (result[index] - torch.from_numpy(image).permute(2, 0, 1)).abs()
        assert difference.max() <= 1  # floor of a float32 product: rounding can cost a level
        assert (difference > 0).float().mean() <= 0.01


def test_any_unit(images, params):
    scaled = apply(images / 255, params, 0.5)
    whole = apply(images, params, 127.5)
    torch.testing.assert_close(scaled * 255, whole, atol=1e-3, rtol=0)


def test_what_is_given_stays_as_it_was(images, params):
    before = images.float()
    given = before.clone()
    apply(given, params, 0.0)
    assert torch.equal(given, before)


def test_autocast_changes_nothing(images, params):
    with torch.autocast("cpu", torch.bfloat16):
        result = apply(images, params, 0.0)
    assert torch.equal(result, apply(images, params, 0.0, "reflect101"))


@pytest.mark.parametrize("size", [32, 33])
def test_grid_is_that_of_affine_grid(size):
    torch.manual_seed(4)
    theta = inverse_matrix(sample(EVERYTHING, 100, size, CPU), size)
    expected = F.affine_grid(theta, (100, 3, size, size), align_corners=True)
    torch.testing.assert_close(sampling_grid(theta, size), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 32, 32, 3), (2, 3, 32, 16)])
def test_images_of_another_shape_are_an_error(params, shape):
    with pytest.raises(ValueError, match=r"are not \(N, C, W, W\)"):
        ours(torch.zeros(shape), some(params, slice(2)))


def test_parameters_of_another_number_are_an_error(images, params):
    with pytest.raises(ValueError, match="1000 images, but parameters of 2"):
        ours(images, some(params, slice(2)))


def test_unknown_border_is_an_error(images, params):
    with pytest.raises(ValueError, match="wrap"):
        apply(images, params, 0.0, border="wrap")


def test_it_needs_nothing_but_pytorch():
    nodes = list(ast.walk(ast.parse(Path(augment.__file__).read_text())))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in found} <= sys.stdlib_module_names | {"torch"}


@pytest.mark.gpu
@pytest.mark.parametrize("border", BORDERS)
def test_gpu_equals_cpu(images, params, border, request):
    request.addfinalizer(partial(torch.set_float32_matmul_precision, "highest"))
    torch.set_float32_matmul_precision("high")  # TF32, which must not affect the grid
    on_gpu = Params(**{name: tensor.cuda() for name, tensor in vars(params).items()})
    with torch.autocast("cuda", torch.bfloat16):
        result = apply(images.cuda(), on_gpu, FILL.view(-1, 1, 1).cuda(), border).cpu()
    expected = ours(images, params, border)
    assert (result - expected).abs().max() <= 0.01
    assert torch.equal(result[~params.affine], expected[~params.affine])


def test_a_gpu_which_computes_all_keeps_those_drawn(monkeypatch):
    images, drawn = torch.rand(9, 3, 4, 4), torch.arange(9) % 2 > 0
    expected = augment._where(drawn, torch.neg, images.clone())
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    found = augment._where(drawn, torch.neg, images)
    monkeypatch.undo()
    assert torch.equal(found, expected)
