"""MoCo: self-supervised learning by telling an image's key from the keys of a queue.

With --epochs 12 --width 0.25, kNN accuracy on CIFAR-10 is 53.9 % after 2.2 hours on a CPU.
The defaults, 200 epochs on a GPU, are not measured yet.
For 200 epochs the authors' demo has 85.3 % (of g's output), the library lightly 84.7 %
(of the best epoch).

Reference implementation, to be read, diffed and copied (with common.py), of
"Momentum Contrast for Unsupervised Visual Representation Learning", He et al., CVPR 2020,
arXiv 1911.05722, with the head of MoCo v2, arXiv 2003.04297 (v1's: --proj-layers 1).

    python moco.py --epochs 200 --batch-size 512

The query of a view must tell the key of the image's other view from the keys of earlier
batches, which are kept in a queue. Keys come from a slowly moving copy of the network, so
that old keys stay comparable with new ones.

    x1, x2   (B, 3, H, W)  two random views of a batch of B images
    f        backbone      f(x) is (B, 512) for ResNet-18; f is kept after training
    g        head          query q = g(f(x)), (B, 128); key k = g_k(f_k(x)), no gradient
    queue    (K, 128)      the last K keys, the negatives; unit vectors, random at first
    tau      temperature   of the softmax
    l(q, k)  = -log( exp(q . k / tau) / (exp(q . k / tau) + sum_i exp(q . queue_i / tau)) )  (1)
    theta_k  = m theta_k + (1 - m) theta_q: f_k, g_k follow f, g after every step           (2)
    L        = l(q1, k2) + l(q2, k1), or l(q1, k2) with --no-symmetric
               2 log(K + 1), or log(K + 1), if the network cannot tell images apart
               (the loss first scales q and k to length 1)

Differences from the paper:
- Colour strengths are drawn per image, but the order of brightness, contrast, saturation
  and hue once per view and batch, so that each is one call for the whole batch.
- The learning rate changes at every step, not every epoch. Crops are not antialiased.
- The recipe is the authors' CIFAR demo's, with its option of a symmetric loss: the sum
  over both views, whose keys enter the queue after it. Eight parts of the batch, each
  normalised by its own statistics, stand for eight GPUs. The demo's head has one layer.
- The defaults are for CIFAR. For ImageNet, MoCo v2 has crops of at least 0.2 of the area,
  tau 0.2, m 0.999, weight decay 1e-4, K 65536 and a hidden layer of 2048 in the head.
"""
# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the authors
# Shared sections are identical in all four method scripts, except between <method> marks.

# =================== Imports (shared) ===================
import argparse
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.utils import save_image

from common import (ARCHS, DATASETS, UserError, batches, fill_backbone, load_dataset,
                    load_weights, normalize, resnet, say)

try:
    import fcntl
except ImportError:  # Windows has no fcntl, so there is no lock on the log
    fcntl = None


# =================== 1. Recipe (method) ===================
METHOD = "moco"


def add_recipe(parser):
    """Add the flags that define the experiment, each with its source."""
    add_flags(parser, [
        ("--lr", RATE, 0.03,
         "learning rate for batch size 256, scaled with the batch size [MoCo CIFAR demo]"),
        ("--weight-decay", FRACTION, 5e-4, "of all parameters [MoCo CIFAR demo]"),
        ("--sgd-momentum", FRACTION, 0.9, "[MoCo CIFAR demo]"),
        ("--warmup", SHARE, 0.0,
         "share of all steps in which the learning rate rises linearly [MoCo CIFAR demo]"),
        ("--tau", RATE, 0.1, "temperature [MoCo CIFAR demo]"),
        ("--m", FRACTION, 0.99, "share of f_k kept in a step, Eq. 2 [MoCo CIFAR demo]"),
        ("--queue", COUNT, 4096, "keys K [MoCo CIFAR demo]"),
        ("--proj-layers", COUNT, 2,
         "layers of the head: v1 has 1, v2 has 2 [MoCo v2 Sec. 3]"),
        ("--symmetric", bool, True,
         "use each view as query once: better, at twice the cost [MoCo demo's option]"),
        ("--bn-splits", COUNT, 8,
         "parts of a whole batch, each normalised by its own statistics [MoCo CIFAR demo]"),
    ])


def check_recipe(args, count=None):
    """Exit with a one-line error if flags do not fit each other or the number of images."""
    world = processes()[1]
    splits = max(1, args.bn_splits // world) * world
    if args.batch_size % splits or args.batch_size == splits:
        fail(f"--bn-splits: --batch-size must be 2, 3, ... times {splits}")
    if count is not None and args.queue + args.batch_size > count:
        fail(f"--queue and --batch-size are together more than the {count} images: try "
             f"--queue {max(1, count // 2)} --batch-size {max(2, count // 4)} --bn-splits 1")


# =================== 2. Views (method) ===================
def augment(x, args, generator=None):
    """Two views of every image [MoCo CIFAR demo]; above 64 pixels with blur [MoCo v2].

    x: (N, 3, H, W) uint8; args is not used here
    Returns [x1, x2], each (N, 3, W, W) float32 in [0, 1].
    """
    x = unit_range(x)
    views = []
    for _ in range(2):
        view = random_resized_crop(x, x.shape[3], (0.08, 1.0), generator=generator)
        view = random_flip(view, generator)
        view = color_jitter(view, 0.4, 0.4, 0.4, 0.1, 0.8, generator)
        view = random_grayscale(view, 0.2, generator)
        if x.shape[3] > 64:
            view = random_blur(view, 0.5, generator)
        views.append(view)
    return views


# =================== 3. Loss and updates (method) ===================
def info_nce(q, k, queue, tau):
    """InfoNCE, Eq. 1, in float32: the queries' own keys against the queue's, mean, nats.

    q, k: (B, D), normalised here, k without gradient; queue: (K, D) unit vectors
    """
    with torch.autocast(q.device.type, enabled=False):  # for callers under autocast
        q = F.normalize(q.float(), dim=1)
        k = F.normalize(k.detach().float(), dim=1)
        positive = (q * k).sum(1, keepdim=True)  # (B, 1)
        logits = torch.cat([positive, q @ queue.float().T], 1) / tau  # (B, 1 + K)
        return -logits.log_softmax(1)[:, 0].mean()  # the positive is first in every row


@torch.no_grad()
def momentum_update(f, f_k, m):
    """theta_k = m theta_k + (1 - m) theta_q, Eq. 2, in place, for all parameters of f_k."""
    for p, p_k in zip(f.parameters(), f_k.parameters(), strict=True):
        p_k.mul_(m).add_(p, alpha=1 - m)


@torch.no_grad()
def enqueue(queue, ptr, k):
    """Write keys over the oldest rows of the queue, in place; return the new pointer.

    queue: (K, D); ptr: the index of its oldest row; k: (N, D), normalised here
    """
    new = F.normalize(k.float(), dim=1)[-len(queue):]
    row = ptr + len(k) - len(new) + torch.arange(len(new), device=queue.device)
    queue.index_copy_(0, row % len(queue), new)
    return (ptr + len(k)) % len(queue)


# =================== 4. Model (method) ===================
class SplitBatchNorm2d(nn.modules.batchnorm._NormBase):
    """A batch norm over `splits` equal parts of a batch, each with its own statistics.

    norm: an affine BatchNorm2d, whose settings and weights it takes [MoCo CIFAR demo]
    It is no BatchNorm2d itself, so that SyncBatchNorm's conversion leaves it alone.
    """

    def __init__(self, norm, splits):
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.load_state_dict(norm.state_dict())
        self.splits = splits

    def forward(self, x):
        splits = self.splits if self.training else 1
        mean, var = self.running_mean.repeat(splits), self.running_var.repeat(splits)
        # Stack the parts as channels: one call normalises each apart.
        parts = torch.cat(x.chunk(splits), dim=1)
        parts = F.batch_norm(
            parts, mean, var, self.weight.repeat(splits), self.bias.repeat(splits),
            self.training, self.momentum, self.eps)
        self.running_mean.copy_(mean.view(splits, -1).mean(0))
        self.running_var.copy_(var.view(splits, -1).mean(0))
        return torch.cat(parts.chunk(splits, dim=1))


class Model(nn.Module):
    """The networks f and g, their slow copies f_k and g_k, and the queue.

    base_encoder: a function that returns a backbone: images to (B, backbone.num_features)
    args: any object with `proj_layers`, `queue`, `symmetric` and `bn_splits`; a batch
    must have 2, 3, ... times as many images as splits
    """

    sync_bn = False  # common statistics would let a query find its key [Sec. 3.3]

    def __init__(self, base_encoder, args):
        super().__init__()
        self.splits = max(1, args.bn_splits // processes()[1])
        self.symmetric = args.symmetric
        self.f, self.g = self.encoder(base_encoder, args)
        self.f_k, self.g_k = self.encoder(base_encoder, args)
        self.f_k.load_state_dict(self.f.state_dict())
        self.g_k.load_state_dict(self.g.state_dict())
        self.f_k.requires_grad_(False)  # no gradient, only Eq. 2
        self.g_k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(args.queue, 128), dim=1))
        self.register_buffer("ptr", torch.tensor(0))

    def encoder(self, base_encoder, args):
        """A backbone with split batch norm, and its head, 512-512-128 [MoCo v2]."""
        f = base_encoder()
        for name, norm in list(f.named_modules()):
            if self.splits == 1 or not isinstance(norm, nn.modules.batchnorm._BatchNorm):
                continue
            if type(norm) is not nn.BatchNorm2d or None in (
                    norm.weight, norm.momentum, norm.running_mean):
                raise ValueError(f"{name}, {norm}, cannot be split: use --bn-splits 1")
            f.set_submodule(name, SplitBatchNorm2d(norm, self.splits))
        widths = [*[f.num_features] * args.proj_layers, 128]
        layers = []
        for fan_in, fan_out in zip(widths, widths[1:]):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        return f, nn.Sequential(*layers[:-1])  # the last layer is linear

    @torch.no_grad()
    def key(self, x):
        """Keys of x; a shuffle gives them other parts than their queries [ShuffleBN, Sec. 3.3]."""
        views, (rank, world, _) = gather(x), processes()
        # torch.compile of torch 2.11 cannot compile randperm.
        order = torch.rand(len(views), device=x.device).argsort()
        if world > 1:
            dist.broadcast(order, 0)
        x = views[order.chunk(world)[rank]].contiguous(memory_format=torch.channels_last)
        return gather(self.g_k(self.f_k(x)))[order.argsort().chunk(world)[rank]]

    def forward(self, x1, x2):
        """Views (B, 3, H, W) to pairs of a query and its key, each (B, 128)."""
        pairs = [(x1, x2), (x2, x1)] if self.symmetric else [(x1, x2)]
        return [(self.g(self.f(x)), self.key(other)) for x, other in pairs]


# =================== 5. Training (shared, with fences) ===================
def learning_rate(step, total_steps, base, warmup_steps=0):
    """A linear warmup to base, then half a cosine period to 0; step counts from 0."""
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return base * 0.5 * (1 + math.cos(math.pi * progress))


def train(args, data, begin=None):
    """Train on data, a Dataset of common.py; log, monitor and save.

    args: what `parse_args` returns; begin: when the run began, by time.perf_counter
    Returns the record of the last epoch, a dict.
    """
    # Every process trains on its part of each batch. Images that do not fill the last
    # batch of an epoch are left out; the next epoch has another order.
    rank, world, _ = processes()
    device = data.mean.device
    count = len(data.train_images)
    steps, local_batch = count // args.batch_size, args.batch_size // world
    total_steps = args.epochs * steps
    warmup_steps = round(args.warmup * total_steps)
    bf16 = args.precision == "bf16" or args.precision == "auto" and device.type == "cuda"
    autocast = partial(torch.autocast, device.type, torch.bfloat16, bf16)

    # Build the network. Its first layers (stem) do not shrink images of up to 64 pixels.
    torch.manual_seed(args.seed)
    stem = args.stem
    if stem == "auto":
        stem = "cifar" if data.train_images.shape[3] <= 64 else "imagenet"
    model = Model(partial(resnet, args.arch, args.width, stem), args)
    model.to(device, memory_format=torch.channels_last)

    # Build the optimizer. Its rate is linear in the batch size [Goyal et al. 1706.02677].
    lr = args.lr * args.batch_size / 256
    # <method>
    parts = [*model.f.parameters(), *model.g.parameters()]
    optimizer = torch.optim.SGD(parts, lr, args.sgd_momentum, weight_decay=args.weight_decay,
                                fused=device.type == "cuda")
    # </method>

    # Continue the run in --out (--resume), or begin one and evaluate it before training.
    header = describe(args, data)
    record = restore(args, header, model, optimizer)
    begin = (begin or time.perf_counter()) - 60 * record.get("minutes", 0)
    saved_epoch, next_save = record.get("epoch", 0), 0
    network = wrap(model, args.compile, device)
    monitor = partial(knn_monitor, model.f, data, args, local_batch, autocast)
    knn_every = args.knn_every or max(1, args.epochs // 40)
    with open_log(args, header, record) if rank == 0 else nullcontext() as log:
        if not record:
            write_record(log, {"epoch": 0, **monitor()}, args, begin)

        for epoch in range(saved_epoch + 1, args.epochs + 1):
            # Draw the order of the images and take this process's part of each batch.
            # A resumed run gets the same random numbers as an uninterrupted one.
            seed = args.seed * 10**6 + epoch
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
            order = order[:steps * args.batch_size].view(steps, world, local_batch)
            order = order[:, rank].flatten()
            torch.manual_seed(seed + rank * 10**16)  # every process draws its own views

            # Take one optimizer step on each batch.
            model.train()
            history = defaultdict(lambda: torch.zeros(steps, device=device))
            start = time.perf_counter()
            images = batches(data.train_images, order, local_batch, device, args.workers)
            for step, x in enumerate(images):
                rate = learning_rate((epoch - 1) * steps + step, total_steps, lr, warmup_steps)
                for group in optimizer.param_groups:
                    if not group.get("fix_lr"):
                        group["lr"] = rate
                optimizer.zero_grad()
                views = [normalize(view, data.mean, data.std) for view in augment(x, args)]
                # <method>
                with autocast():
                    pairs = network(*views)
                # Eq. 1
                loss = sum(info_nce(q, k, model.queue, args.tau) for q, k in pairs)
                figures = {"loss": loss, "std": feature_std(pairs[0][0])}
                # </method>
                loss.backward()
                optimizer.step()
                # <method>
                momentum_update(model.f, model.f_k, args.m)  # Eq. 2 and Alg. 1
                momentum_update(model.g, model.g_k, args.m)
                keys = gather(torch.cat([k for _, k in pairs]))  # of all processes
                model.ptr.copy_(enqueue(model.queue, model.ptr, keys))
                # </method>
                for name, figure in figures.items():
                    history[name][step] = figure.detach()
                if os.isatty(1):  # show the epoch's progress in one line
                    say(f"epoch {epoch} step {step + 1} of {steps}", end="\r")

            # Average over the processes. All copy the running statistics of process 0.
            if world > 1:
                for values in history.values():
                    dist.all_reduce(values.div_(world))
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)
            losses = history["loss"].cpu()  # here only, the CPU waits for the device
            seconds = time.perf_counter() - start
            if not losses.isfinite().all():
                first = losses.isfinite().int().argmin()
                fail(f"the loss is {losses[first]} at epoch {epoch}, step {first + 1} of "
                     f"{steps}: try a lower --lr; epoch {saved_epoch or '(none)'} is saved", 1)

            # Monitor, log and save.
            record = {
                "epoch": epoch,
                **{name: values.mean().item() for name, values in history.items()},
                "lr": rate,  # of the last step
                "views_s": steps * args.batch_size * len(views) / seconds}
            if epoch % knn_every == 0 or epoch == args.epochs:
                record |= monitor()
            write_record(log, record, args, begin)
            if rank == 0 and (time.perf_counter() > next_save or epoch == args.epochs):
                next_save = save_checkpoint(Path(args.out, "checkpoint.pt"), {
                    **header, "epoch": epoch, "record": record, "mean": data.mean,
                    "std": data.std, "backbone": model.f.state_dict(),
                    "model": model.state_dict(), "optimizer": optimizer.state_dict()})
                saved_epoch = epoch
    return record


# =================== 6. kNN monitor (shared) ===================
def knn_monitor(f, data, args, batch_size, autocast):
    """{"knn": percent of test images that their nearest training images classify right}.

    Without a test split, every training image is classified by all others. Without labels
    there is no kNN, and {} is returned.
    """
    if data.train_labels is None:
        return {}
    bank = features(f, data.train_images, data, batch_size, autocast)
    queries, labels, leave_one_out = bank, data.train_labels, data.test_labels is None
    if not leave_one_out:
        queries = features(f, data.test_images, data, batch_size, autocast)
        labels = data.test_labels
    return {"knn": knn_accuracy(
        bank, data.train_labels, queries, labels, len(data.classes), args.knn_k,
        args.knn_tau, leave_one_out)}


@torch.no_grad()
def features(f, images, data, batch_size, autocast):
    """The backbone's output in evaluation mode, without gradient, (N, D) float32.

    images: (N, 3, H, W) uint8, data.train_images or data.test_images
    """
    rank, world, _ = processes()
    rows = math.ceil(len(images) / world)  # per process; the last image may repeat
    order = torch.arange(rank * rows, (rank + 1) * rows).clamp(max=len(images) - 1)
    parts = []
    f.eval()
    for x in batches(images, order, batch_size, data.mean.device, workers=8):
        with autocast():
            parts.append(f(normalize(x, data.mean, data.std)).float())
    return gather(torch.cat(parts))[:len(images)]


def knn_accuracy(bank, bank_labels, queries, labels, num_classes, k=200, tau=0.1,
                 leave_one_out=False):
    """Percent of queries that their k nearest neighbours classify right.

    [Wu et al. 1805.01978]
    bank: (N, D), queries: (M, D) features, normalised here; labels: (N,), (M,) int64
    leave_one_out: the queries are the bank, and a query is not its own neighbour
    A neighbour's vote is exp(cosine / tau). In a tie the lower class wins. k is cut to N.
    """
    bank = F.normalize(bank.float(), dim=1)
    k = min(k, len(bank))
    rows, right = max(1, 2**25 // len(bank)), 0  # queries at a time: 128 MiB of cosines
    parts = zip(queries.split(rows), labels.split(rows))
    for number, (query, label) in enumerate(parts):
        cosine = F.normalize(query.float(), dim=1) @ bank.T
        if leave_one_out:
            cosine.diagonal(number * rows).fill_(-math.inf)  # its vote is 0
        cosine, index = cosine.topk(k, dim=1)  # (rows, k)
        vote = torch.softmax(cosine / tau, 1)  # exp(cosine / tau), scaled to sum to 1
        votes = vote.new_zeros(len(vote), num_classes)
        votes.scatter_add_(1, bank_labels[index], vote)
        right += (votes.argmax(1) == label).sum()
    return 100 * right.item() / len(queries)


def feature_std(z):
    """Standard deviation of l2-normalised z (B, D), mean over channels, times sqrt(D).

    About 1 if the outputs are spread out, 0 if they have collapsed [SimSiam Fig. 2].
    """
    z = F.normalize(z.detach().float(), dim=1)
    return z.std(0).mean() * z.shape[1] ** 0.5


# =================== 7. Augmentation operations (shared) ===================
def unit_range(x):
    """uint8 (N, 3, H, W) to float32 in [0, 1]; ValueError for any other images."""
    if x.dtype != torch.uint8 or x.shape[1:-2] != (3,):
        raise ValueError(
            f"augment needs uint8 images (N, 3, H, W), not {x.dtype} {tuple(x.shape)}")
    return x.float() / 255


def uniform(x, generator, *shape):
    """Random numbers (N, *shape) in [0, 1) for images x (N, ...), on their device.

    In this section they are always float32, whatever torch's default dtype is.
    """
    return torch.rand(
        len(x), *shape, generator=generator, device=x.device, dtype=torch.float32)


def crop_resize(x, boxes, size):
    """Cut and resize a box of each image, as torchvision's resized_crop(antialias=False).

    x: (N, 3, H, W); boxes: (N, 4) top, left, height, width in pixels
    Returns (N, 3, size, size) float32. Resizing is linear: a matrix product on each axis.
    Output pixel i is taken at position at_i of the image, inside the box. Row i of the
    matrix holds the weight of each input pixel j: max(0, 1 - |at_i - j|).
    """
    def weights(start, length, pixels):
        at = torch.arange(0.5, size, device=x.device, dtype=torch.float32)
        at = at * (length / size)[:, None] - 0.5
        at = torch.minimum(
            at.clamp_(min=0), length[:, None] - 1) + start[:, None]
        distance = (at[:, :, None]
                    - torch.arange(pixels, device=x.device)).abs_()
        return distance.neg_().add_(1).clamp_(min=0)  # (N, size, pixels)

    top, left, height, width = boxes.float().unbind(1)
    rows = weights(top, height, x.shape[2])
    columns = weights(left, width, x.shape[3])
    # No autocast: bf16's 8 bits are too few to compute with pixels of 8 bits.
    with torch.autocast(x.device.type, enabled=False):
        return rows[:, None] @ x.float() @ columns[:, None].mT


def random_resized_crop(x, size, scale, ratio=(3 / 4, 4 / 3), generator=None):
    """Crop a random box of each image, as torchvision's RandomResizedCrop.

    The first of ten random boxes that fits is taken, else the largest centred box whose
    ratio is allowed.
    x: (N, 3, H, W); scale: (low, high) share of the area; ratio: (low, high) width / height
    Returns (N, 3, size, size) float32.
    """
    n, _, h, w = x.shape
    u = torch.rand(
        4, n, 10, generator=generator, device=x.device, dtype=torch.float32)
    area = h * w * (scale[0] + (scale[1] - scale[0]) * u[0])
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** u[1]  # log-uniform
    width = (area * aspect).sqrt().round()
    height = (area / aspect).sqrt().round()
    fits = (width > 0) & (width <= w) & (height > 0) & (height <= h)
    missed = ~fits.any(1)
    first = fits.int().argmax(1, keepdim=True)
    # The first box that fits, or the largest centred one.
    width = width.gather(1, first)[:, 0]
    height = height.gather(1, first)[:, 0]
    width = width.where(~missed, min(w, round(h * ratio[1])))
    height = height.where(~missed, min(h, round(w / ratio[0])))
    # A random corner: spare (2, N) are the rows and columns that the box leaves free.
    spare = torch.stack([h - height, w - width])
    place = (u[2:, :, 0] * (spare + 1)).floor().minimum(spare)
    top, left = torch.where(missed, spare // 2, place)
    return crop_resize(x, torch.stack([top, left, height, width], 1), size)


def randomly(x, changed, p, generator):
    """With probability p, take an image from `changed` instead of x."""
    return torch.where(uniform(x, generator, 1, 1, 1) < p, changed, x)


def random_flip(x, generator=None):
    """Mirror each image left to right with probability 1/2."""
    return randomly(x, x.flip(3), 0.5, generator)


def grayscale(x):
    """The luma of ITU-R BT.601, torchvision's weights: (N, 3, H, W) to (N, 1, H, W)."""
    r, g, b = x.unbind(1)
    return (0.2989 * r + 0.587 * g + 0.114 * b)[:, None]


def adjust_brightness(x, factor):
    """Multiply each image x (N, 3, H, W) in [0, 1] by its factor (N,)."""
    return (x * factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_contrast(x, factor):
    """Multiply each pixel's distance from its image's mean luma by a factor (N,)."""
    mean = grayscale(x).mean((2, 3), keepdim=True)
    return torch.lerp(mean, x, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_saturation(x, factor):
    """Multiply each pixel's distance from its own luma by the image's factor (N,)."""
    luma = grayscale(x)
    return torch.lerp(luma, x, factor.view(-1, 1, 1, 1)).clamp_(0, 1)


def adjust_hue(x, factor):
    """Shift each image's hue by its factor (N,) of a full turn of the colour circle."""
    r, g, b = x.unbind(1)
    high, low = x.amax(1), x.amin(1)
    span = high - low
    div = span.where(span > 0, 1)
    # Hue from 0 to 6: red is 0, green 2, blue 4.
    other = torch.where(high == g, 2 + (b - r) / div, 4 + (r - g) / div)
    hue = torch.where(high == r, (g - b) / div, other)
    hue = (hue + 6 * factor.view(-1, 1, 1)).remainder_(6)
    r = (hue - 3).abs_() - 1
    g, b = 2 - (hue - 2).abs_(), 2 - (hue - 4).abs_()
    channels = [torch.addcmul(low, span, channel.clamp_(0, 1))
                for channel in (r, g, b)]
    return torch.stack(channels, 1)


def color_jitter(x, brightness, contrast, saturation, hue, p, generator=None):
    """torchvision's ColorJitter with probability p; each image has its own factors.

    brightness, contrast, saturation, hue: strengths, at most 1
    The order of the four operations is drawn once per call, not once per image.
    """
    jitter = uniform(x, generator) < p

    def draw(centre, strength):
        low = centre - strength
        factor = low + (centre + strength - low) * uniform(x, generator)
        return factor.where(jitter, centre)  # the centre is neutral: no change

    operations = [
        (adjust_brightness, draw(1, brightness)),
        (adjust_contrast, draw(1, contrast)),
        (adjust_saturation, draw(1, saturation)),
        (adjust_hue, draw(0, hue)),
    ]
    # Drawn on the host: asking a GPU for the order would make the host wait for it.
    order = torch.randperm(4, generator=generator if x.device.type == "cpu" else None)
    for number in order.tolist():
        adjust, factor = operations[number]
        x = adjust(x, factor)
    return x


def random_grayscale(x, p, generator=None):
    """Replace each image by its luma with probability p."""
    return randomly(x, grayscale(x), p, generator)


def gaussian_blur(x, sigma):
    """Blur each image with its own sigma (N,), in pixels.

    The kernel's width is about a tenth of the shorter side [SimCLR App. A].
    """
    n, c, h, w = x.shape
    half = max(1, min(h, w) // 20)
    at = torch.arange(-half, half + 1, device=x.device)
    kernel = torch.softmax(-0.5 * (at / sigma[:, None]).square(), 1)  # (N, 2 half + 1)
    kernel = kernel.repeat_interleave(c, 0)[:, None, None]
    x = F.pad(x, 4 * [half], mode="reflect").flatten(0, 1)[None]  # (1, 3N, ., .)
    with torch.autocast(x.device.type, enabled=False):  # as in crop_resize
        x = F.conv2d(x, kernel, groups=n * c)
        x = F.conv2d(x, kernel.mT, groups=n * c)
    return x.view(n, c, h, w)


def random_blur(x, p, generator=None):
    """Blur each image with probability p; sigma is 0.1 to 2 pixels [SimCLR App. A]."""
    sigma = 0.1 + 1.9 * uniform(x, generator)
    return randomly(x, gaussian_blur(x, sigma), p, generator)


# =================== 8. Options (shared) ===================
def fail(message, status=2):
    """End with one line on standard error; status 2: wrong use, 1: a failed run."""
    words = str(message).split()
    sys.stderr.write(f"error: {' '.join(words)}\n")  # one line, in one write
    raise SystemExit(status)


def within(kind, low, high, unit=""):
    """An argparse type: an int or a float from low to high; nan and inf are refused."""
    def number(text):  # argparse prints this name for text that is no number
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}{unit}")
        return value
    return number


def file_path(text):
    """An argparse type for all paths: `~` is the home folder; no path may be empty."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty: is a shell variable unset?")
    return os.path.expanduser(text)


COUNT = within(int, 1, 10**9)
RATE = within(float, 1e-8, 1e3)
FRACTION = within(float, 0, 1)
SHARE = within(float, 0, 1, ", as a share of all steps: 0.05 is 10 of 200 epochs")
FLAGS = [  # name, type or choices, default, meaning
    # Data
    ("--dataset", DATASETS, "cifar10",
     "folder: your images; shapes: drawn textures, no files"),
    ("--data-dir", file_path, "data", "folder of images, or of CIFAR's download"),
    ("--cache-dir", file_path, None, "where decoded images are kept; None: --data-dir"),
    ("--skip-broken", bool, False, "leave out files that cannot be read"),
    ("--max-pixels", COUNT, None, "refuse larger images; None: 179 million"),
    ("--image-size", within(int, 8, 4096), None,
     "pixels; None: 32; folder: 224, or the images' own if all are squares of one smaller size"),
    ("--workers", COUNT, 8, "loading threads if the images do not fit on the device"),
    # Network
    ("--arch", tuple(ARCHS), "resnet18", "backbone"),
    # Below 16 channels torch 2.11 to 2.15 corrupts memory (on the CPU, channels_last, in
    # 1x1 convolutions with stride 2).
    ("--width", within(float, 0.25, 16), 1.0, "multiplies channel counts"),
    ("--stem", ("auto", "cifar", "imagenet"), "auto",
     "cifar: 3x3, no max-pool; imagenet: 7x7, max-pool; auto: cifar up to 64 pixels"),
    ("--init", file_path, None,
     "begin with the weights of this checkpoint, or of a ResNet with torchvision's names"),
    # Run
    ("--epochs", COUNT, 200, "passes over the images"),
    ("--batch-size", within(int, 2, 10**6), 512, "images per step, over all processes"),
    ("--seed", within(int, 0, 10**9), 0, "of weights, order and views"),
    ("--device", ("auto", "cuda", "cpu", "mps"), "auto", "auto: a GPU if there is one"),
    ("--precision", ("auto", "bf16", "fp32"), "auto",
     "auto: bf16 on CUDA, else fp32, as bf16 is far slower on most CPUs"),
    ("--compile", bool, None, "torch.compile the network; None: only on one CUDA GPU"),
    # Output
    ("--out", file_path, None, "folder of log and checkpoint"),
    ("--resume", bool, False, "continue the run in --out; begin it if there is none"),
    ("--overwrite", bool, False, "replace the run in --out"),
    ("--save-views", file_path, None, "PNG to draw: eight images and their views"),
    # Monitor
    ("--knn-every", COUNT, None,
     "measure the kNN every so many epochs, before training and at the end; None: a "
     "fortieth of --epochs"),
    ("--knn-k", COUNT, 200, "neighbours [MoCo CIFAR demo]"),
    ("--knn-tau", RATE, 0.1, "temperature of a neighbour's vote [MoCo CIFAR demo]"),
]


def add_flags(parser, flags):
    """Add flags to a parser: (name, type or choices, default, meaning) of each."""
    for name, kind, default, meaning in flags:
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(name, default=default, help=meaning, **how)


def parse_args(argv=None, method=METHOD):
    """Read the flags, check them without data; on an error exit with one line."""
    parser = argparse.ArgumentParser(
        description=f"Train {method}. The file itself explains the method.",
        usage="%(prog)s [flags]", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = fail
    add_flags(parser, FLAGS)
    add_recipe(parser)
    parser.set_defaults(method=method, out=f"runs/{method}")
    args = parser.parse_args(argv)
    world = processes()[1]
    if args.batch_size % world or args.batch_size < 2 * world:
        fail(f"--batch-size must divide evenly over {world} processes, at least 2 for each")
    check_recipe(args)
    return args


# =================== 9. Devices, processes and run files (shared) ===================
SAVE_PAUSE = 20  # the next save waits 20 times as long as the last one took
# Flags that may differ when a run is continued; all others must be the same.
MAY_CHANGE = (
    "data_dir", "cache_dir", "max_pixels", "workers", "init", "device", "compile", "out",
    "resume", "overwrite", "save_views", "knn_every", "knn_k", "knn_tau")


def processes():
    """Rank, number of processes, local rank: from torchrun, or 0, 1, 0 without it."""
    def variable(name, default):
        return int(os.environ.get(name) or default)

    local_rank = variable("LOCAL_RANK", 0)
    if dist.is_initialized():  # perhaps by another launcher
        return dist.get_rank(), dist.get_world_size(), local_rank
    rank, world = variable("RANK", 0), variable("WORLD_SIZE", 1)
    if rank >= world or world < variable("SLURM_STEP_NUM_TASKS", 1):
        fail("several processes must be started with torchrun, not by hand or by srun")
    return rank, world, local_rank


def start_process(name):
    """The device of that name, "auto" for the best; torchrun's processes connect here."""
    rank, world, local_rank = processes()
    best = torch.accelerator.current_accelerator(check_available=True)
    device = best or torch.device("cpu")
    if name != "auto":
        device = torch.device(name)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(local_rank)
            torch.backends.cudnn.benchmark = True  # find each shape's fastest kernel
        torch.zeros(1, device=device)  # fails if there is no such device
        if world > 1:  # a long timeout, for the others wait while one decodes
            dist.init_process_group(timeout=timedelta(days=1))
    except (AssertionError, RuntimeError, ValueError) as problem:
        raise UserError(f"--device {name}, process {rank} of {world}: {problem!s:.300}")
    return device


def wrap(model, compiled, device):
    """The model as training calls it: spread over the processes, and compiled.

    compiled: whether to compile; None is yes on one CUDA GPU
    """
    network, several = model, dist.is_initialized()
    if several:
        if model.sync_bn and device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # in place
        network = nn.parallel.DistributedDataParallel(model)
    if compiled is None:
        compiled = device.type == "cuda" and not several
    if compiled:
        network = torch.compile(network, mode="reduce-overhead")  # with CUDA graphs
    return network


def gather(x):
    """Rows x (N, ...) of all processes, in the order of their ranks, with gradient.

    Every process computes the loss of all rows. Only its own rows have a gradient there.
    It is multiplied by the number of processes, because DistributedDataParallel divides
    by it.
    """
    if not dist.is_initialized():
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach())
    parts[dist.get_rank()] = x.detach() + len(parts) * (x - x.detach())  # equal to x
    return torch.cat(parts)


def restore(args, header, model, optimizer):
    """Continue the run in --out (--resume), or begin one, with --init's weights if given.

    Returns the record of the epoch that was saved, {} for a run that begins.
    Raises UserError if the saved run had other settings or data.
    """
    path = Path(args.out, "checkpoint.pt")
    if not (args.resume and path.exists()):
        if args.init:
            begin_with(model, args.init)
        return {}
    _, saved, _ = load_weights(path)
    theirs = {**saved["args"], **saved.get("data", {})}
    if "warmup_epochs" in theirs:  # checkpoints of earlier versions
        theirs["warmup"] = theirs["warmup_epochs"] / theirs["epochs"]
    changed = [f"{name} was {theirs[name]} and is {value}"
               for name, value in {**header["args"], **header["data"]}.items()
               if name not in MAY_CHANGE and theirs.get(name, value) != value]
    if changed:
        raise UserError(
            f"{path} was made with other settings: {', '.join(changed)}; give those, or "
            f"begin a new run with its weights: --init {path} and another --out")
    model.load_state_dict(saved["model"])
    # Only the momentum buffers: learning rate and other settings come from this run.
    optimizer.load_state_dict(
        {**optimizer.state_dict(), "state": saved["optimizer"]["state"]})
    return saved["record"]


def begin_with(model, path):
    """Load all tensors of a checkpoint that fit the model; say which others are new."""
    weights, saved, _ = load_weights(path)
    fill_backbone(model.f, weights)  # raises UserError if it is another network
    theirs = {f"{f}.{name}": x for name, x in weights.items() for f in ("f", "f_k")}
    theirs |= saved.get("model", {})
    fitting = {name: theirs[name] for name, x in model.state_dict().items()
               if name in theirs and theirs[name].shape == x.shape}
    new = model.load_state_dict(fitting, strict=False).missing_keys
    say(f"loaded {path}; new, because missing there or of another shape: {new}")


def kept_lines(path, record):
    """Lines of the log up to the saved epoch; UserError if log or checkpoint is lost."""
    lines, last, saved = [], 0, record.get("epoch", -1)
    for line in path.read_text().splitlines():
        with suppress(Exception):  # a line that a kill has cut, or that is no record
            epoch = json.loads(line).get("epoch", 0)
            last = max(last, epoch)
            if epoch <= saved:
                lines.append(line)
    # A kill during the first save leaves epoch 1 in the log and no checkpoint.
    if last > 1 and not record or last < saved:
        raise UserError(
            f"{path} and the checkpoint.pt beside it do not match, or one is missing: bring "
            "the right file back, or replace both by --overwrite")
    return lines


def describe(args, data):
    """The header of the log: what is trained, on what, where, and by which code."""
    name, commit = data.mean.device.type, None
    if name == "cuda":
        name = torch.cuda.get_device_name()
    with suppress(OSError):  # there is no git
        command = ["git", "-C", Path(resnet.__code__.co_filename).parent,  # of common.py
                   "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    about = {"images": len(data.train_images), "pixels": data.train_images.shape[3],
             "mean": f"{data.mean.cpu()}"}
    return {"args": vars(args), "data": about, "commit": commit,
            "torch": f"{torch.__version__}",
            "device": f"{processes()[1]} x {name}, {torch.get_num_threads()} threads"}


def open_log(args, header, record):
    """Open and lock the log, keep its lines up to the saved epoch, add a header."""
    path = Path(args.out, "log.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    lines = [] if args.overwrite else kept_lines(path, record)
    log = open(path, "r+")
    try:
        if fcntl:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.close()
        raise UserError(f"{path} is locked, by another run: choose another --out")
    except OSError:
        pass  # some network file systems have no locks
    if not record:  # else --resume after an early kill would continue the old run
        path.with_name("checkpoint.pt").unlink(missing_ok=True)
    # Written over the old text, which is cut last: a full disk loses no kept line.
    print(*lines, json.dumps(header), sep="\n", file=log, flush=True)
    log.truncate()
    say(f"{args.method}: {args.arch} on {header['device']}; {header['data']}\n"
        f"epoch {record.get('epoch', 0)} of {args.epochs}, kNN with k = "
        f"{min(args.knn_k, header['data']['images'])}, to {args.out}")
    return log


def write_record(log, record, args, begin):
    """Add the minutes since the run began to an epoch's record; log and print it."""
    record["minutes"] = (time.perf_counter() - begin) / 60
    if log is None:
        return
    print(json.dumps(record), file=log, flush=True)
    line = " ".join(f"{name}={value:.4g}" for name, value in record.items())
    if record["epoch"] > 0:
        line += f" left={record['minutes'] * (args.epochs / record['epoch'] - 1):.0f}min"
    if record.get("std", 1) < 0.1:
        line += " warning: the outputs have collapsed (std < 0.1)"
    say(line)


def save_checkpoint(path, state):
    """Save a run; return when the next save is due, by time.perf_counter.

    The checkpoint is serialised in memory, written to a temporary file and renamed, so
    that it is whole or absent at any moment. Exits with a one-line error if the disk is
    full.
    """
    start = time.perf_counter()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(buffer.getbuffer())
    except OSError as problem:
        fail(f"cannot write {temporary}, make room, then --resume: {problem}")
    temporary.replace(path)
    end = time.perf_counter()
    return end + SAVE_PAUSE * (end - start)


def draw_views(args, data):
    """Draw the first eight images and their views, as columns of a picture."""
    images = data.train_images[:8]
    columns = [F.interpolate(column, images.shape[2:])
               for column in (images / 255, *augment(images, args))]
    rows = torch.stack(columns, 1).flatten(0, 1)
    save_image(rows, args.save_views, "png", nrow=len(columns))


def main(argv=None, method=METHOD):
    """Train as the flags say; return the last epoch's record. User errors are one line.

    method: the name in the log and of the folder in runs/
    """
    begin = time.perf_counter()
    args = parse_args(argv, method)
    run = [x for x in ("checkpoint.pt", "log.jsonl") if Path(args.out, x).exists()]
    if run and args.resume == args.overwrite:
        fail(f"{args.out} holds a run: either --resume or --overwrite it")
    try:
        device = start_process(args.device)
        _, world, local_rank = processes()
        if local_rank:  # a machine's first process, 0, downloads or decodes for all
            dist.barrier()
        data = load_dataset(args.dataset, args.data_dir, args.image_size, args.cache_dir,
                            device, args.skip_broken, args.max_pixels)
        if world > 1 and local_rank == 0:
            dist.barrier()
        check_recipe(args, len(data.train_images))
        if args.save_views:
            draw_views(args, data)
        record = train(args, data, begin)
    except (OSError, UserError) as problem:
        fail(problem)
    except (MemoryError, RuntimeError) as problem:
        if "memory" not in repr(problem).lower():
            raise
        fail(f"out of memory, try a smaller batch, network or image size: {problem!r:.300}", 1)
    if dist.is_initialized():
        dist.destroy_process_group()
    say(f"wrote {args.out}; next: python linear_eval.py {args.out}")
    return record


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    main()
