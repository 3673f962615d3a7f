"""A whole run: schedule, training loop, log, checkpoint, collapse, compiled network, output.

Shared code, which test_style.py proves equal in all four scripts, is tested through simsiam.py.
All four scripts run where the methods differ.
"""

import importlib.util
import math
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.datasets.folder import default_loader
from torchvision.transforms.functional import pil_to_tensor

import common
import moco
import simclr
import simsiam
import simsiam_logo
from conftest import ROOT, SCRIPTS, equal, load, read_log, refused, small_run


# ------------------------------------------------------------------------------ schedule
SCHEDULES = [(1, 0), (10, 0), (100, 10), (100, 99)]


@pytest.mark.parametrize("total, warmup", SCHEDULES)
def test_the_learning_rate_equals_its_closed_form(total, warmup):
    rates = [simsiam.learning_rate(step, total, 0.3, warmup) for step in range(total)]
    for step in range(warmup):
        assert rates[step] == pytest.approx(0.3 * (step + 1) / warmup)
    for step in range(warmup, total):
        part = (step - warmup) / (total - warmup)
        assert rates[step] == pytest.approx(0.15 * (1 + math.cos(math.pi * part)))
    assert max(rates) == pytest.approx(0.3) and min(rates) > 0
    assert rates[max(warmup - 1, 0)] == pytest.approx(0.3)


@pytest.fixture
def rates(monkeypatch):
    """The learning rates of SGD's parameter groups at every step from here on."""
    seen, step = [], torch.optim.SGD.step

    def recorded(self, *args, **more):
        seen.append([group["lr"] for group in self.param_groups])
        return step(self, *args, **more)
    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    return seen


@pytest.mark.parametrize("flag", ["--fix-pred-lr", "--no-fix-pred-lr"])
def test_every_step_uses_the_learning_rate_of_the_schedule(flag, flags, rates):
    """Scaled by batch size / 256. --warmup 0.33 of 10 steps is 3; the predictor's is constant."""
    simsiam.main(flags(simsiam, "--lr", "0.5", "--warmup", "0.33", flag))
    base = 0.5 * 8 / 256
    expected = [simsiam.learning_rate(step, 10, base, 3) for step in range(10)]
    assert [encoder for encoder, _ in rates] == pytest.approx(expected)
    if flag == "--fix-pred-lr":
        expected = [base] * 10
    assert [predictor for _, predictor in rates] == pytest.approx(expected)


def test_the_optimizer_has_the_momentum_and_weight_decay_of_the_recipe(script, whole_runs):
    """Every parameter that is trained is in exactly one group."""
    out, _ = whole_runs(script)
    saved, args = load(out), script.parse_args([])
    model = script.Model(lambda: common.resnet(width=0.25), args)
    groups = saved["optimizer"]["param_groups"]
    trained = sum(p.requires_grad for p in model.parameters())
    assert sum(len(group["params"]) for group in groups) == trained
    for group in groups:
        assert group["weight_decay"] == args.weight_decay
        assert group["momentum"] == args.sgd_momentum


# ------------------------------------------------------------------------------ training loop
def test_every_step_runs_in_training_mode_although_the_knn_monitor_does_not(flags, monkeypatch):
    modes, forward = [], simsiam.Model.forward

    def recorded(self, *views):
        modes.append((self.training, self.f.training, self.f.bn1.training))
        return forward(self, *views)
    monkeypatch.setattr(simsiam.Model, "forward", recorded)
    simsiam.main(flags(simsiam, "--knn-every", "1"))
    assert modes == [(True, True, True)] * 10


def test_every_epoch_draws_a_new_order_and_new_views(flags, monkeypatch):
    """Every epoch uses every image once, in its own order, and draws its own views."""
    orders, views = [], set()
    make, augment = simsiam.batches, simsiam.augment

    def batches(images, order, *rest, **more):
        if len(rest) == 3:  # training's call, which passes --workers
            orders.append(order.tolist())
        return make(images, order, *rest, **more)

    def augmented(x, args):
        out = augment(x, args)
        views.update(view.numpy().tobytes() for pair in out for view in pair)
        return out
    monkeypatch.setattr(simsiam, "batches", batches)
    monkeypatch.setattr(simsiam, "augment", augmented)
    simsiam.main(flags(simsiam, "--epochs", "3"))
    assert len(orders) == 3 and all(sorted(order) == [*range(40)] for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert len(views) == 3 * 40 * 2


def test_the_last_partial_batch_is_left_out_of_training_but_not_of_the_knn(flags, monkeypatch):
    seen, counted, augment = [], [], simsiam.augment

    def augmented(x, args):
        seen.append(len(x))
        return augment(x, args)

    def knn_accuracy(bank, bank_labels, queries, *rest):
        counted.append((len(bank), len(queries)))
        return 0.0
    monkeypatch.setattr(simsiam, "augment", augmented)
    monkeypatch.setattr(simsiam, "knn_accuracy", knn_accuracy)
    simsiam.main(flags(simsiam, "--batch-size", "9"))
    assert seen == [9] * 8 and counted == [(40, 12)] * 2


def test_moco_runs_with_sizes_that_do_not_divide_each_other(flags):
    """40 images in batches of 9 leave 4 over; a queue of 31 is no multiple of 18 keys."""
    argv = flags(moco, "--batch-size", "9", "--queue", "31", "--bn-splits", "3")
    assert math.isfinite(moco.main(argv)["loss"])


def test_momentum_update_and_enqueue_run_once_a_step(flags, tmp_path, monkeypatch):
    """The queue takes the keys of both views after both losses are computed."""
    moves, queued, at_loss = [], [], []
    average, enqueue, loss = moco.momentum_update, moco.enqueue, moco.info_nce

    def averaged(f, f_k, m):
        moves.append(m)
        average(f, f_k, m)

    def enqueued(queue, ptr, k):
        queued.append(len(k))
        return enqueue(queue, ptr, k)

    def info_nce(q, k, queue, tau):
        at_loss.append(queue.clone())
        return loss(q, k, queue, tau)
    monkeypatch.setattr(moco, "momentum_update", averaged)
    monkeypatch.setattr(moco, "enqueue", enqueued)
    monkeypatch.setattr(moco, "info_nce", info_nce)
    moco.main(flags(moco))
    assert moves == [0.99] * 20 and queued == [16] * 10  # f and g, 10 steps; 2 x 8 keys
    for first, second in zip(at_loss[::2], at_loss[1::2]):
        assert first.equal(second)  # the second loss does not see the first one's keys
    assert not at_loss[1].equal(at_loss[2])
    saved = load(tmp_path / "run")["model"]
    assert saved["ptr"] == 160 % 24
    assert torch.allclose(saved["queue"].norm(dim=1), torch.ones(24), atol=1e-6)


def test_logo_minimises_logo_loss_and_the_loss_of_the_affinity(flags, rates, monkeypatch):
    """The logged loss is logo_loss alone; with a constant logo_loss only the affinity changes."""
    given, states = [], []

    def logo_loss(p, z, l_ll, lam, pair_loss):
        given.append((len(p), len(z), l_ll.shape, lam, pair_loss.keywords))
        return 0 * (p[0].sum() + l_ll.sum()) - 11

    def save_checkpoint(path, state):
        states.append({name: x.clone() for name, x in state["model"].items()})
        return 0
    monkeypatch.setattr(simsiam_logo, "logo_loss", logo_loss)
    monkeypatch.setattr(simsiam_logo, "save_checkpoint", save_checkpoint)
    end = simsiam_logo.main(flags(
        simsiam_logo, "--lam", "0.25", "--weight-decay", "0", "--warmup", "0",
        "--affinity-lr", "0.5", "--no-stop-gradient"))
    assert end["loss"] == pytest.approx(-11) and end["affinity_loss"] > 0
    assert given == [(4, 4, (8,), 0.25, {"stop_gradient": False})] * 10
    encoder = [simsiam_logo.learning_rate(step, 10, 0.06 * 8 / 256) for step in range(10)]
    assert [step[0] for step in rates] == pytest.approx(encoder)
    assert [step[1:] for step in rates] == [[0.06 * 8 / 256, 0.5 * 8 / 256]] * 10
    before, after = states
    changed = {name for name in before if not before[name].equal(after[name])}
    changed = {name for name in changed if "running" not in name and "num_batches" not in name}
    assert changed == {name for name in before if name.startswith("affinity.")}


# ------------------------------------------------------------------------------ log, checkpoint
def test_the_log_and_the_checkpoint_hold_what_they_should(script, whole_runs):
    """The log holds only what was measured; the checkpoint also what --resume needs."""
    out, end = whole_runs(script)
    (header,), epochs = read_log(out)
    extra = ["affinity_loss"] if script is simsiam_logo else []
    trained = ["epoch", "loss", "std", *extra, "lr", "views_s"]
    assert [[*line] for line in epochs] == [
        ["epoch", "knn", "minutes"], [*trained, "minutes"], [*trained, "knn", "minutes"]]
    assert [line["epoch"] for line in epochs] == [0, 1, 2] and epochs[2] == end
    assert 0 <= end["knn"] <= 100 and math.isfinite(end["loss"])
    assert 0 < epochs[0]["minutes"] < epochs[1]["minutes"] < end["minutes"] < 10
    saved = load(out)
    args = script.parse_args(small_run("images", script.__name__))
    recipe = {**vars(args), "out": str(out), "data_dir": header["args"]["data_dir"]}
    assert [*header] == ["args", "data", "commit", "torch", "device"]
    assert header["args"] == saved["args"] == recipe
    assert header["args"]["method"] == script.__name__
    assert header["data"]["images"] == 40 and header["data"]["pixels"] == 16
    assert header["torch"] == torch.__version__
    assert header["device"] == f"1 x cpu, {torch.get_num_threads()} threads"
    assert [*saved] == [*header, "epoch", "record", "mean", "std", "backbone", "model",
                        "optimizer"]
    assert saved["epoch"] == 2 and saved["record"] == end
    assert all(saved[key] == header[key] for key in header)
    backbone = common.resnet("resnet18", 1 / 4)
    backbone.load_state_dict(saved["backbone"])
    assert all(saved["model"][f"f.{name}"].equal(x) for name, x in saved["backbone"].items())
    assert saved["mean"].shape == saved["std"].shape == (3,)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "log.jsonl"]


def test_the_screen_shows_the_run_and_a_line_for_each_epoch(flags, tmp_path, capsys, monkeypatch):
    """Data, two lines about the run, an epoch a line with the time left, what was written."""
    def compile(*args, **more):
        pytest.fail("compiled on the CPU")
    common.load_dataset("folder", flags(simsiam)[3], 16)  # decodes, if no test has done so
    capsys.readouterr()
    monkeypatch.setattr(torch, "compile", compile)
    end = simsiam.main(flags(simsiam))
    said, error = capsys.readouterr()
    lines = said.splitlines()
    assert error == "" and len(lines) == 7
    assert "40 images to train on, 12 " in lines[0] and "2 classes" in lines[0]
    (header,), epochs = read_log(tmp_path / "run")
    assert lines[1] == f"simsiam: resnet18 on {header['device']}; {header['data']}"
    assert lines[2] == f"epoch 0 of 2, kNN with k = 40, to {tmp_path / 'run'}"
    for text, record in zip(lines[3:6], epochs, strict=True):
        measured = [f"{name}={value:.4g}" for name, value in record.items()]
        left = [] if record["epoch"] == 0 else ["left=0min"]
        assert text.split() == [*measured, *left]
    assert f" knn={end['knn']:.4g} " in lines[5]
    assert str(tmp_path / "run") in lines[6] and "linear_eval.py" in lines[6]


def test_the_time_left_follows_from_the_minutes_so_far(tmp_path, capsys):
    args = SimpleNamespace(epochs=100)
    with open(tmp_path / "log", "w") as log:
        record = {"epoch": 40, "std": 0.5}
        simsiam.write_record(log, record, args, time.perf_counter() - 60 * 60)
    assert record["minutes"] == pytest.approx(60, abs=0.1)
    assert capsys.readouterr().out == "epoch=40 std=0.5 minutes=60 left=90min\n"


def test_minutes_include_loading_the_data(flags, tmp_path, monkeypatch):
    """From the start of main on: here loading appears to take ten minutes."""
    passed, clock, load_dataset = [0], time.perf_counter, simsiam.load_dataset

    def slow(*args):
        passed[0] = 600
        return load_dataset(*args)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + passed[0])
    monkeypatch.setattr(simsiam, "load_dataset", slow)
    simsiam.main(flags(simsiam, "--epochs", "1"))
    minutes = [line["minutes"] for line in read_log(tmp_path / "run")[1]]
    assert 10 < minutes[0] < minutes[1] < 12


def black_images(count):
    """A data set of one class, the same for training and testing."""
    images = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    labels = torch.zeros(count, dtype=torch.long)
    mean, std = torch.zeros(3), torch.ones(3)
    return common.Dataset(images, labels, images, labels, ("black",), mean, std)


PAUSES = [(200, 5), (80, 2), (79, 1), (1, 1)]


@pytest.mark.parametrize("epochs, every", PAUSES)
def test_knn_is_taken_every_fortieth_of_the_epochs(epochs, every, tmp_path, monkeypatch):
    """And before training and after the last epoch."""
    tested = []

    def monitor(*args):
        tested.append(len(read_log(tmp_path)[1]))  # as many as the epoch's number
        return {}

    def network(x1, x2):  # in place of the model, to save time
        return [torch.zeros(2, 4, requires_grad=True) for _ in range(4)]
    monkeypatch.setattr(simsiam, "wrap", lambda *args: network)
    monkeypatch.setattr(simsiam, "knn_monitor", monitor)
    monkeypatch.setattr(simsiam, "save_checkpoint", lambda path, state: 0)
    args = simsiam.parse_args([
        "--out", str(tmp_path), "--width", "0.25", "--pred-dim", "1", "--batch-size", "2",
        "--device", "cpu", "--epochs", str(epochs)])
    simsiam.train(args, black_images(2))
    assert tested == sorted({0, *range(every, epochs + 1, every), epochs})


def test_the_logged_knn_is_that_of_the_checkpoint(whole_runs, folder):
    out, end = whole_runs(simsiam)
    saved, f = load(out), common.resnet("resnet18", 1 / 4)
    data = common.load_dataset("folder", folder, 16)
    f.load_state_dict(saved["backbone"])
    f.eval()
    with torch.no_grad():
        bank, queries = (f(common.normalize(x, saved["mean"], saved["std"]))
                         for x in (data.train_images, data.test_images))
    knn = simsiam.knn_accuracy(bank, data.train_labels, queries, data.test_labels, 2)
    assert knn == end["knn"]


def test_without_a_test_split_the_logged_knn_leaves_one_image_out(flags, folder, tmp_path):
    """Each training image is tested on all others: its own label does not vote."""
    images = tmp_path / "images"
    shutil.copytree(folder / "train", images)
    end = simsiam.main(flags(simsiam, "--data-dir", str(images), "--knn-k", "1"))
    assert ["knn" in line for line in read_log(tmp_path / "run")[1]] == [True, False, True]
    saved, f = load(tmp_path / "run"), common.resnet("resnet18", 1 / 4)
    data = common.load_dataset("folder", images, 16)
    assert data.test_labels is None and len(data.train_images) == 40
    f.load_state_dict(saved["backbone"])
    f.eval()
    with torch.no_grad():
        bank = f(common.normalize(data.train_images, saved["mean"], saved["std"]))
    bank = torch.nn.functional.normalize(bank, dim=1)
    nearest = (bank @ bank.T - 9 * torch.eye(40)).argmax(1)
    right = data.train_labels[nearest] == data.train_labels
    assert end["knn"] == pytest.approx(100 * right.float().mean().item())


def test_images_without_labels_train_without_knn(flags, folder, tmp_path, capsys):
    shutil.copytree(folder / "train/dark", tmp_path / "images")
    end = simsiam.main(flags(simsiam, "--data-dir", str(tmp_path / "images")))
    assert "knn" not in end and math.isfinite(end["loss"])
    said = capsys.readouterr().out
    assert "0 classes" in said and "knn=" not in said


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
        flags, whole_runs, tmp_path):
    whole = load(whole_runs(moco)[0])["model"]
    moco.main(flags(moco))
    assert equal(load(tmp_path / "run")["model"], whole)
    moco.main(flags(moco, "--seed", "1", "--epochs", "1", "--overwrite"))
    other = load(tmp_path / "run")["model"]
    assert not any(other[name].equal(whole[name]) for name in ("f.conv1.weight", "queue"))


def test_a_machine_without_git_logs_no_commit(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    simsiam.main(flags(simsiam, "--epochs", "1"))
    (header,), _ = read_log(tmp_path / "run")
    assert header["commit"] is None and header["torch"] == torch.__version__


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_is_read_without_a_shell(tmp_path, monkeypatch, whole_runs):
    """The name of the checkout's folder is no command; changed files are told by -dirty."""
    folder = tmp_path / "$(touch PWNED); `touch PWNED`"
    folder.mkdir()
    shutil.copy(ROOT / "common.py", folder)

    def git(*words):
        command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return done.stdout.strip()
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    spec = importlib.util.spec_from_file_location("copied_common", folder / "common.py")
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    monkeypatch.setattr(simsiam, "resnet", copied.resnet)
    monkeypatch.chdir(tmp_path)
    args, data = simsiam.parse_args([]), black_images(1)
    commit = git("describe", "--always")
    assert commit and simsiam.describe(args, data)["commit"] == commit
    (folder / "common.py").write_text("changed")
    assert simsiam.describe(args, data)["commit"] == f"{commit}-dirty"
    assert not [*tmp_path.rglob("PWNED")]


def test_main_takes_the_name_of_the_method(folder, tmp_path, capsys, monkeypatch):
    """It is in the log, on the screen and in the default of --out."""
    monkeypatch.chdir(tmp_path)
    simsiam.main([*small_run(folder, "simsiam"), "--epochs", "1"], method="byol")
    (header,), _ = read_log(tmp_path / "runs/byol")
    assert header["args"]["method"] == "byol" and header["args"]["out"] == "runs/byol"
    assert "\nbyol: resnet18 on " in capsys.readouterr().out
    assert load(tmp_path / "runs/byol")["args"] == header["args"]


# ------------------------------------------------------------------------------ the device
class Questions(TorchDispatchMode):
    """Records every operation whose result the host waits for: a value, or a shape by values."""

    asking = [getattr(torch.ops.aten, name) for name in (
        "_local_scalar_dense", "nonzero", "equal", "masked_select")]

    def __init__(self):
        super().__init__()
        self.asked, self.steps = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func.overloadpacket is torch.ops.aten.index and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if masks or func.overloadpacket in self.asking:
            self.asked.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_training_step_never_waits_for_the_device(script, flags, monkeypatch):
    """No step reads a value from the device by the operations above.

    Copies to the host (.cpu(), .tolist()) cannot be seen on a CPU: a GPU's profile shows those.
    """
    questions, make = Questions(), script.batches

    def batches(images, order, *rest, **more):
        if len(rest) < 3:  # the kNN monitor's call
            yield from make(images, order, *rest, **more)
            return
        for x in make(images, order, *rest):
            questions.steps += 1
            with questions:
                yield x
    monkeypatch.setattr(script, "batches", batches)
    script.main(flags(script, "--epochs", "1"))
    assert questions.steps == 5 and questions.asked == []
    with questions:
        torch.ones(1).item(), torch.ones(2)[torch.ones(2) > 0]
    assert len(questions.asked) == 2  # it would have seen them


@pytest.mark.parametrize("script", [moco, simsiam_logo], ids=lambda module: module.__name__)
def test_the_compiled_network_trains_as_the_plain_one(script, flags, monkeypatch):
    """It is one graph, traced once. An eager backend stands in for the compiler's."""
    compiled, make, graphs = [], torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def eager(network, mode):
        compiled.append(network)
        return make(network, backend=backend, fullgraph=True)
    # A ResNet of half the depth, to trace half as much.
    monkeypatch.setitem(common.ARCHS, "resnet18", (common.BasicBlock, 1, 1, 1, 1))
    plain = script.main(flags(script, "--epochs", "1"))
    monkeypatch.setattr(torch, "compile", eager)
    end = script.main(flags(script, "--epochs", "1", "--overwrite", "--compile"))
    assert len(compiled) == 1 and len(graphs) == 1
    assert "randperm" not in graphs[0].code  # as an index, torch 2.11's inductor fails at it
    assert end["loss"] == pytest.approx(plain["loss"], rel=1e-3, abs=1e-5)
    assert end["knn"] == pytest.approx(plain["knn"], abs=10)


@pytest.mark.parametrize("script", [moco, simsiam_logo], ids=lambda module: module.__name__)
def test_bf16_gives_the_same_loss_as_fp32(script, flags, whole_runs):
    """In the first epoch, in which the schedules of one and of two epochs differ little."""
    _, (_, full, _) = read_log(whole_runs(script)[0])
    low = script.main(flags(script, "--precision", "bf16", "--epochs", "1"))
    assert low["loss"] == pytest.approx(full["loss"], rel=0.02, abs=0.02)
    assert low["loss"] != full["loss"]


@pytest.mark.cuda
def test_a_gpu_run_agrees_with_the_cpu(script, flags, whole_runs, tmp_path):
    """In the first epoch's loss, in fp32, up to what other random numbers change."""
    out, _ = whole_runs(script)
    script.main(flags(script, "--device", "cuda", "--precision", "fp32"))
    cpu, gpu = read_log(out)[1][1], read_log(tmp_path / "run")[1][1]
    assert gpu["loss"] == pytest.approx(cpu["loss"], rel=0.1, abs=0.1)


# ------------------------------------------------------------------------------ what goes wrong
def test_without_stop_gradient_the_outputs_collapse(tmp_path, monkeypatch):
    """Fig. 2: without it the loss goes towards -1 and std towards 0; with it they do not."""
    images, labels = common.draw_shapes(256, 16)
    images = images[:, :, ::2, ::2].contiguous()
    data = common.Dataset(images, labels, images[:64], labels[:64], common.SHAPES,
                          torch.full((3,), 0.5), torch.full((3,), 0.15))
    monkeypatch.setattr(simsiam, "load_dataset", lambda *args: data)
    monkeypatch.setattr(simsiam, "save_checkpoint", lambda path, state: 0)
    for word, collapsed in (("--stop-gradient", False), ("--no-stop-gradient", True)):
        simsiam.main(["--dataset", "shapes", "--image-size", "8", "--width", "0.25",
                      "--epochs", "5", "--warmup", "0", "--lr", "4", "--batch-size", "64",
                      "--knn-every", "5", "--device", "cpu", "--out", str(tmp_path / word), word])
        epochs = read_log(tmp_path / word)[1][1:]
        loss, std = (min(line[key] for line in epochs) for key in ("loss", "std"))
        if collapsed:
            assert loss < -0.78 and std < 0.6
        else:
            assert loss > -0.6 and std > 0.75


def test_a_collapse_is_told_in_the_line_of_its_epoch(flags, capsys, monkeypatch):
    """If std is below 0.1; the line before training has no std and no warning."""
    stds = iter([0.05] * 5 + [0.15] * 5)
    monkeypatch.setattr(simsiam, "feature_std", lambda z: torch.tensor(next(stds)))
    simsiam.main(flags(simsiam))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch=")]
    warning = " warning: the outputs have collapsed"
    assert [warning in line for line in said] == [False, True, False]


def test_constant_views_give_the_loss_of_chance_and_a_collapse(flags, capsys, monkeypatch):
    """If all views are alike, std is 0 and SimCLR's loss is log(2B - 1)."""
    real = simclr.augment
    monkeypatch.setattr(simclr, "augment", lambda x, args: [0 * view for view in real(x, args)])
    end = simclr.main(flags(simclr, "--epochs", "1", "--lr", "1e-8"))
    assert end["std"] < 1e-3
    assert end["loss"] == pytest.approx(math.log(2 * 8 - 1), rel=1e-4)
    assert capsys.readouterr().out.count(" warning: the outputs have collapsed") == 1


def not_finite(monkeypatch, bad_step):
    """Makes the views of one step, counted from 1, and so its loss, not a number."""
    real, steps = simsiam.augment, []

    def augmented(x, args):
        steps.append(len(x))
        factor = math.nan if len(steps) == bad_step else 1
        return [factor * view for view in real(x, args)]
    monkeypatch.setattr(simsiam, "augment", augmented)


def test_a_loss_that_is_not_finite_stops_the_run(flags, tmp_path, capsys, monkeypatch):
    """The line names epoch, step and the saved epoch; that checkpoint stays."""
    not_finite(monkeypatch, 8)
    refused(capsys, simsiam, flags(simsiam), "the loss is nan at epoch 2, step 3 of 5",
            "--lr", "epoch 1 is saved", status=1)
    saved = load(tmp_path / "run")
    assert saved["epoch"] == 1
    assert all(x.isfinite().all() for x in saved["model"].values())
    assert [line["epoch"] for line in read_log(tmp_path / "run")[1]] == [0, 1]


def test_a_first_loss_that_is_not_finite_names_no_saved_epoch(
        flags, tmp_path, capsys, monkeypatch):
    """Nothing is saved before the first epoch ends."""
    not_finite(monkeypatch, 1)
    with pytest.raises(SystemExit, match="^1$"):
        simsiam.main(flags(simsiam))
    said = capsys.readouterr().err
    assert "the loss is nan at epoch 1, step 1 of 5" in said and said.count("\n") == 1
    assert not (tmp_path / "run/checkpoint.pt").exists()
    assert "epoch 0 is saved" not in said


def test_out_of_memory_is_one_line(flags, capsys, monkeypatch):
    def augment(x, args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nSee ...")
    monkeypatch.setattr(simsiam, "augment", augment)
    refused(capsys, simsiam, flags(simsiam), "smaller batch", "9 GiB", status=1)


def test_other_errors_keep_their_traceback(flags, monkeypatch):
    monkeypatch.setattr(simsiam, "normalize", lambda *args: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError):
        simsiam.main(flags(simsiam))


# ------------------------------------------------------------------------------ what users see
def test_help_shows_defaults_and_sources(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="^0$"):
        script.main(["--help"])
    said = capsys.readouterr().out
    assert said.count("\n") <= 100  # two screens
    said = " ".join(said.split())
    for word in ("(default: auto)", "(default: 512)", "[MoCo CIFAR demo]", "--no-resume",
                 f"(default: runs/{script.__name__})"):
        assert word in said, word


def test_help_needs_no_docstrings(capsys, monkeypatch):
    """python -OO strips them."""
    monkeypatch.setattr(simsiam, "__doc__", None)
    with pytest.raises(SystemExit, match="^0$"):
        simsiam.main(["--help"])
    assert "(default: 512)" in capsys.readouterr().out


def test_save_views_draws_the_first_eight_images_and_their_views(flags, tmp_path, capsys):
    """A row for each image, the image first; small views are enlarged; 2 pixels between."""
    argv = flags(simsiam_logo, "--epochs", "1", "--local-size", "8", "--save-views")
    simsiam_logo.main([*argv, str(tmp_path / "views.png")])
    drawn = pil_to_tensor(default_loader(str(tmp_path / "views.png")))
    assert drawn.shape == (3, 8 * 18 + 2, 5 * 18 + 2)
    images = common.load_dataset("folder", argv[3], 16).train_images[:8]
    for number, image in enumerate(images):
        row = drawn[:, 18 * number + 2:18 * number + 18]
        assert row[:, :, 2:18].equal(image)
        for left in (20, 38, 56, 74):
            assert not row[:, :, left:left + 16].equal(image)
    wrong = str(tmp_path / "no/views.png")
    refused(capsys, simsiam_logo, [*argv, wrong, "--out", str(tmp_path / "b")], "no/views.png")
    assert not (tmp_path / "b").exists()


def test_nothing_runs_at_import(script, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script", "--nonsense"])
    spec = importlib.util.spec_from_file_location("again", script.__file__)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert (*capsys.readouterr(), [*tmp_path.iterdir()]) == ("", "", [])


OUTPUTS = {  # what becomes of each program's standard output
    "simclr": "",
    "moco": "| head -1",
    "simsiam": "> /dev/full",
    "simsiam_logo": ">&-",
}


@pytest.fixture(scope="module")
def programs(folder, tmp_path_factory):
    """Each script and common.py in a folder of its own, run there: folder, outputs, status."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    root, running = tmp_path_factory.mktemp("programs"), {}
    common.load_dataset("folder", folder, 16)  # decodes once, before they all start
    for name, where in OUTPUTS.items():  # at once: a start takes longer than the run
        (root / name).mkdir()
        for file in (f"{name}.py", "common.py"):
            shutil.copy(ROOT / file, root / name)
        running[name] = subprocess.Popen(
            ["bash", "-c", f'set -o pipefail; "$@" {where}', "-", sys.executable, f"{name}.py",
             *small_run(folder, name), "--epochs", "1"],
            cwd=root / name, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
    ended = {name: (*program.communicate(), program.returncode)
             for name, program in running.items()}
    yield root, ended
    shutil.rmtree(root)


def test_two_files_in_an_empty_folder_train(programs):
    """A script and common.py run as a program and write only to --out."""
    root, ended = programs
    for name, (_, error, status) in ended.items():
        assert (status, error) == (0, ""), (name, error)
        assert load(root / name / "runs" / name)["epoch"] == 1
        found = {path.name for path in (root / name).iterdir()}
        assert found <= {f"{name}.py", "common.py", "runs", "__pycache__"}
        run = sorted(path.name for path in (root / name / "runs" / name).iterdir())
        assert run == ["checkpoint.pt", "log.jsonl"]


def test_a_run_goes_on_without_standard_output(programs):
    """If its reader ends, if its device is full, and if it is closed from the start."""
    root, ended = programs
    lines = [said.count("\n") for said, _, _ in ended.values()]
    assert lines == [6, 1, 0, 0]
    for name in SCRIPTS:
        _, epochs = read_log(root / name / "runs" / name)
        assert [line["epoch"] for line in epochs] == [0, 1]
