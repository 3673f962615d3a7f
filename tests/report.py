"""Logs to tables and curves, so that no number is typed by hand.

    python tests/report.py                                  what the project shows: see OUTPUTS
    python tests/report.py runs/*/log.jsonl --svg curves.svg      your own runs

OUTPUTS: tests/reference/RESULTS.md (every kept run), tests/reference/curves.svg and the tables of
README.md between its two markers, all from the logs and published.json under tests/reference/.
"""

import argparse
import importlib
import json
import math
import re
import statistics
import sys
import textwrap
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
REFERENCE = ROOT / "tests" / "reference"
FOLDERS = {
    "cpu": "Do all four methods learn CIFAR-10 by their defaults, beside lightly? (cpu/PLAN.md; "
           "1.2 million views at a quarter of the width; moco_seed0 with the patch of its "
           "amendment 4, which gives equal outputs faster)",
    "headline": "What do the defaults, today's or earlier ones, reach in 200 epochs on CIFAR-10?",
    "few_epochs": "Does kNN rise within minutes on a CPU? (This does not rank the methods.)",
    "distillation": "SimCLR v2's three steps on a CPU: does a student beat its teacher? (PLAN.md)",
    "ablations/simsiam_schedule": "Which schedule ends higher, after 30 epochs at a quarter of the "
                                  "width? (PLAN.md; arms a, b, ... as there)",
    "ablations/logo_weights": "How are LoGo's terms best weighed? (PLAN.md, amendment 9; arms f, "
                              "g, ... as there; f30: five epochs of f by part 2)"}
PUBLISHED = json.loads((REFERENCE / "published.json").read_text())  # a method's facts, by name


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
    names = [name for name in PUBLISHED if name in Path(path).stem]
    named = header.get("method") or header["args"].get("method")
    return named or max(names, key=len)


def command(name, args):
    """What to type today, but for places and what changes nothing but how often there is a kNN."""
    defaults = vars(importlib.import_module(name).parse_args([]))
    places = ("out", "seed", "workers", "cache_dir", "resume", "overwrite", "save_views", "device",
              "knn_every", "method")
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
    """From start to end; earlier versions logged the seconds of training and monitoring alone."""
    if "minutes" in epochs[-1]:
        return epochs[-1]["minutes"]
    seconds = [record.get("seconds") or 0 for record in epochs[1:]]
    monitoring = [record.get("knn_seconds") or 0 for record in epochs]
    return (sum(seconds) + sum(monitoring)) / 60


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
        typed = command(name, header["args"])
        if "lightly" in header:  # a run of the same method with that library
            typed = f"python lightly_baseline.py {header['args']['method']}"
        key = (name, path.stem.split("_seed")[0], typed)
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
            patched = any((REFERENCE / folder).rglob(f"{arm}.patch"))  # the arm changes a script
            ends = [epochs[-1] for _, _, epochs in found]
            total = found[0][1]["args"]["epochs"]
            done = "/".join(sorted({str(end["epoch"]) for end in ends}))
            cells = [
                f"`{typed}`" + f" with {arm}.patch" * patched,
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
    groups = list(runs("headline").items())
    groups.sort(key=lambda item: not mark(item[1][0][0]))
    return {name: group for (name, *_), group in groups}


def cpu_cell(arm):
    """The kNN of an arm of the CPU plan, over its seeds, or that no run of it has ended."""
    ends, seeds = [], []
    paths = sorted((REFERENCE / "cpu").glob(f"{arm}_seed*.jsonl"))
    for path in paths:
        header, epochs = read(path)
        if epochs[-1]["epoch"] == header["args"]["epochs"]:
            ends.append(last(epochs))
            seeds.append(path.stem.split("_seed")[1])
    if not ends:
        return "unfinished" if paths else "not run"
    if len(seeds) == 1:
        return f"{spread(ends)}, seed {seeds[0]}"
    return f"{spread(ends)}, mean of seeds {' and '.join(seeds)}"


def speed(name):
    """Views a second of a method here and with lightly, from the pairs that were measured."""
    path = REFERENCE / "benchmarks" / "lightly_pairs.jsonl"
    if not path.exists():
        return "not run"
    found = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if record.get("method") == name and "views_s" in record:
            who = (record["who"], record["workers"])
            found.setdefault(who, []).append(record["views_s"])
    medians = {who: statistics.median(values) for who, values in found.items()}
    theirs = [value for (who, _), value in medians.items() if who == "lightly"]
    ours = [value for (who, _), value in medians.items() if who == "ours"]
    if not (ours and theirs):
        return "not run"
    return f"{ours[0]:.0f}, {max(theirs):.0f}"


def tables():
    """README's two tables of the methods: one CPU core, and one GPU."""
    logs = [read(path)[1] for path in (REFERENCE / "cpu").glob("*.jsonl")]
    untrained = statistics.mean(epochs[0]["knn"] for epochs in logs)
    out = ["One CPU, 1.2 million views (12 epochs; 6 of LoGo, which takes four views of an "
           "image), a\nquarter of the channels, batch size 512, fp32; views/s of one core. Before "
           f"training, kNN is {untrained:.0f}:", "",
           "| method | kNN | kNN, lightly | views/s: here, lightly |",
           "|---|---|---|---|"]
    for name, facts in PUBLISHED.items():
        peer = cpu_cell(f"lightly_{'fastsiam' if name == 'simsiam_logo' else name}")
        if name == "simsiam_logo":
            peer += " (FastSiam)"
        out.append(f"| `{name}.py`: {facts['idea']} | {cpu_cell(name)} | {peer} | "
                   f"{speed(name)} |")
    out += ["", "One GPU, 200 epochs, all channels, batch size 512:", "",
            "| method | kNN | linear | minutes |", "|---|---|---|---|"]
    for name, group in headline().items():
        path, header, _ = group[0]
        ends = [last(epochs) for _, _, epochs in group]
        device = re.sub(r"NVIDIA | 80GB HBM3", "", header["device"])
        took = spread([minutes(epochs) for _, _, epochs in group], 0)
        judge = path.with_name(f"linear_eval_{path.name}")
        linear = "-"
        if judge.exists():
            linear = f"{json.loads(judge.read_text().splitlines()[0])['top1']:.1f}"
        out.append(f"| `{name}.py`{mark(path)} | {spread(ends)} | {linear} | {took} ({device}) |")
    published = [f"`{name}.py` {facts['published']}" for name, facts in PUBLISHED.items()]
    text = f"Published kNN accuracies after 200 epochs with ResNet-18: {'; '.join(published)}."
    out += ["", textwrap.fill(text, 100, break_on_hyphens=False)]
    return "\n".join(out)


def svg(curves, title):
    """Curves (label, color, [(x, kNN)], dashed) as plain SVG, which a phone can show, too."""
    left, right, top, bottom, width = 34, 420, 34, 270, 440
    height = bottom + 30 + 20 * len(curves)
    most = max(x for _, _, points, _ in curves for x, _ in points)
    values = [knn for _, _, points, _ in curves for _, knn in points]
    low = 10 * math.floor(min(values) / 10)
    high = 10 * math.ceil(max(values) / 10)

    def at(x, knn):
        across = left + (right - left) * x / max(most, 1e-9)
        return across, bottom - (bottom - top) * (knn - low) / max(high - low, 1)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
           f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
           "<style>text{fill:#24292f}.axis{stroke:#8c959f}"
           "@media(prefers-color-scheme:dark){text{fill:#d0d7de}}</style>",
           f'<text x="4" y="16">{title}</text>']
    for knn in range(low, high + 1, 10):
        x, y = at(0, knn)
        out += [f'<line class="axis" x1="{x}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" '
                'stroke-opacity=".3"/>', f'<text x="{x - 26}" y="{y + 4:.1f}">{knn}</text>']
    for tick in ticks(most):
        x, y = at(tick, low)
        out.append(f'<text x="{x - 8:.1f}" y="{y + 18:.1f}">{tick:g}</text>')
    for number, (label, color, points, dashed) in enumerate(curves):
        places = [at(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        look = f'stroke="{color}" stroke-width="2"{dash}'
        out.append(f'<polyline points="{path}" fill="none" {look}/>')
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places]
        # The legend is below: a short line and a name each.
        x, y = 4, bottom + 40 + 20 * number
        out += [f'<line x1="{x}" y1="{y - 4}" x2="{x + 22}" y2="{y - 4}" {look}/>',
                f'<text x="{x + 28}" y="{y}">{escape(label)} {points[-1][1]:.1f}</text>']
    return "\n".join([*out, "</svg>", ""])


def ticks(most):
    """About four round numbers from 0 to `most`."""
    rough = max(most, 1e-9) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs(factor * power - rough))
    return [step * i for i in range(1 + math.floor(most / step + 1e-9))]


def curve(epochs):
    return [(record["epoch"], record["knn"]) for record in epochs if record.get("knn") is not None]


def figure():
    """kNN against views trained of the CPU plan's first seeds, ours solid, lightly's dashed."""
    curves = []
    for path in sorted((REFERENCE / "cpu").glob("*_seed0.jsonl")):
        header, epochs = read(path)
        name = method(path, header)
        arm = path.stem.removesuffix("_seed0")
        if arm.removeprefix("lightly_") not in (*PUBLISHED, "fastsiam"):
            continue
        facts = PUBLISHED[name]
        images = header.get("images") or header["data"]["images"]
        millions = images * facts["views"] / 1e6
        points = [(epoch * millions, knn) for epoch, knn in curve(epochs)]
        label = arm.replace("_", " ")
        if epochs[-1]["epoch"] < header["args"]["epochs"]:
            label += ", unfinished:"
        curves.append((label, facts["color"], points, "lightly" in arm))
    return svg(curves, "kNN accuracy in percent, by million views trained") if curves else ""


def healthy():
    """Loss, std and kNN of the first kept run of SimSiam's schedule, as three panels."""
    path = REFERENCE / "ablations" / "simsiam_schedule" / "simsiam_c_seed0.jsonl"
    _, epochs = read(path)
    end = epochs[-1]["epoch"]
    out = ['<svg xmlns="http://www.w3.org/2000/svg" width="440" viewBox="0 0 440 410" '
           'font-family="sans-serif" font-size="13">',
           "<style>text{fill:#24292f}.axis{stroke:#8c959f}"
           "@media(prefers-color-scheme:dark){text{fill:#d0d7de}}</style>",
           f'<text x="4" y="16">simsiam.py, CIFAR-10, 1/4 of the channels, {end} epochs</text>']
    panels = (("loss", -1, 0), ("std", 0, 1), ("knn", 0, 60))
    for number, (name, low, high) in enumerate(panels):
        top, bottom = 50 + 120 * number, 140 + 120 * number
        values = [(record["epoch"], record[name]) for record in epochs
                  if record.get(name) is not None]
        shown = []
        for epoch, value in values:
            across = 44 + 380 * epoch / end
            shown.append(f"{across:.1f},{bottom - 90 * (value - low) / (high - low):.1f}")
        out.append(f'<text x="44" y="{top - 6}">{name}: at the end {values[-1][1]:.3g}</text>')
        for y, number_shown in ((top, high), (bottom, low)):
            out += [f'<line class="axis" x1="44" y1="{y}" x2="424" y2="{y}" stroke-opacity=".3"/>',
                    f'<text x="14" y="{y + 4}">{number_shown}</text>']
        out.append(f'<polyline points="{" ".join(shown)}" fill="none" stroke="#d55e00" '
                   'stroke-width="2"/>')
    out += ['<text x="40" y="398">0</text>', f'<text x="390" y="398">epoch {end}</text>']
    return "\n".join([*out, "</svg>", ""])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("logs", nargs="*", help="your logs (default: the project's)")
    parser.add_argument("--svg", metavar="SVG", help="where your curves are drawn")
    args = parser.parse_args(argv)
    if bool(args.logs) != bool(args.svg):
        parser.error("your own runs need both, their logs and --svg")
    if args.logs:
        colors, curves = [facts["color"] for facts in PUBLISHED.values()], []
        for path in args.logs:
            try:
                points, label = curve(read(path)[1]), Path(path).parent.name
            except (OSError, ValueError, LookupError, TypeError) as problem:
                parser.error(f"{path} is no run's log ({type(problem).__name__})")
            said = f"{points[-1][1]:.2f} after epoch {points[-1][0]}" if points else "no kNN"
            print(f"{label}: {said}")
            if points:
                curves.append((label, colors[len(curves) % len(colors)], points, False))
        if curves:
            Path(args.svg).write_text(svg(curves, "kNN accuracy in percent, by epoch"))
            print(f"wrote {args.svg}")
        return
    (REFERENCE / "RESULTS.md").write_text(results())
    (REFERENCE / "healthy.svg").write_text(healthy())
    drawn = figure()
    if drawn:
        (REFERENCE / "curves.svg").write_text(drawn)
    readme = ROOT / "README.md"
    text = re.sub(r"(?s)(<!-- results -->\n).*(<!-- /results -->)",
                  lambda found: f"{found[1]}{tables()}\n{found[2]}", readme.read_text())
    readme.write_text(text)


if __name__ == "__main__":
    main()
