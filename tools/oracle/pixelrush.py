"""PixelRush (2026, arXiv:2602.12769) in plain torch over diffusers' modules, one patch at a time; batch 1.

A run at the first stage's size, then one refinement per further stage: the picture is enlarged and encoded; patches of the
model's own size go back to a level by one inversion step and come forward by one step; they are merged by Gaussian weights.
There is no published code: src/methods/pixelrush.rs says what is decided.
"""

import torch

import multidiffusion
import reference
import resize


def readout(scheduler, timestep, x, output):
    """(clean sample, noise) that the network's output at a timestep says of x."""
    abar = scheduler.alphas_cumprod[timestep].to(x.dtype)
    signal, sigma = abar.sqrt(), (1 - abar).sqrt()
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (x - sigma * output) / signal, output
    assert kind == "v_prediction"
    return signal * x - sigma * output, signal * output + sigma * x


def feather(n, dtype):
    i = torch.arange(n, dtype=torch.float64)
    return torch.exp(-((i - (n - 1) / 2) ** 2) / (2 * (0.3 * n) ** 2)).to(dtype)


def run(model, settings, tensors, begin=None):
    """`begin`: of the first stage's size in pixels, a picture in [-1, 1] in place of the stage's."""
    draws = reference.Draws(settings.seed, tensors, model.unet.dtype)
    sampler = settings.sampler(model.scheduler_config)
    scheduler = reference.make_scheduler(reference.CLASSES[sampler], model.scheduler_config)
    (first, steps), *rest = settings.stages
    scheduler.set_timesteps(steps)
    cells = lambda size: (1, 4, size[1] // model.vae_factor, size[0] // model.vae_factor)
    dtype = model.unet.dtype
    if begin is None:
        predict = reference.Guided(model, settings)
        predict.enter(first)
        x = draws.normal(cells(first)) * scheduler.init_noise_sigma
        for n, t in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(x, t)
            x = reference.step(scheduler, sampler, predict(scaled, t), t, x, draws, settings.eta).prev_sample
            tensors[f"step{n + 1}"] = x
    else:
        steps = 0

    # Refinements are told the model's own size, and have no guidance.
    plain = type(settings)(**vars(settings) | {"guidance": 1.0})
    refine = reference.Guided(model, plain)
    sample = model.unet.config.sample_size
    refine.enter((sample * model.vae_factor,) * 2)
    stride = settings.stride or max(sample * 3 // 4, 1)
    level = settings.refine_timestep
    abar = scheduler.alphas_cumprod[level].to(dtype)
    for k, (size, _) in enumerate(rest, start=1):
        given = begin is not None and k == 1
        decoded = begin(first) if given else reference.decode(model, x)
        upsampled = resize.upsample(decoded.clamp(-1, 1), (size[1], size[0]), settings.upsampler).clamp(-1, 1)
        y = model.vae.encode(upsampled).latent_dist.mean * model.vae.config.scaling_factor
        for name, tensor in [("upsampled", upsampled), ("encoded", y)] + ([] if given else [("x0", x), ("decoded", decoded)]):
            tensors[f"relay{k}.{name}"] = tensor
        q = settings.inject_noise
        noise = draws.normal(y.shape) if q > 0 else None
        total, weights = torch.zeros_like(y), torch.zeros_like(y)
        for rows, columns in multidiffusion.views(y.shape[2], y.shape[3], sample, stride, False):
            cut = lambda map: map[:, :, rows][:, :, :, columns]
            _, e = readout(scheduler, level, cut(y), refine(cut(y), level))
            if q > 0:
                e = (1 - q**2) ** 0.5 * e + q * cut(noise)
            z = abar.sqrt() * cut(y) + (1 - abar).sqrt() * e
            x0, _ = readout(scheduler, level, z, refine(z, level))
            weight = feather(len(rows), y.dtype)[:, None] * feather(len(columns), y.dtype)[None]
            for i, row in enumerate(rows):
                total[:, :, row, columns] += weight[i] * x0[:, :, i]
                weights[:, :, row, columns] += weight[i]
        x = total / weights
        tensors[f"step{steps + k}"] = x
    tensors["timesteps"] = scheduler.timesteps.float()
    tensors["alpha_bar"] = scheduler.alphas_cumprod[None].repeat(len(settings.stages), 1).float()
    tensors["latent"] = x
    tensors["image"] = reference.decode(model, x)
