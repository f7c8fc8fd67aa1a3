"""64 clients of a server for a while: mixed shapes, some cancel, some go away. Usage: load.py http://ADDRESS PID SECONDS

At the end nothing may be lost or doubled: every job is over, every finished one has as many pictures as it asked for, each under its own
name and with its own seed, and the server's counters say the same. Resident memory is read from /proc/PID/status.
"""

import http.client
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from urllib.parse import urlparse

CLIENTS = 64
SHAPES = [("64x64", 4), ("64x64", 4), ("64x64", 4), ("96x64", 4), ("128x128", 3)]

place = urlparse(sys.argv[1])
HEADERS = {"Authorization": f"Bearer {os.environ['MEGAFUSE_API_TOKEN']}", "Content-Type": "application/json"}
lock = threading.Lock()
did, latencies, problems, files = Counter(), [], [], set()


def ask(method, path, body=None):
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=300)
    connection.request(method, path, json.dumps(body) if body is not None else None, HEADERS)
    reply = connection.getresponse()
    text = reply.read()
    connection.close()
    return reply.status, dict(reply.getheaders()), text


def note(name, count=1):
    with lock:
        did[name] += count


def client(number, until):
    chance = random.Random(number)
    while time.monotonic() < until:
        size, steps = chance.choice(SHAPES)
        body = {"prompt": f"a red ball {number}", "size": size, "steps": steps, "seed": chance.randrange(2**32 - 8), "count": chance.choice([1, 1, 2])}
        kind = chance.random()
        begin = time.monotonic()
        if kind < 0.1:
            gone(body)
            continue
        status, headers, text = ask("POST", "/v1/jobs", body)
        if status == 429:
            note("refused, queue full")
            time.sleep(min(float(headers["retry-after"]), 5) * chance.random())
            continue
        if status != 202:
            with lock:
                problems.append(f"{status}: {text[:200]}")
            continue
        note("taken")
        job = json.loads(text)["id"]
        if kind < 0.25:
            time.sleep(chance.random())
            ask("DELETE", f"/v1/jobs/{job}")
        _, _, events = ask("GET", f"/v1/jobs/{job}/events")
        last = json.loads(events.decode().strip().split("data:")[-1].split("\n")[0])
        check(body, last, time.monotonic() - begin)


def check(body, last, seconds):
    with lock:
        did[last["state"]] += 1
        if last["state"] == "done":
            latencies.append(seconds)
            seeds = [picture["seed"] for picture in last["pictures"]]
            if seeds != [body["seed"] + i for i in range(body["count"])]:
                problems.append(f"seeds {seeds} of {body}")
            did["pictures"] += len(seeds)
        elif last["state"] == "failed":
            problems.append(last["error"])
        for picture in last["pictures"]:
            if picture["url"] in files:
                problems.append(f"{picture['url']} came twice")
            files.add(picture["url"])


def gone(body):
    """Asks as OpenAI's clients do, and closes the connection before the reply."""
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=300)
    asked = {"prompt": body["prompt"], "size": body["size"], "megafuse": {"steps": 50}}
    connection.request("POST", "/v1/images/generations", json.dumps(asked), HEADERS)
    time.sleep(0.3)
    connection.close()
    note("went away")


def resident(pid):
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


def counters():
    _, _, text = ask("GET", "/metrics")
    lines = (line.split() for line in text.decode().splitlines() if not line.startswith("#"))
    return {name.removeprefix("megafuse_"): float(value) for name, value in lines if "{" not in name}


def quantile(share):
    return latencies[min(int(share * len(latencies)), len(latencies) - 1)]


def main():
    pid, seconds = sys.argv[2], float(sys.argv[3])
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=client, args=(number, until)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    time.sleep(min(30, seconds / 4))
    sizes = [resident(pid)]
    while any(thread.is_alive() for thread in threads):
        time.sleep(1)
        sizes.append(resident(pid))
    while counters()["queue_pictures"] > 0:
        time.sleep(0.2)
    time.sleep(2)
    end = counters()
    over = end["jobs_done_total"] + end["jobs_failed_total"] + end["jobs_cancelled_total"]
    latencies.sort()
    print(dict(did))
    print({name: value for name, value in end.items() if name.endswith("_total") or name.startswith("batch_pictures")})
    print(f"{did['pictures'] / seconds:.2f} pictures/s; jobs done: p50 {quantile(0.5):.2f} s, p99 {quantile(0.99):.2f} s")
    print(f"resident memory: {sizes[0]:.0f} MiB after warming up, {max(sizes):.0f} at most, {sizes[-1]:.0f} at the end")
    if over != end["jobs_taken_total"]:
        problems.append(f"{end['jobs_taken_total']:.0f} jobs were taken, {over:.0f} are over")
    # One that goes away may have been served before.
    if not did["done"] <= end["jobs_done_total"] <= did["done"] + did["went away"]:
        problems.append(f"the server says that {end['jobs_done_total']:.0f} jobs are done, the clients saw {did['done']}")
    if max(sizes) - sizes[0] > 100:
        problems.append(f"resident memory grew by {max(sizes) - sizes[0]:.0f} MiB")
    for problem in problems[:20]:
        print("PROBLEM:", problem)
    sys.exit(1 if problems else 0)


main()
