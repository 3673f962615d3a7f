"""Augmentation against torchvision, image by image, and the distributions of 10,000 draws.

The operations are shared text (test_style.py): one module stands for four. Policies are each method's.
"""

import math

import numpy as np
import pytest
import torch
from torchvision import transforms as T
from torchvision.transforms import functional as TF

import simsiam as S

DRAWS = 10_000


def pictures(n=12, h=32, w=32):
    """Random images, with the cases that break colour arithmetic: black, white, grey, pure colours."""
    x = torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(1))
    x[0], x[1], x[2] = 0, 1, 0.5
    x[3] = x[3, :1]  # a grey picture
    x[4] = torch.eye(3)[torch.randint(3, (h, w))].permute(2, 0, 1)  # pure red, green, blue
    x[5, 0] = x[5, 1]  # two equal channels
    return x


def assert_same(ours, theirs):
    assert torch.stack([a.sub(b).abs().max() for a, b in zip(ours, theirs)]).max() < 1e-5


def assert_same_distribution(a, b):
    """Two-sample Kolmogorov-Smirnov at a level of 1e-4."""
    a, b = np.sort(np.asarray(a, float)), np.sort(np.asarray(b, float))
    points = np.concatenate([a, b])
    gap = np.abs(np.searchsorted(a, points, "right") / len(a) - np.searchsorted(b, points, "right") / len(b))
    assert gap.max() < 2.23 * math.sqrt((len(a) + len(b)) / (len(a) * len(b)))


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation", "hue"])
def test_colour_operations_equal_torchvision(operation):
    x = pictures()
    factors = torch.linspace(-0.5, 0.5, 12) if operation == "hue" else torch.linspace(0, 2, 12)
    for shift in range(12):  # every picture meets every factor
        factor = factors.roll(shift)
        ours = getattr(S, f"adjust_{operation}")(x, factor)
        assert_same(ours, [getattr(TF, f"adjust_{operation}")(i, f.item()) for i, f in zip(x, factor)])


def test_identity_factors_change_nothing():
    x, one = pictures(), torch.ones(12)
    for operation, factor in ((S.adjust_brightness, one), (S.adjust_contrast, one),
                              (S.adjust_saturation, one), (S.adjust_hue, one - 1)):
        assert_same(operation(x, factor), x)


def test_grayscale_equals_torchvision():
    x = pictures()
    assert_same(S.grayscale(x), [TF.rgb_to_grayscale(i) for i in x])


@pytest.mark.parametrize("h, w, size", [(32, 32, 32), (32, 32, 16), (40, 24, 32), (17, 9, 8)])
def test_crop_resize_equals_torchvision(h, w, size):
    draw = torch.Generator().manual_seed(h)
    boxes = [(0, 0, h, w), (0, 0, 1, 1), (h - 1, w - 1, 1, 1), (0, w - 2, h, 2), (h - 3, 0, 3, w)]
    for _ in range(60):
        height, width = (int(torch.randint(1, side + 1, (1,), generator=draw)) for side in (h, w))
        top, left = (int(torch.randint(side + 1, (1,), generator=draw)) for side in (h - height, w - width))
        boxes.append((top, left, height, width))
    x = torch.rand(len(boxes), 3, h, w, generator=draw)
    ours = S.crop_resize(x, torch.tensor(boxes), size)
    assert_same(ours, [TF.resized_crop(i, *box, [size, size], antialias=False) for i, box in zip(x, boxes)])


@pytest.mark.parametrize("size", [65, 96, 224])
def test_gaussian_blur_equals_torchvision(size):
    x, sigma = pictures(6, size, size), torch.linspace(0.1, 2, 6)
    kernel = 2 * (size // 20) + 1
    assert kernel / size == pytest.approx(0.1, abs=0.03)  # a tenth of the side
    assert_same(S.gaussian_blur(x, sigma), [TF.gaussian_blur(i, kernel, s.item()) for i, s in zip(x, sigma)])


def drawn_boxes(monkeypatch, h, w, scale):
    seen = []
    monkeypatch.setattr(S, "crop_resize", lambda x, boxes, size: seen.append(boxes))
    S.random_resized_crop(torch.empty(DRAWS, 3, h, w, dtype=torch.uint8), 8, scale,
                          generator=torch.Generator().manual_seed(0))
    return seen[0].long()


@pytest.mark.parametrize("h, w, scale", [(32, 32, (0.2, 1)), (32, 32, (0.05, 0.4)), (32, 48, (0.08, 1)),
                                         (64, 8, (0.5, 1)), (8, 64, (0.5, 1))])
def test_crops_are_distributed_as_random_resized_crop(monkeypatch, h, w, scale):
    ours = drawn_boxes(monkeypatch, h, w, scale)
    torch.manual_seed(0)
    crop, image = T.RandomResizedCrop(8, scale), torch.empty(3, h, w)
    theirs = torch.tensor([crop.get_params(image, list(crop.scale), list(crop.ratio)) for _ in range(DRAWS)])
    for axis in range(4):
        assert_same_distribution(ours[:, axis], theirs[:, axis])
    assert_same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    assert_same_distribution(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2])
    assert (ours[:, :2] >= 0).all() and (ours[:, 0] + ours[:, 2] <= h).all() and (ours[:, 1] + ours[:, 3] <= w).all()


def test_the_crop_that_never_fits_is_the_centre(monkeypatch):
    """64x8 has no box of half the area with an allowed ratio: torchvision falls back, and so do we."""
    boxes = drawn_boxes(monkeypatch, 64, 8, (0.9, 1))
    assert (boxes == torch.tensor([(64 - 11) // 2, 0, 11, 8])).all()  # round(8 / (3/4)) = 11 rows
    assert T.RandomResizedCrop.get_params(torch.empty(3, 64, 8), [0.9, 1], [3 / 4, 4 / 3]) == (26, 0, 11, 8)


def jitter_draws(monkeypatch, n=DRAWS):
    """Factors and order of one color_jitter call, by its operations."""
    seen = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(S, f"adjust_{name}", lambda x, factor, name=name: seen.append((name, factor)) or x)
    S.color_jitter(torch.empty(n, 3, 1, 1), 0.4, 0.3, 0.2, 0.1, 0.8)
    return seen


def test_jitter_factors_are_distributed_as_color_jitter(monkeypatch):
    torch.manual_seed(0)
    ours = dict(jitter_draws(monkeypatch))
    jittered = ours["brightness"] != 1
    assert jittered.float().mean() == pytest.approx(0.8, abs=0.02)
    jitter = T.ColorJitter(0.4, 0.3, 0.2, 0.1)
    theirs = [T.ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
              for _ in range(DRAWS)]
    for i, (name, identity) in enumerate((("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0))):
        assert (ours[name] != identity).eq(jittered).all()  # an image is jittered in all or in none
        assert_same_distribution(ours[name][jittered], [draw[i + 1] for draw in theirs])


def test_jitter_orders_are_all_drawn_alike(monkeypatch):
    torch.manual_seed(0)
    counts = {}
    for _ in range(2400):
        order = tuple(name for name, _ in jitter_draws(monkeypatch, 2))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24 and min(counts.values()) > 60 and max(counts.values()) < 140  # 100 each


def test_jitter_equals_torchvision_in_the_drawn_order(monkeypatch):
    """The composition, not only the parts: replay the drawn factors through torchvision."""
    x, steps = pictures(), []
    for name in ("brightness", "contrast", "saturation", "hue"):
        real = getattr(S, f"adjust_{name}")
        monkeypatch.setattr(S, f"adjust_{name}", lambda x, f, name=name, real=real: steps.append((name, f)) or real(x, f))
    ours = S.color_jitter(x, 0.4, 0.4, 0.4, 0.1, 0.8, torch.Generator().manual_seed(3))
    theirs = list(x)
    for name, factor in steps:
        theirs = [getattr(TF, f"adjust_{name}")(i, f.item()) for i, f in zip(theirs, factor)]
    assert_same(ours, theirs)


def test_flip_and_grey_rates():
    torch.manual_seed(0)
    x = torch.rand(DRAWS, 3, 1, 2)
    flipped, grey = (S.random_flip(x) != x).flatten(1).any(1), (S.random_grayscale(x, 0.2) != x).flatten(1).any(1)
    assert flipped.float().mean() == pytest.approx(0.5, abs=0.02)
    assert grey.float().mean() == pytest.approx(0.2, abs=0.02)
    flip = S.random_flip(x)
    assert ((flip == x) | (flip == x.flip(3))).all()


def test_blur_rate_and_sigma(monkeypatch):
    seen = []
    monkeypatch.setattr(S, "gaussian_blur", lambda x, sigma: seen.append(sigma) or x + 1)
    torch.manual_seed(0)
    blurred = S.random_blur(torch.zeros(DRAWS, 3, 1, 1), 0.5)
    assert blurred[:, 0].mean() == pytest.approx(0.5, abs=0.02)
    assert_same_distribution(seen[0], np.random.default_rng(0).uniform(0.1, 2, DRAWS))


POLICIES = {  # scales and grey rate of each method's views
    "simclr": ([(0.2, 1.0)] * 2, 0.1), "moco": ([(0.08, 1.0)] * 2, 0.2), "simsiam": ([(0.2, 1.0)] * 2, 0.2),
    "simsiam_logo": ([(0.4, 1.0)] * 2 + [(0.2, 0.4)] * 2, 0.2)}


def test_policy(script, monkeypatch):
    """The numbers each policy hands to the operations are its recipe's."""
    calls = []
    for name in ("random_resized_crop", "random_flip", "color_jitter", "random_grayscale", "random_blur"):
        real = getattr(script, name)
        monkeypatch.setattr(script, name, lambda *a, real=real, name=name, **k: calls.append((name, a[1:])) or real(*a, **k))
    scales, grey = POLICIES[script.__name__]
    for size, blurred in ((32, False), (80, True)):
        calls.clear()
        views = script.augment(torch.zeros(4, 3, size, size, dtype=torch.uint8), script.parse_args([]))
        assert len(views) == len(scales)
        assert [tuple(a[1]) for name, a in calls if name == "random_resized_crop"] == scales
        assert [a[:5] for name, a in calls if name == "color_jitter"] == [(0.4, 0.4, 0.4, 0.1, 0.8)] * len(views)
        assert [a[0] for name, a in calls if name == "random_grayscale"] == [grey] * len(views)
        assert sum(name == "random_flip" for name, _ in calls) == len(views)
        assert sum(name == "random_blur" for name, _ in calls) == blurred * len(views)


def test_views_are_in_range_and_all_different(script):
    x = (255 * pictures(16)).round().to(torch.uint8)
    x[:] = x[6]  # sixteen times one image: every view of it must be another one
    args = script.parse_args([])
    views = script.augment(x, args, torch.Generator().manual_seed(0))
    for view in views:
        assert view.dtype == torch.float32 and view.shape == (16, 3, 32, 32)
        assert view.min() >= 0 and view.max() <= 1
    flat = torch.cat(views).flatten(1)
    assert (torch.cdist(flat, flat) + torch.eye(len(flat))).min() > 0.1
    again = script.augment(x, args, torch.Generator().manual_seed(0))
    other = script.augment(x, args, torch.Generator().manual_seed(1))
    assert all(a.equal(b) for a, b in zip(views, again)) and not any(a.equal(b) for a, b in zip(views, other))


def test_views_inside_autocast_are_those_outside(script):
    """All orders of the colour operations are met; bf16 would crop with an error of 0.008, or not run."""
    args, x = script.parse_args(["--image-size", "96"]), pictures(6, 96, 96).mul(255).byte()
    for seed in range(12):
        torch.manual_seed(seed)
        plain = script.augment(x, args)
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16):
            assert all(map(torch.equal, plain, script.augment(x, args)))


@pytest.mark.parametrize("x", [torch.rand(4, 3, 32, 32), torch.zeros(4, 1, 32, 32, dtype=torch.uint8),
                               torch.zeros(4, 5, 32, 32, dtype=torch.uint8), torch.zeros(4, 32, 32, 3, dtype=torch.uint8),
                               torch.zeros(3, 32, 32, dtype=torch.uint8)], ids=["float", "1", "5", "NHWC", "CHW"])
def test_what_is_not_rgb_pixels_is_refused(script, x):
    with pytest.raises(ValueError, match="colour jitter and grey need uint8 images"):
        script.augment(x, script.parse_args([]))
