"""A diff of two scripts shows the method alone, and every file can be read from top to bottom.

`problems` reads the sources of the product files and lists in words what breaks a rule. That
every rule bites is proved at each run by mutations (test_each_rule_finds_its_mutation).
"""

import ast
import importlib
import inspect
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from functools import cache
from itertools import combinations

import pytest

from conftest import METHODS, ROOT, SCRIPTS

SECTIONS = [
    "Imports (shared)", "1. Recipe (method)", "2. Views (method)",
    "3. Loss and updates (method)", "4. Model (method)", "5. Training (shared, with fences)",
    "6. kNN monitor (shared)", "7. Augmentation operations (shared)", "8. Options (shared)",
    "9. Devices, processes and run files (shared)"]
TRAINING = SECTIONS[5]
BANNER = re.compile(r"(?m)^# =+ (.*?) =+\n")
FENCE = re.compile(r"(?ms)^ *# <method>\n(.*?)^ *# </method>\n")
COPYRIGHT = '"""\n# SPDX-License-Identifier: MIT\n# Copyright (c) 2026 the authors\n'
FILES = (*SCRIPTS, "common", "linear_eval")
TESTS = sorted(path.stem for path in (ROOT / "tests").glob("*.py"))

# Budgets. Tokens are counted because packing lines does not lower them.
TOKENS = {name: method["tokens"] for name, method in METHODS.items()}
TOKENS |= {"common": 4000, "linear_eval": 4800}
AVERAGE, DENSE = 11, 30  # tokens of a code line: on average in a file, and at most
WIDTH, LONG, LONG_LINES = 100, 90, 20  # characters; lines of a file that may be long
FUNCTION, FUNCTIONS = 40, {"train": 125, "draw_shapes": 50}  # lines of a function
FROM_COMMON = 10  # names that a script imports from common.py
DIFFERENT = 300  # lines that a diff of two scripts removes and adds
REMOVED = {("simsiam", "simsiam_logo"): 30}  # of these: lines that it removes
DOCSTRING = 12  # lines of a docstring

LIBRARIES = {"torch", "torchvision", "numpy"}
IMPORTS = {name: {*LIBRARIES, "common"} for name in SCRIPTS}
IMPORTS["common"] = {*LIBRARIES, "PIL"}  # torchvision brings PIL
IMPORTS["linear_eval"] = {*LIBRARIES, "PIL", "common", "simsiam"}

FUNCTIONS_AND_CLASSES = (ast.FunctionDef, ast.ClassDef)
FREE = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER", "ENCODING"}


parse = cache(ast.parse)  # a mutation leaves the other files as they are


@cache
def walk(tree):
    """All nodes of a tree, which ast.walk is slow to find."""
    return [*ast.walk(tree)]


# ------------------------------------------------------------------------------------- tokens
def docstring_lines(tree):
    """The numbers of all lines that belong to docstrings."""
    lines = set()
    for node in walk(tree):
        if isinstance(node, (ast.Module, *FUNCTIONS_AND_CLASSES)) and ast.get_docstring(node):
            first = node.body[0]
            lines.update(range(first.lineno, first.end_lineno + 1))
    return lines


def tokens_by_line(text):
    """How many tokens begin in each line that has any: a Counter of line numbers.

    Comments, line ends, indentation and docstrings are not counted. An f-string counts as one
    token: Python 3.12 and later split it, and between its start and its end nothing counts.
    """
    docstrings, counts, depth = docstring_lines(parse(text)), Counter(), 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind, line = tokenize.tok_name[token.type], token.start[0]
        in_docstring = kind == "STRING" and line in docstrings
        counted = depth == 0 and kind not in FREE and not in_docstring
        if kind.endswith("STRING_START"):
            depth += 1
        elif kind.endswith("STRING_END"):
            depth -= 1
        if counted:
            counts[line] += 1
    return counts


def crowded(name, text):
    """Lines and files with too many tokens or characters."""
    counts, lines = tokens_by_line(text), text.splitlines()
    for line, count in counts.items():
        if count > DENSE:
            yield f"{name}:{line}: {count} tokens in a line"
    for number, line in enumerate(lines, 1):
        if len(line) > WIDTH:
            yield f"{name}:{number}: {len(line)} characters in a line"
    if name not in FILES:
        return
    if counts.total() > TOKENS[name]:
        yield f"{name}: {counts.total()} tokens are more than {TOKENS[name]}"
    average = counts.total() / len(counts)
    if average > AVERAGE:
        yield f"{name}: {average:.2f} tokens a code line on average"
    long = sum(len(line) > LONG for line in lines)
    if long > LONG_LINES:
        yield f"{name}: {long} lines are longer than {LONG} characters"


# -------------------------------------------------------------------------------------- names
@cache
def names(node, context):
    """Names that are read (ast.Load) or written (ast.Store) in a node."""
    found = [part for part in walk(node) if isinstance(part, ast.Name)]
    return {part.id for part in found if isinstance(part.ctx, context)}


@cache
def imported(tree):
    """The names that the import statements of a file bind."""
    bound = set()
    for node in walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
    return bound


def unread(name, text):
    """Imports and local names that nothing reads."""
    tree = parse(text)
    for unused in sorted(imported(tree) - names(tree, ast.Load)):
        yield f"{name}: unused import {unused}"
    for function in walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        outer = set()  # names of another function or of the module
        for node in walk(function):
            if isinstance(node, (ast.Global, ast.Nonlocal)):
                outer.update(node.names)
        written = names(function, ast.Store) - outer
        for unused in sorted(written - names(function, ast.Load) - {"_"}):
            yield f"{name}: {function.name} never reads its {unused}"


def defined(tree):
    """Names of the functions, classes and constants of a file."""
    found = set()
    for node in tree.body:
        if isinstance(node, FUNCTIONS_AND_CLASSES):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= names(node, ast.Store)
    return found


@cache
def uses(tree):
    """The names that a file reads or imports, also those of another file: simsiam.features."""
    attributes = {node.attr for node in walk(tree) if isinstance(node, ast.Attribute)}
    return names(tree, ast.Load) | imported(tree) | attributes


def uncalled(sources):
    """Functions, classes and constants of a product file that no product file uses."""
    trees = {name: parse(text) for name, text in sources.items()}
    used = set().union(*map(uses, trees.values()))
    for name, tree in trees.items():
        public = set(METHODS[name]["names"]) if name in METHODS else set()
        for unused in sorted(defined(tree) - used - public):
            yield f"{name}: nothing uses {unused}"


def helpers_without_users(sources):
    """Functions, classes and constants of test files that no test file uses."""
    trees = {name: parse(text) for name, text in sources.items()}
    used = set().union(*map(uses, trees.values()))
    for tree in trees.values():  # fixtures are arguments of tests
        used |= {node.arg for node in walk(tree) if isinstance(node, ast.arg)}
    for name, tree in trees.items():
        automatic = {node.name for node in tree.body if "autouse=True" in decorators(node)}
        for unused in sorted(defined(tree) - used - automatic):
            if not unused.startswith(("test_", "pytest_")):
                yield f"{name}: nothing uses {unused}"


def decorators(node):
    """The text of the decorators of a function."""
    return " ".join(map(ast.unparse, getattr(node, "decorator_list", [])))


# ---------------------------------------------------------------------------------- functions
def lengthy(name, tree):
    """Functions that do not fit on a screen."""
    for node in walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTIONS.get(node.name, FUNCTION):
                yield f"{name}: {node.name} has {lines} lines"


def chained(call):
    """Whether a call is of what another call returned, as in text.strip().split()."""
    caller = call.func
    while isinstance(caller, (ast.Attribute, ast.Subscript)):
        caller = caller.value
        if isinstance(caller, ast.Call):
            return True
    return False


def code_in_strings(name, tree):
    """f-strings, one token each, that hide a conditional or a chain of calls."""
    strings = (node for node in walk(tree) if isinstance(node, ast.JoinedStr))
    for string in strings:
        for node in walk(string):
            if isinstance(node, ast.IfExp):
                yield f"{name}:{node.lineno}: conditional in an f-string"
            if isinstance(node, ast.Call) and chained(node):
                yield f"{name}:{node.lineno}: chain of calls in an f-string"


def explained(name, tree):
    """Public functions, classes and methods without a docstring, or with a very long one."""
    parents = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
    for node in (node for parent in parents for node in parent.body):
        if not isinstance(node, FUNCTIONS_AND_CLASSES) or node.name.startswith("_"):
            continue
        text = ast.get_docstring(node)
        if text is None and node.name != "forward":
            yield f"{name}: {node.name} has no docstring"
        elif text is not None and text.count("\n") >= DOCSTRING:
            yield f"{name}: the docstring of {node.name} is long"


# ------------------------------------------------------------------------------- the scripts
def sections(text):
    """Name to text of each section, in order; the docstring comes first, under ''."""
    parts = BANNER.split(text)
    return dict(zip(["", *parts[1::2]], parts[::2]))


def layout(sources):
    """Sections in another order, with other shared text, or with fences where none may be."""
    first = None
    for name, text in sources.items():
        parts = sections(text)
        if [*parts][1:] != SECTIONS:
            yield f"{name}: sections are {[*parts][1:]}"
            continue
        shared = {key: FENCE.sub("", body) for key, body in parts.items() if "(shared" in key}
        first = first or shared
        for key in shared:
            if shared[key] != first[key]:
                yield f"{name}: section {key} is not the others'"
        fences = FENCE.findall(parts.pop(TRAINING))
        elsewhere = [key for key, body in parts.items() if re.search("</?method>$", body, re.M)]
        if not 2 <= len(fences) <= 3 or elsewhere:
            yield f"{name}: {len(fences)} fences, others in {elsewhere}"
        lines = sum(fence.count("\n") for fence in fences)
        if lines > METHODS[name]["fences"]:
            yield f"{name}: its fences hold {lines} lines"


def helps(recipe):
    """Name and help text of each flag that add_recipe adds: by add_flags, or one by one."""
    for node in walk(recipe):
        if isinstance(node, ast.Tuple):
            first, text = node.elts[0], node.elts[-1]
        elif isinstance(node, ast.Call) and node.args:
            texts = [keyword.value for keyword in node.keywords if keyword.arg == "help"]
            first, text = node.args[0], (texts or [None])[0]
        else:
            continue
        name = getattr(first, "value", None)
        if isinstance(name, str) and name.startswith("--"):
            yield name, getattr(text, "value", None)


def method(name, tree):
    """Recipe numbers without a source, and a story that is too long."""
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    flags = dict(helps(functions["add_recipe"]))
    if "--lr" not in flags:
        yield f"{name}: add_recipe adds no --lr"
    for flag, text in flags.items():
        if not re.search(r"\[[^\[\]]*\w[^\[\]]*\]$", str(text)):
            yield f"{name}: {flag} has no source"
    end = functions["train"].end_lineno
    if end > METHODS[name]["story"]:
        yield f"{name}: its story ends at line {end}"


def imports(name, text, tree):
    """Imports of other packages, in other places, or of too many names."""
    banner = f" {SECTIONS[1]} "
    end = text.partition(banner)[0].count("\n")  # where the section of the imports ends
    for node in walk(tree):
        if isinstance(node, ast.Import):
            packages = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            packages = {(node.module or ".").split(".")[0]}
        else:
            continue
        foreign = packages - IMPORTS[name] - set(sys.stdlib_module_names)
        if foreign:
            yield f"{name}:{node.lineno}: import of {foreign}"
        if name in SCRIPTS and node.lineno > end:
            yield f"{name}:{node.lineno}: import of {packages} in another section"
        if name in SCRIPTS and "common" in packages and len(node.names) > FROM_COMMON:
            yield f"{name}:{node.lineno}: imports {len(node.names)} names from common.py"


@cache
def file_problems(name, text):
    """What breaks the rules for one product file, in words."""
    try:
        tree = parse(text)
    except SyntaxError as problem:
        return [f"{name}: {problem}"]
    found = [*crowded(name, text), *unread(name, text), *lengthy(name, tree)]
    found += [*code_in_strings(name, tree), *explained(name, tree), *imports(name, text, tree)]
    if COPYRIGHT not in text:
        found.append(f"{name}: no licence and copyright under the docstring")
    if name in SCRIPTS:
        found += method(name, tree)
    return found


def changed(text, other):
    """Lines that GNU diff removes from a text and adds to it to make it another script's."""
    done = subprocess.run(["diff", "-", ROOT / f"{other}.py"], input=text,
                          capture_output=True, text=True)
    signs = Counter(line[0] for line in done.stdout.splitlines())
    return signs["<"], signs[">"]


@cache
def difference(name, text, other):
    """What is too large in the diff of a script and another one."""
    found = []
    removed, added = changed(text, other)
    if not 0 < removed + added <= DIFFERENT:
        found.append(f"the diff of {name} and {other} changes {removed + added} lines")
    if removed > REMOVED.get((name, other), DIFFERENT):
        found.append(f"the diff of {name} and {other} removes {removed} lines")
    return found


def problems(sources):
    """What breaks the rules in the product files (name to text), in words."""
    scripts = {name: sources[name] for name in SCRIPTS}
    found = [*layout(scripts)]
    for name, text in sources.items():
        found += file_problems(name, text)
    if any("invalid syntax" in problem for problem in found):
        return found
    found += uncalled(sources)
    for name, other in combinations(SCRIPTS, 2):
        found += difference(name, sources[name], other)
    return found


def read(names=FILES):
    """The sources of files of the top folder: name to text."""
    return {name: (ROOT / f"{name}.py").read_text() for name in names}


# -------------------------------------------------------------------------------------- tests
def test_shared_sections_are_identical_in_all_scripts():
    assert not [*layout(read(SCRIPTS))]


@pytest.mark.parametrize("name", FILES)
def test_a_product_file_keeps_the_rules(name):
    text = (ROOT / f"{name}.py").read_text()
    assert not file_problems(name, text)


def test_everything_in_the_product_files_is_used():
    assert not [*uncalled(read())]


@pytest.mark.parametrize("a, b", [*combinations(SCRIPTS, 2)])
def test_the_diff_of_two_scripts_is_short(a, b):
    text = (ROOT / f"{a}.py").read_text()
    assert not difference(a, text, b)


def test_everything_in_the_test_files_is_used():
    sources = {name: (ROOT / f"tests/{name}.py").read_text() for name in TESTS}
    assert not [*helpers_without_users(sources)]
    sources["test_x"] = "def helper():\n    pass\n"
    assert [*helpers_without_users(sources)] == ["test_x: nothing uses helper"]


@pytest.mark.parametrize("name", TESTS)
def test_test_files_have_short_lines_and_read_all_their_names(name):
    text = (ROOT / f"tests/{name}.py").read_text()
    assert not [*crowded(name, text), *unread(name, text)]


def test_the_repository_holds_no_other_files():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    tops = {path.split("/")[0] for path in listed.stdout.splitlines()}
    products = {f"{name}.py" for name in FILES}
    assert products <= tops, "git add the new file"
    assert tops - products <= {
        "README.md", "LICENSE", "requirements.txt", "tests", ".ci", ".gitignore"}


# ---------------------------------------------------------------------------------- mutations
IMPORT, STEP = "import argparse\n", "                optimizer.zero_grad()\n"
AFTER_LOSS = "                # </method>\n                loss.backward()\n"
FULL_LINE = "NUMBERS = [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"  # 29 tokens
MUTATIONS = {  # of simsiam.py: text, what replaces it, and words of the problem that it makes
    "renamed in one file": (
        "cosine, index = ", "cosine, indices = ", "6. kNN monitor (shared) is not"),
    "reflowed in one file": (
        "    parts = []\n    f.eval()\n", "    parts = []; f.eval()\n", "6. kNN monitor"),
    "fixed in one file": (
        "base * 0.5 * (1 + ", "base / 2 * (1 + ", "5. Training (shared, with fences) is not"),
    "foreign import": (
        "import torch\n", "import torch\nimport scipy\n", "import of {'scipy'}"),
    "import of another script": (
        "import torch\n", "import moco\nimport torch\n", "import of {'moco'}"),
    "import in another section": (
        "def neg_cosine(", "import copy\n\n\ndef neg_cosine(", "in another section"),
    "unused import": (
        IMPORT, IMPORT + "import bisect\n", "unused import bisect"),
    "unused local name": (
        STEP, STEP + "                unused = 1\n", "train never reads its unused"),
    "unused function": (
        "def neg_cosine(", "def helper():\n    pass\n\n\ndef neg_cosine(", "nothing uses helper"),
    "many names from common": (
        "import (ARCHS, ", "import (ARCHS, LITTER, SHAPES, ", "names from common.py"),
    "misspelt banner": (
        "= 6. kNN monitor (shared) =", "= 6. KNN monitor (shared) =", "sections are"),
    "sections in another order": (
        "= 3. Loss and updates (method) =", "= 4. Model (method) =", "sections are"),
    "dropped fence": (
        AFTER_LOSS, "                loss.backward()\n", "1 fences"),
    "fence in another section": (
        "def neg_cosine(", "# <method>\ndef neg_cosine(", "others in ['3. Loss"),
    "method line outside a fence": (
        STEP, STEP + "                z = z1\n", "5. Training (shared, with fences) is not"),
    "grown fences": (
        AFTER_LOSS, 14 * "                pass\n" + AFTER_LOSS, "fences hold"),
    "flag without a source": (
        ' [SimSiam Fig. 2]")', '")', "--stop-gradient has no source"),
    "empty source": (
        ' [SimSiam Fig. 2]")', ' []")', "--stop-gradient has no source"),
    "flag without a source, added alone": (
        "def check_recipe(", "    parser.add_argument('--more', help='more')\n\n\n"
        "def check_recipe(", "--more has no source"),
    "wide line": (
        IMPORT, "import argparse" + 86 * " " + "\n", "101 characters"),
    "many long lines": (
        IMPORT, 20 * ("#" + 90 * "-" + "\n") + IMPORT, "longer than 90"),
    "dense line": (
        "def neg_cosine(", "NUMBERS = [" + 15 * "1, " + "]\n\n\ndef neg_cosine(",
        "tokens in a line"),
    "dense file": (
        "def neg_cosine(", 100 * FULL_LINE + "\n\ndef neg_cosine(", "on average"),
    "more tokens than the budget": (
        "def neg_cosine(", "NUMBERS = [\n" + 60 * "    1,\n" + "]\n\n\ndef neg_cosine(",
        "tokens are more than 6000"),
    "long function": (
        "def neg_cosine(", "def helper():\n" + 40 * "    pass\n" + "\n\ndef neg_cosine(",
        "helper has 41 lines"),
    "long training loop": (
        AFTER_LOSS, 30 * "                pass\n" + AFTER_LOSS, "train has"),
    "long story": (
        IMPORT, 20 * "# A comment.\n" + IMPORT, "story ends at"),
    "conditional in an f-string": (
        'f"wrote {args.out};', 'f"wrote {args.out if args else 0};', "conditional in an"),
    "chain of calls in an f-string": (
        'f"wrote {args.out};', 'f"wrote {args.out.strip().title()};', "chain of calls"),
    "no docstring": (
        "def neg_cosine(", "def helper():\n    pass\n\n\ndef neg_cosine(",
        "helper has no docstring"),
    "no licence": (
        "# SPDX-License-Identifier: MIT\n", "", "no licence"),
    "no copyright": (
        "# Copyright (c) 2026 the authors\n", "", "no licence and copyright"),
    "long diff": (
        IMPORT, 300 * "# A comment.\n" + IMPORT, "the diff of simsiam and simsiam_logo changes"),
    "many removed lines": (
        IMPORT, 31 * "# A comment.\n" + IMPORT, "simsiam and simsiam_logo removes"),
    "syntax error": (
        "def neg_cosine(", "def def neg_cosine(", "invalid syntax")}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_each_rule_finds_its_mutation(mutation):
    """A change of simsiam.py makes a problem of these words, which is not there without it."""
    sources, (old, new, words) = read(), MUTATIONS[mutation]
    assert sources["simsiam"].count(old) == 1
    before = problems(sources)
    sources["simsiam"] = sources["simsiam"].replace(old, new)
    made = [problem for problem in problems(sources) if problem not in before]
    assert any(words in problem for problem in made), made


def test_tokens_are_counted_without_prose_and_with_one_for_an_f_string():
    text = (
        '"""A docstring."""\n'
        "def f(x):  # a comment\n"
        '    """Another one,\n'
        '    of two lines."""\n'
        "\n"
        """    return f"{x + 1:{x}} and {f'{x}'}", 'text'\n""")
    assert tokens_by_line(text) == {2: 6, 6: 4}


@pytest.mark.parametrize("text, words", [
    ("import os\n", "unused import os"),
    ("def f():\n    a, b = 1, 2\n    return b\n", "f never reads its a"),
    ("x = [" + 14 * "1, " + "1]\n", "33 tokens in a line"),
    ("#" * 101, "101 characters in a line")])
def test_the_rules_for_test_files_find_what_breaks_them(text, words):
    found = [*crowded("test_x", text), *unread("test_x", text)]
    assert len(found) == 1 and words in found[0]


# ------------------------------------------------------------------------- names users import
SHARED = {
    "train": "args data begin",
    "crop_resize": "x boxes size",
    "random_resized_crop": "x size scale ratio generator",
    "adjust_brightness": "x factor", "adjust_contrast": "x factor",
    "adjust_saturation": "x factor", "adjust_hue": "x factor",
    "grayscale": "x", "gaussian_blur": "x sigma",
    "color_jitter": "x brightness contrast saturation hue p generator",
    "random_flip": "x generator", "random_grayscale": "x p generator",
    "augment": "x args generator",
    "learning_rate": "step total_steps base warmup_steps",
    "knn_accuracy": "bank bank_labels queries labels num_classes k tau leave_one_out",
    "Model": "base_encoder args",
    "add_recipe": "parser", "check_recipe": "args count",
    "parse_args": "argv method", "main": "argv method"}
NAMES = {name: {**SHARED, **method["names"]} for name, method in METHODS.items()}
NAMES["linear_eval"] = {"parse_args": "argv", "main": "argv"}
NAMES["common"] = {
    "load_dataset": "name data_dir image_size cache_dir device skip_broken max_pixels",
    "resnet": "arch width stem", "normalize": "x mean std"}


@pytest.mark.parametrize("module", NAMES)
def test_the_names_that_users_import_keep_their_arguments(module):
    for name, arguments in NAMES[module].items():
        function = getattr(importlib.import_module(module), name)
        parameters = [*inspect.signature(function).parameters]
        assert parameters == arguments.split(), name
