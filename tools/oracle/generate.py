"""Writes tests/data: small random models and the values diffusers, transformers, torch and PIL compute from them.

    tools/oracle/venv tools/oracle/generate.py             rewrite tests/data
    tools/oracle/venv tools/oracle/generate.py --check     make them anew in a temporary folder and compare

Seeds are fixed, so a second run on the same machine gives the same bytes; another processor may round sums
differently, so --check compares floating-point tensors to 2e-5 of max(|value|, rms) and everything else exactly.
"""

import argparse
import json
import os
import pathlib
import shutil
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

DATA = pathlib.Path(__file__).resolve().parents[2] / "tests/data"
TOLERANCE = 2e-5
MAX_TOTAL_BYTES = 15 << 20


def generate(root):
    import module_values
    import random_values
    import reference
    import resize_values
    import run_values
    import sampler_values
    import small_models

    sampler_values.write(root)
    random_values.write(root)
    resize_values.write(root)
    models = {}
    for name in small_models.MODELS:
        models[name] = small_models.build(name, root)
        module_values.write(models[name], reference.double(models[name]))
        check_loads(models[name], reference.load(root / name))
    run_values.write(root, models)


def check_loads(built, loaded):
    """diffusers and transformers read the directory back to the same weights: it is a valid one."""
    assert built.modules() == loaded.modules() and built.force_zeros == loaded.force_zeros, built.name
    for part in built.modules():
        a, b = getattr(built, part).state_dict(), getattr(loaded, part).state_dict()
        assert a.keys() == b.keys(), (built.name, part)
        for key in a:
            assert torch.equal(a[key], b[key]), (built.name, part, key)
    assert built.tokenizer("A cat, 2 dogs").input_ids == loaded.tokenizer("A cat, 2 dogs").input_ids


def without_errors(text):
    """JSON without the figures that say how far f32, f16 and bf16 are off: they depend on the processor."""
    drop = lambda pairs: {k: v for k, v in pairs if k not in ("f32_error", "torch_error")}
    return json.loads(text, object_pairs_hook=drop)


def files(root):
    return {p.relative_to(root) for p in root.rglob("*") if p.is_file()}


def differences(want, got):
    """What differs between two generated trees, as lines."""
    from safetensors.torch import load_file

    # Folders of tests/data that other tests own are not ours to compare.
    ours = {p.parts[0] for p in files(got)}
    have = {p for p in files(want) if p.parts[0] in ours}
    lines = [f"{p}: only in tests/data" for p in sorted(have - files(got))]
    lines += [f"{p}: missing in tests/data" for p in sorted(files(got) - have)]
    for path in sorted(have & files(got)):
        if path.suffix == ".json" and path.name in ("oracle.json", "runs.json"):
            if without_errors((want / path).read_text()) != without_errors((got / path).read_text()):
                lines.append(f"{path}: differs")
            continue
        if path.suffix != ".safetensors":
            if (want / path).read_bytes() != (got / path).read_bytes():
                lines.append(f"{path}: differs")
            continue
        a, b = load_file(want / path), load_file(got / path)
        if a.keys() != b.keys():
            lines.append(f"{path}: tensors {sorted(a.keys() ^ b.keys())}")
        for key in sorted(a.keys() & b.keys()):
            x, y = a[key], b[key]
            if x.shape != y.shape or x.dtype != y.dtype:
                lines.append(f"{path}: {key} is {list(x.shape)} {x.dtype}, now {list(y.shape)} {y.dtype}")
            elif x.is_floating_point() and path.parts[0] != "randn":
                x, y = x.double(), y.double()
                error = (x - y).abs() / x.abs().clamp_min(x.square().mean().sqrt()).clamp_min(1e-30)
                if error.numel() and error.max() > TOLERANCE:
                    lines.append(f"{path}: {key} differs by {error.max():.1e}")
            elif not torch.equal(x, y):
                lines.append(f"{path}: {key} differs")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with tests/data instead of rewriting it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temp:
        root = pathlib.Path(temp) / "data"
        root.mkdir()
        generate(root)
        total = sum((root / p).stat().st_size for p in files(root))
        print(json.dumps({"files": len(files(root)), "bytes": total}))
        assert total <= MAX_TOTAL_BYTES, "the test data no longer fit their limit"
        if options.check:
            lines = differences(DATA, root)
            print("\n".join(lines) or "tests/data is what the generator makes")
            sys.exit(1 if lines else 0)
        for top in sorted({p.parts[0] for p in files(root)}):
            shutil.rmtree(DATA / top, ignore_errors=True)
            shutil.copytree(root / top, DATA / top)


if __name__ == "__main__":
    main()
