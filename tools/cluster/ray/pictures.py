"""The pictures of a manifest with Ray: each actor holds a `megafuse serve`, and Ray Data hands it lines.

    python tools/cluster/ray/pictures.py prompts.jsonl FOLDER --actors 8 --gpus 1 -- --model ~/models/sdxl --batch auto

What stands behind -- are flags of megafuse serve. Lines are those of `generate --manifest`: prompt, and where wanted id, seed and the fields of
a job (method, size, stages, steps, guidance, ...). A picture is called ID.png, or by the line's number in six digits, and is in FOLDER whole or
not at all; the same command again makes what is missing. --gpus 0.5 puts two actors on a card. An actor or a server that dies is started
again by Ray, and its lines are made again. FOLDER is one that all machines see.
"""

import argparse
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import ray

# Lines per task: pictures that may share a batch of a server.
LINES = 8
# A server that ends with its actor, however that ends: the pipe to it closes.
WATCHED = '"$@" </dev/null & server=$!; cat >/dev/null; kill $server; wait $server'


def seed_of(line, first):
    """As generate --manifest: the line's own, else --seed plus the id's FNV-1a hash, or plus the line's number less 1."""
    if "seed" in line:
        return line["seed"]
    if "id" not in line:
        return first + line["number"] - 1
    code = 0x811C9DC5
    for byte in str(line["id"]).encode():
        code = (code ^ byte) * 0x01000193 & 0xFFFFFFFF
    return first + code


def read(manifest):
    """(name, line) of every line."""
    lines = []
    for number, text in enumerate(Path(manifest).read_text(encoding="utf-8-sig").splitlines(), 1):
        if text.strip():
            line = json.loads(text) | {"number": number}
            lines.append((str(line.get("id", f"{number:06d}")), line))
    return lines


class Server:
    """An actor: a server of its own, whose address nobody else knows."""

    def __init__(self, program, flags, folder, first_seed):
        self.folder, self.first_seed = Path(folder), first_seed
        # Ray has set CUDA_VISIBLE_DEVICES to this actor's card.
        command = [program, "serve", "--addr", "127.0.0.1:0", "--keep", "1", *flags]
        command = ["sh", "-c", WATCHED, "sh", *command]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.address = self.process.stdout.readline().strip()
        if not self.address:
            raise RuntimeError("megafuse serve has ended; its words are above")
        while not self.is_ready():
            time.sleep(0.2)

    def is_ready(self):
        try:
            return urllib.request.urlopen(f"{self.address}/readyz").status == 200
        except urllib.error.HTTPError:
            return False

    def __call__(self, batch):
        try:
            jobs = [self.submit(json.loads(line)) for line in batch["line"]]
            for name, job in zip(batch["name"], jobs):
                self.write(str(name), job)
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, json.JSONDecodeError) as error:
            # The server is gone. So is this actor; Ray starts another and gives it these lines.
            print(f"the server is gone: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        return {"name": batch["name"]}

    def submit(self, line):
        body = {name: value for name, value in line.items() if name not in ("id", "number")} | {"seed": seed_of(line, self.first_seed)}
        request = urllib.request.Request(f"{self.address}/v1/jobs", json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            return json.load(urllib.request.urlopen(request))["id"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"line {line['number']}: {json.load(error)['error']['message']}") from error

    def write(self, name, job):
        events = urllib.request.urlopen(f"{self.address}/v1/jobs/{job}/events").read().decode()
        status = json.loads(events.strip().split("data:")[-1].split("\n")[0])
        if status["state"] not in ("done", "failed", "cancelled"):
            raise ConnectionError("the stream of events was cut off")
        if status["state"] != "done":
            raise RuntimeError(f"{name}: {status['error']}")
        png = urllib.request.urlopen(self.address + status["pictures"][0]["url"]).read()
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".part-", delete=False) as part:
            part.write(png)
        os.chmod(part.name, 0o644)
        os.replace(part.name, self.folder / f"{name}.png")


def main():
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    ours, flags = sys.argv[1:at], sys.argv[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="cards per actor, also a part of one (default: 0, the cpu)")
    parser.add_argument("--cpus", type=float, default=1, help="cores per actor that Ray sets aside")
    parser.add_argument("--seed", type=int, default=0, help="of lines without one, as generate --seed")
    parser.add_argument("--program", default="megafuse")
    args = parser.parse_args(ours)
    args.folder.mkdir(parents=True, exist_ok=True)
    lines = read(args.manifest)
    todo = [(name, line) for name, line in lines if not (args.folder / f"{name}.png").exists()]
    print(f"{len(lines)} lines, {len(todo)} pictures to make", flush=True)
    if not todo:
        return
    rows = [{"name": name, "line": json.dumps(line)} for name, line in todo]
    data = ray.data.from_items(rows, override_num_blocks=max(1, (len(rows) + LINES - 1) // LINES))
    made = data.map_batches(
        Server,
        fn_constructor_args=(args.program, flags, str(args.folder.resolve()), args.seed),
        batch_size=LINES,
        compute=ray.data.ActorPoolStrategy(size=args.actors),
        num_gpus=args.gpus or None,
        num_cpus=None if args.gpus else args.cpus,
        max_restarts=-1,
        max_task_retries=-1,
    )
    print(f"{made.count()} pictures made", flush=True)


if __name__ == "__main__":
    main()
