"""Runs that go on, begin anew or begin with other weights: kills, signals, full disks, two at once.

Shared text (test_style.py) is tested through simsiam.py, or moco.py, which has most to restore.
"""

import errno
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
import torchvision

import common
import moco
import simclr
import simsiam
import simsiam_logo
from conftest import ROOT, equal, fast_start, load, picture, read_log, refused

CLOCK = ("seconds", "views_s", "knn_seconds")


class Killed(BaseException):
    """As kill -9, that nothing may catch."""


def killed_before_saving(module, epoch, argv):
    """main(argv) up to the moment when the epoch is logged and not yet saved."""
    save = module.save_checkpoint

    def killing(path, state):
        if state["epoch"] == epoch:
            raise Killed
        save(path, state)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "save_checkpoint", killing)
        module.main(argv)


def epochs(out):
    """The numbers of the epochs in the log of a run."""
    return [line["epoch"] for line in read_log(out)[1]]


def curve(out):
    """What a log says of every epoch, but for the time that it took."""
    return [{key: value for key, value in line.items() if key not in CLOCK}
            for line in read_log(out)[1]]


def same_state(a, b):
    """Two runs' checkpoints: weights, buffers, momenta and what else goes on, to the bit."""
    a, b = load(a), load(b)
    assert a.keys() == b.keys()
    return all(equal(a[key], b[key]) for key in a if key not in ("args", "record", "log_end"))


# ------------------------------------------------------------------------------ going on
def test_resume_is_bit_identical(script, flags, whole_runs, tmp_path):
    """Killed between an epoch's line and its checkpoint, twice: as if it never had been."""
    argv, (whole, _), out = flags(script), whole_runs(script), tmp_path / "run"
    killed_before_saving(script, 1, argv)
    assert load(out)["epoch"] == 0 and epochs(out) == [0, 1]
    killed_before_saving(script, 2, [*argv, "--resume"])
    assert load(out)["epoch"] == 1 and epochs(out) == [0, 1, 2]
    end = script.main([*argv, "--resume"])
    assert same_state(out, whole) and curve(out) == curve(whole)
    assert load(out)["record"] == end
    headers, _ = read_log(out)
    assert [header["args"]["resume"] for header in headers] == [False, True, True]


def test_lars_resumes_bit_identically(flags, tmp_path):
    argv = flags(simclr, "--optimizer", "lars", "--warmup", "0.5")
    simclr.main([*argv, "--out", str(tmp_path / "whole")])
    killed_before_saving(simclr, 2, argv)
    simclr.main([*argv, "--resume"])
    assert same_state(tmp_path / "run", tmp_path / "whole")


def test_a_resumed_run_steps_as_its_flags_and_device_say(flags, tmp_path, whole_runs):
    """Of the saved optimizer only the momenta are restored: one kernel is the device's choice."""
    argv, out = flags(simsiam), tmp_path / "run"
    killed_before_saving(simsiam, 2, argv)
    saved = load(out)
    for group in saved["optimizer"]["param_groups"]:
        group["fused"] = True  # as on CUDA
        group["lr"] = 1e30
    torch.save(saved, out / "checkpoint.pt")
    simsiam.main([*argv, "--resume"])
    assert same_state(out, whole_runs(simsiam)[0])
    assert not any(group["fused"] for group in load(out)["optimizer"]["param_groups"])


def test_resuming_a_finished_run_returns_its_end(flags, finished, tmp_path, capsys):
    """Again and again: nothing is trained or saved, the log gains one header in all."""
    end, out = finished(simsiam), tmp_path / "run"
    before = (out / "checkpoint.pt").read_bytes()
    for _ in range(2):
        capsys.readouterr()
        assert simsiam.main(flags(simsiam, "--resume")) == end
        said = capsys.readouterr().out
        assert "0 of 2 epochs to go" in said and said.count("\n") == 3
        assert (out / "checkpoint.pt").read_bytes() == before
        assert epochs(out) == [0, 1, 2] and len(read_log(out)[0]) == 2


def test_resume_with_nothing_there_is_a_new_run(flags, whole_runs, tmp_path):
    """So one command in a loop survives a kill before the first checkpoint."""
    simsiam.main(flags(simsiam, "--resume"))
    out, (whole, _) = tmp_path / "run", whole_runs(simsiam)
    assert same_state(out, whole) and curve(out) == curve(whole)


def test_what_may_change_within_a_run(flags, finished, tmp_path):
    finished(simsiam)
    args = load(tmp_path / "run")["args"]
    simsiam.main(flags(simsiam, "--resume", "--knn-every", "2", "--knn-k", "7", "--workers", "1",
                       "--no-compile"))
    assert load(tmp_path / "run")["args"] == args


# ------------------------------------------------------------------------------ refused
def test_resume_refuses_other_settings(flags, finished, capsys, tmp_path):
    """All that differ are named, and how to begin a new run with these weights."""
    finished(simsiam)
    checkpoint = tmp_path / "run/checkpoint.pt"
    before = checkpoint.read_bytes(), (tmp_path / "run/log.jsonl").read_bytes()
    refused(capsys, simsiam, flags(simsiam, "--resume", "--lr", "0.5", "--seed", "7"),
            "lr was 0.06 and is 0.5", "seed was 0 and is 7", f"--init {checkpoint}", "--out")
    assert before == (checkpoint.read_bytes(), (tmp_path / "run/log.jsonl").read_bytes())
    torch.save({**load(tmp_path / "run"), "method": "byol"}, checkpoint)
    refused(capsys, simsiam, flags(simsiam, "--resume"), "method was byol and is simsiam")


def test_resume_refuses_other_images(flags, finished, folder, capsys, tmp_path):
    """Their place may change, their number not: every epoch's order hangs on it."""
    finished(simsiam)
    (tmp_path / "more/train").mkdir(parents=True)
    (tmp_path / "more/test").symlink_to(folder / "test")
    for name in ("dark", "light"):
        (tmp_path / "more/train" / name).mkdir()
        for file in (folder / "train" / name).iterdir():
            (tmp_path / "more/train" / name / file.name).symlink_to(file)
    argv = flags(simsiam, "--resume", "--data-dir", str(tmp_path / "more"))
    assert simsiam.main(argv)["epoch"] == 2
    picture(16, 16).save(tmp_path / "more/train/dark/new.png")
    refused(capsys, simsiam, argv, "images was 40 and is 41")


def test_resume_refuses_what_is_no_checkpoint(flags, finished, capsys, tmp_path):
    finished(simsiam)
    checkpoint = tmp_path / "run/checkpoint.pt"
    whole = checkpoint.read_bytes()
    for content in (b"", b"garbage", whole[:len(whole) // 2]):
        checkpoint.write_bytes(content)
        refused(capsys, simsiam, flags(simsiam, "--resume"), "checkpoint.pt is not a file of")
        assert checkpoint.read_bytes() == content
    torch.save({"epoch": 1}, checkpoint)  # somebody else's
    refused(capsys, simsiam, flags(simsiam, "--resume"), "checkpoint.pt is not a file of weights")


@pytest.mark.parametrize("kept", [None, -1], ids=["deleted", "truncated"])
def test_resume_refuses_a_log_that_lost_lines(kept, flags, finished, capsys, tmp_path):
    finished(simsiam)
    log = tmp_path / "run/log.jsonl"
    content = log.read_bytes()
    log.unlink()
    if kept:
        log.write_bytes(content[:kept])
    refused(capsys, simsiam, flags(simsiam, "--resume"), "log.jsonl has lost lines", "--overwrite")
    log.write_bytes(content)
    assert simsiam.main(flags(simsiam, "--resume"))["epoch"] == 2


def test_a_log_without_its_checkpoint_is_not_replaced_unasked(flags, finished, capsys, tmp_path):
    """The record of a whole run stays; what a start that was killed left does not stop the next."""
    finished(simsiam)
    (tmp_path / "run/checkpoint.pt").unlink()
    before = (tmp_path / "run/log.jsonl").read_text()
    for way in ((), ("--resume",)):
        refused(capsys, simsiam, flags(simsiam, *way), "no checkpoint beside it", "--overwrite")
        assert (tmp_path / "run/log.jsonl").read_text() == before
    (tmp_path / "run/log.jsonl").write_text(before.splitlines()[0] + "\n")
    assert simsiam.main(flags(simsiam, "--resume"))["epoch"] == 2


def test_a_run_is_not_overwritten_unasked(flags, finished, capsys, tmp_path):
    finished(simsiam)
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    refused(capsys, simsiam, flags(simsiam), "holds a run", "--resume", "--overwrite")
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    simsiam.main(flags(simsiam, "--overwrite", "--epochs", "1"))
    assert load(tmp_path / "run")["epoch"] == 1 and epochs(tmp_path / "run") == [0, 1]


def test_an_overwritten_run_does_not_come_back(flags, finished, tmp_path):
    """Killed before its first checkpoint, the new run leaves nothing of the old one to resume."""
    finished(simsiam)
    killed_before_saving(simsiam, 0, flags(simsiam, "--overwrite", "--seed", "1"))
    assert not (tmp_path / "run/checkpoint.pt").exists()
    assert simsiam.main(flags(simsiam))["epoch"] == 2
    headers, _ = read_log(tmp_path / "run")
    assert [header["args"]["seed"] for header in headers] == [0]


def test_two_runs_do_not_share_a_folder(flags, finished, capsys, tmp_path):
    finished(simsiam)
    checkpoint, log = tmp_path / "run/checkpoint.pt", tmp_path / "run/log.jsonl"
    before = checkpoint.read_bytes(), log.read_bytes()
    with common.locked(log):
        for way in ("--overwrite", "--resume"):
            refused(capsys, simsiam, flags(simsiam, way), "another process writes to", "log.jsonl")
    assert before == (checkpoint.read_bytes(), log.read_bytes())
    assert simsiam.main(flags(simsiam, "--resume"))["epoch"] == 2


# ------------------------------------------------------------------------------ full disks
@pytest.mark.parametrize("failure", ["full", "killed"])
def test_save_checkpoint_keeps_the_old_file(failure, tmp_path, monkeypatch):
    """The file system takes no more than 1 MiB of the new 4 MiB, or a kill comes in between."""
    path = tmp_path / "checkpoint.pt"
    common.save_checkpoint(path, {"epoch": 1, "x": torch.ones(3)})
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    new = {"epoch": 2, "x": torch.ones(2**20)}

    def killed(file):
        raise Killed
    if failure == "killed":
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "fsync", killed)
            common.save_checkpoint(path, new)
    else:
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
        try:
            with pytest.raises(common.UserError, match="cannot write .*make room.*--resume"):
                common.save_checkpoint(path, new)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert [*tmp_path.iterdir()] == [path]  # no part that would fill the disk
    assert path.read_bytes() == before
    common.save_checkpoint(path, {"epoch": 3})
    assert load(tmp_path)["epoch"] == 3


class FullLog:
    """A log on a disk that fills up in the middle of epoch 2's line."""

    def __init__(self, log):
        self.log = log

    def write(self, text):
        if text.startswith('{"epoch": 2'):
            self.log.write(text[:9])
            self.log.flush()
            raise OSError(errno.ENOSPC, "No space left on device")
        self.log.write(text)

    def __getattr__(self, name):
        return getattr(self.log, name)


def test_a_full_disk_keeps_the_last_epoch(flags, whole_runs, capsys, tmp_path, monkeypatch):
    """While the checkpoint or the log is written; afterwards --resume goes on."""
    out, save = tmp_path / "run", torch.save

    def full(state, file):
        if state["epoch"] == 1:
            file.write(b"half")
            raise RuntimeError("PytorchStreamWriter failed\nfile data/0: No space left on device")
        save(state, file)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        refused(capsys, simsiam, flags(simsiam), "No space left", "make room", "--resume")
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "log.jsonl"]
    assert load(out)["epoch"] == 0
    with monkeypatch.context() as patch:
        opened = simsiam.open_log
        patch.setattr(simsiam, "open_log", lambda *a: FullLog(opened(*a)))
        refused(capsys, simsiam, flags(simsiam, "--resume"), "No space left")
    assert load(out)["epoch"] == 1
    simsiam.main(flags(simsiam, "--resume"))
    whole, _ = whole_runs(simsiam)
    assert same_state(out, whole) and curve(out) == curve(whole)


# ------------------------------------------------------------------------------ signals, kills
def test_a_signal_ends_a_run_in_one_line_that_goes_on(flags, tmp_path, monkeypatch):
    """Ctrl-C and kill: status 130, and the typed command with --resume, without --overwrite."""
    running = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        argv = flags(simsiam, "--epochs", "5000", "--knn-every", "5000", "--overwrite",
                     "--out", str(tmp_path / f"signal {number}"))  # a space, to be quoted
        running[number] = argv, subprocess.Popen(
            [sys.executable, ROOT / "simsiam.py", *argv], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            # A shell's background jobs, as this may be one of, ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    for number, (argv, program) in running.items():
        for line in program.stdout:
            if line.startswith("epoch=1 "):
                break
        program.send_signal(number)
        error = program.communicate(timeout=60)[1]
        begins = "stopped: what is saved goes on with: "
        assert program.returncode == 130 and error.startswith(begins), error
        assert error.count("\n") == 1
        command = shlex.split(error.removeprefix(begins))
        assert command[:2] == [sys.executable, str(ROOT / "simsiam.py")]
        assert command[2:] == [*(word for word in argv if word != "--overwrite"), "--resume"]
    out = tmp_path / f"signal {number}"
    saved = load(out)["epoch"]
    killed_before_saving(simsiam, saved + 1, command[2:])  # it goes on
    assert epochs(out) == [*range(saved + 2)]


def test_a_signal_to_a_caller_of_main(flags, capsys, monkeypatch):
    """In a notebook there is no typed command to repeat."""
    def stopped(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(simsiam, "augment", stopped)
    with pytest.raises(SystemExit) as end:
        simsiam.main(flags(simsiam))
    said = "stopped: what is saved goes on with: the same command with --resume\n"
    assert (end.value.code, capsys.readouterr().err) == (130, said)


def train_moco(argv):
    """What a child process does."""
    torch.set_num_threads(1)
    moco.main(argv)


def test_kills_at_random_moments_lose_nothing(flags, tmp_path):
    """kill -9, twelve times, start-up included, always with the same command.

    Each leaves a whole checkpoint of the epoch before the current one or later; the end is
    bit-equal to a run that nobody killed.
    """
    context, run, total = fast_start(), tmp_path / "run", 40
    argv = flags(moco, "--epochs", str(total), "--knn-every", str(total), "--batch-size", "20",
                 "--queue", "15", "--image-size", "8", "--resume")  # two steps an epoch
    rng, kept = random.Random(0), -1

    def start(*more):
        child = context.Process(target=train_moco, args=([*argv, *more],))
        child.start()
        return child

    def logged():
        """Epochs in the log; a line that a kill cut is no epoch."""
        log = run / "log.jsonl"
        text = log.read_text() if log.exists() else ""
        lines = text[:text.rfind("\n") + 1].splitlines()
        return [int(line.split(",")[0].split(":")[1]) for line in lines if '"args"' not in line]

    whole = start("--out", str(tmp_path / "whole"))  # beside
    for i in range(12):
        child, new = start(), rng.randrange(3)
        deadline = time.monotonic() + 60
        while child.is_alive() and len(logged()) < kept + 1 + new and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1 if new else 1))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, f"kill {i}: the run ended by itself"
        now = load(run)["epoch"] if (run / "checkpoint.pt").exists() else -1
        lost = max([-1, *logged()]) - now
        assert lost <= 1 and now >= kept, f"kill {i} lost more than the current epoch"
        kept = now
    for child in (start(), whole):
        child.join()
        assert child.exitcode == 0
    assert same_state(run, tmp_path / "whole") and curve(run) == curve(tmp_path / "whole")
    assert logged() == [*range(total + 1)]


# ------------------------------------------------------------------------------ --init
def test_init_begins_with_a_whole_model_of_its_kind(flags, whole_runs, tmp_path):
    """Buffers, queue and all; the schedule, the momenta and the log are new."""
    source, _ = whole_runs(moco)
    killed_before_saving(moco, 1, flags(
        moco, "--init", str(source / "checkpoint.pt"), "--lr", "0.5", "--seed", "3"))
    begun, before = load(tmp_path / "run"), load(source)
    assert equal(begun["model"], before["model"]) and begun["optimizer"]["state"] == {}
    assert begun["epoch"] == 0 and epochs(tmp_path / "run") == [0, 1]
    assert begun["record"]["knn"] == before["record"]["knn"]


def test_init_takes_the_backbone_of_another_method(flags, whole_runs, tmp_path):
    """Where the whole model does not fit; MoCo's key side begins with it too."""
    source, _ = whole_runs(simclr)
    killed_before_saving(moco, 1, flags(moco, "--init", str(source / "checkpoint.pt")))
    begun, before = load(tmp_path / "run"), load(source)
    assert equal(begun["backbone"], before["backbone"])
    for name, x in before["backbone"].items():
        assert begun["model"][f"f_k.{name}"].equal(x)
    assert not any(begun["model"][f"g.{name}"].equal(before["model"][f"g.{name}"])
                   for name in ("0.weight", "2.weight")
                   if begun["model"][f"g.{name}"].shape == before["model"][f"g.{name}"].shape)


@pytest.mark.parametrize("key", [None, "state_dict"])
def test_init_takes_torchvisions_names(key, flags, tmp_path):
    weights = torchvision.models.resnet18().state_dict()
    torch.save({key: weights} if key else weights, tmp_path / "weights.pth")
    argv = flags(simsiam, "--width", "1", "--stem", "imagenet", "--pred-dim", "8",
                 "--init", str(tmp_path / "weights.pth"))
    killed_before_saving(simsiam, 1, argv)
    ours = load(tmp_path / "run")["backbone"]
    assert ours.keys() == {name for name in weights if not name.startswith("fc.")}
    assert all(x.equal(weights[name]) for name, x in ours.items())


def test_init_from_a_method_with_more_is_its_backbone(flags, whole_runs, tmp_path):
    """LoGo's model holds all of SimSiam's and an affinity: not the whole, the backbone is taken."""
    source = whole_runs(simsiam_logo)[0] / "checkpoint.pt"
    simsiam.main(flags(simsiam, "--init", str(source), "--lr", "1e-8", "--epochs", "1"))
    begun, ours = load(source.parent)["backbone"], load(tmp_path / "run")["backbone"]
    assert all(torch.allclose(ours[key], x, atol=1e-5) for key, x in begun.items()
               if key.endswith("weight"))


def test_init_refuses_other_networks_and_files(flags, whole_runs, capsys, tmp_path):
    """In one line, with the flags that would fit, and before anything is written."""
    source = str(whole_runs(simsiam)[0] / "checkpoint.pt")
    (tmp_path / "text.pt").write_text("no weights")
    for init, more, words in (
            (source, ["--width", "0.5"], ["weights of another network", "--width", "conv1"]),
            (source, ["--arch", "resnet34"], ["--arch", "layer1.2"]),
            (str(tmp_path / "none.pt"), [], ["there is no", "none.pt"]),
            (str(tmp_path / "text.pt"), [], ["text.pt is not a file of weights"])):
        refused(capsys, simsiam, flags(simsiam, "--init", init, *more), *words)
    assert not (tmp_path / "run").exists()


def test_a_run_with_init_goes_on_from_its_own_checkpoint(flags, whole_runs, tmp_path):
    """Resumed, it does not fall back to the weights that it began with."""
    source, _ = whole_runs(simsiam)
    argv = flags(simsiam, "--init", str(source / "checkpoint.pt"))
    simsiam.main([*argv, "--out", str(tmp_path / "whole")])
    killed_before_saving(simsiam, 2, argv)
    simsiam.main([*argv, "--resume"])
    assert same_state(tmp_path / "run", tmp_path / "whole")
    assert not equal(load(tmp_path / "run")["model"], load(source)["model"])


def test_resume_reads_the_warmup_epochs_of_earlier_versions(flags, finished, capsys):
    """Earlier checkpoints hold warmup in epochs: it is compared as a share of them."""
    finished(simsiam)
    path = f"{flags(simsiam)[-1]}/checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    del saved["args"]["warmup"]
    torch.save({**saved, "args": {**saved["args"], "warmup_epochs": 1}}, path)
    refused(capsys, simsiam, flags(simsiam, "--resume"), "warmup was 0.5 and is 0.05")
    simsiam.main(flags(simsiam, "--resume", "--warmup", "0.5"))
