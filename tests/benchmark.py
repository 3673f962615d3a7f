"""How fast: python tests/benchmark.py [--device cuda] [--method simsiam] [--width 1] ...

Prints, from one run on one machine, ratios that can be compared where seconds cannot:
  augmentation      views/s of `augment`, and of torchvision's PIL pipeline in a process a core
  training          views/s of `main` itself, last epoch, augmentation included
  fixed batch       the same loop fed one batch of ready views: network, loss and optimizer
  usual loop        the network in an eager loop over torchvision's transforms (simsiam only)
  kNN               seconds for the features of all images and the vote
  memory            peak of the process, or of the GPU
On CUDA also FLOP/s and the share of a measured bf16 matrix-product peak.

With --jpegs N it draws N photographs' worth of JPEG files (--megapixels 0.19: about 500x375)
instead and prints images/s of torchvision's ImageFolder with a DataLoader, of decoding them once,
and of an epoch streamed from that, each with the peak of anonymous memory. With --common PATH it
only decodes them once, twice in turn with that version of common.py and with this.
"""

import argparse
import importlib.util
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets
from torchvision import transforms as T
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402


class PilViews(Dataset):
    """What users write with torchvision: two views an image, one image at a time."""

    def __init__(self, images):
        self.images = [to_pil_image(image) for image in images]
        self.view = T.Compose([
            T.RandomResizedCrop(images.shape[3], (0.2, 1)), T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), T.RandomGrayscale(0.2),
            T.ToTensor()])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.view(self.images[i]), self.view(self.images[i])


def seconds(device, work):
    """Wall clock of work() with the device's queue empty before and after."""
    for wait in (True, False):
        if device == "cuda":
            torch.cuda.synchronize()
        if wait:
            start = time.perf_counter()
            work()
    return time.perf_counter() - start


def augmentation(module, args, images, device):
    """Views/s: ours and torchvision's, three rounds in turn, the best of each."""
    flags, ours, theirs = module.parse_args([]), [], []
    on_device = images.to(device)
    loader = DataLoader(PilViews(images), 250, num_workers=os.cpu_count(), persistent_workers=True)
    views = len(module.augment(on_device[:args.batch_size], flags))
    for _ in range(4):  # the first round starts workers and is not counted
        theirs.append(2 * len(images) / seconds(device, lambda: [None for _ in loader]))
        parts = on_device.split(args.batch_size)
        took = seconds(device, lambda: [module.augment(part, flags) for part in parts])
        ours.append(views * len(images) / took)
    return max(ours[1:]), max(theirs[1:])


def train(module, args, data, device, *more):
    """The metrics of the last of three epochs of `main` on this data."""
    module.load_dataset = lambda *a: data
    queue = str(min(4096, len(data.train_images) - args.batch_size))
    own = ["--warmup", "0", *(["--queue", queue] if args.method == "moco" else [])]
    with tempfile.TemporaryDirectory() as out:
        return module.main([
            "--dataset", "shapes", "--width", str(args.width), "--epochs", "3", "--device", device,
            "--batch-size", str(args.batch_size), "--out", out, *own, *more])


def usual_loop(module, args, images, device, steps):
    """Views/s of what SimSiam examples do: transforms in a worker a core, a plain eager loop."""
    model = module.Model(lambda: common.resnet("resnet18", args.width), module.parse_args([]))
    model = model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.06, 0.9, weight_decay=5e-4)
    loader = DataLoader(PilViews(images), args.batch_size, shuffle=True, drop_last=True,
                        num_workers=os.cpu_count(), pin_memory=device == "cuda",
                        persistent_workers=True)
    done, begun = 0, None
    while done < steps:
        for x1, x2 in loader:
            if done == 2:  # the first steps wake workers and choose kernels
                begun = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, device == "cuda"):
                p1, p2, z1, z2 = model(x1.to(device), x2.to(device))
            loss = module.neg_cosine(p1, z2) / 2 + module.neg_cosine(p2, z1) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            if done == steps:
                loss.item()  # the device is done
                return 2 * args.batch_size * (steps - 2) / (time.perf_counter() - begun)


def draw_jpegs(root, count, megapixels):
    """A folder a class in train/ (nine tenths) and val/: enlarged shapes with grain, five sizes.

    Of large ones the first hundred are drawn, the others are copies: drawing takes seconds each.
    """
    images, labels = common.draw_shapes(count)
    drawn = min(count, 100) if megapixels >= 1 else count
    scale = (megapixels / 0.1875) ** 0.5
    usual = (
        (375, 500), (500, 375), (333, 500), (400, 400), (480, 640))
    sides = [(round(h * scale), round(w * scale)) for h, w in usual]

    def path_of(i):
        return Path(root, "val" if i % 10 == 9 else "train", common.SHAPES[labels[i]], f"{i}.jpg")

    def draw(i):
        path = path_of(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < drawn:
            x = images[i:i + 1].float()
            x = torch.nn.functional.interpolate(x, sides[i % 5], mode="bicubic")[0]
            x = (x + 8 * torch.randn(x.shape)).clamp(0, 255).byte()
            to_pil_image(x).save(path, quality=90)
        else:
            shutil.copyfile(path_of(i % drawn), path)
    with ThreadPoolExecutor() as pool:
        list(pool.map(draw, range(drawn)))
        list(pool.map(draw, range(drawn, count)))


def measured(name, count, work):
    """Run work(), print its images/s and the peak of the process's own memory (Linux)."""
    def own():
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024
    peak, ended = [own()], threading.Event()
    watch = threading.Thread(daemon=True, target=lambda: [
        peak.append(own()) for _ in iter(lambda: ended.wait(0.05), True)])
    watch.start()
    start = time.perf_counter()
    work()
    rate = count / (time.perf_counter() - start)
    ended.set()
    watch.join()
    print(f"{name:28} {rate:8,.0f} images/s  memory before {peak[0]:,.0f} MiB, "
          f"peak {max(peak):,.0f} MiB", flush=True)
    return rate


def folders(count, megapixels, other, size=224):
    common.say = lambda *words: None
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryDirectory() as kept:
        draw_jpegs(root, count, megapixels)
        view = T.Compose([T.Resize(size), T.CenterCrop(size), T.PILToTensor()])
        print(f"{count} JPEG files of {megapixels:.2g} megapixels to {size} pixels, "
              f"{os.cpu_count()} cores, torch {torch.__version__}")
        if other:
            spec = importlib.util.spec_from_file_location("other", other)
            theirs = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(theirs)
            for turn in range(2):
                rates = [measured(f"decoding once, {name}", count, lambda: module.load_dataset(
                    "folder", root, size, f"{kept}/{name}{turn}"))
                         for name, module in (("theirs", theirs), ("ours", common))]
                print(f"ours is {rates[1] / rates[0]:.2f} times as fast")
            return
        loaders = [DataLoader(datasets.ImageFolder(f"{root}/{split}", view), 64,
                              num_workers=os.cpu_count()) for split in ("train", "val")]
        measured("torchvision, every epoch", count,
                 lambda: [None for loader in loaders for _ in loader])
        once = measured("decoding once", count, lambda: common.load_dataset("folder", root, size))
        data = common.load_dataset("folder", root, size)
        order = torch.randperm(len(data.train_images))
        epoch = measured("an epoch from the cache", len(order), lambda: [
            None for _ in common.batches(data.train_images, order, 64, "cpu", 8)])
        print(f"an epoch is {epoch / once:.0f} times as fast as decoding")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="simsiam",
                        choices=("simclr", "moco", "simsiam", "simsiam_logo"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--width", type=float, help="default: 1 on CUDA, 0.25 on the CPU")
    parser.add_argument("--batch-size", type=int, help="default: 512 on CUDA, 256 on the CPU")
    parser.add_argument("--images", type=int, help="default: 50000 on CUDA, 2048 on the CPU")
    parser.add_argument("--jpegs", type=int, metavar="N", help="measure a folder of N instead")
    parser.add_argument("--megapixels", type=float, default=0.1875, help="of these files")
    parser.add_argument("--common", metavar="PATH", help="another common.py, to decode with too")
    args = parser.parse_args()
    if args.jpegs:
        return folders(args.jpegs, args.megapixels, args.common)
    cuda = args.device == "cuda"
    args.width = args.width or (1 if cuda else 0.25)
    args.batch_size = args.batch_size or (512 if cuda else 256)
    args.images = args.images or (50000 if cuda else 2048)
    module = importlib.import_module(args.method)
    shapes = common.load_dataset("shapes")
    index = torch.arange(args.images) % 6000
    data = shapes._replace(train_images=shapes.train_images[index],
                           train_labels=shapes.train_labels[index])

    ours, theirs = augmentation(module, args, data.train_images[:4096], args.device)
    run = train(module, args, data, args.device, "--knn-every", "3")
    real_augment, real_normalize = module.augment, module.normalize
    ready = [real_normalize(view, data.mean, data.std).to(args.device) for view in
             real_augment(data.train_images[:args.batch_size], module.parse_args([]))]
    module.augment = lambda x, flags: ready
    module.normalize = lambda x, *stats: x if x.is_floating_point() else real_normalize(x, *stats)
    fixed = train(module, args, data, args.device, "--knn-every", "3")
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{args.method}, {name}, torch {torch.__version__}, width {args.width}, "
          f"batch {args.batch_size}")
    print(f"augmentation   {ours:10,.0f} views/s  torchvision {theirs:,.0f} in {os.cpu_count()} "
          f"processes: {ours / theirs:.1f}x")
    print(f"training       {run['views_s']:10,.0f} views/s")
    print(f"fixed batch    {fixed['views_s']:10,.0f} views/s  training reaches "
          f"{run['views_s'] / fixed['views_s']:.0%} of it")
    if args.method == "simsiam":
        module.augment, module.normalize = real_augment, real_normalize
        usual = usual_loop(module, args, data.train_images, args.device, 100 if cuda else 20)
        print(f"usual loop     {usual:10,.0f} views/s  training is {run['views_s'] / usual:.1f}x")
    count = len(data.train_images) + len(data.test_images)
    bank, labels = torch.randn(count, 512), torch.arange(count) % 10
    queries = bank[:1000]
    took = seconds("cpu", lambda: module.knn_accuracy(
        bank, labels, queries, labels[:1000], 10))
    print(f"kNN            {took:10.2f} s for 1,000 queries of {count:,} features")
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if cuda:
        peak = torch.cuda.max_memory_allocated()
    print(f"peak memory    {peak / 2**30:10.2f} GiB")
    if cuda:
        flags = module.parse_args(["--batch-size", str(args.batch_size)])
        model = module.Model(lambda: common.resnet("resnet18", args.width), flags).cuda()
        with FlopCounterMode(display=False) as counter:
            out = model(*ready)
            flat = [t for part in (out if isinstance(out, (list, tuple)) else [out])
                    for t in (part if isinstance(part, (list, tuple)) else [part])
                    if t.requires_grad]
            sum(t.float().sum() for t in flat).backward()
        flop = counter.get_total_flops() / args.batch_size / len(ready) * run["views_s"]
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        products = [seconds("cuda", lambda: [a @ a for _ in range(20)]) for _ in range(5)]
        best = min(products)
        peak = 2 * 8192**3 * 20 / best
        print(f"arithmetic     {flop / 1e12:10.0f} TFLOP/s  {flop / peak:.0%} of the "
              f"matrix-product peak, {peak / 1e12:.0f}")


if __name__ == "__main__":
    main()
