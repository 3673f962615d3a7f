"""Judge a backbone: linear, fine-tuned or from scratch, all or few labels, kNN, pictures, export.

    python linear_eval.py runs/simclr/checkpoint.pt
    python linear_eval.py resnet50.pth --arch resnet50 --dataset folder --data-dir imagenet100

--mode linear    a linear classifier on the frozen backbone: evaluation mode, no gradient, so that
                 its weights and batch norm buffers keep every bit. Features of an image are
                 computed once and the classifier fitted by L-BFGS, which has no rates to tune;
                 --augment trains it by SGD on random crops and flips instead.
--mode finetune  backbone and classifier are trained together, from the checkpoint.
--mode scratch   the same network from random weights: the supervised baseline.

Accuracies are percent of the whole test set after the last epoch; nothing is chosen by them. The
kNN table is of the backbone before any training here; --label-fraction hides labels from it too.

CHECKPOINT is one of the four scripts', or any file of weights in torchvision's names: a plain
state dict or {"state_dict": ...}, with --prefix cut off; what is under fc. is a head and left out.

Differences from the papers:
- The classifier has a batch norm without affine in front, as in MAE (He et al. 2111.06377, App. A):
  features differ by orders of magnitude between methods, and one setting must fit all.
"""

# =================== 1. Imports ===================
import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import transforms
from torchvision.utils import save_image

from common import ARCHS, DATASETS, batches, load_dataset, normalize, resnet

RECIPES = {  # epochs, learning rate at batch 256, weight decay
    "linear": (1000, None, None),  # iterations at most [ours, measured: SimSiam needed 800]
    "augment": (100, 0.1, 0.0),  # linear with --augment [ours; 100 as in the MoCo CIFAR demo]
    "finetune": (30, 0.05, 0.0),  # [SimCLR App. B.5, which takes 60 epochs for 1 % of the labels]
    "scratch": (100, 0.1, 5e-4)}  # [ours; He et al. 1512.03385 Sec. 4.2 took 0.2 by this measure]
DEFAULTS = {"dataset": "cifar10", "data_dir": "data", "cache_dir": None, "image_size": None,
            "arch": "resnet18", "width": 1.0}  # where weights come without the arguments of their run
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std of torchvision's weights


# =================== 2. Options ===================
def fail(message, status=2):
    """End the program with one line on standard error."""
    sys.stderr.write(f"error: {' '.join(str(message).split())}\n")  # one write: lines never mix
    raise SystemExit(status)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that ends wrong input with one line."""

    def error(self, message):
        fail(message)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of every flag that has one."""

    def _get_help_string(self, action):
        unset = action.default is None or action.default is False
        return action.help if unset else super()._get_help_string(action)


def number(kind, low, high):
    """An argparse type: an int or a float from low to high; nan and inf are outside."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value
    parse.__name__ = "whole number" if kind is int else "number"  # "invalid whole number value"
    return parse


def parse_args(argv=None):
    """Read the flags; make all checks that need no file; end wrong ones in one line, status 2."""
    parser = Parser(description=__doc__.split("\n")[0], usage="%(prog)s CHECKPOINT [flags]",
                    formatter_class=Help, allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="ours, or foreign weights")
    add = parser.add_argument_group("judge").add_argument
    add("--mode", choices=("linear", "finetune", "scratch"), default="linear",
        help="what is trained")
    add("--epochs", type=number(int, 1, 10**6),
        help="(default: 1000 iterations of L-BFGS; --augment and scratch 100, finetune 30)")
    add("--lr", type=number(float, 1e-8, 1e3),
        help="at batch 256, scaled linearly with the batch (default: 0.1, finetune 0.05)")
    add("--weight-decay", type=number(float, 0, 1), help="(default: 0, scratch 5e-4)")
    add("--augment", action="store_true",
        help="random crops and flips in linear mode; the other modes always have them")
    add("--label-fraction", type=number(float, 1e-6, 1), default=1.0,
        help="share of each class that keeps its labels, at least one image")
    add("--head-layers", type=number(int, 0, 10), default=0,
        help="layers of the projector to keep [SimCLR v2 Sec. 2]")
    add("--knn", type=number(int, 1, 10**6), nargs="*", default=[1, 5, 20, 200], metavar="K",
        help="neighbours, a kNN accuracy each; without a K no kNN")
    add("--knn-tau", type=number(float, 1e-3, 1e3), default=0.1,
        help="temperature of a neighbour's vote [MoCo CIFAR demo]")
    add = parser.add_argument_group("data, if not the checkpoint's").add_argument
    add("--dataset", choices=DATASETS, help="may be another than in pre-training: transfer")
    add("--data-dir", help="where it lies or is downloaded to")
    add("--cache-dir", help="where a folder's decoded images are kept (default: in --data-dir)")
    add("--image-size", type=number(int, 8, 4096), help="pixels")
    add("--mean", type=number(float, -10, 10), nargs=3, metavar=("R", "G", "B"),
        help="of the pixels in [0, 1] (default: the checkpoint's; for foreign weights ImageNet's)")
    add("--std", type=number(float, 1e-6, 10), nargs=3, metavar=("R", "G", "B"), help="likewise")
    add("--workers", type=number(int, 1, 1024), default=min(8, os.cpu_count() or 1),
        help="threads that gather training images that do not fit on the device")
    add = parser.add_argument_group("network, if not the checkpoint's").add_argument
    add("--arch", choices=ARCHS, help="backbone (default for foreign weights: resnet18)")
    add("--width", type=number(float, 0.25, 16), help="times every channel count")
    add("--stem", choices=("cifar", "imagenet"), help="(default: by the size of conv1)")
    add("--prefix", metavar="NAME", help="of the backbone in foreign weights: module.encoder_q.")
    add = parser.add_argument_group("run").add_argument
    add("--batch-size", type=number(int, 2, 10**6), default=256, help="images a step")
    add("--seed", type=number(int, 0, 10**9), default=0, help="of all random numbers")
    add("--device", choices=("auto", "cuda", "cpu", "mps"), default="auto", help="auto: the best")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto",
        help="auto: bf16 on CUDA, else fp32; there fp32 has convolutions in TF32")
    add = parser.add_argument_group("output").add_argument
    add("--out", help="folder of the results in JSON (default: the checkpoint's)")
    add("--neighbours", metavar="PNG", help="draw ten images and the ten nearest to each")
    add("--map", metavar="PNG", help="draw the images in the plane of their principal components")
    add("--export", metavar="PTH", help="write the backbone alone, in torchvision's names")
    add("--tensorboard", action="store_true", help="write the embedding projector's files to --out")
    args = parser.parse_args(argv)
    if args.device in ("cuda", "mps") and not getattr(torch, args.device).is_available():
        fail(f"--device {args.device}: this machine has none; use --device auto or cpu")
    for path in filter(None, (args.neighbours, args.map, args.export)):
        if not Path(path).resolve().parent.is_dir() or Path(path).is_dir():
            fail(f"cannot write {path}: it is a folder, or its folder does not exist")
    for path in filter(None, (args.neighbours, args.map)):
        if Path(path).suffix not in (".png", ".jpg"):
            fail(f"cannot draw {path}: a picture's name ends in .png or .jpg")
    if args.mode == "linear" and not args.augment and (args.lr or args.weight_decay) is not None:
        fail("--lr and --weight-decay are for --augment, finetune and scratch: L-BFGS has neither")
    if args.mode == "scratch" and args.head_layers:
        fail("--head-layers keeps what --mode scratch throws away")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        fail("--tensorboard needs a package: pip install tensorboard")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("this script runs in one process: start it with python, not with torchrun")
    return args


# =================== 3. Backbone ===================
def read_weights(path, prefix=None):
    """Read a checkpoint as (backbone's state dict, all of ours or {} for foreign weights).

    prefix: what the backbone's names begin with in foreign weights; names without it are left out
    Raises ValueError, in one line, for a file that is not weights or that carries code.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path}") from None
    except Exception as problem:  # a damaged file raises whatever the unpickler meets
        raise ValueError(f"{path} is not a file of weights ({type(problem).__name__})") from None
    ours = (isinstance(saved, dict) and {"backbone", "model"} <= saved.keys()
            and isinstance(saved.get("args"), dict))
    weights = saved
    if isinstance(saved, dict):
        weights = saved["backbone"] if ours else saved.get("state_dict", saved)
    for part in (weights, saved["model"]) if ours else (weights,):
        if not isinstance(part, dict) or not all(
                isinstance(key, str) and torch.is_tensor(x) for key, x in part.items()):
            raise ValueError(f"{path} holds no state dict: expected names and tensors")
    prefix = prefix or ""
    kept = {key.removeprefix(prefix): x for key, x in weights.items() if key.startswith(prefix)}
    if "conv1.weight" not in kept:
        found = next((key for key in weights if key.endswith("conv1.weight")), None)
        hint = f"there is {found}: the part before conv1 is the --prefix" if found else "no ResNet"
        raise ValueError(f"{path} has no weights {prefix}conv1.weight: {hint}")
    return {key: x for key, x in kept.items() if not key.startswith("fc.")}, saved if ours else {}


def load_backbone(weights, arch, width, stem):
    """A backbone with exactly these weights; ValueError lists what is missing or left over."""
    f = resnet(arch, width, stem)
    try:
        f.load_state_dict(weights)
    except RuntimeError as problem:
        differences = textwrap.shorten(str(problem), 600, placeholder=" ...")
        raise ValueError(f"the weights are not a {arch} of width {width:g} with the {stem} stem "
                         f"(--arch, --width, --stem): {differences}") from None
    return f


def load_head(saved, count):
    """The first `count` linear layers of a checkpoint's projector, each with what follows it."""
    weights = {key[2:]: x for key, x in saved.get("model", {}).items() if key.startswith("g.")}
    layers, linear = [], 0
    for i in range(1 + max((int(key.split(".")[0]) for key in weights), default=-1)):
        mine = {key.split(".")[1]: x for key, x in weights.items() if key.startswith(f"{i}.")}
        linear += mine.get("weight", torch.empty(0)).ndim == 2
        if linear > count:
            break
        if "running_mean" in mine:
            layers.append(nn.BatchNorm1d(len(mine["running_mean"]), affine="weight" in mine))
        elif mine:
            layers.append(nn.Linear(*mine["weight"].T.shape, bias="bias" in mine))
        else:
            layers.append(nn.ReLU())  # has no parameters
        layers[-1].load_state_dict(mine)
    if linear < count:
        raise ValueError(f"--head-layers {count}: the checkpoint's projector has {linear} layers")
    return nn.Sequential(*layers)


def few_labels(labels, fraction, seed):
    """Indices (n,) of a fraction of each class, at least one image; labels (N,) int64."""
    if fraction == 1:
        return torch.arange(len(labels))
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=draw)
    parts = [order[labels[order] == label] for label in labels.unique()]
    return torch.cat([part[:max(1, round(fraction * len(part)))] for part in parts])


# =================== 4. Features and kNN ===================
@torch.no_grad()
def features(f, images, mean, std, batch_size, autocast):
    """The frozen backbone's output, in evaluation mode: (N, 3, H, W) uint8 to (N, D) float32."""
    f.eval()
    out, done = None, 0  # not a list to join: that would hold all of them twice
    for x in batches(images, torch.arange(len(images)), batch_size, mean.device):
        with autocast():
            x = f(normalize(x, mean, std))
        out = x.new_empty(len(images), x.shape[1], dtype=torch.float32) if out is None else out
        out[done:done + len(x)] = x
        done += len(x)
    return out


def knn_accuracy(bank, bank_labels, queries, labels, num_classes, k=200, tau=0.1):
    """Percent of queries whose k nearest of the bank elect the right class, Wu et al. 1805.01978.

    bank: (N, D), queries: (M, D), normalised here; labels (N,) and (M,) int64
    Each neighbour votes exp(cosine / tau); a tie goes to the lower class; k is at most N.
    """
    cosine = queries.new_empty(len(queries), 0, dtype=torch.float32)  # to (M, k): the nearest
    voter = labels.new_empty(len(queries), 0)  # their labels
    rows = max(1, 2**25 // bank.shape[1])  # 128 MiB of the bank at a time, and of similarities
    for part, part_labels in zip(bank.split(rows), bank_labels.split(rows)):
        part = F.normalize(part.float(), dim=1).T  # (D, n)
        near = [(F.normalize(query.float(), dim=1) @ part).topk(min(k, len(part_labels)), dim=1)
                for query in queries.split(max(1, 2**25 // len(part_labels)))]
        values, indices = map(torch.cat, zip(*near))
        cosine, order = torch.cat([cosine, values], 1).sort(dim=1, descending=True, stable=True)
        voter = torch.cat([voter, part_labels[indices]], 1).gather(1, order)[:, :k]
        cosine = cosine[:, :k]
    vote = ((cosine - cosine[:, :1]) / tau).exp()  # the nearest votes 1: no over- or underflow
    votes = vote.new_zeros(len(queries), num_classes).scatter_add_(1, voter, vote)
    return 100 * (votes.argmax(1) == labels).sum().item() / len(queries)


# =================== 5. Pictures ===================
def frame(images, colors):
    """Enlarge images (N, 3, H, W) uint8 to 64 pixels or more and frame them in colors (N, 3)."""
    big = F.interpolate(images / 255, scale_factor=math.ceil(64 / images.shape[3]))
    framed = colors[:, :, None, None].repeat(1, 1, big.shape[2] + 6, big.shape[3] + 6)
    framed[:, :, 3:-3, 3:-3] = big
    return framed


def draw_neighbours(path, bank, bank_images, bank_labels, queries, images, labels):
    """Ten rows, spread over the set: an image, then its ten nearest of the bank, nearest first.

    A neighbour's frame is green for the query's class, red for another, grey without labels.
    queries: (M, D) features of images (M, 3, H, W); the bank's images if images is bank_images
    """
    rows, green, red, grey = [], *torch.tensor([[0.1, 0.7, 0.2], [0.9, 0.1, 0.1], [0.6, 0.6, 0.6]])
    for i in torch.linspace(0, len(queries) - 1, min(10, len(queries))).long().tolist():
        cosine = bank @ queries[i] / bank.norm(dim=1).clamp(min=1e-12)
        if images is bank_images:
            cosine[i] = -math.inf  # not its own neighbour
        near = cosine.topk(min(10, len(bank))).indices.cpu()
        colors = [grey] * len(near) if labels is None else [
            green if label == labels[i] else red for label in bank_labels[near]]
        cells = torch.cat([images[i:i + 1].cpu(), bank_images[near].cpu()])
        rows.append(frame(cells, torch.stack([torch.ones(3), *colors])))
    save_image(torch.cat(rows), path, nrow=len(rows[0]), pad_value=1.0)


def draw_map(path, queries, images, labels, side=30):
    """At most side x side images by their first two principal components, spread to a full grid.

    The images are cut into columns along the first component, each column is sorted by the second:
    neighbours stay neighbours, and none hides another. A frame's colour is a class.
    """
    side = min(side, math.isqrt(len(queries)))
    chosen = torch.linspace(0, len(queries) - 1, side**2).long()
    queries, images, labels = (x if x is None else x[chosen].cpu()
                               for x in (queries, images, labels))
    x = F.normalize(queries.double(), dim=1)
    x = x - x.mean(0)
    plane = x @ torch.linalg.eigh(x.T @ x).eigenvectors[:, -2:].flip(1)  # (n, 2)
    columns = plane[:, 0].argsort().view(side, side)
    grid = torch.stack([column[plane[column, 1].argsort()] for column in columns], 1).flatten()
    colors = torch.ones(len(chosen), 3)
    if labels is not None:
        hue = labels[:, None] / (labels.max() + 1) - torch.tensor([0, 1 / 3, 2 / 3])
        colors = 0.5 + 0.5 * torch.cos(2 * math.pi * hue)
    save_image(frame(images, colors)[grid], path, nrow=side, pad_value=1.0)


def write_projector(out, queries, images, labels, classes):
    """TensorBoard's embedding projector of the test images, or of as many as its sprite holds."""
    from torch.utils.tensorboard import SummaryWriter
    most = min(len(queries), (8192 // images.shape[3]) ** 2)  # a sprite has 8192 pixels a side
    chosen = torch.linspace(0, len(queries) - 1, most).long()  # of all classes
    names = None if labels is None else [classes[i] for i in labels[chosen].tolist()]
    with SummaryWriter(str(out)) as writer:
        writer.add_embedding(queries[chosen].cpu(), names, images[chosen].cpu() / 255)


# =================== 6. Training ===================
def commit():
    """The commit of these files, "-dirty" if they were changed since, None outside a checkout."""
    return subprocess.run("git describe --always --dirty", shell=True, cwd=Path(__file__).parent,
                          capture_output=True, text=True).stdout.strip() or None


def fit(head, bank, labels, iterations):
    """Logistic regression by L-BFGS with scikit-learn's default penalty: no learning rate to tune.

    head: batch norm without affine, whose statistics become the bank's, and linear layer
    bank: (N, D) float32 features and their labels (N,), both on the device, summed over in parts
    """
    norm, linear = head.eval()
    var, norm.running_mean = bank.var(0, unbiased=False), bank.mean(0)
    norm.eps, norm.running_var = 1e-30, var.clamp(min=1e-12 * var.max() + 1e-30)  # at any scale
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=iterations, max_eval=2 * iterations,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = linear.weight.square().sum() / (2 * len(bank))  # C = 1
        loss.backward()
        for x, y in zip(bank.split(2**16), labels.split(2**16)):
            part = F.cross_entropy(head(x), y, reduction="sum") / len(bank)
            part.backward()
            loss = loss.detach() + part.detach()
        return loss

    optimizer.step(closure)
    print(f"loss={closure().item():.4g}", flush=True)


def train(network, head, keep, data, args, recipe, autocast):
    """SGD on random crops and flips: of the head, and in two modes of the network too.

    keep: (n,) indices of the images whose labels may be used; recipe: one of RECIPES
    """
    epochs, lr, decay = recipe
    # Few labels: at least 16 steps an epoch, or 1 % of CIFAR-10 would be two.
    batch = min(args.batch_size, max(8, len(keep) // 16), len(keep))
    steps, frozen = len(keep) // batch, args.mode == "linear"
    crop_and_flip = transforms.Compose([  # scale 0.08 to 1, ratio 3/4 to 4/3 [SimCLR App. B.5]
        transforms.RandomResizedCrop(data.train_images.shape[3]), transforms.RandomHorizontalFlip()])
    network.requires_grad_(not frozen)
    parameters = [*head.parameters(), *(() if frozen else network.parameters())]
    optimizer = torch.optim.SGD(parameters, lr * batch / 256, 0.9,  # linear scaling, 1706.02677
                                weight_decay=decay, nesterov=True)  # [SimCLR App. B.5]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for epoch in range(1, epochs + 1):
        torch.manual_seed(args.seed * 10**6 + epoch)
        order = keep[torch.randperm(len(keep))[:steps * batch]]
        network.train(not frozen)
        total, start = 0, time.perf_counter()
        for x, y in zip(batches(data.train_images, order, batch, data.mean.device, args.workers),
                        data.train_labels[order].split(batch)):
            optimizer.zero_grad()
            x = torch.stack([crop_and_flip(image) for image in x / 255])
            with torch.set_grad_enabled(not frozen), autocast():
                x = network(normalize(x, data.mean, data.std))
            loss = F.cross_entropy(head(x.float()), y)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        loss = total.item() / steps
        if not math.isfinite(loss):
            fail(f"the loss is {loss} at epoch {epoch}: try a lower --lr", status=1)
        print(f"epoch={epoch} loss={loss:.4g} seconds={time.perf_counter() - start:.3g}",
              flush=True)


def classify(network, bank, queries, keep, data, args, autocast):
    """Train a classifier as --mode says; returns top-1 and top-5 in percent of the test images.

    keep: (n,) indices of the labels that may be used; bank: features of these images
    queries: features of the test images
    """
    recipe = [default if value is None else value for value, default in zip(
        (args.epochs, args.lr, args.weight_decay),
        RECIPES["augment" if args.augment and args.mode == "linear" else args.mode])]
    linear = nn.Linear(bank.shape[1], len(data.classes))
    nn.init.zeros_(linear.weight)  # a channel that is 0 in all of training stays without effect
    nn.init.zeros_(linear.bias)
    norm = nn.BatchNorm1d(bank.shape[1], 1e-12, affine=False)  # [MAE App. A]
    head = nn.Sequential(norm, linear).to(bank.device)
    if args.mode == "linear" and not args.augment:
        fit(head, bank, data.train_labels[keep], recipe[0])
    else:
        train(network, head, keep, data, args, recipe, autocast)
    if args.mode != "linear":
        queries = features(network, data.test_images, data.mean, data.std, args.batch_size,
                           autocast)
    with torch.no_grad():
        best = head.eval()(queries).topk(min(5, len(data.classes))).indices
    right = best == data.test_labels[:, None]
    return {"top1": 100 * right[:, 0].sum().item() / len(right),
            "top5": 100 * right.any(1).sum().item() / len(right)}


def judge(args):
    """Judge a checkpoint: print one line, return its numbers as a dict, write them as JSON."""
    start = time.perf_counter()
    device = torch.device(next(kind for kind in ("cuda", "mps", "cpu") if args.device in
                               (kind, "auto") and getattr(torch, kind).is_available()))
    bf16 = args.precision == "bf16" or args.precision == "auto" and device.type == "cuda"
    autocast = partial(torch.autocast, device.type, torch.bfloat16, bf16)
    out = Path(args.out or Path(args.checkpoint).parent)
    torch.manual_seed(args.seed)
    try:
        weights, saved = read_weights(args.checkpoint, args.prefix)
        pretrain = {**DEFAULTS, **saved.get("args", {})}
        arch, width = args.arch or pretrain["arch"], args.width or pretrain["width"]
        small = weights["conv1.weight"].shape[-1:] == (3,)  # a CIFAR stem
        stem = args.stem or ("cifar" if small else "imagenet")
        f = load_backbone(weights, arch, width, stem)
        if args.mode == "scratch":
            f = resnet(arch, width, stem)
        network = nn.Sequential(f, *load_head(saved, args.head_layers))
        network = network.to(device, memory_format=torch.channels_last)
        large = pretrain["dataset"] == "folder" if saved else not small
        size = args.image_size or pretrain["image_size"] or (224 if large else 32)
        name = args.dataset or pretrain["dataset"]
        same = name == pretrain["dataset"] and not args.data_dir
        data = load_dataset(name, args.data_dir or (pretrain if same else DEFAULTS)["data_dir"],
                            size, args.cache_dir or (pretrain["cache_dir"] if same else None),
                            device)
        if data.train_labels is None and args.mode != "linear":
            raise ValueError(f"--mode {args.mode} needs labels: train/ and test/ or val/, with a "
                             "folder a class")
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as problem:
        fail(problem)
    mean, std = (torch.as_tensor(x, device=device) for x in (
        args.mean or saved.get("mean", IMAGENET[0]), args.std or saved.get("std", IMAGENET[1])))
    data = data._replace(mean=mean, std=std)
    bank = features(network, data.train_images, mean, std, args.batch_size, autocast)
    queries, images, labels = bank, data.train_images, None  # a folder without splits
    if data.test_labels is not None:
        images, labels = data.test_images, data.test_labels
        queries = features(network, images, mean, std, args.batch_size, autocast)
    if not (bank.isfinite().all() and queries.isfinite().all()):
        fail("the features are not finite: broken weights, or try --precision fp32", status=1)
    try:
        if args.neighbours:
            draw_neighbours(args.neighbours, bank, data.train_images, data.train_labels, queries,
                            images, labels)
        if args.map:
            draw_map(args.map, queries, images, labels)
    except (OSError, ValueError) as problem:
        fail(problem)
    if args.tensorboard:
        write_projector(out, queries, images, labels, data.classes)

    results, keep = {}, ()
    if data.train_labels is None:
        print("no labels: no accuracies", flush=True)
    else:
        keep = few_labels(data.train_labels.cpu(), args.label_fraction, args.seed)
        kept = bank if args.label_fraction == 1 else bank[keep]
        table = {f"knn{k}": knn_accuracy(kept, data.train_labels[keep], queries, labels,
                                         len(data.classes), k, args.knn_tau) for k in args.knn}
        results = {**classify(network, kept, queries, keep, data, args, autocast), **table}
        print(" ".join(f"{key}={value:.2f}" for key, value in results.items()),
              f"tau={args.knn_tau:g}", flush=True)
    parts = ((Path(args.checkpoint).stem, not saved), (args.mode, True), ("augment", args.augment),
             (name, name != pretrain["dataset"]),
             (f"{args.label_fraction:g}", args.label_fraction < 1),
             (f"head{args.head_layers}", args.head_layers > 0), (f"seed{args.seed}", args.seed > 0))
    try:
        file_name = "_".join(["eval", *(part for part, differs in parts if differs)])
        (out / f"{file_name}.json").write_text(json.dumps({
            **results, "args": vars(args), "method": saved.get("method"),
            "epoch": saved.get("epoch"), "images": len(data.train_images), "labels": len(keep),
            "test_images": len(data.test_images), "features": bank.shape[1],
            "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
            "precision": "bf16" if bf16 else "fp32", "torch": torch.__version__,
            "commit": commit(), "seconds": time.perf_counter() - start}) + "\n")
        if args.export:
            torch.save({key: x.cpu() for key, x in f.state_dict().items()}, args.export)
    except (OSError, RuntimeError) as problem:  # torch.save makes RuntimeErrors of a full disk
        fail(problem)
    return results


def main(argv=None):
    """Judge as the flags say and return the numbers; end what stops it in one line."""
    args = parse_args(argv)
    try:
        return judge(args)
    except KeyboardInterrupt:
        fail("stopped: nothing is saved", status=130)


if __name__ == "__main__":
    main()
