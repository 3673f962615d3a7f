"""Evaluate a checkpoint: train a classifier, fine-tune, distil, kNN, pictures, export.

    python linear_eval.py runs/simclr
    python linear_eval.py resnet50.pth --arch resnet50 --dataset folder --data-dir images

CHECKPOINT is a run's folder or its checkpoint.pt, or a file of ResNet weights, whose
tensors are named as in torchvision, or by numbers as in nn.Sequential. This file needs
common.py and simsiam.py beside it, and for --head-layers the method's own file.

--mode linear    Train a classifier on the frozen backbone: by L-BFGS on features that are
                 computed once, or with --augment by SGD on random crops.
--mode finetune  Train the backbone and a classifier, from the checkpoint.
--mode scratch   Train the same network from random weights: the supervised baseline.
--mode distill   Fine-tune a teacher. A student, also from the checkpoint, then learns its
                 softened predictions for all training images: step 3 of SimCLR v2
                 [2006.10029], after pre-training and fine-tuning.

Accuracies are percentages over all test images after the last epoch: top1, top5, and
`balanced`, the mean of the classes' top1. They never select an epoch or a setting. kNN
and pictures show the backbone before --mode trains it (random weights in scratch mode);
an export is written after. Without a test split, a fifth of each class's images, but at
least one, is held out to test on.

Differences from the papers: a batch norm without scale and shift stands before the
classifier [MAE App. A]. A student is trained by SGD for 100 epochs, not by LARS for 400
as in SimCLR v2. Only the teacher's scores are divided by tau, not the student's: at a low
tau SGD, unlike LARS, would hardly change the student's backbone.
"""
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors

# =================== 1. Imports ===================
import argparse
import copy
import importlib
import io
import json
import math
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import ImageDraw, ImageOps
from torch import nn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid, save_image

from common import (
    ARCHS, DATASETS, UserError, batches, fill_backbone, load_dataset, load_weights,
    normalize, resnet, say)
from simsiam import (
    COUNT, FRACTION, RATE, add_flags, describe, fail, features, file_path, knn_accuracy,
    processes, random_flip, random_resized_crop, start_process, within)

RECIPES = {  # epochs, learning rate at batch size 256, weight decay
    "linear": (1000, None, None),  # at most 1000 iterations of L-BFGS, not epochs [ours]
    "augment": (100, 0.1, 0.0),  # linear with --augment [ours; epochs: MoCo CIFAR demo]
    "finetune": (30, 0.05, 0.0),  # [SimCLR App. B.5, which has 60 epochs for 1 %]
    "scratch": (100, 0.1, 5e-4),  # [ours; He et al. 1512.03385: 0.1 at batch 128]
    "distill": (100, 0.06, 5e-4),  # as in pre-training [SimCLR v2 Sec. 3]
}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's mean and std
METHODS = ("simclr", "moco", "simsiam", "simsiam_logo")

# =================== 2. Options ===================
FLAGS = [  # name, type or choices, default, meaning
    # How to judge
    ("--mode", ("linear", "finetune", "scratch", "distill"), "linear", "what to train"),
    ("--epochs", COUNT, None, "None: 100; finetune and teacher 30; L-BFGS 1000"),
    ("--lr", RATE, None,
     "for batch size 256, scaled with the batch size; None: 0.1, finetune 0.05, distill 0.06"),
    ("--weight-decay", FRACTION, None, "None: 0; scratch and distill 5e-4"),
    ("--batch-size", within(int, 2, 10**6), None, "None: 256, or less for few images"),
    ("--augment", bool, False, "linear mode by SGD on random crops"),
    ("--label-fraction", within(float, 1e-6, 1), 1.0, "share of each class that has labels"),
    ("--head-layers", within(int, 0, 10), 0,
     "first layers of the projector to keep; 1 in SimCLR v2 [Sec. 2]"),
    ("--distill-tau", RATE, 0.1, "softens the teacher's predictions [SimCLR v2 Sec. 3]"),
    ("--knn-tau", RATE, 0.1, "temperature of a neighbour's vote [MoCo CIFAR demo]"),
    # Data, where they differ from the checkpoint's
    ("--dataset", DATASETS, None, "None: the checkpoint's, or cifar10"),
    ("--data-dir", file_path, None,
     "folder of images, or of CIFAR's download; None: the checkpoint's, or data"),
    ("--cache-dir", file_path, None,
     "where decoded images are kept; None: the checkpoint's, or --data-dir"),
    ("--skip-broken", bool, None, "leave out files that cannot be read; None: as in training"),
    ("--max-pixels", COUNT, None, "refuse larger images; None: as in training, or 179 million"),
    ("--image-size", within(int, 8, 4096), None, "pixels; None: the checkpoint's"),
    # Network, where it differs from the checkpoint's
    ("--arch", tuple(ARCHS), None, "backbone; None: the checkpoint's, or resnet18"),
    ("--prefix", str, "", "text before the backbone's names, with its final dot, if a "
     "file holds several networks: 'f_k.' for MoCo's slow copy, 'module.encoder_q.'"),
    ("--stem", ("cifar", "imagenet"), None,
     "max-pool after the first layer: cifar has none; None: by the first kernel's size"),
    # Run and output
    ("--seed", within(int, 0, 10**9), 0, "of held-out and labelled images, order and crops"),
    ("--device", ("auto", "cuda", "cpu", "mps"), "auto", "auto: a GPU if there is one"),
    ("--precision", ("auto", "bf16", "fp32"), "auto", "auto: bf16 on CUDA, else fp32"),
    ("--out", file_path, None, "folder for the JSON results; None: the checkpoint's"),
    ("--neighbours", file_path, None, "PNG to draw: ten images, ten neighbours of each"),
    ("--map", file_path, None, "PNG to draw: images placed by two main components"),
    ("--export", file_path, None, "file for the backbone, with torchvision's names"),
]


def parse_args(argv=None):
    """Read the flags, check them without files; on an error exit with one line."""
    parser = argparse.ArgumentParser(
        description="Evaluate a backbone. The top of this file explains the modes.",
        usage="%(prog)s CHECKPOINT [flags]", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: fail(f"{message} (order: CHECKPOINT, then flags)")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=file_path)
    add_flags(parser, FLAGS)
    add = parser.add_argument
    add("--knn", type=COUNT, nargs="*", default=[1, 5, 20, 200],
        help="values of k, one accuracy each")
    add("--mean", type=within(float, -10, 10), nargs=3, help="None: training's, or ImageNet's")
    add("--std", type=within(float, 1e-6, 10), nargs=3, help="None: training's, or ImageNet's")
    args = parser.parse_args(argv)
    given = {args.lr, args.weight_decay, args.batch_size} - {None}
    if args.mode == "linear" and not args.augment and given:
        fail("--lr, --weight-decay and --batch-size need SGD: add --augment or --mode")
    if args.head_layers and (args.mode == "scratch" or args.prefix):
        fail("--mode scratch and --prefix read no projector: remove --head-layers")
    if processes()[1] > 1:
        fail("this script runs in one process: start it with python, not with torchrun")
    return args


# =================== 3. Loading ===================
def load_network(args, path):
    """Return the network, how it was read (a dict for the record), and its run's flags.

    A checkpoint of the four scripts describes itself. For other weights, what is missing
    is assumed, and one printed line says what, and which tensors are not used.
    """
    weights, saved, left_out = load_weights(path, args.prefix)
    own = "backbone" in saved and "mean" in saved
    trained = saved["args"] if own else {}
    about = read_as(args, weights, saved if own else {}, trained)
    stem = "cifar" if about["stem"] == "3x3" else "imagenet"
    build = partial(resnet, about["arch"], about["width"], stem)
    f = build()
    fill_backbone(f, weights)
    if args.mode == "scratch":
        f = build()
    if args.stem == "cifar":
        f.maxpool = nn.Identity()
    if args.stem == "imagenet":
        f.maxpool = nn.MaxPool2d(3, 2, 1)
    about["pool"] = str(f.maxpool).replace("Identity()", "no max-pool")
    if not own:
        # Unused tensors: the shortest names, because those of optimizer states are long.
        say(f"weights read as {about}; {len(left_out)} unused: {sorted(left_out, key=len)[:20]}")
    head = load_head(saved, build, about.get("method"), args.head_layers)
    return nn.Sequential(f, *head), about, trained


def read_as(args, weights, saved, trained):
    """A dict of architecture, image size, mean and std, by flags, checkpoint or weights.

    saved, trained: our checkpoint and its run's flags; both {} for other weights
    """
    kernel = weights["conv1.weight"].shape[2]
    # Without a layer4, any width will do: fill_backbone refuses the weights.
    channels = len(weights.get("layer4.0.conv1.weight", range(512)))
    about = {
        "arch": args.arch or trained.get("arch", "resnet18"),
        "width": trained.get("width", channels / 512),
        "stem": f"{kernel}x{kernel}",
        "pixels": 32 if kernel == 3 else 224,
        "mean": IMAGENET[0],
        "std": IMAGENET[1],
    }
    if saved:
        pixels = 224 if trained["dataset"] == "folder" else 32
        about["pixels"] = trained["image_size"] or pixels
        about |= saved.get("data", {})  # newer checkpoints have the side that was used
        about["method"] = trained.get("method") or saved["method"]
        about["epoch"] = saved["epoch"]
        about["mean"] = saved["mean"].tolist()
        about["std"] = saved["std"].tolist()
    about["pixels"] = args.image_size or about["pixels"]
    about["mean"] = args.mean or about["mean"]
    about["std"] = args.std or about["std"]
    return about


def load_head(saved, build, method, count):
    """The first `count` linear layers of the projector, each with its norm and ReLU."""
    if count == 0:
        return []
    if method not in METHODS:
        raise UserError(f"--head-layers needs a checkpoint of {' or '.join(METHODS)}")
    module = importlib.import_module(method)
    recipe = {**vars(module.parse_args([])), **saved["args"]}
    model = module.Model(build, argparse.Namespace(**recipe))
    model.load_state_dict(saved["model"])
    linear = [i for i, layer in enumerate(model.g) if isinstance(layer, nn.Linear)]
    if len(linear) < count:
        raise UserError(f"--head-layers {count}: the projector has {len(linear)} layers")
    end = [*linear, len(model.g)][count]  # the next linear layer, or the end
    return model.g[:end]


def load_images(args, about, trained, device):
    """The data set, and the indices (n,) of training images that are not held out."""
    name = args.dataset or trained.get("dataset", "cifar10")
    known = {}
    if name == trained.get("dataset") and not args.data_dir:
        known = trained
    data_dir = args.data_dir or known.get("data_dir", "data")
    cache_dir = args.cache_dir or known.get("cache_dir")
    max_pixels = args.max_pixels or known.get("max_pixels")
    skip_broken = args.skip_broken
    if skip_broken is None:
        skip_broken = known.get("skip_broken")
    data = load_dataset(
        name, data_dir, about["pixels"], cache_dir, device, skip_broken, max_pixels)
    mean = torch.tensor(about["mean"], device=device)
    std = torch.tensor(about["std"], device=device)
    data = data._replace(mean=mean, std=std)
    about["data"] = name
    if name == "folder":
        about["data"] = Path(data_dir).resolve().name
    used = torch.arange(len(data.train_images))
    if data.test_labels is None and data.train_labels is not None:
        labels = data.train_labels
        held_out = few_labels(used, labels.cpu(), 0.2, args.seed)
        used = used[~torch.isin(used, held_out)]
        if len(used) == 0:
            raise UserError("no test split, and no class has two images to hold one out")
        data = data._replace(
            test_images=data.train_images[held_out], test_labels=labels[held_out])
        about["held_out"] = len(held_out)
        say(f"no test split: {len(held_out)} images, a fifth of each class, are held out")
    return data, used


def few_labels(indices, labels, fraction, seed):
    """Choose a fraction of each class, at least one image, from indices (n,).

    labels: (N,) int64, one for each training image
    """
    if fraction == 1:
        return indices
    generator = torch.Generator().manual_seed(seed)
    order = indices[torch.randperm(len(indices), generator=generator)]
    parts = []
    for label in labels[order].unique():
        part = order[labels[order] == label]
        parts.append(part[:max(1, round(fraction * len(part)))])
    return torch.cat(parts)


def check_outputs(args, path, out):
    """Before the work, refuse output paths that cannot be written."""
    # "results.json" stands for the results, whose name comes later.
    for output in (out / "results.json", args.export, args.neighbours, args.map):
        if output is None:
            continue
        output = Path(output)
        if output.is_dir() or output.resolve() == path.resolve():
            raise UserError(f"{output} is a folder or the checkpoint: name another file")
        tempfile.TemporaryFile(dir=output.parent).close()


# =================== 4. Pictures ===================
def frame(images, colors):
    """Enlarge images (N, 3, H, W) uint8 to 64 pixels or more; frame them in colors."""
    times = math.ceil(64 / images.shape[3])
    big = F.interpolate(images / 255, scale_factor=times)
    height, width = big.shape[2] + 6, big.shape[3] + 6
    framed = colors[:, :, None, None].repeat(1, 1, height, width)
    framed[:, :, 3:-3, 3:-3] = big
    return framed


def draw_neighbours(path, bank, bank_images, bank_labels, queries, images, labels):
    """Ten rows: an image and its ten nearest of the bank, green if of its class, or red.

    bank: (N, D) features; images whose row is 0 are left out
    queries: (M, D) features; if images is bank_images, no image is its own neighbour
    """
    chosen = torch.linspace(0, len(queries) - 1, min(10, len(queries))).long()
    length = bank.norm(dim=1)
    cosine = queries[chosen] @ bank.T / length
    cosine[:, length == 0] = -math.inf
    count = length.count_nonzero().item()
    if images is bank_images:
        cosine[range(len(chosen)), chosen] = -math.inf
        count -= 1
    nearest = cosine.topk(min(10, count)).indices.cpu()
    colors = torch.full((*nearest.shape, 3), 0.6)
    if labels is not None:
        same = bank_labels.cpu()[nearest] == labels.cpu()[chosen, None]
        red_green = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.7, 0.2]])
        colors = red_green[same.long()]
    cells = torch.cat([
        images[chosen, None].cpu(),
        bank_images[nearest].cpu()], 1)
    colors = F.pad(colors, (0, 0, 1, 0), value=1.0)  # a white frame for the query
    framed = frame(cells.flatten(0, 1), colors.flatten(0, 1))
    save_image(framed, path, "png", nrow=cells.shape[1], pad_value=1.0)


def draw_map(path, queries, images, labels, classes, side=30):
    """At most side x side images, placed by their features' two main components.

    Columns follow the first component, and each column is sorted by the second, so that
    similar images are near. A frame's colour shows the class; the names are below.
    """
    side = min(side, math.isqrt(len(queries)))
    chosen = torch.linspace(0, len(queries) - 1, side**2).long()
    x = F.normalize(queries[chosen].double().cpu(), dim=1)
    plane = torch.linalg.svd(x - x.mean(0), full_matrices=False).U
    plane = F.pad(plane, (0, 1))[:, :2]  # (n, 2), also if n is 1
    columns = plane[:, 0].argsort().view(side, side)
    columns = [column[plane[column, 1].argsort()] for column in columns]
    grid = torch.stack(columns, 1).flatten()
    hue = torch.arange(len(classes))[:, None] / len(classes)
    hue = hue - torch.tensor([0, 1 / 3, 2 / 3])
    palette = 0.5 + 0.5 * torch.cos(2 * math.pi * hue)  # (classes, 3)
    colors = torch.ones(len(chosen), 3)
    if labels is not None:
        colors = palette[labels[chosen].cpu()]
    framed = frame(images[chosen].cpu(), colors)
    picture = to_pil_image(make_grid(framed[grid], side, pad_value=1.0))
    width, height = picture.size
    line = max(14, width // 32)  # height of a text line, which has six names
    picture = ImageOps.expand(picture, (0, 0, 0, line * math.ceil(len(classes) / 6)))
    for i, name in enumerate(classes):
        place = (width * (i % 6) // 6, height + line * (i // 6))
        color = (255 * palette[i]).int().tolist()
        draw = ImageDraw.Draw(picture)
        draw.text(place, name[:13], tuple(color), font_size=line * 3 / 4)
    picture.save(path, "png")


# =================== 5. Training ===================
def fit(head, bank, labels, iterations):
    """Logistic regression by L-BFGS with scikit-learn's default penalty (C = 1).

    head: a batch norm, which gets the statistics of bank (N, D), and a linear layer
    """
    norm, linear = head.eval()
    norm.running_mean = bank.mean(0)
    # Standardise features of any scale; constant channels have no effect.
    var = bank.var(0, unbiased=False)
    norm.running_var = var.clamp(min=1e-12 * var.max() + 1e-30)
    norm.eps = 1e-30
    optimizer = torch.optim.LBFGS(
        linear.parameters(), max_iter=iterations, tolerance_change=0,
        max_eval=2 * iterations, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        penalty = linear.weight.square().sum() / 2 / len(bank)
        loss = F.cross_entropy(head(bank), labels) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    say(f"loss={closure():.4g}")


def distill_loss(student, teacher, tau):
    """Cross-entropy of softened predictions, SimCLR v2 Eq. 2: the batch's mean, in nats.

    student, teacher: (B, classes) logits; the teacher's get no gradient
    """
    return F.cross_entropy(student / tau, (teacher.detach() / tau).softmax(1))


def batch_loss(network, head, x, labels, args, autocast, teacher):
    """The loss of batch x (B, 3, H, W) against its labels (B,) or a teacher's scores."""
    with autocast():
        y = network(x)
    y = head(y.float())
    if teacher is None:
        return F.cross_entropy(y, labels)
    teaching_network, teaching_head = teacher
    with torch.no_grad(), autocast():
        scores = teaching_network(x)
    scores = teaching_head(scores.float())
    # Only the teacher's scores are divided by tau, so the student's are multiplied first.
    return distill_loss(args.distill_tau * y, scores, args.distill_tau)


def train(network, head, keep, data, args, used, autocast, teacher=None):
    """Train the head, or head and network, by SGD on crops and flips of images keep (n,).

    used: epochs, lr, weight_decay and batch_size
    teacher: a network and head in evaluation mode, whose predictions replace the labels
    """
    epochs, steps = used["epochs"], len(keep) // used["batch_size"]
    network.requires_grad_(args.mode != "linear")
    optimizer = torch.optim.SGD(
        [*head.parameters(), *network.parameters()], used["lr"], 0.9,
        weight_decay=used["weight_decay"], nesterov=True)  # [SimCLR App. B.5]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for epoch in range(1, epochs + 1):
        torch.manual_seed(args.seed * 10**6 + epoch)
        order = keep[torch.randperm(len(keep))][:steps * used["batch_size"]]
        parts = order.split(used["batch_size"])
        images = batches(
            data.train_images, order, used["batch_size"], data.mean.device, workers=8)
        network.train(args.mode != "linear")
        total, start = 0, time.perf_counter()
        for x, index in zip(images, parts):
            x = random_resized_crop(x / 255, x.shape[3], (0.08, 1.0))  # [SimCLR App. B.5]
            x = normalize(random_flip(x), data.mean, data.std)
            labels = data.train_labels[index]
            loss = batch_loss(network, head, x, labels, args, autocast, teacher)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        loss = total.item() / steps
        if not math.isfinite(loss):
            fail(f"{args.mode}: the loss is {loss} at epoch {epoch}: try a lower --lr", 1)
        seconds = time.perf_counter() - start
        say(f"{args.mode} epoch={epoch} loss={loss:.4g} seconds={seconds:.3g}")


def choose_recipe(args, count):
    """Choose epochs, lr, weight_decay and batch_size for this count of images."""
    kind = args.mode
    if args.mode == "linear" and args.augment:
        kind = "augment"
    epochs, lr, decay = RECIPES[kind]
    # Few labels: smaller batches for 16 steps an epoch, but of at least 8 images.
    batch = args.batch_size or min(256, max(8, count // 16), count)
    if batch > count:
        raise UserError(f"--batch-size {batch} is larger than the {count} images")
    if args.weight_decay is not None:
        decay = args.weight_decay
    if kind == "linear":
        batch = count  # L-BFGS uses all images at once
    else:
        lr = (args.lr or lr) * batch / 256  # linear scaling, Goyal et al. 1706.02677
    return {
        "epochs": args.epochs or epochs,
        "lr": lr,
        "weight_decay": decay,
        "batch_size": batch,
    }


def classify(network, bank, queries, keep, data, args, autocast, teacher=None):
    """Train a classifier as --mode says; return accuracies, classifier and recipe.

    keep: indices (n,) of the images to train on; queries: features of the test images
    bank: features of the labelled images, in linear mode those of keep
    """
    used = choose_recipe(args, len(keep))
    # Features can have any scale, so eps is tiny. But where the backbone is trained, it
    # would let channels that are almost constant have huge gradients.
    eps = 1e-12 if args.mode == "linear" else 1e-5
    head = nn.Sequential(
        nn.BatchNorm1d(bank.shape[1], eps, affine=False),
        nn.Linear(bank.shape[1], len(data.classes)))
    head.to(bank.device)
    for x in head.parameters():
        nn.init.zeros_(x)
    if args.mode == "linear" and not args.augment:
        fit(head, bank, data.train_labels[keep], used["epochs"])
    else:
        train(network, head, keep, data, args, used, autocast, teacher)
    if args.mode != "linear":
        queries = features(network, data.test_images, data, 256, autocast)
    scores = head.eval()(queries)
    best = scores.topk(min(5, len(data.classes))).indices.cpu()
    labels = data.test_labels.cpu()
    right = (best == labels[:, None]).double()
    recalls = [right[labels == label, 0].mean() for label in labels.unique()]
    accuracies = {
        "top1": 100 * right[:, 0].mean().item(),
        "balanced": 100 * sum(recalls).item() / len(recalls),
        "top5": 100 * right.sum().item() / len(right)}
    return accuracies, head, used


# =================== 6. Load, judge, write ===================
def judge(args, network, data, used, bank, queries, autocast):
    """Return all accuracies and the training recipe.

    used: indices (n,) of the training images that are not held out
    bank, queries: features of all training images, and of the test images
    """
    keep = few_labels(used, data.train_labels.cpu(), args.label_fraction, args.seed)
    bank, labels, knn = bank[keep], data.train_labels[keep], {}
    for k in args.knn:
        knn[f"knn{k}"] = knn_accuracy(bank, labels, queries, data.test_labels,
                                      len(data.classes), k, args.knn_tau)
        if k > len(keep):
            say(f"knn{k} uses k = {len(keep)}: no more images are labelled")
    if args.mode != "distill":
        results, _, recipe = classify(network, bank, queries, keep, data, args, autocast)
        return {**results, **knn}, {**recipe, "labels": len(keep)}
    # The teacher has the default recipe; --lr and the like are the student's.
    teacher, first = copy.deepcopy(network), copy.copy(args)
    first.mode = "finetune"
    first.epochs = first.lr = first.weight_decay = first.batch_size = None
    taught, head, _ = classify(teacher, bank, queries, keep, data, first, autocast)
    results, _, recipe = classify(
        network, bank, queries, used, data, args, autocast, (teacher, head))
    for name, accuracy in taught.items():
        results[f"teacher_{name}"] = accuracy
    return {**results, **knn}, {**recipe, "labels": len(keep)}


def write_results(args, path, out, record):
    """Write a JSON file; never replace one: the next names end in _2, _3 and so on."""
    name = "_".join(["eval", path.stem, args.mode, record["data"]])
    result, number = out / f"{name}.json", 1
    while result.exists():
        number += 1
        result = out / f"{name}_{number}.json"
    result.write_text(json.dumps(record) + "\n")
    say(f"wrote {result}")


def write_pictures(args, network, about, bank, data, queries):
    """Draw --neighbours and --map, and write --export."""
    test = (queries, data.test_images, data.test_labels)
    if queries is None:  # there are no labels
        test = (bank, data.train_images, None)
    if args.neighbours:
        draw_neighbours(
            args.neighbours, bank, data.train_images, data.train_labels, *test)
    if args.map:
        draw_map(args.map, *test, data.classes)
    if args.export:
        buffer = io.BytesIO()
        torch.save(network[0].cpu().state_dict(), buffer)
        Path(args.export).write_bytes(buffer.getbuffer())
        if about["stem"] == "3x3" or about["width"] != 1:
            say(f"note: no ResNet of torchvision; load {args.export} into common.resnet("
                f"{about['arch']!r}, {about['width']}) with a {about['stem']} stem")


def judge_all(args, path, out):
    """Load, judge and write; return the accuracies."""
    begin = time.perf_counter()
    device = start_process(args.device)
    network, about, trained = load_network(args, path)
    network.to(device, memory_format=torch.channels_last)
    out.mkdir(parents=True, exist_ok=True)
    check_outputs(args, path, out)
    data, used = load_images(args, about, trained, device)
    bf16 = args.precision == "bf16" or args.precision == "auto" and device.type == "cuda"
    autocast = partial(torch.autocast, device.type, torch.bfloat16, bf16)
    bank = features(network, data.train_images, data, 256, autocast)
    results, recipe, queries = {}, {}, None
    if data.test_labels is not None:
        queries = features(network, data.test_images, data, 256, autocast)
        if not (bank.isfinite().all() and queries.isfinite().all()):
            fail("features are not finite: broken weights? or try --precision fp32", 1)
        results, recipe = judge(args, network, data, used, bank, queries, autocast)
        held_out = ~torch.isin(torch.arange(len(bank)), used)
        bank[held_out] = 0  # draw_neighbours leaves these out
    elif args.mode != "linear":
        raise UserError(f"--mode {args.mode} needs images in class folders")
    line = " ".join(f"{name}={value:.2f}" for name, value in results.items())
    if not results:
        line = "no accuracies, because there are no labels"
    before = "random" if args.mode == "scratch" else "pre-trained"
    say(f"{args.mode}: {line} (kNN: {before} backbone)")
    record = {
        **describe(args, data), **results, **about,
        "used": recipe, "knn_of": before, "bf16": bf16,
        "images": len(used), "test_images": len(data.test_images),
        "seconds": time.perf_counter() - begin}
    write_results(args, path, out, record)
    write_pictures(args, network, about, bank, data, queries)
    return results


def main(argv=None):
    """Evaluate as the flags say; print, save and return the accuracies."""
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    path = Path(args.checkpoint)
    if path.is_dir():
        path = path / "checkpoint.pt"
    try:
        return judge_all(args, path, Path(args.out or path.parent))
    except (MemoryError, OSError, UserError, torch.OutOfMemoryError) as problem:
        fail(problem)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    main()
