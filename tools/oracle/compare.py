"""Compares every module of a model directory, as `megafuse probe` runs it, with diffusers and transformers in f32.

    tools/oracle/venv tools/oracle/compare.py DIR [--binary target/release/megafuse] [--threads N]

For models too large for tests/data: full_size.py's, or published ones. Prints one JSON line per module: the largest
error of an element relative to max(|expected|, rms), and the seconds both took (the program's include its start and
loading the weights). Exits with 1 when an error exceeds 1e-4 or the token ids differ.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import load_file, save_file

import module_values
import reference

PROMPT = "a photo of a cat, 35mm"
LIMIT = 1e-4


def main():
    root = pathlib.Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("--binary", type=pathlib.Path, default=root / "target/release/megafuse")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch's")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, failed = reference.load(options.dir), False
    normal, factor = module_values.normal, model.vae_factor

    def compare(name, module, inputs, expected, more=()):
        nonlocal failed
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            args = [options.binary, "probe", "--model", options.dir, "--module", module, "--device", options.device,
                    "--out", folder / "out.safetensors", *more]
            if inputs:
                save_file(inputs, folder / "in.safetensors")
                args += ["--in", folder / "in.safetensors"]
            start = time.perf_counter()
            subprocess.run([str(a) for a in args], check=True, stdout=subprocess.DEVNULL)
            ours = time.perf_counter() - start
            got = load_file(folder / "out.safetensors")
        start = time.perf_counter()
        want = expected()
        theirs = time.perf_counter() - start
        errors = {key: float(f"{module_values.relative(got[key], want[key]):.1e}") for key in want}
        failed |= any(not error <= (0 if key.endswith("input_ids") else LIMIT) for key, error in errors.items())
        print(json.dumps({"module": name, "errors": errors, "megafuse_s": round(ours, 1), "torch_s": round(theirs, 1)}))

    def text():
        if model.text_2 is not None:
            tensors = {}
            module_values.sdxl_text_values(model, tensors, [PROMPT])
            return {key.removeprefix("text0."): value for key, value in tensors.items()}
        ids = torch.tensor([module_values.tokenize(model.tokenizer, PROMPT)])
        out = model.text(ids, output_hidden_states=True)
        return {"input_ids": ids, "last_hidden_state": out.last_hidden_state, "penultimate": out.hidden_states[-2],
                "pooled": out.pooler_output}

    def unet(dilation, **inputs):
        module_values.set_mid_dilation(model.unet, dilation)
        out = module_values.run_unet(model.unet, **inputs)
        module_values.set_mid_dilation(model.unet, 1)
        return {"out": out}

    with torch.no_grad():
        compare("text", "text", None, text, ["--prompt", PROMPT])
        length, width = model.tokenizer.model_max_length, model.unet.config.cross_attention_dim
        for dilation, (h, w) in [(1, (32, 24)), (2, (40, 32)), (1, (27, 17))]:
            inputs = {"sample": normal(1, 2, 4, h, w), "timestep": torch.tensor([301.0]),
                      "prompt_embeds": normal(2, 2, length, width), **module_values.added(model, 0, 2)}
            compare(f"unet {h}x{w}, dilation {dilation}", "unet", inputs, lambda: unet(**inputs, dilation=dilation),
                    ["--dilation", dilation])
        latent = normal(3, 1, 4, 9, 13)
        compare("vae-decode", "vae-decode", {"latent": latent}, lambda: {"decoded": model.vae.decode(latent).sample})
        image = normal(4, 1, 3, 9 * factor, 7 * factor).mul(0.5).clamp(-1, 1)
        moments = lambda: model.vae.encode(image).latent_dist
        compare("vae-encode", "vae-encode", {"image": image}, lambda: {"mean": (m := moments()).mean, "logvar": m.logvar})
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
