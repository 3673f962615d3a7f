"""Data loading, ResNet backbones and files: all that the four method files share.

A method file runs with this file beside it; whoever copies a method copies two files.
Images stay uint8 (N, 3, H, W) until they are on the device, where a 32x32 set lives whole.
"""

import hashlib
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torchvision import datasets
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.transforms import functional as TF

try:
    import fcntl
except ImportError:  # Windows has no such locks: take care yourself
    fcntl = None

DATASETS = ("cifar10", "cifar100", "folder", "shapes")
ARCHS = {"resnet18": (BasicBlock, (2, 2, 2, 2)), "resnet34": (BasicBlock, (3, 4, 6, 3)),
         "resnet50": (Bottleneck, (3, 4, 6, 3)), "resnet101": (Bottleneck, (3, 4, 23, 3)),
         "resnet152": (Bottleneck, (3, 8, 36, 3))}
SHAPES = ("horizontal", "vertical", "diagonal", "checker", "plaid", "grid", "hexagons", "bricks",
          "zigzag", "blobs")


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

    name: one of DATASETS; data_dir: where it lies (cifar10 and cifar100 are downloaded there once)
    image_size: pixels, to which the shorter side is resized, the centre cropped; None: 224, 32 for
    what is no folder; cache_dir: keeps a folder's decoded images, image_size^2 x 3 bytes each;
    None: data_dir; device: takes all of it, or all but images that fill half of its free memory
    Raises ValueError, in one line that says what to do, if the data is missing or broken.
    """
    image_size = image_size or (224 if name == "folder" else 32)
    if name == "folder":
        train, train_labels, test, test_labels, classes = _read_folder(
            Path(data_dir), image_size, cache_dir)
    elif name == "shapes":
        parts = [draw_shapes(500, image_size, seed) for seed in range(14)]
        images, labels = (torch.cat(part) for part in zip(*parts))
        (train, test), (train_labels, test_labels) = images.split(6000), labels.split(6000)
        classes = SHAPES
    elif name in DATASETS:
        train, train_labels, test, test_labels, classes = _read_cifar(name, data_dir, image_size)
    else:
        raise UserError(f"unknown dataset {name!r}: choose from {', '.join(DATASETS)}")
    # Mean and std from a histogram a channel: no float copy of the set. Of large ones a sample.
    share = sum(torch.stack([channel.flatten().bincount(minlength=256) for channel in x.unbind(1)])
                for x in train[::max(1, len(train) // 50_000)].split(1000))
    share = share / share.sum(1, keepdim=True, dtype=torch.float64)  # (3, 256)
    level = torch.arange(256, dtype=torch.float64) / 255
    mean = share @ level
    std = (share @ level.square() - mean.square()).clamp(min=1 / 255**2).sqrt()
    train_labels, test_labels = (x if x is None else x.to(device)
                                 for x in (train_labels, test_labels))
    return Dataset(resident(train, device), train_labels, resident(test, device), test_labels,
                   tuple(classes), mean.float().to(device), std.float().to(device))


def _read_cifar(name, data_dir, image_size):
    """CIFAR through torchvision; offline, name the file to place."""
    kind, archive = {"cifar10": (datasets.CIFAR10, "cifar-10-python.tar.gz"),
                     "cifar100": (datasets.CIFAR100, "cifar-100-python.tar.gz")}[name]
    try:
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        with locked(Path(data_dir, ".lock")):  # of processes that start together one downloads
            sets = [kind(data_dir, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as problem:
        raise UserError(f"cannot download {name} ({problem}): place {archive} in {data_dir}, or "
                         "try --dataset shapes, which needs no files") from None
    out = []
    for one in sets:
        images = torch.from_numpy(np.ascontiguousarray(one.data.transpose(0, 3, 1, 2)))
        if image_size != 32:
            images = torch.cat([TF.resize(x, [image_size, image_size]) for x in images.split(1000)])
        out += [images, torch.tensor(one.targets)]
    return *out, sets[0].classes


def _read_folder(root, image_size, cache_dir):
    """`train/` and `test/` or `val/`, a folder a class; any other tree is images without labels."""
    if not root.is_dir():
        raise UserError(f"--data-dir {root} is not a folder of images")
    train, test = root / "train", root / "test" if (root / "test").is_dir() else root / "val"
    split = train.is_dir() and test.is_dir()
    classes = sorted(path.name for path in train.iterdir() if path.is_dir()) if split else []
    if split and len(classes) < 2:
        raise UserError(f"{train} has {len(classes)} folders of a class: labels need two or more, "
                         "and images without labels no train/ and test/")
    odd = set(classes) ^ {path.name for path in test.iterdir() if path.is_dir()} if split else ()
    if odd:
        raise UserError(f"class {min(odd)!r} is not both in {train} and in {test}")
    extensions, files, labels, counts = datasets.folder.IMG_EXTENSIONS, [], [], []
    for top in (train, test) if split else (root,):
        for label, sub in enumerate(classes or [""]):
            found = sorted(x for x in (top / sub).rglob("*") if x.suffix.lower() in extensions)
            if not found:
                raise UserError(f"no images in {top / sub} (looked for {' '.join(extensions)})")
            files += found
            labels += [label] * len(found)
        counts.append(len(files))
    path = Path(cache_dir or root) / f"{root.resolve().name}-{image_size}.npy"
    images, labels = (x.split([counts[0], len(files) - counts[0]])
                      for x in (_decoded(files, root, image_size, path), torch.tensor(labels)))
    labels = labels if split else (None, None)
    return images[0], labels[0], images[1], labels[1], classes


def locked(path, wait=True):
    """Open a file to read and append to, locked until it is closed or the process ends.

    If another process holds the lock: wait, or raise UserError.
    """
    file = open(path, "a+")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        raise UserError(f"another process writes to {path}: wait for it, or choose another place"
                        ) from None
    except OSError:
        pass  # some network file systems have no such locks
    return file


def _decoded(files, root, size, path):
    """The files as uint8 (N, 3, size, size), mapped from `path`, which is written if need be.

    Behind the array stands a digest of the files' names, sizes and times: it must be theirs.
    """
    digest = hashlib.sha256()
    for file in files:
        try:
            stat = file.stat()
        except OSError as problem:  # a link to nothing
            raise UserError(f"cannot read {file} ({problem}): mend or remove it") from None
        line = f"{file.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_suffix(".lock")):  # of processes that start together one decodes
            kept = b""
            if path.exists() and path.stat().st_size > 32:
                with open(path, "rb") as file:
                    file.seek(-32, os.SEEK_END)
                    kept = file.read()
            if kept != digest.digest():
                _decode(files, size, path, digest.digest())
        with warnings.catch_warnings():  # "c" could be written to, but must fit into memory
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(np.load(path, mmap_mode="r"))
    except OSError as problem:
        raise UserError(f"cannot keep the decoded images ({problem}): name another folder for "
                         "them with --cache-dir") from None


def _decode(files, size, path, digest):
    """Write files as an array to a temporary name, on all cores in bounded memory; rename it."""
    # Machines that share a disk do not share locks: each writes a file of its own.
    mine = f"{path.stem}.{socket.gethostname()}"
    for left in path.parent.glob(f"{mine}-*.tmp"):  # by one that was killed
        left.unlink()
    need, free = len(files) * 3 * size**2, shutil.disk_usage(path.parent).free
    if need > free:
        raise UserError(f"the decoded images need {need / 2**30:.2f} GiB in {path.parent}, which "
                         f"has {free / 2**30:.2f} GiB free: make room, or name another folder for "
                         "them with --cache-dir")
    part, start = path.with_name(f"{mine}-{os.getpid()}.tmp"), time.perf_counter()
    shown = start
    try:
        with open(part, "wb") as out, ThreadPoolExecutor() as pool:  # PIL frees Python's lock
            np.lib.format.write_array_header_1_0(out, {
                "descr": "|u1", "fortran_order": False, "shape": (len(files), 3, size, size)})
            for done in range(0, len(files), 256):
                for image in pool.map(partial(_read_image, size=size), files[done:done + 256]):
                    out.write(image.contiguous().numpy())
                now, done = time.perf_counter(), min(done + 256, len(files))
                if now - shown > 5:
                    shown, left = now, (now - start) * (len(files) / done - 1)
                    print(f"decoding once: {done} of {len(files)} images, {left:.0f} s left",
                          file=sys.stderr, flush=True)
            out.write(digest)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _read_image(path, size):
    """One file of any mode as uint8 (3, size, size): shorter side resized, centre cropped."""
    try:
        image = datasets.folder.default_loader(str(path))  # RGB, whatever the file holds
    except Exception as problem:  # PIL raises OSError, SyntaxError, DecompressionBombError, ...
        raise UserError(f"cannot read the image {path} ({problem}): mend or remove it") from None
    if min(image.size) != size:
        image = TF.resize(image, size)
    return TF.pil_to_tensor(TF.center_crop(image, [size, size]))


def draw_shapes(count, size=32, seed=0):
    """Draw textures of ten classes: images (count, 3, size, size) uint8 and labels (count,) int64.

    Each fills a soft window of random place and size, with random phase, scale, orientation (+-20
    degrees), contrast of either sign, brightness, faint tint and noise. Any part of a texture shows
    its class: a pattern that needs its centre, as rings do, would be lost in a random crop.
    """
    draw = torch.Generator().manual_seed(seed)

    def uniform(low, high, channels=1, pixels=1):
        return low + (high - low) * torch.rand(count, channels, pixels, pixels, generator=draw)

    labels = torch.randperm(count, generator=draw) % len(SHAPES)
    grid = torch.linspace(-1, 1, size)
    x, y = grid - uniform(-0.25, 0.25), grid[:, None] - uniform(-0.25, 0.25)  # window's centre: 0
    window = torch.exp(-((x.square() + y.square()) / uniform(0.8, 1.2).square()).square())
    turn, scale = uniform(-math.pi / 9, math.pi / 9), uniform(9, 18)  # scale: radians a half image
    u, v = scale * (x * turn.cos() - y * turn.sin()), scale * (x * turn.sin() + y * turn.cos())
    a, b = uniform(0, 2 * math.pi), uniform(0, 2 * math.pi)  # phases
    third, half = math.sin(math.pi / 3) * u, v / 2  # third +- half: waves at 120 degrees to v
    shift = math.pi / 2 * torch.cos(half + a / 2).sign()  # every other row of bricks
    noise = nn.functional.interpolate(uniform(-1, 1, pixels=8), (size, size), mode="bicubic")
    patterns = {  # in the order of SHAPES
        "horizontal": torch.sin(v + a), "vertical": torch.sin(u + a),
        "diagonal": torch.sin((u + uniform(-1, 1).sign() * v) / 2**0.5 + a),  # either hand
        "checker": 1.5 * torch.sin(u + a) * torch.sin(v + b),
        "plaid": 0.75 * (torch.sin(u + a) + torch.sin(v + b)),
        "grid": 2 * torch.maximum(torch.sin(u + a), torch.sin(v + b)) - 1,
        "hexagons": (torch.sin(v + a) + torch.sin(third - half + b)
                     - torch.sin(third + half + a + b)) / 1.5,
        "bricks": 2 * torch.maximum(torch.sin(v + a), torch.sin(u / 2 + b + shift)) - 1,
        "zigzag": torch.sin(v + 2 * torch.asin(torch.sin(u + b)) + a), "blobs": 2 * noise}
    pattern = torch.stack([patterns[name] for name in SHAPES], 1)[torch.arange(count), labels]
    tint = 1 + uniform(-0.1, 0.1, channels=3)
    contrast = uniform(0.2, 0.4) * uniform(-1, 1).sign()
    images = uniform(0.4, 0.6) + contrast * pattern * window * tint
    images = images + 0.05 * uniform(-1, 1, pixels=size)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


def normalize(x, mean, std):
    """What enters the network, in training and evaluation alike.

    x: (N, 3, H, W) uint8, or float in [0, 1]; mean, std: (3,) of the training set
    Returns float32 in units of std, in channels_last memory, which convolutions are fastest on.
    """
    if x.dtype == torch.uint8:
        x = x.float() / 255
    x = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    return x.contiguous(memory_format=torch.channels_last)


def resident(images, device):
    """The images on the device if they fit in half of its free memory, else as they are."""
    device = torch.device(device)
    if device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return images
    return images.to(device)


def batches(images, order, batch_size, device, workers=min(8, os.cpu_count() or 1)):
    """Yield images[order] on the device, batch by batch; the last one may be smaller.

    images: (N, 3, H, W) uint8, on the device or on the host; order: (M,) int64 on the host
    Images on the host are gathered by `workers` threads into pinned memory, ahead of the network.
    """
    if not len(order):
        return  # split would yield one empty batch
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
class ResNet(nn.Module):
    """A residual network without classifier, in torchvision's names, He et al., arXiv 1512.03385.

    (N, 3, H, W) in, (N, num_features) out: the average of the last map.
    """

    def __init__(self, block, depths, width, stem):
        super().__init__()
        planes = [round(64 * width * 2**stage) for stage in range(4)]
        cifar = stem == "cifar"  # full size, no max-pool: a 32x32 image keeps a last map of 4x4
        kernel, stride, padding = (3, 1, 1) if cifar else (7, 2, 3)
        self.conv1 = nn.Conv2d(3, planes[0], kernel, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if cifar else nn.MaxPool2d(3, 2, 1)
        channels = planes[0]
        for stage in range(4):
            blocks, out = [], planes[stage] * block.expansion
            for i in range(depths[stage]):
                stride, shortcut = 2 if stage > 0 and i == 0 else 1, None
                if stride != 1 or channels != out:
                    shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False),
                                             nn.BatchNorm2d(out))
                blocks.append(block(channels, planes[stage], stride, shortcut))
                channels = out
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.num_features = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as torchvision's ResNet
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean((2, 3))  # (N, num_features)


def resnet(arch="resnet18", width=1.0, stem="cifar", weights=None):
    """A ResNet backbone: arch of ARCHS, width multiplies all channel counts (SimCLR's 1x, 2x, 4x).

    stem: "cifar" (3x3, no max-pool) or "imagenet" (7x7, max-pool); `num_features`: the output size
    weights: a file to begin with, one of our checkpoints or a state dict in torchvision's names
    Raises ValueError for an unknown arch or stem, or a width that leaves no channel; UserError for
    weights of another network.
    """
    if arch not in ARCHS or stem not in ("cifar", "imagenet") or round(64 * width) < 1:
        raise ValueError(f"no backbone with arch {arch!r}, width {width} and stem {stem!r}")
    f = ResNet(*ARCHS[arch], width, stem)
    if weights:
        state = load_checkpoint(weights)
        state = state.get("backbone", state.get("state_dict", state))
        try:
            f.load_state_dict({name: x for name, x in state.items() if not name.startswith("fc.")})
        except RuntimeError as problem:
            first = str(problem).splitlines()[1].strip()
            raise UserError(f"{weights} is not a {arch} of width {width:g} with the {stem} stem "
                            f"(--arch, --width, --stem): {first}") from None
    return f


# ----------------------------------------------------------------------------- files and processes
class UserError(ValueError):
    """What the user can mend; the text is one line that says how."""


class Processes(NamedTuple):
    """What torchrun tells this process; alone without torchrun."""

    rank: int        # its number among all
    world: int       # how many there are
    local_rank: int  # its number on this machine, which is its GPU's


def processes():
    """This process among those that torchrun started."""
    return Processes(int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1),
                     int(os.environ.get("LOCAL_RANK") or 0))


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
        compiled = (device.type == "cuda" and find_spec("triton")
                    and not (world > 1 and sync_bn))
    if compiled:  # CUDA graphs: not tried with DistributedDataParallel
        mode = "reduce-overhead" if world == 1 else "default"
        network = torch.compile(network, mode=mode)
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
    kinds = ("cuda", "mps", "cpu") if name == "auto" else (name,)
    device = torch.device(next(kind for kind in kinds if getattr(torch, kind).is_available()))
    if device.type == "cuda":
        torch.cuda.set_device(processes().local_rank)
        torch.backends.cudnn.benchmark = True  # time each shape's convolutions once, keep the best
    return device


def environment(device):
    """What a log says of where it was made: the device's name, torch, the commit of this file."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    here = Path(__file__).resolve().parent
    return {"device": name, "torch": torch.__version__, "commit": subprocess.getoutput(
        f'git -C "{here}" describe --always --dirty')}


def load_checkpoint(path, method=None, args=None, data=None):
    """Read what torch.save wrote: tensors and plain values only, no code of a file is ever run.

    method, args, data: if given, the run that goes on from it, whose settings must be the same
    Raises UserError, in one line, for a file that is absent, damaged, or of other settings.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if args is None:
            return saved
        theirs = {**saved["args"], "method": saved["method"], "images": saved["images"],
                  "mean of the pixels": [round(x, 4) for x in saved["mean"].tolist()]}
    except FileNotFoundError:
        raise UserError(f"there is no {path}") from None
    except Exception as problem:  # a damaged file raises whatever the unpickler meets
        raise UserError(f"{path} is not a whole checkpoint ({type(problem).__name__}): restore it, "
                        "or begin anew with --overwrite") from None
    free = ("data_dir", "cache_dir", "workers", "device", "compile", "out", "resume", "overwrite",
            "save_views", "knn_every", "knn_k", "knn_tau")  # these may change within a run
    ours = {**vars(args), "method": method, "images": len(data.train_images),
            "mean of the pixels": [round(x, 4) for x in data.mean.tolist()]}
    changed = [f"{key} was {theirs[key]} and is {value}" for key, value in ours.items()
               if key not in free and theirs.get(key, value) != value]
    if changed:
        raise UserError(f"{path} was made with other settings: {', '.join(changed)}; a new run may "
                        f"begin with its weights: --init {path} and another --out")
    return saved


def save_checkpoint(path, state):
    """Write a temporary file, then rename it: a kill at any moment leaves a whole checkpoint."""
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
    """Load another run's whole model, where it fits; its backbone is the model's already."""
    weights = load_checkpoint(path).get("model", {})
    ours = {name: x.shape for name, x in model.state_dict().items()}
    if {name: x.shape for name, x in weights.items()} == ours:
        model.load_state_dict(weights)


def open_log(path, end, overwrite):
    """Open and lock a log, and cut it at byte `end`: what was logged and not saved comes again.

    Raises UserError if another process writes to it, or if log and checkpoint are not of one run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    log = locked(path, wait=False)
    if log.seek(0, os.SEEK_END) < end:
        raise UserError(f"{path} has lost lines: restore it, or begin with --overwrite")
    log.seek(0)
    if not end and not overwrite and len(log.readlines()) > 2:  # more than a start that was killed
        raise UserError(f"{path} has no checkpoint beside it: restore that, or take --overwrite")
    log.truncate(end)
    return log


def say(text, end="\n", file=None):
    """Print; go on without an output that was closed or is full."""
    file = file or sys.stdout
    try:
        print(text, end=end, file=file, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def with_progress(batches, epoch, steps):
    """Pass the batches on and say how far it is: on a terminal in place, else once a minute."""
    terminal, said = sys.stderr.isatty(), time.perf_counter()
    for step, batch in enumerate(batches, 1):
        yield batch
        if time.perf_counter() - said > (0.5 if terminal else 60) and processes().rank == 0:
            said = time.perf_counter()
            say(f"epoch {epoch} step {step}/{steps}", "\r" if terminal else "\n", sys.stderr)
