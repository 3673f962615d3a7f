"""Data sets of every kind and state, and the batches made of them."""

import errno
import io
import os
import resource
import shutil
import socket
import struct
import sys
import time
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF
from torchvision.transforms.functional import to_pil_image

import common
from conftest import fast_start


def picture(h=20, w=20, mode="RGB", seed=0):
    """A PIL image of a mode, made of random pixels."""
    pixels = torch.rand(3, h, w, generator=torch.Generator().manual_seed(seed))
    return to_pil_image(pixels).convert(mode)


def test_a_labelled_folder(folder):
    data = common.load_dataset("folder", folder, 16)
    assert data.classes == ("dark", "light")
    assert data.train_images.shape == (40, 3, 16, 16) and data.train_images.dtype == torch.uint8
    assert data.test_images.shape == (12, 3, 16, 16)
    assert data.train_labels.tolist() == [0] * 20 + [1] * 20
    assert data.test_labels.tolist() == [0] * 6 + [1] * 6
    assert data.train_images[:20].float().mean() < 90 < 160 < data.train_images[20:].float().mean()
    pixels = data.train_images.double() / 255
    assert torch.allclose(data.mean.double(), pixels.mean((0, 2, 3)), atol=1e-6)
    std = pixels.permute(1, 0, 2, 3).flatten(1).std(1, unbiased=False)
    assert torch.allclose(data.std.double(), std, atol=1e-6)


def test_val_serves_as_test(folder, tmp_path):
    (tmp_path / "train").symlink_to(folder / "train")
    (tmp_path / "val").symlink_to(folder / "test")
    assert len(common.load_dataset("folder", tmp_path, 16).test_labels) == 12


@pytest.mark.parametrize("where", [".", "a", "a/b"])
def test_a_tree_without_splits_has_no_labels(tmp_path, where):
    (tmp_path / where).mkdir(parents=True, exist_ok=True)
    for i in range(3):
        picture(seed=i).save(tmp_path / where / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    data = common.load_dataset("folder", tmp_path, 16)
    assert data.train_images.shape == (3, 3, 16, 16) and data.test_images.shape == (0, 3, 16, 16)
    assert data.train_labels is None and data.test_labels is None and data.classes == ()


@pytest.mark.parametrize("mode, suffix", [
    ("RGB", "png"), ("RGB", "jpg"), ("L", "png"), ("L", "jpg"), ("RGBA", "png"), ("CMYK", "jpg"),
    ("P", "png"), ("1", "png"), ("LA", "png"), ("RGB", "webp"), ("RGB", "bmp"), ("RGB", "PPM"),
    ("RGB", "TIFF")])
@pytest.mark.parametrize("h, w", [(16, 16), (40, 16), (9, 30), (100, 61)])
def test_any_mode_and_size(tmp_path, mode, suffix, h, w):
    picture(h, w, mode).save(tmp_path / f"x.{suffix}")
    image = common.load_dataset("folder", tmp_path, 16).train_images
    assert image.shape == (1, 3, 16, 16) and image.float().std() > 5
    if mode in ("L", "1", "LA"):
        assert image[:, 0].equal(image[:, 1]) and image[:, 0].equal(image[:, 2])


def test_the_centre_is_kept_and_not_squeezed(tmp_path):
    """A wide picture with a dark left, a grey middle and a light right: only the middle stays."""
    bands = torch.cat([torch.full((3, 10, 10), v) for v in (0.0, 0.5, 1.0)], 2)
    to_pil_image(bands).save(tmp_path / "x.png")
    assert (common.load_dataset("folder", tmp_path, 10).train_images == 127).all()


@pytest.mark.parametrize("content", [b"", b"this is text", None])
def test_a_broken_image_is_named(tmp_path, content):
    if content is None:  # cut in half
        whole = io.BytesIO()
        picture(64, 64).save(whole, "JPEG")
        content = whole.getvalue()[:len(whole.getvalue()) // 2]
    picture().save(tmp_path / "good.jpg")
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(ValueError, match="bad.jpg"):
        common.load_dataset("folder", tmp_path, 16)


# ------------------------------------------------------------------------------ pixels
def read(path, size):
    """One file by `_read_image`, which answers in words if it cannot."""
    image = common._read_image(path, size)
    assert torch.is_tensor(image), image
    return image


def tiff(path, channels, bits=8, pixel=b"\7"):
    """A one-pixel TIFF of any number of channels, which PIL cannot write."""
    pixel = pixel * (channels * bits // 8)
    tags = [(256, 4, 1), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 8),
            (277, 3, channels), (278, 4, 1), (279, 4, len(pixel))]
    body = pixel + b"\0" * (len(pixel) % 2)
    ifd = struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags) + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(body)) + body + ifd)


RAMP = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize("name, values", [
    ("16.png", (RAMP * 257).astype(np.uint16)), ("16.tif", (RAMP * 257).astype(np.uint16)),
    ("16.pgm", (RAMP * 257).astype(np.uint16)), ("32.tif", (RAMP * 257).astype(np.int32)),
    ("f.tif", (RAMP / 255).astype(np.float32)), ("8.png", RAMP.astype(np.uint8))])
def test_grey_of_any_depth_has_its_levels(tmp_path, name, values):
    Image.fromarray(values).save(tmp_path / name)
    assert np.array_equal(read(tmp_path / name, 16).numpy(), np.stack([RAMP] * 3))


@pytest.mark.parametrize("value, kind", [(70_000, np.int32), (-1, np.int32), (1.5, np.float32),
                                         (np.nan, np.float32)])
def test_values_outside_the_range_are_refused_by_name(tmp_path, value, kind):
    Image.fromarray(np.array([[0, value]] * 2, kind)).save(tmp_path / "wide.tif")
    with pytest.raises(ValueError, match="wide.tif .values from .* to .*, not from 0 to"):
        common.load_dataset("folder", tmp_path, 2)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_the_orientation_of_exif_is_applied(tmp_path, turn, suffix):
    """Dark at the top left, grey at the top right of what was seen, however the file holds it."""
    seen = np.full((16, 16, 3), 200, np.uint8)
    seen[:8, :8], seen[:8, 8:] = 20, 110
    held = {1: seen, 2: seen[:, ::-1], 3: seen[::-1, ::-1], 4: seen[::-1], 5: seen.swapaxes(0, 1),
            6: np.rot90(seen), 7: np.rot90(seen.swapaxes(0, 1), 2), 8: np.rot90(seen, -1)}[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(np.ascontiguousarray(held)).save(tmp_path / f"x.{suffix}", exif=exif)
    image = read(tmp_path / f"x.{suffix}", 16).permute(1, 2, 0).numpy().astype(int)
    assert abs(image - seen).max() < 8


@pytest.mark.parametrize("mode, suffix", [("RGBA", "png"), ("LA", "png"), ("RGBA", "webp"),
                                          ("P", "png"), ("P", "gif"), ("RGB", "png")])
def test_what_is_transparent_is_white(tmp_path, mode, suffix):
    """The colour under alpha 0 is noise that an editor left; opaque pixels stay what they are."""
    image = Image.new("RGBA", (8, 8), (200, 30, 30, 0))
    image.paste((10, 10, 10, 255), (0, 0, 4, 8))
    if mode == "P":
        image = Image.new("P", (8, 8), 1)
        image.putpalette([10, 10, 10, 200, 30, 30])
        image.paste(0, (0, 0, 4, 8))
    options = {"transparency": 1} if mode == "P" else {"lossless": True}
    if mode == "RGB":
        image, options = image.convert("RGB"), {"transparency": (200, 30, 30)}
    image.convert(mode).save(tmp_path / f"x.{suffix}", **options)
    image = read(tmp_path / f"x.{suffix}", 8)
    assert (image[:, :, :4] == 10).all() and (image[:, :, 4:] == 255).all()


@pytest.mark.parametrize("h, w", [(32, 32), (32, 51), (50, 32), (96, 96), (301, 200), (20, 33)])
def test_ordinary_pixels_stay_as_they_are(tmp_path, h, w):
    """Bit for bit where a side has the size already; else shorter side resized and centre cut."""
    image = picture(h, w) if min(h, w) == 32 or h == w else TF.resize(picture(2, 2), [h, w])
    image.save(tmp_path / "x.png")
    whole = image if min(h, w) == 32 else TF.resize(image, 32)
    right = TF.pil_to_tensor(TF.center_crop(whole, [32, 32])).int()
    off = (read(tmp_path / "x.png", 32).int() - right).abs().float()
    assert off.max() == 0 if min(h, w) == 32 or h == w else off.mean() < 3


def test_draft_is_not_seen(tmp_path):
    """A JPEG that is read at a quarter of its size looks as the whole one resized."""
    smooth = TF.resize(picture(40, 60), [800, 1200])
    smooth.save(tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as whole:
        right = TF.pil_to_tensor(TF.resize(TF.center_crop(whole, 800), [64, 64])).int()
    off = (read(tmp_path / "x.jpg", 64).int() - right).abs().float()
    assert off.mean() < 1 and off.max() < 12


@pytest.mark.parametrize("channels, bits", [(5, 8), (13, 16), (3, 32)])
def test_many_channels_are_counted(tmp_path, channels, bits):
    tiff(tmp_path / "satellite.tif", channels, bits)
    with pytest.raises(ValueError, match=f"satellite.tif .*{channels} channels; supported are 1"):
        common.load_dataset("folder", tmp_path, 4)


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
    names, read = [], common._read_image
    monkeypatch.setattr(common, "_read_image",
                        lambda path, size: names.append(path.name) or read(path, size))
    return names


def test_images_are_decoded_once(photos, reads):
    first = common.load_dataset("folder", photos, 16)
    assert sorted(reads) == [f"{i}.png" for i in range(5)] and (photos / "photos-16.npy").exists()
    again = common.load_dataset("folder", photos, 16)
    assert len(reads) == 5 and again.mean.equal(first.mean)
    assert again.train_images.equal(first.train_images)
    direct = torch.stack([common._read_image(photos / f"{i}.png", 16) for i in range(5)])
    assert first.train_images.equal(direct)
    smaller = common.load_dataset("folder", photos, 12)  # beside it, not instead
    assert smaller.train_images.shape == (5, 3, 12, 12)
    assert sorted(path.name for path in photos.glob("*.npy")) == ["photos-12.npy", "photos-16.npy"]


@pytest.mark.parametrize("change", ["touch", "replace", "add", "remove", "rename", "cut", "empty"])
def test_what_changed_is_decoded_again(photos, reads, change):
    common.load_dataset("folder", photos, 16)
    reads.clear()
    cache = photos / "photos-16.npy"
    {"touch": lambda: os.utime(photos / "2.png", (1, 1)),
     "replace": lambda: picture(9, 9, seed=77).save(photos / "2.png"),
     "add": lambda: picture(seed=5).save(photos / "5.png"), "remove": (photos / "4.png").unlink,
     "rename": lambda: (photos / "0.png").rename(photos / "9.png"),
     "cut": lambda: cache.write_bytes(cache.read_bytes()[:-40]),
     "empty": lambda: cache.write_bytes(b"")}[change]()
    after = common.load_dataset("folder", photos, 16).train_images
    files = sorted(path.name for path in photos.glob("*.png"))
    again = {"touch": {"2.png"}, "replace": {"2.png"}, "add": {"5.png"}, "remove": set(),
             "rename": {"9.png"}}.get(change, {*files})  # and no other
    assert {*reads} == again and len(after) == len(files)
    direct = torch.stack([common._read_image(photos / name, 16) for name in files])
    assert after.equal(direct)


def test_decoded_images_in_another_folder(photos, tmp_path, reads):
    for _ in range(2):
        common.load_dataset("folder", photos, 16, tmp_path / "a/b")
    assert len(reads) == 5 and len([*(tmp_path / "a/b").glob("photos-16-????????.npy")]) == 1
    assert not [*photos.glob("*.npy")]


def test_a_disk_too_small_is_refused_at_once(photos, monkeypatch, reads):
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr(common.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="need 0.01 GiB in .*, which has 0.00 GiB.*--cache-dir"):
        common.load_dataset("folder", photos, 1024)
    assert not reads and not [*photos.glob("*.npy"), *photos.glob("*.tmp"), *photos.glob(".*.tmp")]


def test_nothing_is_left_of_what_failed(photos, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(common.np, "save", full)
    with pytest.raises(ValueError, match="No space left on device.*--cache-dir"):
        common.load_dataset("folder", photos, 16)
    assert not [*photos.glob("*.npy"), *photos.glob("*.tmp"), *photos.glob(".*.tmp")]


def test_a_cache_that_cannot_be_written(photos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--cache-dir"):
        common.load_dataset("folder", photos, 16, tmp_path / "file")


# ------------------------------------------------------------------------------ which files
def put(root, *names):
    """A small picture at each of these names, of whatever suffix."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(8, 8, seed=i).save(root / name, "PNG")


def loaded(root, **more):
    """How many images a folder has to train and to test on."""
    data = common.load_dataset("folder", root, 8, **more)
    return len(data.train_images), len(data.test_images)


def test_every_file_that_pil_opens_counts_and_no_other(tmp_path, capsys):
    put(tmp_path, "a.png", "b.gif", "c.jfif", "no_suffix", "photo.large", "d.TGA")
    picture(8, 8).save(tmp_path / "d.TGA", "TGA")
    put(tmp_path, "._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "x/@eaDir/a.png")
    for name in ("notes.txt", "more.txt", "table.csv", "README", "photos.h5"):
        (tmp_path / name).write_text("width,height\n1,2\n")
    for _ in range(2):  # what the first leaves is not told about
        assert loaded(tmp_path) == (6, 0)
        said = capsys.readouterr().out
        assert said.count("\n") == 1
        left = sorted(said.strip().split("left out: ")[1].split(", "))
        assert left == ["1 .csv that PIL cannot open", "1 .h5 that PIL cannot open",
                        "1 without a suffix that PIL cannot open", "2 .txt that PIL cannot open",
                        "4 hidden or a system's"]


def test_links_are_followed_and_loops_are_not(tmp_path, capsys):
    put(tmp_path, "photos/a/0.png", "elsewhere/1.png", "elsewhere/2.png")
    root = tmp_path / "photos"
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "a/round").symlink_to(root)
    (tmp_path / "elsewhere/back").symlink_to(root / "a")  # a loop of two links
    (root / "self").symlink_to("self")
    assert loaded(root)[0] == 4  # back/0.png is reached once more, through linked/
    assert "link to a folder around it" in capsys.readouterr().out


def test_pictures_of_a_run_are_left_out(tmp_path, capsys):
    put(tmp_path, "0.png", "runs/a/views.png", "runs/b/map.png")
    (tmp_path / "runs/a/checkpoint.pt").write_text("")
    (tmp_path / "runs/b/log.jsonl").write_text("")
    (tmp_path / "log.jsonl").write_text("")  # --out . is a run, too, but has the images
    assert loaded(tmp_path)[0] == 1 and "2 folder of a run" in capsys.readouterr().out


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    put(tmp_path, "a/0.png", "secret/1.png")
    scan = os.scandir

    def closed(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)
    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(ValueError, match="secret .Permission denied"):
        loaded(tmp_path)
    assert loaded(tmp_path, skip_broken=True)[0] == 1


def test_a_hundred_thousand_files_are_found_in_seconds(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}").mkdir()
        for j in range(100):
            (tmp_path / f"{i}/{j}.jpg").touch()
    start = time.process_time()
    assert len(common._scan(tmp_path)[0]) == 2000
    assert time.process_time() - start < 0.4  # 50 times as many: 20 s at worst


# ------------------------------------------------------------------------------ layouts
LAYOUTS = {  # files, and what is understood: train and test images, classes, labels of the two
    "ImageNet": ("train/a/0 train/b/0 val/a/0 val/b/0 test/0", (2, 2, "a b", [0, 1], [0, 1])),
    "valid": ("train/a/0 train/b/0 valid/b/0", (2, 1, "a b", [0, 1], [1])),
    "validation": ("train/a/0 train/b/0 validation/a/x/0", (2, 1, "a b", [0, 1], [0])),
    "test before val": ("train/a/0 train/b/0 val/a/0 val/b/0 test/b/0", (2, 1, "a b", [0, 1], [1])),
    "a class without test images": ("train/a/0 train/b/0 test/a/0", (2, 1, "a b", [0, 1], [0])),
    "an empty class": ("train/a/0 train/b/0 train/c/ test/a/0 test/c/", (2, 1, "a b", [0, 1], [0])),
    "capitals": ("Train/a/0 Train/b/0 Test/b/0 Test/b/1", (2, 2, "a b", [0, 1], [1, 1])),
    "no split": ("a/0 b/0 b/x/1", (3, 0, "a b", [0, 1, 1], None)),
    "train alone": ("train/a/0 train/b/0", (2, 0, "a b", [0, 1], None)),
    "loose in train": ("train/a/0 train/b/0 train/0 test/a/0", (2, 1, "a b", [0, 1], [0])),
    "flat train": ("train/0 train/1 test/0", (2, 0, "", None, None)),
    "one class": ("train/a/0 train/a/1 test/a/0", (2, 0, "", None, None)),
    "loose beside folders": ("a/0 b/0 0", (3, 0, "", None, None))}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path, capsys):
    names, (train, test, classes, train_labels, test_labels) = LAYOUTS[layout]
    for name in names.split():
        (tmp_path / name).mkdir(parents=True) if name[-1] == "/" else put(tmp_path, f"{name}.png")
    data = common.load_dataset("folder", tmp_path, 8)
    assert (len(data.train_images), len(data.test_images)) == (train, test)
    labels = [x if x is None else x.tolist() for x in (data.train_labels, data.test_labels)]
    assert [" ".join(data.classes), *labels] == [classes, train_labels, test_labels]
    count = len(classes.split())
    judged, said = f"{test} of " if test else "none to test on", capsys.readouterr().out
    assert f"{train} images of {count} classes to train on, {judged}" in said
    left = len([name for name in names.split() if name[-1] != "/"]) - train - test
    assert said.endswith(f"left out: {left} of no class or another split\n" if left else
                         "left out: nothing\n")


def test_only_one_process_of_a_run_talks(tmp_path, capsys, monkeypatch):
    put(tmp_path, "0.png")
    monkeypatch.setenv("RANK", "1")
    loaded(tmp_path)
    assert not capsys.readouterr().out


# ------------------------------------------------------------------------------ bad input
def test_all_broken_files_are_named_at_once(tmp_path, reads, capsys):
    """Nothing is decoded twice: neither to go on without them, nor after one was mended."""
    names = [f"{split}/{i}.png" for split in ("train/a", "train/b", "val/a", "val/b")
             for i in range(3)]
    put(tmp_path, *names)
    whole = loaded(tmp_path) and common.load_dataset("folder", tmp_path, 8)
    (tmp_path / f"{tmp_path.name}-8.npy").unlink()
    bad = ["train/a/1.png", "train/b/0.png", "val/a/2.png"]
    for name in bad:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    (tmp_path / "val/b/9.jpg").symlink_to("nothing")
    reads.clear()
    with pytest.raises(ValueError, match="cannot read 4 of 13 images.*--skip-broken") as caught:
        loaded(tmp_path)
    assert all(name in str(caught.value) for name in [*bad, "val/b/9.jpg"])
    assert {"0.png", "1.png", "2.png"} < {*reads} and "\n" not in str(caught.value)
    reads.clear()
    data = common.load_dataset("folder", tmp_path, 8, skip_broken=True)
    assert sorted(reads) == ["0.png", "1.png", "2.png", "9.jpg"]  # perhaps they were mended
    keep, tested = [0, 2, 4, 5], [0, 1, 3, 4, 5]
    assert data.train_images.equal(whole.train_images[keep])
    assert data.test_images.equal(whole.test_images[tested])
    assert data.train_labels.equal(whole.train_labels[keep])
    assert data.test_labels.equal(whole.test_labels[tested])
    assert "left out 4 that cannot be read" in capsys.readouterr().out
    (tmp_path / "val/b/9.jpg").unlink()
    put(tmp_path, *bad)
    reads.clear()
    assert loaded(tmp_path) == (6, 6) and {*reads} == {"0.png", "1.png", "2.png"} and len(reads) < 8


def test_a_limit_on_pixels_names_its_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    put(tmp_path, "0.png")
    picture(20, 20).save(tmp_path / "slide.png")
    with pytest.raises(ValueError, match="1 of 2 .*slide.png.*400 pixels.*--max-pixels"):
        loaded(tmp_path)
    with pytest.raises(ValueError, match="limit of 398 pixels"):
        loaded(tmp_path, max_pixels=399)
    assert loaded(tmp_path, skip_broken=True) == (1, 0)
    assert loaded(tmp_path, max_pixels=400, skip_broken=True) == (2, 0)


def peak_of_decoding(root, size, said):
    """What a child process does: KiB at its peak above those before."""
    common.os.cpu_count = lambda: 2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    common._decoded(sorted(root.glob("*.png")), root, size, root / "x.npy")
    said.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


@pytest.mark.parametrize("sides, count, size, limit", [
    ((40_000, 4), 1, 64, 200_000), ((8, 8), 48, 2048, 300_000)])  # seen: 205_000, of any count
def test_memory_is_bounded(sides, count, size, limit, tmp_path):
    """A long picture is cut before it is resized; not half of 48 large ones (600 MB) are held."""
    for i in range(count):
        Image.new("RGB", sides).save(tmp_path / f"{i}.png")
    context = fast_start()
    said = context.Queue()
    context.Process(target=peak_of_decoding, args=(tmp_path, size, said)).start()
    assert said.get(timeout=60) < limit


# ------------------------------------------------------------------------------ identity
def test_folders_of_one_name_share_a_cache_dir(tmp_path, reads):
    for i, name in enumerate(("a", "b")):
        (tmp_path / name / "images").mkdir(parents=True)
        Image.new("RGB", (8, 8), (30 + 190 * i,) * 3).save(tmp_path / name / "images/0.bmp")
        os.utime(tmp_path / name / "images/0.bmp", (1, 1))
    for _ in range(2):
        for i, name in enumerate(("a", "b")):
            data = common.load_dataset("folder", tmp_path / name / "images", 8, tmp_path / "cache")
            assert (data.train_images == 30 + 190 * i).all()
    assert len(reads) == 2


@pytest.mark.parametrize("way", ["in place", "another file"])
def test_a_file_of_the_same_size_and_time_is_noticed(tmp_path, way):
    root, file = tmp_path / "photos", tmp_path / "photos/0.bmp"
    put(root, "0.bmp")
    for level in (30, 220):
        old = file.stat()
        target = file if way == "in place" else tmp_path / "new.bmp"
        Image.new("RGB", (8, 8), (level,) * 3).save(target)
        os.utime(target, ns=(old.st_atime_ns, old.st_mtime_ns))
        target.replace(file)
        assert (common.load_dataset("folder", root, 8).train_images == level).all()


def test_another_decoders_cache_is_not_taken(photos, reads, monkeypatch):
    """What an older version left, an array with a digest behind, is decoded again."""
    with open(photos / "photos-16.npy", "wb") as file:
        np.save(file, np.zeros((5, 3, 16, 16), np.uint8))
        file.write(bytes(range(32)))
    assert common.load_dataset("folder", photos, 16).train_images.float().mean() > 50


def test_parts_of_the_dead_are_removed_and_others_kept(photos):
    old, living = photos / "photos-16.elsewhere-1.tmp", photos / ".photos-16.elsewhere-2.tmp"
    for part in (old, living):
        part.write_text("part")
    os.utime(old, (1, 1))
    common.load_dataset("folder", photos, 16)
    assert [path.name for path in photos.glob("*.tmp")] == [living.name]


# ------------------------------------------------------------------------------ locks
def test_the_cache_of_a_folder_that_is_read_only(photos, monkeypatch, reads):
    common.load_dataset("folder", photos, 16)
    reads.clear()
    monkeypatch.setattr(common, "locked", lambda *a, **k: pytest.fail("locked"))
    assert len(common.load_dataset("folder", photos, 16).train_images) == 5 and not reads


def test_a_lock_of_the_run_does_not_stop_the_decoder(photos):
    """--data-dir . --out . locks a log in the folder of the images."""
    with common.locked(photos / "log.jsonl", wait=False), common.locked(photos / ".lock"):
        assert loaded(photos)[0] == 5


def test_a_lock_is_held_by_one(tmp_path):
    with common.locked(tmp_path / "x") as file:
        file.write("line\n")
        with pytest.raises(common.UserError):
            common.locked(tmp_path / "x", wait=False)
    with common.locked(tmp_path / "x", wait=False) as file:
        file.seek(0)
        assert file.read() == "line\n"


def decode(photos, locks, said, begun, go):
    """What a child process does: it tells what it prints, waits while it decodes, and sums up."""
    def no_locks(*args):
        raise OSError(errno.EBADF, "Bad file descriptor")

    def slow(*args):
        begun.set()
        assert go.wait(60)
        return read_image(*args)
    read_image, common._read_image = common._read_image, slow

    def tell(*words, file=None, **options):
        print(*words, file=file, **options) if file else said.put(" ".join(map(str, words)))
    common.print = tell
    if not locks:
        common.fcntl.flock = no_locks
    said.put(common.load_dataset("folder", photos, 16).train_images.sum().item())


def child(photos, locks, go):
    """A process that decodes, what it says, whether it has begun, and the order to go on."""
    context = fast_start()
    said, begun, order = context.Queue(), context.Event(), context.Event()
    process = context.Process(target=decode, args=(photos, locks, said, begun, order))
    if go:
        order.set()
    process.start()
    assert said.get(timeout=60).endswith("left out: nothing")
    return process, said, begun, order


def test_of_two_processes_one_decodes_and_the_other_says_for_whom_it_waits(photos):
    first, said, begun, go = child(photos, locks=True, go=False)
    assert begun.wait(60)
    _, others, theirs, _ = child(photos, locks=True, go=True)
    owner = f"process {first.pid} on {socket.gethostname()}"
    assert others.get(timeout=60) == f"waiting for {owner} at {photos / '.photos-16.lock'}"
    go.set()
    assert said.get(timeout=60) == others.get(timeout=60) and not theirs.is_set()


def test_without_locks_no_process_stops_another(photos):
    """As on NFS: the second decodes, too, and leaves the part of the first, which is alive."""
    _, said, begun, go = child(photos, locks=False, go=False)
    assert begun.wait(60)
    process, others, theirs, _ = child(photos, locks=False, go=True)
    result = others.get(timeout=60)
    process.join()
    assert theirs.is_set() and len([*photos.glob(".photos-16.*.tmp")]) == 1
    go.set()
    assert said.get(timeout=60) == result and not [*photos.glob(".*.tmp")]


def test_a_part_that_vanished_was_anothers_to_finish(photos, tmp_path, monkeypatch):
    """Another process finishes, removes our part as a dead one's, and we take its array."""
    other = tmp_path / "other.npy"
    whole = common.load_dataset("folder", photos, 16).train_images.clone()
    (photos / "photos-16.npy").rename(other)
    replace = os.replace

    def late(part, path):
        os.unlink(part)
        shutil.copy(other, path)
        replace(part, path)
    monkeypatch.setattr(os, "replace", late)
    assert common.load_dataset("folder", photos, 16).train_images.equal(whole)
    monkeypatch.setattr(os, "replace", lambda part, path: (os.unlink(part), replace(part, path)))
    picture(seed=9).save(photos / "0.png")
    with pytest.raises(ValueError, match="changed while its images were decoded"):
        common.load_dataset("folder", photos, 16)


def test_cifar_in_a_folder_that_is_read_only(monkeypatch, tmp_path):
    monkeypatch.setattr(common.datasets, "CIFAR10", Fake)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(common, "locked", lambda *a, **k: pytest.fail("locked"))
    assert len(common.load_dataset("cifar10", tmp_path).train_images) == 6


# ------------------------------------------------------------------------------ sets of all kinds
def test_mean_and_std_of_many_images():
    """Summed in parts: as of all pixels at once."""
    data = common.load_dataset("shapes", image_size=8)
    pixels = data.train_images.double() / 255
    assert torch.allclose(data.mean.double(), pixels.mean((0, 2, 3)), atol=1e-6)
    std = pixels.permute(1, 0, 2, 3).flatten(1).std(1, unbiased=False)
    assert torch.allclose(data.std.double(), std, atol=1e-6)


def test_folders_that_cannot_work(folder, tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        common.load_dataset("folder", tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        common.load_dataset("folder", tmp_path / "empty")
    put(tmp_path / "odd", "train/cat/0.png", "train/dog/0.png", "test/cat/0.png", "test/cow/0.png")
    with pytest.raises(ValueError, match="class 'cow' of .*test is not in .*train"):
        common.load_dataset("folder", tmp_path / "odd")


def test_one_colour_has_a_std_to_divide_by(tmp_path):
    to_pil_image(torch.zeros(3, 16, 16)).save(tmp_path / "0.png")
    data = common.load_dataset("folder", tmp_path, 16)
    assert data.std.tolist() == pytest.approx([1 / 255] * 3)
    assert common.normalize(data.train_images, data.mean, data.std).isfinite().all()


@pytest.mark.parametrize("name, file", [("cifar10", "cifar-10-python.tar.gz"),
                                        ("cifar100", "cifar-100-python.tar.gz")])
def test_offline_cifar_names_the_file_to_place(monkeypatch, tmp_path, name, file):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", offline)
    with pytest.raises(ValueError, match=f"{file} in {tmp_path}.*--dataset shapes") as caught:
        common.load_dataset(name, tmp_path)
    assert "\n" not in str(caught.value)


class Fake:
    """What torchvision reads of CIFAR."""

    classes = ["a", "b"]

    def __init__(self, root, train, download):
        self.data = np.random.default_rng(train).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
        self.targets = [0, 1] * 3


def test_cifar_through_torchvision(monkeypatch, tmp_path):
    """The arrays torchvision reads, as (N, 3, H, W); resized when asked."""
    monkeypatch.setattr(common.datasets, "CIFAR10", Fake)
    data = common.load_dataset("cifar10", tmp_path)
    right = torch.from_numpy(Fake(0, True, True).data).permute(0, 3, 1, 2)
    assert data.train_images.equal(right)
    assert data.test_labels.tolist() == [0, 1] * 3 and data.classes == ("a", "b")
    assert common.load_dataset("cifar10", tmp_path, 16).train_images.shape == (6, 3, 16, 16)


def test_unknown_dataset():
    with pytest.raises(ValueError, match="shapes"):
        common.load_dataset("imagenet")


def test_shapes_are_the_same_for_a_seed_and_balanced():
    images, labels = common.draw_shapes(200, seed=3)
    again, other = common.draw_shapes(200, seed=3)[0], common.draw_shapes(200, seed=4)[0]
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
    x = torch.cat([images.float().mean((2, 3)), images.float().std((2, 3))], 1)
    x = (x - x.mean(0)) / x.std(0)
    centres = torch.stack([x[:1000][labels[:1000] == c].mean(0) for c in range(10)])
    assert (torch.cdist(x[1000:], centres).argmin(1) == labels[1000:]).float().mean() < 0.35


def test_a_name_that_the_output_lacks_is_said_by_its_codes(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", narrow)
    common.say("caf\xe9 \u732b\nend")
    common.say("caf\xe9")
    assert narrow.buffer.getvalue().decode("cp1252") == "caf\\xe9 \\u732b\nend\ncaf\xe9\n"


@pytest.mark.parametrize("batch", [1, 4, 10, 23, 50])
def test_batches_follow_the_order(batch):
    images = torch.arange(23, dtype=torch.uint8).view(23, 1, 1, 1)
    order = torch.randperm(23)
    assert torch.equal(torch.cat([*common.batches(images, order, batch, "cpu")]), images[order])


def test_streaming_gives_the_same_batches():
    """Images that stay on the host reach the device in order; 'meta' stands for another device."""
    images, order = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1), torch.randperm(50)
    seen = []

    class Host(torch.Tensor):
        def to(self, device, non_blocking=False):
            seen.append(self.as_subclass(torch.Tensor).clone())
            return super().to(device)
    for workers in (1, 3):
        seen.clear()
        host = images.as_subclass(Host)
        sizes = [len(x) for x in common.batches(host, order, 8, "meta", workers)]
        assert sizes == [8] * 6 + [2] and torch.equal(torch.cat(seen), images[order])


def test_normalize_takes_bytes_and_floats_alike():
    x = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.rand(3), torch.rand(3) + 0.1
    out = common.normalize(x, mean, std)
    assert torch.allclose(out, common.normalize(x / 255, mean, std), atol=1e-6)
    assert torch.allclose(out[:, 1], (x[:, 1] / 255 - mean[1]) / std[1], atol=1e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.cuda
def test_images_that_fit_live_on_the_gpu_and_others_stream():
    images, order = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8), torch.randperm(64)
    assert common.resident(images, "cuda").is_cuda
    for held in (images, images.cuda()):
        there = torch.cat([*common.batches(held, order, 10, "cuda")])
        assert there.cpu().equal(images[order])
