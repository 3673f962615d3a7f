"""What the tests share: the project on the path, a small folder of images, a short training run."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = ("simclr", "moco", "simsiam", "simsiam_logo")
OWN = {"moco": ["--queue", "24", "--bn-splits", "2"]}  # what fits the 40 images of `folder`


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU, skipped without one")


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")


@pytest.fixture(autouse=True)
def passed_tests_leave_nothing(request, tmp_path):
    """Removes a passed test's folder at once: the checkpoints of one whole run fill 6 GB."""
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


@pytest.fixture
def flags(folder, tmp_path):
    """A function: the flags of a two-epoch run of a module in seconds, and any others."""
    def make(module, *more):
        return ["--dataset", "folder", "--data-dir", str(folder), "--image-size", "16",
                "--width", "0.25", "--epochs", "2", "--batch-size", "8", "--device", "cpu",
                "--out", str(tmp_path / "run"), *OWN.get(module.__name__, []), *more]
    return make
