"""Judge a backbone: linear, fine-tuned, from scratch, few labels, kNN, pictures, export.

    python linear_eval.py runs/simclr/checkpoint.pt
    python linear_eval.py resnet50.pth --arch resnet50 --dataset folder --data-dir images

--mode linear    a classifier on the frozen backbone, which keeps every bit: by L-BFGS on
                 features computed once, or with --augment by SGD on random crops.
--mode finetune  backbone and classifier are trained together, from the checkpoint.
--mode scratch   the same network from random weights: the supervised baseline.
--mode distill   finetune, then that network teaches another one, from the checkpoint too,
                 its softened predictions of all images: SimCLR v2's third step [2006.10029].

Accuracies are percent of the whole test set after the last epoch, `balanced` the mean over
its classes; nothing is chosen by them. kNN and pictures are of what came in, before training.
CHECKPOINT: one of the four scripts', or a file with a ResNet's weights in torchvision's
names or numbered, as in a Sequential. What no ResNet has, such as a head, is left out.

Different from the papers: a batch norm without affine before the classifier [MAE App. A]. In
SimCLR v2 a student is trained by LARS for 400 epochs, here by SGD for 100, its scores being tau
times the classifier's: SGD, unlike LARS, would else hardly move the backbone at a low tau.
"""

# =================== 1. Imports ===================
import argparse
import copy
import json
import math
import signal
import sys
import tempfile
import time
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import ImageDraw, ImageOps
from torch import nn
from torchvision import transforms
from torchvision.utils import make_grid, save_image

from common import (ARCHS, DATASETS, batches, choose_device, environment, load_backbone,
                    load_checkpoint, load_dataset, normalize, processes, resnet, say)

RECIPES = {  # epochs, learning rate at batch 256, weight decay
    "linear": (1000, None, None),  # iterations at most [ours]
    "augment": (100, 0.1, 0.0),  # linear with --augment [ours; 100: MoCo CIFAR demo]
    "finetune": (30, 0.05, 0.0),  # [SimCLR App. B.5; 60 epochs for 1 % of the labels]
    "scratch": (100, 0.1, 5e-4),  # [ours; He et al. 1512.03385 Sec. 4.2: 0.2 by this measure]
    "distill": (100, 0.06, 5e-4)}  # rate and decay of pre-training, simclr.py [SimCLR v2 Sec. 3]
FOREIGN = {"dataset": "cifar10", "data_dir": "data", "image_size": None, "arch": "resnet18"}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's mean and std
RESNET = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")  # all it has, in order


# =================== 2. Options ===================
def fail(message, status=2):
    """End the program with one line on standard error."""
    sys.stderr.write(f"error: {' '.join(str(message).split())}\n")  # in one piece
    raise SystemExit(status)


def number(kind, low, high):
    """An argparse type: an int or a float from low to high; nan and inf are outside."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value
    parse.__name__ = "whole number" if kind is int else "number"  # for argparse's message
    return parse


def parse_args(argv=None):
    """Read the flags; make all checks that need no file; end wrong ones in one line."""
    parser = argparse.ArgumentParser(
        description="Judge a backbone on images.", usage="%(prog)s CHECKPOINT [flags]",
        allow_abbrev=False)
    parser.error = fail
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="ours or foreign weights")
    count, rate = number(int, 1, 10**6), number(float, 1e-8, 1e3)
    add = parser.add_argument_group("judge").add_argument
    add("--mode", choices=("linear", "finetune", "scratch", "distill"), default="linear",
        help="train a classifier; all; all, from random weights; a student (default: linear)")
    add("--epochs", type=count, help="(default: 100, finetune 30, L-BFGS 1000); a teacher has 30")
    add("--lr", type=rate, help="at batch 256, scaled (default: 0.1, finetune 0.05, distill 0.06)")
    add("--weight-decay", type=number(float, 0, 1), help="(default: 0; scratch, distill 5e-4)")
    add("--augment", action="store_true", help="random crops in linear mode too")
    add("--label-fraction", type=number(float, 1e-6, 1), default=1.0, help="used (default: 1)")
    add("--head-layers", type=number(int, 0, 10), default=0,
        help="of the projector, to keep: 1 in SimCLR v2 [Sec. 2] (default: 0)")
    add("--distill-tau", type=rate, default=0.1,
        help="temperature of teacher and student [SimCLR v2 Sec. 3] (default: 0.1)")
    add("--knn", type=count, nargs="*", default=[1, 5, 20, 200], help="k (default: 1 5 20 200)")
    add("--knn-tau", type=rate, default=0.1, help="temperature [MoCo CIFAR demo] (default: 0.1)")
    add = parser.add_argument_group("data, if not the checkpoint's").add_argument
    add("--dataset", choices=DATASETS, help="another than in pre-training: transfer")
    add("--data-dir", help="the images, or where CIFAR is downloaded to")
    add("--cache-dir", help="for a folder's decoded images (default: in --data-dir)")
    add("--skip-broken", action="store_true", help="go on without files that cannot be read")
    add("--max-pixels", type=count, help="refuse larger; default: 179 million")
    add("--image-size", type=number(int, 8, 4096), help="pixels")
    add("--mean", type=number(float, -10, 10), nargs=3, help="(default: training's or ImageNet's)")
    add("--std", type=number(float, 1e-6, 10), nargs=3, help="likewise")
    add = parser.add_argument_group("network, if not the checkpoint's").add_argument
    add("--arch", choices=ARCHS, help="backbone (default for foreign weights: resnet18)")
    add("--prefix", default="", help="if the file has several backbones: module.encoder_q.")
    add = parser.add_argument_group("run and output").add_argument
    add("--batch-size", type=number(int, 2, 10**6), default=256, help="(default: 256)")
    add("--seed", type=number(int, 0, 10**9), default=0, help="same seed, same run (default: 0)")
    add("--device", choices=("auto", "cuda", "cpu", "mps"), default="auto", help="(default: auto)")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto",
        help="auto: bf16 on CUDA, else fp32; bf16 is far slower on CPUs without it (default: auto)")
    add("--out", help="folder of the results in JSON (default: the checkpoint's)")
    add("--neighbours", metavar="PNG", help="draw ten images and the ten nearest to each")
    add("--map", metavar="PNG", help="draw the images by their two main components")
    add("--export", metavar="PTH", help="write the backbone, in torchvision's names")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = get_close_matches(unknown[0], parser._option_string_actions, 1, 0.7)
        fail(f"{unknown[0]} is not a flag: did you mean {(near or ['one that --help shows'])[0]}?")
    if args.mode == "linear" and not args.augment and (args.lr or args.weight_decay) is not None:
        fail("--lr and --weight-decay are not for L-BFGS: add --augment or --mode")
    if args.mode == "scratch" and args.head_layers:
        fail("--head-layers keeps what --mode scratch throws away")
    if processes().world > 1:
        fail("this script runs in one process: start it with python, not with torchrun")
    return args


# =================== 3. Backbone, features, kNN ===================
def read_weights(path, prefix=""):
    """Read a checkpoint: the backbone's state dict; all of it, or {} for foreign weights.

    prefix: what the backbone's name ends with, if foreign weights hold several
    Raises OSError or ValueError, in one line, for other files; never runs a file's code.
    """
    saved = load_checkpoint(path)
    if not prefix and all(isinstance(saved.get(x), dict) for x in ("backbone", "model", "args")):
        return saved["backbone"], saved
    dicts = {f"{key}.": x for key, x in saved.items() if isinstance(x, dict)}
    tensors = {f"{name}{key}": x for name, part in {"": saved, **dicts}.items()
               for key, x in part.items() if torch.is_tensor(x)}
    found = [key.removesuffix(stem) for stem in ("conv1.weight", "0.weight")
             for key, x in tensors.items() if f".{key}".endswith(f".{stem}")
             and x.ndim == 4 and x.shape[1] == 3]  # the first convolution
    chosen = [prefix] if prefix in found else [
        name for name in found if f".{name}".endswith(f".{prefix}")]
    if len(chosen) != 1:
        raise ValueError(f"--prefix {prefix!r} fits {len(chosen)} of {len(found)} ResNets of {path}"
                         f", name one: {' '.join(found[:8]) or 'no ResNet'}")
    tensors = {key.removeprefix(chosen[0]): x for key, x in tensors.items()
               if key.startswith(chosen[0])}
    modules = dict.fromkeys(key.split(".")[0] for key in tensors)  # to ResNet's own names
    modules.update(zip(sorted(filter(str.isdigit, modules), key=int), RESNET))
    modules.update(zip(RESNET, RESNET))
    others = [name for name in modules if modules[name] is None and name != "fc"]
    if others:
        print(f"left out, as no ResNet has it: {', '.join(others)}", file=sys.stderr)
    split = ((*key.partition("."), x) for key, x in tensors.items())
    return {modules[name] + dot + rest: x for name, dot, rest, x in split if modules[name]}, {}


def load_head(saved, count):
    """The first `count` linear layers of the projector, each with what follows it."""
    weights = {key[2:]: x for key, x in saved.get("model", {}).items() if key.startswith("g.")}
    linear = [int(key.split(".")[0]) for key, x in weights.items() if x.ndim == 2]
    if len(linear) < count:
        raise ValueError(f"--head-layers {count}: the projector has {len(linear)} layers")
    layers = nn.Sequential()
    for i in range(count and [*linear, 1 + int([*weights][-1].split(".")[0])][count]):
        mine = {key.split(".")[1]: x for key, x in weights.items() if key.startswith(f"{i}.")}
        layer = nn.ReLU()  # has no parameters
        if "running_mean" in mine:
            layer = nn.BatchNorm1d(len(mine["running_mean"]), affine="weight" in mine)
        elif mine:
            layer = nn.Linear(*mine["weight"].T.shape, bias="bias" in mine)
        layer.load_state_dict(mine)
        layers.append(layer)
    return layers


def few_labels(labels, fraction, seed):
    """Indices (n,) of a fraction of each class, at least one image; labels (N,) int64."""
    if fraction == 1:
        return torch.arange(len(labels))
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=draw)
    parts = [order[labels[order] == label] for label in labels.unique()]
    return torch.cat([part[:max(1, round(fraction * len(part)))] for part in parts])


@torch.no_grad()
def features(f, images, mean, std, batch_size, autocast):
    """The output in evaluation mode: images (N, 3, H, W) uint8 to (N, D) float32."""
    f.eval()
    out = []
    for x in batches(images, torch.arange(len(images)), batch_size, mean.device):
        with autocast():
            out.append(f(normalize(x, mean, std)).float())
    return torch.cat(out)


def knn_accuracy(bank, bank_labels, queries, labels, num_classes, k=200, tau=0.1):
    """Percent of queries whose k nearest elect the right class, Wu et al. 1805.01978.

    bank: (N, D), queries: (M, D), normalised here; labels (N,) and (M,) int64
    Each neighbour votes exp(cosine / tau); a tie goes to the lower class; k is at most N.
    """
    bank, k, right = bank.float(), min(k, len(bank)), 0  # the bank is large: no second copy
    length, chunk = bank.norm(dim=1).clamp(min=1e-12), max(1, 2**25 // len(bank))
    for query, label in zip(queries.split(chunk), labels.split(chunk)):
        cosine = (F.normalize(query.float(), dim=1) @ bank.T).div_(length)  # 128 MiB at most
        cosine, index = cosine.topk(k, dim=1)  # (chunk, k)
        vote = ((cosine - cosine[:, :1]) / tau).exp()  # the nearest votes 1: no overflow
        votes = vote.new_zeros(len(vote), num_classes).scatter_add_(1, bank_labels[index], vote)
        right = right + (votes.argmax(1) == label).sum()
    return 100 * right.item() / len(queries)


# =================== 4. Pictures ===================
def frame(images, colors):
    """Images (N, 3, H, W) uint8 of 64 pixels or more, framed in colors (N, 3)."""
    big = F.interpolate(images / 255, scale_factor=math.ceil(64 / images.shape[3]))
    framed = colors[:, :, None, None].repeat(1, 1, big.shape[2] + 6, big.shape[3] + 6)
    framed[:, :, 3:-3, 3:-3] = big
    return framed


def draw_neighbours(path, bank, bank_images, bank_labels, queries, images, labels):
    """Ten rows: an image, its ten nearest of the bank, green if of its class, else red.

    queries: (M, D) features of images (M, 3, H, W); the bank's if images is bank_images
    """
    chosen = torch.linspace(0, len(queries) - 1, min(10, len(queries))).long()
    cosine = queries[chosen] @ bank.T / bank.norm(dim=1).clamp(min=1e-12)
    if images is bank_images:
        cosine[range(len(chosen)), chosen] = -math.inf  # not its own neighbour
    near = cosine.topk(min(10, len(bank))).indices.cpu()
    colors = torch.full((*near.shape, 3), 0.6)
    if labels is not None:
        right = bank_labels.cpu()[near] == labels.cpu()[chosen, None]
        colors = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.7, 0.2]])[right.long()]  # red, green
    cells = torch.cat([images[chosen, None].cpu(), bank_images[near].cpu()], 1)
    colors = F.pad(colors, (0, 0, 1, 0), value=1.0)  # around the image itself
    save_image(frame(cells.flatten(0, 1), colors.flatten(0, 1)), path, "png",
               nrow=cells.shape[1], pad_value=1.0)


def draw_map(path, queries, images, labels, classes, side=30):
    """At most side x side images: columns by the first principal component, each sorted by
    the second, so that neighbours stay neighbours. A frame's colour is a class, named below.
    """
    side = min(side, math.isqrt(len(queries)))
    chosen = torch.linspace(0, len(queries) - 1, side**2).long()
    queries, images, labels = (x if x is None else x[chosen.to(x.device)].cpu()
                               for x in (queries, images, labels))
    x = F.normalize(queries.double(), dim=1)
    plane = torch.linalg.svd(x - x.mean(0), full_matrices=False).U
    plane = F.pad(plane, (0, 1))[:, :2]  # (n, 2), even of one image
    columns = plane[:, 0].argsort().view(side, side)
    columns = [column[plane[column, 1].argsort()] for column in columns]
    grid = torch.stack(columns, 1).flatten()
    hue = torch.arange(len(classes))[:, None] / len(classes) - torch.tensor([0, 1 / 3, 2 / 3])
    palette = 0.5 + 0.5 * torch.cos(2 * math.pi * hue)  # (classes, 3)
    colors = torch.ones(len(chosen), 3) if labels is None else palette[labels]
    picture = make_grid(frame(images, colors)[grid], side, pad_value=1.0)
    picture = transforms.functional.to_pil_image(picture)
    (width, height), line = picture.size, max(14, picture.width // 32)  # of six names
    picture = ImageOps.expand(picture, (0, 0, 0, line * math.ceil(len(classes) / 6)))
    for i, name in enumerate(classes):
        at, color = (width * (i % 6) // 6, height + line * (i // 6)), (255 * palette[i]).int()
        ImageDraw.Draw(picture).text(at, name[:13], tuple(color.tolist()), font_size=line * 3 / 4)
    picture.save(path, "png")


# =================== 5. Training ===================
def fit(head, bank, labels, iterations):
    """Logistic regression by L-BFGS with scikit-learn's penalty (C = 1): no rate to tune.

    head: batch norm, whose statistics become the bank's (N, D), and linear layer
    """
    norm, linear = head.eval()
    var, norm.running_mean = bank.var(0, unbiased=False), bank.mean(0)
    norm.eps, norm.running_var = 1e-30, var.clamp(min=1e-12 * var.max() + 1e-30)  # any scale
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=iterations, tolerance_change=0,
                                  max_eval=2 * iterations, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(bank), labels) + linear.weight.square().sum() / 2 / len(bank)
        loss.backward()
        return loss

    optimizer.step(closure)
    say(f"loss={closure().item():.4g}")


def distill_loss(student, teacher, tau):
    """Cross-entropy of softened predictions, SimCLR v2's Eq. 2: mean of the batch, nats.

    student, teacher: (B, classes) logits; the teacher's has no gradient
    """
    return F.cross_entropy(student / tau, (teacher.detach() / tau).softmax(1))


def train(network, head, keep, data, args, recipe, autocast, teacher=None):
    """SGD on random crops and flips of images keep (n,): of the head or of all.

    teacher: a network and its head in evaluation mode, whose predictions replace the labels
    """
    epochs, lr, decay = recipe
    # Few labels: 16 steps an epoch if 8 images each are left; 1 % of CIFAR-10 would be one.
    batch = min(args.batch_size, max(8, len(keep) // 16), len(keep))
    steps, frozen = len(keep) // batch, args.mode == "linear"
    crop = transforms.RandomResizedCrop(data.train_images.shape[3])  # [SimCLR App. B.5]
    crop_and_flip = transforms.Compose([crop, transforms.RandomHorizontalFlip()])
    network.requires_grad_(not frozen)
    optimizer = torch.optim.SGD([*head.parameters(), *network.parameters()],
                                lr * batch / 256, 0.9,  # linear scaling, 1706.02677
                                weight_decay=decay, nesterov=True)  # [SimCLR App. B.5]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    for epoch in range(1, epochs + 1):
        torch.manual_seed(args.seed * 10**6 + epoch)
        order = keep[torch.randperm(len(keep))[:steps * batch]]
        images = batches(data.train_images, order, batch, data.mean.device)
        network.train(not frozen)
        total, start = 0, time.perf_counter()
        for x, index in zip(images, order.split(batch)):
            x = torch.stack([crop_and_flip(image) for image in x / 255])
            x = normalize(x, data.mean, data.std)
            with autocast():
                y = network(x)
            y = head(y.float())
            if teacher:
                with torch.no_grad(), autocast():
                    x = teacher[0](x)
                loss = distill_loss(args.distill_tau * y, teacher[1](x.float()), args.distill_tau)
            else:
                loss = F.cross_entropy(y, data.train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        loss = total.item() / steps
        if not math.isfinite(loss):
            fail(f"{args.mode}: the loss is {loss} at epoch {epoch}, try a lower --lr", status=1)
        say(f"{args.mode} epoch={epoch} loss={loss:.4g} seconds={time.perf_counter() - start:.3g}")


def classify(network, bank, queries, keep, data, args, autocast, teacher=None):
    """Train a classifier as --mode says; return percent right, and the classifier.

    bank: features of the training images keep (n,); queries: of the test images
    """
    kind = "augment" if args.mode == "linear" and args.augment else args.mode
    recipe = [default if value is None else value for value, default in zip(
        (args.epochs, args.lr, args.weight_decay), RECIPES[kind])]
    # Methods differ in scale. A tiny eps would blow up what a nearly dead ReLU hands back to f.
    norm = nn.BatchNorm1d(bank.shape[1], 1e-12 if args.mode == "linear" else 1e-5, affine=False)
    head = nn.Sequential(norm, nn.Linear(bank.shape[1], len(data.classes))).to(bank.device)
    for x in head.parameters():
        nn.init.zeros_(x)  # a channel that is 0 in all of training has no effect
    if kind == "linear":
        fit(head, bank, data.train_labels[keep], recipe[0])
    else:
        train(network, head, keep, data, args, recipe, autocast, teacher)
    if args.mode != "linear":
        queries = features(network, data.test_images, data.mean, data.std,
                           args.batch_size, autocast)
    best = head.eval()(queries).topk(min(5, len(data.classes))).indices.cpu()
    labels = data.test_labels.cpu()
    right = (best == labels[:, None]).double()
    recalls = [right[labels == label, 0].mean() for label in labels.unique()]
    return {"top1": 100 * right[:, 0].sum().item() / len(right),
            "balanced": 100 * sum(recalls).item() / len(recalls),
            "top5": 100 * right.sum().item() / len(right)}, head


# =================== 6. Judging ===================
def main(argv=None):
    """Judge as the flags say: write the numbers as JSON, print and return them."""
    args, begin = parse_args(argv), time.perf_counter()
    torch.manual_seed(args.seed)
    try:
        device = choose_device(args.device)
        bf16 = args.precision == "bf16" or args.precision == "auto" and device.type == "cuda"
        autocast = partial(torch.autocast, device.type, torch.bfloat16, bf16)
        weights, saved = read_weights(args.checkpoint, args.prefix)
        kernel, widest = weights["conv1.weight"].shape[2], weights.get("layer4.0.conv1.weight", ())
        pretrain = {**FOREIGN, "width": len(widest) / 512 or 1, **saved.get("args", {})}
        arch, width = args.arch or pretrain["arch"], pretrain["width"]
        stem = "cifar" if kernel == 3 else "imagenet"
        f, before = resnet(arch, width, stem), "pre-trained backbone"
        load_backbone(f, weights)
        if args.mode == "scratch":
            f, before = resnet(arch, width, stem), "random backbone"
        network = nn.Sequential(f, *load_head(saved, args.head_layers))
        network = network.to(device, memory_format=torch.channels_last)
        large = pretrain["dataset"] == "folder" if saved else stem == "imagenet"
        size = args.image_size or pretrain["image_size"] or (224 if large else 32)
        name = args.dataset or pretrain["dataset"]
        known = FOREIGN if args.data_dir or name != pretrain["dataset"] else pretrain
        data_dir = args.data_dir or known["data_dir"]
        out = Path(args.out or Path(args.checkpoint).parent)
        out.mkdir(parents=True, exist_ok=True)
        for path in filter(None, (out / "*.json", args.export, args.neighbours, args.map)):
            try:
                tempfile.TemporaryFile(dir=Path(path).parent).close()  # before the work
            except OSError as problem:
                raise OSError(f"cannot write to {Path(path).parent}: {problem.strerror}") from None
        data = load_dataset(name, data_dir, size, args.cache_dir or known.get("cache_dir"), device,
                            args.skip_broken or known.get("skip_broken"), args.max_pixels)
        if data.test_labels is None and args.mode != "linear":
            raise ValueError(f"--mode {args.mode} needs labels in a test/ or val/ beside train/")
    except (OSError, ValueError) as problem:
        fail(problem)
    mean, std = (torch.as_tensor(x, device=device) for x in (
        args.mean or saved.get("mean", IMAGENET[0]), args.std or saved.get("std", IMAGENET[1])))
    data = data._replace(mean=mean, std=std)
    bank = features(network, data.train_images, mean, std, args.batch_size, autocast)
    test = (bank, data.train_images, data.train_labels)  # a folder without splits
    if data.test_labels is not None:
        queries = features(network, data.test_images, mean, std, args.batch_size, autocast)
        test = (queries, data.test_images, data.test_labels)
    if not (bank.isfinite().all() and test[0].isfinite().all()):
        fail("features are not finite: broken weights, or try --precision fp32", status=1)
    results, keep, line = {}, (), "no labels in a test/ or val/: no accuracies"
    if data.test_labels is not None:
        keep = few_labels(data.train_labels.cpu(), args.label_fraction, args.seed)
        kept = bank if args.label_fraction == 1 else bank[keep]
        knn = {f"knn{k}": knn_accuracy(kept, data.train_labels[keep], test[0], test[2],
                                       len(data.classes), k, args.knn_tau) for k in args.knn}
        taught, teacher = {}, None
        if args.mode == "distill":
            own, teacher = copy.copy(args), copy.deepcopy(network)
            own.mode, own.epochs, own.lr, own.weight_decay = "finetune", None, None, None
            found, head = classify(teacher, kept, test[0], keep, data, own, autocast)
            taught, teacher = {f"teacher_{key}": x for key, x in found.items()}, (teacher, head)
        found, _ = classify(network, kept, test[0], torch.arange(len(bank)) if teacher else keep,
                            data, args, autocast, teacher)
        results = found | taught | knn
        line = " ".join([f"{args.mode}:", *(f"{key}={value:.2f}" for key, value in results.items()),
                         f"knn_tau={args.knn_tau:g} ({before})"])
    record = {**results, "networks": {"top1": args.mode, "knn": before}, "args": vars(args),
              "method": saved.get("method"), "epoch": saved.get("epoch"), "labels": len(keep),
              "images": len(data.train_images), "test_images": len(data.test_images),
              "precision": "bf16" if bf16 else "fp32", "features": bank.shape[1],
              "mean": mean.tolist(), "std": std.tolist(),  # for an export's next judge
              **environment(device), "seconds": time.perf_counter() - begin}
    parts = (
        (Path(args.checkpoint).stem, not saved), (args.mode, True), ("augment", args.augment),
        (name, name != "folder"), (Path(data_dir).resolve().name, name == "folder"),
        (f"{args.label_fraction:g}", args.label_fraction < 1),
        (f"head{args.head_layers}", args.head_layers), (f"seed{args.seed}", args.seed))
    result = "_".join(["eval", *(part for part, differs in parts if differs)]) + ".json"
    say(line)
    try:
        (out / result).write_text(json.dumps(record) + "\n")
        if args.neighbours:
            draw_neighbours(args.neighbours, bank, data.train_images, data.train_labels, *test)
        if args.map:
            draw_map(args.map, *test, data.classes)
        if args.export:
            with open(args.export, "wb") as file:
                torch.save(f.cpu().state_dict(), file)
    except (OSError, RuntimeError) as problem:  # torch.save's, of a full disk
        fail(f"cannot write all of it: {problem}")
    say(f"wrote {out / result}")
    if args.export and (stem == "cifar" or width != 1):
        sys.stderr.write(f"warning: torchvision has no such ResNet, load {args.export} into "
                         f"common.py's: resnet({arch!r}, {width:g}, {stem!r})\n")
    return results


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    main()
