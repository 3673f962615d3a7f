"""Several processes: two of them with gloo on the CPU compute what one process computes."""

import gc
import importlib
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
from conftest import SCRIPTS, fast_start, load, read_log, refused


def free_port():
    """A port on which the processes of one run can meet."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def worker(rank, function, ports, *args):
    """What one of two processes runs, with the variables that torchrun sets."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[0]))
    function(rank, *args, *ports[1:])


def in_two_processes(function, *args, ports=1):
    """Run function(rank, *args, further ports) in two processes, until both have ended."""
    ports = [free_port() for _ in range(ports)]
    fast_start()
    running = torch.multiprocessing.start_processes(
        worker, (function, ports, *args), nprocs=2, join=False, start_method="forkserver")
    end = time.monotonic() + 300
    while not running.join(timeout=1):
        if time.monotonic() > end:
            for process in running.processes:
                process.kill()
            pytest.fail("the two processes hang")


# ------------------------------------------------------------------------------ losses
def gradients(rank, out):
    """One DDP step of NT-Xent, on half of a fixed batch; saves loss and gradient."""
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
    exact = simclr.gather(z1.detach())[half].equal(z1)
    torch.save((loss.detach(), layer.weight.grad, rows, exact), out / f"{rank}.pt")
    del ddp  # as in the scripts
    dist.destroy_process_group()


def test_two_processes_compute_the_nt_xent_of_one(tmp_path):
    """Loss and gradient after DDP's averaging: no missing factor of the number of processes."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(6, 6), (6, 6), (5, 6)]
    x1, x2, weight = (torch.randn(shape, generator=draw) for shape in shapes)
    torch.save((x1, x2, weight), tmp_path / "in.pt")
    in_two_processes(gradients, tmp_path)
    weight.requires_grad_()
    loss = simclr.nt_xent(x1 @ weight.T, x2 @ weight.T, 0.3)
    loss.backward()
    assert weight.grad.norm() > 1e-3
    for rank in range(2):
        theirs, gradient, rows, exact = torch.load(tmp_path / f"{rank}.pt")
        assert torch.allclose(theirs, loss, rtol=1e-5, atol=1e-6)
        assert torch.allclose(gradient, weight.grad, rtol=1e-5, atol=1e-7)
        assert rows.tolist() == [[0.0, 0.0]] * 3 + [[1.0, 1.0]] * 3 and exact


def test_gather_returns_its_input_in_a_single_process():
    x = torch.randn(3, 2, requires_grad=True)
    assert simsiam.gather(x) is x


# ------------------------------------------------------------------------------ MoCo
MOCO = ["--batch-size", "16", "--bn-splits", "2", "--queue", "24"]


def shuffled(rank, out, variables):
    """Keys of half of a fixed batch, in evaluation and training mode, and the queue of both."""
    dist.init_process_group("gloo")
    for name in () if variables else ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]  # mpirun sets others
    torch.manual_seed(0)
    model = moco.Model(lambda: common.resnet(width=0.25), moco.parse_args(MOCO))
    x = torch.load(out / "in.pt")[8 * rank:8 * rank + 8]
    torch.manual_seed(rank)  # as train does: the processes' own numbers differ
    keys = [model.eval().key(x), model.train().key(x)]
    plain = model.g_k(model.f_k(x)).detach()
    moco.enqueue(model.queue, model.ptr, moco.gather(keys[0]))
    torch.save((keys, plain, model.splits, model.queue), out / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("variables", [True, False], ids=["torchrun", "another launcher"])
def test_moco_shuffles_keys_across_processes(variables, tmp_path):
    """Every view gets its own key, made in a shuffled batch; all processes have one queue."""
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.save(x, tmp_path / "in.pt")
    in_two_processes(shuffled, tmp_path, variables)
    torch.manual_seed(0)
    model = moco.Model(lambda: common.resnet(width=0.25), moco.parse_args(MOCO))
    one = model.eval().key(x)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.allclose(torch.cat([half[0][0] for half in halves]), one, atol=1e-5)
    for (_, trained), plain, splits, queue in halves:
        assert splits == 1 and (trained - plain).abs().max() > 1e-3
        assert torch.allclose(queue[:16], F.normalize(one, dim=1), atol=1e-5)
        assert queue.equal(halves[0][3])


# ------------------------------------------------------------------------------ starting
@pytest.mark.parametrize("variables", [
    {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "1"}, {"SLURM_STEP_NUM_TASKS": "2"},
    {"SLURM_STEP_NUM_TASKS": "4", "RANK": "0", "WORLD_SIZE": "2"}], ids=str)
def test_processes_that_torchrun_did_not_start_are_refused(variables, capsys, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused(capsys, simsiam, [], "torchrun")


def test_a_script_in_a_job_of_slurm_is_a_single_process_unless_srun_starts_several(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")  # what sbatch -n 4 sets, also for its shell script
    assert simsiam.processes() == (0, 1, 0)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert simsiam.processes() == (0, 1, 0)


# ------------------------------------------------------------------------------ whole runs
def train(rank, name, argv, out, resumed, port):
    """Train a whole run and keep a copy of it as it was after epoch 1; resume that if asked."""
    module = importlib.import_module(name)
    models, orders, loads = [], [], []
    save, load_batches, load_dataset = module.save_checkpoint, module.batches, module.load_dataset

    class Recorded(module.Model):
        def __init__(self, *args):
            super().__init__(*args)
            models.append(self)

    def loaded(*args):
        if rank == 1:  # it waits, so that one process alone decodes or downloads
            loads.append((out / "loaded").exists())
            return load_dataset(*args)
        time.sleep(0.5)
        data = load_dataset(*args)
        (out / "loaded").touch()
        return data

    def saved(path, state):
        due = save(path, state)
        if state["epoch"] == 1 and not (out / "half").exists():
            shutil.copytree(out / "run", out / "half")
        return due

    def recorded(images, order, *args, **more):
        if len(args) == 3:  # training, not features
            orders.append(order)
        return load_batches(images, order, *args, **more)

    def destroy():  # on torch 2.11 a network that outlives the process group may hang
        kind = torch.nn.parallel.DistributedDataParallel
        assert not [x for x in gc.get_objects() if type(x) is kind]
        end_group()
    module.Model, module.load_dataset = Recorded, loaded
    module.save_checkpoint, module.batches = saved, recorded
    end_group, dist.destroy_process_group = dist.destroy_process_group, destroy
    ends = [module.main([*argv, "--out", str(out / "run")])]
    assert loads == [True] * rank
    if resumed:
        os.environ["MASTER_PORT"] = str(port)
        ends.append(module.main([*argv, "--out", str(out / "half"), "--resume"]))
    torch.save(([m.state_dict() for m in models], orders, ends), out / f"{rank}.pt")


def timeless(record):
    """A record without the time that it took, which every process measures for itself."""
    return {name: x for name, x in record.items() if name not in ("minutes", "views_s")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_train_as_one(name, flags, folder, tmp_path):
    """MoCo, which has most to restore, is also resumed, in two processes and in one."""
    module, resumed = importlib.import_module(name), name == "moco"
    argv = flags(module, "--knn-every", "1")
    at = argv.index("--out")
    argv = argv[:at] + argv[at + 2:]
    in_two_processes(train, name, argv, tmp_path, resumed, ports=2)
    (weights, orders, ends), (others, rest, other_ends) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    # Both processes hold the same weights, buffers and queue, also in the resumed run.
    for other in (*others, *weights[1:]):
        assert all(weights[0][key].equal(other[key]) for key in other)
    assert len({repr(timeless(end)) for end in (*ends, *other_ends)}) == 1
    # Together they use every image once an epoch, in another order each epoch.
    for epoch in range(2):
        used = [*orders[epoch].tolist(), *rest[epoch].tolist()]
        assert sorted(used) == [*range(40)]
    assert not orders[0].equal(orders[1]) and len(orders) == 2 + resumed
    # There is one log and one checkpoint; the kNN is that of the checkpoint in one process.
    (header,), lines = read_log(tmp_path / "run")
    assert header["data"]["images"] == 40
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    saved = load(tmp_path / "run")
    assert all(saved["model"][key].equal(weights[0][key]) for key in weights[0])
    data, f = common.load_dataset("folder", folder, 16), common.resnet(width=0.25)
    f.load_state_dict(saved["backbone"])
    bank, queries = (module.features(f, x, data, 8, torch.no_grad)
                     for x in (data.train_images, data.test_images))
    knn = module.knn_accuracy(bank, data.train_labels, queries, data.test_labels, 2)
    assert ends[0]["knn"] == knn
    if resumed:  # what two processes trained is continued by one
        saved["record"]["epoch"] = 1
        torch.save(saved, tmp_path / "run/checkpoint.pt")
        alone = module.main([*argv, "--out", str(tmp_path / "run"), "--resume"])
        assert alone["epoch"] == 2 and read_log(tmp_path / "run")[1][-1] == alone
