"""Wrong flags, data and surroundings: each ends in one line, with status 2 and nothing written."""

import importlib
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
import linear_eval
import moco
import simsiam
from conftest import picture, refused

# ------------------------------------------------------------------------------ wrong flags
SHARED = [
    "--epochs 0", "--epochs -1", "--epochs 1.5", "--epochs nan",
    "--batch-size 1", "--batch-size ten",
    "--lr 0", "--lr nan", "--lr inf", "--lr fast",
    "--weight-decay -1", "--sgd-momentum 2", "--warmup -1", "--warmup 10",
    "--seed -1", "--seed 1e3", "--width 0", "--width inf", "--image-size 4", "--workers 0",
    "--max-pixels 0", "--knn-k 0", "--knn-every 0", "--knn-tau 0", "--knn-tau nan",
    "--dataset mnist", "--arch vgg", "--stem big", "--device tpu", "--precision fp8",
    "--epoch 3", "--nonsense 1", "--resume --overwrite",
]
OWN = {
    "simclr": ["--tau 0", "--tau nan", "--proj-layers 0", "--optimizer adam"],
    "moco": ["--tau -1", "--m 1.5", "--m nan", "--queue 0", "--proj-layers 11",
             "--bn-splits 0", "--bn-splits 7", "--bn-splits 512"],
    "simsiam": [*SHARED, "--pred-dim 0", "--pred-dim x"],
    "simsiam_logo": ["--pred-dim 0", "--lam nan", "--affinity-lr 0", "--local-size 2",
                     "--global-scale 0 1", "--global-scale 0.9 0.1", "--local-scale 0.9 0.1",
                     "--local-scale 0.2"],
    "linear_eval": ["--epochs 0", "--lr nan", "--nonsense 1", "--mode probe",
                    "--label-fraction 0", "--label-fraction 1.1", "--label-fraction nan",
                    "--knn 0", "--knn 5 -1", "--head-layers -1", "--std 0 1 1", "--mean nan 0 0"],
}


@pytest.mark.parametrize("name, flags", [(name, flags) for name in OWN for flags in OWN[name]])
def test_wrong_flags_end_in_one_line(name, flags, capsys, tmp_path, monkeypatch):
    """That names the flag, before any data is read."""
    module, argv = importlib.import_module(name), flags.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "load_dataset", lambda *args: pytest.fail("read data"))
    refused(capsys, module, [*(["x.pt"] if name == "linear_eval" else []), *argv], argv[0])
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("flags, words", [
    ("--epochs 2.5", "whole number"), ("--lr fast", "number value"), ("--arch vgg", "resnet18"),
    ("--dataset mnist", "shapes"), ("--lr 0", "not from 1e-08 to 1000"),
    ("--warmup 10", "give a share of all steps"),
    ("--resume --overwrite", "exclude")])
def test_the_line_says_what_would_do(flags, words, capsys):
    refused(capsys, simsiam, flags.split(), words)


@pytest.mark.parametrize("name", ["simsiam", "linear_eval"])
def test_an_error_is_one_write(name, monkeypatch):
    """Processes of torchrun share an unbuffered standard error: parts of lines would mix."""
    written = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append, flush=lambda: None))
    with pytest.raises(SystemExit):
        importlib.import_module(name).fail("two\nlines")
    assert written == ["error: two lines\n"]


@pytest.mark.parametrize("module", [simsiam, linear_eval])
def test_an_unknown_flag_proposes_the_nearest(module, capsys):
    refused(capsys, module, ["x", "--epoch", "5"][module is simsiam:], "--epoch is not a flag: "
            "did you mean --epochs?")
    refused(capsys, module, ["x", "--batchsize=5"][module is simsiam:], "--batch-size?")
    refused(capsys, module, ["x", "--zzz"][module is simsiam:], "--zzz", "--help")
    refused(capsys, module, ["x", "b.pt"][module is simsiam:], "b.pt is not a flag")
    refused(capsys, simsiam, ["--no-stopgradient"], "did you mean --no-stop-gradient?")


# ------------------------------------------------------------------------------ surroundings
@pytest.mark.skipif(torch.cuda.is_available(), reason="has what the test says is absent")
def test_an_absent_device_is_refused(capsys):
    refused(capsys, simsiam, ["--device", "cuda"], "--device cuda", "try --device cpu")
    refused(capsys, linear_eval, ["x", "--device", "mps"], "--device mps", "try --device cpu")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(common.UserError, match="no cuda for process 2, try --device cpu"):
        common.choose_device("auto")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="other systems have no such file")
def test_a_log_names_the_processor():
    name, threads = common.environment(torch.device("cpu"))["device"].rsplit(", ", 1)
    assert len(name) > 3 and f": {name}\n" in Path("/proc/cpuinfo").read_text()
    assert threads == f"{torch.get_num_threads()} threads"


def test_batches_that_cannot_be_split(flags, capsys, monkeypatch):
    for world in ("3", "8"):  # parts of 8/3 images, and of one
        monkeypatch.setenv("WORLD_SIZE", world)
        refused(capsys, simsiam, flags(simsiam), "--batch-size 8", f"{world} processes")
    monkeypatch.setenv("WORLD_SIZE", "2")  # MoCo: three splits in each process
    refused(capsys, moco, flags(moco, "--bn-splits", "6"), "--bn-splits", "a multiple of 6")
    assert moco.parse_args(flags(moco, "--bn-splits", "3")).bn_splits == 3  # one in each


def test_empty_variables_count_as_absent(monkeypatch):
    """As a shell script leaves them that hands on what it may not have itself."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
    here = common.processes()
    assert (here.rank, here.world, here.local_rank) == (0, 1, 0)
    for number, name in enumerate(("RANK", "WORLD_SIZE", "LOCAL_RANK"), 5):
        monkeypatch.setenv(name, str(number))
    here = common.processes()
    assert (here.rank, here.world, here.local_rank) == (5, 6, 7)


def test_an_out_that_cannot_be_written(flags, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    refused(capsys, simsiam, flags(simsiam, "--out", str(tmp_path / "file/run")), "file")


def test_settings_that_do_not_fit_the_data(flags, capsys, tmp_path):
    refused(capsys, simsiam, flags(simsiam, "--batch-size", "41"),
            "--batch-size 41 is more than the 40 images: try 32")
    refused(capsys, moco, flags(moco, "--queue", "33"), "--queue plus --batch-size", "40")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------ code in files
class Bomb:
    """What an unpickler that runs code turns into an empty file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("way", ["--resume", "--init"])
def test_a_checkpoint_that_carries_code_is_refused_and_not_run(way, flags, capsys, tmp_path):
    bomb, path = Bomb(tmp_path / "exploded"), tmp_path / "run/checkpoint.pt"
    path.parent.mkdir()
    argv = flags(simsiam, "--resume")
    if way == "--init":
        argv = flags(simsiam, "--init", str(path), "--out", str(tmp_path / "other"))
    torch.save({"method": "simsiam", "args": {}, "images": 40, "model": bomb}, path)
    refused(capsys, simsiam, argv, "checkpoint.pt is not a file of weights")
    path.write_bytes(pickle.dumps(bomb, 2))
    refused(capsys, simsiam, argv, "checkpoint.pt is not a file of weights")
    assert not bomb.path.exists() and not (tmp_path / "other").exists()
    pickle.loads(path.read_bytes())
    assert bomb.path.exists()  # it would have been


# ------------------------------------------------------------------------------ wrong data
def several(root, train=("a", "b"), test=("a", "b")):
    """Nine training and two test images a class."""
    for split, classes, count in (("train", train, 9), ("test", test, 2)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(seed=i).save(root / split / name / f"{i}.png")


def cut(root):
    several(root)
    file = root / "train/a/3.png"
    picture(64, 64).save(file)
    file.write_bytes(file.read_bytes()[:2000])


def one_image(root):
    root.mkdir()
    picture().save(root / "a.png")


DATA = {  # what makes the folder, and a word of the message; the kinds are test_common's
    "missing": (lambda root: None, "not a folder"),
    "empty": (lambda root: root.mkdir(), "no images"),
    "cut": (cut, "3.png"),
    "class not in train": (lambda root: several(root, test=["a", "b", "c"]), "'c'"),
    "one image": (one_image, "more than the 1 images"),
}


@pytest.mark.parametrize("kind", DATA)
def test_wrong_data_ends_in_one_line(kind, flags, capsys, tmp_path):
    make, word = DATA[kind]
    make(tmp_path / "data")
    refused(capsys, simsiam, flags(simsiam, "--data-dir", str(tmp_path / "data")), word)
    assert not (tmp_path / "run").exists() and not [*tmp_path.rglob("*.tmp")]
