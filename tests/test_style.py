"""A diff shows the method: shared text is equal in all four scripts, and the form is DESIGN's.

`problems` reads four sources and lists what breaks the form; the scripts have none. That it
bites is proved at every run by mutations (test_mutations_are_caught).
"""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from itertools import combinations

import pytest

from conftest import ROOT, SCRIPTS

SECTIONS = [
    "Imports (shared)", "1. Recipe (method)", "2. Views (method)",
    "3. Loss and updates (method)", "4. Model (method)", "5. Training (shared, with fences)",
    "6. kNN monitor (shared)", "7. Augmentation operations (shared)", "8. Options (shared)",
    "9. Run files (shared)"]
BANNER = re.compile(r"(?m)^# =+ (.*?) =+\n")
FENCE = re.compile(r"(?ms)^ *# <method>\n(.*?)^ *# </method>\n")
ALLOWED = {"torch", "torchvision", "numpy", "common"}
# Lines of a file, of its story (from the docstring to the end of train) and of its fences.
FILE = {"simclr": 625, "moco": 675, "simsiam": 590, "simsiam_logo": 645}
STORY = {"simclr": 325, "moco": 380, "simsiam": 290, "simsiam_logo": 350}
FENCES = {"simclr": 14, "moco": 20, "simsiam": 14, "simsiam_logo": 25}
TRAIN, EVAL, PAIR, REMOVED, WIDTH = 125, 480, 300, 30, 100
COMMON, DATA = 632, 440  # all of common.py; its data and network, before processes and files
LONG = 75  # lines above 90 characters, most of them of docstrings


def sections(text):
    """Name to text of each section, in order; the docstring comes first, under ''."""
    parts = BANNER.split(text)
    return dict(zip(["", *parts[1::2]], parts[::2]))


def top(node):
    """The packages an import statement names."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return {(node.module or ".").split(".")[0]}


def sourceless(recipe):
    """Flags of add_recipe whose help does not end in its source in brackets."""
    for call in (node for node in ast.walk(recipe) if isinstance(node, ast.Call)):
        flags = [a.value for a in call.args if isinstance(a, ast.Constant)]
        texts = [k.value.value for k in call.keywords if k.arg == "help"]
        if str(flags[:1])[2:4] == "--" and not re.search(r"\[[^\]]+\]$", str(texts)[2:-2]):
            yield flags[0]


def problems(sources):
    """What breaks the form in these four sources (name to text), in words."""
    found, first = [], None
    for name, text in sources.items():
        mine = sections(text)
        if [*mine][1:] != SECTIONS:
            found.append(f"{name}: sections are {[*mine][1:]}")
            continue
        shared = {key: FENCE.sub("", body) for key, body in mine.items() if "(shared" in key}
        first = first or shared
        found += [f"{name}: section {key} is not the others'" for key in shared
                  if shared[key] != first[key]]
        fences = FENCE.findall(mine[SECTIONS[5]])
        elsewhere = [key for key, body in mine.items()
                     if re.search("(?m)^ *# </?method>$", body) and key != SECTIONS[5]]
        if not 2 <= len(fences) <= 3 or elsewhere:
            found.append(f"{name}: {len(fences)} fences, others in {elsewhere}")
        if sum(fence.count("\n") for fence in fences) > FENCES[name]:
            found.append(f"{name}: its fences hold more than {FENCES[name]} lines")
        lines = text.splitlines()
        found += [f"{name}:{i}: {len(line)} characters" for i, line in enumerate(lines, 1)
                  if len(line) > WIDTH]
        if sum(len(line) > 90 for line in lines) > LONG:
            found.append(f"{name}: packed, {sum(len(line) > 90 for line in lines)} long lines")
        if len(lines) > FILE[name]:
            found.append(f"{name}: {len(lines)} lines")
        try:
            tree = ast.parse(text)
        except SyntaxError as problem:
            found.append(f"{name}: {problem}")
            continue
        if '"""\n# SPDX-License-Identifier: MIT\n' not in mine[""]:
            found.append(f"{name}: no licence under the docstring")
        start = text[:text.index(f" {SECTIONS[1]} ")].count("\n")  # where the imports end
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                foreign = top(node) - ALLOWED - set(sys.stdlib_module_names)
                if foreign or node.lineno > start:
                    found.append(f"{name}:{node.lineno}: import of {foreign or top(node)} here")
            if not isinstance(node, ast.FunctionDef):
                continue
            if node.name == "add_recipe":
                found += [f"{name}: {flag} has no source" for flag in sourceless(node)]
            if node.name == "train":
                if node.end_lineno > STORY[name]:
                    found.append(f"{name}: its story ends at line {node.end_lineno}")
                if node.end_lineno - node.lineno >= TRAIN:
                    found.append(f"{name}: train has more than {TRAIN} lines")
    return found


def read():
    return {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}


def test_the_four_scripts_keep_the_form():
    assert not problems(read())


@pytest.mark.parametrize("name, lines, allowed", [
    ("common", COMMON, {"torch", "torchvision", "numpy"}),
    ("linear_eval", EVAL, {"torch", "torchvision", "common"})])
def test_the_other_files_keep_the_form(name, lines, allowed):
    text = (ROOT / f"{name}.py").read_text()
    nodes = (n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.Import, ast.ImportFrom)))
    imports = set().union(*map(top, nodes)) - set(sys.stdlib_module_names)
    assert imports - {"PIL"} == allowed  # torchvision brings PIL
    assert text.count("\n") <= lines and max(map(len, text.splitlines())) <= WIDTH
    if name == "common":
        assert text.partition("- files and processes\n")[0].count("\n") <= DATA


MUTATIONS = {
    "rename": ("cosine, index = ", "cosine, indices = "),
    "reflow": ("    out = []\n    f.eval()\n", "    out = []; f.eval()\n"),
    "one-file fix": ("base * 0.5 * (1 + ", "base / 2 * (1 + "),
    "foreign import": ("import torch\n", "import torch\nimport scipy\n"),
    "import elsewhere": ("def neg_cosine(", "import copy\n\n\ndef neg_cosine("),
    "misspelt banner": ("= 6. kNN monitor (shared) =", "= 6. KNN monitor (shared) ="),
    "wrong order": ("= 3. Loss and updates (method) =", "= 4. Model (method) ="),
    "dropped fence": ("            # </method>\n            loss.backward()",
                      "            loss.backward()"),
    "text outside a fence": ("            optimizer.zero_grad()\n",
                             "            optimizer.zero_grad()\n            z = z1\n"),
    "missing source": (" [SimSiam Fig. 2]\")", "\")"),
    "long line": ("import argparse\n", "import argparse" + " " * 86 + "\n"),
    "packed lines": ("import argparse\n", 60 * ("#" * 91 + "\n") + "import argparse\n"),
    "grown fence": ("            # </method>\n            loss.backward()",
                    14 * "            pass\n"
                    + "            # </method>\n            loss.backward()"),
    "grown file": ("import argparse\n", "import argparse\n" + 40 * "\n"),
    "no licence": ("# SPDX-License-Identifier: MIT\n", ""),
    "import of another method": ("import torch\n", "import moco\nimport torch\n")}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_caught(mutation):
    sources, (old, new) = read(), MUTATIONS[mutation]
    assert sources["simsiam"].count(old) == 1
    assert problems({**sources, "simsiam": sources["simsiam"].replace(old, new)})


def changed(a, b):
    """Lines that GNU diff removes and adds between two scripts: what users see."""
    done = subprocess.run(["diff", f"{a}.py", f"{b}.py"], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    return sum(line[0] == "<" for line in lines), sum(line[0] == ">" for line in lines)


@pytest.mark.parametrize("a, b", [*combinations(SCRIPTS, 2)])
def test_a_diff_is_short(a, b):
    assert 0 < sum(changed(a, b)) <= PAIR


def test_logo_keeps_simsiam():
    assert changed("simsiam", "simsiam_logo")[0] <= REMOVED


def test_public_functions_are_explained():
    """Every public function and class has a docstring, of at most eight lines."""
    inner = {"forward", "parse", "weights", "draw", "uniform", "gather", "read",
             "closure", "opens"}
    for name in (*SCRIPTS, "common", "linear_eval"):
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name[0] == "_":
                continue
            doc = ast.get_docstring(node)
            assert doc or node.name in inner, f"{name}.{node.name}"
            assert not doc or doc.count("\n") < 8, f"{name}.{node.name}"


SHARED = {
    "crop_resize": "x boxes size", "random_resized_crop": "x size scale ratio generator",
    "adjust_brightness": "x factor", "adjust_contrast": "x factor",
    "adjust_saturation": "x factor", "adjust_hue": "x factor", "grayscale": "x",
    "gaussian_blur": "x sigma", "augment": "x args generator",
    "learning_rate": "step total_steps base warmup_steps",
    "knn_accuracy": "bank bank_labels queries labels num_classes k tau",
    "parse_args": "argv", "main": "argv", "add_recipe": "parser", "check_recipe": "args"}
NAMES = {
    "simclr": {"nt_xent": "z1 z2 tau", "LARS": None, **SHARED},
    "moco": {"info_nce": "q k queue tau", "momentum_update": "f f_k m",
             "enqueue": "queue ptr k", **SHARED},
    "simsiam": {"neg_cosine": "p z stop_gradient", **SHARED},
    "simsiam_logo": {"neg_cosine": "p z stop_gradient", "affinity_loss": "pos neg",
                     "logo_loss": "p z l_ll lam stop_gradient", **SHARED},
    "linear_eval": {"parse_args": "argv", "main": "argv"},
    "common": {"load_dataset": "name data_dir image_size cache_dir device skip_broken max_pixels",
               "resnet": "arch width stem", "normalize": "x mean std"}}


@pytest.mark.parametrize("module", NAMES)
def test_the_names_users_import(module):
    """DESIGN's table of names, with their arguments."""
    for name, arguments in NAMES[module].items():
        function = getattr(importlib.import_module(module), name)
        parameters = [*inspect.signature(function).parameters]
        assert arguments is None or parameters == arguments.split(), name


def test_lines_of_the_tests_are_short():
    for path in (ROOT / "tests").glob("*.py"):
        assert max(map(len, path.read_text().splitlines())) <= WIDTH, path.name


def test_the_house_holds_nothing_else():
    """Top level: what DESIGN names."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tops = {path.split("/")[0] for path in listed.stdout.split()}
    assert tops <= {"README.md", "requirements.txt", *(f"{name}.py" for name in SCRIPTS),
                    "common.py", "linear_eval.py", "tests", ".ci", ".gitignore"}
