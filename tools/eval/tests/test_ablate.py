"""The ablation's runner on a small stand-in for the program, and its tables and plots."""

import io
import json
import os
import stat
import sys
import unittest
import xml.etree.ElementTree as ElementTree
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
from helpers import ROOT, TempCase
from PIL import Image

import ablate
import distances
import measure
import report
import rows

STAND_IN = """#!{python}
# Makes flat pictures as `megafuse generate --manifest` does; stops after STOP_AFTER of them.
import json, os, pathlib, sys
from PIL import Image
a = sys.argv[1:]
if a[0] == "--version":
    print("stand-in 1"); sys.exit()
if a[0] == "resize":
    Image.open(a[1]).resize(tuple(map(int, a[4].split("x")))).save(a[2]); sys.exit()
flag = lambda name: a[a.index(name) + 1] if name in a else None
stages = flag("--stages")
size = (stages.split(",")[-1].split(":")[0] if stages else flag("--size")).split("x")
if "--gamma" in a:
    print("error: unexpected argument '--gamma' found\\n\\nUsage", file=sys.stderr); sys.exit(2)
if a[0] == "plan":
    print(json.dumps({{"total": {{"flops": 2e9}}}})); sys.exit()
out = pathlib.Path(flag("--out")); out.mkdir(exist_ok=True)
(out / "run.json").write_text("{{}}")
with open(out.parent / "calls.txt", "a") as calls:
    calls.write(" ".join(a) + "\\n")
made, (part, of) = 0, map(int, flag("--shard").split("/"))
for line in list(map(json.loads, open(flag("--manifest"))))[part - 1 :: of]:
    path = out / (line["id"] + ".png")
    if path.exists():
        continue
    if made == int(os.environ.get("STOP_AFTER", 99)):
        print("some progress\\nkilled", file=sys.stderr); sys.exit(1)
    Image.new("RGB", tuple(map(int, size)), (line["seed"] * 9, 90, 90)).save(path)
    made += 1
"""


class Runner(TempCase):
    def setUp(self):
        super().setUp()
        self.program = self.dir / "program"
        self.program.write_text(STAND_IN.format(python=sys.executable))
        self.program.chmod(self.program.stat().st_mode | stat.S_IXUSR)
        self.two = two = (
            rows.Row("a", (64, 64), ("--method", "plain", "--size", "64x64")),
            rows.Row("b", (96, 64), ("--method", "megafusion", "--stages", "64x64:1,96x64:1"), x=2),
            rows.Row("c", (64, 64), ("--method", "plain", "--size", "64x64", "--gamma", "2")),
            rows.Row("d", (128, 96), rows.NATIVE_ROW.flags, enlarged=True),
            rows.Row("e", (64, 64), rows.NATIVE_ROW.flags, enlarged=True),
        )
        table = rows.Table("small", "A small table", two, "a")
        again = rows.Table("again", "The same run again", two[1:2], "b", axis="things")
        drawn = distances.resamples
        for where, name, value in (
            (rows, "TABLES", (table, again)),
            (distances, "resamples", lambda count, times, seed: drawn(count, 10, seed)),  # quicker
        ):
            patch = mock.patch.object(where, name, value)
            patch.start()
            self.addCleanup(patch.stop)

    def run_ablate(self, *more):
        base = ["--program", self.program, "--work", self.dir / "work", "--out", self.dir / "out"]
        base += ["--captions", 3, "--jobs", 1]
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()) as out:
            self.assertEqual(ablate.main([*map(str, base), *map(str, more)]), 0)
        return out.getvalue()

    def calls(self):
        path = self.dir / "work" / "pictures" / "calls.txt"
        return path.read_text().splitlines() if path.exists() else []

    def test_makes_every_run_once_and_writes_tables_and_plots(self):
        self.run_ablate()
        self.assertEqual(len(self.calls()), 3)  # native, a, b; c is refused
        text = (self.dir / "out" / "small.md").read_text()
        for part in ("| a |", "| b |", "| d |", "true renderings, 96x64", "'--gamma' found): c.", "3 captions"):
            self.assertIn(part, text)
        entries = report.read_results(self.dir / "out" / "results.jsonl")
        names = [(e["table"], e["row"]) for e in entries]
        self.assertEqual(names[-2:], [("again", "true renderings"), ("again", "b")])
        b = entries[-1]
        self.assertEqual((b["gflop"], b["x"], b["metrics"]["objects"][0]), (2.0, 2, 0.0))
        self.assertEqual(b["metrics"]["missing"][0], np.mean([len(k.asked()) for k in self.kinds()]))
        small = {e["row"]: e["metrics"] for e in entries if e["table"] == "small"}
        paired = {row: sorted(m for m in metrics if m.endswith("_difference")) for row, metrics in small.items()}
        self.assertEqual(paired["a"], [])
        self.assertEqual(paired["b"], ["objects_difference"])  # another size: the distances are to other renderings
        self.assertEqual(paired["e"], ["fd_crop_difference", "fd_r_difference", "objects_difference"])
        d = next(e for e in entries if e["row"] == "d")  # the native run's pictures: it costs nothing of its own
        self.assertEqual((d["enlarged"], d["gflop"], d["core_seconds"]), (True, 2.0, None))
        native, enlarged = (self.picture(rows.NATIVE_ROW), self.picture(self.two[3]))
        self.assertEqual((native.getpixel((0, 0)), enlarged.size), (enlarged.getpixel((0, 0)), (128, 96)))
        truth = entries[-2]["metrics"]
        self.assertEqual((truth["objects"][0], truth["duplicates"][0]), (1.0, 0.0))
        self.assertLess(abs(truth["sharpness"][0]), 1.0)
        for name in ("small", "again", "native"):
            ElementTree.parse(self.dir / "out" / f"{name}.svg")
        before = {p.name: p.read_bytes() for p in (self.dir / "out").iterdir()}
        self.run_ablate()
        self.assertEqual(len(self.calls()), 3)
        self.assertEqual(before, {p.name: p.read_bytes() for p in (self.dir / "out").iterdir()})

    def picture(self, row):
        args = ablate.parse(["--program", str(self.program), "--captions", "3"])
        return Image.open(self.dir / "work" / "pictures" / ablate.Run.open(args).key(row) / "0001.png")

    def kinds(self):
        text = (ROOT / "tools" / "pocket" / "heldout.txt").read_text()
        return [measure.kind_of(line) for line in text.splitlines()[:3]]

    def test_goes_on_after_a_stop(self):
        with mock.patch.dict(os.environ, STOP_AFTER="2"), self.refused("'native size'", "ended with 1", "killed"):
            self.run_ablate()
        folder = next(p for p in (self.dir / "work" / "pictures").iterdir() if p.is_dir())
        first = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.png")}
        self.assertEqual(len(first), 2)
        self.assertFalse((self.dir / "out").exists())
        self.run_ablate()
        self.assertEqual(first, {name: (folder / name).stat().st_mtime_ns for name in first})
        self.assertIn("--resume", self.calls()[1])
        lines = [json.loads(line) for line in folder.with_suffix(".jsonl").read_text().splitlines()]
        self.assertEqual([(line["id"], line["seed"]) for line in lines], [("0000", 0), ("0001", 1), ("0002", 2)])
        self.assertEqual([measure.kind_of(line["prompt"]) for line in lines], self.kinds())
        self.assertTrue((self.dir / "out" / "small.md").exists())

    def test_jobs_share_a_run(self):
        self.run_ablate()
        alone = {p.name: p.read_bytes() for p in (self.dir / "work" / "pictures").glob("*/*.png")}
        (self.dir / "work").rename(self.dir / "alone")
        self.run_ablate("--jobs", 2)
        self.assertEqual(sorted(call.split("--shard ")[1] for call in self.calls()), ["1/2"] * 3 + ["2/2"] * 3)
        self.assertEqual({p.name: p.read_bytes() for p in (self.dir / "work" / "pictures").glob("*/*.png")}, alone)
        (self.dir / "work").rename(self.dir / "two")
        with mock.patch.dict(os.environ, STOP_AFTER="1"), self.refused("--shard 1/2", "ended with 1", "killed"):
            self.run_ablate("--jobs", 2)
        with self.refused("--jobs 0"):
            self.run_ablate("--jobs", 0)

    def test_a_damaged_measurement_is_made_again(self):
        self.run_ablate()
        before = (self.dir / "out" / "small.md").read_bytes()
        for path in (self.dir / "work" / "measured").iterdir():
            path.write_bytes(path.read_bytes()[:50])
        self.run_ablate()
        self.assertEqual(len(self.calls()), 3)
        self.assertEqual(before, (self.dir / "out" / "small.md").read_bytes())

    def test_pictures_are_another_run_for_other_captions_seeds_flags_or_models(self):
        def key(*more):
            args = ablate.parse(["--program", str(self.program), "--captions", "3", *more])
            return ablate.Run.open(args).key(rows.NATIVE_ROW)

        model = self.dir / "model"
        model.mkdir()
        (model / "x.safetensors").write_bytes(b"1")
        keys = [key(), key("--captions", "4"), key("--seed", "1"), key("--flags", ""), key("--model", str(model))]
        (model / "x.safetensors").write_bytes(b"2")
        keys.append(key("--model", str(model)))
        self.assertEqual(len(set(keys)), 6)
        self.assertEqual(key(), keys[0])

    def test_a_rows_own_flag_takes_the_place_of_the_shared_one(self):
        args = ablate.parse(["--program", str(self.program), "--captions", "3", "--flags", "--guidance 3 --eta 0.5"])
        row = rows.Row("x", (64, 64), ("--guidance", "5"))
        self.assertEqual(ablate.Run.open(args).arguments(row), ["--eta", "0.5", "--guidance", "5"])
        row = rows.Row("x", (64, 64), ("--dilation", "3"))
        whole = ["--guidance", "3", "--eta", "0.5", "--dilation", "3"]
        self.assertEqual(ablate.Run.open(args).arguments(row), whole)

    def test_list_makes_nothing(self):
        out = self.run_ablate("--list")
        self.assertIn("  b: --guidance 2 --method megafusion --stages 64x64:1,96x64:1", out)
        self.assertEqual(self.calls(), [])

    def test_errors(self):
        with self.refused("--program", "no such file", "cargo build --release"):
            self.run_ablate("--program", self.dir / "none")
        with self.refused("--captions 501", "has 500"):
            self.run_ablate("--captions", 501)
        with self.refused("--captions 1", "2 or more"):
            self.run_ablate("--captions", 1)
        (self.dir / "c.txt").write_text("a photograph of a cat\n" * 3)
        with self.refused("'a photograph of a cat'", "scenes.py"):
            self.run_ablate("--captions-file", self.dir / "c.txt")
        with self.refused("--model", "no such folder"):
            self.run_ablate("--model", self.dir / "none")

    def test_a_picture_of_another_size_is_named(self):
        Image.new("RGB", (64, 64)).save(self.dir / "0000.png")
        caption = (ROOT / "tools" / "pocket" / "heldout.txt").read_text().splitlines()[0]
        with self.refused("0000.png is 64x64", "96x64"):
            measure.measure_picture((self.dir / "0000.png", caption, 0, (96, 64)))


class Rows(unittest.TestCase):
    def test_stages_end_at_the_rows_size_and_spend_all_steps(self):
        for table in rows.TABLES:
            self.assertIn(table.baseline, [row.name for row in table.rows])
            for row in table.rows:
                if "--stages" in row.flags:
                    stages = [s.split(":") for s in row.flags[row.flags.index("--stages") + 1].split(",")]
                    self.assertEqual(sum(int(steps) for _, steps in stages), rows.STEPS)
                    self.assertEqual(stages[-1][0], f"{row.size[0]}x{row.size[1]}")
                else:
                    width, height = rows.NATIVE if row.enlarged else row.size
                    self.assertEqual(row.flags[row.flags.index("--size") + 1], f"{width}x{height}")


class Report(TempCase):
    ENTRIES = [
        {"table": "t", "row": "true", "metrics": {"objects": [1.0, 1.0, 1.0], "fd_r": [4.26, 3.0, 5.0]}},
        {"table": "t", "row": "x", "x": 4, "gflop": 71.6, "core_seconds": 0.987,
         "metrics": {"objects": [0.715, 0.62, 0.8], "objects_difference": [0.05, -4e-4, 0.1], "fd_r": [9.0, 8.0, 11]}},
        {"table": "t", "row": "y", "x": 2, "metrics": {"objects": [float("nan")] * 3, "fd_r": [1.0, 0.5, 2.0]}},
    ]  # fmt: skip

    def test_markdown(self):
        lines = report.markdown(self.ENTRIES).splitlines()
        self.assertEqual(lines[0], "|  | objects right, % | against the baseline | GFLOP | core s |")
        self.assertEqual(lines[3], "| x | 71.5 [62.0, 80.0] | +5.0 [0.0, 10.0] | 72 | 0.99 |")
        self.assertEqual(lines[4], "| y | - | - | - | - |")
        self.assertEqual(lines[6:9:2], ["|  | FD_r |", "| true | 4.3 [3.0, 5.0] |"])

    def test_plots_are_svg_and_the_same_every_time(self):
        for axis in (None, "steps"):
            text = report.plot(self.ENTRIES, "A & B", axis)
            ElementTree.fromstring(text)
            self.assertEqual(text, report.plot(self.ENTRIES, "A & B", axis))
            self.assertIn("A &amp; B", text)
            self.assertEqual("steps" in text, axis is not None)
        with self.refused("no row has any of"):
            report.plot([{"row": "x", "metrics": {}}], "t")

    def test_results_file(self):
        path = self.dir / "r.jsonl"
        self.assertEqual(report.read_results(path), [])
        path.write_text('{"a": 1}\n{"a": 2')
        self.assertEqual(report.read_results(path), [{"a": 1}])
        path.write_text('{"a": \n{"a": 2}\n')
        with self.refused("r.jsonl, line 1", "delete the line"):
            report.read_results(path)

    def test_command(self):
        path = self.dir / "r.jsonl"
        path.write_text("".join(json.dumps(e) + "\n" for e in self.ENTRIES[:2]))
        with mock.patch.object(sys, "argv", ["report.py", str(path), str(self.dir / "out")]):
            self.assertEqual(report.main(), 0)
        self.assertTrue(Path(self.dir / "out" / "t.md").exists())


if __name__ == "__main__":
    unittest.main()
