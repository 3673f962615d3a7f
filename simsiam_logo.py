"""SimSiam-LoGo. CIFAR-10, 200 epochs: 80.5 % kNN (JPEG mirror, 11 minutes, H200), quoted 87.7 %.

Reference implementation, made to be read from top to bottom, diffed and copied (with common.py), of
"Leverage Your Local and Global Representations: A New Self-Supervised Learning Strategy", Zhang et
al., CVPR 2022, arXiv 2203.17205, in its SimSiam form (arXiv 2011.10566).

    python simsiam_logo.py --epochs 200 --batch-size 512

SimSiam with two global and two local crops. Every crop predicts the other global ones. Two local
crops of an image may show different things, so they are not drawn together but apart: an affinity
learns to tell local pairs of one image from pairs of two images, and the encoder makes it small.

    xg1, xg2 (B, 3, H, W)  two global views of a batch of B images
    xl1, xl2 (B, 3, ., .)  two local views of them, smaller if the images are larger than 64 pixels
    f        backbone      f(x) is what is kept, (B, 512) for ResNet-18
    g        projector     z = g(f(x)), (B, 2048); SimSiam's f is both, f and g
    h        predictor     p = h(z), (B, 2048); zg, zl, pg, pl are those of global and local views
    affinity (zl1, zl2)    a logit (B,): are they local views of one image?
    D(p, z)  = -p / |p| . stopgrad(z) / |z|, in [-1, 1]                 (SimSiam's 1 and 3)
    L_gg     = D(pg1, zg2) / 2 + D(pg2, zg1) / 2                        (SimSiam's 4)
    L_lg     = mean of D(pl_i, zg_j) over i and j
    L_ll     = mean affinity(zl1, zl2), its parameters held fixed
    L        = L_gg + L_lg + lam L_ll
    Omega    = -mean softplus(-affinity(zl1, zl2)) - mean softplus(affinity(zl1, other zl2))    (6)
               which the affinity alone makes large; other zl2: the previous image's

Differences from the paper:
- Views are made in batches on the device. Every image has its own parameters, but the order of the
  four colour operations is drawn once a batch of views: each of them is one pass over the batch.
- The learning rate moves every step, not every epoch: the same cosine without its stairs.
- g's last batch norm has no scale and shift, as in the authors' code (SimSiam's builder.py).
- The defaults are CIFAR's at any size; for ImageNet SimSiam has a projector of three layers, lr
  0.05 and weight decay 1e-4. A folder's crops are cut from images already resized to --image-size.
- The paper adds L_lg's four terms; here L_lg is their mean. Half or twice of it ended 2.8 and 0.8
  points lower (6 epochs of CIFAR-10 at a quarter of the width, local crops from 0.05, one seed).
  A predictor for local views alone (arXiv 2602.05845) fell behind within 7 epochs (README).
- Crops: SimSiam's 0.2 to 1 of the area, cut in two where the authors' code cuts, at 0.4. Local
  ones from 0.05, as there, begin at 7 of 32 pixels a side and ended 2.2 points lower (20 epochs,
  as above), but 5.1 higher on shapes (three seeds, README). We do not know the paper's. Local
  views of 16 pixels, which keep the image's scale, ended 4.3 points lower (as the 2.2).
- The affinity learns by a logistic loss, as in the authors' MoCo-LoGo: the paper's Omega, a
  difference of means, has no bound. It steps with the encoder, not before it. Theirs has batch
  norm, unit inputs, noise on same-image pairs, either order of a pair, and a clipped softplus for
  the encoder; here the encoder gets lam times the logit, as in the paper.
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
        help="learning rate at batch 256, scaled linearly with the batch [SimSiam App. D]")
    add("--weight-decay", type=number(float, 0, 1), default=5e-4,
        help="of all parameters [SimSiam App. D]")
    add("--sgd-momentum", type=number(float, 0, 1), default=0.9, help="[SimSiam App. D]")
    add("--warmup-epochs", type=number(int, 0, 10**6), default=0,
        help="linear; the paper states none [SimSiam App. D]")
    add("--pred-dim", type=number(int, 1, 10**6), default=512,
        help="hidden units of the predictor, a quarter of z's 2048 [SimSiam Sec. 3]")
    add("--fix-pred-lr", action="store_true",
        help="the predictor's rate stays constant, for ImageNet [official main_simsiam.py]")
    add("--stop-gradient", action=argparse.BooleanOptionalAction, default=True,
        help="without it the output collapses [SimSiam Fig. 2]")
    add("--global-scale", type=number(float, 1e-3, 1), nargs=2, default=[0.4, 1.0],
        metavar=("LOW", "HIGH"), help="global crops' share of the area [official main_logo.py]")
    add("--local-scale", type=number(float, 1e-3, 1), nargs=2, default=[0.2, 0.4],
        metavar=("LOW", "HIGH"), help="local crops' share of the area [ours: official 0.05 0.4]")
    add("--local-size", type=number(int, 8, 4096),
        help="pixels of a local view (default: 3/7 of the image above 64 pixels, else all) "
             "[official loader.py: 96 of 224, 32 of 32]")
    add("--lam", type=number(float, 0, 1e3), default=1e-4, help="scales L_ll [LoGo, second-hand]")
    add("--affinity", choices=("learned", "cosine"), default="learned",
        help="similarity of two local views [LoGo Eq. 6; official code, unused]")
    add("--affinity-lr", type=number(float, 1e-8, 1e3), default=0.03,
        help="the affinity's learning rate at batch 256, never decayed [official main_logo.py]")


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
    """Two global and two local views of every image, without blur on small images.

    x: (N, 3, H, W) uint8; returns [xg1, xg2, xl1, xl2], (N, 3, W, W) and (N, 3, w, w) float32 in
    [0, 1]; w is 96 at W = 224 and W up to 64 [official loader.py]
    """
    x = unit_range(x)
    views, size = [], x.shape[3]
    local_size = args.local_size or (size if size <= 64 else round(size * 3 / 7))
    for scale, side in 2 * [(args.global_scale, size)] + 2 * [(args.local_scale, local_size)]:
        view = random_resized_crop(x, side, scale, generator=generator)
        view = random_flip(view, generator)
        view = color_jitter(view, 0.4, 0.4, 0.4, 0.1, 0.8, generator)
        view = random_grayscale(view, 0.2, generator)
        views.append(random_blur(view, 0.5, generator) if x.shape[3] > 64 else view)
    return views


# =================== 5. Loss (method) ===================
def neg_cosine(p, z, stop_gradient=True):
    """D(p, stopgrad(z)), SimSiam's Eq. 1, 3 and Alg. 1: mean over the batch, in [-1, 1].

    p: (B, 2048) predictions; z: (B, 2048) projections of the other view
    """
    z = z.detach() if stop_gradient else z  # Alg. 1
    p, z = F.normalize(p.float(), dim=1), F.normalize(z.float(), dim=1)
    return -(p * z).sum(1).mean()


def chance_loss(args):
    """The loss of outputs that know nothing of each other: cosine 0."""
    return 0.0


def affinity_loss(pos, neg):
    """-Omega, Eq. 6, as logistic loss: logits (B,) of one and of two images; 2 log 2 is chance."""
    return F.softplus(-pos.float()).mean() + F.softplus(neg.float()).mean()


# =================== 6. Model (method) ===================
class Model(nn.Module):
    """f, g and h of Algorithm 1; base_encoder() makes a backbone that has `num_features`."""

    sync_bn = True  # more GPUs: the batch's statistics, not a part's [SimSiam Sec. 3]

    def __init__(self, base_encoder, args):
        super().__init__()
        for flag, (low, high) in (("--global-scale", args.global_scale),
                                  ("--local-scale", args.local_scale)):
            if low > high:
                raise ValueError(f"{flag} {low} {high}: the low end comes first")
        dim = 2048  # [SimSiam App. D]
        self.f = base_encoder()
        # Two layers on CIFAR [SimSiam App. D]; a bias before a batch norm would do nothing.
        self.g = nn.Sequential(
            nn.Linear(self.f.num_features, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(),
            nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim, affine=False))  # builder.py
        self.h = nn.Sequential(
            nn.Linear(dim, args.pred_dim, bias=False), nn.BatchNorm1d(args.pred_dim), nn.ReLU(),
            nn.Linear(args.pred_dim, dim))
        # No batch norm: it would see that a batch holds pairs of one kind only.
        self.affinity = nn.Sequential(nn.Linear(2 * dim, 256), nn.ReLU(), nn.Linear(256, 256),
                                      nn.ReLU(), nn.Linear(256, 1))

    def forward(self, xg1, xg2, xl1, xl2):
        """Views to four p, four z (B, 2048), logits (B,) for L_ll and, for Omega, pos and neg."""
        z = [self.g(self.f(x)) for x in (xg1, xg2, xl1, xl2)]  # batch statistics are one view's
        p = [self.h(one) for one in z]
        pair = torch.cat([z[2], z[3]], 1)  # (B, 4096)
        other = torch.cat([z[2], z[3].roll(1, 0)], 1)  # a roll: no image meets itself
        fixed = {name: weight.detach() for name, weight in self.affinity.named_parameters()}
        l_ll = torch.func.functional_call(self.affinity, fixed, pair)  # trains the encoder alone
        pos, neg = self.affinity(pair.detach()), self.affinity(other.detach())  # for its weights
        return p, z, l_ll[:, 0], pos[:, 0], neg[:, 0]


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
    parts = [{"params": [*model.f.parameters(), *model.g.parameters()]},
             {"params": [*model.h.parameters()], **({"fixed_lr": lr} if args.fix_pred_lr else {})},
             {"params": [*model.affinity.parameters()],
              "fixed_lr": args.affinity_lr * args.batch_size / 256}]
    optimizer = torch.optim.SGD(parts, lr, args.sgd_momentum, weight_decay=args.weight_decay,
                                fused=device.type == "cuda")
    D = partial(neg_cosine, stop_gradient=args.stop_gradient)
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
                (pg1, pg2, pl1, pl2), (zg1, zg2, zl1, zl2), l_ll, pos, neg = network(*views)
            if args.affinity == "cosine":
                l_ll = F.cosine_similarity(zl1.float(), zl2.float())
            l_gg = D(pg1, zg2) / 2 + D(pg2, zg1) / 2
            l_lg = sum(D(pl, zg) for pl in (pl1, pl2) for zg in (zg1, zg2)) / 4
            loss = l_gg + l_lg + args.lam * l_ll.float().mean()
            l_omega = affinity_loss(pos, neg)  # -Omega, Eq. 6
            loss = loss + l_omega - l_omega.detach()  # its gradient, not its value: the log shows L
            z = zg1
            # </method>
            loss.backward()
            optimizer.step()
            # <method>
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
