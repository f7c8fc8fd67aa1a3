#!/usr/bin/env python3
"""Times in torch the shapes that `megafuse bench --json` timed, on the same card in the same minutes.

  gpu_torch.py BENCH.JSON > TORCH.JSON        tools/gpu runs it so

Reads one JSON object a line (or one array of them), with "op", "dtype" and "shape"; a shape has the fields that
src/ops/cases.rs gives it, of which these are used (those in parentheses may be missing):

  linear      m n k (bias activation)
  conv2d      n h w c o kernel (stride dilation bias second_source resized_from norm_groups silu)
  attention   n queries keys heads head_dim (causal)
  group_norm  n h w c groups (silu second_source)
  layer_norm  rows c

Prints one object: the versions; each line of BENCH.JSON that has such a shape, with "torch_us", the time of the same
work as one writes it in torch, and "torch_bare_us", that of the bare product or norm, without what megafuse fuses into
it; and how many lines had no shape. Images are channels_last. As in megafuse's bench: random data, L2 flushed before
each run, medians.
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


# An op returns two calls: all the work, and the bare one.


def activated(name, y):
    match (name or "none").lower():
        case "none":
            return y
        case "silu":
            return F.silu(y)
        case "gelu":
            return F.gelu(y)
        case "quickgelu" | "quick_gelu":
            return y * torch.sigmoid(1.702 * y)
        case "geglu":
            value, gate = y.chunk(2, dim=-1)
            return value * F.gelu(gate)
    raise KeyError(name)


def linear(shape, dtype):
    x, weight = randn(dtype, shape["m"], shape["k"]), randn(dtype, shape["n"], shape["k"])
    bias = randn(dtype, shape["n"]) if shape.get("bias") else None
    return lambda: activated(shape.get("activation"), F.linear(x, weight, bias)), lambda: F.linear(x, weight)


def images(dtype, n, c, h, w):
    return randn(dtype, n, c, h, w).to(memory_format=torch.channels_last)


def sources(shape, dtype, h, w):
    """The input and, where it is two tensors side by side, the second."""
    second = shape.get("second_source") or 0
    first = images(dtype, shape["n"], shape["c"] - second, h, w)
    return [first, images(dtype, shape["n"], second, h, w)] if second else [first]


def joined(tensors):
    return torch.cat(tensors, dim=1) if len(tensors) > 1 else tensors[0]


def conv2d(shape, dtype):
    n, h, w, c, o, size = (shape[name] for name in ("n", "h", "w", "c", "o", "kernel"))
    weight = images(dtype, o, c, size, size)
    bias = randn(dtype, o) if shape.get("bias") else None
    gamma, beta = randn(dtype, c), randn(dtype, c)
    dilation, stride = shape.get("dilation", 1), shape.get("stride", 1)
    padding = dilation * (size - 1) // 2
    parts = sources(shape, dtype, *(shape.get("resized_from") or (h, w)))
    bare_input = images(dtype, n, c, h, w)

    def whole():
        x = joined(parts)
        if shape.get("norm_groups"):
            x = F.group_norm(x, shape["norm_groups"], gamma, beta)
        if shape.get("silu"):
            x = F.silu(x)
        if shape.get("resized_from"):
            x = F.interpolate(x, (h, w), mode="nearest")
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    return whole, lambda: F.conv2d(bare_input, weight, None, stride, padding, dilation)


def attention(shape, dtype):
    def heads(tokens):
        # As the projections leave them: heads side by side in a token.
        return randn(dtype, shape["n"], tokens, shape["heads"], shape["head_dim"]).transpose(1, 2)

    q, k, v = heads(shape["queries"]), heads(shape["keys"]), heads(shape["keys"])
    call = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=bool(shape.get("causal")))  # noqa: E731
    return call, call


def group_norm(shape, dtype):
    gamma, beta = randn(dtype, shape["c"]), randn(dtype, shape["c"])
    parts = sources(shape, dtype, shape["h"], shape["w"])
    bare_input = images(dtype, shape["n"], shape["c"], shape["h"], shape["w"])

    def whole():
        y = F.group_norm(joined(parts), shape["groups"], gamma, beta)
        return F.silu(y) if shape.get("silu") else y

    return whole, lambda: F.group_norm(bare_input, shape["groups"], gamma, beta)


def layer_norm(shape, dtype):
    x, gamma, beta = randn(dtype, shape["rows"], shape["c"]), randn(dtype, shape["c"]), randn(dtype, shape["c"])
    call = lambda: F.layer_norm(x, [shape["c"]], gamma, beta)  # noqa: E731
    return call, call


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
                whole, bare = OPS[case["op"]](case["shape"], DTYPES[case["dtype"]])
                case["torch_us"] = median_us(whole, flush, SECONDS / len(cases) / 2)
                same = bare is whole
                case["torch_bare_us"] = case["torch_us"] if same else median_us(bare, flush, SECONDS / len(cases) / 2)
            except (RuntimeError, KeyError) as error:
                case["torch_error"] = f"{type(error).__name__}: {error}"[:200]
            results.append(case)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    versions.update(card=torch.cuda.get_device_name(), without_shape=len(lines) - len(cases))
    json.dump({**versions, "ops": results}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
