"""What goes wrong: wrong input, full disks, signals, kills, two runs in one place."""

import errno
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
import moco
import simsiam
from conftest import OWN, ROOT, SCRIPTS, fast_start
from test_common import picture
from test_training import refused

# ------------------------------------------------------------------------------ wrong flags
ALL = ("simclr", "moco", "simsiam", "simsiam_logo", "linear_eval")
WRONG = [  # where, flags, a word of the message
    *((name, [flag, value], flag) for name in ALL for flag, value in [
        ("--epochs", "0"), ("--epochs", "-1"), ("--epochs", "1.5"), ("--epochs", "nan"), ("--batch-size", "1"), ("--batch-size", "0"),
        ("--batch-size", "ten"), ("--lr", "0"), ("--lr", "-0.1"), ("--lr", "nan"), ("--lr", "inf"), ("--lr", "fast"),
        ("--weight-decay", "-1"), ("--weight-decay", "nan"), ("--seed", "-1"), ("--seed", "1e3"), ("--width", "0"), ("--width", "inf"),
        ("--image-size", "0"), ("--image-size", "-32"), ("--workers", "0"), ("--knn-tau", "0"), ("--knn-tau", "nan"),
        ("--dataset", "mnist"), ("--arch", "vgg"), ("--stem", "big"), ("--device", "tpu"), ("--precision", "fp8"), ("--nonsense", "1")]),
    *((name, [flag, value], flag) for name in SCRIPTS for flag, value in [
        ("--knn-k", "0"), ("--knn-every", "0"), ("--sgd-momentum", "2"), ("--sgd-momentum", "nan"), ("--warmup-epochs", "-1"),
        ("--warmup-epochs", "200"), ("--warmup-epochs", "1e9")]),
    *(("simclr", flags, flags[0]) for flags in (["--tau", "0"], ["--tau", "nan"], ["--proj-layers", "0"], ["--optimizer", "adam"])),
    *(("moco", flags, flags[0]) for flags in (["--tau", "-1"], ["--m", "1.5"], ["--m", "nan"], ["--queue", "0"], ["--bn-splits", "0"],
                                              ["--bn-splits", "7"], ["--proj-layers", "-1"])),
    *(("simsiam", flags, flags[0]) for flags in (["--pred-dim", "0"], ["--pred-dim", "x"])),
    *(("simsiam_logo", flags, flags[0]) for flags in (["--lam", "nan"], ["--affinity", "l2"], ["--affinity-lr", "-1"], ["--local-size", "2"],
                                                      ["--global-scale", "0", "1"], ["--local-scale", "0.9", "0.1"])),
    *(("linear_eval", flags, flags[0]) for flags in (["--mode", "probe"], ["--label-fraction", "0"], ["--label-fraction", "1.1"],
                                                     ["--label-fraction", "nan"], ["--knn", "0"], ["--knn", "5", "-1"],
                                                     ["--head-layers", "-1"], ["--std", "0", "1", "1"], ["--mean", "nan", "0", "0"]))]


def test_the_table_is_long():
    assert len(WRONG) >= 60 and {name for name, _, _ in WRONG} == {*ALL}


@pytest.mark.parametrize("name, flags, word", WRONG, ids=[f"{n} {' '.join(f)}" for n, f, _ in WRONG])
def test_wrong_flags_end_in_one_line(name, flags, word, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "load_dataset", lambda *a: pytest.fail("read data"))
    refused(capsys, importlib.import_module(name), [*(["x.pt"] if name == "linear_eval" else []), *flags], word)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ALL)
def test_an_error_is_one_write(name, monkeypatch):
    """Under torchrun several processes share an unbuffered standard error: lines written in parts would mix."""
    written = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append, flush=lambda: None))
    with pytest.raises(SystemExit):
        importlib.import_module(name).fail("two\nlines")
    assert written == ["error: two lines\n"]


# ------------------------------------------------------------------------------ wrong data
def several(root, train=(("a", 9), ("b", 9)), test=(("a", 2), ("b", 2))):
    for split, classes in (("train", train), ("test", test)):
        for name, count in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(seed=i).save(root / split / name / f"{i}.png")


def cut(root):
    several(root)
    file = root / "train/a/3.png"
    picture(64, 64).save(file)
    file.write_bytes(file.read_bytes()[:2000])


def bomb(root):
    """A PNG of a kilobyte that claims 50,000 x 50,000 pixels."""
    import struct
    import zlib
    several(root)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    (root / "train/a/bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b""))


DATA = {"missing": (lambda root: None, "not a folder"), "a file": (lambda root: root.write_text(""), "not a folder"),
        "empty": (lambda root: root.mkdir(), "no images"), "without images": (lambda root: (root.mkdir(), (root / "a.txt").write_text("a")), "no images"),
        "text named jpg": (lambda root: (root.mkdir(), (root / "a.jpg").write_text("a")), "a.jpg"), "cut": (cut, "3.png"), "bomb": (bomb, "bomb.png"),
        "class not in train": (lambda root: several(root, test=[("a", 2), ("b", 2), ("c", 2)]), "'c'"),
        "one image": (lambda root: (root.mkdir(), picture().save(root / "a.png")), "more than the 1 training")}


@pytest.mark.parametrize("kind", DATA)
def test_wrong_data_ends_in_one_line(kind, script, flags, capsys, tmp_path):
    make, word = DATA[kind]
    make(tmp_path / "data")
    refused(capsys, script, flags(script, "--data-dir", str(tmp_path / "data")), word)
    assert not (tmp_path / "run").exists() and not [*tmp_path.rglob("*.tmp")]


# ------------------------------------------------------------------------------ during a run
def test_a_full_disk_keeps_the_last_checkpoint(script, flags, whole_runs, capsys, tmp_path, monkeypatch):
    """While the checkpoint or the log of epoch 1 is written; afterwards --resume goes on."""
    _, whole = whole_runs(script)
    save, opened = torch.save, open

    def full(state, path):
        if state["epoch"] == 1:
            Path(path).write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed\nwriting file data/0: No space left on device")
        save(state, path)
    monkeypatch.setattr(torch, "save", full)
    refused(capsys, script, flags(script), "No space left", "holds epoch 0", "--resume", status=1)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint.pt", "log.jsonl"]
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["epoch"] == 0
    monkeypatch.undo()

    def report(record, log, writer):
        if record["epoch"] == 2:
            with opened(log, "a") as file:
                file.write('{"epoch": 2, "lo')
            raise OSError(errno.ENOSPC, "No space left on device")
        original(record, log, writer)
    original = script.report
    monkeypatch.setattr(script, "report", report)
    refused(capsys, script, flags(script, "--resume"), "No space left", "holds epoch 1", status=1)
    monkeypatch.undo()
    assert script.main(flags(script, "--resume"))["loss"] == whole["loss"]
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines[1:]] == [0, 1, 2]


def test_out_of_gpu_memory_is_one_line(script, flags, capsys, monkeypatch):
    def crowded(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
    monkeypatch.setattr(script, "augment", crowded)
    refused(capsys, script, flags(script), "out of GPU memory", "--batch-size 4", status=1)


def test_two_runs_do_not_share_a_folder(script, flags, finished, capsys, tmp_path):
    finished(script)
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    with common.locked(tmp_path / "run"):
        for way in ("--overwrite", "--resume"):
            refused(capsys, script, flags(script, way), "another run writes to")
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before


def start(name, argv, epochs=1):
    """The script as a program, once it has printed so many epochs (all but the last are saved), and the first of them."""
    program = subprocess.Popen([sys.executable, ROOT / f"{name}.py", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"},  # and Ctrl-C, which a shell's background jobs ignore:
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    seen = []
    for line in program.stdout:
        if line.startswith("epoch="):
            seen.append(int(line.split()[0][6:]))
        if len(seen) == epochs:
            return program, seen[0]
    pytest.fail(program.stderr.read())


@pytest.mark.parametrize("name, number", [("simclr", signal.SIGINT), ("simsiam_logo", signal.SIGTERM)])
def test_a_signal_ends_it_in_one_line_that_goes_on(name, number, flags, tmp_path):
    """The line names the epoch that is saved and the command that goes on."""
    module = importlib.import_module(name)
    argv = flags(module, "--epochs", "5000", "--knn-every", "5000")  # more than it will see
    program, _ = start(name, argv, epochs=2)
    program.send_signal(number)
    said, error = program.communicate(timeout=60)
    assert program.returncode == 128 + number and error.count("\n") == 1 and error.startswith("error: stopped: "), error
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["epoch"]
    assert f"holds epoch {saved}, go on with: python {name}.py --dataset" in error
    command = error.strip().split("go on with: python ")[1].split()
    assert command[1:] == [*argv, "--resume"]
    program, begun = start(name, command[1:])
    program.kill()
    program.communicate()
    assert begun == saved + 1


def train_moco(argv):
    """What a child process does."""
    torch.set_num_threads(1)
    moco.main(argv)


def test_kills_at_random_moments_lose_nothing(flags, tmp_path):
    """kill -9, twenty times, start-up included: each leaves a whole checkpoint of the epoch before the current one or later; the
    end is bit-equal to a run that nobody killed."""
    context = fast_start()
    argv = flags(moco, "--epochs", "60", "--knn-every", "60", "--batch-size", "20", "--queue", "15")  # two steps: more kills while saving
    rng, run, kept = random.Random(0), tmp_path / "run", -1

    def start(*more):
        child = context.Process(target=train_moco, args=([*argv, *more],))
        child.start()
        return child

    def logged():
        """Epochs in the log; a line that a kill cut is no epoch."""
        text = (run / "log.jsonl").read_text() if (run / "log.jsonl").exists() else "\n"
        return [json.loads(line)["epoch"] for line in text[:text.rindex("\n") + 1].splitlines()[1:]]

    whole = start("--out", str(tmp_path / "whole"))  # beside
    for i in range(20):
        child, new = start(*["--resume"] if kept >= 0 else []), rng.randrange(3)
        deadline = time.monotonic() + 60
        while child.is_alive() and len(logged()) < kept + 1 + new and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1 if new else 1))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, f"kill {i}: the run ended by itself"
        now = torch.load(run / "checkpoint.pt", weights_only=True)["epoch"] if (run / "checkpoint.pt").exists() else -1
        assert now >= max([-1, *logged()]) - 1 and now >= kept, f"kill {i} lost more than the current epoch"
        kept = now
    for child in (start("--resume"), whole):
        child.join()
        assert child.exitcode == 0
    ours, whole = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (run, tmp_path / "whole"))
    assert ours["epoch"] == 60 and all(ours["model"][key].equal(whole["model"][key]) for key in whole["model"])
    assert logged() == [*range(61)]


def test_only_a_failed_test_leaves_its_files(tmp_path):
    """The tests of a whole run would fill 6 GB of a disk with checkpoints, three times over."""
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    (tmp_path / "test_two.py").write_text("""
import pytest

@pytest.mark.parametrize("good", [False, True])
def test(good, tmp_path):
    (tmp_path / str(good)).touch()
    assert good
""")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "--basetemp", tmp_path / "base"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert [path.name for path in (tmp_path / "base").rglob("*") if path.is_file()] == ["False"]
