"""The whole run: schedule, log, checkpoint, resume, collapse, wrong input, and what a copier needs."""

import importlib
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.datasets.folder import default_loader

import common
import moco
import simclr
import simsiam
import simsiam_logo
from conftest import OWN, ROOT, SCRIPTS, small_run

KEYS = ["epoch", "loss", "std", "lr", "knn", "views_s", "seconds", "knn_seconds"]


def tree_equal(a, b):
    """All tensors of two checkpoints equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(tree_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(tree_equal, a, b))
    return a == b


def load(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def refused(capsys, module, argv, *words, status=2):
    """main(argv) ends with one line of these words on standard error, and with this status."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        module.main(argv)
    said = capsys.readouterr().err
    assert end.value.code == status and said.startswith("error: ") and said.count("\n") == 1
    assert all(word in said for word in words), said


# ------------------------------------------------------------------------------------- schedule
@pytest.mark.parametrize("total, warmup", [(1, 0), (10, 0), (100, 10), (100, 99)])
def test_learning_rate_is_its_closed_form(total, warmup):
    rates = [simsiam.learning_rate(step, total, 0.3, warmup) for step in range(total)]
    for step in range(warmup):
        assert rates[step] == pytest.approx(0.3 * (step + 1) / warmup)
    for step in range(warmup, total):
        assert rates[step] == pytest.approx(0.15 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))))
    assert max(rates) == pytest.approx(0.3) and min(rates) > 0
    assert rates[max(warmup - 1, 0)] == pytest.approx(0.3)


def test_the_optimizer_follows_the_schedule(script, flags, monkeypatch):
    """Every step's learning rate, scaled by batch / 256, over both epochs, warmup included."""
    seen = []
    real = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step",
                        lambda self, *a, **k: seen.append(self.param_groups[0]["lr"]) or real(self, *a, **k))
    script.main(flags(script, "--lr", "0.5", "--warmup-epochs", "1"))
    base = 0.5 * 8 / 256
    assert seen == [pytest.approx(script.learning_rate(step, 10, base, 5)) for step in range(10)]


def test_fixed_predictor_rate(flags, monkeypatch):
    seen = []
    real = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *a, **k: seen.append(
        [group["lr"] for group in self.param_groups]) or real(self, *a, **k))
    simsiam.main(flags(simsiam, "--fix-pred-lr"))
    base = 0.03 * 8 / 256
    assert [lr for _, lr in seen] == [base] * 10 and seen[-1][0] < base / 10


def test_moving_average_and_queue_move_once_a_step(flags, monkeypatch):
    """Key parameters: one update a step, after it. Queue: both keys of a step, once, after both losses."""
    moves, queued, at_loss = [], [], []
    average, enqueue, loss = moco.momentum_update, moco.enqueue, moco.info_nce
    monkeypatch.setattr(moco, "momentum_update", lambda f, f_k, m: moves.append(m) or average(f, f_k, m))
    monkeypatch.setattr(moco, "enqueue", lambda queue, ptr, k: queued.append(len(k)) or enqueue(queue, ptr, k))
    monkeypatch.setattr(moco, "info_nce", lambda q, k, queue, tau: at_loss.append(queue.clone()) or loss(q, k, queue, tau))
    moco.main(flags(moco))
    assert moves == [0.99] * 20 and queued == [16] * 10  # f and g, 10 steps; 2 x 8 keys
    for first, second in zip(at_loss[::2], at_loss[1::2]):
        assert first.equal(second)  # the second loss does not meet the first one's keys
    assert not at_loss[1].equal(at_loss[2])
    saved = load(flags(moco)[flags(moco).index("--out") + 1])["model"]
    assert saved["ptr"] == 160 % 24
    assert torch.allclose(saved["queue"].norm(dim=1), torch.ones(24), atol=1e-6)


def test_logo_weighs_its_terms(flags, monkeypatch):
    """The means of L_gg and of L_lg: two terms between global views, four from local to global, none of a view with itself or to a local one."""
    outputs, pairs = [], []
    forward = simsiam_logo.Model.forward
    monkeypatch.setattr(simsiam_logo.Model, "forward", lambda self, *x: outputs.append(forward(self, *x)) or outputs[-1])

    def neg_cosine(p, z, stop_gradient):
        ps, zs = outputs[-1][:2]
        pairs.append(tuple(next(i for i, x in enumerate(xs) if x is one) for one, xs in ((p, ps), (z, zs))))
        return 0 * p.sum() - (1 if pairs[-1][0] < 2 else 10)
    monkeypatch.setattr(simsiam_logo, "neg_cosine", neg_cosine)
    end = simsiam_logo.main(flags(simsiam_logo, "--epochs", "1", "--lam", "0"))
    assert end["loss"] == pytest.approx(-(1 + 10))
    assert all(sorted(step) == [(0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1)] for step in zip(*[iter(pairs)] * 6)) and len(pairs) == 30


# -------------------------------------------------------------------------- log and checkpoint
def test_log_and_checkpoint(script, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *a, **k: pytest.fail("compiled on the CPU"))
    argv = flags(script, "--knn-every", "1")
    final = script.main(argv)
    printed = capsys.readouterr().out.splitlines()
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    header, epochs = lines[0], lines[1:]
    assert json.loads(printed[0]) == header and header["args"] == vars(script.parse_args(argv))
    assert header["torch"] == torch.__version__ and header["lr"] == script.parse_args(argv).lr * 8 / 256
    assert [list(line) for line in epochs] == [KEYS] * 3 and [line["epoch"] for line in epochs] == [0, 1, 2]
    assert epochs[0]["loss"] is None and epochs[2] == final and all(0 <= line["knn"] <= 100 for line in epochs)
    for text, line in zip(printed[1:], epochs):
        assert [part.split("=")[0] for part in text.split()] == KEYS
        assert f"knn={line['knn']:.4g}" in text
    saved = load(tmp_path / "run")
    assert saved["method"] == script.__name__ and saved["epoch"] == 2 and saved["args"] == header["args"]
    backbone = common.resnet("resnet18", 1 / 4)
    backbone.load_state_dict(saved["backbone"])
    assert all(saved["model"][f"f.{name}"].equal(value) for name, value in saved["backbone"].items())
    assert saved["mean"].shape == saved["std"].shape == (3,)
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoint.pt", "log.jsonl"]


def test_knn_of_the_log_is_that_of_the_checkpoint(finished, folder, tmp_path):
    final = finished(simsiam)
    f, data = common.resnet("resnet18", 1 / 4), common.load_dataset("folder", folder, 16)
    saved = load(tmp_path / "run")
    f.load_state_dict(saved["backbone"])
    f.eval()
    with torch.no_grad():
        bank, queries = (f(common.normalize(x, saved["mean"], saved["std"])) for x in (data.train_images, data.test_images))
    assert simsiam.knn_accuracy(bank, data.train_labels, queries, data.test_labels, 2) == final["knn"]


def test_same_seed_same_weights_other_seed_others(script, flags, finished, tmp_path):
    finished(script)
    runs = [load(tmp_path / "run")["model"]]
    for name, seed in (("b", "0"), ("c", "1")):
        script.main(flags(script, "--out", str(tmp_path / name), "--seed", seed))
        runs.append(load(tmp_path / name)["model"])
    assert tree_equal(runs[0], runs[1]) and not tree_equal(runs[0], runs[2])


def test_no_epoch_repeats_an_order_or_a_view(flags, monkeypatch):
    """Every epoch meets every image once, in an order of its own, and draws views of its own."""
    orders, views = [], set()
    make, augment = simsiam.batches, simsiam.augment

    def batches(images, order, *rest):
        if len(order) == 40 and len(rest) == 3:  # training's call, which names workers
            orders.append(order.tolist())
        return make(images, order, *rest)

    def augmented(x, args):
        out = augment(x, args)
        views.update(view.numpy().tobytes() for pair in out for view in pair)
        return out
    monkeypatch.setattr(simsiam, "batches", batches)
    monkeypatch.setattr(simsiam, "augment", augmented)
    simsiam.main(flags(simsiam, "--epochs", "3"))
    assert len(orders) == 3 and all(sorted(order) == list(range(40)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0] and len(views) == 3 * 40 * 2


def test_resume_is_bit_identical(script, flags, tmp_path, monkeypatch):
    """Killed after an epoch's log line or its checkpoint: weights, momenta, queue and log end as if never stopped."""
    argv = flags(script, "--epochs", "3", "--knn-every", "1")
    script.main([*argv, "--out", str(tmp_path / "whole")])

    class Killed(BaseException):
        pass
    real = script.save_checkpoint

    def save(path, **state):
        if state["epoch"] > stop:  # this epoch's line is already in the log
            raise Killed
        real(path, **state)

    def curve(name):
        lines = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines()[1:])
        return [[line[key] for key in KEYS[:5]] for line in lines]

    for stop in (0, 2):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(script, "save_checkpoint", save)
            script.main([*argv, "--overwrite"])
        script.main([*argv, "--resume"])
        whole, resumed = load(tmp_path / "whole"), load(tmp_path / "run")
        for saved in (whole, resumed):
            saved["args"].pop("out"), saved["args"].pop("resume")
        assert tree_equal(whole, resumed)
        assert curve("whole") == curve("run")


def test_a_resumed_run_steps_as_its_device_does(script, flags, finished, tmp_path):
    """A checkpoint keeps the optimizer's settings, of which one kernel for all parameters is the device's."""
    finished(script)
    saved = {**load(tmp_path / "run"), "epoch": 1}
    for group in saved["optimizer"]["param_groups"]:
        group["fused"] = True  # as on CUDA
    torch.save(saved, tmp_path / "run/checkpoint.pt")
    script.main(flags(script, "--resume"))
    resumed = load(tmp_path / "run")
    assert resumed["epoch"] == 2 and not any(group["fused"] for group in resumed["optimizer"]["param_groups"])


def test_lars_resumes_bit_identically(flags, tmp_path, monkeypatch):
    argv = flags(simclr, "--optimizer", "lars", "--warmup-epochs", "1")
    simclr.main([*argv, "--out", str(tmp_path / "whole")])
    real = simclr.save_checkpoint
    monkeypatch.setattr(simclr, "save_checkpoint", lambda path, **s: real(path, **s) if s["epoch"] < 2 else sys.exit(9))
    with pytest.raises(SystemExit):
        simclr.main(argv)
    monkeypatch.undo()
    simclr.main([*argv, "--resume"])
    assert all(tree_equal(load(tmp_path / "whole")[part], load(tmp_path / "run")[part]) for part in ("model", "optimizer"))


def test_resuming_a_finished_run_returns_its_end(script, flags, finished, tmp_path):
    argv, end = flags(script), finished(script)
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    assert script.main([*argv, "--resume"]) == end
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 4


def test_an_overwritten_run_does_not_come_back(flags, finished, capsys, monkeypatch):
    """Killed before its first checkpoint, the new run leaves nothing of the old one to resume."""
    argv = flags(simsiam)
    finished(simsiam)
    monkeypatch.setattr(simsiam, "features", lambda *a: sys.exit(9))
    with pytest.raises(SystemExit):
        simsiam.main([*argv, "--overwrite"])
    monkeypatch.undo()
    refused(capsys, simsiam, [*argv, "--resume"], "nothing to resume")
    assert simsiam.main(argv)["epoch"] == 2


def test_a_machine_without_git(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    simsiam.main(flags(simsiam, "--epochs", "1"))
    assert json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[0])["commit"] is None


def test_a_kill_while_saving_keeps_the_old_checkpoint(finished, tmp_path, monkeypatch):
    finished(simsiam)
    before = (tmp_path / "run/checkpoint.pt").read_bytes()

    def half(state, path):
        Path(path).write_bytes(b"half a checkpoint")
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        simsiam.save_checkpoint(tmp_path / "run/checkpoint.pt", epoch=3)
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before


def test_odd_sizes_run(script, flags):
    """40 images in batches of 9 leave 4 over; MoCo's queue of 31 is no multiple of anything."""
    own = ["--queue", "31", "--bn-splits", "3"] if script is moco else []
    assert math.isfinite(script.main(flags(script, "--batch-size", "9", *own))["loss"])


def test_the_last_partial_batch_is_left_out_of_training_only(flags, monkeypatch):
    seen, real = [], simsiam.augment
    monkeypatch.setattr(simsiam, "augment", lambda x, args: seen.append(len(x)) or real(x, args))
    counted = []
    monkeypatch.setattr(simsiam, "knn_accuracy", lambda bank, bl, q, ql, *a: counted.append((len(bank), len(q))) or 0.0)
    simsiam.main(flags(simsiam, "--batch-size", "9"))
    assert seen == [9] * 8 and counted == [(40, 12), (40, 12)]


class Questions(TorchDispatchMode):
    """Notes every operation whose result the host must wait for: a value, or a shape that depends on values."""

    def __init__(self):
        super().__init__()
        self.asked, self.steps = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func.overloadpacket is torch.ops.aten.index and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if masks or func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal,
                                            torch.ops.aten.masked_select):
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_loop_never_waits_for_the_device(script, flags, monkeypatch):
    """Inside a step no value and no shape is asked for by the operations above. Copies to the host (.cpu(), .tolist()) are none of
    them on a CPU and go unseen here: only a GPU's profile shows those."""
    questions, make = Questions(), script.batches

    def batches(images, order, *rest):
        if len(rest) < 3:  # the kNN monitor's call
            yield from make(images, order, *rest)
            return
        for x in make(images, order, *rest):
            questions.steps += 1
            with questions:
                yield x
    monkeypatch.setattr(script, "batches", batches)
    script.main(flags(script))
    assert questions.steps == 10 and questions.asked == []
    with questions:
        torch.ones(1).item(), torch.ones(2)[torch.ones(2) > 0]
    assert len(questions.asked) == 2  # it would have seen them


def test_the_compiled_network_trains_the_same(script, flags, whole_runs, monkeypatch):
    """One graph, without a break, traced once; an eager backend stands for the one that makes kernels."""
    (_, plain), compiled, make, graphs = whole_runs(script), [], torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)
    monkeypatch.setattr(torch, "compile", lambda network, mode: compiled.append(network) or make(network, backend=backend, fullgraph=True))
    end = script.main(flags(script, "--compile"))
    assert len(compiled) == 1 and len(graphs) == 1
    assert "randperm" not in graphs[0].code  # torch 2.11's inductor fails where a whole one is an index
    assert end["loss"] == pytest.approx(plain["loss"], rel=1e-3) and end["knn"] == pytest.approx(plain["knn"], abs=10)


def test_a_compiler_that_fails_is_one_line(script, flags, capsys, monkeypatch):
    """As on a machine without a C compiler: the run is there, and goes on without."""
    make = torch.compile

    def backend(graph, inputs):
        raise FileNotFoundError("no C compiler\nand many lines more")
    monkeypatch.setattr(torch, "compile", lambda network, mode: make(network, backend=backend))
    refused(capsys, script, flags(script, "--compile"), "no C compiler", "go on with --no-compile --resume\n", status=1)
    assert script.main(flags(script, "--no-compile", "--resume"))["epoch"] == 2


def test_other_errors_stay_whole(script, flags, monkeypatch):
    monkeypatch.setattr(script, "normalize", lambda *a: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError):
        script.main(flags(script))


# ------------------------------------------------------------------------------------- collapse
def test_without_stop_gradient_the_output_collapses(tmp_path, monkeypatch):
    """Fig. 2: without it the loss goes towards -1 and std towards 0; with it they do not."""
    images, labels = common.draw_shapes(512, 16)
    images = images[:, :, ::2, ::2].contiguous()
    data = common.Dataset(images, labels, images[:64], labels[:64], common.SHAPES, torch.full((3,), 0.5), torch.full((3,), 0.15))
    monkeypatch.setattr(simsiam, "load_dataset", lambda *a: data)
    monkeypatch.setattr(simsiam, "save_checkpoint", lambda path, **state: None)
    for word, collapsed in (("--stop-gradient", False), ("--no-stop-gradient", True)):
        simsiam.main(["--dataset", "shapes", "--image-size", "8", "--width", "0.25", "--epochs", "12", "--lr", "2",
                      "--batch-size", "128", "--device", "cpu", "--out", str(tmp_path / word), word])
        epochs = [json.loads(line) for line in (tmp_path / word / "log.jsonl").read_text().splitlines()[2:]]
        loss, std = (min(line[key] for line in epochs) for key in ("loss", "std"))
        assert (loss < -0.9 and std < 0.42) if collapsed else (loss > -0.87 and std > 0.5)


@pytest.mark.parametrize("epochs, said", [("2", 0), ("5", 1)])
def test_a_constant_output_is_said_once(script, flags, tmp_path, capsys, monkeypatch, epochs, said):
    """All views alike: std is 0 and the loss that of chance; the third such epoch prints the warning, no other."""
    real = script.augment
    monkeypatch.setattr(script, "augment", lambda x, args: [0 * view for view in real(x, args)])
    monkeypatch.setattr(script, "save_checkpoint", lambda path, **state: None)
    end = script.main(flags(script, "--epochs", epochs, "--lr", "1e-8", "--batch-size", "16"))
    assert end["std"] < 1e-3 and capsys.readouterr().err.count("warning: collapsed") == said
    if script is simclr:
        assert end["loss"] == pytest.approx(math.log(2 * 16 - 1), rel=1e-4)


@pytest.mark.parametrize("std, collapsed", [(0.5, ()), (0.15, ("simsiam", "simsiam_logo")), (0.05, SCRIPTS)])
def test_what_is_called_collapsed(script, flags, capsys, monkeypatch, std, collapsed):
    """Low is relative to the head: 0.15 is a collapse behind a batch norm and the healthy start of a MoCo without one."""
    monkeypatch.setattr(script, "feature_std", lambda z: torch.tensor(std))
    monkeypatch.setattr(script, "save_checkpoint", lambda path, **state: None)
    script.main(flags(script, "--epochs", "3", "--batch-size", "16"))
    assert capsys.readouterr().err.count("warning: collapsed") == (script.__name__ in collapsed)


def test_a_non_finite_loss_stops_the_run(script, flags, tmp_path, capsys, monkeypatch):
    """Epoch and step are named, the last good checkpoint stays."""
    real, steps = script.augment, []

    def poisoned(x, args):
        steps.append(len(x))
        return [view * math.nan if len(steps) == 8 else view for view in real(x, args)]
    monkeypatch.setattr(script, "augment", poisoned)
    refused(capsys, script, flags(script), "nan", "epoch 2, step 3 of 5", "checkpoint.pt holds epoch 1", status=1)
    saved = load(tmp_path / "run")
    assert saved["epoch"] == 1 and all(v.isfinite().all() for v in saved["model"].values())


# ---------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize("argv, words", [
    (["--epochs", "0"], ["--epochs", "0"]), (["--epochs", "2.5"], ["--epochs", "whole number"]),
    (["--batch-size", "1"], ["--batch-size"]), (["--lr", "nan"], ["--lr", "nan"]), (["--lr", "inf"], ["--lr"]),
    (["--lr", "0"], ["--lr"]), (["--lr", "fast"], ["--lr", "fast"]), (["--weight-decay", "-1"], ["--weight-decay"]),
    (["--sgd-momentum", "2"], ["--sgd-momentum"]), (["--knn-tau", "0"], ["--knn-tau"]), (["--width", "0"], ["--width"]),
    (["--dataset", "mnist"], ["mnist", "shapes"]), (["--arch", "vgg"], ["vgg", "resnet18"]), (["--epoch", "3"], ["--epoch"]),
    (["--epochs", "5", "--warmup-epochs", "5"], ["--warmup-epochs 5"]), (["--resume", "--overwrite"], ["exclude"]),
    (["--device", "tpu"], ["tpu"]), (["--seed", "-1"], ["--seed"]), (["--image-size", "4"], ["--image-size"])])
def test_wrong_flags_end_in_one_line_before_any_data(script, capsys, monkeypatch, tmp_path, argv, words):
    monkeypatch.setattr(script, "load_dataset", lambda *a: pytest.fail("data was read"))
    refused(capsys, script, [*argv, "--out", str(tmp_path / "run")], *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has what the test says is absent")
def test_an_absent_device_is_refused(script, capsys):
    refused(capsys, script, ["--device", "cuda"], "--device cuda", "cpu")


def test_a_process_without_its_rank_is_refused(script, flags, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(capsys, script, flags(script), "RANK")


def test_settings_that_do_not_fit_the_data(script, flags, capsys, tmp_path):
    own = ["--bn-splits", "1"] if script is moco else []
    refused(capsys, script, flags(script, "--batch-size", "41", *own), "--batch-size 41", "40")
    refused(capsys, script, flags(script, "--data-dir", str(tmp_path / "none")), "none", "not a folder")
    if script is moco:
        refused(capsys, script, flags(script, "--queue", "33"), "--queue 33", "32")
        refused(capsys, script, flags(script, "--bn-splits", "3"), "--bn-splits 3", "8")
        refused(capsys, script, flags(script, "--bn-splits", "8"), "at least 2")
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_unasked(script, flags, finished, capsys, tmp_path):
    argv = flags(script)
    finished(script)
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    refused(capsys, script, argv, "already holds a run", "--resume", "--overwrite")
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    script.main([*argv, "--overwrite"])


def test_resume_refuses_what_is_not_its_run(script, flags, finished, capsys, tmp_path):
    argv = flags(script)
    refused(capsys, script, [*argv, "--resume"], "nothing to resume")
    assert not (tmp_path / "run").exists()
    finished(script)
    refused(capsys, script, [*argv, "--resume", "--lr", "0.5", "--seed", "7"], "lr was", "is 0.5", "seed was 0 and is 7")
    checkpoint = tmp_path / "run/checkpoint.pt"
    whole = checkpoint.read_bytes()
    for content in (b"", b"garbage", whole[:len(whole) // 2]):
        checkpoint.write_bytes(content)
        refused(capsys, script, [*argv, "--resume"], "checkpoint.pt is not a checkpoint")
    checkpoint.write_bytes(whole)
    (tmp_path / "run/log.jsonl").rename(tmp_path / "log.jsonl")
    refused(capsys, script, [*argv, "--resume"], "log.jsonl")
    other = dict(torch.load(checkpoint, weights_only=True), method="byol")
    torch.save(other, checkpoint)
    refused(capsys, script, [*argv, "--resume"], "method was byol")


def test_a_checkpoint_that_carries_code_is_refused_and_not_run(script, flags, capsys, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)
    (tmp_path / "run").mkdir()
    torch.save({"method": script.__name__, "args": {}, "model": Bomb()}, tmp_path / "run/checkpoint.pt")
    refused(capsys, script, [*flags(script), "--resume"], "not a checkpoint")
    (tmp_path / "run/checkpoint.pt").write_bytes(pickle.dumps(Bomb()))
    refused(capsys, script, [*flags(script), "--resume"], "not a checkpoint")
    assert not (tmp_path / "exploded").exists()


def test_an_out_that_cannot_be_written(script, flags, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    refused(capsys, script, flags(script, "--out", str(tmp_path / "file/run")), "file")


# ------------------------------------------------------------------------------ what users see
def test_help_shows_groups_defaults_and_sources(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in (*SCRIPTS, "linear_eval"):
        with pytest.raises(SystemExit, match="^0$"):
            importlib.import_module(name).main(["--help"])
        said = capsys.readouterr().out
        own = ("judge:", "[SimCLR v2 Sec. 2]") if name == "linear_eval" else ("monitor:", "recipe:", "(default: 512)", f"runs/{name}")
        for word in ("data", "network", "run:", "output:", "(default: auto)", "[MoCo CIFAR demo]", *own):
            assert word in said, (name, word)
        assert "None" not in said and said.count("\n") <= 90  # two screens


def test_views_picture(script, flags, tmp_path, capsys):
    script.main(flags(script, "--save-views", str(tmp_path / "views.png"), "--epochs", "1"))
    columns = 1 + len(script.augment(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), script.parse_args([])))
    picture = default_loader(str(tmp_path / "views.png"))
    assert picture.size == (columns * 18 + 2, 8 * 18 + 2)  # 2 pixels between
    for wrong in (tmp_path / "no/views.png", tmp_path / "views.doc"):  # no folder, no such picture
        refused(capsys, script, flags(script, "--out", str(tmp_path / "b"), "--save-views", str(wrong)), ".")
        assert not (tmp_path / "b").exists()


def test_unlabelled_images_train_without_knn(script, flags, folder, capsys):
    end = script.main(flags(script, "--data-dir", str(folder / "train")))
    assert end["knn"] is None and math.isfinite(end["loss"])
    assert capsys.readouterr().out.count("kNN is off") == 1


def test_tensorboard_is_asked_for_by_name(script, capsys, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    refused(capsys, script, ["--tensorboard"], "pip install tensorboard")


def test_two_files_in_an_empty_folder_train(folder, tmp_path):
    """What a copier takes: the method and common.py, run as a program, which returns 0 and writes only to --out."""
    running = {}
    for name in SCRIPTS:  # at once: a start takes longer than the run
        (tmp_path / name).mkdir()
        for file in (f"{name}.py", "common.py"):
            shutil.copy(ROOT / file, tmp_path / name)
        running[name] = subprocess.Popen(
            [sys.executable, f"{name}.py", *small_run(folder, name), "--epochs", "1"], cwd=tmp_path / name, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    for name, program in running.items():
        said, error = program.communicate()
        assert program.returncode == 0, error
        assert "epoch=1 " in said
        assert {p.name for p in (tmp_path / name).iterdir()} <= {f"{name}.py", "common.py", "runs", "__pycache__"}
        assert sorted(p.name for p in (tmp_path / name / "runs" / name).iterdir()) == ["checkpoint.pt", "log.jsonl"]


def test_nothing_runs_at_import(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(SCRIPTS)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, [*tmp_path.iterdir()]) == (0, "", [])


@pytest.mark.parametrize("name", SCRIPTS)
def test_bf16_reads_the_same_loss_as_fp32(name, flags):
    module = importlib.import_module(name)
    ends = [module.main(flags(module, "--epochs", "1", "--precision", p, "--overwrite"))["loss"] for p in ("fp32", "bf16")]
    assert ends[1] == pytest.approx(ends[0], rel=0.02, abs=0.02)


@pytest.mark.cuda
def test_a_gpu_run_agrees_with_the_cpu(script, flags):
    """The first epoch's loss, in fp32, within what another order of random numbers makes."""
    cpu = script.main(flags(script, "--epochs", "1"))
    gpu = script.main(flags(script, "--epochs", "1", "--device", "cuda", "--precision", "fp32", "--overwrite"))
    assert gpu["loss"] == pytest.approx(cpu["loss"], rel=0.1, abs=0.1)
