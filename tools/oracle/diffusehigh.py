"""DiffuseHigh (Kim et al. 2025, arXiv:2406.18459) in plain torch; batch 1.

Stage 1 is plain sampling. Each further one enlarges the last picture (torch's bicubic), sharpens it, noises its latents to where
the stage's steps of the one schedule begin, and runs these; in the first of them the clean latents go through pixel space, where
their low band (one level of db4 over the picture, symmetric borders) becomes that of the sharpened picture. Pictures are in
[0, 1] here, and clamped where they are decoded. Tensors beside reference.py's: stage<k>.step<n> (k from 2), stage<k>.latent
(from 1), blur [stages - 1]: sigma of the 3x3 Gaussian, from a generator of its own with the run's seed. `relay<k>.upsampled` is
the sharpened picture.

SDXL's size ids are the first stage's in all stages. The wavelet steps are by default a third of a stage's, rounded up.
"""

import torch
import torch.nn.functional as F

import reference
import resize

LOW = [-0.010597401785069032, 0.0328830116668852, 0.030841381835560764, -0.18703481171909309, -0.027983769416859854,
       0.6308807679298589, 0.7148465705529157, 0.2303778133088965]
HIGH = [(-1) ** (n + 1) * LOW[7 - n] for n in range(8)]


def bands(length):
    """Analysis (low, high) of a line, each [floor((length + 7) / 2), length], and the two matrices that undo it."""
    count = (length + 7) // 2
    analysis = [torch.zeros(count, length, dtype=torch.float64) for _ in range(2)]
    synthesis = [torch.zeros(length, count, dtype=torch.float64) for _ in range(2)]
    for band, taps in enumerate((LOW, HIGH)):
        for k in range(count):
            for j, tap in enumerate(taps):
                at = (2 * k + 1 - j) % (2 * length)  # the line, mirrored with its ends repeated
                analysis[band][k, min(at, 2 * length - 1 - at)] += tap
            for i in range(length):
                if 0 <= i + 6 - 2 * k < 8:
                    synthesis[band][i, k] = taps[7 - (i + 6 - 2 * k)]
    again = sum(s @ a for s, a in zip(synthesis, analysis))
    assert (again - torch.eye(length, dtype=torch.float64)).abs().max() < 1e-10
    return analysis, synthesis


def exchange_low_band(x, guide):
    """x with the LL band of guide: forward, exchange, back."""
    rows, columns = (bands(n) for n in x.shape[2:])
    transform = lambda y: [[a.to(y) @ y @ b.to(y).T for b in columns[0]] for a in rows[0]]
    of_x, of_guide = transform(x), transform(guide)
    of_x[0][0] = of_guide[0][0]
    return sum(rows[1][i].to(x) @ of_x[i][j] @ columns[1][j].to(x).T for i in range(2) for j in range(2))


def blurred(x, sigma):
    taps = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) ** 2) / (2 * float(sigma) ** 2))
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    kernel = kernel.to(x)[None, None].repeat(x.shape[1], 1, 1, 1)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=x.shape[1])


def level(scheduler, sampler, i):
    """(signal, sigma) of the latents that step i reads."""
    if sampler.startswith("euler"):
        return torch.tensor(1.0, dtype=torch.float64), scheduler.sigmas[i].double()
    abar = scheduler.alphas_cumprod[scheduler.timesteps[i].long()].double()
    return abar.sqrt(), (1 - abar).sqrt()


def noise_of(output, x, kind, signal, sigma):
    """The noise that the network's output for x = signal x0 + sigma noise stands for."""
    if kind == "epsilon":
        return output
    assert kind == "v_prediction"
    # v is that of latents scaled to signal^2 + sigma^2 = 1.
    scale = (signal**2 + sigma**2) ** 0.5
    return (signal * output + sigma / scale * x) / scale


def output_of(noise, x0, kind, signal, sigma):
    if kind == "epsilon":
        return noise
    scale = (signal**2 + sigma**2) ** 0.5
    return (signal * noise - sigma * x0) / scale


def picture(model, latent):
    return (reference.decode(model, latent) / 2 + 0.5).clamp(0, 1)


def encoded(model, x):
    return model.vae.encode(2 * x - 1).latent_dist.mode() * model.vae.config.scaling_factor


def run(model, settings, tensors, begin=None):
    """`begin`: of the first stage's size in pixels, a picture in [-1, 1] in place of the stage's; SDXL's size ids are then those of
    the trained area in its proportions."""
    draws = reference.Draws(settings.seed, tensors, model.unet.dtype)
    sampler = settings.scheduler or {"EulerDiscreteScheduler": "euler", "DDIMScheduler": "ddim"}.get(
        model.scheduler_config["_class_name"], "euler")
    scheduler = reference.make_scheduler(reference.SAMPLERS[sampler], model.scheduler_config)
    steps, later = settings.stages[0][1], settings.stages[1:]
    predict = reference.Guided(model, settings)
    predict.enter(settings.stages[0][0] if begin is None else reference.trained_size(model, settings.stages[0][0]))
    if settings.sharpen and later:
        own = torch.Generator().manual_seed(settings.seed)
        tensors["blur"] = torch.cat([torch.empty(1).uniform_(0.1, 2.0, generator=own) for _ in later])

    def sampled(x, first, name, held, guide):
        scheduler.set_timesteps(steps)
        kind = scheduler.config.prediction_type
        for n, t in enumerate(scheduler.timesteps[first:]):
            output = predict(scheduler.scale_model_input(x, t), t)
            if n < held:
                signal, sigma = level(scheduler, sampler, first + n)
                x0 = (x - sigma * noise_of(output, x, kind, signal, sigma)) / signal
                x0 = encoded(model, exchange_low_band(picture(model, x0), guide))
                output = output_of((x - signal * x0) / sigma, x0, kind, signal, sigma)
            x = reference.step(scheduler, sampler, output, t, x, draws, settings.eta).prev_sample
            tensors[f"{name}step{n + 1}"] = x
        return x

    (width, height), _ = settings.stages[0]
    scheduler.set_timesteps(steps)
    if begin is None:
        x = draws.normal((1, 4, height // model.vae_factor, width // model.vae_factor)) * scheduler.init_noise_sigma
        x = sampled(x, 0, "", 0, None)
        tensors["stage1.latent"] = x
    predict.w = settings.refine_guidance
    for k, ((width, height), count) in enumerate(later, 1):
        if begin is not None and k == 1:
            before = begin(settings.stages[0][0]) / 2 + 0.5
        else:
            tensors[f"relay{k}.decoded"] = reference.decode(model, x)
            before = picture(model, x)
        guide = resize.upsample(before, (height, width), "bicubic-torch")
        if settings.sharpen:
            guide = 2 * guide - blurred(guide, tensors["blur"][k - 1])
        z = encoded(model, guide)
        first = steps - count
        scheduler.set_timesteps(steps)
        signal, sigma = level(scheduler, sampler, first)
        x = signal * z + sigma * draws.normal(z.shape)
        for name, tensor in [("upsampled", 2 * guide - 1), ("encoded", z), ("noised", x)]:
            tensors[f"relay{k}.{name}"] = tensor
        held = -(-count // 3) if settings.wavelet_steps is None else min(settings.wavelet_steps, count)
        x = sampled(x, first, f"stage{k + 1}.", held, guide)
        tensors[f"stage{k + 1}.latent"] = x
    tensors["timesteps"] = scheduler.timesteps.float()
    tensors["alpha_bar"] = scheduler.alphas_cumprod[None].repeat(len(settings.stages), 1).float()
    tensors["latent"] = x
    tensors["image"] = reference.decode(model, x)
