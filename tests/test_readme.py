"""The README's numbers equal their logs, its commands parse, and its files exist."""

import importlib
import json
import re
import shlex

import pytest

from conftest import ROOT, SCRIPTS

README = (ROOT / "README.md").read_text()
ROW = re.compile(r"(?m)^\|(.*)\|$")


def log(name):
    """Header and epochs of a log in tests/reference."""
    lines = [json.loads(line) for line in (ROOT / "tests/reference" / name).read_text().splitlines()]
    return lines[0], lines[1:]


def tables():
    """Every row of the README that ends in the name of a log: its cells and that log."""
    for row in ROW.findall(README):
        cells = [cell.strip() for cell in row.split("|")]
        found = re.search(r"`?(\w[\w.*-]*)\.jsonl`?$", cells[-1])
        if found:
            yield cells, found[1]


def logs(pattern):
    """The logs a pattern names: one, or one a seed where it holds a star."""
    found = sorted(path.name for path in (ROOT / "tests/reference").glob(f"{pattern}.jsonl"))
    assert found, f"no log {pattern}"
    return [log(name) for name in found]


def test_every_measured_row_equals_its_logs():
    """A kNN row lists kNN by epoch, std and minutes; a row over seeds lists untrained, then each seed's end."""
    rows = [*tables()]
    assert len(rows) >= 8
    for cells, pattern in rows:
        runs = logs(pattern)
        assert cells[0].strip("`") == f"{runs[0][0]['args']['out'].split('/')[-1].split('-')[0]}.py"
        if len(runs) == 1:
            epochs = runs[0][1]
            curve = [f"{line['knn']:.1f}" for line in epochs if line["knn"] is not None]
            assert cells[1:-1] == [*curve, f"{epochs[-1]['std']:.2f}", f"{minutes(epochs):.0f}"]
        else:
            assert len({json.dumps({**h["args"], "seed": 0, "out": ""}) for h, _ in runs}) == 1  # but for the seed
            untrained = " ".join(f"{epochs[0]['knn']:.1f}" for _, epochs in runs)
            ends = " ".join(f"{epochs[-1]['knn']:.1f}" for _, epochs in runs)
            assert cells[1:-1] == [untrained, ends, f"{max(minutes(epochs) for _, epochs in runs):.1f}"]


def minutes(epochs):
    """Training and monitoring, as logged."""
    return sum(line["seconds"] + line["knn_seconds"] for line in epochs) / 60


def commands():
    """The command lines of the README's indented blocks."""
    for line in re.findall(r"(?m)^ {4}(\S.*)$", README):
        yield from (part.strip() for part in line.split("&&"))


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python ") and "-m" not in c])
def test_commands_parse(command):
    words = shlex.split(command)
    assert words[1].removesuffix(".py") in SCRIPTS
    importlib.import_module(words[1].removesuffix(".py")).parse_args(words[2:])


def test_the_newcomers_two_commands_install_for_themselves():
    lines = re.findall(r"(?m)^ {4}(pip install -r requirements.txt && python .*)$", README)
    assert len(lines) == 2 and "--dataset shapes" in lines[0] and lines[1].endswith("-m pytest -q")


def test_it_is_short_and_names_only_what_exists():
    assert README.count("\n") <= 250
    for name in re.findall(r"`((?:tests/)?\w+\.(?:py|txt))`", README):
        assert (ROOT / name).exists(), name


def test_requirements_are_lower_bounds_of_four_packages():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert [re.fullmatch(r"(\w+)>=[\d.]+", line)[1] for line in lines] == ["torch", "torchvision", "numpy", "pytest"]
