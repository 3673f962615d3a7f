"""A whole run: schedule, loop, log, checkpoint, collapse, compiled network, and what users see.

Shared text (test_style.py) is tested through simsiam.py; all four run where the methods differ.
"""

import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys

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
from conftest import ROOT, SCRIPTS, equal, load, read_log, refused, small_run


# ------------------------------------------------------------------------------ schedule
@pytest.mark.parametrize("total, warmup", [(1, 0), (10, 0), (100, 10), (100, 99)])
def test_learning_rate_is_its_closed_form(total, warmup):
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
    """The learning rates of SGD's groups at every step from here on."""
    seen, step = [], torch.optim.SGD.step

    def noted(self, *args, **more):
        seen.append([group["lr"] for group in self.param_groups])
        return step(self, *args, **more)
    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    return seen


@pytest.mark.parametrize("more, fixed", [([], True), (["--no-fix-pred-lr"], False)])
def test_the_optimizer_follows_the_schedule(flags, rates, more, fixed):
    """Every step's rate, scaled by batch / 256, warmup included; the predictor's is constant."""
    simsiam.main(flags(simsiam, "--lr", "0.5", "--warmup", "0.5", *more))
    base = 0.5 * 8 / 256
    expected = [simsiam.learning_rate(step, 10, base, 5) for step in range(10)]
    assert [first for first, _ in rates] == pytest.approx(expected)
    assert [predictor for _, predictor in rates] == ([base] * 10 if fixed
                                                     else pytest.approx(expected))


def test_the_optimizer_has_the_recipes_numbers(script, whole_runs):
    """Every parameter that learns is in one group, with the recipe's momentum and decay."""
    out, _ = whole_runs(script)
    saved, args = load(out), script.parse_args([])
    model = script.Model(lambda: common.resnet(width=0.25), args)
    groups = saved["optimizer"]["param_groups"]
    learns = sum(p.requires_grad for p in model.parameters())
    assert sum(len(group["params"]) for group in groups) == learns
    for group in groups:
        assert group["weight_decay"] == args.weight_decay
        assert group["momentum"] == args.sgd_momentum


# ------------------------------------------------------------------------------ the loop
def test_every_step_trains_what_the_monitor_put_to_evaluation(flags, monkeypatch):
    modes, forward = [], simsiam.Model.forward

    def noted(self, *views):
        modes.append((self.training, self.f.training, self.f.bn1.training))
        return forward(self, *views)
    monkeypatch.setattr(simsiam.Model, "forward", noted)
    simsiam.main(flags(simsiam, "--knn-every", "1"))
    assert modes == [(True, True, True)] * 10


def test_no_epoch_repeats_an_order_or_a_view(flags, monkeypatch):
    """Every epoch meets every image once, in an order of its own, and draws its own views."""
    orders, views = [], set()
    make, augment = simsiam.batches, simsiam.augment

    def batches(images, order, *rest):
        if len(rest) == 3:  # training's call, which names workers
            orders.append(order.tolist())
        return make(images, order, *rest)

    def augmented(x, args):
        out = augment(x, args)
        views.update(view.numpy().tobytes() for pair in out for view in pair)
        return out
    monkeypatch.setattr(simsiam, "batches", batches)
    monkeypatch.setattr(simsiam, "augment", augmented)
    simsiam.main(flags(simsiam, "--epochs", "3"))
    assert len(orders) == 3 and all(sorted(order) == [*range(40)] for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0] and len(views) == 3 * 40 * 2


def test_the_last_partial_batch_is_left_out_of_training_only(flags, monkeypatch):
    seen, counted, augment = [], [], simsiam.augment

    def knn_accuracy(bank, bank_labels, queries, *rest):
        counted.append((len(bank), len(queries)))
        return 0.0
    monkeypatch.setattr(simsiam, "augment", lambda x, args: seen.append(len(x)) or augment(x, args))
    monkeypatch.setattr(simsiam, "knn_accuracy", knn_accuracy)
    simsiam.main(flags(simsiam, "--batch-size", "9"))
    assert seen == [9] * 8 and counted == [(40, 12)] * 2


def test_odd_sizes_run(flags):
    """40 images in batches of 9 leave 4 over; a queue of 31 is no multiple of anything."""
    argv = flags(moco, "--batch-size", "9", "--queue", "31", "--bn-splits", "3")
    assert math.isfinite(moco.main(argv)["loss"])


def test_moving_average_and_queue_move_once_a_step(flags, tmp_path, monkeypatch):
    """Parameters of the key side: once, after a step. Queue: both keys, after both losses."""
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
        assert first.equal(second)  # the second loss does not meet the first one's keys
    assert not at_loss[1].equal(at_loss[2])
    saved = load(tmp_path / "run")["model"]
    assert saved["ptr"] == 160 % 24
    assert torch.allclose(saved["queue"].norm(dim=1), torch.ones(24), atol=1e-6)


def test_logo_descends_logo_loss_and_the_affinitys(flags, rates, monkeypatch):
    """The loss that is logged and descended is logo_loss's; beside it only the affinity learns."""
    given, states = [], []

    def logo_loss(p, z, l_ll, lam, stop_gradient):
        given.append((len(p), len(z), l_ll.shape, lam, stop_gradient))
        return 0 * (p[0].sum() + l_ll.sum()) - 11
    monkeypatch.setattr(simsiam_logo, "logo_loss", logo_loss)
    monkeypatch.setattr(simsiam_logo, "save_checkpoint", lambda path, state: states.append(
        {name: x.clone() for name, x in state["model"].items()}))
    end = simsiam_logo.main(flags(
        simsiam_logo, "--epochs", "1", "--lam", "0.25", "--weight-decay", "0",
        "--affinity-lr", "0.5", "--no-stop-gradient"))
    assert end["loss"] == pytest.approx(-11)
    assert given == [(4, 4, (8,), 0.25, False)] * 5
    encoder = [simsiam_logo.learning_rate(step, 5, 0.06 * 8 / 256) for step in range(5)]
    assert [step[0] for step in rates] == pytest.approx(encoder)
    assert [step[1:] for step in rates] == [[0.06 * 8 / 256, 0.5 * 8 / 256]] * 5
    before, after = states
    moved = {name for name in before if not before[name].equal(after[name])}
    moved = {name for name in moved if "running" not in name and "num_batches" not in name}
    assert moved == {name for name in before if name.startswith("affinity.")}


# ------------------------------------------------------------------------------ log, checkpoint
def test_log_and_checkpoint(script, whole_runs):
    """Only what was measured is logged; the checkpoint holds what goes on and what is kept."""
    out, end = whole_runs(script)
    (header,), epochs = read_log(out)
    trained = ["epoch", "loss", "std", "lr", "views_s", "seconds"]
    assert [[*line] for line in epochs] == [
        ["epoch", "knn", "knn_seconds"], trained, [*trained, "knn", "knn_seconds"]]
    assert [line["epoch"] for line in epochs] == [0, 1, 2] and epochs[2] == end
    assert 0 <= end["knn"] <= 100 and math.isfinite(end["loss"])
    saved, args = load(out), script.parse_args([*small_run("", script.__name__)])
    recipe = {**vars(args), "out": str(out), "data_dir": header["args"]["data_dir"]}
    assert header["args"] == saved["args"] == recipe
    assert header["lr"] == args.lr * 8 / 256 and header["torch"] == torch.__version__
    assert (header["images"], header["test_images"], header["processes"]) == (40, 12, 1)
    assert (saved["method"], saved["epoch"], saved["images"]) == (script.__name__, 2, 40)
    assert saved["record"] == end
    assert saved["log_end"] == (out / "log.jsonl").stat().st_size
    backbone = common.resnet("resnet18", 1 / 4)
    backbone.load_state_dict(saved["backbone"])
    assert all(saved["model"][f"f.{name}"].equal(x) for name, x in saved["backbone"].items())
    assert saved["mean"].shape == saved["std"].shape == (3,)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "log.jsonl"]


def test_what_is_printed(flags, tmp_path, capsys, monkeypatch):
    """Data, two lines, an epoch a line with the time left, what was written; no compiler."""
    monkeypatch.setattr(torch, "compile", lambda *a, **k: pytest.fail("compiled on the CPU"))
    end = simsiam.main(flags(simsiam))
    said, error = capsys.readouterr()
    lines = said.splitlines()
    assert error == "" and len(lines) == 7 and "40 images of 2 classes" in lines.pop(0)
    where = common.environment(torch.device("cpu"))["device"]  # the processor's name
    assert lines[0] == f"simsiam: resnet18 on {where}; folder, 40 images, kNN of 12"
    assert lines[1] == f"2 of 2 epochs to go, 5 steps each, to {tmp_path / 'run'}"
    for text, record in zip(lines[2:5], read_log(tmp_path / "run")[1], strict=True):
        measured = [f"{key}={value:.4g}" for key, value in record.items()]
        assert text.split()[:len(measured)] == measured
        assert bool(re.search(r" left=\d+min$", text)) == (record["epoch"] > 0)
    assert f" knn={end['knn']:.4g} " in lines[4]
    assert str(tmp_path / "run") in lines[5] and "linear_eval.py" in lines[5]


def test_the_time_left_is_that_of_the_epochs_to_come(capsys, flags):
    args = simsiam.parse_args(["--epochs", "100"])
    data = common.Dataset(torch.zeros(1), None, None, None, (), None, None)
    layer = torch.nn.Linear(1, 1)
    layer.f = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), 1)
    with pytest.MonkeyPatch.context() as patch, open(os.devnull, "w") as log:
        patch.setattr(simsiam, "save_checkpoint", lambda path, state: None)
        record = {"epoch": 40, "std": 0.5, "seconds": 90.0}
        simsiam.save_epoch(log, record, args, layer, optimizer, data)
    assert capsys.readouterr().out == "epoch=40 std=0.5 seconds=90 left=90min\n"


def test_knn_of_the_log_is_that_of_the_checkpoint(whole_runs, folder):
    out, end = whole_runs(simsiam)
    f, data = common.resnet("resnet18", 1 / 4), common.load_dataset("folder", folder, 16)
    saved = load(out)
    f.load_state_dict(saved["backbone"])
    f.eval()
    with torch.no_grad():
        bank, queries = (f(common.normalize(x, saved["mean"], saved["std"]))
                         for x in (data.train_images, data.test_images))
    knn = simsiam.knn_accuracy(bank, data.train_labels, queries, data.test_labels, 2)
    assert knn == end["knn"]


def test_same_seed_same_weights_other_seed_others(flags, whole_runs, tmp_path):
    runs = [load(whole_runs(simsiam)[0])["model"]]
    for seed in ("0", "1"):
        simsiam.main(flags(simsiam, "--seed", seed, "--overwrite"))
        runs.append(load(tmp_path / "run")["model"])
    assert equal(runs[0], runs[1]) and not equal(runs[0], runs[2])


def test_a_machine_without_git(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    simsiam.main(flags(simsiam, "--epochs", "1"))
    assert read_log(tmp_path / "run")[0][0]["torch"] == torch.__version__


# ------------------------------------------------------------------------------ the device
class Questions(TorchDispatchMode):
    """Notes every operation whose result the host must wait for: a value, or a shape by values."""

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


def test_the_loop_never_waits_for_the_device(script, flags, monkeypatch):
    """Inside a step no value and no shape is asked for by the operations above.

    Copies to the host (.cpu(), .tolist()) are none of them on a CPU and go unseen here: only a
    GPU's profile shows those.
    """
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
    script.main(flags(script, "--epochs", "1"))
    assert questions.steps == 5 and questions.asked == []
    with questions:
        torch.ones(1).item(), torch.ones(2)[torch.ones(2) > 0]
    assert len(questions.asked) == 2  # it would have seen them


def test_the_compiled_network_trains_the_same(script, flags, whole_runs, monkeypatch):
    """One graph, without a break, traced once; an eager backend stands for the compiler's."""
    (_, plain), compiled, make, graphs = whole_runs(script), [], torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def eager(network, mode):
        compiled.append(network)
        return make(network, backend=backend, fullgraph=True)
    monkeypatch.setattr(torch, "compile", eager)
    end = script.main(flags(script, "--compile"))
    assert len(compiled) == 1 and len(graphs) == 1
    assert "randperm" not in graphs[0].code  # as an index, torch 2.11's inductor fails at it
    assert end["loss"] == pytest.approx(plain["loss"], rel=1e-3, abs=1e-5)
    assert end["knn"] == pytest.approx(plain["knn"], abs=10)


def test_bf16_reads_the_same_loss_as_fp32(script, flags, whole_runs):
    """In the first epoch, in which the rate of one epoch's schedule and of two differ little."""
    _, (_, full, _) = read_log(whole_runs(script)[0])
    low = script.main(flags(script, "--precision", "bf16", "--epochs", "1"))
    assert low["loss"] == pytest.approx(full["loss"], rel=0.02, abs=0.02)
    assert low["loss"] != full["loss"]


@pytest.mark.cuda
def test_a_gpu_run_agrees_with_the_cpu(script, flags, whole_runs, tmp_path):
    """The first epoch's loss, in fp32, within what another order of random numbers makes."""
    out, _ = whole_runs(script)
    script.main(flags(script, "--device", "cuda", "--precision", "fp32"))
    (_, (_, cpu, _)), (_, (_, gpu, _)) = read_log(out), read_log(tmp_path / "run")
    assert gpu["loss"] == pytest.approx(cpu["loss"], rel=0.1, abs=0.1)


# ------------------------------------------------------------------------------ what goes wrong
def test_without_stop_gradient_the_output_collapses(tmp_path, monkeypatch):
    """Fig. 2: without it the loss goes towards -1 and std towards 0; with it they do not."""
    images, labels = common.draw_shapes(256, 16)
    images = images[:, :, ::2, ::2].contiguous()
    data = common.Dataset(images, labels, images[:64], labels[:64], common.SHAPES,
                          torch.full((3,), 0.5), torch.full((3,), 0.15))
    monkeypatch.setattr(simsiam, "load_dataset", lambda *args: data)
    monkeypatch.setattr(simsiam, "save_checkpoint", lambda path, state: None)
    for word, collapsed in (("--stop-gradient", False), ("--no-stop-gradient", True)):
        simsiam.main(["--dataset", "shapes", "--image-size", "8", "--width", "0.25",
                      "--epochs", "8", "--warmup", "0", "--lr", "4", "--batch-size", "64",
                      "--device", "cpu", "--out", str(tmp_path / word), word])
        epochs = read_log(tmp_path / word)[1][1:]
        loss, std = (min(line[key] for line in epochs) for key in ("loss", "std"))
        if collapsed:
            assert loss < -0.8 and std < 0.52
        else:
            assert loss > -0.74 and std > 0.6


def test_a_collapse_is_said_in_its_epochs_line(flags, capsys, monkeypatch):
    """std below 0.1, and no other; the untrained network has none."""
    stds = iter([0.05] * 5 + [0.15] * 5)
    monkeypatch.setattr(simsiam, "feature_std", lambda z: torch.tensor(next(stds)))
    simsiam.main(flags(simsiam))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch=")]
    assert [line.endswith(" warning: std says collapsed") for line in said] == [False, True, False]


def test_a_constant_output_reads_chance_and_collapsed(flags, capsys, monkeypatch):
    """All views alike: std is 0, SimCLR's loss log(2B - 1)."""
    real = simclr.augment
    monkeypatch.setattr(simclr, "augment", lambda x, args: [0 * view for view in real(x, args)])
    end = simclr.main(flags(simclr, "--epochs", "1", "--lr", "1e-8"))
    assert end["std"] < 1e-3 and end["loss"] == pytest.approx(math.log(2 * 8 - 1), rel=1e-4)
    assert capsys.readouterr().out.count(" warning: std says collapsed\n") == 1


def test_a_non_finite_loss_stops_the_run(flags, tmp_path, capsys, monkeypatch):
    """Epoch and step are named, the last good checkpoint stays."""
    real, steps = simsiam.augment, []

    def poisoned(x, args):
        steps.append(len(x))
        return [view * math.nan if len(steps) == 8 else view for view in real(x, args)]
    monkeypatch.setattr(simsiam, "augment", poisoned)
    refused(capsys, simsiam, flags(simsiam), "the loss is nan at epoch 2, step 3 of 5",
            "--lr", "epoch 1 is saved", status=1)
    saved = load(tmp_path / "run")
    assert saved["epoch"] == 1 and all(x.isfinite().all() for x in saved["model"].values())
    assert [line["epoch"] for line in read_log(tmp_path / "run")[1]] == [0, 1]


def test_weights_that_the_last_step_broke_are_not_saved(
        flags, rates, tmp_path, capsys, monkeypatch):
    """No loss of the epoch shows it: the last good checkpoint stays."""
    step = torch.optim.SGD.step

    def breaking(self, *args, **more):
        step(self, *args, **more)
        if len(rates) == 10:
            self.param_groups[1]["params"][0].data[0] = math.inf
    monkeypatch.setattr(torch.optim.SGD, "step", breaking)
    refused(capsys, simsiam, flags(simsiam), "not finite", "--lr", "checkpoint.pt stays")
    saved = load(tmp_path / "run")
    assert saved["epoch"] == 1 and all(x.isfinite().all() for x in saved["model"].values())


def test_other_errors_stay_whole(flags, monkeypatch):
    monkeypatch.setattr(simsiam, "normalize", lambda *args: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError):
        simsiam.main(flags(simsiam))


# ------------------------------------------------------------------------------ what users see
def test_help_shows_groups_defaults_and_sources(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in (*SCRIPTS, "linear_eval"):
        with pytest.raises(SystemExit, match="^0$"):
            importlib.import_module(name).main(["--help"])
        said = capsys.readouterr().out
        own = ["judge:", "[SimCLR v2 Sec. 3]", "run and output:"]
        if name in SCRIPTS:
            own = ["monitor:", "recipe:", "run:", "output:", "(default: 512)", f"runs/{name}"]
        for word in ("data", "network", "(default: auto)", *own):
            assert word in said, (name, word)
        assert "None" not in said and said.count("\n") <= 100  # two screens


def test_help_without_docstrings(capsys, monkeypatch):
    """python -OO strips them."""
    monkeypatch.setattr(simsiam, "__doc__", None)
    with pytest.raises(SystemExit, match="^0$"):
        simsiam.main(["--help"])
    assert "(default: 512)" in capsys.readouterr().out


def test_views_picture(flags, tmp_path, capsys):
    """A row an image, of all classes: the image and its views, small ones enlarged."""
    argv = flags(simsiam_logo, "--epochs", "1", "--local-size", "8", "--save-views")
    simsiam_logo.main([*argv, str(tmp_path / "views.png")])
    picture = default_loader(str(tmp_path / "views.png"))
    assert picture.size == (5 * 18 + 2, 8 * 18 + 2)  # 2 pixels between
    levels = [sum(picture.getpixel((9, 9 + 18 * row))) for row in range(8)]
    assert max(levels[:4]) < min(levels[4:])  # dark ones, then light ones
    wrong = str(tmp_path / "no/views.png")
    refused(capsys, simsiam_logo, [*argv, wrong, "--out", str(tmp_path / "b")], "no/views.png")
    inside = argv[argv.index("--data-dir") + 1] + "/train/views.png"  # the next run's image
    refused(capsys, simsiam_logo, [*argv, inside, "--out", str(tmp_path / "b")], "trained on")
    assert not (tmp_path / "b").exists() and not os.path.exists(inside)


def test_unlabelled_images_train_without_knn(flags, folder, capsys):
    end = simsiam.main(flags(simsiam, "--data-dir", str(folder / "train")))
    assert "knn" not in end and math.isfinite(end["loss"])
    said = capsys.readouterr().out
    assert said.count("no labels, no kNN") == 1 and "knn=" not in said


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
    """Each script and common.py in a folder of its own, run there: folder, status, outputs."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    root, running = tmp_path_factory.mktemp("programs"), {}
    for name, where in OUTPUTS.items():  # at once: a start takes longer than the run
        (root / name).mkdir()
        for file in (f"{name}.py", "common.py"):
            shutil.copy(ROOT / file, root / name)
        running[name] = subprocess.Popen(
            ["bash", "-c", f'set -o pipefail; "$@" {where}', "-", sys.executable, f"{name}.py",
             *small_run(folder, name)],
            cwd=root / name, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
    ended = {name: (*program.communicate(), program.returncode)
             for name, program in running.items()}
    yield root, ended
    shutil.rmtree(root)


def test_two_files_in_an_empty_folder_train(programs):
    """What a copier takes runs as a program and writes to its --out alone."""
    root, ended = programs
    for name, (_, error, status) in ended.items():
        assert (status, error) == (0, ""), (name, error)
        assert load(root / name / "runs" / name)["epoch"] == 2
        found = {path.name for path in (root / name).iterdir()}
        assert found <= {f"{name}.py", "common.py", "runs", "__pycache__"}
        run = sorted(path.name for path in (root / name / "runs" / name).iterdir())
        assert run == ["checkpoint.pt", "log.jsonl"]


def test_a_standard_output_that_ends_does_not_stop_a_run(programs):
    """A reader that left, a full device, one closed from the start: nothing but the log."""
    root, ended = programs
    assert [said.count("\n") for said, _, _ in ended.values()] == [7, 1, 0, 0]
    for name in SCRIPTS:
        _, epochs = read_log(root / name / "runs" / name)
        assert [line["epoch"] for line in epochs] == [0, 1, 2]
