"""Views a second of our scripts and of lightly, in turn, on one core: JSON lines.

    OMP_NUM_THREADS=1 taskset -c 0 python tests/reference/cpu/speed_pairs.py > speed_pairs.jsonl

Every measurement is the second of two epochs of `main` itself, four steps of 512 images each, with
augmentation and without kNN. A worker of lightly's DataLoader is a process of its own: taskset
leaves it the core of the training, and `taskset -c 0,1` gives it a second one ("cores" in a line).
"""

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
from contextlib import redirect_stdout

import lightly_baseline  # it also makes our scripts importable
import torch
from common import load_dataset

PAIRS = {"simclr": "simclr", "moco": "moco", "simsiam": "simsiam", "simsiam_logo": "fastsiam"}
SIDES = {"ours": None, "lightly, 0 workers": 0, "lightly, 1 worker": 1}


def measure(method, workers, data, args):
    """Views a second of one of our methods, or with workers given of lightly's peer."""
    module = importlib.import_module("simsiam" if workers is not None else method)
    module.load_dataset = lambda *rest: data
    module.check_recipe = lambda *rest: None  # else moco.py wants more images than keys
    main, flags = module.main, ["--device", "cpu", "--precision", "fp32"]
    if workers is not None:
        main, flags = lightly_baseline.main, [PAIRS[method], "--workers", str(workers)]
    flags += ["--epochs", "2", "--batch-size", str(args.batch_size), "--width", str(args.width)]
    with tempfile.TemporaryDirectory() as out, redirect_stdout(sys.stderr):
        return main([*flags, "--out", out])["views_s"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", default="data/cifar10")
    parser.add_argument("--methods", nargs="+", choices=PAIRS, default=list(PAIRS))
    for flag, default in {"rounds": 3, "steps": 4, "batch-size": 512, "width": 0.25}.items():
        parser.add_argument(f"--{flag}", type=type(default), default=default)
    args = parser.parse_args()
    with redirect_stdout(sys.stderr):
        data = load_dataset("folder", args.data_dir, 32)
    images = data.train_images[:args.steps * args.batch_size].clone()
    data = data._replace(train_images=images, train_labels=None)  # without labels there is no kNN
    where = {"cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
    for method in args.methods:
        speeds = {side: [] for side in SIDES}
        for number in range(1, args.rounds + 1):
            for side, workers in SIDES.items():
                speeds[side].append(measure(method, workers, data, args))
                line = {"method": method, "who": side.split(",")[0], "workers": workers}
                line |= {"views_s": speeds[side][-1], "round": number, **where}
                print(json.dumps(line), flush=True)
        ours = speeds.pop("ours")
        summary = {"method": method, "ours": statistics.median(ours)}
        for side, theirs in speeds.items():
            ratios = [our / their for our, their in zip(ours, theirs)]
            summary[side] = statistics.median(theirs)
            summary[f"ours / {side}"] = [statistics.median(ratios), *ratios]
        print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    main()
