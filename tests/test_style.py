"""The promise that a diff shows the method: shared text is equal in all four scripts, and the rest of DESIGN's form.

`problems` reads four sources and lists what breaks the form; the scripts have none. That the check bites was proved by
mutation, and is at every run (test_mutations_are_caught): a renamed variable, a reflowed line and a fix in one file only; a
foreign import and one outside section 1; a misspelt banner, two sections in the wrong order and a dropped fence; a recipe number
without its source; a line of 101 characters; a fence that grew; a method that imports another.
"""

import ast
import difflib
import importlib
import inspect
import re
import sys
from itertools import combinations

import pytest

from conftest import ROOT, SCRIPTS

SECTIONS = ["1. Imports (shared)", "2. Recipe (method)", "3. Options (shared)", "4. Augmentation: operations (shared)",
            "4. Augmentation: policy (method)", "5. Loss (method)", "6. Model (method)", "7. kNN monitor (shared)",
            "8. Training (shared, with fences)"]
BANNER = re.compile(r"(?m)^# =+ (.*?) =+\n")
FENCE = re.compile(r"(?ms)^ *# <method>\n(.*?)^ *# </method>\n")
ALLOWED = {"torch", "torchvision", "numpy", "common"}
# Lines: a script; its fences; its main, common.py, linear_eval.py, a pair's diff, what LoGo removes of SimSiam; characters a line.
LINES = {"simclr": 730, "moco": 780, "simsiam": 690, "simsiam_logo": 750}
FENCES = {"simclr": 14, "moco": 20, "simsiam": 14, "simsiam_logo": 40}
MAIN, COMMON, EVAL, PAIR, REMOVED, WIDTH = 180, 390, 600, 270, 25, 100


def sections(text):
    """Name to text of each section, in order; the docstring comes first, under ''."""
    parts = BANNER.split(text)
    return dict(zip(["", *parts[1::2]], parts[::2]))


def top(node):
    """The packages an import statement names."""
    return {a.name.split(".")[0] for a in node.names} if isinstance(node, ast.Import) else {(node.module or ".").split(".")[0]}


def problems(sources):
    """What breaks the form in these four sources (name to text), in words."""
    found, first = [], None
    for name, text in sources.items():
        mine = sections(text)
        if [*mine][1:] != SECTIONS:
            found.append(f"{name}: sections are {[*mine][1:]}")
            continue
        shared = {key: FENCE.sub("<method>", body) for key, body in mine.items() if "(shared" in key}
        first = first or shared
        found += [f"{name}: section {key} is not the others'" for key in shared if shared[key] != first[key]]
        fences = FENCE.findall(mine[SECTIONS[-1]])
        if len(fences) != 3 or any("<method>" in body for key, body in mine.items() if key != SECTIONS[-1]):
            found.append(f"{name}: fences are not the three of section 8")
        if sum(fence.count("\n") for fence in fences) > FENCES[name]:
            found.append(f"{name}: its fences hold more than {FENCES[name]} lines")
        found += [f"{name}:{i}: {len(line)} characters" for i, line in enumerate(text.splitlines(), 1) if len(line) > WIDTH]
        if text.count("\n") > LINES[name]:
            found.append(f"{name}: {text.count(chr(10))} lines")
        try:
            tree = ast.parse(text)
        except SyntaxError as problem:
            found.append(f"{name}: {problem}")
            continue
        start = text[:text.index(f" {SECTIONS[1]} ")].count("\n")  # where section 1 ends
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                foreign = top(node) - ALLOWED - set(sys.stdlib_module_names)
                tensorboard = isinstance(node, ast.ImportFrom) and node.module == "torch.utils.tensorboard"
                if foreign or node.lineno > start and not tensorboard:
                    found.append(f"{name}:{node.lineno}: import of {foreign or top(node)} here")
            if isinstance(node, ast.FunctionDef) and node.name in ("main", "train") and node.end_lineno - node.lineno >= MAIN:
                found.append(f"{name}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
            if isinstance(node, ast.FunctionDef) and node.name == "add_recipe":
                for call in (c for c in ast.walk(node) if isinstance(c, ast.Call)):
                    flags = [a.value for a in call.args if isinstance(a, ast.Constant) and str(a.value).startswith("--")]
                    text_of = [k.value.value for k in call.keywords if k.arg == "help"]
                    if flags and not (text_of and re.search(r"\[[^\]]+\]$", text_of[0])):
                        found.append(f"{name}: {flags[0]} has no source")
    return found


def read():
    return {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}


def test_the_four_scripts_keep_the_form():
    assert not problems(read())


@pytest.mark.parametrize("name, lines, allowed", [("common", COMMON, {"torch", "torchvision", "numpy"}),
                                                  ("linear_eval", EVAL, {"torch", "torchvision", "common"})])
def test_the_other_files_keep_the_form(name, lines, allowed):
    text = (ROOT / f"{name}.py").read_text()
    imports = set().union(*(top(n) for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.Import, ast.ImportFrom))))
    assert imports - set(sys.stdlib_module_names) == allowed
    assert text.count("\n") <= lines and max(map(len, text.splitlines())) <= WIDTH


MUTATIONS = {
    "rename": ("cosine, index = ", "cosine, indices = "), "reflow": ("    training, out = f.training, []\n", "    training = f.training\n    out = []\n"),
    "one-file fix": ("base * 0.5 * (1 + ", "base / 2 * (1 + "), "foreign import": ("import torch\n", "import torch\nimport scipy\n"),
    "import elsewhere": ("def chance_loss(args):\n", "import copy\n\n\ndef chance_loss(args):\n"),
    "misspelt banner": ("= 7. kNN monitor (shared) =", "= 7. KNN monitor (shared) ="), "wrong order": ("= 5. Loss (method) =", "= 6. Loss (method) ="),
    "dropped fence": ("            # </method>\n            losses[step]", "            losses[step]"),
    "missing source": (" [SimSiam Fig. 2]\")", "\")"), "long line": ("import argparse\n", "import argparse" + " " * 86 + "\n"),
    "grown fence": ("            # </method>\n            loss.backward()", 14 * "            pass\n" + "            # </method>\n            loss.backward()"),
    "import of another method": ("import torch\n", "import moco\nimport torch\n")}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_caught(mutation):
    sources, (old, new) = read(), MUTATIONS[mutation]
    assert sources["simsiam"].count(old) == 1
    assert problems({**sources, "simsiam": sources["simsiam"].replace(old, new)})


def changed(a, b):
    """Lines removed and added between two scripts, as `diff` counts them."""
    a, b = (read()[name].splitlines() for name in (a, b))
    kept = sum(block.size for block in difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks())
    return len(a) - kept, len(b) - kept


@pytest.mark.parametrize("a, b", [*combinations(SCRIPTS, 2)])
def test_a_diff_is_short(a, b):
    assert sum(changed(a, b)) <= PAIR


def test_logo_keeps_simsiam():
    assert changed("simsiam", "simsiam_logo")[0] <= REMOVED


def test_public_functions_are_explained():
    """Every public function and class has a docstring of at most eight lines."""
    for name in (*SCRIPTS, "common", "linear_eval"):
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                inner = node.name in ("forward", "error", "parse", "weights", "draw", "uniform", "gather", "step", "closure", "backward")
                doc = ast.get_docstring(node)
                assert inner or doc, f"{name}.{node.name}"
                assert not doc or doc.count("\n") < 8, f"{name}.{node.name}"


def test_the_names_users_import():
    """DESIGN's table of names, with their arguments."""
    for module, names in {
            "simclr": {"nt_xent": "z1 z2 tau", "LARS": None}, "moco": {"info_nce": "q k queue tau", "momentum_update": "f f_k m", "enqueue": "queue ptr k"},
            "simsiam": {"neg_cosine": "p z stop_gradient"}, "simsiam_logo": {"neg_cosine": "p z stop_gradient", "affinity_loss": "pos neg"},
            "linear_eval": {"parse_args": "argv", "main": "argv"},
            "common": {"load_dataset": "name data_dir image_size cache_dir", "resnet": "arch width stem", "normalize": "x mean std"}}.items():
        shared = {} if module in ("common", "linear_eval") else {
            "crop_resize": "x boxes size", "random_resized_crop": "x size scale ratio generator", "adjust_hue": "x factor", "grayscale": "x",
            "gaussian_blur": "x sigma", "augment": "x args generator", "learning_rate": "step total_steps base warmup_steps",
            "knn_accuracy": "bank bank_labels queries labels num_classes k tau", "parse_args": "argv", "main": "argv"}
        for name, arguments in {**names, **shared}.items():
            function = getattr(importlib.import_module(module), name)
            assert arguments is None or [*inspect.signature(function).parameters] == arguments.split(), name


def test_the_house_holds_nothing_else():
    """Top level: what DESIGN names."""
    import subprocess
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tops = {path.split("/")[0] for path in listed.stdout.split()}
    assert tops <= {"README.md", "requirements.txt", *(f"{n}.py" for n in SCRIPTS), "common.py", "linear_eval.py", "tests", ".ci", ".gitignore"}
