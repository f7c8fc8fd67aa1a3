"""Tables as Markdown and plots as SVG from the ablation's results, JSON lines of

{"table": key, "row": name, "x": number or null, "metrics": {metric: [value, low, high]}, ...}

tools/eval/setup tools/eval/report.py RESULTS.jsonl OUT_FOLDER       every table in the file
"""

import argparse
import io
import json
import math
from pathlib import Path

from common import EvalError, fail_clearly, write_whole

COLUMNS = {  # metric: (heading, digits, factor)
    "objects": ("objects right, %", 1, 100),
    "objects_difference": ("against the baseline", 1, 100),
    "duplicates": ("superfluous", 2, 1),
    "missing": ("missing", 2, 1),
    "position_error": ("position error", 4, 1),
    "fd_r": ("FD_r", 1, 1),
    "fd_r_difference": ("against the baseline", 1, 1),
    "kd_r": ("KD_r", 2, 1),
    "fd_crop": ("FD_crop", 1, 1),
    "fd_crop_difference": ("against the baseline", 1, 1),
    "kd_crop": ("KD_crop", 2, 1),
    "fd_b": ("FD_b", 1, 1),
    "kd_b": ("KD_b", 2, 1),
    "sharpness": ("sharpness, dB", 1, 1),
    "texture": ("texture, dB", 1, 1),
}
CONTENT = ("objects", "objects_difference", "duplicates", "missing", "position_error")
DISTANCES = (
    *("fd_r", "fd_r_difference", "fd_crop", "fd_crop_difference", "kd_r", "kd_crop"),
    *("fd_b", "kd_b", "sharpness", "texture"),
)
PLOTTED = ("objects", "duplicates", "fd_r", "fd_crop", "sharpness")
LEAST_RANGE = {"objects": (0, 105), "duplicates": (0, 1)}  # of a plot's axis: small differences look small


def read_results(path):
    """Entries of a JSON-lines file; a last line cut off by a stop is left out, any other bad line is an error."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise EvalError(f"cannot read {path}: {error.strerror}") from error
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise EvalError(f"{path}, line {number}: not JSON ({error.msg}); delete the line") from error
    return entries


def number(value, digits, factor=1):
    """Text of a value; a dash for none."""
    if value is None or math.isnan(value):
        return "-"
    text = f"{value * factor:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def cell(metric, value):
    """`71.0 [62.0, 80.0]`: value and 95 % interval."""
    _, digits, factor = COLUMNS[metric]
    if value is None or math.isnan(value[0]):
        return "-"
    middle, low, high = (number(v, digits, factor) for v in value)
    sign = "+" if metric.endswith("_difference") and value[0] > 0 else ""
    return f"{sign}{middle} [{low}, {high}]"


def markdown(entries):
    """Two tables, a row an entry: what is in the pictures and their cost; distances. A column needs a value in it."""
    costs = (("computed", "evaluations, %", 0), ("gflop", "GFLOP", 0), ("core_seconds", "core s", 2))
    cost = [(k, h, d) for k, h, d in costs if any(e.get(k) for e in entries)]
    tables = []
    for names, extra in ((CONTENT, cost), (DISTANCES, [])):
        metrics = [m for m in names if any(m in e["metrics"] for e in entries)]
        if not metrics:
            continue
        heads = ["", *(COLUMNS[m][0] for m in metrics), *(h for _, h, _ in extra)]
        lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
        for e in entries:
            cells = [cell(m, e["metrics"].get(m)) for m in metrics] + [number(e.get(k), d) for k, _, d in extra]
            lines.append("| " + " | ".join([e["row"], *cells]) + " |")
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def plot(entries, title, axis=None):
    """SVG text: a panel a metric; along x where every row has one, else a bar a row. Whiskers: the intervals.

    Ground truth is a dashed line, along x where its size changes with it. The same entries give the same bytes.
    """
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    metrics = [m for m in PLOTTED if any(m in e["metrics"] for e in entries)]
    if not metrics:
        raise EvalError(f"plot {title!r}: no row has any of {', '.join(PLOTTED)}")
    along = [e for e in entries if axis and e.get("x") is not None]
    others = [e for e in entries if e not in along]
    style = {"svg.hashsalt": "megafuse", "svg.fonttype": "none", "font.size": 8, "axes.spines.top": False}
    with plt.rc_context(style | {"axes.spines.right": False}):
        height = 2.4 if along else 1.0 + 0.24 * len(entries)
        figure, axes = plt.subplots(1, len(metrics), figsize=(2.4 * len(metrics) + 1.2, height), squeeze=False)
        for i, (metric, ax) in enumerate(zip(metrics, axes[0])):
            ax.set_title(COLUMNS[metric][0], fontsize=8)
            (_along if along else _bars)(ax, metric, along or entries, others if along else [], axis, i == 0)
        figure.suptitle(title, fontsize=9)
        figure.tight_layout()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return buffer.getvalue()


def _values(metric, entries):
    """(entries that have the metric, values, distances to the interval's ends [2][n]) in the table's units."""
    factor = COLUMNS[metric][2]
    have = [e for e in entries if metric in e["metrics"] and not math.isnan(e["metrics"][metric][0])]
    middle = [e["metrics"][metric][0] * factor for e in have]
    low = [max(m - e["metrics"][metric][1] * factor, 0) for m, e in zip(middle, have)]
    high = [max(e["metrics"][metric][2] * factor - m, 0) for m, e in zip(middle, have)]
    return have, middle, [low, high]


def _is_truth(entry):
    return entry.get("flags", ()) is None


def _along(ax, metric, entries, others, axis, _first):
    entries = sorted(entries, key=lambda e: e["x"])
    have, middle, whiskers = _values(metric, [e for e in entries if not _is_truth(e)])
    ax.errorbar([e["x"] for e in have], middle, yerr=whiskers, marker="o", markersize=3, capsize=2, linewidth=1)
    truths, middle, _ = _values(metric, [e for e in entries if _is_truth(e)])
    ax.plot([e["x"] for e in truths], middle, linestyle="--", linewidth=0.8, color="grey")
    for e, value in zip(*_values(metric, others)[:2]):
        ax.axhline(value, linestyle="--", linewidth=0.8, color="grey")
        ax.annotate(e["row"], (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=6)
    ax.set_ylim(*_range(metric, ax.get_ylim()))
    ax.set_xlabel(axis)


def _bars(ax, metric, entries, _others, _axis, first):
    names = [e["row"] for e in entries]
    have, middle, whiskers = _values(metric, entries)
    at = [names.index(e["row"]) for e in have]
    ax.barh(at, middle, xerr=whiskers, height=0.7, color="#7a9cc6", error_kw={"linewidth": 0.8, "capsize": 2})
    ax.set_yticks(range(len(names)), names if first else [""] * len(names))
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(*_range(metric, ax.get_xlim()))


def _range(metric, found):
    """(low, high) of an axis: at least LEAST_RANGE, and from its low end on."""
    if metric not in LEAST_RANGE:
        return found
    low, high = LEAST_RANGE[metric]
    return low, max(high, found[1])


def write_table(entries, title, out, key, axis=None, notes=()):
    """Writes OUT/KEY.md and OUT/KEY.svg."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / f"{key}.svg", plot(entries, title, axis))
    text = [f"# {title}\n", f"![{title}]({key}.svg)\n", markdown(entries), *(f"{note}\n" for note in notes)]
    write_whole(out / f"{key}.md", "\n".join(text))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results")
    parser.add_argument("out")
    args = parser.parse_args()
    if not Path(args.results).is_file():
        raise EvalError(f"{args.results}: no such file")
    tables = {}
    for entry in read_results(args.results):
        tables.setdefault(entry["table"], {})[entry["row"]] = entry  # the last one counts
    for key, rows in tables.items():
        first = next(iter(rows.values()))
        write_table(list(rows.values()), first.get("title", key), args.out, key, first.get("axis"))
    return 0


if __name__ == "__main__":
    fail_clearly("tools/eval/report.py", main)
