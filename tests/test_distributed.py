"""More than one process: two of them with gloo on the CPU give what one process gives."""

import gc
import importlib
import json
import os
import shutil
import socket
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import common
import moco
import simclr
import simsiam
from conftest import SCRIPTS, fast_start
from conftest import refused


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def worker(rank, function, ports, *args):
    """Be one of two processes, as torchrun would start them."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[0]))
    function(rank, *args, *ports[1:])


def in_two_processes(function, *args, ports=1):
    ports = [free_port() for _ in range(ports)]
    fast_start()
    running = torch.multiprocessing.start_processes(worker, (function, ports, *args), nprocs=2, join=False, start_method="forkserver")
    end = time.monotonic() + 300
    while not running.join(timeout=1):
        if time.monotonic() > end:
            for process in running.processes:
                process.kill()
            pytest.fail("the two processes hang")


# ------------------------------------------------------------------------------ losses
def gradients(rank, out):
    """One DDP step of NT-Xent and InfoNCE on half of a fixed batch each; rank 0 saves what came of it."""
    dist.init_process_group("gloo")
    x1, x2, weight = torch.load(out / "in.pt")
    layer = torch.nn.Linear(6, 5, bias=False)
    layer.weight.data.copy_(weight)
    ddp = torch.nn.parallel.DistributedDataParallel(layer)
    half = slice(3 * rank, 3 * rank + 3)
    z1, z2 = ddp(torch.stack([x1[half], x2[half]]))
    loss = simclr.nt_xent(simclr.gather(z1), simclr.gather(z2), 0.3)
    loss.backward()
    rows = simclr.gather(torch.full((2, 3), float(rank)).T)  # not contiguous
    torch.save((loss.detach(), layer.weight.grad, rows), out / f"{rank}.pt")
    del ddp  # as in the scripts
    dist.destroy_process_group()


def test_nt_xent_of_two_processes_is_that_of_one(tmp_path):
    """Loss and gradient after DDP's averaging: no missing factor of the number of processes."""
    draw = torch.Generator().manual_seed(0)
    x1, x2, weight = (torch.randn(shape, generator=draw) for shape in ((6, 6), (6, 6), (5, 6)))
    torch.save((x1, x2, weight), tmp_path / "in.pt")
    in_two_processes(gradients, tmp_path)
    weight.requires_grad_()
    loss = simclr.nt_xent(x1 @ weight.T, x2 @ weight.T, 0.3)
    loss.backward()
    for rank in range(2):
        theirs, gradient, rows = torch.load(tmp_path / f"{rank}.pt")
        assert torch.allclose(theirs, loss, atol=1e-6)
        assert torch.allclose(gradient, weight.grad, rtol=1e-5, atol=1e-7) and gradient.norm() > 1e-3
        assert rows.tolist() == [[0.0, 0.0]] * 3 + [[1.0, 1.0]] * 3


# ------------------------------------------------------------------------------ MoCo
def shuffled(rank, out, variables):
    """Keys of half of a fixed batch, in evaluation and in training, and the queue they make."""
    dist.init_process_group("gloo")
    for name in () if variables else ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    args = moco.parse_args(["--batch-size", "16", "--bn-splits", "2", "--queue", "24"])
    torch.manual_seed(0)
    model = moco.Model(lambda: common.resnet(width=0.25), args)
    x = torch.load(out / "in.pt")[8 * rank:8 * rank + 8]
    torch.manual_seed(rank)  # as main does: the processes' own numbers differ
    keys = [model.eval().key(x), model.train().key(x)]
    plain = model.g_k(model.f_k(x)).detach()
    moco.enqueue(model.queue, model.ptr, moco.gather(keys[0]))
    torch.save((keys, plain, model.splits, model.queue), out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("variables", [True, False], ids=["torchrun", "another launcher"])
def test_moco_shuffles_keys_across_processes(variables, tmp_path):
    """Every view gets its own key; in training its statistics are not its own process's; one queue."""
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.save(x, tmp_path / "in.pt")
    in_two_processes(shuffled, tmp_path, variables)
    torch.manual_seed(0)
    model = moco.Model(lambda: common.resnet(width=0.25), moco.parse_args(["--batch-size", "16", "--bn-splits", "2", "--queue", "24"]))
    one = model.eval().key(x)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.allclose(torch.cat([half[0][0] for half in halves]), one, atol=1e-5)
    for (_, trained), plain, splits, queue in halves:
        assert splits == (1 if variables else 2) and (trained - plain).abs().max() > 1e-3
        assert torch.allclose(queue[:16], F.normalize(one, dim=1), atol=1e-5) and queue.equal(halves[0][3])


# ------------------------------------------------------------------------------ features
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_of_the_features_join_to_all(world):
    images = torch.randint(0, 256, (13, 3, 8, 8), dtype=torch.uint8)
    f, stats = common.resnet(width=0.25), (torch.full((3,), 0.5), torch.full((3,), 0.2))
    parts = [simsiam.features(f, images, *stats, 4, torch.no_grad, rank, world) for rank in range(world)]
    joined = torch.cat(parts).view(world, -1, 128).transpose(0, 1).flatten(0, 1)[:13]
    assert torch.allclose(joined, simsiam.features(f, images, *stats, 13, torch.no_grad), atol=1e-5)


# ------------------------------------------------------------------------------ whole runs
def train(rank, name, argv, out, port):
    """Train twice: a whole run, which keeps a copy of itself after epoch 1, and that copy resumed."""
    module = importlib.import_module(name)
    models, indices, save, load = [], [], module.save_checkpoint, module.batches

    class Recorded(module.Model):
        def __init__(self, *args):
            super().__init__(*args)
            models.append(self)

    def saved(path, **state):
        save(path, **state)
        if state["epoch"] == 1 and not (out / "half").exists():
            shutil.copytree(out / "run", out / "half")

    def recorded(images, order, *args):
        if len(args) == 3 and len(order):  # training, not features
            indices.append(order)
        return load(images, order, *args)

    def destroy():  # on torch 2.11 a network that outlives the process group may hang
        assert not [x for x in gc.get_objects() if type(x) is torch.nn.parallel.DistributedDataParallel]
        end_group()
    module.Model, module.save_checkpoint, module.batches = Recorded, saved, recorded
    end_group, dist.destroy_process_group = dist.destroy_process_group, destroy
    end = module.main([*argv, "--out", str(out / "run")])
    os.environ["MASTER_PORT"] = str(port)
    again = module.main([*argv, "--out", str(out / "half"), "--resume"])
    torch.save(([m.state_dict() for m in models], indices, end, again), out / f"{rank}.pt")


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_train_as_one(name, flags, folder, tmp_path):
    module = importlib.import_module(name)
    argv = flags(module, "--knn-every", "1")
    at = argv.index("--out")
    argv = argv[:at] + argv[at + 2:]
    in_two_processes(train, name, argv, tmp_path, ports=2)
    (weights, indices, end, again), (others, rest, other_end, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    # The processes hold the same weights, buffers and queue, a resumed run the same as a whole one.
    for a, b in ((weights[0], others[0]), (weights[1], others[1]), (weights[0], weights[1])):
        assert all(a[key].equal(b[key]) for key in a)
    assert {**end, "seconds": 0, "views_s": 0, "knn_seconds": 0} == {**other_end, "seconds": 0, "views_s": 0, "knn_seconds": 0}
    assert end["knn"] == again["knn"] and end["loss"] == again["loss"]
    # Together they see each epoch's permutation, no image twice, and each epoch another.
    for epoch in range(2):
        assert sorted([*indices[epoch].tolist(), *rest[epoch].tolist()]) == [*range(40)]
    assert not indices[0].equal(indices[1]) and len(indices) == 3  # two epochs and the resumed one
    # One log, one checkpoint; the kNN is that of the checkpoint in one process.
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert lines[0]["processes"] == 2 and [line["epoch"] for line in lines[1:]] == [0, 1, 2]
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert all(saved["model"][key].equal(weights[0][key]) for key in weights[0])
    data, f = common.load_dataset("folder", folder, 16), common.resnet(width=0.25)
    f.load_state_dict(saved["backbone"])
    bank, queries = (module.features(f, x, data.mean, data.std, 8, torch.no_grad) for x in (data.train_images, data.test_images))
    assert end["knn"] == module.knn_accuracy(bank, data.train_labels, queries, data.test_labels, 2)
    # It goes on in one process.
    shutil.rmtree(tmp_path / "half")
    torch.save({**saved, "epoch": 1}, tmp_path / "run/checkpoint.pt")
    alone = module.main([*argv, "--out", str(tmp_path / "run"), "--resume"])
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines[1:]] == [0, 1, 2] and lines[-1] == alone


def test_batches_that_cannot_be_split(script, flags, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused(capsys, script, flags(script), "--batch-size 8", "3 processes")
    monkeypatch.setenv("WORLD_SIZE", "8")
    refused(capsys, script, flags(script), "--batch-size 8", "8 processes")
