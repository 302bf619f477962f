"""What augment.py draws, as distributions, against albumentations 2.0.8 and its documentation."""

import numpy as np
import pytest
import torch
from scipy import stats

import reference
from augment import Policy, sample, sample_colours

CPU = torch.device("cpu")
ALPHA = 1e-4  # of the statistical tests; the seeds are fixed
DRAWS = 20_000


@pytest.fixture(scope="module")
def draws():
    torch.manual_seed(5)
    return sample(Policy(flip_p=0.3, affine_p=0.4, cutout_p=0.6), DRAWS, 32, CPU)


@pytest.fixture(scope="module")
def albumentations_draws():
    affine = reference.compose(Policy(affine_p=1), (0.0, 0.0, 0.0)).transforms[1]
    affine.set_random_seed(5)
    shape = {"shape": (32, 32, 3)}
    return [affine.get_params_dependent_on_data(shape, {}) for _ in range(DRAWS)]


def uniform_p(values, low, high):
    assert low <= values.min() <= values.max() <= high
    return stats.kstest(values.numpy(), stats.uniform(low, high - low).cdf).pvalue


def test_angle_and_scale_are_drawn_as_albumentations_does(draws, albumentations_draws):
    angles = [p["rotate"] for p in albumentations_draws]
    assert stats.ks_2samp(draws.angle.numpy(), angles).pvalue > ALPHA
    for axis, name in enumerate("xy"):
        scales = [p["scale"][name] for p in albumentations_draws]
        assert stats.ks_2samp(draws.scale[:, axis].numpy(), scales).pvalue > ALPHA
    assert independent(draws.scale.T)


def test_shifts_are_drawn_as_albumentations_does(draws, albumentations_draws):
    centre = np.array([15.5, 15.5, 1])
    theirs = np.stack([(p["matrix"] @ centre)[:2] - 15.5 for p in albumentations_draws]).round()
    for axis in (0, 1):
        counts = [
            np.bincount(s[:, axis].astype(int) + 3, minlength=7)
            for s in (draws.shift.numpy(), theirs)
        ]
        expected = DRAWS / 8 * np.array([1, 1, 1, 2, 1, 1, 1])  # of shifts under 4, truncated
        assert stats.chisquare(counts[0], expected).pvalue > ALPHA
        assert stats.chi2_contingency(counts).pvalue > ALPHA
    assert independent(draws.shift.T)


def test_probabilities(draws):
    assert_drawn(torch.stack([draws.flip, draws.affine, draws.hole.any(1)]), (0.3, 0.4, 0.6))


def test_probabilities_of_colours():
    torch.manual_seed(7)
    limits = {"rgb_shift": (99, 99, 99), "brightness": 0.2, "contrast": 0.2}
    drawn = sample_colours(Policy(**limits, rgb_shift_p=0.2, brightness_contrast_p=0.8), DRAWS, CPU)
    assert_drawn(torch.stack([drawn.rgb_shift.any(1), drawn.alpha != 1]), (0.2, 0.8))
    assert torch.equal(drawn.alpha != 1, drawn.beta != 0)


def assert_drawn(rows, probabilities):
    for count, p in zip(rows.sum(1).tolist(), probabilities, strict=True):
        assert stats.binomtest(count, DRAWS, p).pvalue > ALPHA
    assert independent(rows)


def independent(rows):
    return np.abs(np.corrcoef(rows.float().numpy()) - np.eye(len(rows))).max() < 0.03


def test_holes_lie_anywhere_inside(draws):
    holes = draws.hole[draws.hole.any(1)]
    assert (holes[:, 2:] - holes[:, :2] == 16).all()
    for axis in (0, 1):
        counts = holes[:, axis].bincount(minlength=17)
        assert len(counts) == 17  # 0…16 inclusive
        assert stats.chisquare(counts.numpy()).pvalue > ALPHA
    assert independent(holes[:, :2].T)


def test_holes_of_any_size_are_drawn_as_albumentations_does():
    policy = Policy(cutout=12, cutout_min=1, cutout_p=1)
    torch.manual_seed(8)
    ours = sample(policy, DRAWS, 32, CPU).hole
    dropout = reference.compose(policy, (0.0, 0.0, 0.0)).transforms[2]
    dropout.set_random_seed(8)
    shape = {"shape": (32, 32, 3)}
    theirs = [dropout.get_params_dependent_on_data(shape, {})["holes"] for _ in range(DRAWS)]
    theirs = torch.from_numpy(np.concatenate(theirs)).long()
    assert len(theirs) == DRAWS  # one in each image
    assert ours.min() >= 0
    assert ours.max() == 32
    for axis in (0, 1):
        sides = [h[:, axis + 2] - h[:, axis] for h in (ours, theirs)]
        counts = [s.bincount(minlength=13)[1:].numpy() for s in sides]
        assert stats.chisquare(counts[0]).pvalue > ALPHA
        assert stats.chi2_contingency(counts).pvalue > ALPHA
        counts = [h[:, axis].bincount(minlength=32).numpy() for h in (ours, theirs)]
        assert stats.chi2_contingency(counts).pvalue > ALPHA
    assert independent((ours[:, 2:] - ours[:, :2]).T)


def test_colour_parameters():
    torch.manual_seed(6)
    colour = {"rgb_shift": (10, 5, 0), "brightness": 0.2, "contrast": 0.3}
    drawn = sample_colours(Policy(**colour, rgb_shift_p=1, brightness_contrast_p=1), DRAWS, CPU)
    assert uniform_p(drawn.alpha, 0.7, 1.3) > ALPHA
    assert uniform_p(drawn.beta, -51, 51) > ALPHA
    for channel, limit in enumerate((10, 5)):
        counts = (drawn.rgb_shift[:, channel].long() + limit).bincount(minlength=2 * limit)
        expected = np.ones(2 * limit - 1)
        expected[limit - 1] = 2  # truncated towards zero: −1 < s < 1
        assert stats.chisquare(counts[1 : 2 * limit], DRAWS * expected / (2 * limit)).pvalue > ALPHA
    assert independent(drawn.rgb_shift[:, :2].T)
    assert not drawn.rgb_shift[:, 2].any()


def test_a_hole_larger_than_the_images_is_an_error():
    with pytest.raises(ValueError, match="16 pixels does not fit into 15"):
        sample(Policy(), 1, 15, CPU)
    assert sample(Policy(cutout_p=1), 1, 16, CPU).hole.tolist() == [[0, 0, 16, 16]]
