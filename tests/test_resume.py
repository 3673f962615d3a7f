"""Runs that are resumed, replaced or begun with other weights; kills, signals and full disks.

Shared code, which test_style.py proves equal in all four scripts, is tested through simsiam.py,
or through moco.py, which has most to restore.
"""

import ast
import errno
import json
import os
import random
import resource
import runpy
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision

import moco
import simclr
import simsiam
import simsiam_logo
from conftest import ROOT, equal, fast_start, load, picture, read_log, refused

fcntl = pytest.importorskip("fcntl")
CLOCK = ("minutes", "views_s")  # what differs between two equal runs


class Killed(BaseException):
    """Stands in for kill -9: nothing may catch it."""


def killed_before_saving(module, epoch, argv):
    """Run main(argv) up to the moment when the epoch is logged and not yet saved."""
    save = module.save_checkpoint

    def killing(path, state):
        if state["epoch"] == epoch:
            raise Killed
        return save(path, state)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "save_checkpoint", killing)
        module.main(argv)


def begins(module, argv):
    """What main(argv) begins to train with: record, model and optimizer; it ends there."""
    restore, begun = module.restore, SimpleNamespace()

    def restored(args, header, model, optimizer):
        begun.record = restore(args, header, model, optimizer)
        begun.model = {name: x.clone() for name, x in model.state_dict().items()}
        begun.optimizer = optimizer.state_dict()
        raise Killed
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, "restore", restored)
        module.main(argv)
    return begun


def new_parts(capsys):
    """The names that the line about --init calls new."""
    line, = [line for line in capsys.readouterr().out.splitlines() if "; new, " in line]
    return set(ast.literal_eval(line[line.rindex("["):]))


def epochs(out):
    """The numbers of the epochs in the log of a run."""
    return [line["epoch"] for line in read_log(out)[1]]


def curve(out):
    """What a log says of every epoch, except for the time that it took."""
    return [{name: value for name, value in line.items() if name not in CLOCK}
            for line in read_log(out)[1]]


def same_state(a, b):
    """Whether the checkpoints of two runs are equal to the bit: weights, buffers, momenta."""
    a, b = load(a), load(b)
    assert a.keys() == b.keys()
    names = a.keys() - {"args", "record", "commit"}
    return all(equal(a[name], b[name]) for name in names)


# ------------------------------------------------------------------------------ resuming
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(
        script, flags, whole_runs, tmp_path):
    """Killed between the log's line of an epoch and its checkpoint."""
    argv, (whole, _), out = flags(script), whole_runs(script), tmp_path / "run"
    killed_before_saving(script, 2, argv)
    assert load(out)["epoch"] == 1 and epochs(out) == [0, 1, 2]
    end = script.main([*argv, "--resume"])
    assert same_state(out, whole) and curve(out) == curve(whole)
    assert load(out)["record"] == end
    headers, _ = read_log(out)
    assert [header["args"]["resume"] for header in headers] == [False, True]


def test_resume_goes_on_after_a_kill_during_the_first_save(flags, whole_runs, tmp_path):
    """The log then has epoch 1 and there is no checkpoint: the run begins anew."""
    argv, (whole, _), out = flags(moco), whole_runs(moco), tmp_path / "run"
    killed_before_saving(moco, 1, argv)
    assert epochs(out) == [0, 1] and not (out / "checkpoint.pt").exists()
    moco.main([*argv, "--resume"])
    assert same_state(out, whole) and curve(out) == curve(whole)


def test_lars_resumes_bit_identically(flags, tmp_path):
    argv = flags(simclr, "--optimizer", "lars", "--warmup", "0.5")
    simclr.main([*argv, "--out", str(tmp_path / "whole")])
    killed_before_saving(simclr, 2, argv)
    simclr.main([*argv, "--resume"])
    assert same_state(tmp_path / "run", tmp_path / "whole")


def test_only_the_momentum_buffers_of_the_optimizer_are_restored(flags, finished, tmp_path):
    """Its other settings come from the flags and the device of the resumed run."""
    finished(simsiam)
    saved = load(tmp_path / "run")
    for group in saved["optimizer"]["param_groups"]:
        group["fused"] = True  # as on CUDA
        group["lr"] = 1e30
    torch.save(saved, tmp_path / "run/checkpoint.pt")
    begun = begins(simsiam, flags(simsiam, "--resume"))
    assert equal(begun.optimizer["state"], saved["optimizer"]["state"])
    assert equal(begun.model, saved["model"])
    for group in begun.optimizer["param_groups"]:
        assert not group["fused"] and group["lr"] == 0.06 * 8 / 256


def test_resuming_a_finished_run_returns_its_last_record(flags, finished, tmp_path, capsys):
    """As often as one likes: nothing is trained or saved, and the log keeps its epochs."""
    end, out = finished(simsiam), tmp_path / "run"
    before = (out / "checkpoint.pt").read_bytes()
    for _ in range(2):
        capsys.readouterr()
        assert simsiam.main(flags(simsiam, "--resume")) == end
        said = capsys.readouterr().out
        assert "epoch 2 of 2" in said and "epoch=" not in said
        assert (out / "checkpoint.pt").read_bytes() == before
        assert epochs(out) == [0, 1, 2]


def test_resume_begins_a_run_if_there_is_none(flags, whole_runs, tmp_path):
    """So the same command in a job queue survives a kill before the first checkpoint."""
    moco.main(flags(moco, "--resume"))
    out, (whole, _) = tmp_path / "run", whole_runs(moco)
    assert same_state(out, whole) and curve(out) == curve(whole)


def test_resume_allows_other_settings_of_the_monitor_and_the_machine(flags, finished, tmp_path):
    finished(simsiam)
    args = load(tmp_path / "run")["args"]
    simsiam.main(flags(simsiam, "--resume", "--knn-every", "2", "--knn-k", "7", "--workers", "1",
                       "--no-compile"))
    assert load(tmp_path / "run")["args"] == args


def test_minutes_count_on_over_a_resume(flags, finished, tmp_path):
    """From those of the saved epoch."""
    finished(moco)
    out = tmp_path / "run"
    saved = load(out)
    saved["record"] |= {"epoch": 1, "minutes": 100}
    torch.save(saved, out / "checkpoint.pt")
    end = moco.main(flags(moco, "--resume"))
    assert 100 < end["minutes"] < 105
    assert epochs(out) == [0, 1, 2]
    assert read_log(out)[1][2] == load(out)["record"] == end


# ------------------------------------------------------------------------------ when to save
@pytest.fixture
def slow_disk(monkeypatch):
    """Every save appears to take 100 seconds; the number of saves so far."""
    passed, clock, write_bytes = [], time.perf_counter, Path.write_bytes

    def written(path, content):
        passed.append(100)
        return write_bytes(path, content)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(passed))
    monkeypatch.setattr(Path, "write_bytes", written)
    return passed


def test_saving_takes_at_most_a_twentieth_of_the_time(slow_disk, tmp_path):
    due = simsiam.save_checkpoint(tmp_path / "checkpoint.pt", {"epoch": 1})
    assert due - time.perf_counter() == pytest.approx(20 * 100, abs=10)
    assert simsiam.SAVE_PAUSE == 20


def test_minutes_include_saving(flags, slow_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(moco, "SAVE_PAUSE", 0)
    moco.main(short_epochs(flags, 2))
    _, first, second = [line["minutes"] for line in read_log(tmp_path / "run")[1]]
    assert first < 1 and 100 / 60 < second < 200 / 60  # the save of epoch 1 took 100 seconds


def test_resume_after_epochs_that_were_not_saved_is_bit_identical(
        flags, slow_disk, tmp_path, capsys, monkeypatch):
    """The first epoch and the last are always saved; the log is cut back to the saved epoch."""
    augment, steps = moco.augment, []

    def poisoned(x, args):
        steps.append(len(x))
        return [view * torch.nan for view in augment(x, args)]
    argv, out = flags(moco, "--epochs", "3"), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(moco, "SAVE_PAUSE", 0)
        moco.main([*argv, "--out", str(tmp_path / "whole")])
        assert len(slow_disk) == 3  # each epoch
    killed_before_saving(moco, 3, argv)
    assert len(slow_disk) == 4
    assert load(out)["epoch"] == 1 and epochs(out) == [0, 1, 2, 3]
    with monkeypatch.context() as patch:
        patch.setattr(moco, "augment", poisoned)
        words = ["the loss is nan at epoch 2, step 1", "epoch 1 is saved"]
        refused(capsys, moco, [*argv, "--resume"], *words, status=1)
    assert epochs(out) == [0, 1]
    moco.main([*argv, "--resume"])
    assert same_state(out, tmp_path / "whole") and curve(out) == curve(tmp_path / "whole")
    assert len(slow_disk) == 4 + 2


# ------------------------------------------------------------------------------ changed logs
NOTE = '{"note": "second try"}\n'
CHANGES = {
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "a note as first line": lambda text: NOTE + text,
    "a note as last line": lambda text: text + NOTE,
    "an epoch that was not saved": lambda text: text + '{"epoch": 3, "loss": 1}\n',
    "a torn last line": lambda text: text + '{"epoch": 3, "lo',
    "no last line end": lambda text: text[:-1],
    "an empty line": lambda text: text + "\n",
    "a line that holds no dict": lambda text: "2026\n" + text}


@pytest.mark.parametrize("change", CHANGES)
def test_resume_keeps_the_saved_epochs_of_a_log_that_was_changed(
        change, flags, finished, whole_runs, tmp_path):
    """By an editor, by hand, or by a kill."""
    finished(moco)
    log = tmp_path / "run/log.jsonl"
    log.write_bytes(CHANGES[change](log.read_text()).encode())
    moco.main(flags(moco, "--resume"))
    text = log.read_text()
    assert text.count(NOTE) == change.startswith("a note")
    log.write_text(text.replace(NOTE, "").replace("2026\n", ""))
    assert curve(tmp_path / "run") == curve(whole_runs(moco)[0])
    assert len(read_log(tmp_path / "run")[0]) == 2


def test_resume_refuses_a_log_that_lost_the_records_of_saved_epochs(
        flags, finished, tmp_path, capsys):
    """Such as a deleted or pretty-printed log, which is left as it is."""
    finished(moco)
    log = tmp_path / "run/log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for text in ("\n".join(json.dumps(line, indent=1) for line in lines), ""):
        log.write_text(text)
        refused(capsys, moco, flags(moco, "--resume"), "do not match, or one is missing",
                "--overwrite")
        assert log.read_text() == text


# ------------------------------------------------------------------------------ refused
def test_resume_refuses_other_settings(flags, finished, capsys, tmp_path):
    """All that differ are named, and how to begin a new run with these weights."""
    finished(simsiam)
    checkpoint = tmp_path / "run/checkpoint.pt"
    before = checkpoint.read_bytes(), (tmp_path / "run/log.jsonl").read_bytes()
    refused(capsys, simsiam, flags(simsiam, "--resume", "--lr", "0.5", "--seed", "7"),
            "lr was 0.06 and is 0.5", "seed was 0 and is 7", f"--init {checkpoint}", "--out")
    assert before == (checkpoint.read_bytes(), (tmp_path / "run/log.jsonl").read_bytes())
    saved = load(tmp_path / "run")
    saved["args"]["method"] = "byol"
    torch.save(saved, checkpoint)
    refused(capsys, simsiam, flags(simsiam, "--resume"), "method was byol and is simsiam")


def test_resume_reads_the_warmup_epochs_of_earlier_versions(flags, finished, capsys, tmp_path):
    """Earlier checkpoints hold the warmup in epochs: it is compared as a share of them."""
    finished(simsiam)
    saved = load(tmp_path / "run")
    del saved["args"]["warmup"]
    saved["args"]["warmup_epochs"] = 1
    torch.save(saved, tmp_path / "run/checkpoint.pt")
    refused(capsys, simsiam, flags(simsiam, "--resume"), "warmup was 0.5 and is 0.05")
    simsiam.main(flags(simsiam, "--resume", "--warmup", "0.5"))


def test_resume_refuses_other_images(flags, finished, folder, capsys, tmp_path):
    """Their folder may change, but not their number: the order of every epoch depends on it."""
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


def test_resume_refuses_a_damaged_checkpoint(flags, finished, capsys, tmp_path):
    """In one line, and leaves the file as it is."""
    finished(simsiam)
    checkpoint = tmp_path / "run/checkpoint.pt"
    whole = checkpoint.read_bytes()
    for content in (b"", b"garbage", whole[:len(whole) // 2]):
        checkpoint.write_bytes(content)
        refused(capsys, simsiam, flags(simsiam, "--resume"), "checkpoint.pt is no", "weights")
        assert checkpoint.read_bytes() == content


def test_resume_refuses_a_checkpoint_of_another_program(flags, finished, capsys, tmp_path):
    finished(simsiam)
    torch.save({"epoch": 1}, tmp_path / "run/checkpoint.pt")
    refused(capsys, simsiam, flags(simsiam, "--resume"), "checkpoint.pt")


def test_a_log_without_its_checkpoint_is_not_replaced_unasked(flags, finished, capsys, tmp_path):
    """Also if a killed start added a header; a log without a trained epoch is replaced."""
    finished(moco)
    log = tmp_path / "run/log.jsonl"
    (tmp_path / "run/checkpoint.pt").unlink()
    before = log.read_text()
    lines = before.splitlines(keepends=True)
    for content in (before, before + lines[0], before + NOTE):
        log.write_text(content)
        refused(capsys, moco, flags(moco), "holds a run", "--overwrite")
        words = ["log.jsonl", "checkpoint", "--overwrite"]
        refused(capsys, moco, flags(moco, "--resume"), *words)
        assert log.read_text() == content
    log.write_text("".join(lines[:2]))  # header and epoch 0
    moco.main(flags(moco, "--resume", "--epochs", "1"))
    assert epochs(tmp_path / "run") == [0, 1]


def test_a_run_is_not_overwritten_unasked(flags, finished, capsys, tmp_path):
    finished(moco)
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    for more in ([], ["--resume", "--overwrite"]):
        refused(capsys, moco, flags(moco, *more), "holds a run", "--resume", "--overwrite")
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    moco.main(flags(moco, "--overwrite", "--epochs", "1"))
    assert load(tmp_path / "run")["epoch"] == 1 and epochs(tmp_path / "run") == [0, 1]


def test_resume_never_continues_a_run_that_was_overwritten(
        flags, finished, tmp_path, monkeypatch):
    """Killed before its first checkpoint, the new run leaves nothing of the old one."""
    def killed(x, args):
        raise Killed
    argv = flags(moco, "--seed", "1")
    finished(moco)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(moco, "augment", killed)
        moco.main([*argv, "--overwrite"])
    assert not (tmp_path / "run/checkpoint.pt").exists()
    (header,), _ = read_log(tmp_path / "run")
    assert header["args"]["seed"] == 1 and epochs(tmp_path / "run") == [0]
    assert begins(moco, [*argv, "--resume"]).record == {}


def test_two_runs_do_not_share_a_folder(flags, finished, capsys, tmp_path):
    finished(simsiam)
    checkpoint, log = tmp_path / "run/checkpoint.pt", tmp_path / "run/log.jsonl"
    before = checkpoint.read_bytes(), log.read_bytes()
    with open(log, "a") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        for way in ("--overwrite", "--resume"):
            words = ["log.jsonl is locked", "choose another --out"]
            refused(capsys, simsiam, flags(simsiam, way), *words)
    assert before == (checkpoint.read_bytes(), log.read_bytes())
    assert simsiam.main(flags(simsiam, "--resume"))["epoch"] == 2


def test_a_file_system_without_locks_is_written_to(flags, monkeypatch):
    """As some network file systems: the run is then not protected from a second one."""
    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", flock)
    assert moco.main(flags(moco, "--epochs", "1"))["epoch"] == 1


# ------------------------------------------------------------------------------ full disks
def limited(path, state):
    """Save a checkpoint where the file system takes no more than 1 MiB of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        simsiam.save_checkpoint(path, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    """If the disk is full after 1 of 4 MiB, and if a kill comes before the renaming."""
    def killed(path, target):
        raise Killed
    path = tmp_path / "checkpoint.pt"
    simsiam.save_checkpoint(path, {"epoch": 1, "x": torch.ones(3)})
    before, state = path.read_bytes(), {"epoch": 2, "x": torch.ones(2**20)}
    with pytest.raises(SystemExit, match="2"):
        limited(path, state)
    assert path.read_bytes() == before
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "replace", killed)
        simsiam.save_checkpoint(path, state)
    assert path.read_bytes() == before
    simsiam.save_checkpoint(path, {"epoch": 3})
    assert load(tmp_path)["epoch"] == 3
    assert [*tmp_path.iterdir()] == [path]  # the temporary file was used again


class FullLog:
    """A log on a disk that fills up in the middle of the line of epoch 2."""

    def __init__(self, log):
        self.log = log

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.log.close()

    def __getattr__(self, name):
        return getattr(self.log, name)

    def write(self, text):
        if text.startswith('{"epoch": 2'):
            self.log.write(text[:9])
            self.log.flush()
            raise OSError(errno.ENOSPC, "No space left on device")
        self.log.write(text)


def test_a_full_disk_is_one_line_and_keeps_the_last_epoch(
        flags, whole_runs, capsys, tmp_path, monkeypatch):
    """While the checkpoint or the log is written; afterwards --resume goes on."""
    out, opened, write_bytes = tmp_path / "run", moco.open_log, Path.write_bytes

    def full(path, content):
        if len(read_log(out)[1]) == 3:
            write_bytes(path, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, content)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        refused(capsys, moco, flags(moco), "checkpoint.tmp", "make room", "No space left")
    assert load(out)["epoch"] == 1 and epochs(out) == [0, 1, 2]
    with monkeypatch.context() as patch:
        patch.setattr(moco, "open_log", lambda *args: FullLog(opened(*args)))
        refused(capsys, moco, flags(moco, "--resume"), "No space left")
    assert load(out)["epoch"] == 1
    moco.main(flags(moco, "--resume"))
    whole, _ = whole_runs(moco)
    assert same_state(out, whole) and curve(out) == curve(whole)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "log.jsonl"]


def test_a_full_disk_at_the_start_of_a_resume_loses_no_record(
        flags, finished, capsys, tmp_path, monkeypatch):
    """The old text is overwritten by itself, so that it needs no room, and cut after that."""
    finished(moco)
    log = tmp_path / "run/log.jsonl"
    before = log.read_text()

    def full(*words, file, **rest):
        file.write("\n".join(words)[:len(before)])
        file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(moco, "print", full, raising=False)
        refused(capsys, moco, flags(moco, "--resume"), "No space left")
    assert log.read_text() == before


# ------------------------------------------------------------------------------ signals, kills
def test_an_interrupt_in_a_notebook_releases_the_log(flags, whole_runs, tmp_path, monkeypatch):
    """Also while the last traceback is kept, as a notebook does: --resume goes on."""
    augment, steps = moco.augment, []

    def interrupted(x, args):
        steps.append(len(x))
        if len(steps) == 8:
            raise KeyboardInterrupt
        return augment(x, args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as kept:
        patch.setattr(moco, "augment", interrupted)
        moco.main(flags(moco))
    out, (whole, _) = tmp_path / "run", whole_runs(moco)
    assert load(out)["epoch"] == 1
    moco.main(flags(moco, "--resume"))
    assert same_state(out, whole) and curve(out) == curve(whole)
    assert kept.traceback


def quiet(errors):
    """Prepare a child process: one thread, and standard error to a file."""
    torch.set_num_threads(1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)


def terminated_at(stage, count):
    """Patch the count-th save, so that the process gets SIGTERM in it: before, in, after."""
    serialise, write_bytes, replace, saves = torch.save, Path.write_bytes, Path.replace, []

    def reached(this):
        if this == stage and len(saves) == count:
            os.kill(os.getpid(), signal.SIGTERM)

    def serialised(state, file):
        saves.append(state["epoch"])
        reached("serialising")
        serialise(state, file)

    def written(path, content):
        write_bytes(path, content[:len(content) // 2])
        reached("writing")
        return write_bytes(path, content)

    def replaced(path, target):
        reached("before renaming")
        replace(path, target)
        reached("after renaming")
    torch.save, Path.write_bytes, Path.replace = serialised, written, replaced


def train_moco(argv, errors, stage=None):
    """What a child process does: it saves each epoch, and may get SIGTERM in its second save."""
    quiet(errors)
    moco.SAVE_PAUSE = 0
    if stage:
        terminated_at(stage, 2)
    moco.main(argv)


def program(file, argv, errors):
    """Runs a script as `python file` does, in a child process that has imported torch."""
    quiet(errors)
    sys.argv = [file, *argv]
    runpy.run_path(file, run_name="__main__")


@pytest.fixture
def start():
    """A function: start a child process; all that still run are killed at the end."""
    context, children = fast_start(), []

    def started(function, *args):
        child = context.Process(target=function, args=args)
        child.start()
        children.append(child)
        return child
    yield started
    for child in children:
        child.kill()
        child.join()


def short_epochs(flags, total):
    """The flags of epochs of two steps, as a queue of jobs repeats them."""
    return flags(moco, "--epochs", str(total), "--knn-every", str(total), "--batch-size", "20",
                 "--queue", "15", "--image-size", "8", "--resume")


def test_sigterm_during_a_save_keeps_a_whole_checkpoint(start, flags, tmp_path):
    """At four moments of a save: no traceback, and --resume goes on to the same weights."""
    run, errors, argv = tmp_path / "run", tmp_path / "errors", short_epochs(flags, 5)
    whole = start(train_moco, [*argv, "--out", str(tmp_path / "whole")], errors)
    stages = ["serialising", "writing", "before renaming", "after renaming"]
    for saved, stage in zip([1, 2, 3, 5], stages):
        child = start(train_moco, argv, errors, stage)
        child.join()
        assert (child.exitcode, errors.read_text()) == (-signal.SIGTERM, ""), stage
        assert load(run)["epoch"] == saved, stage
    whole.join()
    assert whole.exitcode == 0
    assert same_state(run, tmp_path / "whole") and curve(run) == curve(tmp_path / "whole")


def test_ctrl_c_ends_a_program_without_a_traceback(start, flags, tmp_path):
    """By the signal itself, so that a shell sees status 130; the checkpoint stays."""
    run, errors = tmp_path / "run", tmp_path / "errors"
    child = start(program, str(ROOT / "moco.py"), short_epochs(flags, 5000), errors)
    deadline = time.monotonic() + 60
    while not (run / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGINT)
    child.join()
    assert (child.exitcode, errors.read_text()) == (-signal.SIGINT, "")
    assert load(run)["epoch"] > 0


def logged(out):
    """The epochs in a log, without a line that a kill has cut."""
    log = out / "log.jsonl"
    text = log.read_text() if log.exists() else ""
    lines = text[:text.rfind("\n") + 1].splitlines()
    return [json.loads(line)["epoch"] for line in lines if '"args"' not in line]


def test_kills_at_random_moments_lose_nothing(start, flags, tmp_path):
    """SIGKILL or SIGTERM, eight times, start-up included, always with the same command.

    Each leaves a whole checkpoint of the last logged epoch or of the one before. The last run
    ends bit-identical to a run that was never killed.
    """
    run, errors, total = tmp_path / "run", tmp_path / "errors", 40
    argv = short_epochs(flags, total)
    rng, kept = random.Random(0), 0
    whole = start(train_moco, [*argv, "--out", str(tmp_path / "whole")], errors)
    for number in range(8):
        child, new = start(train_moco, argv, errors), rng.randrange(3)
        deadline, wanted = time.monotonic() + 60, kept + 1 + new
        while child.is_alive() and len(logged(run)) < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1 if new else 1))
        kind = rng.choice([signal.SIGKILL, signal.SIGTERM])
        if child.is_alive():
            os.kill(child.pid, kind)
        child.join()
        assert (child.exitcode, errors.read_text()) == (-kind, ""), f"kill {number}"
        now = load(run)["epoch"] if (run / "checkpoint.pt").exists() else 0
        lost = max([0, *logged(run)]) - now
        assert lost <= 1 and now >= kept, f"kill {number} lost more than the current epoch"
        kept = now
    last = start(train_moco, argv, errors)
    for child in (last, whole):
        child.join()
        assert child.exitcode == 0
    assert same_state(run, tmp_path / "whole") and curve(run) == curve(tmp_path / "whole")
    assert logged(run) == [*range(total + 1)]


# ------------------------------------------------------------------------------ --init
def test_init_begins_with_a_whole_model_of_the_same_method(
        flags, whole_runs, tmp_path, capsys):
    """Buffers, queue and all, of a run's folder; the schedule, the momenta and the log are new."""
    source, _ = whole_runs(moco)
    begun = begins(moco, flags(moco, "--init", str(source), "--lr", "0.5", "--seed", "3"))
    assert equal(begun.model, load(source)["model"])
    assert begun.optimizer["state"] == {} and begun.record == {}
    assert new_parts(capsys) == set()
    assert not (tmp_path / "run").exists()


def test_init_takes_the_backbone_of_another_method(flags, whole_runs, capsys):
    """MoCo's key encoder begins with it, too; the line names what is new."""
    source, _ = whole_runs(simsiam)
    begun = begins(moco, flags(moco, "--init", str(source / "checkpoint.pt"))).model
    for name, x in load(source)["backbone"].items():
        assert begun[f"f.{name}"].equal(x) and begun[f"f_k.{name}"].equal(x)
    new = new_parts(capsys)
    assert {"queue", "g.0.weight", "g_k.0.weight"} <= new
    assert not any(name.startswith(("f.", "f_k.")) for name in new)


def test_init_keeps_the_parts_of_a_model_that_fit(flags, whole_runs, capsys):
    """With another --pred-dim the projector is kept and most of the predictor is new."""
    source, _ = whole_runs(simsiam)
    begun = begins(simsiam, flags(simsiam, "--init", str(source), "--pred-dim", "64")).model
    before, new = load(source)["model"], new_parts(capsys)
    names = "h.0.weight h.1.weight h.1.bias h.1.running_mean h.1.running_var h.3.weight"
    assert new == set(names.split())
    assert all(begun[name].equal(x) for name, x in before.items() if name not in new)


def test_init_keeps_the_projector_of_moco_with_another_queue(flags, whole_runs, capsys):
    source, _ = whole_runs(moco)
    begun = begins(moco, flags(moco, "--init", str(source), "--queue", "12")).model
    before = load(source)["model"]
    assert new_parts(capsys) == {"queue"} and len(begun["queue"]) == 12
    assert all(begun[name].equal(x) for name, x in before.items() if name != "queue")


def test_init_takes_what_simsiam_and_logo_share(flags, whole_runs, capsys):
    """LoGo has all of SimSiam's model, and an affinity."""
    source = whole_runs(simsiam_logo)[0]
    logo = load(source)["model"]
    begun = begins(simsiam, flags(simsiam, "--init", str(source))).model
    assert all(x.equal(logo[name]) for name, x in begun.items())
    assert new_parts(capsys) == set()
    source = whole_runs(simsiam)[0]
    begins(simsiam_logo, flags(simsiam_logo, "--init", str(source)))
    assert new_parts(capsys) == {name for name in logo if name.startswith("affinity.")}


@pytest.mark.parametrize("key", [None, "state_dict"])
def test_init_takes_the_names_of_torchvision(key, flags, tmp_path, capsys):
    weights = torchvision.models.resnet18().state_dict()
    torch.save({key: weights} if key else weights, tmp_path / "weights.pth")
    begun = begins(simsiam, flags(
        simsiam, "--width", "1", "--stem", "imagenet", "--pred-dim", "8",
        "--init", str(tmp_path / "weights.pth"))).model
    backbone = {name for name in begun if name.startswith("f.")}
    assert backbone == {f"f.{name}" for name in weights if not name.startswith("fc.")}
    assert all(begun[name].equal(weights[name[2:]]) for name in backbone)
    new = {name for name in begun if "num_batches_tracked" not in name} - backbone
    assert new_parts(capsys) == new


def test_init_takes_the_names_of_the_authors_of_moco(flags, whole_runs, tmp_path):
    backbone = load(whole_runs(simsiam)[0])["backbone"]
    weights = {f"module.encoder_q.{name}": x for name, x in backbone.items()}
    weights["module.encoder_q.fc.weight"] = torch.zeros(128, 128)
    torch.save({"state_dict": weights, "epoch": 7}, tmp_path / "moco.pth")
    begun = begins(simsiam, flags(simsiam, "--init", str(tmp_path / "moco.pth"))).model
    assert all(begun[f"f.{name}"].equal(x) for name, x in backbone.items())


def test_init_refuses_other_networks_and_files(flags, whole_runs, capsys, tmp_path):
    """In one line, which names the flags that may fit, and before anything is written."""
    source = str(whole_runs(simsiam)[0] / "checkpoint.pt")
    (tmp_path / "text.pt").write_text("no weights")
    for init, more, words in (
            (source, ["--width", "0.5"], ["weights", "--width", "conv1"]),
            (source, ["--arch", "resnet34"], ["weights", "--arch", "layer1.2"]),
            (str(tmp_path / "none.pt"), [], ["none.pt is no", "weights"]),
            (str(tmp_path / "text.pt"), [], ["text.pt is no", "weights"])):
        refused(capsys, simsiam, flags(simsiam, "--init", init, *more), *words)
    assert not (tmp_path / "run").exists()


def test_init_with_resume_is_used_only_if_nothing_is_saved(
        flags, whole_runs, finished, tmp_path):
    """One command for a job queue: it begins with the weights and goes on from its checkpoint."""
    source, _ = whole_runs(simsiam)
    begun = begins(simsiam, flags(simsiam, "--init", str(source), "--resume"))
    assert equal(begun.model, load(source)["model"]) and begun.record == {}
    finished(simsiam)
    checkpoint = tmp_path / "run/checkpoint.pt"
    saved = load(tmp_path / "run")
    saved["model"]["h.3.bias"] += 1
    torch.save(saved, checkpoint)
    begun = begins(simsiam, flags(simsiam, "--init", str(source), "--resume"))
    assert equal(begun.model, saved["model"]) and begun.record["epoch"] == 2
