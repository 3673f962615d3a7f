"""Data loading, ResNet backbones, processes and files: all that the four methods share.

A method file runs with this file beside it; whoever copies a method copies two files.
Images stay uint8 (N, 3, H, W) until they are on the device, where a 32x32 set lives whole.
"""

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter, defaultdict, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, TiffImagePlugin
from torch import nn
from torchvision import datasets, models
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.transforms import functional as TF
from torchvision.utils import save_image

try:
    import fcntl
except ImportError:  # on Windows take care yourself
    fcntl = None

DATASETS = ("cifar10", "cifar100", "folder", "shapes")
ARCHS = {"resnet18": (BasicBlock, (2, 2, 2, 2)), "resnet34": (BasicBlock, (3, 4, 6, 3)),
         "resnet50": (Bottleneck, (3, 4, 6, 3)), "resnet101": (Bottleneck, (3, 4, 23, 3)),
         "resnet152": (Bottleneck, (3, 8, 36, 3))}
SHAPES = "horizontal vertical diagonal checker plaid grid hexagons bricks zigzag blobs".split()
SPLITS = ("test", "val", "valid", "validation")  # the first with class folders is tested on
LITTER = (".", "__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found")  # names begin so
STUBS = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # PIL needs other programs for these
OURS = (".npy", ".tmp", ".lock")  # what decoding leaves
Processes = namedtuple("Processes", "rank world local_rank")
LARGE = threading.Lock()  # held to decode more than 2^25 pixels: one such image at a time


# ----------------------------------------------------------------------------- data
class Dataset(NamedTuple):
    """What `load_dataset` returns, on its device; labels of a folder without classes are None."""

    train_images: torch.Tensor         # (N, 3, H, W) uint8
    train_labels: torch.Tensor | None  # (N,) int64
    test_images: torch.Tensor          # (M, 3, H, W) uint8; M = 0 for a folder without splits
    test_labels: torch.Tensor | None   # (M,) int64
    classes: tuple                     # names, in the order of the labels
    mean: torch.Tensor                 # (3,) float32, of the training pixels in [0, 1]
    std: torch.Tensor                  # (3,) float32, at least 1/255: a constant channel has none


def load_dataset(name, data_dir="data", image_size=None, cache_dir=None, device="cpu",
                 skip_broken=False, max_pixels=None):
    """Read a data set as uint8: into memory, or mapped from where a folder was decoded to once.

    data_dir: where it lies; image_size: pixels, None: 224 of a folder, else 32; cache_dir: keeps
    what a folder is decoded to, None: data_dir; device: takes all of it, or all but images that
    fill half of its free memory; skip_broken: do without files that cannot be read; max_pixels: of
    a file, None: Pillow's limit. Raises UserError, in one line that says what to do.
    """
    image_size = image_size or (224 if name == "folder" else 32)
    if max_pixels:
        Image.MAX_IMAGE_PIXELS = max_pixels // 2  # Pillow refuses twice as many
    if name == "folder":
        *data, classes = _read_folder(Path(data_dir), image_size, cache_dir, skip_broken)
    elif name == "shapes":
        images, labels = map(torch.cat, zip(*(draw_shapes(500, image_size, i) for i in range(14))))
        *data, classes = images[:6000], labels[:6000], images[6000:], labels[6000:], SHAPES
    elif name in DATASETS:
        *data, classes = _read_cifar(name, data_dir, image_size)
    else:
        raise UserError(f"unknown dataset {name!r}: choose from {', '.join(DATASETS)}")
    sample = data[0][::1 + data[0].nbytes // 2**28]  # of more than 256 MiB a part
    spread = [torch.std_mean(x.float(), correction=0) for x in sample.unbind(1)]  # a channel each
    std, mean = torch.tensor(spread, device=device).T / 255
    data = [x if x is None else resident(x, device) for x in data]
    return Dataset(*data, tuple(classes), mean, std.clamp(min=1 / 255))


def _read_cifar(name, data_dir, image_size):
    """CIFAR through torchvision; offline, name the file to place."""
    kind = getattr(datasets, name.upper())
    try:
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        writable = os.access(data_dir, os.W_OK)  # else it must be there; of several one downloads
        with locked(Path(data_dir, f".{name}.lock")) if writable else nullcontext():
            sets = [kind(data_dir, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as problem:
        raise UserError(f"cannot download {name} ({problem}): place {kind.filename} in {data_dir},"
                         " or try --dataset shapes, which needs no files") from None
    out = []
    for one in sets:
        images = torch.from_numpy(np.ascontiguousarray(one.data.transpose(0, 3, 1, 2)))
        images = torch.cat([TF.resize(x, [image_size, image_size]) for x in images.split(1000)])
        out += [images, torch.tensor(one.targets)]
    return *out, sets[0].classes


def _read_folder(root, size, cache_dir, skip_broken):
    """Images of train/, or of the whole tree; labels if they lie in two or more class folders."""
    if not root.is_dir():
        raise UserError(f"--data-dir {root} is not a folder of images")
    (files, left, broken), tree = _scan(root), defaultdict(list)
    split = any(path.is_dir() and path.name.lower() == "train" for path in root.iterdir())
    for file in files:  # to those of their split and class; without a class folder it is ""
        names = ("train",) * (not split) + file.relative_to(root).parts
        tree[names[0].lower(), names[1] if len(names) > 2 else ""].append(file)
    classes, loose = [name for part, name in tree if part == "train" and name], tree["train", ""]
    labelled = len(classes) > 1 and (split or not loose)
    with_classes = {part for part, name in tree if labelled and name}
    top = next((part for part in SPLITS if part in with_classes), "no split")
    if not labelled:  # nothing tells the images apart
        loose[:], classes = sorted(sum((tree["train", name] for name in classes), loose)), [""]
    odd = [name for part, name in tree if part == top and name not in ("", *classes)]
    if odd:
        raise UserError(f"class {odd[0]!r} of {root / top} is not in {root / 'train'}: remove it")
    train, test = ([(label, file) for label, name in enumerate(classes)
                    for file in tree[part, name]] for part in ("train", top))
    left["of no class or another split"] = len(files) - len(train) - len(test)
    if processes().rank == 0:  # one talks
        said = ", ".join(f"{n} {why}" for why, n in (+left).most_common(20)) or "nothing"
        say(f"{root}: {len(train)} images of {len(classes) * labelled} classes to train on, "
            f"{f'{len(test)} of {top}' if test else 'none'} to test on; left out: {said}")
    place = "-" + hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:8]  # if names are equal
    cache = Path(cache_dir or root, f"{root.resolve().name}-{size}{place if cache_dir else ''}.npy")
    images, unread = _decoded([file for _, file in train + test], root, size, cache)
    broken |= unread
    said = ", ".join(f"{path} ({why})" for path, why in broken.items())
    if broken and not skip_broken:
        raise UserError(f"cannot read {len(broken)} of {len(files)} images: {said}: mend or "
                         "remove them, or try --skip-broken, or for large ones --max-pixels N")
    if broken and processes().rank == 0:
        say(f"left out {len(broken)} that cannot be read: {said}")
    train, test = ([pair for pair in part if pair[1] not in broken] for part in (train, test))
    if not train:
        raise UserError(f"no images in {root / 'train' if split else root}")
    labels = [torch.tensor([label for label, _ in part]) if labelled and part else None
              for part in (train, test)]
    return images[:len(train)], labels[0], images[len(train):], labels[1], classes * labelled


def _scan(root):
    """The files below root that PIL can open, how many it cannot by kind, and what is broken."""
    suffixes = {suffix for suffix, name in Image.registered_extensions().items()
                if name in Image.OPEN and name not in STUBS}
    certain = [name for name, (_, start) in Image.OPEN.items() if start and name not in STUBS]

    def opens(path):  # whether its first bytes are those of an image
        with suppress(Exception), Image.open(path, formats=certain):
            return True

    files, left, broken, above = [], Counter(), {}, {str(root): ()}
    for here, folders, names in os.walk(root, followlinks=True, onerror=lambda problem:
                                        broken.update({problem.filename: problem.strerror})):
        real, run = os.path.realpath(here), {"checkpoint.pt", "log.jsonl"}.intersection(names)
        if real in above[here] or run and above[here]:  # a run draws pictures
            left["folder of a run" if run else "link to a folder around it"] += 1
            folders[:], names = [], []
        hidden = {name for name in folders + names if name.startswith(LITTER)}
        left["hidden or a system's"] += sum(not name.endswith(OURS) for name in hidden)
        folders[:] = {*folders} - hidden
        above.update({os.path.join(here, name): (*above[here], real) for name in folders})
        for name in {*names} - hidden:
            path, suffix = Path(here, name), os.path.splitext(name)[1].lower()
            if suffix in suffixes or path.is_file() and opens(path):
                files.append(path)
            elif suffix not in OURS or root.resolve().name not in name:
                left[f"{suffix or 'without a suffix'} that PIL cannot open"] += 1
    return sorted(files), left, broken


def _decoded(files, root, size, path):
    """The files' images, mapped from `path`, written if need be; and which have none, and why."""
    keys = []
    for file in files:
        st = file.stat() if file.exists() else file.lstat()  # of a link to nothing
        key = (file.relative_to(root), st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)
        keys.append(hashlib.blake2b(f"decoder 2 {key}".encode(), digest_size=16).digest())

    def look():
        """None if `path` has other images, or lacks one that can be read by now."""
        (images, rows), broken = _cached(path), {}
        if files and images is None or [*rows] != [key for key in keys if key in rows]:
            return None
        for file in (file for file, key in zip(files, keys) if key not in rows):
            if torch.is_tensor(broken.setdefault(file, _read_image(file, size))):
                return None
        return images, broken

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's of what it mends, torch's of a read-only map
            found = look()  # before any lock: the folder may be read-only
            if not found:
                path.parent.mkdir(parents=True, exist_ok=True)
                with locked(path.with_name(f".{path.stem}.lock")) as lock:  # of several one decodes
                    lock.truncate(0)
                    print("process", os.getpid(), "on", socket.gethostname(), file=lock, flush=True)
                    found = look() or _decode(files, keys, size, path) or look()
    except OSError as problem:
        raise UserError(f"cannot keep decoded images ({problem}): name a --cache-dir") from None
    if not found:
        raise UserError(f"{root} changed while its images were decoded: start again")
    return found


def _cached(path):
    """The array in `path`, mapped, and its rows by their files' keys, which stand behind it."""
    with suppress(OSError, ValueError, EOFError), open(path, "rb") as file:
        images = np.load(path, mmap_mode="r")  # "c" could be written to, but must fit into memory
        file.seek(images.offset + images.nbytes)
        return torch.from_numpy(images), {key: i for i, key in enumerate(np.load(file).tolist())}
    return None, {}


def _decode(files, keys, size, path):
    """Write files as an array to a temporary name, on all cores in bounded memory; rename it."""
    for part in path.parent.glob("*.tmp"):  # of the dead: the living write all the time
        if path.stem in part.name and time.time() - part.stat().st_mtime > 3600:
            part.unlink(missing_ok=True)
    need, free = len(files) * 3 * size**2 / 2**30, shutil.disk_usage(path.parent).free / 2**30
    if need > free:
        raise OSError(f"they need {need:.2f} GiB in {path.parent}, which has {free:.2f} GiB free")
    old, rows = _cached(path)

    def read(file, key):  # what is there already is copied
        return old[rows[key]] if key in rows else _read_image(file, size)

    part = path.with_name(f".{path.stem}.{socket.gethostname()}-{os.getpid()}.tmp")
    start = shown = time.perf_counter()
    kept, most = [], max(os.cpu_count() or 1, 2**25 // (3 * size**2))  # 32 MiB at a time
    try:
        with open(part, "wb") as out, ThreadPoolExecutor() as pool:  # PIL frees Python's lock
            out.seek(128)  # the header, which waits for the number of images
            images = (image for at in range(0, len(files), most)
                      for image in pool.map(read, files[at:at + most], keys[at:at + most]))
            for done, (key, image) in enumerate(zip(keys, images), 1):
                if torch.is_tensor(image):
                    out.write(image.numpy())
                    kept.append(key)
                if time.perf_counter() - shown > 5:
                    shown = time.perf_counter()
                    left = (shown - start) * (len(files) / done - 1)
                    say(f"decoded {done} of {len(files)} images, {left:.0f} s left")
            np.save(out, np.frombuffer(b"".join(kept), "V16"))
            out.seek(0)
            np.lib.format.write_array_header_1_0(out, {
                "descr": "|u1", "fortran_order": False, "shape": (len(kept), 3, size, size)})
        with suppress(FileNotFoundError):  # another finished, and took this part for dead
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _read_image(path, size):
    """A file's centre square, of its first frame, as uint8 (3, size, size); or why not, in words.

    EXIF turns it, transparency is white; wider integers go from 0 to 65535, floats from 0 to 1.
    """
    try:
        with Image.open(path) as image, LARGE if np.prod(image.size) > 2**25 else nullcontext():
            # A JPEG at 1/2, 1/4 or 1/8, if that leaves twice our size: nobody sees it.
            image.draft(None, (2 * size, 2 * size))
            ImageOps.exif_transpose(image, in_place=True)
            image = TF.center_crop(image, min(image.size))  # before all else: it may be long
            if image.mode[0] in "IF":  # grey of more than 8 bits
                x, top = np.asarray(image), 1 if image.mode == "F" else 65535
                if not 0 <= x.min() <= x.max() <= top:  # nor NaN
                    return f"values from {x.min()} to {x.max()}, not from 0 to {top}"
                image = Image.fromarray((x * (255 / top)).round().astype(np.uint8))
            elif image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            image = TF.resize(image.convert("RGB"), [size, size])
            return TF.pil_to_tensor(image).contiguous()
    except Exception as problem:  # PIL raises OSError, SyntaxError, struct.error, ...
        with suppress(Exception), open(path, "rb") as file:  # perhaps a TIFF that PIL cannot name
            tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
            file.seek(tags.next)
            tags.load(file)
            problem = f"{problem}: a TIFF of {tags[277]} channels; supported are 1 to 4"
        return str(problem)


def draw_shapes(count, size=32, seed=0):
    """Draw textures of ten classes: images (count, 3, size, size) uint8 and labels (count,) int64.

    Each lies in a soft window and differs in all but its class. Any part of it shows that: a
    pattern that needs its centre, as rings do, would be lost in a random crop.
    """
    draw = torch.Generator().manual_seed(seed)

    def uniform(low, high, channels=1, pixels=1):
        return low + (high - low) * torch.rand(count, channels, pixels, pixels, generator=draw)

    labels = torch.randperm(count, generator=draw) % len(SHAPES)
    grid = torch.linspace(-1, 1, size)
    x, y = grid - uniform(-0.25, 0.25), grid[:, None] - uniform(-0.25, 0.25)  # window's centre: 0
    window = torch.exp(-((x.square() + y.square()) / uniform(0.8, 1.2).square()).square())
    turn, scale = uniform(-torch.pi / 9, torch.pi / 9), uniform(9, 18)  # radians a half image
    u, v = scale * (x * turn.cos() - y * turn.sin()), scale * (x * turn.sin() + y * turn.cos())
    a, b = uniform(0, 2 * torch.pi), uniform(0, 2 * torch.pi)  # phases
    third, half = 3**0.5 / 2 * u, v / 2  # third +- half: waves at 120 degrees to v
    shift = torch.pi / 2 * torch.cos(half + a / 2).sign()  # every other row of bricks
    noise = nn.functional.interpolate(uniform(-1, 1, pixels=8), (size, size), mode="bicubic")
    across, down = torch.sin(u + a), torch.sin(v + b)
    pattern = torch.stack([  # in the order of SHAPES
        torch.sin(v + a), across, torch.sin((u + uniform(-1, 1).sign() * v) / 2**0.5 + a),
        1.5 * across * down, 0.75 * (across + down), 2 * torch.maximum(across, down) - 1,
        (torch.sin(v + a) + torch.sin(third - half + b) - torch.sin(third + half + a + b)) / 1.5,
        2 * torch.maximum(torch.sin(v + a), torch.sin(u / 2 + b + shift)) - 1,
        torch.sin(v + 2 * torch.asin(torch.sin(u + b)) + a), 2 * noise
    ], 1)[torch.arange(count), labels]
    tint = 1 + uniform(-0.1, 0.1, channels=3)
    contrast = uniform(0.2, 0.4) * uniform(-1, 1).sign()
    images = uniform(0.4, 0.6) + contrast * pattern * window * tint
    images = (images + 0.05 * uniform(-1, 1, pixels=size)).clamp(0, 1)
    return (images * 255).round().to(torch.uint8), labels


def normalize(x, mean, std):
    """What enters the network, in training and evaluation alike.

    x: (N, 3, H, W) uint8, or float in [0, 1]; mean, std: (3,) of the training set
    Returns float32 in units of std, in channels_last memory, which convolutions are fastest on.
    """
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    return x.contiguous(memory_format=torch.channels_last)


def resident(images, device):
    """The images on the device if they fit in half of its free memory, else as they are."""
    device = torch.device(device)
    large = device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[0] / 2
    return images if large else images.to(device)


def batches(images, order, batch_size, device, workers=min(8, os.cpu_count() or 1)):
    """Yield images[order] on the device, batch by batch; the last one may be smaller.

    images: (N, 3, H, W) uint8, on the device or on the host; order: (M,) int64 on the host
    Images on the host are gathered by `workers` threads into pinned memory, ahead of the network.
    """
    if images.device.type == torch.device(device).type:
        for index in order.to(images.device).split(batch_size):
            yield images[index]
        return

    def gather(index):
        batch = images[index]
        return batch.pin_memory() if torch.cuda.is_available() else batch

    with ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        for index in order.split(batch_size):
            waiting.append(pool.submit(gather, index))
            if len(waiting) > workers:
                yield waiting.popleft().result().to(device, non_blocking=True)
        while waiting:
            yield waiting.popleft().result().to(device, non_blocking=True)


# ----------------------------------------------------------------------------- network
class ResNet(models.ResNet):
    """A residual network without classifier, in torchvision's names, He et al., arXiv 1512.03385.

    (N, 3, H, W) in, (N, num_features) out: the average of the last map.
    """

    def __init__(self, block, depths, width, stem):
        nn.Module.__init__(self)  # of torchvision's only the making of layers, here of any width
        planes = [round(64 * width * 2**stage) for stage in range(4)]
        cifar = stem == "cifar"  # full size, no max-pool: a 32x32 image keeps a last map of 4x4
        kernel, stride, padding = (3, 1, 1) if cifar else (7, 2, 3)
        self.conv1 = nn.Conv2d(3, planes[0], kernel, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if cifar else nn.MaxPool2d(3, 2, 1)
        self.inplanes, self.groups, self.base_width, self.dilation = planes[0], 1, 64, 1
        self._norm_layer = nn.BatchNorm2d
        for stage, depth in enumerate(depths):
            layer = self._make_layer(block, planes[stage], depth, stride=1 if stage == 0 else 2)
            setattr(self, f"layer{stage + 1}", layer)
        self.num_features = self.inplanes
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as torchvision's ResNet
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean((2, 3))  # (N, num_features)


def resnet(arch="resnet18", width=1.0, stem="cifar"):
    """A ResNet backbone: arch of ARCHS, width multiplies all channel counts (SimCLR's 1x, 2x, 4x).

    stem: "cifar" (3x3, no max-pool) or "imagenet" (7x7, max-pool); `num_features`: the output size
    Raises ValueError for an unknown arch or stem, or a width that leaves no channel.
    """
    if arch not in ARCHS or stem not in ("cifar", "imagenet") or round(64 * width) < 1:
        raise ValueError(f"no backbone with arch {arch!r}, width {width} and stem {stem!r}")
    return ResNet(*ARCHS[arch], width, stem)


def load_backbone(f, weights):
    """Load a state dict in torchvision's names, but for fc; UserError lists what differs."""
    try:
        f.load_state_dict({key: x for key, x in weights.items() if not key.startswith("fc.")})
    except (AttributeError, RuntimeError) as problem:
        raise UserError("weights of another network (compare --arch; in training --width, --stem): "
                        f"{str(problem)[:600]}") from None


# ----------------------------------------------------------------------------- files and processes
class UserError(ValueError):
    """What the user can mend; the text is one line that says how."""


def processes():
    """This process among torchrun's: rank of world; local_rank is its number on this machine."""
    local_rank = int(os.environ.get("LOCAL_RANK") or 0)
    if dist.is_initialized():  # perhaps by another launcher
        return Processes(dist.get_rank(), dist.get_world_size(), local_rank)
    return Processes(int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1),
                     local_rank)


def wrap(model, sync_bn, compiled, device):
    """The model as training calls it: spread over the processes, and compiled.

    sync_bn: whether batch statistics are those of all processes; compiled: None is "if it helps"
    """
    network, world = model, processes().world
    if world > 1:
        if sync_bn and device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place
        network = nn.parallel.DistributedDataParallel(model)
    if compiled is None:  # Triton is absent on Windows; SyncBatchNorm breaks the graph
        compiled = device.type == "cuda" and find_spec("triton") and not (world > 1 and sync_bn)
    if compiled:  # CUDA graphs: not tried with DistributedDataParallel
        network = torch.compile(network, mode="reduce-overhead" if world == 1 else "default")
    return network


def gather(x):
    """Rows x (N, ...) of all processes, in the order of their ranks, with gradient.

    For a loss that every process computes of all rows: its own ones carry the gradient, times
    the number of processes, as DistributedDataParallel will take the mean over them.
    """
    if not dist.is_initialized():
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach())
    parts[dist.get_rank()] = x.detach() + len(parts) * (x - x.detach())  # x, to the bit
    return torch.cat(parts)


def choose_device(name):
    """The device of that name, or the best there is if that is "auto"; a GPU for each process."""
    there = [kind for kind in ("cuda", "mps", "cpu") if getattr(torch, kind).is_available()]
    device = torch.device(there[0] if name == "auto" else name)
    local = processes().local_rank
    if device.type not in there or device.type == "cuda" and local >= torch.cuda.device_count():
        raise UserError(f"--device {name}: no {device.type} for process {local}, try --device cpu")
    if device.type == "cuda":
        torch.cuda.set_device(local)
        torch.backends.cudnn.benchmark = True  # time each shape's convolutions once, keep the best
    return device


def environment(device):
    """What a log says of where it was made: the device's name, torch, the commit of this file."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    if name == "cpu":
        with suppress(OSError, TypeError), open("/proc/cpuinfo") as file:  # Linux
            name = re.search("model name.*: (.*)", file.read())[1]
        name = f"{name}, {torch.get_num_threads()} threads"
    failed, commit = subprocess.getstatusoutput(
        f'git -C "{Path(__file__).resolve().parent}" describe --always --dirty')
    return {"device": name, "torch": torch.__version__, "commit": None if failed else commit}


def load_checkpoint(path, method=None, args=None, data=None):
    """Read what torch.save wrote: tensors and plain values only, no code of a file is ever run.

    method, args, data: if given, the run that goes on from it, whose settings must be the same
    Raises UserError, in one line, for a file that is absent, damaged, or of other settings.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict):
            raise TypeError
        if args is None:
            return saved
        theirs = {**saved["args"], "method": saved["method"], "images": saved["images"],
                  "mean of the pixels": [round(x, 4) for x in saved["mean"].tolist()]}
        if "warmup_epochs" in theirs:  # checkpoints of earlier versions
            theirs["warmup"] = theirs.pop("warmup_epochs") / theirs["epochs"]
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except Exception as problem:  # a damaged file raises whatever the unpickler meets
        kind, cause, start = re.search(r"GLOBAL (\S+)", str(problem)), type(problem).__name__, b""
        with suppress(OSError), open(path, "rb") as file:
            start = file.read(10)
        if kind:
            cause = (f"it holds a {kind[1]}: if you trust its maker, load it with weights_only="
                     "False and torch.save its weights alone")
        elif start == b"version ht":
            cause = "a pointer of Git LFS: git lfs pull brings the file"
        elif start[8:] == b'{"':
            cause = "safetensors: read it with safetensors.torch.load_file, then torch.save it"
        hint = "; restore it, or begin anew with --overwrite" if args else ""
        raise UserError(f"{path} is not a file of weights, or was cut ({cause}){hint}") from None
    free = ("data_dir", "cache_dir", "max_pixels", "workers", "init", "device", "compile", "out",
            "resume", "overwrite", "save_views", "knn_every", "knn_k", "knn_tau")  # may change
    ours = {**vars(args), "method": method, "images": len(data.train_images),
            "mean of the pixels": [round(x, 4) for x in data.mean.tolist()]}
    changed = [f"{key} was {theirs[key]} and is {value}" for key, value in ours.items()
               if key not in free and theirs.get(key, value) != value]
    if changed:
        raise UserError(f"{path} was made with other settings: {', '.join(changed)}; give those or "
                        f"begin a new run with its weights: --init {path} and another --out")
    return saved


def save_checkpoint(path, state):
    """Write a temporary file, then rename it: a kill at any moment leaves a whole checkpoint."""
    if not all(x.isfinite().all() for x in state.get("model", {}).values()):
        raise UserError(f"the weights are not finite: try a lower --lr; {path} stays as it was")
    part = path.with_suffix(".tmp")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave the name without the bytes
        os.replace(part, path)
    except (OSError, RuntimeError) as problem:  # torch.save makes RuntimeErrors of a full disk
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({problem}): make room, then --resume") from None


def restore(model, path):
    """Begin with a checkpoint's whole model, if it fits, or else with its backbone's weights."""
    saved = load_checkpoint(path)
    ours, theirs = model.state_dict(), saved.get("model")
    if isinstance(theirs, dict) and ours.keys() == theirs.keys() and all(
            getattr(theirs[key], "shape", None) == x.shape for key, x in ours.items()):
        model.load_state_dict(theirs)
        return
    for f in (part for part in model.children() if isinstance(part, ResNet)):  # MoCo has two
        load_backbone(f, saved.get("backbone", saved.get("state_dict", saved)))


def draw_columns(path, columns, args):
    """Draw images and what was made of them, each (N, 3, ., .) in [0, 1], as columns of a PNG."""
    if args.dataset == "folder" and Path(args.data_dir).resolve() in Path(path).resolve().parents:
        raise UserError(f"{path} lies in --data-dir and would be trained on: draw it elsewhere")
    rows = torch.stack([nn.functional.interpolate(x, columns[0].shape[2:]) for x in columns], 1)
    save_image(rows.flatten(0, 1), path, "png", nrow=len(columns))


def locked(path, wait=True):
    """Open a file to read and append to, locked until it is closed or the process ends.

    If another process holds the lock: wait, and say for whom, or raise UserError.
    """
    file = open(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            file.close()
            raise UserError(f"another process writes to {path}: choose another --out") from None
        say(f"waiting for {Path(path).read_text().strip() or 'another'} at {path}")
        fcntl.flock(file, fcntl.LOCK_EX)
    except (OSError, AttributeError):
        pass  # some network file systems have no such locks, nor has Windows
    return file


def open_log(path, end, overwrite):
    """Open and lock a log, and cut it at byte `end`: what was logged and not saved comes again.

    Raises UserError if another process writes to it, or if log and checkpoint are not of one run.
    """
    if (path.stat().st_size if path.exists() else 0) < end:
        raise UserError(f"{path} has lost lines: restore it, or begin with --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    log = locked(path, wait=False)
    log.seek(0)
    if not end and not overwrite and len(log.readlines()) > 2:  # more than a start that was killed
        raise UserError(f"{path} has no checkpoint beside it: restore that, or take --overwrite")
    log.truncate(end)
    return log


def say(text, end="\n"):
    """Print; go on without a standard output that was closed or is full."""
    try:
        print(text, end=end, flush=True)
    except UnicodeEncodeError:  # a file's name, in letters that the output lacks
        print(text.encode("ascii", "backslashreplace").decode(), end=end, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def with_progress(batches, epoch, steps):
    """Pass the batches on and say how far it is: on a terminal in place, else once a minute."""
    said, tty = time.perf_counter(), sys.stdout and sys.stdout.isatty()  # stdout: None if closed
    end, pause = ("\r", 0.5) if tty else ("\n", 60)
    for step, batch in enumerate(batches, 1):
        yield batch
        if time.perf_counter() - said > pause and processes().rank == 0:
            said = time.perf_counter()
            say(f"epoch {epoch} step {step}/{steps}", end)
