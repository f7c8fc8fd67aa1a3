"""MultiDiffusion (Bar-Tal et al. 2023, arXiv:2302.08113) in plain torch, one window at a time; batch 1.

Windows begin every `stride` cells, and a last one where the map ends; around the map with `circular`. Every window takes the
sampler's step on its own; a cell becomes the mean over the windows that hold it. SDXL is told the whole picture's size, no crop.
"""

import torch

import reference


def starts(n, window, stride):
    """Along an axis of n cells: 0, stride, ... and n - window; one window where it spans the axis."""
    if n <= window:
        return [0]
    return list(range(0, n - window, stride)) + [n - window]


def views(height, width, window, stride, circular):
    """Row and column indices of each window of a map, row-major."""
    rows = [torch.arange(top, top + min(window, height)) for top in starts(height, window, stride)]
    if circular and width > window:
        columns = [(torch.arange(window) + k * stride) % width for k in range(max(width // stride, 1))]
    else:
        columns = [torch.arange(left, left + min(window, width)) for left in starts(width, window, stride)]
    return [(r, c) for r in rows for c in columns]


def at(scheduler, i):
    """Whatever was asked of it before, step i is next: several views take the same step."""
    if hasattr(scheduler, "_step_index"):
        scheduler._step_index = i


def sizes(model, settings):
    cells = model.unet.config.sample_size
    window = settings.window or cells
    return window, settings.stride or max(window // 8, 1)


def run(model, settings, tensors, begin=None):
    """`begin`: of the scheduler and the draws, (the first samples, the first step)."""
    draws = reference.Draws(settings.seed, tensors, model.unet.dtype)
    scheduler = reference.make_scheduler(reference.SAMPLERS[settings.scheduler or "ddim"], model.scheduler_config)
    scheduler.set_timesteps(settings.steps)
    width, height = (n // model.vae_factor for n in settings.size)
    window, stride = sizes(model, settings)
    places = views(height, width, window, stride, settings.circular)
    predict = reference.Guided(model, settings)
    predict.enter(settings.size)
    if begin is None:
        x, first = draws.normal((1, 4, height, width)) * scheduler.init_noise_sigma, 0
    else:
        scheduler.is_scale_input_called = True
        x, first = begin(scheduler, draws)
    for i, t in list(enumerate(scheduler.timesteps))[first:]:
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        for rows, columns in places:
            crop = x[:, :, rows][:, :, :, columns]
            at(scheduler, i)
            predict.view = (int(rows[0]), int(columns[0]), 1, (height, width))
            output = predict(scheduler.scale_model_input(crop, t), t)
            at(scheduler, i)
            stepped = scheduler.step(output, t, crop).prev_sample
            for r, row in enumerate(rows):
                total[:, :, row, columns] += stepped[:, :, r]
                count[:, :, row, columns] += 1
        assert count.min() > 0
        x = total / count
        tensors[f"step{i + 1 - first}"] = x
    tensors["timesteps"] = scheduler.timesteps.float()
    tensors["alpha_bar"] = scheduler.alphas_cumprod[None].float()
    tensors["latent"] = x
    if not settings.circular:
        tensors["image"] = reference.decode(model, x)
        return
    around = torch.cat([x[..., -8:], x, x[..., :8]], dim=3)
    seam = 8 * model.vae_factor
    tensors["image"] = reference.decode(model, around)[..., seam:-seam]


def check_against_pipeline(model, settings, tensors, limit):
    """diffusers' panorama pipeline with these windows makes the same latents."""
    from diffusers import StableDiffusionPanoramaPipeline

    scheduler = reference.make_scheduler(reference.SAMPLERS[settings.scheduler or "ddim"], model.scheduler_config)
    pipe = StableDiffusionPanoramaPipeline(
        vae=model.vae, text_encoder=model.text, tokenizer=model.tokenizer, unet=model.unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    width, height = (n // model.vae_factor for n in settings.size)
    window, stride = sizes(model, settings)
    boxes = [(int(r[0]), int(r[-1]) + 1, int(c[0]), int(c[-1]) + 1)
             for r, c in views(height, width, window, stride, False)]
    pipe.get_views = lambda *_, **__: boxes
    out = pipe(settings.prompt, height=settings.size[1], width=settings.size[0], num_inference_steps=settings.steps,
               guidance_scale=settings.guidance, negative_prompt=settings.negative, latents=tensors["noise0"].clone(),
               output_type="latent")
    error = (out.images - tensors["latent"]).abs().max().item() / tensors["latent"].abs().max().item()
    assert error < limit, error
