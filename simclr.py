"""SimCLR. CIFAR-10, 200 epochs: not measured yet; lightly has 84.8 % kNN by another recipe.

Reference implementation, made to be read from the top, diffed and copied (with common.py), of
"A Simple Framework for Contrastive Learning of Visual Representations", Chen et al., ICML 2020,
arXiv 2002.05709; the deeper head of SimCLR v2, arXiv 2006.10029, by --proj-layers 3.

    python simclr.py --epochs 200 --batch-size 512

Two views of an image must find each other among all views of the batch: a softmax over the
2B - 1 other views, in which the second view of the same image is the right class.

    x1, x2   (B, 3, H, W)  two random views of a batch of B images
    f        backbone      f(x) is what is kept, (B, 512) for ResNet-18; the paper's h = f(x)
    g        projector     z = g(f(x)), (B, 128)
    tau      temperature   of the softmax
    l(i, j)  = -log( exp(z_i . z_j / tau) / sum_{k != i} exp(z_i . z_k / tau) )        (1)
    L        = mean of l(i, j) over all 2B views i, j the other view of i's image; |z| = 1
               log(2B - 1) for a network that cannot tell views apart

Differences from the paper:
- Views are made in batches on the device. Every image has its own parameters, but the order
  of the four colour operations is drawn once for each view of a batch, to run each once on it.
- A folder's crops are cut, not antialiased, from images resized once (large JPEGs by `draft`).
- The recipe is the best published one for ResNet-18 on CIFAR-10, dkobak/simclr-cifar10 on
  GitHub: SGD without warmup that decays all parameters, not LARS; each view goes through the
  network alone and has its own batch statistics; crops of at least 0.2, grey in 0.1 of the
  views (0.2 in the paper costs accuracy) and a projector 512-1024-128 without batch norm. Its
  lr at batch 256 is 0.06 for 100 epochs, 0.03 for 1000; it does not normalise the views.
- The defaults are CIFAR's at any size; for ImageNet the paper has LARS with lr 0.3 and weight
  decay 1e-6, tau 0.1, colour strength 1, grey 0.2 and crops from 0.08.
"""
# SPDX-License-Identifier: MIT
# Shared sections are one text in all four scripts, but for what stands in <method> fences.

# =================== Imports (shared) ===================
import argparse
import json
import math
import os
import shlex
import signal
import sys
import time
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common import (ARCHS, DATASETS, UserError, batches, choose_device, draw_columns,
                    environment, gather, load_checkpoint, load_dataset, normalize, open_log,
                    processes, resnet, restore, save_checkpoint, say, with_progress, wrap)


# =================== 1. Recipe (method) ===================
def add_recipe(parser):
    """The numbers that define the experiment, each with its source."""
    add = parser.add_argument_group("recipe").add_argument
    add("--lr", type=number(float, 1e-8, 1e3), default=0.06,
        help="rate at batch 256, linear in the batch [dkobak, for 100 epochs]")
    add("--weight-decay", type=number(float, 0, 1), default=5e-4,
        help="sgd: of all parameters; lars: of those with 2 or more axes [dkobak]")
    add("--sgd-momentum", type=number(float, 0, 1), default=0.9, help="[dkobak]")
    add("--warmup", type=share, default=0.0,
        help="share of all steps in which the learning rate rises linearly [dkobak]")
    add("--tau", type=number(float, 1e-3, 1e3), default=0.5,
        help="temperature [SimCLR App. B.9, dkobak]")
    add("--proj-layers", type=number(int, 1, 10), default=2,
        help="layers of the projector, 3 in SimCLR v2 [SimCLR Sec. 4.2, v2 Sec. 2]")
    add("--optimizer", choices=("sgd", "lars"), default="sgd",
        help="lars: --lr 1 --weight-decay 1e-4 --warmup 0.01 --proj-layers 3, there with "
             "batch norm in the head [official README, CIFAR-10]")


def check_recipe(args):
    """Nothing to check: SimCLR has no flags that contradict each other."""


# =================== 2. Views (method) ===================
def augment(x, args, generator=None):
    """Two views of every image: half of (0.8, 0.8, 0.8, 0.2) [SimCLR App. B.9], rest [dkobak].

    x: (N, 3, H, W) uint8; returns [x1, x2], each (N, 3, W, W) float32 in [0, 1]
    """
    x = unit_range(x)
    views = []
    for _ in range(2):
        view = random_resized_crop(x, x.shape[3], (0.2, 1.0), generator=generator)
        view = random_flip(view, generator)
        view = color_jitter(view, 0.4, 0.4, 0.4, 0.1, 0.8, generator)
        view = random_grayscale(view, 0.1, generator)
        views.append(random_blur(view, 0.5, generator) if x.shape[3] > 64 else view)
    return views


# =================== 3. Loss and updates (method) ===================
def nt_xent(z1, z2, tau):
    """The normalised temperature-scaled cross entropy, Eq. 1: mean over the 2B views, in nats.

    z1, z2: (B, D) projections, row i of both from image i; normalised here, float32 inside
    """
    if z1.shape != z2.shape:
        raise ValueError(f"z1 {tuple(z1.shape)} and z2 {tuple(z2.shape)} are not of one batch")
    with torch.autocast(z1.device.type, enabled=False):  # a copier may call it under autocast
        z = F.normalize(torch.cat([z1, z2]).float(), dim=1)  # (2B, D)
        logits = (z @ z.T / tau).fill_diagonal_(-math.inf)  # no view is its own negative
        # The right class of view i is its image's other view, B rows further on, cyclically.
        target = torch.arange(len(z), device=z.device).roll(len(z1))
        return F.cross_entropy(logits, target)


class LARS(torch.optim.Optimizer):
    """SGD with steps in proportion to each weight's norm, You et al. 1708.03888, Alg. 1.

    The gradient's norm is taken with its weight decay, as in google-research/simclr. Parameters
    with one axis (biases, batch norm) get neither the adaptation nor weight decay.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust=1e-3):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay,
                                  "trust": trust})

    @torch.no_grad()
    def step(self):
        """Take one step along the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    update = update + group["weight_decay"] * p
                    ratio = group["trust"] * p.norm() / update.norm()
                    update = update * ratio.where(ratio.isfinite() & (ratio > 0), 1)
                if "velocity" not in self.state[p]:
                    self.state[p]["velocity"] = torch.zeros_like(p)
                velocity = self.state[p]["velocity"].mul_(group["momentum"])
                velocity.add_(group["lr"] * update)
                p.sub_(velocity)


# =================== 4. Model (method) ===================
class Model(nn.Module):
    """f and g of Algorithm 1; base_encoder() makes a backbone with `num_features`."""

    sync_bn = True  # more GPUs: the batch's statistics, not a part's [SimCLR Sec. 2.2]

    def __init__(self, base_encoder, args):
        super().__init__()
        self.f = base_encoder()
        widths = [self.f.num_features, *[1024] * (args.proj_layers - 1), 128]  # [dkobak]
        layers = []
        for fan_in, fan_out in zip(widths, widths[1:]):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.g = nn.Sequential(*layers[:-1])  # the last layer is linear

    def forward(self, x1, x2):
        """Views (B, 3, H, W) to z1, z2 (B, 128); a batch norm sees one view [dkobak]."""
        return self.g(self.f(x1)), self.g(self.f(x2))


# =================== 5. Training (shared, with fences) ===================
def learning_rate(step, total_steps, base, warmup_steps=0):
    """Half a cosine from base towards 0 after a linear warmup; step counts from 0."""
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return base * 0.5 * (1 + math.cos(math.pi * progress))


def train(args):
    """Train; log, monitor and save every epoch; return the last epoch's record, a dict."""
    # Setup: the data on the device, the model, its optimizer, the files of the run.
    rank, world, _ = processes()
    device = choose_device(args.device)
    bf16 = args.precision == "bf16" or args.precision == "auto" and device.type == "cuda"
    autocast = partial(torch.autocast, device.type, torch.bfloat16, bf16)
    data = load_dataset(args.dataset, args.data_dir, args.image_size, args.cache_dir, device,
                        args.skip_broken, args.max_pixels)
    if world > 1:  # after the data: decoding may outlast the time that processes wait
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    count, size = len(data.train_images), data.train_images.shape[3]
    steps, local_batch = count // args.batch_size, args.batch_size // world
    if steps == 0:
        fail(f"--batch-size {args.batch_size} is more than the {count} images: "
             f"try {2 ** (count // 2).bit_length()}")
    torch.manual_seed(args.seed)
    stem = ("cifar" if size <= 64 else "imagenet") if args.stem == "auto" else args.stem
    model = Model(partial(resnet, args.arch, args.width, stem), args)
    model = model.to(device, memory_format=torch.channels_last)
    lr = args.lr * args.batch_size / 256  # linear scaling, Goyal et al. 1706.02677
    # <method>
    if args.optimizer == "lars":
        optimizer = LARS(model.parameters(), lr, args.sgd_momentum, args.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), lr, args.sgd_momentum, weight_decay=args.weight_decay,
            fused=device.type == "cuda")
    # </method>
    knn_every = args.knn_every or max(1, args.epochs // 40)
    log, record = open_run(args, data, model, optimizer, lr)  # locks --out, resumes
    network = wrap(model, Model.sync_bn, args.compile, device)
    monitor = partial(knn_monitor, model.f, data, args, local_batch, autocast)
    if record is None:
        record = {"epoch": 0, **monitor()}  # before training
        save_epoch(log, record, args, model, optimizer, data)

    for epoch in range(record["epoch"] + 1, args.epochs + 1):
        seed = args.seed * 10**6 + epoch  # so --resume draws what a whole run draws
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        order = order[:steps * args.batch_size].view(steps, world, local_batch)
        order = order[:, rank].flatten()  # this process's images
        torch.manual_seed(seed + rank * 10**16)  # no two processes draw the same views
        losses, stds = both = torch.zeros(2, steps, device=device)
        start = time.perf_counter()
        model.train()
        images = batches(data.train_images, order, local_batch, device, args.workers)
        for step, x in enumerate(with_progress(images, epoch, steps)):
            rate = learning_rate((epoch - 1) * steps + step, args.epochs * steps, lr,
                                 round(args.warmup * args.epochs * steps))
            for group in optimizer.param_groups:
                group["lr"] = group.get("fixed_lr", rate)
            optimizer.zero_grad()
            views = [normalize(view, data.mean, data.std) for view in augment(x, args)]
            # <method>
            with autocast():
                z1, z2 = network(*views)
            loss = nt_xent(gather(z1), gather(z2), args.tau)  # Eq. 1
            std = feature_std(z1)
            # </method>
            loss.backward()
            optimizer.step()
            losses[step], stds[step] = loss.detach(), std
        if world > 1:
            dist.all_reduce(both.div_(world))
            for value in model.buffers():  # running statistics, where each process has its own
                dist.broadcast(value, 0)
        losses = losses.cpu()  # the epoch's one wait for the device
        seconds = time.perf_counter() - start
        if not losses.isfinite().all():
            step = losses.isfinite().int().argmin().item()
            fail(f"the loss is {losses[step]} at epoch {epoch}, step {step + 1} of {steps}: "
                 f"try a lower --lr; epoch {epoch - 1} is saved", status=1)
        record = {"epoch": epoch, "loss": losses.mean().item(), "std": stds.mean().item(),
                  "lr": rate, "views_s": steps * args.batch_size * len(views) / seconds,
                  "seconds": seconds}
        if epoch % knn_every == 0 or epoch == args.epochs:
            record |= monitor()
        save_epoch(log, record, args, model, optimizer, data)
    if world > 1:
        del network  # its destructor waits for gloo's thread, that for the GIL (torch 2.11)
        dist.destroy_process_group()
    return record


# =================== 6. kNN monitor (shared) ===================
def knn_monitor(f, data, args, batch_size, autocast):
    """Percent of the test images whose neighbours name the right class; {} without labels."""
    if data.test_labels is None:
        return {}
    start = time.perf_counter()
    bank, queries = (features(f, x, data.mean, data.std, batch_size, autocast)
                     for x in (data.train_images, data.test_images))
    knn = knn_accuracy(bank, data.train_labels, queries, data.test_labels,
                       len(data.classes), args.knn_k, args.knn_tau)
    return {"knn": knn, "knn_seconds": time.perf_counter() - start}


@torch.no_grad()
def features(f, images, mean, std, batch_size, autocast):
    """The frozen backbone's output, in evaluation mode: uint8 (N, 3, H, W) to (N, D) float32."""
    rank, world, _ = processes()
    rows = -(-len(images) // world)  # of each process; the last one repeats the last image
    order = torch.arange(rank * rows, (rank + 1) * rows).clamp(max=len(images) - 1)
    out = []
    f.eval()
    for x in batches(images, order, batch_size, mean.device):
        with autocast():
            out.append(f(normalize(x, mean, std)).float())
    return gather(torch.cat(out))[:len(images)]


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


def feature_std(z):
    """Mean std of a channel of l2-normalised z (B, D) times sqrt(D): 1 healthy, 0 collapsed."""
    return F.normalize(z.detach().float(), dim=1).std(0).mean() * z.shape[1] ** 0.5


# =================== 7. Augmentation operations (shared) ===================
def unit_range(x):
    """uint8 (N, 3, H, W) to float32 in [0, 1]; ValueError for what has no three colours."""
    if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[1] != 3:
        raise ValueError("colour jitter and grey need uint8 images (N, 3, H, W), "
                         f"not {x.dtype} {tuple(x.shape)}")
    return x.float() / 255


def crop_resize(x, boxes, size):
    """Cut and resize a box of each image, as torchvision's resized_crop(antialias=False).

    x: (N, 3, H, W); boxes: (N, 4) top, left, height, width in pixels
    Returns (N, 3, size, size) float32. Row i of an axis's matrix weighs the two pixels j around
    the point at_i, which is inside the box, by 1 - |at_i - j|.
    """
    def weights(start, length, pixels):
        at = (torch.arange(size, device=x.device) + 0.5) * (length / size)[:, None] - 0.5
        at = torch.minimum(at.clamp_(min=0), length[:, None] - 1) + start[:, None]
        distance = (at[:, :, None] - torch.arange(pixels, device=x.device)).abs_()
        return distance.neg_().add_(1).clamp_(min=0)  # (N, size, pixels)

    top, left, height, width = boxes.float().unbind(1)
    rows, columns = weights(top, height, x.shape[2]), weights(left, width, x.shape[3])
    with torch.autocast(x.device.type, enabled=False):  # a copier's bf16 would lose pixel bits
        return rows[:, None] @ x.float() @ columns[:, None].mT


def random_resized_crop(x, size, scale, ratio=(3 / 4, 4 / 3), generator=None):
    """Crop a random box of each image as RandomResizedCrop: ten tries, then the largest centre.

    x: (N, 3, H, W); scale: the box's share of the area; ratio: width / height
    Returns (N, 3, size, size) float32.
    """
    n, _, h, w = x.shape
    u = torch.rand(4, n, 10, generator=generator, device=x.device)
    area = h * w * (scale[0] + (scale[1] - scale[0]) * u[0])
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** u[1]  # log-uniform
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (width > 0) & (width <= w) & (height > 0) & (height <= h)
    missed, first = ~fits.any(1), fits.int().argmax(1, keepdim=True)
    width = width.gather(1, first)[:, 0].where(~missed, min(w, round(h * ratio[1])))
    height = height.gather(1, first)[:, 0].where(~missed, min(h, round(w / ratio[0])))
    spare = torch.stack([h - height, w - width])  # (2, N): the lowest top, the rightmost left
    top, left = torch.where(missed, spare // 2,
                            (u[2:, :, 0] * (spare + 1)).floor().minimum(spare))
    return crop_resize(x, torch.stack([top, left, height, width], 1), size)


def random_flip(x, generator=None):
    """Mirror each image left to right with probability 1/2."""
    flip = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < 0.5
    return torch.where(flip, x.flip(3), x)


def grayscale(x):
    """The luma of ITU-R BT.601, as torchvision weighs it: (N, 3, H, W) to (N, 1, H, W)."""
    r, g, b = x.unbind(1)
    return (0.2989 * r + 0.587 * g + 0.114 * b)[:, None]


def adjust_brightness(x, factor):
    """Scale each image x (N, 3, H, W) in [0, 1] by its factor (N,)."""
    return (x * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(x, factor):
    """Scale each pixel's distance from its image's mean luma by the image's factor (N,)."""
    mean = grayscale(x).mean((2, 3), keepdim=True)
    return torch.lerp(mean, x, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_saturation(x, factor):
    """Scale each pixel's distance from its own luma by the image's factor (N,)."""
    return torch.lerp(grayscale(x), x, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_hue(x, factor):
    """Turn each image's hue by its factor (N,), a part of the circle; grey stays grey."""
    r, g, b = x.unbind(1)
    high, low = x.amax(1), x.amin(1)
    span = high - low
    div = span.where(span > 0, 1)
    hue = torch.where(high == r, (g - b) / div,
                      torch.where(high == g, 2 + (b - r) / div, 4 + (r - g) / div))
    hue = (hue + 6 * factor.view(-1, 1, 1)).remainder_(6)  # red is 0, green 2, blue 4
    r, g, b = (hue - 3).abs_() - 1, 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()
    return torch.stack([torch.addcmul(low, span, part.clamp_(0, 1)) for part in (r, g, b)], 1)


def color_jitter(x, brightness, contrast, saturation, hue, p, generator=None):
    """torchvision's ColorJitter with probability p an image, factors are the image's own.

    The order of the four operations is drawn once a batch, not once an image.
    """
    jitter = torch.rand(len(x), generator=generator, device=x.device) < p

    def draw(centre, strength):
        u = torch.rand(len(x), generator=generator, device=x.device)
        low = max(0, centre - strength) if centre else -strength
        return (low + (centre + strength - low) * u).where(jitter, centre)  # centre: as it was

    steps = [
        (adjust_brightness, draw(1, brightness)), (adjust_contrast, draw(1, contrast)),
        (adjust_saturation, draw(1, saturation)), (adjust_hue, draw(0, hue))]
    # On the host: asking a GPU for the order would make the host wait for it.
    order = torch.randperm(4, generator=generator if x.device.type == "cpu" else None)
    for operation, factor in [steps[i] for i in order.tolist()]:
        x = operation(x, factor)
    return x


def random_grayscale(x, p, generator=None):
    """Replace each image by its luma with probability p."""
    gray = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < p
    return torch.where(gray, grayscale(x), x)


def gaussian_blur(x, sigma):
    """Blur each image by its sigma (N,) pixels, kernel a tenth of the side [SimCLR App. A]."""
    n, c, h, w = x.shape
    half = max(1, min(h, w) // 20)
    at = torch.arange(-half, half + 1, device=x.device)
    kernel = torch.softmax(-0.5 * (at / sigma[:, None]).square(), 1)  # (N, 2 half + 1)
    kernel = kernel.repeat_interleave(c, 0)[:, None, None]
    x = F.pad(x, 4 * [half], mode="reflect").flatten(0, 1)[None]  # (1, 3N, ., .)
    with torch.autocast(x.device.type, enabled=False):  # likewise for copiers
        x = F.conv2d(F.conv2d(x, kernel, groups=n * c), kernel.mT, groups=n * c)
    return x.view(n, c, h, w)


def random_blur(x, p, generator=None):
    """Blur each image with probability p, sigma uniform in 0.1-2 pixels [SimCLR App. A]."""
    sigma = 0.1 + 1.9 * torch.rand(len(x), generator=generator, device=x.device)
    blur = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < p
    return torch.where(blur, gaussian_blur(x, sigma), x)


# =================== 8. Options (shared) ===================
def fail(message, status=2):
    """End the program with one line on standard error."""
    sys.stderr.write(f"error: {' '.join(str(message).split())}\n")  # in one piece
    raise SystemExit(status)


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
    parse.__name__ = "whole number" if kind is int else "number"  # for argparse's message
    return parse


def share(text):
    """An argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(
            f"{text} is not from 0 to 1: give a share of all steps, 0.05 for 10 of 200 epochs")
    return value


def parse_args(argv=None):
    """Read the flags, check all that needs no data; end what is wrong in one line, status 2."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], usage="%(prog)s [flags]",
        formatter_class=Help, allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="cifar10",
        help="folder: any images; shapes: drawn, needs no files")
    add("--data-dir", default="data", help="the images, or where CIFAR is downloaded to")
    add("--cache-dir", help="for a folder's decoded images (default: in --data-dir)")
    add("--skip-broken", action="store_true", help="go on without files that cannot be read")
    add("--max-pixels", type=number(int, 1, 10**12), help="refuse larger; default: 179 million")
    add("--image-size", type=number(int, 8, 4096), help="pixels (default: 32, folder 224)")
    add("--workers", type=number(int, 1, 1024), default=min(8, os.cpu_count() or 1),
        help="threads that gather training images that do not fit on the device")
    add = parser.add_argument_group("network").add_argument
    add("--arch", choices=ARCHS, default="resnet18", help="backbone")
    # Below 16 channels torch 2.11 to 2.15 corrupts memory (CPU, channels_last, 1x1, stride 2).
    add("--width", type=number(float, 0.25, 16), default=1.0, help="multiplies channel counts")
    add("--stem", choices=("auto", "cifar", "imagenet"), default="auto",
        help="auto: cifar (3x3, no max-pool) up to 64 pixels")
    add("--init", metavar="PATH", help="begin with these weights: a checkpoint or torchvision's")
    add = parser.add_argument_group("run").add_argument
    add("--epochs", type=number(int, 1, 10**6), default=200, help="passes over the data")
    add("--batch-size", type=number(int, 2, 10**6), default=512, help="images a step")
    add("--seed", type=number(int, 0, 10**9), default=0, help="same seed, same run")
    add("--device", choices=("auto", "cuda", "cpu", "mps"), default="auto", help="auto: best")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto",
        help="auto: bf16 on CUDA, else fp32; bf16 is far slower on CPUs without it")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile the network (default: on CUDA without SyncBatchNorm)")
    add = parser.add_argument_group("output").add_argument
    add("--out", default=f"runs/{Path(__file__).stem}", help="folder of log and checkpoint")
    add("--resume", action="store_true", help="go on from --out, all else the same")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--save-views", metavar="PNG", help="draw eight images and their views first")
    add = parser.add_argument_group("monitor").add_argument
    add("--knn-every", type=number(int, 1, 10**6),
        help="epochs between two kNN accuracies; also before training and at the end "
             "(default: a fortieth of the epochs, at least 1)")
    add("--knn-k", type=number(int, 1, 10**6), default=200, help="neighbours [MoCo demo]")
    add("--knn-tau", type=number(float, 1e-3, 1e3), default=0.1,
        help="temperature of a neighbour's vote [MoCo CIFAR demo]")
    add_recipe(parser)
    (args, unknown), world = parser.parse_known_args(argv), processes().world
    if unknown:
        flags = parser._option_string_actions  # with the --no- forms
        near = get_close_matches(unknown[0], flags, 1, 0.7) or ["one that --help shows"]
        fail(f"{unknown[0]} is not a flag: did you mean {near[0]}?")
    if args.resume and args.overwrite:
        fail("--resume and --overwrite exclude each other")
    if args.batch_size % world or args.batch_size < 2 * world:
        fail(f"--batch-size {args.batch_size} cannot be split over {world} processes: each "
             "needs the same number of images, at least 2")
    check_recipe(args)
    return args


# =================== 9. Run files (shared) ===================
def open_run(args, data, model, optimizer, lr):
    """Lock --out, restore what --resume goes on from, begin the log or cut it there.

    Returns the open log, None but in the first process, and the restored epoch's record.
    """
    path, saved, name = Path(args.out, "checkpoint.pt"), {}, Path(__file__).stem
    if args.resume and path.exists():
        saved = load_checkpoint(path, name, args, data)
        model.load_state_dict(saved["model"])
        # Of the optimizer the momenta alone: all else is as this run and its device have it.
        momenta = saved["optimizer"]["state"]
        optimizer.load_state_dict({**optimizer.state_dict(), "state": momenta})
    elif args.init:
        restore(model, args.init)
    if processes().rank > 0:
        return None, saved.get("record")
    if args.save_views:
        images = data.train_images[::max(1, len(data.train_images) // 8)][:8]  # of all classes
        draw_columns(args.save_views, [images / 255, *augment(images, args)], args)
    log = open_log(path.with_name("log.jsonl"), saved.get("log_end", 0), args.overwrite)
    if not saved:
        path.unlink(missing_ok=True)  # a run killed early must not resume as the one before it
    count, tests = len(data.train_images), len(data.test_images)
    header = {
        "method": name, "args": vars(args), "lr": lr, "images": count, "test_images": tests,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "processes": processes().world, **environment(data.mean.device)}
    log.write(json.dumps(header) + "\n")
    log.flush()
    knn = "no labels, no kNN" if data.test_labels is None else f"kNN of {tests}"
    say(f"{name}: {args.arch} on {header['device']}; {args.dataset}, {count} images, {knn}\n"
        f"{args.epochs - saved.get('epoch', 0)} of {args.epochs} epochs to go, "
        f"{count // args.batch_size} steps each, to {args.out}")
    return log, saved.get("record")


def save_epoch(log, record, args, model, optimizer, data):
    """Log an epoch, save it, print it; the first process does, for all."""
    if log is None:
        return
    log.write(json.dumps(record) + "\n")
    log.flush()
    save_checkpoint(Path(args.out, "checkpoint.pt"), {
        "method": Path(__file__).stem, "args": vars(args), "epoch": record["epoch"],
        "record": record, "log_end": log.tell(), "images": len(data.train_images),
        "mean": data.mean, "std": data.std, "backbone": model.f.state_dict(),
        "model": model.state_dict(), "optimizer": optimizer.state_dict()})
    line = " ".join(f"{key}={value:.4g}" for key, value in record.items())
    if record["epoch"] > 0:
        line += f" left={(args.epochs - record['epoch']) * record['seconds'] / 60:.0f}min"
    say(line + (" warning: std says collapsed" if record.get("std", 1) < 0.1 else ""))
    if record["epoch"] == args.epochs:
        say(f"wrote {args.out}; next: python linear_eval.py {shlex.quote(args.out)}/checkpoint.pt")


def main(argv=None):
    """Train as the flags say, return the last epoch's record; end what stops it in one line."""
    args = parse_args(argv)
    if Path(args.out, "checkpoint.pt").exists() and not (args.resume or args.overwrite):
        fail(f"{args.out} holds a run: --resume goes on with it, --overwrite replaces it")
    try:
        return train(args)
    except (OSError, UserError) as problem:
        fail(problem)
    except KeyboardInterrupt:
        again = "the same command with"
        if argv is None and processes().world == 1:
            again = shlex.join(x for x in sys.orig_argv if x not in ("--overwrite", "--resume"))
        if processes().rank == 0:
            sys.stderr.write(f"stopped: what is saved goes on with: {again} --resume\n")
        raise SystemExit(128 + signal.SIGINT) from None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does
    main()
