"""FouriScale (Huang et al., ECCV 2024, arXiv:2403.12963) in plain torch over diffusers' UNet: dilated convolutions behind a low-pass
filter, the conditional sample twice in a batch, and when each is on. FreeU and the names of convolutions are scalecrafter.py's.

    with asked(unet, Convs(...)): unet(...)     one call of the UNet, whose batch is [..., conditional, conditional]

Filters are whole transforms by torch.fft. The batch is the published one in every step.
"""

import contextlib
import math

import torch
import torch.nn.functional as F

import scalecrafter

LAYERS = {"sd1": "D2,D3,M,U0,U1,U2", "sd2": "D2,D3,M,U0,U1,U2", "sdxl": "D2,M,U0,U1"}
AMPLIFIED = 2.4


class Schedule:
    def __init__(self, model, settings):
        unet, steps = model.unet, settings.steps
        kind, native = scalecrafter.map_of(unet), unet.config.sample_size
        height, width = (side // model.vae_factor for side in settings.size[::-1])
        given = lambda value, own: own if value is None else value
        times = max(math.ceil(height / native), math.ceil(width / native))
        self.d = given(settings.fourier_dilation, times)
        start, stop = (10, 30) if kind != "sdxl" and times <= 3 else (20, 35)
        self.start = given(settings.fourier_start, start * steps // 50)
        self.stop = given(settings.fourier_stop, stop * steps // 50)
        self.value = given(settings.fourier_floor, 0.6 if kind == "sdxl" else 0.0)
        self.twins = 1.5 if kind == "sdxl" else 1.0
        names = given(settings.fourier, LAYERS.get(kind, "")).split(",")
        self.names = {conv for name in names for conv in scalecrafter.named(unet, name)}
        if settings.fourier is None and kind == "sdxl":
            self.names.discard("up_blocks.1.upsamplers.0.conv")
        self.base = native
        self.told = (native * model.vae_factor,) * 2
        self.levels = len(unet.down_blocks)
        text, none = settings.freeu, (1.0,) * 4
        own = scalecrafter.FREEU.get(kind, none)
        self.freeu = own if text is None else none if text == "none" else tuple(map(float, text.split(",")))

    def dilation(self, i):
        if i >= self.stop:
            return 1.0
        if i < self.start:
            return self.d
        return max((self.d - 1) * (self.stop - i) / (self.stop - self.start) + 1, 1)

    def level(self, name):
        """How often the input of this convolution was halved."""
        block, number = name.split(".")[:2]
        number = int(number) if number.isdigit() else 0
        return {"down_blocks": number, "mid_block": self.levels - 1, "up_blocks": self.levels - 1 - number}[block]

    def base_side(self, name):
        side = self.base
        for _ in range(self.level(name)):
            side = math.ceil(side / 2)
        return side


def mask(n, taper, scale, value):
    """[n], for the shifted spectrum."""
    half = n // 2
    m = torch.ones(half, dtype=torch.float64)
    if taper > 0:
        j = torch.arange(half, dtype=torch.float64)
        m = ((1 - value) / taper * (half / scale + 1 - j) + 1).clamp(value, 1)
    return torch.cat([m.flip(0), m])


def filtered(x, d, stride, side, value):
    """The last part of the batch by the weak mask, the others by the strong one; what they hold is padded to whole base sides."""
    height, width = x.shape[2:]
    r = max(math.ceil(height / side), math.ceil(width / side))
    n = side * r + side * r % 2
    scale = max(d / stride, 1)
    spectrum = torch.fft.fftshift(torch.fft.fftn(F.pad(x, (0, n - width, 0, n - height)), dim=(-2, -1)), dim=(-2, -1))
    strong = mask(n, max(n // 8, 1), scale, value)
    weak = mask(n, int((scale - 1) * n // (2 * scale)), scale, value)
    masks = [torch.outer(m, m) for m in (strong, weak)]
    spectrum = torch.cat([spectrum[:-1] * masks[0], spectrum[-1:] * masks[1]])
    y = torch.fft.ifftn(torch.fft.ifftshift(spectrum, dim=(-2, -1)), dim=(-2, -1)).real
    return y[..., :height, :width].to(x.dtype)


def convolved(conv, x, d, twins, side, value):
    """side: None for an upsampler's."""
    if side is not None:
        x = filtered(x, d, conv.stride[0], side, value)

    def dilated(x, d):
        dilation = math.ceil(d)
        return F.conv2d(x, conv.weight, conv.bias, stride=conv.stride, padding=dilation, dilation=dilation)

    return torch.cat([dilated(x[:-1], d), dilated(x[-1:], max(d / twins, 1))])


def shared(attn, x):
    """Self-attention whose last sample has the queries and keys of the one before."""
    heads = lambda y: y.unflatten(2, (attn.heads, -1)).transpose(1, 2)
    q, k, v = (heads(to(x)) for to in (attn.to_q, attn.to_k, attn.to_v))
    q, k = (torch.cat([y[:-1], y[-2:-1]]) for y in (q, k))
    y = F.scaled_dot_product_attention(q, k, v)
    return attn.to_out[0](y.transpose(1, 2).flatten(2))


@contextlib.contextmanager
def asked(unet, schedule, i):
    undo = []
    d = schedule.dilation(i)
    if d > 1:
        for name, conv in scalecrafter.convolutions(unet).items():
            if name in schedule.names:
                side = None if "upsamplers" in name else schedule.base_side(name)
                conv.forward = lambda x, conv=conv, side=side: convolved(conv, x, d, schedule.twins, side, schedule.value)
                undo.append(lambda conv=conv: delattr(conv, "forward"))
    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.forward = lambda x, module=module, **_: shared(module, x)
            undo.append(lambda module=module: delattr(module, "forward"))
    try:
        with scalecrafter.asked(unet, {}, schedule.freeu):
            yield
    finally:
        for back in reversed(undo):
            back()


def run(model, settings, tensors):
    import reference

    draws = reference.Draws(settings.seed, tensors, model.unet.dtype)
    sampler = settings.sampler(model.scheduler_config)
    scheduler = reference.make_scheduler(reference.CLASSES[sampler], model.scheduler_config)
    scheduler.set_timesteps(settings.steps)
    height, width = (side // model.vae_factor for side in settings.size[::-1])
    schedule = Schedule(model, settings)
    predict = reference.Guided(model, settings)
    twice = lambda rows: torch.cat([rows, rows[-1:]])
    predict.embeds = twice(predict.embeds)
    predict.pooled = None if predict.pooled is None else twice(predict.pooled)
    predict.enter(schedule.told)
    x = draws.normal((1, 4, height, width)) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        with asked(model.unet, schedule, i):
            rows = predict.rows(scheduler.scale_model_input(x, t), t)
        output = rows[-1:]
        if predict.guided:
            amplified = AMPLIFIED if settings.amplified_guidance and i < schedule.start else 1.0
            output = rows[:1] + amplified * settings.guidance * (rows[-1:] - rows[:1])
        x = reference.step(scheduler, sampler, output, t, x, draws, settings.eta).prev_sample
        tensors[f"step{i + 1}"] = x
    tensors["timesteps"] = scheduler.timesteps.float()
    tensors["alpha_bar"] = scheduler.alphas_cumprod[None].float()
    tensors["latent"] = x
    tensors["image"] = reference.decode(model, x)
