"""Times one UNet step (with guidance batch 2: unconditional and conditional) with diffusers on torch's CPU backend.

    tools/oracle/venv tools/oracle/bench_torch.py DIR [--threads N] [--size 512] [--runs N] [--dtype f32|bf16]

DIR: a model directory as full_size.py writes; SDXL's takes --size 1024, and --guidance 1 for one UNet call of batch 1. Prints one JSON line: median and all times in seconds, processor time
per step, peak resident memory of the process in bytes, and what was run. One untimed step goes first.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import statistics
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, default=512, help="pixels a side; the latents are an eighth of it")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--guidance", type=float, default=7.0)
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    import diffusers

    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    unet = diffusers.UNet2DConditionModel.from_pretrained(options.dir / "unet", torch_dtype=dtype)
    unet.eval().requires_grad_(False)
    scheduler = diffusers.DDIMScheduler.from_pretrained(options.dir / "scheduler", clip_sample=False)
    scheduler.set_timesteps(50)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, options.size // 8, options.size // 8, generator=generator).to(dtype)
    batch = 2 if options.guidance > 1 else 1
    embeds = torch.randn(batch, 77, unet.config.cross_attention_dim, generator=generator).to(dtype)
    more = {}
    if unet.config.addition_embed_type == "text_time":
        width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        ids = torch.tensor([[options.size, options.size, 0, 0, options.size, options.size]] * batch, dtype=torch.float32)
        pooled = torch.randn(batch, width, generator=generator).to(dtype)
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}

    def step(latents, t):
        output = unet(torch.cat([latents] * batch), t, encoder_hidden_states=embeds, **more).sample
        if batch == 1:
            return scheduler.step(output, t, latents).prev_sample
        e_u, e_c = output.chunk(2)
        return scheduler.step(e_u + options.guidance * (e_c - e_u), t, latents).prev_sample

    times, processor = [], []
    with torch.inference_mode():
        for i in range(options.runs + 1):
            start, began = time.perf_counter(), time.process_time()
            latents = step(latents, scheduler.timesteps[i])
            if i > 0:
                times.append(time.perf_counter() - start)
                processor.append(time.process_time() - began)
    assert torch.isfinite(latents).all()
    print(json.dumps({
        "what": f"UNet step, batch {batch}", "size": options.size, "dtype": options.dtype, "threads": options.threads,
        "median_s": statistics.median(times), "times_s": times,
        "cpu_s": statistics.mean(processor),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "torch": torch.__version__, "diffusers": diffusers.__version__, "machine": platform.machine(),
    }))


if __name__ == "__main__":
    main()
