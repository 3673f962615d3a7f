"""The README's numbers equal their logs, its commands parse, and its files exist."""

import importlib
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys

import pytest
import torch
from torchvision import models

import common
import simclr
import simsiam_logo
from conftest import OWN, ROOT, SCRIPTS

README = (ROOT / "README.md").read_text()
WHOLE = [  # runs of the defaults: script, log, card, published kNN
    ("simsiam", "simsiam_cifar10jpeg_200ep_seed0_h100.jsonl", "H100", 81.7),
    ("simsiam_logo", "simsiam_logo_cifar10jpeg_200ep_seed0_h200.jsonl", "H200", 87.7)]
ROW = re.compile(r"(?m)^\|(.*)\|$")


def log(name):
    """Header and epochs of a log in tests/reference."""
    lines = [json.loads(line) for line in (ROOT / "tests/reference" / name).read_text().splitlines()]
    return lines[0], lines[1:]


def tables():
    """Every row of the README that ends in the name of a log: the epochs its table shows, its cells and that log."""
    for row in ROW.findall(README):
        cells = [cell.strip() for cell in row.split("|")]
        if cells[1] == "untrained":
            shown = [int(re.sub(r"\D", "", cell) or 0) for cell in cells[1:-3]]
        found = re.search(r"^`(\w[\w.-]*)\.jsonl`$", cells[-1])
        if found:
            yield shown, cells, found[1]


def test_every_measured_row_equals_its_log():
    """A row: script, kNN untrained to last epoch, the last std, minutes of training and monitoring, log."""
    rows = [*tables()]
    assert len(rows) >= 5
    for shown, cells, name in rows:
        header, epochs = log(f"{name}.jsonl")
        assert cells[0].strip("`") == f"{name.split('_cifar')[0].split('_shapes')[0]}.py"
        assert cells[1:-1] == [*(f"{epochs[epoch]['knn']:.1f}" for epoch in shown), f"{epochs[-1]['std']:.2f}", f"{minutes(epochs):.0f}"]
        assert header["args"]["epochs"] == epochs[-1]["epoch"] == shown[-1] and header["torch"]
        assert header["commit"] or "_altered_" in name  # a number in the script was edited
        crops = re.search(r"_crops([\d.]+)_", name)
        assert header["args"].get("local_scale", [0.2, 0.4]) == [float(crops[1]) if crops else 0.2, 0.4]


def test_the_table_of_methods_repeats_the_measured_rows():
    told = re.findall(r"(?m)`python (\w+)\.py` \| [\d.]+ \| ([\d.]+|-) \| ([\d.]+) \|$", README)
    ends = {script: f"{log(name)[1][200]['knn']:.1f}" for script, name, _, _ in WHOLE}
    assert told == [(name, ends.get(name, "-"), f"{log(f'{name}_cifar10jpeg_w0.25_3ep_cpu.jsonl')[1][-1]['knn']:.1f}") for name in SCRIPTS]
    for script, name, card, published in WHOLE:
        (header, lines), module = log(name), importlib.import_module(script)
        own = {key: header["args"][key] for key in ("data_dir", "out")} | {"dataset": "folder", "image_size": 32, "workers": 8}
        assert header["args"] == {**vars(module.parse_args([])), **own} and card in header["device"]  # all else is the default
        said = f". CIFAR-10, 200 epochs: {ends[script]} % kNN (JPEG mirror, {minutes(lines):.0f} minutes, {card}), "
        assert said in module.__doc__.split("\n")[0] and f"{published} %." in module.__doc__.split("\n")[0]


def test_every_row_of_three_seeds_equals_its_logs():
    """A row: script, untrained kNN, last kNN, its mean, last std, minutes, logs; each by seed. All gain 20 with the first command's flags."""
    rows = [[cell.strip() for cell in row.split("|")] for row in ROW.findall(README) if "_seed*" in row]
    assert [row[0] for row in rows] == [f"`{name}.py`" for name in SCRIPTS]
    first = shlex.split(re.search(r"python simsiam.py (--dataset shapes .*)", README)[1])
    for name, (_, *cells, stem) in zip(SCRIPTS, rows, strict=True):
        runs = [log(stem.strip("`").replace("*", str(seed))) for seed in range(3)]
        flags = vars(importlib.import_module(name).parse_args([*first, *(["--lr", "0.4"] if name == "moco" else [])]))
        for seed, (header, lines) in enumerate(runs):
            own = {key: header["args"][key] for key in ("out", "workers")} | {"seed": seed}
            assert header["args"] == {**flags, **own} and lines[-1]["epoch"] == flags["epochs"]
        starts, ends = ([lines[epoch]["knn"] for _, lines in runs] for epoch in (0, -1))
        assert all(end - start >= 20 for start, end in zip(starts, ends))
        assert cells == [*(" ".join(f"{x:.1f}" for x in line) for line in (starts, ends, [sum(ends) / 3])),
                         " ".join(f"{lines[-1]['std']:.2f}" for _, lines in runs), " ".join(f"{minutes(lines):.0f}" for _, lines in runs)]
    other = [[log(f"{name}_shapes_w0.25_8ep{'_lr0.2' if name == 'moco' else ''}_seed{seed}_cpu.jsonl") for seed in range(3)] for name in SCRIPTS]
    assert [{header["args"]["lr"] for header, _ in runs} for runs in other] == [{0.4}, {0.2}, {0.4}, {0.4}]
    assert [lines[8]["knn"] - lines[0]["knn"] < 20 for _, lines in other[1]] == [False, False, True] and "at 0.2 seed 2 gains under 20" in README
    assert ("At the other rate they end at {} (SimCLR), {} (MoCo), {} (SimSiam), {} (LoGo)."
            .format(*(" ".join(f"{lines[8]['knn']:.1f}" for _, lines in runs) for runs in other)) in " ".join(README.split()))


def test_what_is_said_of_logo_equals_its_logs():
    """Points between last epochs, in the README and in the script's Differences."""
    def knn(name, epoch=-1):
        return log(f"simsiam{name}_cpu.jsonl")[1][epoch]["knn"]

    said, cifar = " ".join(README.split()), "_cifar10jpeg_w0.25_"
    seeds = [" ".join(f"{knn(f'{name}_seed{seed}'):.1f}" for seed in range(3)) for name in (f"{cifar}6ep", f"_logo{cifar}6ep_crops0.05")]
    beside = (knn(f"{cifar}6ep_{name}") for name in ("lr0.24", "altered_global0.4"))
    halves = (knn(f"_logo{cifar}6ep_{name}") for name in ("crops0.05_lg0.5", "altered_crops0.05_lg2"))
    assert ("After all of 6 (`*_6ep_*`): SimSiam {}, crops0.05 {}; with seed 0 SimSiam at twice the rate {:.1f}, with LoGo's global crops {:.1f}, "
            "crops0.05 with half of L_lg {:.1f}, with twice {:.1f} (*altered*").format(*seeds, *beside, *halves) in said
    stopped = [f"{knn(f'_logo{cifar}20ep_{name}', 7):.1f}" for name in (
        "crops0.05_seed1", "stopped_crops0.05_global0.2", "stopped_crops0.05_lr0.06", "stopped_altered_crops0.05_predictors", "stopped_all0.2", "seed1")]
    assert ("after 7 epochs, beside crops0.05's {}: its global crops from 0.2 {}, `--lr 0.06` {}, a predictor for local views alone {}; "
            "all four crops from 0.2 to 1 {}, the default {}.").format(*stopped) in said
    gpu = [[f"{log(f'simsiam{name}_w0.25_20ep_seed{seed}_stopped_h200.jsonl')[1][6]['knn']:.1f}" for seed in range(3)] for name in (
        "_cifar10jpeg", "_logo_cifar10jpeg", "_logo_cifar10jpeg_crops0.05", "_logo_cifar10jpeg_lam0.003")]
    assert "SimSiam {}, LoGo {}, with crops0.05 {}, with `--lam 0.003` {}".format(*map(" ".join, gpu)) in said
    ends = [knn(name, 17) for name in (f"_logo{cifar}20ep_stopped_crops0.1_seed1", f"{cifar}20ep_seed1", f"_logo{cifar}20ep_seed1")]
    assert "After 17 of 20, seed 1: crops0.1 (`--local-scale 0.1 0.4`) {:.1f}, SimSiam {:.1f}, the default {:.1f}.".format(*ends) in said
    small = log(f"simsiam_logo{cifar}20ep_size16_seed1_cpu.jsonl")
    assert small[0]["args"]["local_size"] == 16 and small[1][-1]["epoch"] == 20
    assert "After all 20: `--local-size 16` {:.1f}.".format(small[1][-1]["knn"]) in said
    peer = (ROOT / "tests/reference/peer_simsiam_cifar10jpeg_w0.25_20ep_seed0_stopped_cpu.txt").read_text().splitlines()
    ours = [log(f"simsiam_cifar10jpeg_w0.25_20ep_seed{seed}_stopped_h200.jsonl")[1][epoch]["knn"] for epoch in (5, 10) for seed in range(3)]
    assert ("read {:.1f} after 5 and {:.1f} after 10; ours on an H200, seeds 0, 1, 2, {:.1f} {:.1f} {:.1f} and {:.1f} {:.1f} {:.1f}."
            .format(*(float(peer[epoch].split()[1]) for epoch in (5, 10)), *ours)) in said
    long = log("simsiam_cifar10jpeg_lr0.12_warmup10_200ep_seed0_h200.jsonl")[1]
    assert "on the H200 failed: {:.1f} after 30, {:.1f} after 75, {:.1f} at the end".format(*(long[epoch]["knn"] for epoch in (30, 75, 200))) in said
    short_of = []  # points below what is published
    for (_, name, card, published), words in zip(WHOLE, ("SimSiam ends at", "LoGo at"), strict=True):
        whole = log(name)[1]
        rate = statistics.median(line["views_s"] for line in whole[1:])
        assert "{} {:.1f} ({:.1f} after 40, {:.1f} after 100) in {:.0f} minutes on an {}, {:,.0f} views/s".format(
            words, *(whole[epoch]["knn"] for epoch in (200, 40, 100)), minutes(whole), card, round(rate, -2)) in said
        short_of += [published - round(whole[200]["knn"], 1)]
    assert "That is {:.1f} and {:.1f} below the published".format(*short_of) in said
    judged = log("linear_eval_simsiam_logo_cifar10jpeg_200ep_seed0_h200.jsonl")[0]
    assert judged["method"] == "simsiam_logo" and judged["epoch"] == 200 and judged["knn200"] == pytest.approx(whole[200]["knn"], abs=0.1)
    assert "a linear classifier on it {:.1f} (top-5 {:.1f})".format(judged["top1"], judged["top5"]) in said
    short = [log(f"simsiam_cifar10jpeg_lr{name}_12ep_seed0_h200.jsonl")[1][-1] for name in ("0.06", "0.12", "0.24", "0.12_warmup2")]
    assert {line["epoch"] for line in short} == {12}
    assert "ended at {:.1f}, {:.1f}, {:.1f}, 0.12 with `--warmup-epochs 2` at {:.1f}".format(*(line["knn"] for line in short)) in said
    means = [sum(knn(f"{name}_seed{seed}") for seed in range(8)) / 8 for name in (
        "_shapes_w0.25_5ep", "_logo_shapes_w0.25_5ep", "_logo_shapes_w0.25_5ep_crops0.1", "_logo_shapes_w0.25_5ep_crops0.05")]
    assert "means of 8 seeds are SimSiam {:.1f}, LoGo {:.1f}, crops0.1 {:.1f}, crops0.05 {:.1f}".format(*means) in said
    again = [log(f"{name}_shapes_w0.25_5ep_again_seed0_cpu.jsonl")[1][5]["knn"] for name in ("simclr", "simsiam", "simsiam_logo")]
    ends = [log(f"{name}_cifar10jpeg_w0.25_3ep_again_cpu.jsonl")[1][3]["knn"] for name in SCRIPTS]
    for first, second in ((log(f"{name}_cifar10jpeg_w0.25_3ep{again}_cpu.jsonl")[0]["args"] for again in ("", "_again")) for name in SCRIPTS):
        assert {**first, "data_dir": 0, "out": 0, "workers": 0} == {**second, "data_dir": 0, "out": 0, "workers": 0}
    assert "On another CPU (`*_again_*`): {:.1f}, {:.1f}, {:.1f}, {:.1f}.".format(*ends) in said
    assert "(seed 0 on another CPU, `*_again_*`: SimCLR {:.1f}, SimSiam {:.1f}, LoGo {:.1f}).".format(*again) in said
    text, half, twice = " ".join(simsiam_logo.__doc__.split()), knn(f"_logo{cifar}6ep_crops0.05_lg0.5"), knn(f"_logo{cifar}6ep_altered_crops0.05_lg2")
    first = knn(f"_logo{cifar}6ep_crops0.05_seed0")
    assert f"Half or twice of it ended {first - half:.1f} and {first - twice:.1f} points lower" in text
    assert f"{knn(f'_logo{cifar}20ep_seed1') - knn(f'_logo{cifar}20ep_crops0.05_seed1'):.1f} points lower" in text
    assert f"ended {knn(f'_logo{cifar}20ep_seed1') - small[1][-1]['knn']:.1f} points lower (as the 2.2)" in text


def test_what_is_said_of_eight_and_twelve_seeds_equals_their_logs():
    """Last epochs of SimSiam and LoGo on shapes; LoGo's lead with its standard error; LoGo with other local crops, SimSiam at twice the rate."""
    def runs(stem, seeds, epochs):
        logs = [log(f"{stem}_seed{seed}_cpu.jsonl") for seed in range(seeds)]
        assert [(header["args"]["seed"], lines[-1]["epoch"]) for header, lines in logs] == [(seed, epochs) for seed in range(seeds)]
        assert len({json.dumps({**header["args"], "seed": 0, "out": "", "overwrite": False}) for header, _ in logs}) == 1
        return torch.tensor([[line["knn"] for line in lines] for _, lines in logs], dtype=torch.float64)  # (seeds, epochs + 1)

    def told(knn):
        return " ".join(f"{x:.1f}" for x in knn[:, -1])

    said = " ".join(README.split())
    for stem, seeds, epochs in (("8ep_lr0.2", 8, 8), ("20ep", 12, 20)):
        plain, logo = (runs(f"{name}_shapes_w0.25_{stem}", seeds, epochs) for name in ("simsiam", "simsiam_logo"))
        lead = (logo - plain)[:, -1]
        assert (logo - plain).mean(0)[1:].min() > 0
        assert (f"SimSiam ends at {told(plain)}, mean {statistics.mean(plain[:, -1].tolist()):.1f}; "
                f"LoGo at {told(logo)}, mean {statistics.mean(logo[:, -1].tolist()):.1f}. "
                f"It leads by {lead.mean():.1f} points (standard error {lead.std() / seeds ** 0.5:.1f}), in {(lead > 0).sum()} seeds, and in the "
                "mean after every epoch.") in said
        if seeds == 8:
            twice = runs("simsiam_shapes_w0.25_8ep", 8, 8)[:, -1].mean()
            assert (f"Seeds 0 and 1 chose the rate; in the other six it leads by {lead[2:].mean():.1f} ({lead[2:].std() / 6 ** 0.5:.1f}). "
                    f"SimSiam at 0.4 has a mean of {twice:.1f}.") in said
    crops = {name: runs(f"simsiam_logo_shapes_w0.25_20ep_crops{name}", 3, 20) for name in ("0.05", "0.1")}
    assert f"Seeds 0 to 2 with crops0.05: {told(crops['0.05'])}, with crops0.1 {told(crops['0.1'])}." in said
    more = crops["0.05"][:, -1].mean() - logo[:3, -1].mean()
    assert f"but {more:.1f} higher on shapes" in " ".join(simsiam_logo.__doc__.split())
    gains = {name: runs(f"{name}_shapes_w0.25_5ep", 3, 5)[:, -1] - runs(f"{name}_shapes_w0.25_5ep", 3, 5)[:, 0] for name in ("simclr", "moco")}
    assert "seed 2 of SimCLR and MoCo gained under 20" in said and all((gain < 20).tolist() == [False, False, True] for gain in gains.values())


def test_the_evaluations_equal_their_log():
    """Rows of linear_eval.py: accuracies by method, mode and share of the labels."""
    lines = [json.loads(line) for line in (ROOT / "tests/reference/linear_eval_cifar10jpeg_w0.25_3ep_cpu.jsonl").read_text().splitlines()]
    told = {(line["method"], line["args"]["mode"], line["args"]["label_fraction"]): line for line in lines}
    table = README[README.index("| checkpoint |"):].split("\n\n")[0]
    rows = {row.split("|")[1].strip(" `"): [cell.strip() for cell in row.split("|")[2:-1]] for row in table.splitlines()[2:]}
    assert [*rows] == [*(f"{name}.py" for name in SCRIPTS), "from scratch"]
    for name in SCRIPTS:
        linear, few = told[name, "linear", 1.0], told[name, "linear", 0.1]
        numbers = [linear["top1"], linear["top5"], few["top1"], told[name, "finetune", 0.1]["top1"], told[name, "finetune", 1.0]["top1"],
                   *(linear[f"knn{k}"] for k in (1, 5, 20, 200))]
        assert rows[f"{name}.py"] == [f"{x:.1f}" for x in numbers]
        assert linear["knn200"] == pytest.approx(log(f"{name}_cifar10jpeg_w0.25_3ep_cpu.jsonl")[1][-1]["knn"], abs=0.1)
    assert rows["from scratch"][3:5] == [f"{told['simclr', 'scratch', share]['top1']:.1f}" for share in (0.1, 1.0)]


def test_the_cost_of_large_folders_is_arithmetic():
    """Images/s as measured; bytes and minutes follow from them."""
    measured = (ROOT / "tests/reference/folder224_cpu.txt").read_text()
    once = re.search(r"decoding once +([\d,]+) images/s", measured)[1]
    epoch = re.search(r"an epoch from the cache +([\d,]+) images/s", measured)[1]
    words = " ".join(README.split())
    assert f"decoding {once} images/s, once; then {epoch} images/s in every epoch" in words
    for count, size, minutes in ((130_000, 20, 8), (1_331_167, 200, 77)):
        assert round(count * 3 * 224**2 / 1e9) == size and round(count / int(once) / 60) == minutes
        assert f"{size} GB" in words and f"{minutes} minutes" in words


def minutes(epochs):
    """Training and monitoring, as logged."""
    return sum(line["seconds"] + line["knn_seconds"] for line in epochs) / 60


def commands():
    """The commands of the table of methods and of the indented blocks, but for pip and pytest, which CI runs."""
    yield from re.findall(r"(?m)^\|.*\| `(python .*?)` \|", README)
    for line in re.findall(r"(?m)^ {4}(\S.*)$", re.sub(r"(?ms)^```.*?^```", "", README)):
        yield from (part.strip() for part in line.split("&&") if not re.search(r"^\s*(#|pip )| -m pytest", part))


@pytest.fixture(scope="module")
def home(tmp_path_factory, folder):
    """The folder in which the README's reader types: images, a checkpoint of simclr.py, foreign weights."""
    root = tmp_path_factory.mktemp("home")
    for name in ("data", "my_images", "imagenet100"):
        shutil.copytree(folder, root / name)
    simclr.main([*SMALL, "--dataset", "folder", "--data-dir", str(folder), "--image-size", "16", "--out", str(root / "runs/try")])
    weights = models.resnet50().state_dict()
    torch.save({"state_dict": {f"module.encoder_q.{name}": x for name, x in weights.items()}}, root / "moco.pth")
    yield root
    shutil.rmtree(root)


SMALL = ["--epochs", "1", "--width", "0.25", "--batch-size", "8", "--device", "cpu"]


@pytest.mark.parametrize("command", [*commands()], ids=str)
def test_commands_run(command, home, tmp_path, monkeypatch, capsys):
    """Every command as it stands, in one epoch on small images; torchrun and diff as programs, the scripts through main."""
    program, *words = shlex.split(command, comments=True)
    assert program in ("python", "torchrun", "diff")
    monkeypatch.chdir(home)
    if program == "diff":
        done = subprocess.run(shlex.split(command), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and done.stdout
        return
    if program == "torchrun":
        assert words[:2] == ["--nproc-per-node", "8"]
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(ROOT / words[2]), *words[3:]]
        done = subprocess.run([*words, *SMALL, "--image-size", "16", "--out", str(tmp_path)], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch=1 ") == 1 and done.stdout.count('"processes": 2') == 1  # one of the two speaks
        return
    name, argv = words[0].removesuffix(".py"), words[1:]
    module, small = importlib.import_module(name), list(SMALL)
    if name == "linear_eval":
        small[2:4] = []  # the width is the checkpoint's
    real = common.load_dataset

    def load(name, data_dir, size, cache_dir):
        if name == "folder":
            return real(name, data_dir, size, cache_dir)
        (train, labels), (test, test_labels) = common.draw_shapes(48, size), common.draw_shapes(16, size, seed=1)
        half = torch.full((3,), 0.5)
        return common.Dataset(train, labels, test, test_labels, common.SHAPES, half, half)
    monkeypatch.setattr(module, "load_dataset", load)
    final = module.main([*argv, *small, *OWN.get(name, []), "--out", str(tmp_path)])
    assert "knn200" in final if name == "linear_eval" else final["epoch"] == 1
    assert all((home / word).stat().st_size for word in words if word.endswith((".png", ".pth")))


def test_snippets_run(home, monkeypatch):
    """The README's Python, as it stands."""
    monkeypatch.chdir(home)
    snippets = re.findall(r"(?ms)^```python\n(.*?)^```", README)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})


def test_the_benchmark_of_folders_runs():
    """The README's `--jpegs 3600`, with fewer."""
    assert "`python tests/benchmark.py --jpegs 3600`" in README
    done = subprocess.run([sys.executable, "tests/benchmark.py", "--jpegs", "400"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(re.findall(r"\d images/s", done.stdout)) == 3, done.stderr


def test_the_newcomers_two_commands_install_for_themselves():
    lines = re.findall(r"(?m)^ {4}(pip install -r requirements.txt && python .*)$", README)
    assert len(lines) == 2 and "--dataset shapes" in lines[0] and lines[1].endswith("-m pytest -q")
    assert [*commands()][:4] == [f"python {name}.py" for name in SCRIPTS]  # the table of methods


def test_it_is_short_and_names_only_what_exists():
    assert README.count("\n") <= 250
    for name in re.findall(r"`((?:tests/)?\w+\.(?:py|txt))`", README):
        assert (ROOT / name).exists(), name
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(pictures) >= 6 and all(0 < (ROOT / name).stat().st_size < 200_000 for name in pictures)


def test_requirements_are_lower_bounds_of_four_packages():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert [re.fullmatch(r"(\w+)>=[\d.]+", line)[1] for line in lines] == ["torch", "torchvision", "numpy", "pytest"]
