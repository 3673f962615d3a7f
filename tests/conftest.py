"""What the tests share: the table of methods, small images and runs, and what a run left.

Whoever adds a script registers it in METHODS; every test of all methods then includes it.
"""

import importlib
import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for all that tests start
import torch  # noqa: E402
from torchvision.transforms.functional import to_pil_image  # noqa: E402

torch.set_num_threads(1)  # two threads that spin on a busy core are slower than one
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# All that the tests know of a method alone:
#   tokens, story, fences  budgets: tokens of the file, the line at which `train` ends at the
#                          latest, lines inside all of its fences
#   flags                  what a small run of the 40 images of `folder` needs beside `small_run`
#   scales, grey           of each view, the share of the area that it shows; the share of
#                          views that are grey
#   width, sync_bn         columns of the first output of its Model; whether several GPUs
#                          share the statistics of batch norm
#   names                  functions that users import, with their arguments; None: any
METHODS = {
    "simclr": {
        "tokens": 6150, "story": 325, "fences": 14,
        "flags": [],
        "scales": [(0.2, 1.0), (0.2, 1.0)], "grey": 0.1,
        "width": 128, "sync_bn": True,
        "names": {
            "nt_xent": "z1 z2 tau",
            "LARS": "params lr momentum weight_decay"},
    },
    "moco": {
        "tokens": 6850, "story": 380, "fences": 20,
        "flags": ["--queue", "24", "--bn-splits", "2"],
        "scales": [(0.08, 1.0), (0.08, 1.0)], "grey": 0.2,
        "width": 128, "sync_bn": False,
        "names": {
            "info_nce": "q k queue tau",
            "momentum_update": "f f_k m",
            "enqueue": "queue ptr k",
            "SplitBatchNorm2d": "norm splits"},
    },
    "simsiam": {
        "tokens": 6000, "story": 290, "fences": 14,
        "flags": [],
        "scales": [(0.2, 1.0), (0.2, 1.0)], "grey": 0.2,
        "width": 2048, "sync_bn": True,
        "names": {"neg_cosine": "p z stop_gradient"},
    },
    "simsiam_logo": {
        "tokens": 6600, "story": 350, "fences": 25,
        "flags": [],
        "scales": [(0.4, 1.0), (0.4, 1.0), (0.2, 0.4), (0.2, 0.4)],
        "grey": 0.2,
        "width": 2048, "sync_bn": True,
        "names": {
            "neg_cosine": "p z stop_gradient",
            "logo_loss": "p z l_ll lam pair_loss",
            "affinity_loss": "pos neg",
            "Affinity": "dim"},
    },
}
SCRIPTS = tuple(METHODS)
OWN = {name: method["flags"] for name, method in METHODS.items()}


def picture(h=20, w=20, mode="RGB", seed=0):
    """A PIL image of a mode, made of random pixels."""
    pixels = torch.rand(3, h, w, generator=torch.Generator().manual_seed(seed))
    return to_pil_image(pixels).convert(mode)


def refused(capsys, module, argv, *words, status=2):
    """main(argv) ends with one line of these words on standard error, and with this status."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        module.main(argv)
    said, code = capsys.readouterr().err, end.value.code
    del end  # its traceback would keep main's files open, and locked
    assert code == status and said.startswith("error: ") and said.count("\n") == 1, said
    assert all(word in said for word in words), said


def load(out):
    """The checkpoint of the run in a folder."""
    return torch.load(Path(out, "checkpoint.pt"), weights_only=True)


def read_log(out):
    """The lines of the log of the run in a folder: the headers and the epochs."""
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return ([line for line in lines if "args" in line],
            [line for line in lines if "args" not in line])


def equal(a, b):
    """All tensors and values of two checkpoints, or parts of them, are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return a.equal(b)
    if isinstance(a, dict):
        same_keys = a.keys() == b.keys()
        return same_keys and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def fast_start():
    """A context of multiprocessing: one process has imported torch, all children are copies."""
    context = multiprocessing.get_context("forkserver")
    # torch._dynamo: the first optimizer of a process imports it, for seconds.
    context.set_forkserver_preload(["torch._dynamo", "test_distributed", "test_resume"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        multiprocessing.forkserver.ensure_running()
    return context


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU, skipped without one")


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(autouse=True)
def passed_tests_leave_nothing(request, tmp_path):
    """Removes a passed test's folder at once: the checkpoints of one whole run fill gigabytes."""
    failed = request.session.testsfailed
    yield
    if request.session.testsfailed == failed:
        shutil.rmtree(tmp_path)


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each of the four methods' modules in turn."""
    return importlib.import_module(request.param)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """train/ and test/ with two classes of 16x16 PNG files: 40 and 12 images."""
    root = tmp_path_factory.mktemp("images")
    draw = torch.Generator().manual_seed(0)
    for split, count in (("train", 20), ("test", 6)):
        for label, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = 0.5 * torch.rand(3, 16, 16, generator=draw) + 0.5 * label
                to_pil_image(pixels).save(root / split / name / f"{i}.png")
    return root


def small_run(folder, name):
    """The flags of a method's two-epoch run in seconds, but for --out."""
    return [
        "--dataset", "folder", "--data-dir", str(folder), "--image-size", "16",
        "--width", "0.25", "--epochs", "2", "--batch-size", "8", "--device", "cpu",
        "--knn-every", "5",
        *OWN.get(name, [])]


@pytest.fixture
def flags(folder, tmp_path):
    """A function: the flags of a two-epoch run of a module in seconds, and any others."""
    def make(module, *more):
        return [*small_run(folder, module.__name__), "--out", str(tmp_path / "run"), *more]
    return make


@pytest.fixture(scope="session")
def whole_runs(folder, tmp_path_factory):
    """A function: where a run of a module with `flags` alone is, made once, and its end."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def make(module):
        name = module.__name__
        if name not in made:
            made[name] = module.main([*small_run(folder, name), "--out", str(root / name)])
        return root / name, made[name]
    yield make
    shutil.rmtree(root)


@pytest.fixture
def finished(whole_runs, tmp_path):
    """A function: put a whole run of a module where `flags` has its --out; returns its end."""
    def put(module):
        out, end = whole_runs(module)
        shutil.copytree(out, tmp_path / "run")
        return end
    return put
