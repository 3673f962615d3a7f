"""MoCo. CIFAR-10, 200 epochs: not measured yet, published 85.3 % kNN.

Reference implementation, made to be read from top to bottom, diffed and copied (with common.py), of
"Momentum Contrast for Unsupervised Visual Representation Learning", He et al., CVPR 2020,
arXiv 1911.05722, with the MLP head of MoCo v2, arXiv 2003.04297 (v1's: --proj-layers 1).

    python moco.py --epochs 200 --batch-size 512

A view's query must find the key of the image's other view among the keys of earlier batches. Keys
come from a slow copy of the network, an exponential moving average, so that old keys stay valid.

    x1, x2   (B, 3, H, W)  two random views of a batch of B images
    f, g     query side    f(x) is what is kept, (B, 512) for ResNet-18; q = g(f(x)), (B, 128)
    f_k, g_k key side      k = g_k(f_k(x)), (B, 128), a constant
    queue    (K, 128)      the last K unit keys, the negatives
    tau, m   scalars       temperature of the softmax; share of theta_k that every average keeps
    l(q, k)  = -log( exp(q . k / tau) / (exp(q . k / tau) + sum_i exp(q . queue_i / tau)) )   (1)
    theta_k  = m theta_k + (1 - m) theta_q, the parameters of either side, after every step   (2)
    L        = l(q1, k2) + l(q2, k1), or l(q1, k2) with --no-symmetric; |q| = |k| = 1

Differences from the paper:
- Views are made in batches on the device. Every image has its own parameters, but the order of the
  four colour operations is drawn once a batch of views: each of them is one pass over the batch.
- The learning rate moves every step, not every epoch: the same cosine without its stairs.
- The recipe is the authors' for CIFAR-10 (their Colab notebook), but for the head, linear there:
  the symmetric loss, a sum, whose keys enter the queue together after both losses; ShuffleBN on
  one GPU by 8 splits of each batch.
- The defaults are CIFAR's at any size; for ImageNet v2 has crops from 0.2, tau 0.2, m 0.999, decay
  1e-4 and K 65536. A folder's crops are cut from images already resized to --image-size.
"""

# =================== 1. Imports (shared) ===================
import argparse
import importlib.util
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.utils import save_image

from common import (ARCHS, DATASETS, batches, load_dataset, locked, normalize, resident,
                    resnet)


# =================== 2. Recipe (method) ===================
def add_recipe(parser):
    """The numbers that define the experiment, each with its source."""
    add = parser.add_argument_group("recipe").add_argument
    add("--lr", type=number(float, 1e-8, 1e3), default=0.03,
        help="learning rate at batch 256, scaled linearly with the batch [MoCo CIFAR demo]")
    add("--weight-decay", type=number(float, 0, 1), default=5e-4,
        help="of all parameters [MoCo CIFAR demo]")
    add("--sgd-momentum", type=number(float, 0, 1), default=0.9, help="[MoCo CIFAR demo]")
    add("--warmup-epochs", type=number(int, 0, 10**6), default=0, help="linear [MoCo CIFAR demo]")
    add("--tau", type=number(float, 1e-3, 1e3), default=0.1, help="temperature [MoCo CIFAR demo]")
    add("--m", type=number(float, 0, 1), default=0.99,
        help="the keys' moving average keeps this share a step [MoCo CIFAR demo]")
    add("--queue", type=number(int, 1, 10**9), default=4096,
        help="keys K in the queue [MoCo CIFAR demo]")
    add("--proj-layers", type=number(int, 1, 10), default=2,
        help="layers of the head: 1 is v1's, 2 v2's [MoCo v2 Sec. 3]")
    add("--symmetric", action=argparse.BooleanOptionalAction, default=True,
        help="each view is query once: double cost a step, better [MoCo CIFAR demo]")
    add("--bn-splits", type=number(int, 1, 10**6), default=8,
        help="parts of a batch with batch statistics of their own [MoCo CIFAR demo]")


# =================== 3. Options (shared) ===================
def fail(message, status=2):
    """End the program with one line on standard error."""
    sys.stderr.write(f"error: {' '.join(str(message).split())}\n")  # whole, beside other processes
    raise SystemExit(status)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that ends wrong input with one line."""

    def error(self, message):
        fail(message)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of every flag that has one; N is a number, all other values are paths."""

    def _get_help_string(self, action):
        unset = action.default is None or action.default is False
        return action.help if unset else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        return "N" if action.type else "PATH"


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
    """Read the flags; make all checks that need no data; end wrong ones in one line, status 2."""
    parser = Parser(description=__doc__.split("\n")[0], usage="%(prog)s [flags]",
                    formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="cifar10",
        help="folder: any images; shapes: drawn, needs no files")
    add("--data-dir", default="data", help="where it lies or is downloaded to")
    add("--cache-dir", help="where a folder's decoded images are kept (default: in --data-dir)")
    add("--image-size", type=number(int, 8, 4096), help="pixels (default: 32; folder: 224)")
    add("--workers", type=number(int, 1, 1024), default=min(8, os.cpu_count() or 1),
        help="threads that gather training images that do not fit on the device")
    add = parser.add_argument_group("network").add_argument
    add("--arch", choices=ARCHS, default="resnet18", help="backbone")
    # Below 16 channels torch 2.11 to 2.15 corrupts memory on CPUs (channels_last, 1x1, stride 2).
    add("--width", type=number(float, 0.25, 16), default=1.0, help="times every channel count")
    add("--stem", choices=("auto", "cifar", "imagenet"), default="auto",
        help="auto: cifar (3x3, no max-pool) up to 64 pixels")
    add = parser.add_argument_group("run").add_argument
    add("--epochs", type=number(int, 1, 10**6), default=200, help="passes over the images")
    add("--batch-size", type=number(int, 2, 10**6), default=512, help="images a step")
    add("--seed", type=number(int, 0, 10**9), default=0, help="of all random numbers")
    add("--device", choices=("auto", "cuda", "cpu", "mps"), default="auto", help="auto: the best")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto",
        help="auto: bf16 on CUDA, else fp32; there fp32 has convolutions in TF32")
    add("--compile", action=argparse.BooleanOptionalAction,
        help="torch.compile the network (default: on CUDA without SyncBatchNorm)")
    add = parser.add_argument_group("output").add_argument
    add("--out", default=f"runs/{Path(__file__).stem}", help="folder of log.jsonl, checkpoint.pt")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--save-views", metavar="PNG", help="draw eight images and their views, then train")
    add("--tensorboard", action="store_true", help="write the curves to --out too")
    add = parser.add_argument_group("monitor").add_argument
    add("--knn-every", type=number(int, 1, 10**6), default=5,
        help="epochs between two kNN accuracies; the first and the last are always measured")
    add("--knn-k", type=number(int, 1, 10**6), default=200, help="neighbours [MoCo CIFAR demo]")
    add("--knn-tau", type=number(float, 1e-3, 1e3), default=0.1,
        help="temperature of a neighbour's vote [MoCo CIFAR demo]")
    add_recipe(parser)
    args = parser.parse_args(argv)
    if args.warmup_epochs >= args.epochs:
        fail(f"--warmup-epochs {args.warmup_epochs} leaves nothing of --epochs {args.epochs}")
    if args.resume and args.overwrite:
        fail("--resume and --overwrite exclude each other")
    if args.device in ("cuda", "mps") and not getattr(torch, args.device).is_available():
        fail(f"--device {args.device}: this machine has none; use --device auto or cpu")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        fail("--tensorboard needs a package: pip install tensorboard")
    if args.batch_size % processes()[1] or args.batch_size < 2 * processes()[1]:
        fail(f"--batch-size {args.batch_size} cannot be split over {processes()[1]} processes: "
             "each needs the same number of images, at least 2")
    return args


def processes():
    """This process's rank, how many there are, and its rank on this machine, from torchrun."""
    return (int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)),
            int(os.environ.get("LOCAL_RANK", 0)))


class Gather(torch.autograd.Function):
    """Join the rows of all processes; a row's gradient is the sum of what all made of it."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """Tensors x (N, ...) of all processes as one, in the order of their ranks, with gradient."""
    return Gather.apply(x.contiguous()) if dist.is_initialized() else x


# =================== 4. Augmentation: operations (shared) ===================
def unit_range(x):
    """uint8 (N, 3, H, W) to float32 in [0, 1]; ValueError for what colour jitter cannot work on."""
    if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[1] != 3:
        raise ValueError(f"colour jitter and grey need uint8 images (N, 3, H, W), not {x.dtype} "
                         f"{tuple(x.shape)}")
    return x.float() / 255


def crop_resize(x, boxes, size):
    """Cut a box from each image and resize it, as torchvision's resized_crop(antialias=False).

    x: (N, 3, H, W); boxes: (N, 4) top, left, height, width in pixels
    Returns (N, 3, size, size) float32. Each axis is a product with a matrix whose row i holds the
    weights 1 - |at_i - j| of the two pixels j around the point at_i, which stays inside the box.
    """
    def weights(start, length, pixels):
        at = (torch.arange(size, device=x.device) + 0.5) * (length / size)[:, None] - 0.5
        at = torch.minimum(at.clamp_(min=0), length[:, None] - 1) + start[:, None]
        distance = (at[:, :, None] - torch.arange(pixels, device=x.device)).abs_()
        return distance.neg_().add_(1).clamp_(min=0)  # (N, size, pixels)

    top, left, height, width = boxes.float().unbind(1)
    rows, columns = weights(top, height, x.shape[2]), weights(left, width, x.shape[3])
    with torch.autocast(x.device.type, enabled=False):  # bf16 has fewer bits than the pixels
        return rows[:, None] @ x.float() @ columns[:, None].mT


def random_resized_crop(x, size, scale, ratio=(3 / 4, 4 / 3), generator=None):
    """Crop a random box of each image, as RandomResizedCrop does: ten tries, then the centre.

    x: (N, 3, H, W); scale: the box's share of the area; ratio: width / height
    Returns (N, 3, size, size) float32.
    """
    n, _, h, w = x.shape
    u = torch.rand(4, n, 10, generator=generator, device=x.device)
    area = h * w * (scale[0] + (scale[1] - scale[0]) * u[0])
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** u[1]  # log-uniform
    width, height = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # (N, 10)
    fits = (width > 0) & (width <= w) & (height > 0) & (height <= h)
    missed, first = ~fits.any(1), fits.int().argmax(1, keepdim=True)
    # The fallback is the largest centred box whose ratio is allowed.
    width = width.gather(1, first)[:, 0].where(~missed, min(w, round(h * ratio[1])))
    height = height.gather(1, first)[:, 0].where(~missed, min(h, round(w / ratio[0])))
    spare = torch.stack([h - height, w - width])  # (2, N) pixels above and left of the lowest box
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
    """Turn each image's hue by its factor (N,) in [-0.5, 0.5] of a full circle; grey stays grey."""
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
    """With probability p an image, torchvision's ColorJitter with factors of the image's own.

    The order of the four operations is drawn once a batch, not once an image.
    """
    jitter = torch.rand(len(x), generator=generator, device=x.device) < p

    def draw(centre, strength):
        u = torch.rand(len(x), generator=generator, device=x.device)
        low = max(0, centre - strength) if centre else -strength
        return (low + (centre + strength - low) * u).where(jitter, centre)  # the centre: no change

    steps = [(adjust_brightness, draw(1, brightness)), (adjust_contrast, draw(1, contrast)),
             (adjust_saturation, draw(1, saturation)), (adjust_hue, draw(0, hue))]
    # On the host: asking a GPU for the order would make the host wait for it.
    order = torch.randperm(4, generator=generator if x.device.type == "cpu" else None)
    for i in order.tolist():
        operation, factor = steps[i]
        x = operation(x, factor)
    return x


def random_grayscale(x, p, generator=None):
    """Replace each image by its luma with probability p."""
    gray = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < p
    return torch.where(gray, grayscale(x), x)


def gaussian_blur(x, sigma):
    """Blur each image by its sigma (N,) pixels; kernel: a tenth of the side [SimCLR App. A]."""
    n, c, h, w = x.shape
    half = max(1, min(h, w) // 20)
    at = torch.arange(-half, half + 1, device=x.device)
    kernel = torch.softmax(-0.5 * (at / sigma[:, None]).square(), 1)  # (N, 2 half + 1), sums to 1
    kernel = kernel.repeat_interleave(c, 0)[:, None, None]
    x = F.pad(x, (half, half, half, half), mode="reflect").flatten(0, 1)[None]  # (1, 3N, ., .)
    with torch.autocast(x.device.type, enabled=False):
        x = F.conv2d(F.conv2d(x, kernel, groups=n * c), kernel.mT, groups=n * c)
    return x.view(n, c, h, w)


def random_blur(x, p, generator=None):
    """Blur each image with probability p, sigma uniform in 0.1-2 pixels [SimCLR App. A]."""
    sigma = 0.1 + 1.9 * torch.rand(len(x), generator=generator, device=x.device)
    blur = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < p
    return torch.where(blur, gaussian_blur(x, sigma), x)


# =================== 4. Augmentation: policy (method) ===================
def augment(x, args, generator=None):
    """Two views of every image, without blur on small images [MoCo CIFAR demo].

    x: (N, 3, H, W) uint8; returns [x1, x2], each (N, 3, W, W) float32 in [0, 1]
    """
    x = unit_range(x)
    views = []
    for _ in range(2):
        view = random_resized_crop(x, x.shape[3], (0.08, 1.0), generator=generator)
        view = random_flip(view, generator)
        view = color_jitter(view, 0.4, 0.4, 0.4, 0.1, 0.8, generator)
        view = random_grayscale(view, 0.2, generator)
        views.append(random_blur(view, 0.5, generator) if x.shape[3] > 64 else view)
    return views


# =================== 5. Loss (method) ===================
def info_nce(q, k, queue, tau):
    """InfoNCE, Eq. 1: the query's key against the queue's, mean over the batch, in nats.

    q, k: (B, D) queries and their keys, normalised here; queue: (K, D) unit keys; float32 inside
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = F.normalize(q.float(), dim=1), F.normalize(k.detach().float(), dim=1)
        positive = (q * k).sum(1, keepdim=True)  # (B, 1)
        logits = torch.cat([positive, q @ queue.float().T], 1) / tau  # (B, 1 + K)
        # Class 0 is the right one: the positive stands first in every row.
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def chance_loss(args):
    """The loss of a network that cannot tell images apart: log(K + 1), twice if symmetric."""
    return math.log(args.queue + 1) * (1 + args.symmetric)


@torch.no_grad()
def momentum_update(f, f_k, m):
    """theta_k = m theta_k + (1 - m) theta_q, Eq. 2, in place, for all parameters of f_k."""
    for p, p_k in zip(f.parameters(), f_k.parameters(), strict=True):
        p_k.mul_(m).add_(p, alpha=1 - m)


@torch.no_grad()
def enqueue(queue, ptr, k):
    """Overwrite the oldest rows of queue (K, D) with keys k (N, D), normalised here, in place.

    ptr: the oldest row's index, an int or a tensor; returns the new one. Any N and K go together.
    """
    new = F.normalize(k.float(), dim=1)[-len(queue):]
    row = ptr + len(k) - len(new) + torch.arange(len(new), device=queue.device)
    queue.index_copy_(0, row % len(queue), new)
    return (ptr + len(k)) % len(queue)


# =================== 6. Model (method) ===================
class SplitBatchNorm2d(nn.BatchNorm2d):
    """As norm, but each of `splits` parts (images i, i + splits, ...) alone [MoCo CIFAR demo]."""

    def __init__(self, norm, splits):
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.load_state_dict(norm.state_dict())
        self.splits = splits

    def forward(self, x):
        """(B, C, H, W) to the same; in training ValueError unless B is a multiple of splits."""
        if not self.training:
            return super().forward(x)
        c, s = self.num_features, self.splits
        if len(x) % s:
            raise ValueError(f"a batch of {len(x)} images has no {s} equal parts (--bn-splits)")
        mean, var = self.running_mean.repeat(s), self.running_var.repeat(s)
        parts = x.reshape(-1, c * s, *x.shape[2:])  # a part's channels are channels of their own
        parts = F.batch_norm(parts, mean, var, self.weight.repeat(s), self.bias.repeat(s),
                             True, self.momentum, self.eps)
        self.running_mean.copy_(mean.view(s, c).mean(0))
        self.running_var.copy_(var.view(s, c).mean(0))
        return parts.view(x.shape).contiguous(memory_format=torch.channels_last)


class Model(nn.Module):
    """The query side f, g, the key side f_k, g_k and the queue of Algorithm 1.

    base_encoder() makes a backbone that has `num_features`; ValueError if a batch cannot be split.
    """

    sync_bn = False  # the statistics of one batch would give the answer away [MoCo Sec. 3.3]

    def __init__(self, base_encoder, args):
        super().__init__()
        world = processes()[1]
        self.splits, batch = max(1, args.bn_splits // world), args.batch_size // world
        if batch % self.splits or batch == self.splits:
            raise ValueError(f"--bn-splits {args.bn_splits} must divide --batch-size "
                             f"{args.batch_size} into parts of at least 2 images")
        self.symmetric = args.symmetric
        self.f, self.g = self.encoder(base_encoder, args)
        self.f_k, self.g_k = self.encoder(base_encoder, args)
        for ours, keys in ((self.f, self.f_k), (self.g, self.g_k)):
            keys.load_state_dict(ours.state_dict())
            keys.requires_grad_(False)  # no gradient, only Eq. 2
        self.register_buffer("queue", F.normalize(torch.randn(args.queue, 128), dim=1))
        self.register_buffer("ptr", torch.zeros((), dtype=torch.long))

    def encoder(self, base_encoder, args):
        """A backbone with split batch norm and its head of 512-128 [MoCo v2], or linear [v1]."""
        f = base_encoder()
        for name, module in [*f.named_modules()] if self.splits > 1 else ():
            if isinstance(module, nn.BatchNorm2d):
                f.set_submodule(name, SplitBatchNorm2d(module, self.splits))
        widths = [*[f.num_features] * args.proj_layers, 128]
        layers = []
        for fan_in, fan_out in zip(widths, widths[1:]):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        return f, nn.Sequential(*layers[:-1])  # the last layer is linear

    @torch.no_grad()
    def key(self, x):
        """Constant keys, computed in an order drawn over all processes: ShuffleBN, Sec. 3.3."""
        views, rank = gather(x), 0
        order = torch.rand(len(views), device=x.device).argsort()  # torch 2.11 compiles no randperm
        if dist.is_initialized():
            dist.broadcast(order, 0)
            rank = dist.get_rank()
        ours = slice(rank * len(x), (rank + 1) * len(x))
        x = views[order[ours]].contiguous(memory_format=torch.channels_last)
        return gather(self.g_k(self.f_k(x)))[order.argsort()[ours]]

    def forward(self, x1, x2):
        """Views (B, 3, H, W) to pairs of a query and its key, (B, 128) each: two if symmetric."""
        pairs = [(x1, x2), (x2, x1)] if self.symmetric else [(x1, x2)]
        return [(self.g(self.f(x)), self.key(other)) for x, other in pairs]


# =================== 7. kNN monitor (shared) ===================
@torch.no_grad()
def features(f, images, mean, std, batch_size, autocast, rank=0, world=1):
    """The frozen backbone's output, in evaluation mode: (N, 3, H, W) uint8 to (N, D) float32.

    With more processes, of every world-th image from rank on, the last one again to fill up.
    """
    training, out = f.training, []
    share = torch.arange(rank, -(-len(images) // world) * world, world).clamp(max=len(images) - 1)
    f.eval()
    for x in batches(images, share, batch_size, mean.device):
        with autocast():
            out.append(f(normalize(x, mean, std)).float())
    f.train(training)
    return torch.cat(out)


def knn_accuracy(bank, bank_labels, queries, labels, num_classes, k=200, tau=0.1):
    """Percent of queries whose k nearest of the bank elect the right class, Wu et al. 1805.01978.

    bank: (N, D), queries: (M, D), normalised here; labels (N,) and (M,) int64
    Each neighbour votes exp(cosine / tau); a tie goes to the lower class; k is at most N.
    """
    bank, k = F.normalize(bank.float(), dim=1).T, min(k, len(bank))
    right, chunk = 0, max(1, 2**25 // bank.shape[1])  # 128 MiB of similarities at a time
    for query, label in zip(queries.split(chunk), labels.split(chunk)):
        cosine, index = (F.normalize(query.float(), dim=1) @ bank).topk(k, dim=1)  # (chunk, k)
        votes = bank.new_zeros(len(query), num_classes)
        vote = ((cosine - cosine[:, :1]) / tau).exp()  # the nearest votes 1: no over- or underflow
        votes.scatter_add_(1, bank_labels[index], vote)
        right = right + (votes.argmax(1) == label).sum()
    return 100 * right.item() / len(queries)


def feature_std(z):
    """Mean per-channel std of l2-normalised z (B, D) times sqrt(D): 1 healthy, 0 collapsed."""
    return F.normalize(z.detach().float(), dim=1).std(0).mean() * z.shape[1] ** 0.5


# =================== 8. Training (shared, with fences) ===================
def learning_rate(step, total_steps, base, warmup_steps=0):
    """Half a cosine from base towards 0 after a linear warmup; step counts from 0."""
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    share = (step - warmup_steps) / (total_steps - warmup_steps)
    return base * 0.5 * (1 + math.cos(math.pi * share))


def save_views(path, images, views):
    """Draw a row an image: the image, then its views, each at the image's size."""
    columns = [F.interpolate(x.float(), images.shape[2:]) for x in (images / 255, *views)]
    save_image(torch.stack(columns, 1).flatten(0, 1), path, nrow=len(columns))


def load_checkpoint(path, args):
    """Read a checkpoint made with these settings, or end with one line that lists what differs."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        theirs = {"method": saved["method"], **saved["args"]}
    except FileNotFoundError:
        fail(f"nothing to resume: there is no {path}")
    except Exception as problem:  # a damaged file raises whatever the unpickler meets
        fail(f"{path} is not a checkpoint of this script ({type(problem).__name__})")
    free = ("data_dir", "cache_dir", "workers", "device", "compile", "out", "resume", "overwrite",
            "save_views", "tensorboard", "knn_every", "knn_k", "knn_tau")  # may change within a run
    ours = {"method": Path(__file__).stem, **vars(args)}
    changed = [f"{key} was {theirs.get(key)} and is {value}" for key, value in ours.items()
               if key not in free and theirs.get(key) != value]
    if changed:
        fail(f"{path} was made with other settings: {', '.join(changed)}")
    return saved


def save_checkpoint(path, **state):
    """Write a temporary file, then rename it: a kill at any moment leaves a whole checkpoint."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def commit():
    """The commit of these files, "-dirty" if they were changed since, None outside a checkout."""
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
                              capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git here
        return None


def report(record, log, writer):
    """One epoch: a line here, the same keys in log.jsonl and, if asked for, in tensorboard."""
    print(" ".join(f"{key}={'-' if value is None else format(value, '.4g')}"
                   for key, value in record.items()), flush=True)
    with open(log, "a") as file:
        file.write(json.dumps(record) + "\n")
    for key, value in record.items():
        if writer and value is not None:
            writer.add_scalar(key, value, record["epoch"])


def train(args, stack):
    """Train; log, monitor and save every epoch; return the last epoch's metrics as a dict."""
    rank, world, local_rank = processes()
    device = torch.device(next(kind for kind in ("cuda", "mps", "cpu") if args.device in
                               (kind, "auto") and getattr(torch, kind).is_available()))
    precision = args.precision.replace("auto", "bf16" if device.type == "cuda" else "fp32")
    autocast = partial(torch.autocast, device.type, torch.bfloat16, precision == "bf16")
    size = args.image_size or (224 if args.dataset == "folder" else 32)
    path, log = Path(args.out, "checkpoint.pt"), Path(args.out, "log.jsonl")
    if path.exists() and not (args.resume or args.overwrite):
        fail(f"{args.out} already holds a run: --resume goes on with it, --overwrite replaces it")
    saved = load_checkpoint(path, args) if args.resume else None
    if device.type != "cpu" and local_rank >= getattr(torch, device.type).device_count():
        fail(f"this machine has fewer {device.type} devices than processes")
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # time each shape's convolutions once, keep the best
    torch.manual_seed(args.seed)
    stem = args.stem.replace("auto", "cifar" if size <= 64 else "imagenet")
    try:
        model = Model(partial(resnet, args.arch, args.width, stem), args)
        data = load_dataset(args.dataset, args.data_dir, size, args.cache_dir)
        if world > 1:  # after the data: decoding may outlast the time that processes wait
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except ValueError as problem:
        fail(problem)
    count, steps = len(data.train_images), len(data.train_images) // args.batch_size
    batch = args.batch_size // world  # of this process
    if steps == 0:
        fail(f"--batch-size {args.batch_size} is more than the {count} training images")
    images, test_images = (resident(x, device) for x in (data.train_images, data.test_images))
    mean, std = data.mean.to(device), data.std.to(device)
    model = model.to(device, memory_format=torch.channels_last)
    network = model
    if world > 1:
        if device.type == "cuda" and Model.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        network = nn.parallel.DistributedDataParallel(model)
    # Triton is absent on Windows; SyncBatchNorm breaks the graph; CUDA graphs: not tried with DDP.
    default = (device.type == "cuda" and importlib.util.find_spec("triton")
               and not (world > 1 and Model.sync_bn))
    if default if args.compile is None else args.compile:
        network = torch.compile(network, mode="reduce-overhead" if world == 1 else "default")
    lr = args.lr * args.batch_size / 256  # linear scaling, Goyal et al. 1706.02677
    # <method>
    if args.queue > count - args.batch_size:
        fail(f"--queue {args.queue} is more than the {count - args.batch_size} images outside a "
             "batch: images would be their own negatives")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr, args.sgd_momentum, weight_decay=args.weight_decay,
                                fused=device.type == "cuda")
    # </method>
    lines = [json.dumps({
        "args": vars(args), "lr": lr, "images": count, "test_images": len(test_images),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "chance_loss": chance_loss(args),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "processes": world, "precision": precision, "torch": torch.__version__,
        "commit": commit()}) + "\n"]
    try:
        if args.save_views and rank == 0:
            shown = data.train_images[::max(1, count // 8)][:8]  # of several classes
            save_views(args.save_views, shown, augment(shown, args))
        log.parent.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            stack.enter_context(locked(log.parent / ".lock", wait=False))
        if saved:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            for group in optimizer.param_groups:
                if "fused" in group:  # saved on another device, perhaps
                    group["fused"] = device.type == "cuda"
            lines = log.read_text().splitlines(keepends=True)[:saved["epoch"] + 2]  # from epoch 0
        if rank == 0:
            if not saved:
                path.unlink(missing_ok=True)  # a kill before epoch 0 must not leave a replaced run
            log.with_suffix(".tmp").write_text("".join(lines))
            os.replace(log.with_suffix(".tmp"), log)
    except BlockingIOError:
        fail(f"another run writes to {args.out}: choose another --out")
    except (OSError, ValueError) as problem:
        fail(problem)
    record = json.loads(lines[-1])  # what a finished run returns when it is resumed
    if rank == 0:
        print(lines[0], end="", flush=True)
    if data.train_labels is None and rank == 0:
        print("kNN is off: labels need train/ and test/ or val/, with a folder a class", flush=True)
    first = saved["epoch"] + 1 if saved else 0
    writer, collapsed = None, 0  # epochs in a row with a collapsed output
    if args.tensorboard and rank == 0:
        from torch.utils.tensorboard import SummaryWriter
        writer = stack.enter_context(SummaryWriter(args.out, purge_step=first))

    for epoch in range(first, args.epochs + 1):
        seed = args.seed * 10**6 + epoch  # so --resume draws what a whole run draws
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        order = order[:steps * args.batch_size if epoch else 0]  # 0: untrained
        share = order.view(-1, world, batch)[:, rank].flatten()
        torch.manual_seed(seed + rank * 10**16)  # no two processes draw the same views
        losses, stds = torch.zeros(2, steps, device=device)
        start, shown, rate = time.perf_counter(), 0.0, None
        model.train()
        for step, x in enumerate(batches(images, share, batch, device, args.workers)):
            rate = learning_rate((epoch - 1) * steps + step, args.epochs * steps, lr,
                                 args.warmup_epochs * steps)
            for group in optimizer.param_groups:
                group["lr"] = group.get("fixed_lr", rate)
            optimizer.zero_grad()
            views = [normalize(view, mean, std) for view in augment(x, args)]
            # <method>
            with autocast():
                pairs = network(*views)
            loss = sum(info_nce(q, k, model.queue, args.tau) for q, k in pairs)  # Eq. 1
            z = pairs[0][0]
            # </method>
            loss.backward()
            optimizer.step()
            # <method>
            momentum_update(model.f, model.f_k, args.m)  # Eq. 2 and Alg. 1
            momentum_update(model.g, model.g_k, args.m)
            keys = gather(torch.cat([k for _, k in pairs]))  # of all processes: one queue
            model.ptr.copy_(enqueue(model.queue, model.ptr, keys))
            # </method>
            losses[step], stds[step] = loss.detach(), feature_std(z)
            if rank == 0 and sys.stderr.isatty() and time.perf_counter() - shown > 0.5:
                shown = time.perf_counter()
                print(f"epoch {epoch} step {step + 1}/{steps}", end="\r", file=sys.stderr)
        if world > 1:
            for value in (losses, stds):
                dist.all_reduce(value.div_(world))
            for value in model.buffers():  # running statistics: where they are each process's own
                dist.broadcast(value, 0)
        losses = losses.cpu()  # the epoch's one wait for the device
        seconds = time.perf_counter() - start
        if not losses.isfinite().all():
            step = int((~losses.isfinite()).int().argmax())
            fail(f"the loss is {losses[step]} at epoch {epoch}, step {step + 1} of {steps}: try a "
                 f"lower --lr; {path} holds epoch {epoch - 1}", status=1)
        start, knn = time.perf_counter(), None
        if data.test_labels is not None and (epoch % args.knn_every == 0 or epoch == args.epochs):
            shares = (features(model.f, x, mean, std, batch, autocast, rank, world)
                      for x in (images, test_images))
            bank, queries = (gather(x).view(world, *x.shape).transpose(0, 1).flatten(0, 1)
                             for x in shares)
            bank, queries = bank[:count], queries[:len(test_images)]
            knn = knn_accuracy(bank, data.train_labels.to(device),
                               queries, data.test_labels.to(device),
                               len(data.classes), args.knn_k, args.knn_tau)
        record = {"epoch": epoch, "loss": losses.mean().item() if epoch else None,
                  "std": stds.mean().item() if epoch else None, "lr": rate, "knn": knn,
                  "views_s": len(order) * len(views) / seconds if epoch else None,
                  "seconds": seconds, "knn_seconds": time.perf_counter() - start}
        # After a batch norm no output is constant: one odd image in B leaves std 2 / sqrt(B). MoCo,
        # which has none there, is healthy at 0.12 and rising [ours, measured on shapes].
        low = 0.1 if isinstance(model.g[-1], nn.Linear) else min(0.1 + 2 / batch ** 0.5, 0.4)
        collapsed = collapsed + 1 if epoch and record["std"] < low else 0
        if rank > 0:
            continue
        if collapsed == 3:
            print(f"warning: collapsed: std {record['std']:.3f}, not about 1", file=sys.stderr)
        try:
            report(record, log, writer)
            save_checkpoint(path, method=Path(__file__).stem, args=vars(args), epoch=epoch,
                            backbone=model.f.state_dict(), model=model.state_dict(),
                            optimizer=optimizer.state_dict(), mean=data.mean, std=data.std)
        except (OSError, RuntimeError) as problem:  # torch.save makes RuntimeErrors of a full disk
            path.with_suffix(".tmp").unlink(missing_ok=True)
            kept = f"{path} holds epoch {epoch - 1}" if epoch else "nothing is saved"
            fail(f"cannot write to {args.out} ({problem}); {kept}: make room, then --resume", 1)
    if world > 1:
        del network  # first: its destructor waits for gloo's thread, that for the GIL (torch 2.11)
        dist.destroy_process_group()
    return record


def interrupt(signum, frame):
    """Stop at SIGTERM as at Ctrl-C."""
    raise KeyboardInterrupt(signum)


def main(argv=None):
    """Train as the flags say, return the last epoch's metrics; end what stops it in one line."""
    args, begun = parse_args(argv), time.time()
    try:
        with ExitStack() as stack:
            return train(args, stack)
    except torch.OutOfMemoryError:
        fail(f"out of GPU memory: try --batch-size {args.batch_size // 2}", status=1)
    except RuntimeError as problem:
        if not type(problem).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        cause = str(getattr(problem, "inner_exception", problem)).partition("\n")[0]
        fail(f"torch.compile cannot ({cause}): go on with --no-compile --resume", status=1)
    except KeyboardInterrupt as stop:
        status = 128 + (stop.args or (signal.SIGINT,))[0]
        if processes()[0] > 0:
            raise SystemExit(status) from None  # the first process says it
        path, kept = Path(args.out, "checkpoint.pt"), "nothing is saved yet"
        if path.exists() and not (args.overwrite and path.stat().st_mtime < begun):
            epoch = torch.load(path, map_location="cpu", weights_only=True)["epoch"]
            flags = [flag for flag in (sys.argv[1:] if argv is None else argv)
                     if flag not in ("--overwrite", "--resume")]
            kept = (f"{path} holds epoch {epoch}, go on with: python {Path(__file__).name} "
                    f"{shlex.join([*flags, '--resume'])}")
        fail(f"stopped: {kept}", status)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    main()
