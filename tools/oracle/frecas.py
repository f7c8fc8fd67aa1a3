"""FreCaS (Zhang et al., ICLR 2025, arXiv:2410.18410) in plain torch over diffusers' modules, batch 1.

    with maps(unet, state): unet(...)      the UNet's attn2 layers collect their maps in `state`, and reuse those it has

Timesteps of a stage, the noise between stages, guidance by two scales and the maps are written from the equations; the step is
DDIM's. Every tensor is named as in reference.py.
"""

import contextlib

import torch
import torch.nn.functional as F

import reference
from scalediff import leveled


class State:
    """What cross-attention collects and reuses; all maps [rows, h, w, text tokens]."""

    def __init__(self, flat):
        self.flat, self.collect, self.weight = flat, False, 0.0
        self.found, self.reused = [], None

    def resize(self, maps, size):
        rows, h, w, keys = maps.shape
        if self.flat:  # as if all tokens were rows of one matrix
            y = F.interpolate(maps.reshape(rows, 1, h * w, keys), size=(size[0] * size[1], keys), mode="bilinear", align_corners=False)
            return y.reshape(rows, *size, keys)
        y = F.interpolate(maps.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False)
        return y.permute(0, 2, 3, 1)

    def mean(self):
        """Over the layers of each size, then over the sizes."""
        groups = {}
        for size, maps in self.found:
            groups.setdefault(size, []).append(maps)
        largest = max(groups, key=lambda size: size[0] * size[1])
        means = [torch.stack(group).mean(0).unflatten(1, size) for size, group in groups.items()]
        return torch.stack([self.resize(mean, largest) for mean in means]).mean(0)


class CrossAttention:
    def __init__(self, state):
        self.state, self.size = state, None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *_, **__):
        state = self.state
        heads = lambda x: x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
        q = heads(attn.to_q(hidden_states))
        k, v = (heads(f(encoder_hidden_states)) for f in (attn.to_k, attn.to_v))
        p = (q @ k.transpose(2, 3) * attn.scale).softmax(-1)
        y = p @ v
        if state.collect:
            state.found.append((self.size, p.mean(1)))
        if state.weight:
            shares = state.resize(state.reused, self.size).flatten(1, 2)
            y = (1 - state.weight) * y + state.weight * (shares[:, None] @ v)
        return attn.to_out[0](y.transpose(1, 2).flatten(2))


@contextlib.contextmanager
def maps(unet, state):
    undo = []
    for _, attention in leveled(unet):
        for block in attention.transformer_blocks:
            processor, theirs = CrossAttention(state), block.attn2.processor
            block.attn2.set_processor(processor)
            undo.append(lambda attn=block.attn2, theirs=theirs: attn.set_processor(theirs))
            setting = lambda _, args, processor=processor: setattr(processor, "size", tuple(args[0].shape[2:]))
            undo.append(attention.register_forward_pre_hook(setting).remove)
    try:
        yield
    finally:
        for back in undo:
            back()


def enlarge(picture, size, upsampler):
    options = {} if upsampler == "nearest" else {"align_corners": False}
    return F.interpolate(picture, size=size, mode=upsampler, **options)


def run(model, settings, tensors, begin=None):
    """`begin`: of the first stage's size in pixels, a picture in [-1, 1] in place of the stage's; SDXL's size ids are then those of
    the trained area in its proportions, and the second stage has no maps."""
    compat, stages = settings.reference_compat, settings.stages
    draws = reference.Draws(settings.seed, tensors, model.unet.dtype)
    scheduler = reference.make_scheduler("DDIMScheduler", model.scheduler_config)
    abar = scheduler.alphas_cumprod.double()
    cells = lambda size: (size[1] // model.vae_factor, size[0] // model.vae_factor)
    # For models trained below 128 pixels, as these are.
    assert model.unet.config.sample_size * model.vae_factor < 128
    one = len(stages) == 2
    ends = [int(t) for t in settings.frecas_ends.split(",")] if settings.frecas_ends else [100 if one else 200] * (len(stages) - 1)
    gamma = 3.0 if settings.frecas_gamma is None else settings.frecas_gamma
    weight = (0.6 if one else 0.4) if settings.map_reuse is None else settings.map_reuse

    timesteps, start = [], 999
    for s, ((w, h), n) in enumerate(stages):
        end = [*ends, 0][s]
        if s > 0:
            (w0, h0), _ = stages[s - 1]
            snr = max(h / h0, w / w0) ** -gamma
            a = abar[ends[s - 1]]
            target = snr * a / (1 + (snr - 1) * a)
            start = next(t for t in range(1000) if abar[t] <= target)
        timesteps.append([int(start + k * (end - start) / max(n - 1, 1)) for k in range(n)])

    predict = reference.Guided(model, settings)
    high = 6.0 if settings.guidance_high is None else settings.guidance_high
    kind = scheduler.config.prediction_type
    state = State(compat)
    z, done = None if begin else draws.normal((1, 4, *cells(stages[0][0]))), 0
    predict.enter(reference.trained_size(model, stages[0][0]) if begin else stages[0][0])
    collected = None
    for s, (size, n) in enumerate(stages):
        last_stage = s + 1 == len(stages)
        predict.split = None if s == 0 else (cells(stages[s - 1][0]), high)
        given = begin is not None and s == 0
        state.weight = weight if collected is not None else 0.0
        span = timesteps[s][0] - timesteps[s][-1]
        for k, t in enumerate([] if given else timesteps[s]):
            state.collect = weight > 0 and k + 1 == n and not last_stage
            state.found = []
            with maps(model.unet, state):
                output = predict(z, torch.tensor(t))
            if state.collect:
                collected = state.mean()
            a = abar[t]
            if kind == "v_prediction":
                x0, eps = a.sqrt() * z - (1 - a).sqrt() * output, a.sqrt() * output + (1 - a).sqrt() * z
            else:
                x0, eps = (z - (1 - a).sqrt() * output) / a.sqrt(), output
            to = timesteps[s][min(k + 1, n - 1)]
            if compat:
                to = max(0, t - 1000 // int(1000 * (n - 1) / span))
            z = (abar[to].sqrt() * x0 + (1 - abar[to]).sqrt() * eps).to(x0.dtype)
            x0 = x0.to(z.dtype)
            done += 1
            tensors[f"step{done}"] = z
        if last_stage:
            break
        state.reused = collected if weight > 0 else None
        (w, h), _ = stages[s + 1]
        decoded = begin(size) if given else reference.decode(model, x0)
        up = enlarge(decoded.clamp(-1, 1), (h, w), settings.frecas_upsampler)
        posterior = model.vae.encode(up).latent_dist
        y = posterior.mean
        if compat:
            y = y + posterior.std * draws.normal(y.shape)
        y = y * model.vae.config.scaling_factor
        a = abar[timesteps[s + 1][0]].to(y.dtype)
        z = a.sqrt() * y + (1 - a).sqrt() * draws.normal(y.shape)
        named = {"upsampled": up, "encoded": y, "noised": z} | ({} if given else {"x0": x0, "decoded": decoded})
        tensors |= {f"relay{s + 1}.{name}": tensor for name, tensor in named.items()}
    tensors["timesteps"] = torch.tensor([t for of_stage in timesteps for t in of_stage], dtype=torch.float32)
    tensors["alpha_bar"] = scheduler.alphas_cumprod[None].repeat(len(stages), 1).float()
    tensors["latent"] = z if compat else x0
    tensors["image"] = reference.decode(model, tensors["latent"])
