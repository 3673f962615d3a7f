"""Data sets of every kind and state, and the batches made of them."""

import io
import os
import subprocess
import sys
import urllib.error

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import to_pil_image

import common
from conftest import ROOT


def picture(h=20, w=20, mode="RGB", seed=0):
    """A PIL image of a mode, made of random pixels."""
    pixels = torch.rand(3, h, w, generator=torch.Generator().manual_seed(seed))
    return to_pil_image(pixels).convert(mode)


def test_a_labelled_folder(folder):
    data = common.load_dataset("folder", folder, 16)
    assert data.classes == ("dark", "light")
    assert data.train_images.shape == (40, 3, 16, 16) and data.train_images.dtype == torch.uint8
    assert data.test_images.shape == (12, 3, 16, 16)
    assert data.train_labels.tolist() == [0] * 20 + [1] * 20 and data.test_labels.tolist() == [0] * 6 + [1] * 6
    assert data.train_images[:20].float().mean() < 90 < 160 < data.train_images[20:].float().mean()
    pixels = data.train_images.double() / 255
    assert torch.allclose(data.mean.double(), pixels.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(data.std.double(), pixels.permute(1, 0, 2, 3).flatten(1).std(1, unbiased=False), atol=1e-6)


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


@pytest.mark.parametrize("mode, suffix", [("RGB", "png"), ("RGB", "jpg"), ("L", "png"), ("L", "jpg"), ("RGBA", "png"),
                                          ("CMYK", "jpg"), ("P", "png"), ("1", "png"), ("LA", "png"), ("RGB", "webp"),
                                          ("RGB", "bmp"), ("RGB", "PPM"), ("RGB", "TIFF")])
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
    monkeypatch.setattr(common, "_read_image", lambda path, size: names.append(path.name) or read(path, size))
    return names


def test_images_are_decoded_once(photos, reads):
    first = common.load_dataset("folder", photos, 16)
    assert sorted(reads) == [f"{i}.png" for i in range(5)] and (photos / "photos-16.npy").exists()
    again = common.load_dataset("folder", photos, 16)
    assert len(reads) == 5 and again.train_images.equal(first.train_images) and again.mean.equal(first.mean)
    direct = torch.stack([common._read_image(photos / f"{i}.png", 16) for i in range(5)])
    assert first.train_images.equal(direct)
    assert common.load_dataset("folder", photos, 12).train_images.shape == (5, 3, 12, 12)  # beside it, not instead
    assert sorted(path.name for path in photos.glob("*.npy")) == ["photos-12.npy", "photos-16.npy"]


@pytest.mark.parametrize("change", ["touch", "replace", "add", "remove", "rename", "cut", "empty"])
def test_what_changed_is_decoded_again(photos, reads, change):
    before = common.load_dataset("folder", photos, 16).train_images.clone()
    reads.clear()
    cache = photos / "photos-16.npy"
    {"touch": lambda: os.utime(photos / "2.png", (1, 1)), "replace": lambda: picture(9, 9, seed=77).save(photos / "2.png"),
     "add": lambda: picture(seed=5).save(photos / "5.png"), "remove": (photos / "4.png").unlink,
     "rename": lambda: (photos / "0.png").rename(photos / "9.png"), "cut": lambda: cache.write_bytes(cache.read_bytes()[:-40]),
     "empty": lambda: cache.write_bytes(b"")}[change]()
    after = common.load_dataset("folder", photos, 16).train_images
    assert len(reads) == len(after) == {"add": 6, "remove": 4}.get(change, 5)
    order = [1, 2, 3, 4, 0] if change == "rename" else [*range(min(5, len(after)))]
    same = [after[i].equal(before[j]) for i, j in enumerate(order)]
    assert same == [change != "replace" or i != 2 for i in range(len(order))]


def test_decoded_images_in_another_folder(photos, tmp_path, reads):
    for _ in range(2):
        common.load_dataset("folder", photos, 16, tmp_path / "a/b")
    assert len(reads) == 5 and (tmp_path / "a/b/photos-16.npy").exists() and not [*photos.glob("*.npy")]


def test_nothing_is_left_of_what_failed(photos, monkeypatch):
    (photos / "9.png").write_text("not an image")
    with pytest.raises(ValueError, match="9.png"):
        common.load_dataset("folder", photos, 16)
    monkeypatch.setattr(common.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**20}))
    with pytest.raises(ValueError, match="need 0.02 GiB in .*, which has 0.00 GiB free.*--cache-dir"):
        common.load_dataset("folder", photos, 1024)
    assert sorted(path.name for path in photos.iterdir()) == ["0.png", "1.png", "2.png", "3.png", "4.png", "9.png"]


def test_a_cache_that_cannot_be_written(photos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--cache-dir"):
        common.load_dataset("folder", photos, 16, tmp_path / "file")


def test_two_processes_decode_once(photos, tmp_path):
    """Both start together; each decoding is counted by a line in a file."""
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import common
decode = common._decode
def counted(*args):
    open({str(tmp_path / 'count')!r}, 'a').write('once\\n')
    time.sleep(1)
    decode(*args)
common._decode = counted
print('ready', flush=True)
input()
print(common.load_dataset('folder', {str(photos)!r}, 16).train_images.sum().item())
"""
    both = [subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert all(process.stdout.readline() == "ready\n" for process in both)
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    said = {process.communicate()[0] for process in both}
    assert len(said) == 1 and (tmp_path / "count").read_text() == "once\n"


def test_mean_and_std_of_many_images():
    """Summed in parts: as of all pixels at once."""
    data = common.load_dataset("shapes", image_size=8)
    pixels = data.train_images.double() / 255
    assert torch.allclose(data.mean.double(), pixels.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(data.std.double(), pixels.permute(1, 0, 2, 3).flatten(1).std(1, unbiased=False), atol=1e-6)


def test_folders_that_cannot_work(folder, tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        common.load_dataset("folder", tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        common.load_dataset("folder", tmp_path / "empty")
    root = tmp_path / "odd"
    for part in ("train/cat", "train/dog", "test/cat"):
        (root / part).mkdir(parents=True)
        picture().save(root / part / "0.png")
    with pytest.raises(ValueError, match="'dog'"):
        common.load_dataset("folder", root)
    (root / "test/dog").mkdir()
    with pytest.raises(ValueError, match="no images in .*test/dog"):
        common.load_dataset("folder", root)


def test_one_colour_has_a_std_to_divide_by(tmp_path):
    to_pil_image(torch.zeros(3, 16, 16)).save(tmp_path / "0.png")
    data = common.load_dataset("folder", tmp_path, 16)
    assert data.std.tolist() == pytest.approx([1 / 255] * 3)
    assert common.normalize(data.train_images, data.mean, data.std).isfinite().all()


@pytest.mark.parametrize("name, file", [("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz")])
def test_offline_cifar_names_the_file_to_place(monkeypatch, tmp_path, name, file):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", offline)
    with pytest.raises(ValueError, match=f"{file} in {tmp_path}.*--dataset shapes") as caught:
        common.load_dataset(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_cifar_through_torchvision(monkeypatch, tmp_path):
    """The arrays torchvision reads, as (N, 3, H, W); resized when asked."""
    class Fake:
        classes = ["a", "b"]

        def __init__(self, root, train, download):
            self.data = np.random.default_rng(train).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
            self.targets = [0, 1] * 3
    monkeypatch.setattr(common.datasets, "CIFAR10", Fake)
    data = common.load_dataset("cifar10", tmp_path)
    assert torch.equal(data.train_images, torch.from_numpy(Fake(0, True, True).data).permute(0, 3, 1, 2))
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
    assert len(data.train_images) == 6000 and len(data.test_images) == 1000 and len(data.classes) == 10
    train = {image.numpy().tobytes() for image in data.train_images}
    assert not any(image.numpy().tobytes() in train for image in data.test_images)


def test_colour_and_brightness_do_not_tell_the_shape():
    """The nearest class by mean colour and contrast is right one time in ten, and a little."""
    images, labels = common.draw_shapes(2000)
    x = torch.cat([images.float().mean((2, 3)), images.float().std((2, 3))], 1)
    x = (x - x.mean(0)) / x.std(0)
    centres = torch.stack([x[:1000][labels[:1000] == c].mean(0) for c in range(10)])
    assert (torch.cdist(x[1000:], centres).argmin(1) == labels[1000:]).float().mean() < 0.35


@pytest.mark.parametrize("batch", [1, 4, 10, 23, 50])
def test_batches_follow_the_order(batch):
    images = torch.arange(23, dtype=torch.uint8).view(23, 1, 1, 1)
    order = torch.randperm(23)
    assert torch.equal(torch.cat([*common.batches(images, order, batch, "cpu")]), images[order])
    assert not [*common.batches(images, order[:0], batch, "cpu")]


def test_streaming_gives_the_same_batches():
    """Images that stay on the host reach the device in order; 'meta' stands for a device that is not the host."""
    images, order, seen = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1), torch.randperm(50), []

    class Host(torch.Tensor):
        def to(self, device, non_blocking=False):
            seen.append(self.as_subclass(torch.Tensor).clone())
            return super().to(device)
    for workers in (1, 3):
        seen.clear()
        sizes = [len(x) for x in common.batches(images.as_subclass(Host), order, 8, "meta", workers)]
        assert sizes == [8] * 6 + [2] and torch.equal(torch.cat(seen), images[order])


def test_normalize_takes_bytes_and_floats_alike():
    x, mean, std = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8), torch.rand(3), torch.rand(3) + 0.1
    out = common.normalize(x, mean, std)
    assert torch.allclose(out, common.normalize(x / 255, mean, std), atol=1e-6)
    assert torch.allclose(out[:, 1], (x[:, 1] / 255 - mean[1]) / std[1], atol=1e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.cuda
def test_images_that_fit_live_on_the_gpu_and_others_stream():
    images, order = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8), torch.randperm(64)
    assert common.resident(images, "cuda").is_cuda
    for held in (images, images.cuda()):
        assert torch.equal(torch.cat([*common.batches(held, order, 10, "cuda")]).cpu(), images[order])
