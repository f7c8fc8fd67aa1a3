"""DemoFusion (Du et al. 2024, arXiv:2311.16973) in plain torch, one view at a time; batch 1.

Phase 1 is plain sampling at the trained size; phase s, at s times its sides, enlarges the latents before it and runs the whole
schedule again. Tensors beside reference.py's: phase<s>.step<n>, phase<s>.latent (from 2 on with phase 1's mean and deviation),
jitter<s> [steps, windows, 2], whole numbers: the offset of each window's column and row.

What the paper leaves open, and the published code's way with it:
- The cosine factors take (1000 - t) / 1000; the Gaussian has 2 s - 1 taps; the blur's deviation falls to 0.01 sigma.
- A phase's noise is one draw, here the next of the run's one generator; jitter comes from Python's random.Random(seed).
- From a picture of any size `stages` says the phases' sizes, windows are of the trained one, and a dilated sample has about its sides.
- Along an axis that a window spans there is no jitter and no draw; windows at a border move outward only, into zeros.
- SDXL's sizes are those of the final picture in all phases; a window's crop is its place in the map padded by the largest
  offset.
- `reference_compat`: in phases after the first the published code scales the input of the first group of windows for the
  step's noise level (in a phase's first step not at all), of all other views for the next step's.
"""

import math
import random

import torch
import torch.nn.functional as F

import reference
from multidiffusion import at, starts


def phase_sizes(size, phases, factor):
    """Cells of each phase: ((height, width) ...)"""
    width, height = size
    long, short = max(size), min(size)
    out = []
    for s in range(1, phases + 1):
        side = long // phases * s
        other = side * short // long
        cells = (side // factor, other // factor)
        out.append(cells[::-1] if width >= height else cells)
    return out


def windows(length, window, stride, reach):
    """Start of each window along an axis, and the range of its offsets; None: it spans the axis."""
    out = []
    for start in starts(length, window, stride):
        low, high = start == 0, start + window >= length
        allowed = {(True, True): None, (True, False): (-reach, 0), (False, True): (0, reach)}
        out.append((start, allowed.get((low, high), (-reach, reach))))
    return out


def factors(t, cosine):
    k = 0.5 * (1 + math.cos(math.pi * (1000 - t) / 1000))
    a1, a2, a3 = cosine
    return k**a1, k**a2, 0.99 * k**a3 + 0.01


def blur(x, scale, sigma):
    taps = torch.tensor([math.exp(-((j - (scale - 1)) ** 2) / (2 * sigma**2)) for j in range(2 * scale - 1)],
                        dtype=x.dtype)
    taps = taps / taps.sum()
    kernel = (taps[:, None] * taps[None])[None, None].repeat(x.shape[1], 1, 1, 1)
    y = F.conv2d(x, kernel, padding=scale - 1, groups=x.shape[1])
    return (y - y.mean()) / y.std() * x.std() + x.mean()


def run(model, settings, tensors, begin=None):
    """`begin`: of the draws and phase 1's size in pixels, the clean latents of a picture, which takes the place of phase 1's."""
    draws = reference.Draws(settings.seed, tensors, model.unet.dtype)
    offsets = random.Random(settings.seed)
    sampler = settings.scheduler or {"EulerDiscreteScheduler": "euler", "DDIMScheduler": "ddim"}.get(
        model.scheduler_config["_class_name"], "euler")
    scheduler = reference.make_scheduler(reference.SAMPLERS[sampler], model.scheduler_config)
    stages = settings.stages
    scheduler.set_timesteps(stages[0][1] if stages else settings.steps)
    scheduler.is_scale_input_called = True  # inputs are scaled here
    timesteps = scheduler.timesteps
    factor, window = model.vae_factor, model.unet.config.sample_size
    stride = settings.stride or max(window // 2, 1)
    reach = (window - stride) // 4
    final = stages[-1][0] if stages else settings.size
    phases = len(stages) or max(final) // (window * factor)
    sizes = phase_sizes(final, phases, factor)
    predict = reference.Guided(model, settings)
    predict.enter(final)
    whole = predict.time_ids

    def scaled(x, i, level):
        """x as the network reads it; at `level` of the schedule, the end included."""
        if sampler == "euler":
            return x / (scheduler.sigmas[level].to(x.dtype) ** 2 + 1) ** 0.5
        return x

    def stepped(output, i, x):
        at(scheduler, i)
        return scheduler.step(output, timesteps[i], x).prev_sample

    def noised(x, noise, i):
        if sampler == "euler":
            return x + scheduler.sigmas[i].to(x.dtype) * noise
        abar = scheduler.alphas_cumprod[timesteps[i].long()].to(x.dtype)
        return abar.sqrt() * x + (1 - abar).sqrt() * noise

    def run_phase(s, x, base, noise):
        height, width = sizes[s - 1]
        rows, columns = (windows(n, window, stride, reach) for n in (height, width))
        size = (min(window, height), min(window, width))
        # s, but of a picture that is larger than the trained size
        apart = max(1, int(max(height, width) / window + 0.5))
        jitter = torch.zeros(len(timesteps), len(rows) * len(columns), 2, dtype=torch.int64)
        for step in range(len(timesteps)):
            for v in range(len(rows) * len(columns)):
                for axis, (_, allowed) in enumerate((columns[v % len(columns)], rows[v // len(columns)])):
                    if allowed:
                        jitter[step, v, axis] = offsets.randint(*allowed)
        tensors[f"jitter{s}"] = jitter
        for i, t in enumerate(timesteps):
            c1, c2, c3 = factors(float(t), settings.cosine)
            x = (1 - c1) * x + c1 * noised(base, noise, i)
            # Which noise level the input is scaled for: view 0, 1, ... of the step.
            quirk = settings.reference_compat
            first = (len(timesteps) if i == 0 else i) if quirk else i
            later = i + 1 if quirk else i
            padded = F.pad(x, (reach,) * 4)
            total, count = torch.zeros_like(padded), torch.zeros_like(padded)
            for v in range(jitter.shape[1]):
                top = rows[v // len(columns)][0] + int(jitter[i, v, 1]) + reach
                left = columns[v % len(columns)][0] + int(jitter[i, v, 0]) + reach
                assert 0 <= top and top + size[0] <= height + 2 * reach
                crop = padded[:, :, top : top + size[0], left : left + size[1]]
                if whole is not None:
                    predict.time_ids = whole.clone()
                    predict.time_ids[:, 2], predict.time_ids[:, 3] = top * factor, left * factor
                level = first if v < settings.view_batch else later
                predict.view = (top - reach, left - reach, 1, (height, width))
                output = predict(scaled(crop, i, level), t)
                total[:, :, top : top + size[0], left : left + size[1]] += stepped(output, i, crop)
                count[:, :, top : top + size[0], left : left + size[1]] += 1
            inner = lambda y: y[:, :, reach : reach + height, reach : reach + width]
            assert inner(count).min() > 0
            local = inner(total) / inner(count)

            predict.time_ids = whole
            pad = [(-n) % apart for n in (height, width)]
            padded = F.pad(x, (pad[1], 0, pad[0], 0))
            blurred = blur(padded, apart, settings.sigma * c3)
            dilated = torch.zeros_like(padded)
            for a in range(apart):
                for b in range(apart):
                    predict.view = (a - pad[0], b - pad[1], apart, (height, width))
                    output = predict(scaled(blurred[:, :, a::apart, b::apart], i, later), t)
                    dilated[:, :, a::apart, b::apart] = stepped(output, i, padded[:, :, a::apart, b::apart])
            x = (1 - c2) * local + c2 * dilated[:, :, pad[0] :, pad[1] :]
            tensors[f"phase{s}.step{i + 1}"] = x
        return x

    shape = lambda s: (1, 4, *sizes[s - 1])
    predict.view = None
    if begin is None:
        x = draws.normal(shape(1)) * scheduler.init_noise_sigma
        for i, t in enumerate(timesteps):
            x = stepped(predict(scaled(x, i, i), t), i, x)
            tensors[f"phase1.step{i + 1}"] = x
        tensors["phase1.latent"] = x
    else:
        x = begin(draws, tuple(n * factor for n in reversed(sizes[0])))
    anchor = (x.mean(), x.std())
    for s in range(2 if begin is None else 1, phases + 1):
        base = x if s == 1 else F.interpolate(x, size=sizes[s - 1], mode="bicubic", align_corners=False)
        noise = draws.normal(shape(s))
        x = run_phase(s, noised(base, noise, 0), base, noise)
        x = (x - x.mean()) / x.std() * anchor[1] + anchor[0]
        tensors[f"phase{s}.latent"] = x
    tensors["timesteps"] = timesteps.float()
    tensors["alpha_bar"] = scheduler.alphas_cumprod[None].repeat(phases, 1).float()
    tensors["latent"] = x
    tensors["image"] = reference.decode(model, x)
