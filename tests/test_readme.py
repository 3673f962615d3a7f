"""README: its commands and snippets run as they stand, its numbers are made from the logs."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torchvision import models

import common
import report
import simclr
import simsiam
from conftest import OWN, ROOT, SCRIPTS

README = (ROOT / "README.md").read_text()
SMALL = ["--epochs", "1", "--width", "0.25", "--batch-size", "8", "--device", "cpu"]


def test_tables_and_figures_are_what_the_logs_say(tmp_path, monkeypatch):
    """A changed log or a typed number shows in the files that report.py writes."""
    made = ("README.md", "tests/reference/RESULTS.md", "tests/reference/curves.svg",
            "tests/reference/healthy.svg")
    copy = tmp_path / "project"
    shutil.copytree(ROOT / "tests/reference", copy / "tests/reference")
    shutil.copy(ROOT / "README.md", copy)
    monkeypatch.setattr(report, "ROOT", copy)
    monkeypatch.setattr(report, "REFERENCE", copy / "tests/reference")
    report.main([])
    for name in made:
        assert (copy / name).read_text() == (ROOT / name).read_text(), name
    log = copy / "tests/reference/headline/simsiam_jpeg.jsonl"
    log.write_text(log.read_text().replace('"knn": 75.95', '"knn": 66.66'))
    report.main([])
    for name in made[:2]:
        assert "66.7" in (copy / name).read_text(), name
    header, epochs = log.read_text().split("\n", 1)
    header = json.loads(header)
    header["args"] = vars(simsiam.parse_args([]))
    today = json.dumps(header) + "\n" + epochs.replace('"knn": 66.66', '"knn": 55.55')
    log.with_name("simsiam.jsonl").write_text(today)
    report.main([])
    gpu = (copy / "README.md").read_text().partition("One GPU, 200 epochs")[2]
    row = re.search(r"(?m)^\| `simsiam.py`.*", gpu)[0]
    assert "| 55.5 |" in row or "| 55.6 |" in row  # a run by today's defaults, unmarked
    assert "earlier defaults" not in row and "66.7" not in row
    arm = copy / "tests/reference/ablations/logo_weights/simsiam_logo_f30_seed0.jsonl"
    shutil.copy(arm, arm.with_name("simsiam_logo_edit_seed0.jsonl"))  # by the same command
    (arm.parent / "patches").mkdir()
    (arm.parent / "patches/simsiam_logo_edit.patch").touch()
    report.main([])
    rows = [line for line in (copy / made[1]).read_text().splitlines() if "f30_seed0" in line
            or "edit_seed0" in line]
    assert [row.count("with simsiam_logo_edit.patch") for row in rows] == [1, 0]


def write_run(path, method, epochs, done, knn):
    """A log as the scripts write it, of `done` of `epochs` epochs."""
    args = {"method": method, "seed": 0, "epochs": epochs, "dataset": "cifar10"}
    header = {"args": args, "data": {"images": 50000}, "device": "cpu", "commit": "abc"}
    records = [{"epoch": epoch, "knn": knn + epoch, "std": 1.0, "minutes": 2.0 * epoch}
               for epoch in range(done + 1)]
    path.write_text("".join(json.dumps(line) + "\n" for line in (header, *records)))


def test_runs_of_the_cpu_plan_fill_the_first_table_and_the_figure(tmp_path, monkeypatch):
    """Whole runs have a cell, mean and range over seeds; unfinished ones have none."""
    monkeypatch.setattr(report, "REFERENCE", tmp_path)
    (tmp_path / "headline").mkdir()
    folder = tmp_path / "cpu"
    folder.mkdir()
    write_run(folder / "simclr_seed0.jsonl", "simclr", 4, 4, 40)
    write_run(folder / "simclr_seed1.jsonl", "simclr", 4, 4, 42)
    write_run(folder / "moco_seed0.jsonl", "moco", 4, 3, 40)
    write_run(folder / "simsiam_logo_seed0.jsonl", "simsiam_logo", 2, 2, 40)
    write_run(folder / "lightly_fastsiam_seed0.jsonl", "simsiam_logo", 2, 2, 30)
    rows, tables = {}, report.tables()
    assert "Before training, kNN is 38:" in tables  # the mean of epoch 0
    for row in tables.splitlines():
        if row.startswith("| `"):
            rows[row.split("`")[1]] = row
    assert "| 45.0 (44.0-46.0), mean of seeds 0 and 1 | not run |" in rows["simclr.py"]
    assert "| unfinished | not run |" in rows["moco.py"]
    assert "| 42.0, seed 0 | 32.0, seed 0 (FastSiam) |" in rows["simsiam_logo.py"]
    drawn = report.figure()
    assert drawn.count("<polyline") == 4
    assert drawn.count("stroke-dasharray") == 2  # lightly's curve and its line in the legend
    assert drawn.count("unfinished") == 1
    assert ">0.4</text>" in drawn  # 2 epochs of 4 views of 50,000 images are 0.4 million


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_begins_with_its_result_on_a_cpu(name):
    """Its first lines say what the log of seed 0 says."""
    begins = (ROOT / f"{name}.py").read_text().splitlines()[:10]
    said = re.search(
        r"--epochs (\S+) --width (\S+), kNN accuracy on CIFAR-10 is (\S+) % after (\S+) hours on a "
        "CPU", " ".join(begins))
    header, epochs = report.read(ROOT / f"tests/reference/cpu/{name}_seed0.jsonl")
    assert epochs[-1]["epoch"] == header["args"]["epochs"] == int(said[1])
    assert header["args"]["width"] == float(said[2])
    assert f"{report.last(epochs):.1f}" == said[3]
    assert f"{report.minutes(epochs) / 60:.1f}" == said[4]


@pytest.mark.parametrize("most, expected", [
    (12, [0, 2, 4]),
    (200, [0, 50])])
def test_ticks_are_round_numbers(most, expected):
    assert report.ticks(most)[:len(expected)] == pytest.approx(expected)


def test_report_draws_a_users_runs(tmp_path, capsys):
    logs = sorted((ROOT / "tests/reference/few_epochs").glob("*.jsonl"))
    report.main([*map(str, logs), "--svg", str(tmp_path / "c.svg")])
    drawn = (tmp_path / "c.svg").read_text()
    assert drawn.count("<polyline") == len(logs) and drawn.startswith("<svg")
    assert capsys.readouterr().out.count("after epoch 8") == len(logs)


def test_report_draws_what_has_a_knn_and_names_what_is_no_log(tmp_path, capsys):
    """A run without labels, one killed before its first epoch, a line that a kill cut."""
    lines = (ROOT / "tests/reference/few_epochs/simsiam_shapes_seed0.jsonl").read_text()
    header, epoch = lines.splitlines()[:2]
    logs = {"labelled": lines + epoch[:20], "unlabelled": header + '\n{"epoch": 0}\n',
            "killed": header + "\n"}
    for name, text in logs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text(text)
    svg = ["--svg", str(tmp_path / "c.svg")]
    report.main([*(str(tmp_path / name / "log.jsonl") for name in logs), *svg])
    said = capsys.readouterr().out.splitlines()
    assert "after epoch 8" in said[0] and said[1:3] == ["unlabelled: no kNN", "killed: no kNN"]
    assert (tmp_path / "c.svg").read_text().count("<polyline") == 1
    (tmp_path / "result.json").write_text('{"epoch": 3}')
    for wrong in (tmp_path, tmp_path / "none", tmp_path / "result.json", tmp_path / "c.svg"):
        with pytest.raises(SystemExit, match="2"):
            report.main([str(wrong), *svg])
        assert f"{wrong} is no run's log" in capsys.readouterr().err
    for half in (svg, [str(tmp_path / "labelled/log.jsonl")]):
        with pytest.raises(SystemExit, match="2"):
            report.main(half)


def commands():
    """README's indented commands, lines joined at a backslash; not pip, pytest and pictures."""
    text = re.sub(r"(?ms)^```.*?^```", "", README).replace("\\\n", "")
    for line in re.findall(r"(?m)^ {4}(\S.*)$", text):
        if re.match(r"python |torchrun |diff ", line):
            yield line.strip()


@pytest.fixture(scope="module")
def home(tmp_path_factory, folder):
    """Where README's reader types: images, a checkpoint of simclr.py, foreign weights."""
    root = tmp_path_factory.mktemp("home")
    for name in ("data", "my_images", "imagenet100"):
        shutil.copytree(folder, root / name)
    simclr.main([*SMALL, "--dataset", "folder", "--data-dir", str(folder), "--image-size", "16",
                 "--out", str(root / "runs/try")])
    shutil.copytree(root / "runs/try", root / "runs/simclr")
    weights = models.resnet50().state_dict()
    foreign = {f"module.encoder_q.{name}": x for name, x in weights.items()}
    torch.save({"state_dict": foreign}, root / "moco.pth")
    yield root
    shutil.rmtree(root)


def few_images(name, data_dir, image_size=None, *rest):
    """load_dataset with 48 drawn images for what would be downloaded or is large."""
    if name == "folder":
        return common.load_dataset(name, data_dir, image_size, *rest)
    size, half = image_size or 32, torch.full((3,), 0.5)
    train, labels = common.draw_shapes(48, size, 48)
    test, test_labels = common.draw_shapes(16, size, 16)
    return common.Dataset(train, labels, test, test_labels, common.SHAPES, half, half)


@pytest.mark.parametrize("command", [*commands()], ids=str)
def test_commands_run(command, home, tmp_path, monkeypatch):
    """As they stand, but for one epoch on small images; the scripts through main."""
    words = shlex.split(command.replace("$I", "1"), comments=True)
    monkeypatch.chdir(home)
    if words[0] == "diff":
        assert subprocess.run(words, cwd=ROOT, capture_output=True).returncode == 1
        return
    if words[0] == "torchrun":
        if words[1] == "--nnodes":
            return  # two machines
        assert words[1:3] == ["--nproc-per-node", "8"]
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                 str(ROOT / words[3]), *words[4:], *SMALL, "--image-size", "16",
                 "--arch", "resnet18"]
        done = subprocess.run([*words, "--out", str(tmp_path)], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch=1 ") == 1  # one of the two speaks
        return
    assert words[0] == "python"
    if words[1].startswith("tests/"):
        return  # test_report_draws_a_users_runs
    name, argv = words[1].removesuffix(".py"), words[2:]
    module = importlib.import_module(name)
    module.parse_args(argv)  # as it stands: a refusal that OWN's flags would hide
    small = ["--epochs", "1", "--device", "cpu"] if name == "linear_eval" else SMALL
    monkeypatch.setattr(module, "load_dataset", few_images)
    own = OWN.get(name, [])
    final = module.main([*argv, *small, *own, "--out", str(tmp_path)])
    assert "knn200" in final if name == "linear_eval" else final["epoch"] == 1
    assert all((home / word).stat().st_size for word in words if word.endswith((".png", ".pth")))


def test_snippets_run(home, monkeypatch, capsys):
    """README's Python, as it stands; each prints a shape."""
    monkeypatch.chdir(home)
    snippets = re.findall(r"(?ms)^```python\n(.*?)^```", README)
    assert len(snippets) == 3
    assert "SummaryWriter" in snippets.pop()  # runs for ever, see the test below
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})
        assert "torch.Size([8, " in capsys.readouterr().out


def test_the_log_is_forwarded_as_the_readme_says(home, monkeypatch):
    """The snippet for TensorBoard, with a writer that notes, stopped at its first pause."""
    noted = []
    writer = SimpleNamespace(add_scalar=lambda *words: noted.append(words))
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda folder: writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)

    def stop(seconds):
        raise KeyboardInterrupt
    monkeypatch.setattr("time.sleep", stop)
    (home / "runs/simsiam").mkdir(exist_ok=True)
    shutil.copy(home / "runs/try/log.jsonl", home / "runs/simsiam")
    monkeypatch.chdir(home)
    snippet = re.findall(r"(?ms)^```python\n(.*?)^```", README)[2]
    with pytest.raises(KeyboardInterrupt):
        exec(compile(snippet, "README.md", "exec"), {})
    assert {name for name, _, _ in noted} >= {"loss", "std", "knn"}
    assert {epoch for _, _, epoch in noted} == {0, 1}


def test_the_newcomer_installs_then_trains_on_drawn_images():
    lines = re.findall(r"(?m)^ {4}(pip install .*)$", README)
    assert lines == ["pip install -r requirements.txt",
                     "pip install -r requirements.txt && python -m pytest -q"]
    assert "--dataset shapes" in [*commands()][0]


def test_the_cost_of_large_folders_is_arithmetic():
    measured = (ROOT / "tests/reference/benchmarks/folder224_cpu.txt").read_text()
    once = int(re.search(r"decoding once +([\d,]+) images/s", measured)[1])
    epoch = re.search(r"an epoch from the cache +([\d,]+) images/s", measured)[1]
    words = " ".join(README.split())
    assert f"decode about {round(once, -1)} photographs a second and then stream {epoch}" in words
    assert f"{round(130_000 * 3 * 224**2 / 1e9)} GB for ImageNet-100" in words


def test_it_is_short_and_names_only_what_exists():
    text = re.sub(r"(?ms)^```bibtex.*?^```", "", README)
    assert text.count("\n") <= 300
    prose = re.sub(r"(?ms)^```text.*?^```", "", text)  # less what a run prints
    prose = [line for line in prose.splitlines() if line[:1] != "|"]
    assert max(map(len, prose)) <= 100
    for name in re.findall(r"`((?:tests/)?\w+\.(?:py|txt))`", README):
        assert (ROOT / name).exists(), name
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(pictures) >= 6
    assert all(0 < (ROOT / name).stat().st_size < 300_000 for name in pictures)


def test_the_licence_travels_with_every_file():
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n\nCopyright (c) 2026")
    for name in (*SCRIPTS, "common", "linear_eval"):
        text = (ROOT / f"{name}.py").read_text()
        assert "# SPDX-License-Identifier: MIT\n# Copyright (c) 2026 the authors\n" in text


def test_requirements_are_lower_bounds_of_four_packages():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    lines = [line for line in lines if line[0] != "#"]
    names = [re.fullmatch(r"(\w+)>=[\d.]+", line)[1] for line in lines]
    assert names == ["torch", "torchvision", "numpy", "pytest"]
