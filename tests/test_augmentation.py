"""Augmentation against torchvision, image by image, and the distributions of 10,000 draws.

The operations are shared text (test_style.py): one module stands for four. Policies are each
method's.
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
    """Random images, and what breaks colour arithmetic: black, white, grey, pure colours."""
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
    below = [np.searchsorted(x, points, "right") / len(x) for x in (a, b)]
    gap = np.abs(below[0] - below[1])
    assert gap.max() < 2.23 * math.sqrt((len(a) + len(b)) / (len(a) * len(b)))


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation", "hue"])
def test_colour_operations_equal_torchvision(operation):
    x = pictures()
    factors = torch.linspace(-0.5, 0.5, 12) if operation == "hue" else torch.linspace(0, 2, 12)
    for shift in range(12):  # every picture meets every factor
        factor = factors.roll(shift)
        ours = getattr(S, f"adjust_{operation}")(x, factor)
        theirs = getattr(TF, f"adjust_{operation}")
        assert_same(ours, [theirs(i, f.item()) for i, f in zip(x, factor)])


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
        height, width = (int(torch.randint(1, side + 1, (1,), generator=draw))
                         for side in (h, w))
        top, left = (int(torch.randint(side + 1, (1,), generator=draw))
                     for side in (h - height, w - width))
        boxes.append((top, left, height, width))
    x = torch.rand(len(boxes), 3, h, w, generator=draw)
    ours = S.crop_resize(x, torch.tensor(boxes), size)
    assert_same(ours, [TF.resized_crop(i, *box, [size, size], antialias=False)
                       for i, box in zip(x, boxes)])


@pytest.mark.parametrize("size", [65, 96, 224])
def test_gaussian_blur_equals_torchvision(size):
    x, sigma = pictures(6, size, size), torch.linspace(0.1, 2, 6)
    kernel = 2 * (size // 20) + 1
    assert kernel / size == pytest.approx(0.1, abs=0.03)  # a tenth of the side
    assert_same(S.gaussian_blur(x, sigma),
                [TF.gaussian_blur(i, kernel, s.item()) for i, s in zip(x, sigma)])


def drawn_boxes(monkeypatch, h, w, scale):
    seen = []
    monkeypatch.setattr(S, "crop_resize", lambda x, boxes, size: seen.append(boxes))
    S.random_resized_crop(torch.empty(DRAWS, 3, h, w, dtype=torch.uint8), 8, scale,
                          generator=torch.Generator().manual_seed(0))
    return seen[0].long()


@pytest.mark.parametrize("h, w, scale", [
    (32, 32, (0.2, 1)), (32, 32, (0.05, 0.4)), (32, 48, (0.08, 1)),
    (64, 8, (0.5, 1)), (8, 64, (0.5, 1))])
def test_crops_are_distributed_as_random_resized_crop(monkeypatch, h, w, scale):
    ours = drawn_boxes(monkeypatch, h, w, scale)
    torch.manual_seed(0)
    crop, image = T.RandomResizedCrop(8, scale), torch.empty(3, h, w)
    theirs = torch.tensor([crop.get_params(image, list(crop.scale), list(crop.ratio))
                           for _ in range(DRAWS)])
    for axis in range(4):
        assert_same_distribution(ours[:, axis], theirs[:, axis])
    assert_same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    assert_same_distribution(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2])
    top, left, height, width = ours.unbind(1)
    assert (ours[:, :2] >= 0).all() and (top + height <= h).all() and (left + width <= w).all()


def test_the_crop_that_never_fits_is_the_centre(monkeypatch):
    """64x8 has no box of half the area with an allowed ratio: torchvision's fallback is ours."""
    boxes = drawn_boxes(monkeypatch, 64, 8, (0.9, 1))
    assert (boxes == torch.tensor([(64 - 11) // 2, 0, 11, 8])).all()  # round(8 / (3/4)) = 11 rows
    image, ratio = torch.empty(3, 64, 8), [3 / 4, 4 / 3]
    assert T.RandomResizedCrop.get_params(image, [0.9, 1], ratio) == (26, 0, 11, 8)


def jitter_draws(monkeypatch, n=DRAWS):
    """Factors and order of one color_jitter call, by its operations."""
    seen = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(S, f"adjust_{name}",
                            lambda x, factor, name=name: seen.append((name, factor)) or x)
    S.color_jitter(torch.empty(n, 3, 1, 1), 0.4, 0.3, 0.2, 0.1, 0.8)
    return seen


def test_jitter_factors_are_distributed_as_color_jitter(monkeypatch):
    torch.manual_seed(0)
    ours = dict(jitter_draws(monkeypatch))
    jittered = ours["brightness"] != 1
    assert jittered.float().mean() == pytest.approx(0.8, abs=0.02)
    jitter = T.ColorJitter(0.4, 0.3, 0.2, 0.1)
    strengths = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    theirs = [T.ColorJitter.get_params(*strengths) for _ in range(DRAWS)]
    identities = ("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0)
    for i, (name, identity) in enumerate(identities):
        assert (ours[name] != identity).eq(jittered).all()  # an image is jittered in all or in none
        assert_same_distribution(ours[name][jittered], [draw[i + 1] for draw in theirs])


def test_jitter_orders_are_all_drawn_alike(monkeypatch):
    torch.manual_seed(0)
    counts = {}
    for _ in range(2400):
        order = tuple(name for name, _ in jitter_draws(monkeypatch, 2))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24  # each about 100 times
    assert min(counts.values()) > 60 and max(counts.values()) < 140


def test_jitter_equals_torchvision_in_the_drawn_order(monkeypatch):
    """The composition, not only the parts: replay the drawn factors through torchvision."""
    x, steps = pictures(), []

    def noted(name, operation):
        return lambda x, factor: steps.append((name, factor)) or operation(x, factor)
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(S, f"adjust_{name}", noted(name, getattr(S, f"adjust_{name}")))
    ours = S.color_jitter(x, 0.4, 0.4, 0.4, 0.1, 0.8, torch.Generator().manual_seed(3))
    theirs = list(x)
    for name, factor in steps:
        operation = getattr(TF, f"adjust_{name}")
        theirs = [operation(i, f.item()) for i, f in zip(theirs, factor)]
    assert len(steps) == 4
    assert_same(ours, theirs)


def test_flip_and_grey_rates():
    torch.manual_seed(0)
    x = torch.rand(DRAWS, 3, 1, 2)
    flipped = (S.random_flip(x) != x).flatten(1).any(1)
    grey = (S.random_grayscale(x, 0.2) != x).flatten(1).any(1)
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
    "simclr": ([(0.2, 1.0)] * 2, 0.1),
    "moco": ([(0.08, 1.0)] * 2, 0.2),
    "simsiam": ([(0.2, 1.0)] * 2, 0.2),
    "simsiam_logo": ([(0.4, 1.0)] * 2 + [(0.2, 0.4)] * 2, 0.2),
}


def test_policy(script, monkeypatch):
    """The numbers each policy hands to the operations are its recipe's."""
    calls = {}

    def noted(name, operation):
        def call(x, *rest, **more):
            calls[name].append(rest)
            return operation(x, *rest, **more)
        return call
    for name in ("random_resized_crop", "random_flip", "color_jitter", "random_grayscale",
                 "random_blur"):
        monkeypatch.setattr(script, name, noted(name, getattr(script, name)))
        calls[name] = []
    scales, grey = POLICIES[script.__name__]
    for size, blurred in ((32, False), (80, True)):
        for seen in calls.values():
            seen.clear()
        x = torch.zeros(4, 3, size, size, dtype=torch.uint8)
        views = script.augment(x, script.parse_args([]))
        assert len(views) == len(calls["random_flip"]) == len(scales)
        assert [tuple(rest[1]) for rest in calls["random_resized_crop"]] == scales
        jitter = (0.4, 0.4, 0.4, 0.1, 0.8)
        assert [rest[:5] for rest in calls["color_jitter"]] == [jitter] * len(views)
        assert [rest[0] for rest in calls["random_grayscale"]] == [grey] * len(views)
        assert [rest[0] for rest in calls["random_blur"]] == [0.5] * len(views) * blurred


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
    assert all(a.equal(b) for a, b in zip(views, again))
    assert not any(a.equal(b) for a, b in zip(views, other))
    with pytest.raises(ValueError, match="colour jitter and grey need uint8 images"):
        script.augment(x / 255, args)


def test_views_inside_autocast_are_those_outside():
    """All orders of the colour operations; bf16 would crop with an error of 0.008, or not run."""
    args, x = S.parse_args(["--image-size", "96"]), pictures(6, 96, 96).mul(255).byte()
    for seed in range(12):
        torch.manual_seed(seed)
        plain = S.augment(x, args)
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16):
            assert all(map(torch.equal, plain, S.augment(x, args)))


@pytest.mark.parametrize("shape", [(4, 1, 32, 32), (4, 5, 32, 32), (4, 32, 32, 3), (3, 32, 32)])
def test_what_is_not_rgb_pixels_is_refused(shape):
    with pytest.raises(ValueError, match="colour jitter and grey need uint8 images"):
        S.unit_range(torch.zeros(shape, dtype=torch.uint8))
