"""ScaleDiff (2025, arXiv:2510.25818) in plain torch over diffusers' modules, batch 1: neighbourhood patch attention, latent
frequency mixing and structure guidance.

    with neighbourhoods(unet, (h, w)): unet(...)     calls of the UNet whose base run had latents of h x w

A first stage at the trained size runs all steps; each later one restarts at step int(T (1 - restart_ratio)). Tensors beside
reference.py's: relay<k>.x0 are the latents after a stage's last step, relay<k>.mixed is z_M; relay pictures are not clamped.
"""

import contextlib

import torch
import torch.nn.functional as F

import reference


def low(x, share):
    """LP: bilinear to `share` of the sides, with antialias, and back, without."""
    size = x.shape[2:]
    reduced = [max(1, int(share * side)) for side in size]
    y = F.interpolate(x, size=reduced, mode="bilinear", align_corners=False, antialias=True)
    return F.interpolate(y, size=size, mode="bilinear", align_corners=False)


def refine(ref, x, s, share):
    return x + s * (low(ref, share) - low(x, share))


class Neighbourhood:
    """Self-attention of one layer, window by window."""

    def __init__(self, keys, size):
        self.keys, self.size = keys, size

    def __call__(self, attn, hidden_states, *_, **__):
        n, _, c = hidden_states.shape
        h, w = self.size
        kh, kw = self.keys
        heads = lambda x: x.reshape(n, h, w, attn.heads, -1).permute(0, 3, 1, 2, 4)
        q, k, v = (heads(f(hidden_states)) for f in (attn.to_q, attn.to_k, attn.to_v))
        y = torch.full_like(q, torch.nan)
        for top, bottom, key_top, key_bottom in axis(h, kh):
            for left, right, key_left, key_right in axis(w, kw):
                queries = q[:, :, top:bottom, left:right].flatten(2, 3)
                inside = lambda x: x[:, :, key_top:key_bottom, key_left:key_right].flatten(2, 3)
                p = (queries @ inside(k).transpose(2, 3) * attn.scale).softmax(-1)
                y[:, :, top:bottom, left:right] = (p @ inside(v)).unflatten(2, (bottom - top, right - left))
        y = y.permute(0, 2, 3, 1, 4).reshape(n, h * w, c)
        return attn.to_out[0](y)


def axis(side, keys):
    """First query, end of the queries, first key, end of the keys of every window along an axis."""
    window, keys = min(-(-keys // 2), side), min(keys, side)
    out = []
    for start in range(0, side, window):
        first = min(max(start - (keys - window) // 2, 0), side - keys)
        out.append((start, min(start + window, side), first, first + keys))
    return out


def leveled(unet):
    """(how often the map was halved, transformer) of all"""
    last = len(unet.down_blocks) - 1
    blocks = [*enumerate(unet.down_blocks), (last, unet.mid_block)]
    blocks += [(last - i, block) for i, block in enumerate(unet.up_blocks)]
    for level, block in blocks:
        for attention in getattr(block, "attentions", []):
            if attention is not None and hasattr(attention, "transformer_blocks"):
                yield level, attention


@contextlib.contextmanager
def neighbourhoods(unet, base):
    undo = []
    for level, attention in leveled(unet):
        keys = list(base)
        for _ in range(level):
            keys = [-(-side // 2) for side in keys]
        for block in attention.transformer_blocks:
            if block.only_cross_attention:
                continue
            processor = Neighbourhood(tuple(keys), None)
            theirs = block.attn1.processor
            block.attn1.set_processor(processor)
            undo.append(lambda attn=block.attn1, theirs=theirs: attn.set_processor(theirs))
            setting = lambda _, args, processor=processor: setattr(processor, "size", tuple(args[0].shape[2:]))
            undo.append(attention.register_forward_pre_hook(setting).remove)
    try:
        yield
    finally:
        for back in undo:
            back()


def run(model, settings, tensors, begin=None):
    """`begin`: of the first stage's size in pixels, a picture in [-1, 1] in place of the stage's. Its latents are then init0.encoded,
    and neighbourhoods are as large as the trained area in its proportions."""
    draws = reference.Draws(settings.seed, tensors, model.unet.dtype)
    sampler = settings.scheduler or "ddim"
    share = settings.low_pass
    scheduler = reference.make_scheduler(reference.SAMPLERS[sampler], model.scheduler_config)
    total = settings.stages[0][1]
    scheduler.set_timesteps(total)
    timesteps = scheduler.timesteps
    cells = lambda size: (size[1] // model.vae_factor, size[0] // model.vae_factor)
    predict = reference.Guided(model, settings)

    def level(i):
        """signal and sigma where step i begins"""
        if sampler == "euler":
            return 1.0, scheduler.sigmas[i].to(model.unet.dtype)
        abar = scheduler.alphas_cumprod[timesteps[i].long()].to(model.unet.dtype)
        return abar.sqrt(), (1 - abar).sqrt()

    def noise_share(i):
        signal, sigma = level(i)
        return sigma**2 / (signal**2 + sigma**2)

    done = 0

    def run_stage(size, x, first, guided=None):
        nonlocal done
        predict.enter(size)
        scheduler._step_index = None
        for i in range(first, total):
            t = timesteps[i]
            output = predict(scheduler.scale_model_input(x, t), t)
            if guided is not None:
                # What a network that predicted the other clean sample would have said.
                signal, sigma = level(i)
                kind = scheduler.config.prediction_type
                if kind == "v_prediction" and sampler == "ddim":
                    x0 = signal * x - sigma * output
                elif kind == "v_prediction":
                    x0 = x / (1 + sigma**2) - output * sigma / (1 + sigma**2) ** 0.5
                else:
                    x0 = (x - sigma * output) / signal
                x0 = refine(guided, x0, noise_share(i) / noise_share(first), share)
                if kind == "v_prediction" and sampler == "ddim":
                    output = (signal * x - x0) / sigma
                elif kind == "v_prediction":
                    output = (x / (1 + sigma**2) - x0) * (1 + sigma**2) ** 0.5 / sigma
                else:
                    output = (x - signal * x0) / sigma
            x = reference.step(scheduler, sampler, output, t, x, draws, settings.eta).prev_sample
            done += 1
            tensors[f"step{done}"] = x
        return x

    (size, _), *later = settings.stages
    if begin is None:
        base = cells(size)
        x = run_stage(size, draws.normal((1, 4, *base)) * scheduler.init_noise_sigma, 0)
    else:
        base = cells(reference.trained_size(model, size))
        picture = begin(size)
        tensors["init0.encoded"] = x = model.vae.encode(picture).latent_dist.mean * model.vae.config.scaling_factor
    for k, (size, steps) in enumerate(later, 1):
        first = total - steps
        if settings.restart_ratio is not None:
            assert first == int(total * (1 - settings.restart_ratio))
        enlarge = lambda y, sides: F.interpolate(y, size=sides, mode="bicubic", align_corners=False)
        given = begin is not None and k == 1
        decoded = picture if given else reference.decode(model, x)
        up = enlarge(decoded, (size[1], size[0]))
        encoded = model.vae.encode(up).latent_dist.mean * model.vae.config.scaling_factor
        mixed = refine(enlarge(x, cells(size)), encoded, 1, share)
        signal, sigma = level(first)
        noised = signal * mixed + sigma * draws.normal(mixed.shape)
        named = {"x0": x, "decoded": decoded, "upsampled": up, "encoded": encoded, "mixed": mixed, "noised": noised}
        tensors |= {f"relay{k}.{name}": tensor for name, tensor in named.items() if not given or name not in ("x0", "decoded")}
        with neighbourhoods(model.unet, base):
            x = run_stage(size, noised, first, mixed)
    tensors["timesteps"] = timesteps.float()
    tensors["alpha_bar"] = scheduler.alphas_cumprod[None].repeat(len(settings.stages), 1).float()
    tensors["latent"] = x
    tensors["image"] = reference.decode(model, x)
