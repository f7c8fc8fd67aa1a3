#!/usr/bin/env python3
"""Times in torch the shapes that `megafuse bench --json` timed, on the same card in the same minutes.

  gpu_torch.py BENCH.JSON > TORCH.JSON        tools/gpu runs it so

Reads one JSON object a line (or one array of them). Of each it needs "op", "dtype" and "shape":

  linear      {"m", "n", "k"}                                            torch.nn.functional.linear, no epilogue
  conv2d      {"n", "h", "w", "c", "o", "kernel", "stride", "dilation"}  conv2d in channels_last, no epilogue
  attention   {"n", "queries", "keys", "heads", "head_dim", "causal"}    scaled_dot_product_attention, fastest backend
  group_norm  {"n", "h", "w", "c", "groups", "silu"}                     group_norm in channels_last, then silu
  layer_norm  {"rows", "c"}                                              layer_norm

stride, dilation, causal and silu may be left out. Prints one object: the versions, each line of BENCH.JSON that has
such a shape with "torch_us" added, and how many had none. As there: random data, L2 flushed before each run, median of
CUDA events. Where an epilogue is fused in megafuse, torch is spared that work.
"""

import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F

SECONDS = 70.0  # for all shapes together
RUNS = 30
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def randn(dtype, *shape):
    return torch.randn(*shape, device="cuda").to(dtype)


def linear(shape, dtype):
    x, weight = randn(dtype, shape["m"], shape["k"]), randn(dtype, shape["n"], shape["k"])
    return lambda: F.linear(x, weight)


def images(shape, dtype):
    x = randn(dtype, shape["n"], shape["c"], shape["h"], shape["w"])
    return x.to(memory_format=torch.channels_last)


def conv2d(shape, dtype):
    x, size = images(shape, dtype), shape["kernel"]
    weight = randn(dtype, shape["o"], shape["c"], size, size).to(memory_format=torch.channels_last)
    dilation = shape.get("dilation", 1)
    padding = dilation * (size - 1) // 2
    return lambda: F.conv2d(x, weight, None, shape.get("stride", 1), padding, dilation)


def attention(shape, dtype):
    def heads(tokens):
        # As the projections leave them: heads side by side in a token.
        return randn(dtype, shape["n"], tokens, shape["heads"], shape["head_dim"]).transpose(1, 2)

    q, k, v = heads(shape["queries"]), heads(shape["keys"]), heads(shape["keys"])
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=bool(shape.get("causal", False)))


def group_norm(shape, dtype):
    x = images(shape, dtype)
    gamma, beta = randn(dtype, shape["c"]), randn(dtype, shape["c"])
    if shape.get("silu"):
        return lambda: F.silu(F.group_norm(x, shape["groups"], gamma, beta))
    return lambda: F.group_norm(x, shape["groups"], gamma, beta)


def layer_norm(shape, dtype):
    x, gamma, beta = randn(dtype, shape["rows"], shape["c"]), randn(dtype, shape["c"]), randn(dtype, shape["c"])
    return lambda: F.layer_norm(x, [shape["c"]], gamma, beta)


OPS = {op.__name__: op for op in (linear, conv2d, attention, group_norm, layer_norm)}


def median_us(call, flush, seconds):
    for _ in range(3):  # the first picks algorithms
        call()
    times = []
    end = time.monotonic() + seconds
    while len(times) < RUNS and (len(times) < 3 or time.monotonic() < end):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(1e3 * start.elapsed_time(stop))
    return statistics.median(times)


def read(path):
    with open(path, encoding="utf-8") as file:
        text = file.read()
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def main():
    lines = read(sys.argv[1])
    cases = [line for line in lines if line.get("op") in OPS and line.get("dtype") in DTYPES and "shape" in line]
    if not cases:
        sys.exit(f"{sys.argv[1]} has {len(lines)} lines and no shape that torch could be given")
    # True f32, as megafuse's.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    results = []
    with torch.inference_mode():
        for case in cases:
            try:
                call = OPS[case["op"]](case["shape"], DTYPES[case["dtype"]])
                case["torch_us"] = median_us(call, flush, SECONDS / len(cases))
            except (RuntimeError, KeyError) as error:
                case["torch_error"] = f"{type(error).__name__}: {error}"[:200]
            results.append(case)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    versions.update(card=torch.cuda.get_device_name(), without_shape=len(lines) - len(cases))
    json.dump({**versions, "ops": results}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
