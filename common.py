"""Data loading and ResNet backbones for the four methods.

Each script needs only this file beside it: to copy a method, copy both files. Images are
uint8 tensors (N, 3, H, W). A small data set stays whole on the device. Of a large one,
only a batch at a time goes there.
"""
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors

import hashlib
import json
import math
import os
import re
import shutil
import socket
import sys
import time
import unicodedata
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torchvision import datasets, models
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.transforms import functional as TF

DATASETS = ("cifar10", "cifar100", "folder", "shapes")
ARCHS = {  # type of block, and the number of blocks in each of the four stages
    "resnet18": (BasicBlock, 2, 2, 2, 2),
    "resnet34": (BasicBlock, 3, 4, 6, 3),
    "resnet50": (Bottleneck, 3, 4, 6, 3),
    "resnet101": (Bottleneck, 3, 4, 23, 3),
    "resnet152": (Bottleneck, 3, 8, 36, 3),
}
SHAPES = "horizontal vertical diagonal checker plaid grid hexagons bricks zigzag blobs".split()
TEST_SPLITS = ("test", "val", "valid", "validation")  # in order of preference
# Files whose names begin with these are not data: hidden files and files of systems.
LITTER = (".", "__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found")


class UserError(ValueError):
    """A problem that the user can fix; its message is one line that says how."""


def say(text, end="\n"):
    """Print in process 0 only; a standard output that is closed or full is no error."""
    if (os.environ.get("RANK") or "0") != "0":
        return
    try:
        print(text, end=end, flush=True)
    except UnicodeEncodeError:  # a file's name, in letters that the output lacks
        print(ascii(text))
    except OSError:
        sys.stdout = open(os.devnull, "w")


# =================== Data ===================
class Dataset(NamedTuple):
    """What `load_dataset` returns, on the device except for images that do not fit."""

    train_images: torch.Tensor  # (N, 3, H, W) uint8
    train_labels: torch.Tensor  # (N,) int64; None for a folder without class folders
    test_images: torch.Tensor   # (M, 3, H, W) uint8; M is 0 without a test split
    test_labels: torch.Tensor   # (M,) int64; None if there is no test split
    classes: tuple              # names, in the order of the labels
    mean: torch.Tensor          # (3,) float32, of training pixels scaled to [0, 1]
    std: torch.Tensor           # (3,) float32, 1/255 for a constant channel


def load_dataset(name, data_dir="data", image_size=None, cache_dir=None, device="cpu",
                 skip_broken=False, max_pixels=None):
    """Load a data set as uint8 images.

    name: one of DATASETS; data_dir: the folder of images, or where CIFAR is downloaded to
    image_size: side in pixels; None means 32, and for a folder `common_side`
    cache_dir: where a folder's decoded images are kept; None means data_dir
    device: images move there if they fill at most half of its free memory
    skip_broken: leave out files that cannot be read
    max_pixels: the largest image that is read; None means Pillow's limit
    Raises UserError or OSError if the data cannot be loaded.
    """
    data_dir = Path(data_dir)
    if max_pixels:
        Image.MAX_IMAGE_PIXELS = max_pixels // 2  # Pillow refuses more than twice this
    if name == "folder":
        loaded = _load_folder(data_dir, image_size, cache_dir, skip_broken)
    elif name == "shapes":
        loaded = _load_shapes(image_size or 32)
    else:
        loaded = _load_cifar(name, data_dir, image_size or 32)
    *parts, classes = loaded
    # Mean and standard deviation of each channel; above 256 MiB, of every k-th image.
    sample = parts[0][::1 + parts[0].nbytes // 2**28]
    spread = [torch.std_mean(channel.float(), correction=0)
              for channel in sample.unbind(1)]
    std, mean = torch.tensor(spread, device=device).T / 255
    parts = [_to_device(part, device) for part in parts]
    return Dataset(*parts, tuple(classes), mean, std.clamp(min=1 / 255))


def _to_device(x, device):
    """A tensor, on the device if it fills at most half of the free memory there."""
    if x is None:
        return None
    if "cuda" in str(device) and x.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return x
    return x.to(device)


def _load_shapes(size):
    """7,000 drawn images of ten classes, 1,000 of them to test on."""
    drawn = [draw_shapes(500, size, seed) for seed in range(14)]
    images, labels = map(torch.cat, zip(*drawn))
    return images[:6000], labels[:6000], images[6000:], labels[6000:], SHAPES


def _load_cifar(name, data_dir, size):
    """Load CIFAR-10 or CIFAR-100 with torchvision, which downloads missing files."""
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    if data_dir.name == kind.base_folder:
        data_dir = data_dir.parent  # the extracted folder itself was given
    parts = []
    for train in (True, False):
        try:
            raw = kind(data_dir, train=train, download=True)
        except (OSError, RuntimeError) as problem:
            raise UserError(
                f"cannot download {name} ({problem}): download {kind.url} into {data_dir}; "
                "--dataset folder is for folders of images, --dataset shapes needs no files")
        images = torch.empty(len(raw.data), 3, size, size, dtype=torch.uint8)
        pixels = torch.from_numpy(raw.data).permute(0, 3, 1, 2)
        for filled, some in zip(images.split(1000), pixels.split(1000)):
            filled.copy_(TF.resize(some.contiguous(), [size, size]))
        parts += [images, torch.tensor(raw.targets)]
    return *parts, raw.classes


# ------------------- Folders of images: find, sort, decode, read -------------------
def _load_folder(root, size, cache_dir, skip_broken):
    """Load a folder: find and sort its files, and take them from its decoded array."""
    left_out = Counter()
    found = find_images(root, left_out)
    train, test, classes, test_split = sort_images(root, found)
    if not train:
        raise UserError(f"no images to train on in {root}")
    size = size or common_side(found)
    left_out["images without a class or in an unused split"] = len(found) - len(train) - len(test)
    say(f"{root}: {len(train)} images to train on, {len(test)} to test on ({test_split}), "
        f"{len(classes)} classes ({', '.join(classes[:10])}), {size} pixels; "
        f"left out: {dict(+left_out)}")
    files = [*train, *test]
    with warnings.catch_warnings():
        # PIL warns of damaged files, torch of read-only arrays.
        warnings.simplefilter("ignore")
        images, problems = _decoded(files, root, size, cache_dir)
    broken = [f"{file} ({why})" for file, why in zip(files, problems) if why]
    if broken and not skip_broken:
        raise UserError(
            f"cannot read {len(broken)} of {len(files)} images: --skip-broken leaves them out, "
            f"--max-pixels N allows large ones; delete decoded-* to try again: {', '.join(broken)}")
    if broken:
        say(f"left out {len(broken)} images that cannot be read: {', '.join(broken)}")
    # Rows of readable files come first: train's, then test's. Empty rows follow.
    readable = torch.tensor([not why for why in problems])
    labels = torch.tensor([*train.values(), *test.values()])[readable]
    count, end = readable[:len(train)].sum(), len(labels)
    train_labels = labels[:count] if classes else None
    test_labels = labels[count:] if end > count else None
    return images[:count], train_labels, images[count:end], test_labels, classes


def find_images(folder, left_out, above=()):
    """List the image files below a folder, sorted: those with a suffix that PIL reads.

    left_out: a Counter of what is left out, by reason
    above: real paths of the parent folders: a link to one of them is not followed
    """
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items()
                if kind in Image.OPEN}
    real = os.path.realpath(folder)
    paths = sorted(folder.iterdir())
    # Output folders of training runs are skipped: their pictures are not data.
    if real in above or (above and folder / "checkpoint.pt" in paths):
        left_out["link to a parent folder, or output folder of a run"] += 1
        return []
    files = []
    for path in paths:
        if path.name.startswith(LITTER):
            left_out["hidden or system files"] += 1
        elif path.is_dir():
            files += find_images(path, left_out, (*above, real))
        elif path.suffix.lower() in suffixes and path.exists():
            files.append(path)
        elif not path.name.startswith("decoded-"):  # our own decoded files
            left_out[f"files '{path.suffix}' that PIL cannot read"] += 1
    return files


def sort_images(root, files):
    """Sort image files by their folders, into training and test split and into classes.

    If root has a train/ folder, only that is trained on, and the first of TEST_SPLITS
    whose class folders all exist in train/ is tested on. Else all files are trained on.
    There are labels if there are two or more class folders. But without a train/, images
    beside the class folders mean that there are none.
    Returns train and test, {file: label}; the names of the classes, [] without labels;
    and the name of the test split, or the reason why there is none.
    """
    has_split = any(path.name.lower() == "train" for path in root.iterdir())
    # tree[split][class] is a list of files; "" is no split or no class.
    tree = defaultdict(lambda: defaultdict(list))
    for file in files:
        folders = file.relative_to(root).parts[:-1]
        if not has_split:
            # Without this, its test images would be trained on.
            if "train" in map(str.lower, folders[1:2]):
                raise UserError(f"{root / folders[0]} has a train/: give that as --data-dir")
            folders = ("train", *folders)
        split, name = (*folders, "", "")[:2]
        tree[split.lower()][unicodedata.normalize("NFC", name)].append(file)
    train = tree["train"]
    classes = sorted(name for name in train if name)
    if len(classes) < 2 or (train[""] and not has_split):
        everything = sorted(file for some in train.values() for file in some)
        return dict.fromkeys(everything, 0), {}, [], "no split"

    def label(split):
        return {file: number for number, name in enumerate(classes)
                for file in split[name]}

    reason = "no split"
    for name in TEST_SPLITS:
        tested = set(tree[name]) - {""}
        if tested and tested.issubset(classes):
            return label(train), label(tree[name]), classes, name
        if tested:
            reason = f"no split: {name} has other class folders than train"
    return label(train), {}, classes, reason


def common_side(files):
    """The common side of the images if all are equal squares smaller than 224, or 224."""
    sides = set()
    for file in files:
        # Unreadable files are skipped here; decoding reports them later.
        with suppress(Exception), Image.open(file) as image:
            sides.update(image.size)
        if len(sides) > 1:
            return 224
    return min(max(sides, default=224), 224)


def _decoded(files, root, size, cache_dir):
    """Images as a memory-mapped array (N, 3, size, size), which `decode` wrote.

    Returns the array and a list that says why each file cannot be read, "" if it can.
    The array's name has a hash of all files' paths, sizes and times, and of the first
    bytes of up to 64 files: a changed folder gets a new array, a copy that keeps the
    files' times does not.
    """
    # Increase the number when read_image's output changes.
    digest = hashlib.blake2b(f"decoder 3, {Image.MAX_IMAGE_PIXELS}".encode(), digest_size=8)
    for number, file in enumerate(files):
        status = file.stat()
        entry = f"{file.relative_to(root)} {status.st_size} {int(status.st_mtime)}"
        digest.update(os.fsencode(entry))
        if number % (1 + len(files) // 64) == 0:
            with suppress(OSError), open(file, "rb") as opened:
                digest.update(opened.read(4096))
    path = Path(cache_dir or root, f"decoded-{size}-{digest.hexdigest()}.npy")
    try:
        if not path.exists():
            decode(files, size, path)
        problems = json.loads(path.with_suffix(".json").read_text())
        return torch.from_numpy(np.load(path, mmap_mode="r")), problems
    except Exception as problem:  # a damaged file can raise any type of error
        raise UserError(f"cannot keep or read decoded images in {path.parent} ({problem}): "
                        "make room there or name another --cache-dir")


def decode(files, size, path):
    """Decode files on all cores into a uint8 .npy array (N, 3, size, size) at path.

    The array is written to a temporary file and renamed. Unreadable files get no row:
    instead, the array ends with as many empty rows. A JSON file beside it says why each
    file cannot be read, "" if it can.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (len(files), 3, size, size)
    needed, free = math.prod(shape), shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(f"{needed / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free")
    temporary = path.with_name(f"{path.stem}-{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as out:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(out, header)
            end = out.tell() + needed
            problems = write_rows(files, size, out)
            out.truncate(end)
        path.with_suffix(".json").write_text(json.dumps(problems))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    others = [old.name for old in path.parent.glob("decoded-*") if old.stem != path.stem]
    if others:
        say(f"wrote {path}; other decoded files are still there: {', '.join(others)}")


def write_rows(files, size, out):
    """Write the images to out; return an error text per file, "" if it was read."""
    problems, start = [], time.perf_counter()
    at_once = 16 + 2**25 // (3 * size**2)  # about 32 MiB of images
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(files), at_once):
            some = files[first:first + at_once]
            for reading in [pool.submit(read_image, file, size) for file in some]:
                problem = reading.exception()  # PIL raises many types
                problems.append(repr(problem) if problem else "")
                if not problem:
                    out.write(reading.result().numpy())
            seconds = time.perf_counter() - start
            if seconds > 5:
                say(f"decoded {len(problems)} of {len(files)} images in {seconds:.0f} s",
                    end="\r")
    return problems


def read_image(path, size):
    """The centre square of a file's first frame, resized, as uint8 (3, size, size).

    EXIF orientation is applied and transparency becomes white. Grey images of more than 8
    bits are scaled from [0, 65535], floats from [0, 1].
    Raises ValueError for values outside these, and PIL's errors for unreadable files.
    """
    with Image.open(path) as image:
        # Decode a JPEG at 1/2, 1/4 or 1/8 scale if that is at least twice our size.
        image.draft(None, (2 * size, 2 * size))
        ImageOps.exif_transpose(image, in_place=True)
        # Crop before converting: a long, narrow image could use much memory.
        image = TF.center_crop(image, min(image.size))
        if image.mode[0] in "IF":  # grey of more than 8 bits
            values = np.asarray(image)
            highest = 1 if image.mode == "F" else 65535
            if not 0 <= values.min() <= values.max() <= highest:  # this refuses NaN, too
                raise ValueError(f"values from {values.min()} to {values.max()}, "
                                 f"not from 0 to {highest}")
            image = Image.fromarray((values * (255 / highest)).round().astype(np.uint8))
        elif image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = TF.resize(image.convert("RGB"), [size, size])
        return TF.pil_to_tensor(image).contiguous()


# ------------------- Drawn images, and batches -------------------
def draw_shapes(count, size=32, seed=0):
    """Draw textures of ten classes.

    Returns images (count, 3, size, size) uint8 and labels (count,) int64.
    Images of a class differ in position, scale, phase, angle, colour and contrast. The
    pattern repeats over most of the image, so that a random crop still shows the class.
    """
    generator = torch.Generator().manual_seed(seed)
    sin, pi, maximum = torch.sin, torch.pi, torch.maximum

    def uniform(low, high, channels=1, pixels=1):
        drawn = torch.rand(count, channels, pixels, pixels, generator=generator)
        return low + (high - low) * drawn

    labels = torch.randperm(count, generator=generator) % len(SHAPES)
    grid = torch.linspace(-1, 1, size)
    # Coordinates relative to the centre of a soft window; outside it the pattern fades.
    x, y = grid - uniform(-0.25, 0.25), grid[:, None] - uniform(-0.25, 0.25)
    distance = (x.square() + y.square()) / uniform(0.8, 1.2).square()
    window = torch.exp(-distance.square())
    # Rotated and scaled coordinates: half an image spans 9 to 18 radians.
    angle, scale = uniform(-pi / 9, pi / 9), uniform(9, 18)
    u = scale * (x * angle.cos() - y * angle.sin())
    v = scale * (x * angle.sin() + y * angle.cos())
    a, b = uniform(0, 2 * pi), uniform(0, 2 * pi)  # phases
    third, half = 3**0.5 / 2 * u, v / 2  # with v: three waves, 60 degrees apart
    shift = pi / 2 * torch.cos(half + a / 2).sign()  # shifts every second row of bricks
    noise = nn.functional.interpolate(
        uniform(-1, 1, pixels=8), (size, size), mode="bicubic")
    across, down, along = sin(u + a), sin(v + b), sin(v + a)
    patterns = [  # in the order of SHAPES
        along,
        across,
        sin((u + uniform(-1, 1).sign() * v) / 2**0.5 + a),
        1.5 * across * down,
        0.75 * (across + down),
        2 * maximum(across, down) - 1,
        (along + sin(third - half + b) - sin(third + half + a + b)) / 1.5,
        2 * maximum(along, sin(u / 2 + b + shift)) - 1,
        sin(v + 2 * torch.asin(sin(u + b)) + a),
        2 * noise,
    ]
    pattern = torch.stack(patterns, 1)[torch.arange(count), labels]
    tint = 1 + uniform(-0.1, 0.1, channels=3)
    contrast = uniform(0.2, 0.4) * uniform(-1, 1).sign()
    images = uniform(0.4, 0.6) + contrast * pattern * window * tint
    images = (images + 0.05 * uniform(-1, 1, pixels=size)).clamp(0, 1)
    return (images * 255).round().to(torch.uint8), labels


def normalize(x, mean, std):
    """Standardise each channel of the network's input, in training and in evaluation.

    x: (N, 3, H, W) uint8, or float in [0, 1]; mean, std: (3,) of the training set
    Returns float32 in channels_last memory format, in which convolutions are fastest.
    Raises ValueError for other integer types, because their scale is unknown.
    """
    if x.dtype == torch.uint8:
        x = x.float() / 255
    elif not x.is_floating_point():
        raise ValueError(f"normalize takes uint8, or float in [0, 1], not {x.dtype}")
    x = x.float() - mean.view(3, 1, 1)
    x = x / std.view(3, 1, 1)
    return x.contiguous(memory_format=torch.channels_last)


def batches(images, order, batch_size, device, workers):
    """Yield images[order] on the device, batch by batch; the last one may be smaller.

    images: (N, 3, H, W) uint8, on the device or on the host
    order: (M,) int64 on the host
    Images on the host are gathered in advance by `workers` threads, into pinned memory.
    """
    if images.device.type == torch.device(device).type:
        for index in order.to(images.device).split(batch_size):
            yield images[index]
        return

    def gather(index):
        batch = images[index]
        return batch.pin_memory() if torch.cuda.is_available() else batch

    with ThreadPoolExecutor(workers) as pool:
        waiting = []
        for index in order.split(batch_size):
            waiting.append(pool.submit(gather, index))
            if len(waiting) > workers:
                yield waiting.pop(0).result().to(device, non_blocking=True)
        while waiting:
            yield waiting.pop(0).result().to(device, non_blocking=True)


# =================== Network ===================
class ResNet(models.ResNet):
    """A residual network without a classifier [He et al. 1512.03385].

    Maps images (N, 3, H, W) to features (N, num_features) by average pooling.
    """

    def __init__(self, block, depths, width, stem):
        # Torchvision's class gives _make_layer and forward; the width is ours.
        nn.Module.__init__(self)
        # The "cifar" stem does not downsample: 32x32 images end as maps of 4x4.
        kernel, stride, padding = {"cifar": (3, 1, 1), "imagenet": (7, 2, 3)}[stem]
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, 1)
        planes = [round(64 * width * 2**stage) for stage in range(4)]
        self.conv1 = nn.Conv2d(3, planes[0], kernel, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.relu = nn.ReLU(inplace=True)
        self.inplanes, self.groups, self.base_width, self.dilation = planes[0], 1, 64, 1
        self._norm_layer = nn.BatchNorm2d
        for stage, depth in enumerate(depths):
            stride = 1 if stage == 0 else 2
            layer = self._make_layer(block, planes[stage], depth, stride)
            setattr(self, f"layer{stage + 1}", layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Identity()
        self.num_features = self.inplanes
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as in torchvision's ResNet
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet(arch="resnet18", width=1.0, stem="cifar"):
    """A ResNet backbone whose output size is its `num_features`.

    arch: one of ARCHS; width: factor on all channel counts, like 1x, 2x, 4x in SimCLR
    stem: "cifar" (3x3, no max-pool) or "imagenet" (7x7 with stride 2, max-pool)
    Raises KeyError for an unknown arch or stem.
    """
    block, *depths = ARCHS[arch]
    return ResNet(block, depths, width, stem)


# ------------------- Weights -------------------
RESNET_PARTS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")  # in order


def read_checkpoint(path):
    """Read a dict of tensors and plain values saved by torch.save, without running code.

    Of a folder, its checkpoint.pt is read. Raises UserError if there is no such dict.
    """
    if Path(path).is_dir():
        path = Path(path, "checkpoint.pt")
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as problem:  # a damaged file can raise any type of error
        cause = ("it is missing, truncated, a web page, TorchScript, or not a dict of "
                 f"tensors ({type(problem).__name__})")
        unsafe = re.search(r"GLOBAL (\S+)", f"{problem}")
        if unsafe:
            cause = (f"it contains a {unsafe[1]} object: if you trust its author, load it "
                     "with weights_only=False and torch.save its weights alone")
        raise UserError(f"{path} is not a readable file of weights: {cause}")


def all_tensors(value, name=""):
    """Yield (dotted name, tensor) for all tensors in nested dicts."""
    if torch.is_tensor(value):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from all_tensors(part, f"{name}.{key}".removeprefix("."))


def load_weights(path, prefix=""):
    """Read a checkpoint and find its ResNet, with torchvision's or numbered names.

    prefix: the text before the backbone's names, or the end of it, with the final dot
    Returns the backbone's weights under torchvision's names, the whole file as a dict,
    and the names of all other tensors in it. Raises UserError if no single backbone fits.
    """
    saved = read_checkpoint(path)
    if not prefix and "backbone" in saved and "model" in saved:
        prefix = "backbone."  # a checkpoint written by one of the four scripts
    tensors = dict(all_tensors(saved))
    # Prefixes of all first convolutions with three input channels; their names, conv1 or
    # 0, stand at the beginning or after a dot.
    found = [name[:first.start()]
             for name, x in tensors.items() if x.dim() == 4 and x.shape[1] == 3
             for first in re.finditer(r"(?<![^.])(conv1|0)\.weight$", name)]
    if prefix not in found:
        fitting = [name for name in found if f".{name}".endswith(f".{prefix}")]
        if len(fitting) != 1:
            raise UserError(
                f"--prefix {prefix!r} fits {len(fitting)} of {len(found)} networks for RGB "
                f"images in {path}, but must fit one: {' '.join(found[:8])}")
        prefix = fitting[0]
    # Replace numbered parts by torchvision's names, in increasing order.
    parts = {name.removeprefix(prefix).split(".")[0]
             for name in tensors if name.startswith(prefix)}
    numbers = sorted(filter(str.isdigit, parts), key=int)
    parts = dict(zip(RESNET_PARTS, RESNET_PARTS)) | dict(zip(numbers, RESNET_PARTS))
    weights, left_out = {}, []
    for name, x in tensors.items():
        part, _, rest = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and part in parts:
            rest = rest.replace("shortcut.", "downsample.")  # name in SupContrast
            weights[f"{parts[part]}.{rest}"] = x
        else:
            left_out.append(name)
    return weights, saved, left_out


def fill_backbone(f, weights):
    """Load weights that have torchvision's names; UserError if they do not fit."""
    try:
        f.load_state_dict(weights)
    except RuntimeError as problem:
        raise UserError(
            f"the weights do not fit this network, see --arch, --width, --stem: {problem}")
