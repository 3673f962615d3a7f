"""Arm b of PLAN.md: lightly's SimCLR, MoCo, SimSiam, FastSiam on our network, data and kNN.

    python tests/reference/cpu/lightly_baseline.py simclr --seed 0 --out runs/lightly_simclr_seed0

Recipe: lightly's CIFAR-10 benchmark, its commit 050f5264. fastsiam: --epochs 6 --knn-every 2.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
from lightly import __version__, loss, transforms
from lightly.models import batchnorm, modules, utils
from torch import nn
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
import simsiam  # noqa: E402


def simclr(f, args):
    """Modules, the first of which maps a view to z, and the loss of the z of all views."""
    g, criterion = modules.SimCLRProjectionHead(f.num_features, 512, 128), loss.NTXentLoss()
    return nn.ModuleList([nn.Sequential(f, g)]), lambda z, views: criterion(*z)


def moco(f, args):
    """With a momentum encoder k, a bank of keys, and batch norm in eight parts of a batch."""
    for name, norm in list(f.named_modules()):
        if isinstance(norm, nn.BatchNorm2d):
            f.set_submodule(name, batchnorm.SplitBatchNorm(norm.num_features, 8))
    q = nn.Sequential(f, modules.MoCoProjectionHead(f.num_features, 512, 128))
    k = copy.deepcopy(q).requires_grad_(False)
    criterion = loss.NTXentLoss(temperature=0.1, memory_bank_size=(args.memory_bank, 128))
    criterion.memory_bank._non_persistent_buffers_set.clear()  # so that the bank is saved

    def symmetric(z, views):
        utils.update_momentum(q, k, 0.99)
        shuffled = [utils.batch_shuffle(view) for view in reversed(views)]
        losses = [criterion(own, utils.batch_unshuffle(k(other), order))
                  for own, (other, order) in zip(z, shuffled)]
        return sum(losses) / 2
    return nn.ModuleList([q, k, criterion]), symmetric


def siamese(f, args):
    """Each view predicts the mean of the others: SimSiam for two views, FastSiam for four."""
    first = (f.num_features, 2048, nn.BatchNorm1d(2048), nn.ReLU())
    g = modules.heads.ProjectionHead([first, (2048, 2048, nn.BatchNorm1d(2048), None)])
    h, criterion = modules.SimSiamPredictionHead(2048, 512, 2048), loss.NegativeCosineSimilarity()

    def predicted(z, views):
        means = [torch.stack(z[:i] + z[i + 1:]).mean(0).detach() for i in range(len(z))]
        return sum(map(criterion, map(h, z), means)) / len(z)
    return nn.ModuleList([nn.Sequential(f, g), h]), predicted


METHODS = {  # network and loss, learning rate at batch size 512, two or four views
    "simclr": (simclr, 0.24, transforms.SimCLRTransform(32, cj_strength=0.5, gaussian_blur=0)),
    "moco": (moco, 0.24, transforms.SimCLRTransform(32, cj_strength=0.5, gaussian_blur=0)),
    "simsiam": (siamese, 0.06, transforms.SimSiamTransform(32, gaussian_blur=0)),
    "fastsiam": (siamese, 0.06, transforms.FastSiamTransform(4, 32, gaussian_blur=0))}
FLAGS = {"data-dir": "data/cifar10", "out": "runs/lightly", "epochs": 12, "knn-every": 4,
         "seed": 0, "workers": 0, "batch-size": 512, "memory-bank": 8192, "arch": "resnet18",
         "width": 0.25, "init": None, "knn-k": 200, "knn-tau": 0.1, "resume": 0, "overwrite": 0}


def main(argv=None):
    """Train, log, save and, with --resume 1, go on as our scripts do; return the last record."""
    begin, parser = time.perf_counter(), argparse.ArgumentParser()
    parser.add_argument("method", choices=METHODS)
    for name, default in FLAGS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args(argv)
    build, lr, transform = METHODS[args.method]
    torch.manual_seed(args.seed)
    f = simsiam.resnet(args.arch, args.width, "cifar")
    model, criterion = build(f, args)
    sgd = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    scale = {name: torch.tensor(x) for name, x in transforms.utils.IMAGENET_NORMALIZE.items()}
    data = simsiam.load_dataset("folder", args.data_dir, 32)._replace(**scale)
    loader = DataLoader(
        [*map(to_pil_image, data.train_images)], args.batch_size, shuffle=True, drop_last=True,
        num_workers=args.workers, collate_fn=lambda some: default_collate([*map(transform, some)]))
    header = {"method": args.method.replace("fastsiam", "simsiam_logo"),  # our script beside it
              **simsiam.describe(args, data), "lightly": __version__}
    record = simsiam.restore(args, header, model, sgd)
    begin -= 60 * record.get("minutes", 0)
    with simsiam.open_log(args, header, record) as log:
        for epoch in range(record.get("epoch", -1) + 1, args.epochs + 1):
            torch.manual_seed(args.seed * 10**6 + epoch)
            record, history, start = {"epoch": epoch}, [], time.perf_counter()
            if epoch > 0:  # epoch 0 is before training
                sgd.param_groups[0]["lr"] = rate = simsiam.learning_rate(epoch - 1, args.epochs, lr)
                model.train()
                for views in loader:
                    z = [model[0](view) for view in views]
                    value = criterion(z, views)
                    sgd.zero_grad()
                    value.backward()
                    sgd.step()
                    history.append([value.item(), simsiam.feature_std(z[0]).item()])
                speed = len(history) * len(views) * args.batch_size / (time.perf_counter() - start)
                value, std = torch.tensor(history).mean(0).tolist()
                record |= {"loss": value, "std": std, "lr": rate, "views_s": speed}
            if epoch % args.knn_every == 0 or epoch == args.epochs:
                record |= simsiam.knn_monitor(f, data, args, args.batch_size, torch.no_grad)
            simsiam.write_record(log, record, args, begin)
            simsiam.save_checkpoint(Path(args.out, "checkpoint.pt"), {
                **header, "record": record, "backbone": f.state_dict(),
                "model": model.state_dict(), "optimizer": sgd.state_dict()})
    return record


if __name__ == "__main__":
    main()
