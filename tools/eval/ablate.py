"""The command tools/eval/ablate: every table and plot of the ablation on the pocket model."""

import os

for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):  # matrices of 60 x 60: threads only cost
    os.environ.setdefault(variable, "1")

import argparse
import hashlib
import io
import json
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import distances
import measure
import report
import rows
from common import EvalError, fail_clearly, sha256_file, write_whole

ROOT = Path(__file__).resolve().parent.parent.parent
TRUTH = "true renderings"
EXAMPLES = """
Stopped at any point, the same command goes on: pictures and measurements that are there are not made again while model,
flags, captions and seeds are the same. docs/evaluation.md says what is measured.

examples:
  cargo build --release && tools/eval/ablate --quick         a few tables on 12 captions, five minutes
  tools/eval/ablate                                          everything, on 50 captions, over three hours
  tools/eval/ablate --tables gamma delta --captions 200
  tools/eval/ablate --list                                   tables, rows and their flags; makes nothing
"""


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="tools/eval/ablate",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    known = [table.key for table in rows.TABLES]
    add("--quick", action="store_true", help="fewer tables, 12 captions: five minutes on 2 cores")
    add("--tables", nargs="+", choices=known, metavar="TABLE", help=f"only these: {', '.join(known)}")
    add("--captions", type=int, metavar="N", help="how many of the captions (default: 50; 12 with --quick)")
    add("--captions-file", default=ROOT / "tools" / "pocket" / "heldout.txt", type=Path, metavar="FILE")
    add("--model", type=Path, metavar="DIR", help="model directory (default: the one inside the program)")
    add("--program", type=Path, default=ROOT / "target" / "release" / "megafuse", metavar="FILE")
    add("--flags", default="--guidance 2", metavar="TEXT", help="of every row, before its own (default: --guidance 2)")
    add("--seed", type=int, default=0, help="caption i is drawn with seed SEED + i (default: 0)")
    add("--jobs", type=int, default=os.cpu_count(), metavar="N", help="programs at a time (default: one a core)")
    add("--work", type=Path, default=ROOT / "target" / "ablations", metavar="DIR", help="pictures and measurements")
    add("--out", type=Path, default=ROOT / "docs" / "ablations", metavar="DIR", help="tables and plots")
    add("--list", action="store_true", help="print the rows' flags and end")
    args = parser.parse_args(arguments)
    args.captions = args.captions or (12 if args.quick else 50)
    if args.jobs < 1:
        raise EvalError(f"--jobs {args.jobs}: 1 or more")
    if args.captions < 2:
        raise EvalError(f"--captions {args.captions}: a distance needs 2 or more")
    return args


@dataclass
class Run:
    """What all rows share."""

    program: Path
    model: Path | None
    flags: tuple
    captions: list  # texts
    seed: int
    jobs: int
    work: Path
    identity: dict  # model digest, program version, captions, seed

    @classmethod
    def open(cls, args):
        if not args.program.is_file():
            raise EvalError(f"--program {args.program}: no such file; run cargo build --release")
        version = subprocess.run([args.program, "--version"], capture_output=True, text=True)
        if version.returncode:
            raise EvalError(f"--program {args.program} --version fails: {version.stderr.strip()[:200]}")
        captions = read_captions(args.captions_file)
        if len(captions) < args.captions:
            raise EvalError(f"--captions {args.captions}: {args.captions_file} has {len(captions)}")
        captions = captions[: args.captions]
        for caption in captions:
            measure.kind_of(caption)
        model = args.model or ROOT / "models" / "pocket"  # the program carries this folder
        if not model.is_dir():
            raise EvalError(f"--model {model}: no such folder")
        identity = {
            "model": model_digest(model), "program": version.stdout.strip(), "seed": args.seed,
            "captions": hashlib.sha256("\n".join(captions).encode()).hexdigest(), "count": len(captions),
        }  # fmt: skip
        flags = tuple(shlex.split(args.flags))
        return cls(args.program, args.model, flags, captions, args.seed, args.jobs, args.work, identity)

    def ids(self):
        return [f"{i:04d}" for i in range(len(self.captions))]

    def arguments(self, row):
        """All flags of a row; a row's own --guidance takes the place of the shared one."""
        shared = list(self.flags)
        for flag in row.flags:
            name = flag.split("=")[0]
            if name.startswith("--") and name in shared:  # a value may be the same as another's
                at = shared.index(name)
                del shared[at : at + 2]
        model = ["--model", str(self.model)] if self.model else []
        return [*model, *shared, *row.flags]

    def key(self, row):
        """Name of a row's pictures: the same for the same model, program version, captions, seeds and flags."""
        flags = [f for f in self.arguments(row) if f not in ("--model", str(self.model))]
        text = json.dumps([self.identity, flags, row.size], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_captions(path):
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise EvalError(f"--captions-file {path}: {error.strerror}") from error


def model_digest(folder):
    """Of the names and contents of every configuration, tokenizer and weight file of a model directory."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in (".json", ".txt", ".safetensors"))
    if not files:
        raise EvalError(f"{folder} holds no model (.json, .safetensors)")
    return hashlib.sha256("\n".join(f"{p.relative_to(folder)} {sha256_file(p)}" for p in files).encode()).hexdigest()


def plan(run, row):
    """GFLOP of one picture of a row, or (None, reason) when the program refuses its flags: (gflop, None)."""
    done = subprocess.run([run.program, "plan", "x", "--json", *run.arguments(row)], capture_output=True, text=True)
    if done.returncode:
        return None, done.stderr.strip().splitlines()[0].removeprefix("error: ")
    return json.loads(done.stdout)["total"]["flops"] / 1e9, None


def make_pictures(run, row, folder):
    """Runs the program over the captions; processor seconds per picture, None when all were there.

    Those of both programs, so other work on the machine hardly counts.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"id": i, "prompt": caption, "seed": run.seed + k})
        for k, (i, caption) in enumerate(zip(run.ids(), run.captions))
    ]
    manifest = folder.with_suffix(".jsonl")
    write_whole(manifest, "\n".join(lines) + "\n")
    before = count_pictures(folder)
    if before == len(lines):
        return None
    command = [run.program, "generate", "--manifest", manifest, "--out", folder, "--resume", *run.arguments(row)]
    begin = processor_seconds()
    parts = [(*command, "--shard", f"{k}/{run.jobs}") for k in range(1, run.jobs + 1)]
    messages = [folder.with_suffix(f".{k}.log") for k in range(1, run.jobs + 1)]
    codes = run_together(parts, messages)
    made = count_pictures(folder) - before
    for part, code, message in zip(parts, codes, messages):
        if code:
            reason = (message.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
            raise EvalError(f"row {row.name!r}: {shlex.join(map(str, part))} ended with {code}: {reason}")
    if made + before < len(lines):
        raise EvalError(f"row {row.name!r}: {folder} has {made + before} of {len(lines)} pictures; run this again")
    return (processor_seconds() - begin) / made


def processor_seconds():
    """Of all programs that were run and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_together(commands, messages):
    """Exit statuses of commands that run at the same time and share the cores; standard error goes to `messages`."""
    environment = {**os.environ, "RAYON_NUM_THREADS": str(max(1, os.cpu_count() // len(commands)))}
    started = []
    try:
        for command, path in zip(commands, messages):
            with path.open("w") as file:
                started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=environment))
        return [process.wait() for process in started]
    finally:
        for process in started:
            process.kill()  # nothing, where it has ended


def enlarge_pictures(run, row, folder):
    """The native row's pictures, which are there, by `megafuse resize` at the row's size."""
    folder.mkdir(parents=True, exist_ok=True)
    native = run.work / "pictures" / run.key(rows.NATIVE_ROW)
    size = "{}x{}".format(*row.size)
    for name in (f"{i}.png" for i in run.ids()):
        if not (folder / name).exists():
            command = [run.program, "resize", native / name, folder / name, "--size", size]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise EvalError(f"row {row.name!r}: {shlex.join(map(str, command))}: {done.stderr.strip()[:200]}")


def computed_share(run, row):
    """Percent of the network's evaluations that a row's pictures say they made, on average; None without a cache of steps."""
    if row.flags is None or "--cache" not in row.flags:
        return None
    shares = []
    for i in run.ids():
        with Image.open(run.work / "pictures" / run.key(row) / f"{i}.png") as picture:
            made, of = json.loads(picture.text["megafuse"])["cache_computed"].split(" of ")
        shares.append(100 * int(made) / int(of))
    return sum(shares) / len(shares)


def count_pictures(folder):
    return len(list(folder.glob("*.png"))) if folder.is_dir() else 0


def values_of(run, row, version):
    """(measured arrays, processor seconds per picture) of a row; pictures and measurements are made where they are missing.

    row.flags None: the true renderings at its size.
    """
    name = f"truth-{row.size[0]}x{row.size[1]}-{run.identity['captions'][:8]}" if row.flags is None else run.key(row)
    stored = run.work / "measured" / f"{name}-{version}.npz"
    if stored.exists():
        try:
            with np.load(stored) as file:
                arrays = {k: file[k] for k in file}
            seconds = float(arrays.pop("seconds"))
            return arrays, None if np.isnan(seconds) else seconds
        except Exception:  # half a file of an older program, a full disk: make it again
            stored.unlink()
    folder, seconds = None, None
    if row.enlarged:
        folder = run.work / "pictures" / name
        enlarge_pictures(run, row, folder)
    elif row.flags is not None:
        folder = run.work / "pictures" / name
        timing = folder.with_suffix(".seconds")
        seconds = make_pictures(run, row, folder)
        if seconds is not None:
            write_whole(timing, f"{seconds}\n")
        elif timing.exists():
            seconds = float(timing.read_text())
    arrays = measure.measure(folder, run.ids(), run.captions, row.size)
    buffer = io.BytesIO()
    np.savez(buffer, seconds=np.float64("nan" if seconds is None else seconds), **arrays)
    stored.parent.mkdir(parents=True, exist_ok=True)
    write_whole(stored, buffer.getvalue())
    return arrays, seconds


def entries_of(run, table, gflops, native, state):
    """The table's results, a dict a row: the true renderings of every size first, then the rows."""
    sizes = list(dict.fromkeys(row.size for row in table.rows))
    if len(sizes) == 1:
        truth_rows = [rows.Row(TRUTH, sizes[0], None)]
    else:
        places = {row.size: row.x for row in table.rows}
        truth_rows = [rows.Row(f"{TRUTH}, {w}x{h}", (w, h), None, places[w, h]) for w, h in sizes]
    found = {}
    for row in (*truth_rows, *table.rows):
        if row.flags is None or gflops[row] is not None:
            state.begin(table, row)
            found[row] = values_of(run, row, state.measuring)
            state.end(None if row.flags is None or row.enlarged else run.key(row), gflops.get(row))
    baseline = next((v for row, (v, _) in found.items() if row.name == table.baseline), None)
    entries = []
    for row, (values, seconds) in found.items():
        metrics = state.summary(values, native)
        if baseline is not None and row.flags is not None and row.name != table.baseline:
            metrics = metrics | differences(values, baseline)
        entries.append({
            "table": table.key, "title": table.title, "axis": table.axis, "row": row.name, "x": row.x,
            "flags": None if row.flags is None else run.arguments(row), "size": row.size, "metrics": metrics,
            "enlarged": row.enlarged, "gflop": gflops.get(row), "core_seconds": seconds,
            "computed": computed_share(run, row), "identity": run.identity,
            "measure": state.summarising,
        })  # fmt: skip
    return entries


class State:
    """Progress on standard error, and summaries that are not computed twice."""

    def __init__(self, work, gflop):
        self.measuring = measure.version(*measure.MEASURING)
        self.summarising = measure.version(*measure.SUMMARISING)
        self.left, self.done, self.idle, self.started = gflop, 0.0, 0.0, time.monotonic()
        self.folder = work / "summaries"
        self.finished = set()

    def begin(self, table, row):
        passed = time.monotonic() - self.started
        rate = (passed - self.idle) / self.done if self.done else 0.0
        eta = f", about {self.left * rate / 60:.0f} min of pictures left" if rate else ""
        print(f"[{passed / 60:5.1f} min{eta}] {table.key}: {row.name}", file=sys.stderr, flush=True)
        self.row_started = time.monotonic()

    def end(self, key, gflop):
        """A row that was there already took no time: it counts neither as work done nor as time."""
        passed = time.monotonic() - self.row_started
        if key is not None and key not in self.finished:
            self.finished.add(key)
            self.left -= gflop
            if passed > 1.0:
                self.done += gflop
                return
        self.idle += passed if passed < 1.0 else 0.0

    def summary(self, values, native):
        digest = hashlib.sha256(self.summarising.encode())
        for name in sorted(values):
            digest.update(np.ascontiguousarray(values[name]).tobytes())
        if native is not None:
            digest.update(native["whole"].tobytes())
        path = self.folder / f"{digest.hexdigest()[:16]}.json"
        if path.exists():
            return json.loads(path.read_text())
        metrics = measure.summary(values, native)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(metrics))
        return metrics


def differences(values, baseline):
    """{metric_difference: [value, low, high]} to the baseline; distances only where their reference is the same."""
    out = {"objects_difference": distances.bootstrap_difference(values["objects"], baseline["objects"])}
    if np.array_equal(values["true_whole"], baseline["true_whole"]):
        for metric, part, each in (("fd_r", "whole", 1), ("fd_crop", "crops", measure.CROPS.count)):
            both, truth = (values[part], baseline[part]), values[f"true_{part}"]
            out[f"{metric}_difference"] = distances.bootstrap_frechet_difference(*both, truth, each=each)
    return {metric: list(value) for metric, value in out.items()}


def notes(run, table, left_out):
    """What stands under a table."""
    out = [
        f"{len(run.captions)} captions of tools/pocket/heldout.txt, the same seeds in every row; 95 % intervals by "
        f"bootstrap over captions. {run.identity['program']}, shared flags `{shlex.join(run.flags)}`. "
        "docs/evaluation.md defines the columns. The row of true renderings shows the reader's own error and what a "
        "distance is between two finite sets of ground truth. Core s is the processor time per picture.",
    ]
    if len(table.rows) > 1:
        out.append(f'"Against the baseline": the paired difference to {table.baseline!r}, of objects in points.')
    if any("--cache" in (row.flags or ()) for row in table.rows):
        out.append(
            "Evaluations: of those of the network without a cache, how many it made, averaged over captions. GFLOP counts all of "
            "them for ucache and easycache, which see as they go what they leave out."
        )
    for reason in dict.fromkeys(reason for _, reason in left_out):
        names = ", ".join(name for name, why in left_out if why == reason)
        out.append(f"Left out, because the program refuses their flags ({reason}): {names}.")
    return out


def main(arguments=None):
    args = parse(arguments)
    run = Run.open(args)
    chosen = [t for t in rows.TABLES if (t.key in args.tables if args.tables else t.quick or not args.quick)]
    if args.list:
        for table in chosen:
            print(f"{table.key}: {table.title}")
            for row in table.rows:
                print(f"  {row.name}: {shlex.join(run.arguments(row))}{', resized' if row.enlarged else ''}")
        return 0
    gflops, reasons = {}, {}
    for row in dict.fromkeys([rows.NATIVE_ROW, *(row for table in chosen for row in table.rows)]):
        gflops[row], reasons[row] = plan(run, row)
    if gflops[rows.NATIVE_ROW] is None:
        raise EvalError(f"the program refuses the native row: {reasons[rows.NATIVE_ROW]}")
    runs = {run.key(row): (row, g) for row, g in gflops.items() if g is not None and not row.enlarged}
    total = sum(g for _, g in runs.values())
    size = f"{total * len(run.captions) / 1e3:.1f} TFLOP"
    print(f"{len(runs)} runs of {len(run.captions)} pictures, {size}", file=sys.stderr)
    state = State(run.work, total)
    state.begin(rows.Table("native", "", (), ""), rows.NATIVE_ROW)
    native = values_of(run, rows.NATIVE_ROW, state.measuring)[0]
    state.end(run.key(rows.NATIVE_ROW), gflops[rows.NATIVE_ROW])
    everything = []
    native_table = rows.Table("native", "Native size: 64x64", (rows.NATIVE_ROW,), "native size")
    for table in (native_table, *chosen):
        entries = entries_of(run, table, gflops, None if table is native_table else native, state)
        everything += entries
        left_out = [(row.name, reasons[row]) for row in table.rows if gflops[row] is None]
        report.write_table(entries, table.title, args.out, table.key, table.axis, notes(run, table, left_out))
        write_whole(args.out / "results.jsonl", "".join(json.dumps(e, sort_keys=True) + "\n" for e in everything))
    print(f"wrote {args.out}", file=sys.stderr)
    return 0


def command():
    try:
        return main()
    except KeyboardInterrupt:
        print("tools/eval/ablate: stopped; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    fail_clearly("tools/eval/ablate", command)
