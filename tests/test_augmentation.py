"""Augmentation against torchvision, image by image, and the distributions of 10,000 draws.

The operations are identical in all four scripts (test_style.py proves it), so one script is
tested. Each method has its own policy.
"""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torchvision import transforms as T
from torchvision.transforms import functional as TF

import simsiam as S
from conftest import METHODS

DRAWS = 10_000
JITTER = ("brightness", "contrast", "saturation", "hue")


def seeded(seed):
    """A generator of random numbers."""
    return torch.Generator().manual_seed(seed)


def sample_images(n=12, h=32, w=32):
    """Random images, and what breaks colour arithmetic: black, white, grey, pure colours."""
    x = torch.rand(n, 3, h, w, generator=seeded(1))
    x[0], x[1], x[2] = 0, 1, 0.5
    x[3] = x[3, :1]  # a grey picture
    pure = torch.randint(3, (h, w), generator=seeded(2))
    x[4] = torch.eye(3)[pure].permute(2, 0, 1)  # pure red, green, blue
    x[5, 0] = x[5, 1]  # two equal channels
    return x


def uint8_images(n=12, h=32, w=32):
    """The same images with pixels from 0 to 255."""
    return sample_images(n, h, w).mul(255).round().byte()


def assert_same(ours, theirs):
    """Images differ by less than 1e-5."""
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-5


def assert_same_distribution(a, b):
    """The two-sample test of Kolmogorov and Smirnov at a level of 1e-4."""
    a = np.sort(np.asarray(a, float))
    b = np.sort(np.asarray(b, float))
    points = np.concatenate([a, b])
    below_a = np.searchsorted(a, points, "right") / len(a)
    below_b = np.searchsorted(b, points, "right") / len(b)
    gap = np.abs(below_a - below_b).max()
    assert gap < 2.23 * math.sqrt(1 / len(a) + 1 / len(b))


@pytest.mark.parametrize("operation", JITTER)
def test_colour_operations_equal_torchvision(operation):
    x = sample_images()
    factors = torch.linspace(0, 2, 12)
    if operation == "hue":
        factors = torch.linspace(-0.5, 0.5, 12)
    for shift in range(12):  # every image meets every factor
        factor = factors.roll(shift)
        ours = getattr(S, f"adjust_{operation}")(x, factor)
        theirs = getattr(TF, f"adjust_{operation}")
        assert_same(ours, map(theirs, x, factor.tolist()))


def test_identity_factors_change_nothing():
    x, one = sample_images(), torch.ones(12)
    for operation in (S.adjust_brightness, S.adjust_contrast, S.adjust_saturation):
        assert_same(operation(x, one), x)
    assert_same(S.adjust_hue(x, 0 * one), x)


def test_grayscale_equals_torchvision():
    x = sample_images()
    assert_same(S.grayscale(x), map(TF.rgb_to_grayscale, x))


@pytest.mark.parametrize("h, w, size", [
    (32, 32, 32), (32, 32, 16),
    (40, 24, 32), (17, 9, 8)])
def test_crop_resize_equals_torchvision(h, w, size):
    draw = seeded(h)

    def integer(low, high):
        """A random number from low to high."""
        return int(torch.randint(low, high + 1, (1,), generator=draw))

    boxes = [(0, 0, h, w), (0, 0, 1, 1)]
    boxes += [(h - 1, w - 1, 1, 1)]
    boxes += [(0, w - 2, h, 2), (h - 3, 0, 3, w)]
    for _ in range(60):
        height, width = integer(1, h), integer(1, w)
        top, left = integer(0, h - height), integer(0, w - width)
        boxes.append((top, left, height, width))
    x = torch.rand(len(boxes), 3, h, w, generator=draw)
    ours = S.crop_resize(x, torch.tensor(boxes), size)
    theirs = [TF.resized_crop(image, *box, [size, size], antialias=False)
              for image, box in zip(x, boxes)]
    assert_same(ours, theirs)


@pytest.mark.parametrize("size", [65, 96, 224])
def test_gaussian_blur_equals_torchvision(size):
    x, sigma = sample_images(6, size, size), torch.linspace(0.1, 2, 6)
    kernel = 2 * (size // 20) + 1
    assert kernel / size == pytest.approx(0.1, abs=0.03)  # a tenth of the side
    theirs = [TF.gaussian_blur(image, kernel, s) for image, s in zip(x, sigma.tolist())]
    assert_same(S.gaussian_blur(x, sigma), theirs)


def drawn_boxes(monkeypatch, h, w, scale):
    """The boxes that one call of random_resized_crop draws."""
    seen = []
    monkeypatch.setattr(S, "crop_resize", lambda x, boxes, size: seen.append(boxes))
    x = torch.empty(DRAWS, 3, h, w, dtype=torch.uint8)
    S.random_resized_crop(x, 8, scale, generator=seeded(0))
    return seen[0].long()


@pytest.mark.parametrize("h, w, scale", [
    (32, 32, (0.2, 1)), (32, 32, (0.05, 0.4)),
    (32, 48, (0.08, 1)),
    (64, 8, (0.5, 1)), (8, 64, (0.5, 1))])
def test_crops_are_distributed_as_random_resized_crop(monkeypatch, h, w, scale):
    ours = drawn_boxes(monkeypatch, h, w, scale)
    torch.manual_seed(0)
    image = torch.empty(3, h, w)
    get_params, ratio = T.RandomResizedCrop.get_params, [3 / 4, 4 / 3]
    theirs = torch.tensor([get_params(image, scale, ratio) for _ in range(DRAWS)])
    for axis in range(4):
        assert_same_distribution(ours[:, axis], theirs[:, axis])
    top, left, height, width = ours.unbind(1)
    their_height, their_width = theirs[:, 2], theirs[:, 3]
    assert_same_distribution(height * width, their_height * their_width)
    assert_same_distribution(width / height, their_width / their_height)
    assert top.min() >= 0 and left.min() >= 0
    assert (top + height).max() <= h and (left + width).max() <= w


def test_a_crop_that_never_fits_is_the_centre(monkeypatch):
    """64x8 has no box of half the area with an allowed ratio: torchvision's fallback is ours."""
    boxes = drawn_boxes(monkeypatch, 64, 8, (0.9, 1))
    centre = ((64 - 11) // 2, 0, 11, 8)  # round(8 / (3/4)) = 11 rows
    assert (boxes == torch.tensor(centre)).all()
    image, ratio = torch.empty(3, 64, 8), [3 / 4, 4 / 3]
    assert T.RandomResizedCrop.get_params(image, [0.9, 1], ratio) == centre


def watch_jitter(monkeypatch, seen):
    """Append the name and the factors of each colour operation that runs to a list."""
    def watched(name, operation):
        def call(x, factor):
            seen.append((name, factor))
            return operation(x, factor)
        return call

    for name in JITTER:
        operation = getattr(S, f"adjust_{name}")
        monkeypatch.setattr(S, f"adjust_{name}", watched(name, operation))


def jitter_draws(monkeypatch, n=DRAWS):
    """Names and factors of the operations of one color_jitter call, in their order."""
    seen = []
    with monkeypatch.context() as patch:
        watch_jitter(patch, seen)
        S.color_jitter(torch.zeros(n, 3, 1, 1), 0.4, 0.3, 0.2, 0.1, 0.8)
    return seen


def test_jitter_factors_are_distributed_as_color_jitter(monkeypatch):
    torch.manual_seed(0)
    ours = dict(jitter_draws(monkeypatch))
    jittered = ours["brightness"] != 1
    assert jittered.float().mean() == pytest.approx(0.8, abs=0.02)
    jitter = T.ColorJitter(0.4, 0.3, 0.2, 0.1)
    strengths = [getattr(jitter, name) for name in JITTER]
    theirs = [T.ColorJitter.get_params(*strengths) for _ in range(DRAWS)]
    theirs = [factors[1:] for factors in theirs]  # less the order
    identities = (1, 1, 1, 0)
    for name, identity, factors in zip(JITTER, identities, zip(*theirs)):
        changed = ours[name] != identity
        assert changed.equal(jittered)  # all four operations change an image, or none
        assert_same_distribution(ours[name][jittered], factors)


def test_all_orders_of_the_colour_operations_are_equally_likely(monkeypatch):
    torch.manual_seed(0)
    orders = [[*dict(jitter_draws(monkeypatch, 2))] for _ in range(2400)]
    counts = Counter(map(tuple, orders))
    assert len(counts) == 24  # each about 100 times
    assert min(counts.values()) > 60 and max(counts.values()) < 140


def test_jitter_equals_torchvision_in_the_drawn_order(monkeypatch):
    """The composition, not only the parts: replay the drawn factors through torchvision."""
    x, steps = sample_images(), []
    watch_jitter(monkeypatch, steps)
    ours = S.color_jitter(x, 0.4, 0.4, 0.4, 0.1, 0.8, seeded(3))
    theirs = list(x)
    for name, factor in steps:
        operation = getattr(TF, f"adjust_{name}")
        theirs = [*map(operation, theirs, factor.tolist())]
    assert len(steps) == 4
    assert_same(ours, theirs)


def test_shares_of_flipped_and_grey_images():
    torch.manual_seed(0)
    x = torch.rand(DRAWS, 3, 1, 2)
    flip = S.random_flip(x)
    flipped = (flip != x).flatten(1).any(1)
    grey = (S.random_grayscale(x, 0.2) != x).flatten(1).any(1)
    assert flipped.float().mean() == pytest.approx(0.5, abs=0.02)
    assert grey.float().mean() == pytest.approx(0.2, abs=0.02)
    assert flip[flipped].equal(x[flipped].flip(3))


def test_share_and_sigma_of_blurred_images(monkeypatch):
    seen = []

    def blur(x, sigma):
        seen.append(sigma)
        return x + 1

    monkeypatch.setattr(S, "gaussian_blur", blur)
    torch.manual_seed(0)
    blurred = S.random_blur(torch.zeros(DRAWS, 3, 1, 1), 0.5)
    assert blurred[:, 0].mean() == pytest.approx(0.5, abs=0.02)
    assert_same_distribution(seen[0], np.random.default_rng(0).uniform(0.1, 2, DRAWS))


def watch_policy(script, monkeypatch):
    """Lists, by operation, of the arguments behind x that augment hands to it."""
    calls = {}

    def watched(name, operation):
        def call(x, *arguments, **more):
            calls[name].append(arguments)
            return operation(x, *arguments, **more)
        return call

    for name in ("random_resized_crop", "random_flip", "color_jitter", "random_grayscale",
                 "random_blur"):
        calls[name] = []
        monkeypatch.setattr(script, name, watched(name, getattr(script, name)))
    return calls


@pytest.mark.parametrize("size, blur", [(32, []), (80, [0.5])])
def test_augment_uses_the_numbers_of_the_recipe(script, monkeypatch, size, blur):
    """There is blur only above 64 pixels."""
    method = METHODS[script.__name__]
    scales, jitter = method["scales"], (0.4, 0.4, 0.4, 0.1, 0.8)
    calls = watch_policy(script, monkeypatch)
    x = torch.zeros(4, 3, size, size, dtype=torch.uint8)
    views = script.augment(x, script.parse_args([]))
    count = len(scales)
    assert len(views) == len(calls["random_flip"]) == count
    assert [tuple(scale) for _, scale in calls["random_resized_crop"]] == scales
    assert [numbers[:5] for numbers in calls["color_jitter"]] == count * [jitter]
    assert [p for p, _ in calls["random_grayscale"]] == count * [method["grey"]]
    assert [p for p, _ in calls["random_blur"]] == count * blur


def test_views_are_in_range_and_all_different(script):
    x = uint8_images(16)
    x[:] = x[6]  # sixteen times one image: every view of it must be another one
    args = script.parse_args([])
    views = script.augment(x, args, seeded(0))
    for view in views:
        assert view.dtype == torch.float32 and view.shape == (16, 3, 32, 32)
        assert view.min() >= 0 and view.max() <= 1
    flat = torch.cat(views).flatten(1)
    distances = torch.cdist(flat, flat) + torch.eye(len(flat))
    assert distances.min() > 0.1
    again = script.augment(x, args, seeded(0))
    other = script.augment(x, args, seeded(1))
    assert all(map(torch.equal, views, again))
    assert not any(map(torch.equal, views, other))
    with pytest.raises(ValueError, match=r"uint8 images \(N, 3, H, W\)"):
        script.augment(x / 255, args)


def test_autocast_does_not_change_the_views():
    """All orders of the colour operations; bf16 would crop with an error of 0.008, or not run."""
    args, x = S.parse_args([]), uint8_images(6, 96, 96)
    for seed in range(12):
        torch.manual_seed(seed)
        plain = S.augment(x, args)
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16):
            assert all(map(torch.equal, plain, S.augment(x, args)))


@pytest.fixture
def set_default_dtype():
    """torch.set_default_dtype for the time of a test."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_does_not_change_the_views(script, set_default_dtype, dtype):
    """Views are float32, equal to the bit, also where images are large enough for blur."""
    args, x = script.parse_args([]), uint8_images(6, 72, 72)
    for seed in range(3):
        set_default_dtype(torch.float32)
        plain = script.augment(x, args, seeded(seed))
        set_default_dtype(dtype)
        views = script.augment(x, args, seeded(seed))
        assert {view.dtype for view in views} == {torch.float32}
        assert all(map(torch.equal, views, plain))


@pytest.mark.parametrize("shape", [
    (4, 1, 32, 32), (4, 5, 32, 32),
    (4, 32, 32, 3), (3, 32, 32)])
def test_images_other_than_rgb_pixels_are_refused(shape):
    with pytest.raises(ValueError, match=r"uint8 images \(N, 3, H, W\)"):
        S.unit_range(torch.zeros(shape, dtype=torch.uint8))
