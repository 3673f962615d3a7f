"""Wrong flags, data and surroundings: each ends in one line, with status 2 and nothing written."""

import importlib
import inspect
import pickle
import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import linear_eval
import moco
import simsiam
from conftest import SCRIPTS, picture, refused

# ------------------------------------------------------------------------------ wrong flags
SHARED = [
    "--epochs 0", "--epochs -1", "--epochs 1.5", "--epochs nan", "--epochs 1e1",
    "--batch-size 1", "--batch-size ten", "--batch_size 8",
    "--lr 0", "--lr -1", "--lr nan", "--lr inf", "--lr fast", "--lr 0,05",
    "--weight-decay -1", "--sgd-momentum 2", "--warmup -1", "--warmup 10",
    "--seed -1", "--seed 1e3", "--width 0", "--width inf",
    "--image-size 4", "--image-size 32x32", "--workers 0",
    "--max-pixels 0", "--knn-k 0", "--knn-every 0", "--knn-tau 0", "--knn-tau nan",
    "--dataset mnist", "--arch vgg", "--arch ResNet18", "--stem big",
    "--device tpu", "--device cuda:0", "--precision fp8",
    "--epoch 3", "--nonsense 1", "--resume=1", "\u2013-lr 1",
    "-f kernel.json",  # what a notebook's kernel is started with
]
OWN = {
    "simclr": ["--tau 0", "--tau nan", "--proj-layers 0", "--optimizer adam"],
    "moco": [
        "--tau -1", "--m 1.5", "--m nan", "--queue 0", "--proj-layers 0",
        "--bn-splits 0", "--bn-splits 7", "--bn-splits 512"],
    "simsiam": [*SHARED, "--pred-dim 0", "--pred-dim x", "--fix-pred-lr=0"],
    "simsiam_logo": [
        "--pred-dim 0", "--lam nan", "--affinity-lr 0", "--local-size 2",
        "--global-scale 0 1", "--global-scale 0.9 0.1", "--local-scale 0.9 0.1",
        "--local-scale 0.2"],
    "linear_eval": [
        "--epochs 0", "--lr nan", "--nonsense 1", "--mode probe",
        "--label-fraction 0", "--label-fraction 1.1", "--label-fraction nan",
        "--knn 0", "--knn 5 -1", "--head-layers -1", "--std 0 1 1", "--mean nan 0 0"],
}


@pytest.mark.parametrize("name, flags", [(name, flags) for name in OWN for flags in OWN[name]])
def test_wrong_flags_end_in_one_line(name, flags, capsys, tmp_path, monkeypatch):
    """That names the flag, before any data is read."""
    module, argv = importlib.import_module(name), flags.split()
    flag = argv[0].partition("=")[0]
    if name == "linear_eval":
        argv = ["x.pt", *argv]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "load_dataset", lambda *args: pytest.fail("read data"))
    refused(capsys, module, argv, flag)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("flags, words", [
    ("--epochs 2.5", "2.5"),
    ("--lr fast", "number value"),
    ("--lr 0", "not from 1e-08 to 1000"),
    ("--arch vgg", "resnet18"),
    ("--dataset mnist", "shapes"),
    ("--no-stopgradient", "unrecognized arguments: --no-stopgradient"),
    ("--stop-gradient False", "unrecognized arguments: False"),
    ("checkpoint.pt", "unrecognized arguments: checkpoint.pt")])
def test_the_line_says_what_is_wrong_with_a_flag(flags, words, capsys):
    refused(capsys, simsiam, flags.split(), words)


def test_a_warmup_in_epochs_is_refused_with_its_unit(script, capsys):
    refused(capsys, script, ["--warmup", "10"], "share", "of 200 epochs")


def test_numbers_may_be_written_in_any_usual_way():
    args = simsiam.parse_args(["--lr=1e-3", "--weight-decay", "5E-4", "--knn-tau=.07"])
    assert (args.lr, args.weight_decay, args.knn_tau) == (0.001, 0.0005, 0.07)


def test_an_error_is_one_write(monkeypatch):
    """Processes of torchrun share an unbuffered standard error: parts of lines would mix."""
    written = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append))
    with pytest.raises(SystemExit):
        simsiam.fail("two\nlines")
    assert written == ["error: two lines\n"]


# ------------------------------------------------------------------------------ paths
def paths(module):
    """The flags of a script that take a path."""
    return [name for name, kind, *_ in module.FLAGS if kind is simsiam.file_path]


PATHS = [(module, flag) for module in (simsiam, linear_eval) for flag in paths(module)]


def test_all_paths_have_the_type_of_paths():
    given = {"--data-dir", "--cache-dir", "--out", "--init", "--save-views"}
    assert {*paths(simsiam)} == given
    drawn = {"--data-dir", "--cache-dir", "--out", "--neighbours", "--map", "--export"}
    assert {*paths(linear_eval)} == drawn


@pytest.mark.parametrize("module, flag", PATHS)
def test_an_empty_path_is_refused(module, flag, capsys, tmp_path, monkeypatch):
    """As a shell script leaves it whose variable is unset: --data-dir "$DATA"."""
    monkeypatch.chdir(tmp_path)
    first = [] if module is simsiam else ["x.pt"]
    for argv in ([flag, ""], [f"{flag}="]):
        refused(capsys, module, [*first, *argv], flag, "path", "empty", "unset")
    assert not [*tmp_path.iterdir()]


def test_an_empty_path_of_a_checkpoint_is_refused(capsys):
    refused(capsys, linear_eval, [""], "CHECKPOINT", "path", "empty")


@pytest.mark.parametrize("module, flag", PATHS)
def test_a_tilde_is_the_home_folder(module, flag, tmp_path, monkeypatch):
    """Also where no shell expands it, as in --out=~/runs or in a list of arguments."""
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["~/x.pt", f"{flag}=~/a/b"]
    if module is simsiam:
        del argv[0]
    args = module.parse_args(argv)
    name = flag.removeprefix("--").replace("-", "_")
    assert getattr(args, name) == str(tmp_path / "a/b")
    assert module is simsiam or args.checkpoint == str(tmp_path / "x.pt")


def test_an_out_that_cannot_be_written_is_named(flags, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    refused(capsys, simsiam, flags(simsiam, "--out", str(tmp_path / "file/run")), "file")


def test_resume_and_overwrite_of_a_run_exclude_each_other(flags, capsys, tmp_path):
    log = tmp_path / "run/log.jsonl"
    log.parent.mkdir()
    log.write_text("a log")
    argv = flags(simsiam, "--resume", "--overwrite")
    refused(capsys, simsiam, argv, "--resume", "--overwrite", str(log.parent))
    assert log.read_text() == "a log" and [*log.parent.iterdir()] == [log]


# ------------------------------------------------------------------------------ surroundings
@pytest.mark.skipif(torch.cuda.is_available(), reason="has what the test says is absent")
@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_an_absent_device_is_refused_in_a_short_line(name, flags, capsys):
    argv = flags(simsiam, "--device", name)
    with pytest.raises(SystemExit) as end:
        simsiam.main(argv)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert f"--device {name}" in said and len(said) < 500


def test_more_processes_than_gpus_are_refused(monkeypatch):
    def set_device(index):
        raise RuntimeError(f"CUDA error: invalid device ordinal {index}")
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    for variable, value in (("RANK", "2"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(variable, value)
    with pytest.raises(common.UserError, match="process 2 of 3.* invalid device ordinal 2"):
        simsiam.start_process("auto")


def test_a_batch_that_cannot_be_split_over_the_processes_is_refused(flags, capsys, monkeypatch):
    for world in ("3", "8"):  # parts of 8/3 images, and of one
        monkeypatch.setenv("WORLD_SIZE", world)
        refused(capsys, simsiam, flags(simsiam), "--batch-size", f"{world} processes")
    monkeypatch.setenv("WORLD_SIZE", "2")  # MoCo: three splits in each process
    refused(capsys, moco, flags(moco, "--bn-splits", "6"), "--bn-splits", "times 6")
    assert moco.parse_args(flags(moco, "--bn-splits", "3")).bn_splits == 3  # one in each


def test_empty_variables_of_torchrun_count_as_absent(monkeypatch):
    """As a shell script leaves them that hands on what it may not have itself."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    for name in names:
        monkeypatch.setenv(name, "")
    assert simsiam.processes() == (0, 1, 0)
    for name, value in zip(names, ("5", "6", "7")):
        monkeypatch.setenv(name, value)
    assert simsiam.processes() == (5, 6, 7)


LAUNCHERS = {
    "tasks of srun": {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
    "a rank above the number of processes": {"RANK": "3", "WORLD_SIZE": "2"},
    "a rank alone": {"RANK": "1"},
}


@pytest.mark.parametrize("kind", LAUNCHERS)
def test_other_launchers_than_torchrun_are_refused(kind, flags, capsys, tmp_path, monkeypatch):
    for name, value in LAUNCHERS[kind].items():
        monkeypatch.setenv(name, value)
    refused(capsys, simsiam, flags(simsiam), "torchrun")
    assert not [*tmp_path.iterdir()]


def test_processes_that_cannot_meet_end_in_one_line(flags, capsys, tmp_path, monkeypatch):
    """Variables set by hand without an address, or with a port that is taken."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(capsys, simsiam, flags(simsiam), "process 0 of 2", "MASTER_ADDR")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = f"{taken.getsockname()[1]}"
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", port)
        refused(capsys, simsiam, flags(simsiam), "process 0 of 2", port, "in use")
    assert not [*tmp_path.iterdir()]


def allocate_with_python():
    raise MemoryError


@pytest.mark.parametrize("allocate", [
    lambda: torch.empty(2**58), lambda: np.empty(2**58), allocate_with_python],
    ids=["torch", "numpy", "python"])
def test_too_little_memory_ends_in_one_line(allocate, flags, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(simsiam, "load_dataset", lambda *args: allocate())
    refused(capsys, simsiam, flags(simsiam), "smaller", status=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [*SCRIPTS, "linear_eval"])
def test_no_script_needs_the_name_of_its_file(name, folder):
    """So its source runs in a notebook's cell."""
    source = inspect.getsource(importlib.import_module(name))
    cell = {"__name__": "cell"}
    exec(compile(source, "cell", "exec"), cell)
    args = cell["parse_args"](["x.pt"] if name == "linear_eval" else [])
    data = common.load_dataset("folder", folder, 16)
    header = cell["describe"](args, data)
    assert header["args"] == vars(args) and "__file__" not in cell


# ------------------------------------------------------------------------------ sizes of the data
def test_settings_that_do_not_fit_the_data_are_refused(flags, capsys, tmp_path):
    argv = flags(simsiam, "--batch-size", "41")
    refused(capsys, simsiam, argv, "--batch-size 41", "40 images: try --batch-size 20")
    refused(capsys, moco, flags(moco, "--queue", "33"), "--queue", "40 images")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("count", [3, 4, 5, 12, 40, 511])
def test_a_batch_larger_than_the_data_names_one_that_runs(script, count, capsys):
    """For MoCo with the queue and the splits that go with it."""
    with pytest.raises(SystemExit):
        script.check_recipe(script.parse_args([]), count)
    said = capsys.readouterr().err
    named = re.findall(r"(--[a-z-]+) (\d+)", said.partition(" try ")[2])
    args = script.parse_args([word for pair in named for word in pair])
    assert 2 <= args.batch_size <= count
    script.check_recipe(args, count)


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
    torch.save({"args": {}, "data": {}, "backbone": {}, "model": bomb}, path)
    refused(capsys, simsiam, argv, str(path), "weights")
    path.write_bytes(pickle.dumps(bomb, 2))
    refused(capsys, simsiam, argv, str(path), "weights")
    assert not bomb.path.exists() and not (tmp_path / "other").exists()
    assert [*path.parent.iterdir()] == [path]
    pickle.loads(path.read_bytes())
    assert bomb.path.exists()  # it would have been


# ------------------------------------------------------------------------------ wrong data
def several(root):
    """Nine training and two test images in each of two classes."""
    for split, count in (("train", 9), ("test", 2)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(seed=i).save(root / split / name / f"{i}.png")


def cut(root):
    several(root)
    file = root / "train/a/3.png"
    picture(64, 64).save(file)
    file.write_bytes(file.read_bytes()[:2000])


def too_deep(root):
    several(root / "images")


def one_image(root):
    root.mkdir()
    picture().save(root / "a.png")


DATA = {  # what makes the folder ROOT, and words of the message
    "missing": (lambda root: None, "ROOT"),
    "a file": (lambda root: root.write_text(""), "ROOT"),
    "empty": (Path.mkdir, "no images to train on in ROOT"),
    "cut": (cut, "ROOT/train/a/3.png"),
    "one level too deep": (too_deep, "ROOT/images"),
    "one image": (one_image, "--batch-size 8"),
}


@pytest.mark.parametrize("kind", DATA)
def test_wrong_data_ends_in_one_line(kind, flags, capsys, tmp_path):
    make, words = DATA[kind]
    root = tmp_path / "data"
    make(root)
    argv = flags(simsiam, "--data-dir", str(root))
    refused(capsys, simsiam, argv, words.replace("ROOT", str(root)))
    assert not (tmp_path / "run").exists() and not [*tmp_path.rglob("*.tmp")]


def test_a_variable_that_no_shell_expands_is_named(flags, capsys):
    refused(capsys, simsiam, flags(simsiam, "--data-dir", "$DATA"), "'$DATA'")
