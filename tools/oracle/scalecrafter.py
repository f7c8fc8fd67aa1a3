"""ScaleCrafter (He et al., ICLR 2024, arXiv:2310.07702) in plain torch over diffusers' UNet: re-dilated and dispersed convolutions,
noise-damped guidance, FreeU (Si et al. 2023, arXiv:2309.11497), and when each is on.

    with asked(unet, {"mid_block.resnets.0.conv1": (2.5, False), ...}, freeu): unet(...)     one call of the UNet

The modules are the UNet's own; convolutions and the up blocks' ResNets get another forward.
"""

import contextlib
import math

import torch
import torch.nn.functional as F

SD_2 = "D1=2,D2=2,D3=2,M=2,U0=2,U1=2,U2=2"
SD_4 = "D1=2,D2=3,D3=4,M=4,U0=4,U1=3,U2=2"
DOWN = "down_blocks.2.downsamplers.0.conv=4"
# (map, sides over the trained ones): factors, their steps of 50, the weaker ones and theirs, progressive
PUBLISHED = {
    ("sd1", (2, 2)): (SD_2, 30, "", 0, False),
    ("sd1", (2.5, 2.5)): (SD_2.replace("=2", "=2.5"), 35, "", 0, False),
    ("sd1", (4, 2)): (SD_4, 35, "D2=3,D3=4,M=4,U0=4,U1=3", 35, True),
    ("sd1", (4, 4)): (SD_4, 35, "D2=3,D3=4,M=4,U0=4,U1=3", 35, True),
    ("sd2", (2, 2)): (SD_2, 20, "", 0, False),
    ("sd2", (2.5, 2.5)): (SD_2.replace("=2", "=2.5"), 30, "", 0, False),
    ("sd2", (4, 2)): (SD_4, 37, "", 0, True),
    ("sd2", (4, 4)): (f"D2=3,{DOWN},D3=4,M=4,U0=4,U1=4,U2=3,U3=2", 37, f"D2=3,{DOWN},D3=4,M=4,U0=4,U1=4,U2=3", 37, True),
    ("sdxl", (2, 2)): ("M=2,U0=2", 30, "", 0, False),
    ("sdxl", (2.5, 2.5)): ("M=2.5,U0=2.5", 30, "", 0, False),
    ("sdxl", (4, 2)): ("D2=3,M=4,U0=4,U1=3,U2=2", 35, "M=2,U0=2", 35, True),
    ("sdxl", (4, 4)): ("D2=4,M=4,U0=4,U1=3,U2=2", 35, "M=2,U0=2", 35, True),
}
FREEU = {"sd1": (1.2, 1.4, 0.9, 0.2), "sd2": (1.1, 1.2, 0.9, 0.2), "sdxl": (1.1, 1.2, 0.6, 0.4)}


def map_of(unet):
    linear = unet.config.use_linear_projection
    return {(4, False): "sd1", (4, True): "sd2"}.get((len(unet.down_blocks), bool(linear))) or (
        "sdxl" if len(unet.down_blocks) == 3 else None)


def convolutions(unet):
    """name -> module of every convolution that may be re-dilated"""
    out = {}
    for name, module in unet.named_modules():
        inner = "resnets." in name and name.endswith(("conv1", "conv2"))
        if inner or name.endswith(("downsamplers.0.conv", "upsamplers.0.conv")):
            out[name] = module
    return out


def named(unet, name):
    group = {"D": f"down_blocks.{name[1:]}.", "U": f"up_blocks.{name[1:]}.", "M": "mid_block."}
    if "." in name:
        return [name]
    return [conv for conv in convolutions(unet) if conv.startswith(group[name[0]])]


def factors(unet, text):
    out = {}
    for entry in filter(None, text.split(",")):
        name, factor = entry.split("=")
        out |= {conv: float(factor) for conv in named(unet, name)}
    there = convolutions(unet)
    return {conv: factor for conv, factor in out.items() if conv in there and factor != 1}


class Schedule:
    def __init__(self, unet, settings, height, width):
        """Of a latent of this size."""
        kind, native, steps = map_of(unet), unet.config.sample_size, settings.steps
        strong, tau, weak, damped_tau, progressive = settings.redilate or "", 50, "", 0, False
        if settings.redilate is None:
            times = sorted((height / native, width / native), reverse=True)
            strong, tau, weak, damped_tau, progressive = PUBLISHED[kind, tuple(times)]
        given = lambda value, own: own if value is None else value
        self.tau = given(settings.redilate_steps, tau * steps // 50)
        damped_tau = damped_tau * steps // 50 if settings.damped is None else self.tau
        self.damped_tau = given(settings.damped_steps, damped_tau) if settings.guidance > 1 else 0
        self.strong, self.weak = factors(unet, strong), factors(unet, given(settings.damped, weak))
        self.progressive = given(settings.progressive, progressive)
        self.dispersed = {c for name in (settings.disperse or "").split(",") if name for c in named(unet, name)}
        self.inflate_tau = given(settings.disperse_steps, max(self.tau, self.damped_tau))
        none = (1.0, 1.0, 1.0, 1.0)
        text = settings.freeu
        self.freeu = FREEU.get(kind, none) if text is None else none if text == "none" else tuple(map(float, text.split(",")))

    def at(self, which, tau, i):
        """name -> (factor, dispersed) at step i"""
        out = {}
        for name, d in (which.items() if i < tau else ()):
            d = max(math.ceil(d * (tau - i) / tau), 2) if self.progressive else d
            dispersed = name in self.dispersed and i < self.inflate_tau
            out[name] = (d / 2 if dispersed else d, dispersed)
        return out


def dispersion():
    """R [25, 9] by least squares: structure, and with weight 0.05 pixels (stacked, on basis maps of 3x3)."""
    basis = torch.eye(9, dtype=torch.float64)
    up = lambda x: F.interpolate(x, size=(5, 5), mode="bilinear", align_corners=True)
    kernels = lambda n: torch.eye(n * n, dtype=torch.float64).reshape(n * n, 1, n, n)
    x = basis.reshape(9, 1, 3, 3)
    small = F.conv2d(x, kernels(3), padding=1)  # [9 maps, 9 taps, 3, 3]
    columns = lambda maps: maps.transpose(0, 1).flatten(1).T  # [equations, taps]
    structure = columns(F.conv2d(up(x), kernels(5), padding=2)), columns(up(small))
    pixel = columns(F.conv2d(x, kernels(5), padding=2)), columns(small)
    left = torch.cat([structure[0], 0.05 * pixel[0]])
    right = torch.cat([structure[1], 0.05 * pixel[1]])
    return torch.linalg.lstsq(left, right).solution


def convolved(conv, x, factor, dispersed):
    """The convolution at another dilation."""
    weight, stride = conv.weight, conv.stride[0]
    if dispersed:
        o, i = weight.shape[:2]
        weight = torch.einsum("ts,ois->oit", dispersion().to(weight), weight.flatten(2)).reshape(o, i, 5, 5)
    dilation, (h, w) = math.ceil(factor), x.shape[2:]
    enlarged = (round(h * (dilation / factor)), round(w * (dilation / factor)))
    bilinear = lambda y, size: F.interpolate(y, size=size, mode="bilinear", align_corners=False)
    padding = dilation * (1 + (weight.shape[2] - 3) // 2)
    y = F.conv2d(bilinear(x, enlarged), weight, conv.bias, stride=stride, padding=padding, dilation=dilation)
    return bilinear(y, (max(h // stride, 1), max(w // stride, 1)))


def filtered(x, s):
    """The four frequencies around the centre times s."""
    h, w = x.shape[2:]
    spectrum = torch.fft.fftshift(torch.fft.fftn(x, dim=(-2, -1)), dim=(-2, -1))
    mask = torch.ones_like(x)
    mask[..., max(h // 2 - 1, 0) : h // 2 + 1, max(w // 2 - 1, 0) : w // 2 + 1] = s
    return torch.fft.ifftn(torch.fft.ifftshift(spectrum * mask, dim=(-2, -1)), dim=(-2, -1)).real


def weighted(x, channels, width, freeu):
    """What the ResNet reads: a backbone of so many channels and the skip connection side by side."""
    b1, b2, s1, s2 = freeu
    b, s = {4 * width: (b1, s1), 2 * width: (b2, s2)}.get(channels, (1.0, 1.0))
    if (b, s) == (1.0, 1.0):
        return x
    backbone, skip = x[:, :channels].clone(), x[:, channels:]
    backbone[:, : channels // 2] *= b
    return torch.cat([backbone, filtered(skip, s)], dim=1)


@contextlib.contextmanager
def asked(unet, redilated, freeu):
    """Calls inside do what is asked. `redilated`: name -> (factor, dispersed)."""
    undo = []
    # Every up block is told the size of the next skip connection, whatever the sample's size.
    unet.num_upsamplers += 12
    there, width = convolutions(unet), unet.config.block_out_channels[0]
    for name, (factor, dispersed) in redilated.items():
        conv = there[name]
        conv.forward = lambda x, conv=conv, factor=factor, dispersed=dispersed: convolved(conv, x, factor, dispersed)
        undo.append(lambda conv=conv: delattr(conv, "forward"))
    channels = list(reversed(unet.config.block_out_channels))
    for i, block in enumerate(unet.up_blocks):
        for k, resnet in enumerate(block.resnets):
            own = channels[max(i - 1, 0)] if k == 0 else channels[i]
            read = lambda _, args, own=own: (weighted(args[0], own, width, freeu), *args[1:])
            undo.append(resnet.register_forward_pre_hook(read).remove)
    try:
        yield
    finally:
        unet.num_upsamplers -= 12
        for back in reversed(undo):
            back()


def run(model, settings, tensors):
    import reference

    draws = reference.Draws(settings.seed, tensors, model.unet.dtype)
    sampler = settings.sampler(model.scheduler_config)
    scheduler = reference.make_scheduler(reference.CLASSES[sampler], model.scheduler_config)
    scheduler.set_timesteps(settings.steps)
    height, width = (side // model.vae_factor for side in settings.size[::-1])
    schedule = Schedule(model.unet, settings, height, width)
    predict = reference.Guided(model, settings)
    predict.enter(settings.size)
    x = draws.normal((1, 4, height, width)) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        with asked(model.unet, schedule.at(schedule.strong, schedule.tau, i), schedule.freeu):
            rows = predict.rows(seen, t)
        if i < schedule.damped_tau:
            with asked(model.unet, schedule.at(schedule.weak, schedule.damped_tau, i), schedule.freeu):
                output = damped(rows, predict.rows(seen, t), settings.guidance)
        else:
            output = predict.guide(rows)
        x = reference.step(scheduler, sampler, output, t, x, draws, settings.eta).prev_sample
        tensors[f"step{i + 1}"] = x
    tensors["timesteps"] = scheduler.timesteps.float()
    tensors["alpha_bar"] = scheduler.alphas_cumprod[None].float()
    tensors["latent"] = x
    tensors["image"] = reference.decode(model, x)


def damped(strong, weak, w):
    """Of [unconditional, conditional] rows each."""
    (d_u, d_c), (v_u, _) = strong.chunk(2), weak.chunk(2)
    return v_u + w * (d_c - d_u)
