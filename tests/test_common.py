"""Data sets of every kind and state, the batches made of them, and the weights of files."""

import ast
import errno
import gzip
import hashlib
import io
import os
import pickle
import resource
import shutil
import sys
import threading
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import functional as TF
from torchvision.transforms.functional import to_pil_image

import common
from conftest import fast_start, picture


def put(root, *names):
    """Write a small picture at each of these names, as PNG whatever the suffix is."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(8, 8, seed=number).save(root / name, "PNG")


def loaded(root, **more):
    """How many images a folder has to train and to test on."""
    data = common.load_dataset("folder", root, 8, **more)
    return len(data.train_images), len(data.test_images)


def refusal(function, *args, **more):
    """The message of the UserError that a call raises; it must be one line."""
    with pytest.raises(common.UserError) as caught:
        function(*args, **more)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_labelled_folder(folder):
    data = common.load_dataset("folder", folder, 16)
    assert data.classes == ("dark", "light")
    assert data.train_images.shape == (40, 3, 16, 16)
    assert data.train_images.dtype == torch.uint8
    assert data.test_images.shape == (12, 3, 16, 16)
    assert data.train_labels.tolist() == [0] * 20 + [1] * 20
    assert data.test_labels.tolist() == [0] * 6 + [1] * 6
    dark, light = data.train_images.float().split(20)
    assert dark.mean() < 90 < 160 < light.mean()
    check_mean_and_std(data)


def check_mean_and_std(data):
    """Mean and standard deviation are those of all training pixels in [0, 1]."""
    channels = data.train_images.double().transpose(0, 1).flatten(1) / 255
    assert torch.allclose(data.mean.double(), channels.mean(1), atol=1e-6)
    assert torch.allclose(data.std.double(), channels.std(1, correction=0), atol=1e-6)


def test_a_val_folder_is_a_test_split(folder, tmp_path):
    (tmp_path / "train").symlink_to(folder / "train")
    (tmp_path / "val").symlink_to(folder / "test")
    assert len(common.load_dataset("folder", tmp_path, 16).test_labels) == 12


@pytest.mark.parametrize("where", [".", "a", "a/b"])
def test_a_folder_without_class_folders_has_no_labels(tmp_path, where):
    put(tmp_path / where, "0.png", "1.png", "2.png")
    (tmp_path / "notes.txt").write_text("not an image")
    data = common.load_dataset("folder", tmp_path, 16)
    assert data.train_images.shape == (3, 3, 16, 16)
    assert data.test_images.shape == (0, 3, 16, 16)
    assert data.train_labels is None and data.test_labels is None
    assert data.classes == ()


@pytest.mark.parametrize("mode, suffix", [
    ("RGB", "png"), ("RGB", "jpg"), ("L", "png"), ("L", "jpg"),
    ("RGBA", "png"), ("CMYK", "jpg"), ("P", "png"), ("1", "png"),
    ("LA", "png"), ("RGB", "webp"), ("RGB", "bmp"), ("RGB", "PPM"),
    ("RGB", "TIFF")])
@pytest.mark.parametrize("h, w", [
    (16, 16), (40, 16), (9, 30), (100, 61)])
def test_images_of_any_mode_and_size_are_read(tmp_path, mode, suffix, h, w):
    picture(h, w, mode).save(tmp_path / f"x.{suffix}")
    image = common.load_dataset("folder", tmp_path, 16).train_images
    assert image.shape == (1, 3, 16, 16) and image.float().std() > 5
    if mode in ("L", "1", "LA"):
        red, green, blue = image[0]
        assert red.equal(green) and red.equal(blue)


def test_the_centre_square_is_cut_without_squeezing(tmp_path):
    """A wide picture with a dark left, a grey middle and a light right: only the middle stays."""
    bands = [torch.full((3, 10, 10), value) for value in (0.0, 0.5, 1.0)]
    to_pil_image(torch.cat(bands, 2)).save(tmp_path / "x.png")
    assert (common.load_dataset("folder", tmp_path, 10).train_images == 127).all()


def half_a_jpeg():
    """The first half of the bytes of a JPEG file."""
    whole = io.BytesIO()
    picture(64, 64).save(whole, "JPEG")
    return whole.getvalue()[:len(whole.getvalue()) // 2]


@pytest.mark.parametrize("content", [b"", b"this is text", half_a_jpeg()])
def test_a_broken_image_is_named(tmp_path, content):
    picture().save(tmp_path / "good.jpg")
    (tmp_path / "bad.jpg").write_bytes(content)
    assert f"{tmp_path / 'bad.jpg'} (" in refusal(loaded, tmp_path)


# ------------------------------------------------------------------------------ pixels
RAMP = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize("name, values", [
    ("16.png", (RAMP * 257).astype(np.uint16)),
    ("16.tif", (RAMP * 257).astype(np.uint16)),
    ("16.pgm", (RAMP * 257).astype(np.uint16)),
    ("32.tif", (RAMP * 257).astype(np.int32)),
    ("f.tif", (RAMP / 255).astype(np.float32)),
    ("8.png", RAMP.astype(np.uint8))])
def test_grey_values_of_any_depth_keep_their_levels(tmp_path, name, values):
    Image.fromarray(values).save(tmp_path / name)
    image = common.read_image(tmp_path / name, 16)
    assert np.array_equal(image.numpy(), np.stack([RAMP] * 3))


@pytest.mark.parametrize("value, kind", [
    (70_000, np.int32), (-1, np.int32),
    (1.5, np.float32), (np.nan, np.float32)])
def test_values_outside_the_range_are_refused_by_name(tmp_path, value, kind):
    Image.fromarray(np.array([[0, value]] * 2, kind)).save(tmp_path / "wide.tif")
    with pytest.raises(ValueError, match="wide.tif .*values from .* to .*, not from 0 to"):
        common.load_dataset("folder", tmp_path, 2)


HELD = {  # how a file holds what was seen, for each value of EXIF's orientation
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.swapaxes(0, 1),
    6: np.rot90,
    7: lambda seen: np.rot90(seen.swapaxes(0, 1), 2),
    8: lambda seen: np.rot90(seen, -1),
}


@pytest.mark.parametrize("turn", HELD)
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_the_orientation_of_exif_is_applied(tmp_path, turn, suffix):
    """Dark at the top left, grey at the top right of what was seen, however the file holds it."""
    seen = np.full((16, 16, 3), 200, np.uint8)
    seen[:8, :8], seen[:8, 8:] = 20, 110
    exif = Image.Exif()
    exif[0x0112] = turn
    held = np.ascontiguousarray(HELD[turn](seen))
    Image.fromarray(held).save(tmp_path / f"x.{suffix}", exif=exif)
    image = common.read_image(tmp_path / f"x.{suffix}", 16).permute(1, 2, 0)
    assert np.abs(image.numpy().astype(int) - seen).max() < 8


@pytest.mark.parametrize("mode, suffix", [
    ("RGBA", "png"), ("LA", "png"), ("RGBA", "webp"),
    ("P", "png"), ("P", "gif"), ("RGB", "png")])
def test_transparent_pixels_become_white(tmp_path, mode, suffix):
    """The colour under alpha 0 is noise that an editor left; opaque pixels stay what they are."""
    image = Image.new("RGBA", (8, 8), (200, 30, 30, 0))
    options = {"lossless": True}
    left = (0, 0, 4, 8)
    image.paste((10, 10, 10, 255), left)
    if mode == "P":
        image, options = Image.new("P", (8, 8), 1), {"transparency": 1}
        image.putpalette([10, 10, 10, 200, 30, 30])
        image.paste(0, left)
    if mode == "RGB":
        image, options = image.convert("RGB"), {"transparency": (200, 30, 30)}
    image.convert(mode).save(tmp_path / f"x.{suffix}", **options)
    image = common.read_image(tmp_path / f"x.{suffix}", 8)
    assert (image[:, :, :4] == 10).all()
    assert (image[:, :, 4:] == 255).all()


@pytest.mark.parametrize("h, w", [
    (32, 32), (32, 51), (50, 32),
    (96, 96), (301, 200), (20, 33)])
def test_ordinary_pixels_stay_as_they_are(tmp_path, h, w):
    """Bit for bit where a side has the size already; else shorter side resized and centre cut."""
    exact = min(h, w) == 32 or h == w
    image = picture(h, w) if exact else TF.resize(picture(2, 2), [h, w])
    image.save(tmp_path / "x.png")
    if min(h, w) != 32:
        image = TF.resize(image, 32)
    right = TF.pil_to_tensor(TF.center_crop(image, [32, 32])).int()
    off = (common.read_image(tmp_path / "x.png", 32).int() - right).abs().float()
    assert off.max() == 0 if exact else off.mean() < 3


def test_a_jpeg_that_is_decoded_in_part_looks_like_the_whole_one(tmp_path):
    """A JPEG that is read at a quarter of its size looks like the whole one resized."""
    smooth = TF.resize(picture(40, 60), [800, 1200])
    smooth.save(tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as whole:
        right = TF.pil_to_tensor(TF.resize(TF.center_crop(whole, 800), [64, 64])).int()
    off = (common.read_image(tmp_path / "x.jpg", 64).int() - right).abs().float()
    assert off.mean() < 1 and off.max() < 12


# ------------------------------------------------------------------------------ decoded once
@pytest.fixture
def photos(tmp_path):
    """Five pictures of several sizes in a flat folder."""
    (tmp_path / "photos").mkdir()
    for i in range(5):
        picture(20 + i, 30 - i, seed=i).save(tmp_path / f"photos/{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that are decoded from here on."""
    names, read_image = [], common.read_image

    def noted(path, size):
        names.append(path.name)
        return read_image(path, size)
    monkeypatch.setattr(common, "read_image", noted)
    return names


def arrays(folder):
    """The decoded arrays in a folder."""
    return sorted(folder.glob("decoded-*.npy"))


def test_images_are_decoded_once(photos, reads):
    first = common.load_dataset("folder", photos, 16)
    assert sorted(reads) == [f"{i}.png" for i in range(5)] and len(arrays(photos)) == 1
    again = common.load_dataset("folder", photos, 16)
    assert len(reads) == 5 and again.mean.equal(first.mean)
    assert again.train_images.equal(first.train_images)
    direct = torch.stack([common.read_image(photos / f"{i}.png", 16) for i in range(5)])
    assert first.train_images.equal(direct)
    assert np.load(*arrays(photos)).shape == (5, 3, 16, 16)  # a usual file of numpy
    smaller = common.load_dataset("folder", photos, 12)  # beside it, not instead
    assert smaller.train_images.shape == (5, 3, 12, 12)
    sizes = [path.name.split("-")[1] for path in arrays(photos)]
    assert sizes == ["12", "16"] and not [*photos.glob("*.tmp")]


@pytest.mark.parametrize("way", ["copied", "renamed"])
@pytest.mark.parametrize("cache", ["shared", "beside the images"])
def test_a_copied_or_renamed_folder_is_not_decoded_again(photos, tmp_path, reads, way, cache):
    cache_dir = tmp_path / "cache" if cache == "shared" else None
    first = common.load_dataset("folder", photos, 16, cache_dir).train_images.clone()
    if way == "copied":
        shutil.copytree(photos, tmp_path / "other")  # keeps the files' times
    else:
        photos.rename(tmp_path / "other")
    reads.clear()
    again = common.load_dataset("folder", tmp_path / "other", 16, cache_dir).train_images
    assert again.equal(first) and not reads
    assert len(arrays(cache_dir or tmp_path / "other")) == 1


CHANGES = {
    "touch": lambda root: os.utime(root / "2.png", (1, 1)),
    "replace": lambda root: picture(9, 9, seed=77).save(root / "2.png"),
    "add": lambda root: picture(seed=5).save(root / "5.png"),
    "remove": lambda root: (root / "4.png").unlink(),
    "rename": lambda root: (root / "0.png").rename(root / "9.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_gets_a_new_array_and_the_old_one_is_named(photos, capsys, change):
    common.load_dataset("folder", photos, 16)
    assert "wrote" not in capsys.readouterr().out
    [old] = arrays(photos)
    content = old.read_bytes()
    CHANGES[change](photos)
    after = common.load_dataset("folder", photos, 16).train_images
    direct = [common.read_image(path, 16) for path in sorted(photos.glob("*.png"))]
    assert after.equal(torch.stack(direct))
    [new] = {*arrays(photos)} - {old}
    assert old.read_bytes() == content  # another run may be reading it
    _, line = capsys.readouterr().out.splitlines()
    assert line.startswith(f"wrote {new}") and old.name in line
    common.load_dataset("folder", photos, 16)
    assert "wrote" not in capsys.readouterr().out  # said once, by who decodes


@pytest.mark.parametrize("suffix", [".npy", ".json"])
@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_a_damaged_array_ends_in_one_line_that_names_its_folder(photos, suffix, damage):
    common.load_dataset("folder", photos, 16)
    [array] = arrays(photos)
    path = array.with_suffix(suffix)
    path.write_bytes(path.read_bytes()[:-4] if damage == "cut" else b"")
    message = refusal(common.load_dataset, "folder", photos, 16)
    assert str(photos) in message


def test_decoded_images_may_be_kept_in_another_folder(photos, tmp_path, reads):
    for _ in range(2):
        common.load_dataset("folder", photos, 16, tmp_path / "a/b")
    assert len(reads) == 5 and len(arrays(tmp_path / "a/b")) == 1
    assert not arrays(photos)


def test_a_disk_too_small_is_refused_before_decoding(photos, monkeypatch, reads):
    usage = SimpleNamespace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = refusal(common.load_dataset, "folder", photos, 1024)
    assert "0.01 GiB needed" in message and "0.00 GiB free" in message
    assert str(photos) in message and "--cache-dir" in message and not reads
    assert not [*photos.glob("decoded-*")]


class FullDisk(io.FileIO):
    """A file on a disk that has room for its first write alone."""

    def write(self, data):
        if self.tell() > 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_disk_that_fills_while_decoding_ends_in_one_line(photos, monkeypatch, reads):
    monkeypatch.setattr(common, "open", FullDisk, raising=False)
    message = refusal(common.load_dataset, "folder", photos, 16)
    assert "No space left on device" in message and "--cache-dir" in message
    assert reads and not [*photos.glob("decoded-*")]  # neither an array nor a part of one


def test_a_cache_dir_that_cannot_be_written_is_named(photos, tmp_path):
    (tmp_path / "file").write_text("")
    message = refusal(common.load_dataset, "folder", photos, 16, tmp_path / "file")
    assert str(tmp_path / "file") in message and "--cache-dir" in message


def test_nothing_is_written_where_an_array_exists(photos, monkeypatch):
    """So a folder that may only be read needs no more than its array."""
    def state():
        return {path: path.stat().st_mtime_ns for path in (photos, *photos.iterdir())}
    common.load_dataset("folder", photos, 16)
    before = state()
    monkeypatch.setattr(common, "decode", lambda *args: pytest.fail("decodes"))
    assert len(common.load_dataset("folder", photos, 16).train_images) == 5
    assert state() == before


def test_temporary_files_of_other_processes_are_kept_and_named(photos, capsys):
    other = photos / "decoded-16-0123456789abcdef-elsewhere-1.tmp"
    other.write_text("part")
    os.utime(other, (1, 1))
    common.load_dataset("folder", photos, 16)
    assert other.exists() and other.name in capsys.readouterr().out


def test_two_processes_may_decode_one_folder_at_once(photos, monkeypatch):
    """Both write temporary files of their own, and the last rename wins."""
    begun, go, read_image = threading.Event(), threading.Event(), common.read_image

    def slow(path, size):
        if not begun.is_set():
            begun.set()
            assert go.wait(60)
        return read_image(path, size)
    monkeypatch.setattr(common, "read_image", slow)
    monkeypatch.setattr(os, "getpid", threading.get_ident)  # threads stand for processes
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(common.load_dataset, "folder", photos, 16)
        assert begun.wait(60)
        try:
            second = common.load_dataset("folder", photos, 16).train_images
            assert len([*photos.glob("*.tmp")]) == 1 and not first.done()
        finally:
            go.set()
        assert first.result().train_images.equal(second)
    assert len(arrays(photos)) == 1 and not [*photos.glob("*.tmp")]


# ------------------------------------------------------------------------------ which files
def left_out(line, word=""):
    """How many things the line about a folder counts as left out, for reasons with a word."""
    counts = ast.literal_eval(line.split("left out: ")[1])
    return sum(number for reason, number in counts.items() if word in reason)


def test_images_are_known_by_their_suffixes(tmp_path, capsys):
    put(tmp_path, "a.png", "b.gif", "c.jfif", "no_suffix", "photo.large")
    picture(8, 8).save(tmp_path / "d.TGA", "TGA")
    put(tmp_path, "._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "x/@eaDir/a.png")
    for name in ("notes.txt", "more.txt", "table.csv", "README"):
        (tmp_path / name).write_text("width,height\n1,2\n")
    (tmp_path / "link.png").symlink_to("nothing")
    for _ in range(2):  # the second does not count what the first has written
        assert loaded(tmp_path) == (4, 0)
        [line] = capsys.readouterr().out.splitlines()
        assert left_out(line) == 11 and left_out(line, "hidden") == 4
        suffixes = [left_out(line, suffix) for suffix in (".txt", ".csv", ".large", ".png")]
        assert suffixes == [2, 1, 1, 1]  # the link to nothing is the .png


def test_links_are_followed_but_not_in_circles(tmp_path, capsys):
    put(tmp_path, "photos/a/0.png", "elsewhere/1.png", "elsewhere/2.png")
    root = tmp_path / "photos"
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "a/round").symlink_to(root)
    (tmp_path / "elsewhere/back").symlink_to(root / "a")  # a circle of two links
    (root / "self").symlink_to("self")
    assert loaded(root)[0] == 4  # back/0.png is reached once more, through linked/
    assert left_out(capsys.readouterr().out, "link") == 2


def test_folders_of_runs_are_left_out(tmp_path, capsys):
    """A run draws pictures. The folder itself may be a run's, too, and a log makes no run."""
    put(tmp_path, "0.png", "runs/a/views.png", "scraped/1.png")
    (tmp_path / "checkpoint.pt").write_text("")
    (tmp_path / "runs/a/checkpoint.pt").write_text("")
    (tmp_path / "scraped/log.jsonl").write_text("")
    assert loaded(tmp_path)[0] == 2
    assert left_out(capsys.readouterr().out, "of a run") == 1


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    put(tmp_path, "a/0.png", "secret/1.png")
    iterdir = Path.iterdir

    def closed(path):
        if path.name == "secret":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return iterdir(path)
    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.raises(OSError, match="Permission denied.*secret"):
        loaded(tmp_path)


def test_a_hundred_thousand_files_are_found_in_seconds(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}").mkdir()
        for j in range(100):
            (tmp_path / f"{i}/{j}.jpg").touch()
    start = time.process_time()
    assert len(common.find_images(tmp_path, common.Counter())) == 2000
    assert time.process_time() - start < 0.4  # 50 times as many: 20 s at worst


# ------------------------------------------------------------------------------ layouts
OTHER = "no split: val has other class folders than train"
LAYOUTS = {  # files; how many to train and to test on, their labels, classes, test split
    "ImageNet": (
        "train/a/0 train/b/0 val/a/0 val/b/0 test/0",
        2, 2, [0, 1], [0, 1], "a b", "val"),
    "Tiny-ImageNet": (
        "train/n1/images/0 train/n1/n1_boxes.txt train/n2/images/0 val/images/0 val/val.txt "
        "test/images/0", 2, 0, [0, 1], None, "n1 n2", OTHER),
    "STL-10": (
        "train/a/0 train/b/0 test/a/0 test/b/0 unlabeled/0 unlabeled/1 unlabeled/2",
        2, 2, [0, 1], [0, 1], "a b", "test"),
    "valid": ("train/a/0 train/b/0 valid/b/0", 2, 1, [0, 1], [1], "a b", "valid"),
    "validation": (
        "train/a/0 train/b/0 validation/a/x/0", 2, 1, [0, 1], [0], "a b", "validation"),
    "test before val": (
        "train/a/0 train/b/0 val/a/0 val/b/0 test/b/0", 2, 1, [0, 1], [1], "a b", "test"),
    "val, as test has other classes": (
        "train/a/0 train/b/0 val/a/0 test/c/0", 2, 1, [0, 1], [0], "a b", "val"),
    "classes named otherwise in val": (
        "train/Cat/0 train/dog/0 val/cat/0 val/dog/0", 2, 0, [0, 1], None, "Cat dog", OTHER),
    "a class without test images": (
        "train/a/0 train/b/0 test/a/0", 2, 1, [0, 1], [0], "a b", "test"),
    "an empty class": (
        "train/a/0 train/b/0 train/c/ test/a/0 test/c/", 2, 1, [0, 1], [0], "a b", "test"),
    "a scraper's log in a class": (
        "train/a/0 train/a/log.jsonl train/b/0 test/a/0", 2, 1, [0, 1], [0], "a b", "test"),
    "a train folder in a class": (
        "train/a/train/0 train/b/0 test/a/0", 2, 1, [0, 1], [0], "a b", "test"),
    "capitals": (
        "Train/a/0 Train/b/0 Test/b/0 Test/b/1", 2, 2, [0, 1], [1, 1], "a b", "test"),
    "no split": ("a/0 b/0 b/x/1", 3, 0, [0, 1, 1], None, "a b", "no split"),
    "train alone": ("train/a/0 train/b/0", 2, 0, [0, 1], None, "a b", "no split"),
    "loose in train": (
        "train/a/0 train/b/0 train/0 test/a/0", 2, 1, [0, 1], [0], "a b", "test"),
    "flat train": ("train/0 train/1 test/0", 2, 0, None, None, "", "no split"),
    "one class": ("train/a/0 train/a/1 test/a/0", 2, 0, None, None, "", "no split"),
    "loose beside folders": ("a/0 b/0 0", 3, 0, None, None, "", "no split"),
}


def lay_out(root, names):
    """Folders end in a slash, names with a dot are text, all others are pictures."""
    pictures = [f"{name}.png" for name in names if "." not in name and name[-1] != "/"]
    put(root, *pictures)
    for name in names:
        if name[-1] == "/":
            (root / name).mkdir(parents=True)
        elif "." in name:
            (root / name).write_text("")
    return len(pictures)


def listed(labels):
    """Labels as a list, None if there are none."""
    return None if labels is None else labels.tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_and_classes_of_a_layout(layout, tmp_path, capsys):
    names, train, test, train_labels, test_labels, classes, split = LAYOUTS[layout]
    pictures = lay_out(tmp_path, names.split())
    data = common.load_dataset("folder", tmp_path, 8)
    assert (len(data.train_images), len(data.test_images)) == (train, test)
    assert listed(data.train_labels) == train_labels
    assert listed(data.test_labels) == test_labels
    classes = classes.split()
    assert [*data.classes] == classes
    line = capsys.readouterr().out
    assert line.startswith(f"{tmp_path}: {train} images to train on, {test} to test on")
    assert f"({split})" in line and f"{len(classes)} classes ({', '.join(classes)})" in line
    assert left_out(line, "class") == pictures - train - test


def test_an_image_keeps_the_label_of_its_folder(tmp_path):
    put(tmp_path, "train/b/0.png", "train/a/1.png", "val/b/2.png", "val/a/3.png")
    data = common.load_dataset("folder", tmp_path, 8)
    pairs = [*zip(data.train_images, data.train_labels), *zip(data.test_images, data.test_labels)]
    for number, (image, label) in enumerate(pairs):
        split = "train" if number < 2 else "val"
        [file] = (tmp_path / split / data.classes[label]).glob("*.png")
        assert image.equal(common.read_image(file, 8))


@pytest.mark.parametrize("train, test", [("train", "test"), ("Train", "Test")])
def test_a_data_set_one_level_too_deep_is_refused(tmp_path, train, test):
    """Else its test images would be trained on."""
    put(tmp_path, *[f"cub/{split}/{name}/0.png" for split in (train, test) for name in "ab"])
    message = refusal(loaded, tmp_path)
    assert str(tmp_path / "cub") in message and "--data-dir" in message
    assert loaded(tmp_path / "cub") == (2, 2)


@pytest.mark.parametrize("hidden", [".cache/train/0.png", "runs/train/0.png"])
def test_a_train_folder_among_what_is_left_out_is_no_data_set(tmp_path, hidden):
    put(tmp_path, "0.png", "1.png", hidden)
    (tmp_path / "runs").mkdir(exist_ok=True)
    (tmp_path / "runs/checkpoint.pt").write_text("")
    assert loaded(tmp_path) == (2, 0)


def test_class_names_are_compared_in_one_unicode_form(tmp_path):
    """Systems compose an accent and its letter (NFC), or keep them apart (NFD)."""
    composed, apart = "caf\u00e9", "cafe\u0301"
    put(tmp_path, f"train/{composed}/0.png", "train/tea/1.png", f"test/{apart}/2.png")
    data = common.load_dataset("folder", tmp_path, 8)
    assert data.classes == (composed, "tea") and data.test_labels.tolist() == [0]


@pytest.mark.parametrize("sides, size", [
    ([(20, 20)] * 3, 20),
    ([(224, 224)], 224),
    ([(300, 300)] * 2, 224),
    ([(20, 20), (30, 30)], 224),
    ([(20, 30)], 224)])
def test_the_default_size_is_the_common_side_of_small_squares(tmp_path, sides, size):
    (tmp_path / "broken.png").write_bytes(b"")
    for number, side in enumerate(sides):
        picture(*side).save(tmp_path / f"{number}.png")
    data = common.load_dataset("folder", tmp_path, skip_broken=True)
    assert data.train_images.shape == (len(sides), 3, size, size)


def test_only_the_first_process_of_a_run_prints(tmp_path, capsys, monkeypatch):
    put(tmp_path, "0.png")
    monkeypatch.setenv("RANK", "1")
    loaded(tmp_path)
    assert not capsys.readouterr().out


# ------------------------------------------------------------------------------ bad input
def test_all_broken_files_are_named_and_nothing_is_decoded_twice(tmp_path, reads, capsys):
    splits = ("train/a", "train/b", "val/a", "val/b")
    put(tmp_path, *[f"{split}/{i}.png" for split in splits for i in range(3)])
    whole = common.load_dataset("folder", tmp_path, 8)
    bad = ["train/a/1.png", "train/b/0.png", "val/a/2.png"]
    for name in bad:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    reads.clear()
    message = refusal(loaded, tmp_path)
    assert "cannot read 3 of 12 images" in message and "--skip-broken" in message
    assert all(f"{tmp_path / name} (" in message for name in bad)
    assert len(reads) == 12
    data = common.load_dataset("folder", tmp_path, 8, skip_broken=True)
    assert refusal(loaded, tmp_path) == message
    assert len(reads) == 12
    keep, tested = [0, 2, 4, 5], [0, 1, 3, 4, 5]
    assert data.train_images.equal(whole.train_images[keep])
    assert data.test_images.equal(whole.test_images[tested])
    assert data.train_labels.equal(whole.train_labels[keep])
    assert data.test_labels.equal(whole.test_labels[tested])
    said = capsys.readouterr().out
    assert said.count("left out 3 images that cannot be read: ") == 1
    put(tmp_path, *bad)  # mended
    assert loaded(tmp_path) == (6, 6) and len(reads) == 24


def test_a_limit_on_pixels_names_its_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    put(tmp_path, "0.png")
    picture(20, 20).save(tmp_path / "slide.png")
    message = refusal(loaded, tmp_path)
    assert "cannot read 1 of 2 images" in message and "slide.png" in message
    assert "400 pixels" in message and "--max-pixels" in message
    assert loaded(tmp_path, skip_broken=True) == (1, 0)
    assert "limit of 398 pixels" in refusal(loaded, tmp_path, max_pixels=399)
    assert loaded(tmp_path, max_pixels=400) == (2, 0)


def peak_of_decoding(root, size, said):
    """What a child process does: KiB at its peak above those before."""
    os.cpu_count = os.process_cpu_count = lambda: 2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    common.decode(sorted(root.glob("*.png")), size, root / "decoded.npy")
    said.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


@pytest.mark.parametrize("sides, count, size, limit", [
    ((80_000, 4), 1, 64, 100_000), ((8, 8), 250, 512, 120_000)])
def test_memory_of_decoding_is_bounded(sides, count, size, limit, tmp_path):
    """A long picture is cut before it is resized; not all of 250 rows (192 MB) are held."""
    for i in range(count):
        Image.new("RGB", sides).save(tmp_path / f"{i}.png")
    context = fast_start()
    said = context.Queue()
    process = context.Process(target=peak_of_decoding, args=(tmp_path, size, said))
    process.start()
    peak = said.get(timeout=60)
    assert peak < limit


# ------------------------------------------------------------------------------ identity
def test_two_folders_that_differ_in_contents_alone_get_two_arrays(tmp_path, reads):
    """Their names, the files' names, sizes and times are equal."""
    cache = tmp_path / "cache"
    for name, level in (("a", 30), ("b", 220)):
        file = tmp_path / name / "images/0.bmp"
        file.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), (level,) * 3).save(file)
        os.utime(file, (1, 1))
    for name, level in 2 * (("a", 30), ("b", 220)):
        data = common.load_dataset("folder", tmp_path / name / "images", 8, cache)
        assert (data.train_images == level).all()
    assert len(reads) == 2 and len(arrays(cache)) == 2


@pytest.mark.parametrize("way", ["in place", "another file"])
def test_new_contents_of_the_same_size_and_time_are_noticed(tmp_path, way):
    root, file = tmp_path / "photos", tmp_path / "photos/0.bmp"
    put(root, "0.bmp")
    target = file if way == "in place" else tmp_path / "new.bmp"
    for level in (30, 220):
        old = file.stat()
        Image.new("RGB", (8, 8), (level,) * 3).save(target)
        os.utime(target, ns=(old.st_atime_ns, old.st_mtime_ns))
        target.replace(file)
        assert (common.load_dataset("folder", root, 8).train_images == level).all()


# ------------------------------------------------------------------------------ sets of all kinds
def test_mean_and_std_of_many_images():
    check_mean_and_std(common.load_dataset("shapes", image_size=8))


def test_folders_that_cannot_be_trained_on_are_named(tmp_path):
    with pytest.raises((OSError, common.UserError), match="missing"):
        common.load_dataset("folder", tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert f"no images to train on in {tmp_path}" in refusal(loaded, tmp_path / "empty")


def test_images_of_one_colour_have_a_std_to_divide_by(tmp_path):
    to_pil_image(torch.zeros(3, 16, 16)).save(tmp_path / "0.png")
    data = common.load_dataset("folder", tmp_path, 16)
    assert data.std.tolist() == pytest.approx([1 / 255] * 3)
    assert common.normalize(data.train_images, data.mean, data.std).isfinite().all()


@pytest.fixture
def offline(monkeypatch):
    """A machine without a network."""
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr("urllib.request.urlopen", unreachable)


@pytest.mark.parametrize("name, file", [
    ("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz")])
def test_offline_cifar_names_the_file_to_place(offline, tmp_path, name, file):
    message = refusal(common.load_dataset, name, tmp_path)
    assert "no network" in message and "--dataset shapes" in message
    assert f"https://www.cs.toronto.edu/~kriz/{file}" in message and str(tmp_path) in message


class FakeCIFAR:
    """What load_dataset reads of torchvision's CIFAR-10: random images, more of them to train."""

    classes, url, base_folder = ["a", "b"], "https://fake", "cifar-10-batches-py"

    def __init__(self, root, train, download=False):
        count = 1500 if train else 6
        draw = np.random.default_rng(train)
        self.data = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.targets = [0, 1] * (count // 2)

    def pixels(self):
        """The images as (N, 3, 32, 32)."""
        return torch.from_numpy(self.data).permute(0, 3, 1, 2).contiguous()


def test_cifar_is_what_torchvision_reads(monkeypatch, tmp_path):
    monkeypatch.setattr(common.datasets, "CIFAR10", FakeCIFAR)
    data = common.load_dataset("cifar10", tmp_path)
    assert data.train_images.equal(FakeCIFAR(tmp_path, train=True).pixels())
    assert data.test_labels.tolist() == [0, 1] * 3 and data.classes == ("a", "b")


def test_cifar_at_another_size_fills_one_array_in_parts(monkeypatch, tmp_path):
    """A thousand images at a time, so that no second array of all of them is held."""
    counts, resize = [], TF.resize

    def noted(images, size):
        counts.append(len(images))
        return resize(images, size)
    monkeypatch.setattr(common.datasets, "CIFAR10", FakeCIFAR)
    monkeypatch.setattr(TF, "resize", noted)
    images = common.load_dataset("cifar10", tmp_path, 40).train_images
    assert counts == [1000, 500, 6]
    parts = FakeCIFAR(tmp_path, train=True).pixels().split(1000)
    assert images.equal(torch.cat([resize(part, [40, 40]) for part in parts]))
    assert images.untyped_storage().nbytes() == images.nbytes == 1500 * 3 * 40 * 40


@pytest.fixture
def small_cifar(monkeypatch, offline, tmp_path):
    """A folder with an extracted CIFAR-10 of ten images a file, right by its checksums."""
    folder = tmp_path / "data/cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]
    batch = {"data": np.zeros((10, 3072), np.uint8), "labels": [*range(10)]}
    train = [write(f"data_batch_{number}", batch) for number in range(1, 6)]
    name, checksum = write("batches.meta", {"label_names": [*"abcdefghij"]})
    kind = common.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", train)
    monkeypatch.setattr(kind, "test_list", [write("test_batch", batch)])
    monkeypatch.setattr(kind, "meta", {"filename": name, "key": "label_names", "md5": checksum})
    return folder


@pytest.mark.parametrize("named", ["data", "data/cifar-10-batches-py"])
def test_an_extracted_cifar_is_read_offline(small_cifar, tmp_path, named):
    """Also if its folder itself is named as the data directory."""
    data = common.load_dataset("cifar10", tmp_path / named)
    assert len(data.train_images) == 50 and len(data.test_images) == 10
    assert data.classes == (*"abcdefghij",)


def test_a_cifar_that_lacks_a_file_is_refused_and_kept(small_cifar):
    (small_cifar / "data_batch_3").unlink()
    files = sorted(small_cifar.iterdir())
    message = refusal(common.load_dataset, "cifar10", small_cifar)
    assert "cifar-10-python.tar.gz" in message and f"{small_cifar.parent};" in message
    assert sorted(small_cifar.iterdir()) == files


def test_an_unknown_data_set_is_refused():
    with pytest.raises(KeyError, match="imagenet"):
        common.load_dataset("imagenet")


def test_shapes_are_the_same_for_a_seed_and_balanced():
    images, labels = common.draw_shapes(200, seed=3)
    again, _ = common.draw_shapes(200, seed=3)
    other, _ = common.draw_shapes(200, seed=4)
    assert images.dtype == torch.uint8 and images.shape == (200, 3, 32, 32)
    assert images.equal(again) and not images.equal(other)
    assert labels.bincount().tolist() == [20] * 10
    data = common.load_dataset("shapes")
    assert len(data.train_images) == 6000 and len(data.test_images) == 1000
    assert len(data.classes) == 10
    train = {image.numpy().tobytes() for image in data.train_images}
    assert not any(image.numpy().tobytes() in train for image in data.test_images)


def test_colour_and_brightness_do_not_tell_the_shape():
    """The nearest class by mean colour and contrast is right one time in ten, and a little."""
    images, labels = common.draw_shapes(2000)
    std, mean = torch.std_mean(images.float(), (2, 3))
    x = torch.cat([mean, std], 1)
    x = (x - x.mean(0)) / x.std(0)
    (bank, queries), (known, right) = x.split(1000), labels.split(1000)
    centres = [bank[known == number].mean(0) for number in range(10)]
    nearest = torch.cdist(queries, torch.stack(centres)).argmin(1)
    assert (nearest == right).float().mean() < 0.35


@pytest.mark.parametrize("name", ["\u732b", os.fsdecode(b"caf\xe9")])
def test_a_name_that_the_output_cannot_show_is_printed_by_its_codes(monkeypatch, name):
    """A letter that the output's encoding lacks, or bytes of a file's name that are no letter."""
    narrow = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", narrow)
    common.say(name)
    common.say("caf\xe9")
    assert narrow.buffer.getvalue().decode("cp1252") == f"{ascii(name)}\ncaf\xe9\n"


# ------------------------------------------------------------------------------ batches
@pytest.mark.parametrize("batch", [1, 4, 10, 23, 50])
def test_batches_follow_the_order(batch):
    images = torch.arange(23, dtype=torch.uint8).view(23, 1, 1, 1)
    order = torch.randperm(23)
    made = torch.cat([*common.batches(images, order, batch, "cpu", 1)])
    assert made.equal(images[order])


@pytest.mark.parametrize("workers", [1, 3])
def test_streaming_gives_the_same_batches(workers):
    """Images that stay on the host reach the device in order; 'meta' stands for another device."""
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1)
    order, seen = torch.randperm(50), []

    class Host(torch.Tensor):
        def to(self, device, non_blocking=False):
            seen.append(self.as_subclass(torch.Tensor).clone())
            return super().to(device)
    host = images.as_subclass(Host)
    sizes = [len(x) for x in common.batches(host, order, 8, "meta", workers)]
    assert sizes == [8] * 6 + [2] and torch.cat(seen).equal(images[order])


def test_normalize_takes_bytes_and_floats_alike():
    x = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.rand(3), torch.rand(3) + 0.1
    out = common.normalize(x, mean, std)
    assert torch.allclose(out, common.normalize(x / 255, mean, std), atol=1e-6)
    green = (x[:, 1] / 255 - mean[1]) / std[1]
    assert torch.allclose(out[:, 1], green, atol=1e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for kind, error in ((torch.float64, 1e-6), (torch.float16, 1e-2)):
        other = common.normalize(x.to(kind) / 255, mean, std)
        assert other.dtype == torch.float32 and torch.allclose(other, out, atol=error)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint16, torch.bool])
def test_normalize_refuses_integers_of_an_unknown_range(kind):
    x = torch.ones(2, 3, 8, 8).to(kind)
    with pytest.raises(ValueError, match=f"uint8.*float.*{kind}"):
        common.normalize(x, torch.zeros(3), torch.ones(3))


@pytest.mark.cuda
def test_images_that_fit_live_on_the_gpu_and_others_stream(monkeypatch):
    images = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8)
    order = torch.randperm(64)
    on_device = common._to_device(images, "cuda")
    assert on_device.is_cuda
    for held in (images, on_device):
        made = torch.cat([*common.batches(held, order, 10, "cuda", 2)])
        assert made.cpu().equal(images[order])
    free = images.nbytes  # less than twice what is needed
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    assert common._to_device(images, "cuda") is images


# ------------------------------------------------------------------------------ weights
@pytest.fixture(scope="module")
def plain():
    """The weights of a small ResNet-18 in torchvision's names."""
    torch.manual_seed(0)
    return common.resnet("resnet18", 0.25, "imagenet").state_dict()


def under(prefix, weights):
    """The weights with a prefix before all names."""
    return {prefix + name: x for name, x in weights.items()}


def numbered(weights, layer1):
    """The names that an nn.Sequential of a ResNet's parts gives them, with layer1 at a number."""
    numbers = {"conv1": 0, "bn1": 1}
    numbers |= {f"layer{stage}": layer1 + stage - 1 for stage in range(1, 5)}
    parts = {name: name.partition(".") for name in weights}
    return {f"{numbers[first]}.{rest}": weights[name]
            for name, (first, _, rest) in parts.items()}


def shortcut(weights):
    """The names of SupContrast and of kuangliu's ResNets."""
    return {name.replace("downsample", "shortcut"): x for name, x in weights.items()}


HEAD = {"0.weight": torch.zeros(2, 5), "0.bias": torch.zeros(2)}
CHANNELS = torch.ones(1, 3, 1, 1)
NORMALIZER = {"new_mean": CHANNELS / 2, "new_std": CHANNELS / 4}
FILES = {  # the content, the prefix that is needed, what is left out
    "torchvision": (
        lambda plain: plain | {"fc.weight": HEAD["0.weight"]}, "", ["fc.weight"]),
    "MoCo": (
        lambda plain: {"epoch": 3, "state_dict": {
            **under("module.encoder_q.", plain), **under("module.encoder_k.", plain),
            "module.queue": torch.zeros(8, 4)}},
        "encoder_q.", ["state_dict.module.encoder_k.*", "state_dict.module.queue"]),
    "SimSiam": (
        lambda plain: {"state_dict": under("module.encoder.", plain)}, "", []),
    "SupContrast": (
        lambda plain: {"model": {
            **under("module.encoder.", shortcut(plain)), **under("module.head.", HEAD)}},
        "", ["model.module.head.*"]),
    "kuangliu": (
        lambda plain: {"net": {
            **under("module.", shortcut(plain)), "module.linear.weight": HEAD["0.weight"]}},
        "", ["net.module.linear.weight"]),
    "numbered": (
        lambda plain: under("backbone.", numbered(plain, 4)) | under("head.", HEAD),
        "", ["head.*"]),
    "numbered without max-pool": (
        lambda plain: under("f.", numbered(plain, 3)) | under("g.", HEAD), "", ["g.*"]),
    "numbered within a numbered network": (
        lambda plain: {
            **under("0.", NORMALIZER), **under("1.", numbered(plain, 4)), **under("2.", HEAD),
            **under("3.", HEAD)},
        "1.", ["0.*", "2.*", "3.*"]),
    "a normalizer beside the backbone": (
        lambda plain: {"epoch": 1, "model": {
            **under("normalizer.", NORMALIZER), **under("model.", plain)}},
        "", ["model.normalizer.new_mean", "model.normalizer.new_std"]),
    "ours": (
        lambda plain: {"backbone": plain, "model": under("f.", plain), "mean": torch.zeros(3)},
        "", ["model.f.*", "mean"]),
    "ours, of the model": (
        lambda plain: {"backbone": {}, "model": {**under("f.", plain), **under("f_k.", plain)}},
        "model.f_k.", ["model.f.*"]),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_backbone_is_found_and_what_is_left_out_is_named(kind, plain, tmp_path):
    make, prefix, others = FILES[kind]
    content = make(plain)
    torch.save(content, tmp_path / "w.pth")
    weights, saved, left = common.load_weights(tmp_path / "w.pth", prefix)
    assert weights.keys() == plain.keys() and saved.keys() == content.keys()
    assert all(weights[name].equal(x) for name, x in plain.items())
    f = common.resnet("resnet18", 0.25, "imagenet")
    common.fill_backbone(f, weights)
    assert all(x.equal(plain[name]) for name, x in f.state_dict().items())
    all_names = [name for name, _ in common.all_tensors(content)]
    assert len(left) == len(all_names) - len(plain)
    for pattern in others:
        assert any(Path(name).match(pattern) for name in left), pattern
    for name in left:
        assert any(Path(name).match(pattern) for pattern in others), name


def test_a_file_of_several_networks_names_them(plain, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(under("encoder_q.", plain) | under("encoder_k.", plain), path)
    message = refusal(common.load_weights, path)
    assert "--prefix '' fits 2 of 2 networks" in message and str(path) in message
    assert message.endswith(": encoder_q. encoder_k.")
    message = refusal(common.load_weights, path, "encoder.")
    assert "--prefix 'encoder.' fits 0 of 2 networks" in message


@pytest.mark.parametrize("content", [
    {"conv1.weight": torch.zeros(64, 1, 7, 7)}, {"fc.weight": torch.zeros(2, 3)},
    {"conv1.weight": 3}, {0: torch.zeros(3)}, {}])
def test_a_file_without_a_network_for_colour_images_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    message = refusal(common.load_weights, tmp_path / "w.pth")
    assert "fits 0 of 0 networks" in message


def test_a_folder_of_a_run_means_its_checkpoint(plain, tmp_path):
    torch.save({"backbone": plain, "model": {}}, tmp_path / "checkpoint.pt")
    weights, saved, left = common.load_weights(tmp_path)
    assert weights.keys() == plain.keys() and {*saved} == {"backbone", "model"} and not left


def test_files_of_earlier_torch_versions_are_read(plain, tmp_path):
    torch.save(plain, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert common.load_weights(tmp_path / "w.pth")[0].keys() == plain.keys()


def torch_script(path):
    torch.jit.trace(nn.Linear(3, 3), torch.zeros(1, 3)).save(path)


OTHER_FILES = {  # what writes the file, and words of the message
    "missing": (lambda path: None, "FileNotFoundError"),
    "empty": (lambda path: path.write_bytes(b""), "EOFError"),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html>"), "a web page"),
    "compressed": (lambda path: path.write_bytes(gzip.compress(b"x")), "not a dict of tensors"),
    "TorchScript": (torch_script, "TorchScript"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "TypeError"),
    "an empty folder": (Path.mkdir, "FileNotFoundError"),
    "a module": (
        lambda path: torch.save(nn.Linear(3, 3), path),
        "torch.nn.modules.linear.Linear"),
    "a value of numpy": (
        lambda path: torch.save({"lr": np.float64(0.1)}, path), "torch.save its weights alone"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OTHER_FILES)
def test_other_files_than_weights_are_refused(kind, tmp_path):
    write, words = OTHER_FILES[kind]
    write(tmp_path / "w.pth")
    message = refusal(common.read_checkpoint, tmp_path / "w.pth")
    assert message.startswith(f"{tmp_path / 'w.pth'}") and words in message


def test_weights_of_another_network_are_refused_and_listed(plain):
    lacking = {name: x for name, x in plain.items() if name != "layer3.0.conv2.weight"}
    strange = {**plain, "layer4.2.conv1.weight": torch.zeros(1)}
    wrong = {**plain, "layer1.0.conv1.weight": torch.zeros(9, 16, 3, 3)}
    f = common.resnet("resnet18", 0.25, "imagenet")
    for weights, words in (
            (lacking, 'Missing key(s) in state_dict: "layer3.0.conv2.weight"'),
            (strange, 'Unexpected key(s) in state_dict: "layer4.2.conv1.weight"'),
            (wrong, "size mismatch for layer1.0.conv1.weight")):
        with pytest.raises(common.UserError) as caught:
            common.fill_backbone(f, weights)
        message = str(caught.value)
        assert words in message
        assert all(flag in message for flag in ("--arch", "--width", "--stem"))
