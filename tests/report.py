"""Logs to tables and curves, so that no number is typed by hand.

    python tests/report.py                                  what the project shows: see OUTPUTS
    python tests/report.py runs/*/log.jsonl --svg curves.svg      your own runs

OUTPUTS: tests/reference/RESULTS.md (every kept run), tests/reference/curves.svg and the table of
README.md between its two markers, all from the logs under tests/reference/.
"""

import argparse
import importlib
import json
import math
import re
import statistics
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
REFERENCE = ROOT / "tests" / "reference"
FOLDERS = {
    "headline": "What do the defaults, today's or earlier ones, reach in 200 epochs on CIFAR-10?",
    "few_epochs": "Does kNN rise within minutes on a CPU? (This does not rank the methods.)",
    "distillation": "SimCLR v2's three steps on a CPU: does a student beat its teacher? (PLAN.md)",
    "ablations/simsiam_schedule": "Which schedule ends higher, after 30 epochs at a quarter of the "
                                  "width? (PLAN.md; arms a, b, ... as there)",
    "ablations/logo_weights": "How are LoGo's terms best weighed? (PLAN.md, amendment 9; arms f, "
                              "g, ... as there; f30: five epochs of f by part 2)"}
METHODS = {  # idea, published kNN at 200 epochs and batch 512, its source
    "simclr": ("all other views of the batch are negatives", "82.8-84.8",
               "[lightly](https://docs.lightly.ai/self-supervised-learning/getting_started/"
               "benchmarks.html), tables of 2022 and today"),
    "moco": ("queued keys of a slow copy are negatives", "84.7-85.3",
             "lightly; [the authors' demo](https://colab.research.google.com/github/"
             "facebookresearch/moco/blob/colab-notebook/colab/moco_cifar10_demo.ipynb)"),
    "simsiam": ("a predictor and a stop-gradient, no negatives", "76.4-81.7",
                "lightly, tables of today and 2023"),
    "simsiam_logo": ("SimSiam with two local views more", "87.7",
                     "the paper, quoted second-hand; its epochs and k are not known")}
COLORS = {"simclr": "#0072b2", "moco": "#009e73", "simsiam": "#d55e00", "simsiam_logo": "#cc79a7"}


def read(path):
    """A log as (its first header, its epochs); torn and repeated lines count once."""
    headers, epochs = [], {}
    for line in Path(path).read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "epoch" in record:
            epochs[record["epoch"]] = record
        else:
            headers.append(record)
    args = headers[0]["args"]
    if "warmup_epochs" in args:  # logs of earlier versions
        args["warmup"] = args.pop("warmup_epochs") / args["epochs"]
    return headers[0], [epochs[epoch] for epoch in sorted(epochs)]


def method(path, header):
    """The script that wrote a log: by its header, or by the file's name if that is older."""
    names = [name for name in METHODS if Path(path).stem.startswith(name)]
    return header.get("method") or max(names, key=len)


def command(name, args):
    """What to type today, but for places and what changes nothing but how often there is a kNN."""
    defaults = vars(importlib.import_module(name).parse_args([]))
    places = ("out", "seed", "workers", "cache_dir", "resume", "overwrite", "save_views", "device",
              "knn_every")
    words = [f"python {name}.py"]
    for key, value in args.items():
        flag = "--" + key.replace("_", "-")
        if key not in defaults or key in places or value == defaults[key]:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-"))
        else:
            several = value if isinstance(value, list) else [value]
            words.append(" ".join([flag, *map(str, several)]))
    return " ".join(words)


def last(epochs):
    """The kNN accuracy of the last epoch that has one."""
    return [record["knn"] for record in epochs if record.get("knn") is not None][-1]


def minutes(epochs):
    """Training and monitoring, as logged."""
    return sum(record.get("seconds") or 0 for record in epochs[1:]) / 60 + sum(
        record.get("knn_seconds") or 0 for record in epochs) / 60


def spread(values, digits=1):
    """One value, or the mean with the lowest and the highest."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    low, high = min(values), max(values)
    return f"{statistics.mean(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def runs(folder):
    """The logs of a folder of one arm and command, seeds apart: (name, arm, command) to a list."""
    groups = {}
    for path in sorted((REFERENCE / folder).glob("*.jsonl")):
        if path.name.startswith("linear_eval"):
            continue
        header, epochs = read(path)
        name = method(path, header)
        key = (name, path.stem.split("_seed")[0], command(name, header["args"]))
        groups.setdefault(key, []).append((path, header, epochs))
    return groups


def results():
    """RESULTS.md."""
    out = ["# Results", "", "Made by `python tests/report.py` from the logs in these folders: kNN "
           "in percent after the last epoch, of a run cut short after the last that has one, mean "
           "(lowest-highest) over seeds. Commands are for today's defaults, not for those of the "
           "commit beside them. Minutes as logged: on a CPU with other work on the machine and "
           "pauses.", ""]
    for folder, question in FOLDERS.items():
        groups = runs(folder)
        if not groups:
            continue
        out += [f"## {folder}", "", question, "",
                "| command | seeds | epochs | kNN | std | minutes | device | commit | logs |",
                "|---|---|---|---|---|---|---|---|---|"]
        for (_, arm, typed), found in groups.items():
            patch = REFERENCE / folder / f"{arm}.patch"  # what the arm changes in the script
            ends = [epochs[-1] for _, _, epochs in found]
            total = found[0][1]["args"]["epochs"]
            done = "/".join(sorted({str(end["epoch"]) for end in ends}))
            cells = [
                f"`{typed}`" + f" with {patch.name}" * patch.exists(),
                " ".join(str(header["args"]["seed"]) for _, header, _ in found),
                str(total) if done == str(total) else f"{done} of {total}: unfinished",
                spread([last(epochs) for _, _, epochs in found]),
                spread([end["std"] for end in ends], 2),
                spread([minutes(epochs) for _, _, epochs in found], 0),
                ", ".join(sorted({header["device"] for _, header, _ in found})),
                ", ".join(sorted({str(header["commit"]) for _, header, _ in found})),
                " ".join(path.name for path, _, _ in found)]
            out.append("| " + " | ".join(cells) + " |")
        out += ["", *few_labels(folder)]
    return "\n".join(out)


def few_labels(folder):
    """What linear_eval.py reached with few labels: a row a label fraction, if there are any."""
    found, seeds, epochs, above = {}, set(), set(), []
    for path in sorted((REFERENCE / folder).glob("eval_*.json")):
        record = json.loads(path.read_text())
        args = record["args"]
        row = found.setdefault(args["label_fraction"], {})
        seeds.add(args["seed"])
        row.setdefault(args["mode"], []).append(record["top1"])
        row.setdefault(f"{args['mode']} minutes", []).append(record["seconds"] / 60)
        if args["mode"] == "distill":
            row.setdefault("finetune", []).append(record["teacher_top1"])
            epochs.add(str(args["epochs"]))
            above.append(record["top1"] > record["teacher_top1"])
    if not found:
        return []
    out = [f"Right of all test images, in percent, by `linear_eval.py`; seeds "
           f"{' '.join(map(str, sorted(seeds)))}; students of {'/'.join(sorted(epochs))} epochs. "
           f"In {sum(above)} of {len(above)} runs the student is above its teacher. Minutes are of "
           "one run on one core.", "",
           "| labels | from scratch | fine-tuned: the teacher | distilled: the student | minutes: "
           "from scratch | teacher and student |", "|---|---|---|---|---|---|"]
    for fraction, row in sorted(found.items()):
        cells = [spread(row[key], digits) if key in row else "-" for key, digits in (
            ("scratch", 1), ("finetune", 1), ("distill", 1), ("scratch minutes", 0),
            ("distill minutes", 0))]
        out.append(f"| {100 * fraction:g} % | " + " | ".join(cells) + " |")
    return [*out, ""]


def mark(path):
    """What follows a number of `headline`: earlier defaults, a lossy copy of the data."""
    header, _ = read(path)
    parser = argparse.ArgumentParser()
    importlib.import_module(method(path, header)).add_recipe(parser)
    recipe = vars(parser.parse_args([]))
    earlier = any(header["args"].get(key) != value for key, value in recipe.items())
    notes = ["earlier defaults"] * earlier + ["JPEG copy"] * path.stem.endswith("_jpeg")
    return f" ({', '.join(notes)})" if notes else ""


def headline():
    """Method to its runs of 200 epochs; those by today's defaults, if there are any."""
    groups = sorted(runs("headline").items(), key=lambda item: not mark(item[1][0][0]))
    return {name: group for (name, *_), group in groups}


def table():
    """README's table of the methods."""
    out = ["| method | what keeps the constant solution away | kNN here | published | linear here "
           "| minutes | command |", "|---|---|---|---|---|---|---|"]
    found = headline()
    for name, (idea, published, source) in METHODS.items():
        knn = took = linear = "-"
        if name in found:
            ends, (path, header, _) = [last(epochs) for _, _, epochs in found[name]], found[name][0]
            device = re.sub(r"NVIDIA | 80GB HBM3", "", header["device"])
            knn = f"{spread(ends)}{mark(path)}"
            took = f"{spread([minutes(e) for _, _, e in found[name]], 0)} ({device})"
            judge = path.with_name(f"linear_eval_{path.name}")
            if judge.exists():
                linear = f"{json.loads(judge.read_text().splitlines()[0])['top1']:.1f}{mark(path)}"
        out.append(f"| `{name}.py` | {idea} | {knn} | {published}: {source} | "
                   f"{linear} | {took} | `python {name}.py` |")
    return "\n".join(out)


def svg(curves, dashed=()):
    """Curves (label, color, [(epoch, kNN)]) and dashed lines (label, color, kNN) as plain SVG."""
    names = [f"{label} {points[-1][1]:.1f}" for label, _, points in curves] + [
        f"{label} {knn:.1f}" for label, _, knn in dashed]
    left, bottom, right = 46, 40, 32 + 7 * max(map(len, names))
    width, height = 550 + right, 400
    epochs = max(epoch for *_, points in curves for epoch, _ in points)
    values = [knn for *_, points in curves for _, knn in points] + [knn for *_, knn in dashed]
    low, high = 10 * math.floor(min(values) / 10), 10 * math.ceil(max(values) / 10)

    def at(epoch, knn):
        x = left + (width - left - right) * epoch / max(epochs, 1)
        return x, height - bottom - (height - bottom - 16) * (knn - low) / max(high - low, 1)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
           'font-family="sans-serif" font-size="12">',
           "<style>text{fill:#24292f}.axis{stroke:#8c959f}"
           "@media(prefers-color-scheme:dark){text{fill:#d0d7de}}</style>"]
    for knn in range(low, high + 1, 10):
        x, y = at(0, knn)
        out += [f'<line class="axis" x1="{x}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}" '
                'stroke-opacity=".3"/>', f'<text x="{x - 26}" y="{y + 4:.1f}">{knn}</text>']
    for part in range(5):
        x, y = at(epochs * part / 4, low)
        out.append(f'<text x="{x - 8:.1f}" y="{y + 18:.1f}">{epochs * part / 4:g}</text>')
    out.append(f'<text x="{left}" y="{height - 6}">epoch; kNN accuracy in percent</text>')
    labels = []
    for label, color, points in curves:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        labels.append((at(*points[-1])[1], f"{label} {points[-1][1]:.1f}", color))
    for label, color, knn in dashed:
        y = at(0, knn)[1]
        out.append(f'<line x1="{left}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}" '
                   f'stroke="{color}" stroke-dasharray="5 4"/>')
        labels.append((y, f"{label} {knn:.1f}", color))
    free = 0.0
    for y, text, color in sorted(labels):
        free = max(free + 14, y)  # no label over another
        out += [f'<rect x="{width - right + 8}" y="{free - 4:.1f}" width="8" height="8" '
                f'fill="{color}"/>', f'<text x="{width - right + 20}" y="{free + 4:.1f}">'
                f"{escape(text)}</text>"]
    return "\n".join([*out, "</svg>", ""])


def curve(epochs):
    return [(record["epoch"], record["knn"]) for record in epochs if record.get("knn") is not None]


def headline_svg():
    """The 200-epoch runs and what is published for them."""
    found = headline()
    curves = [(name + mark(group[0][0]), COLORS[name], curve(group[0][2]))
              for name, group in found.items()]
    dashed = [(f"{name}, published", COLORS[name], float(METHODS[name][1].split("-")[-1]))
              for name in found]
    return svg(curves, dashed)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("logs", nargs="*", help="your logs (default: the project's)")
    parser.add_argument("--svg", metavar="SVG", help="where your curves are drawn")
    args = parser.parse_args(argv)
    if bool(args.logs) != bool(args.svg):
        parser.error("your own runs need both, their logs and --svg")
    if args.logs:
        colors, curves = [*COLORS.values()], []
        for path in args.logs:
            try:
                points, label = curve(read(path)[1]), Path(path).parent.name
            except (OSError, ValueError, LookupError, TypeError) as problem:
                parser.error(f"{path} is no run's log ({type(problem).__name__})")
            said = f"{points[-1][1]:.2f} after epoch {points[-1][0]}" if points else "no kNN"
            print(f"{label}: {said}")
            if points:
                curves.append((label, colors[len(curves) % len(colors)], points))
        if curves:
            Path(args.svg).write_text(svg(curves))
            print(f"wrote {args.svg}")
        return
    (REFERENCE / "RESULTS.md").write_text(results())
    (REFERENCE / "curves.svg").write_text(headline_svg())
    readme = ROOT / "README.md"
    text = re.sub(r"(?s)(<!-- results -->\n).*(<!-- /results -->)",
                  lambda found: f"{found[1]}{table()}\n{found[2]}", readme.read_text())
    readme.write_text(text)


if __name__ == "__main__":
    main()
