"""Upsample guidance (Hwang, Park & Jo 2024, arXiv:2404.01709) in plain torch over plain sampling; batch 1.

In noise, as the paper has it: a network that predicts v is turned to noise, corrected, and turned back. z are the latents at unit
power. SDXL's size ids are the picture's in both calls.
"""

import torch
import torch.nn.functional as F

import reference
from diffusehigh import level


def run(model, settings, tensors):
    reference.plain(model, settings, tensors, predicted=lambda *args: predicted(settings, *args))


def predicted(settings, predict, scheduler, sampler, n, x):
    t, m = scheduler.timesteps[n], settings.up_scale
    table = scheduler.alphas_cumprod.double()
    signal, sigma = level(scheduler, sampler, n)
    power = (signal**2 + sigma**2) ** 0.5
    signal, sigma, z = signal / power, sigma / power, x / power
    v = scheduler.config.prediction_type == "v_prediction"
    to_noise = lambda output, z, a, b: a * output + b * z if v else output
    output = predict.rows(z, t)
    if not t > (1 - settings.up_share) * len(table) or signal**2 < 1e-4:
        return predict.guide(output)
    snr = table / (1 - table)
    tau = (snr.log() - (m**2 * signal**2 / sigma**2).log()).abs().argmin()
    pooled = F.avg_pool2d(z, m)
    low = pooled / (signal**2 + sigma**2 / m**2) ** 0.5
    of_low = predict.rows(low, tau.to(t.dtype))
    of_low = to_noise(of_low, low, table[tau] ** 0.5, (1 - table[tau]) ** 0.5)
    noise = to_noise(output, z, signal, sigma)
    repeated = F.interpolate(of_low / m - F.avg_pool2d(noise, m), scale_factor=m, mode="nearest")
    noise = noise + settings.up_theta * repeated
    return predict.guide((noise - sigma * z) / signal if v else noise)
