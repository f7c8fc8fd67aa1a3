"""HiDiffusion (Zhang et al., ECCV 2024, arXiv:2311.17528) in plain torch over diffusers' UNet: the wide downsampler, the pooled
block, windowed self-attention, and when each is on.

    with asked(unet, wide, pooled, shifts): unet(...)     one call of the UNet

A level is a down block's number; the up block of level i of n is number n - 1 - i. The modules are the UNet's own, so weights and
everything else stay what diffusers makes of them. Sizes are those of the feature maps themselves.
"""

import contextlib
import math

import torch
import torch.nn.functional as F

WINDOWS = "shifts"


def levels(unet):
    """(level of the wide downsampler, of the pooled block, of the windows, whether t1 is the wide downsampler's)"""
    attention = [hasattr(block, "attentions") for block in unet.down_blocks]
    if attention == [True, True, True, False]:
        return 0, 1, 0, True
    assert attention == [False, True, True], attention
    return 1, 1, 1, False


def schedule(unet, settings, height, width, distilled=False):
    """(steps of the wide downsampler, steps of the pooled block), of a latent of this size."""
    if not settings.raunet:
        return range(0), range(0)
    wide_first = levels(unet)[3]
    native = unet.config.sample_size or (64 if wide_first else 128)
    extreme = height >= 4 * native and width >= 4 * native
    turbo = distilled and not wide_first
    t1, t2 = (0.5, 0.0) if turbo else (0.7, 0.3) if extreme else (0.4, 0.0)
    aggressive = not wide_first and not extreme and not turbo
    t1 = t1 if settings.t1 is None else settings.t1
    t2 = t2 if settings.t2 is None else settings.t2
    aggressive = aggressive if settings.aggressive is None else settings.aggressive
    wide, pooled = (t1, t2) if wide_first else (t2, t1)
    steps = settings.steps
    if aggressive:
        first = int(8 / 50 * steps)
        return range(first), range(first, int(steps * pooled))
    return range(int(steps * wide)), range(int(steps * pooled))


def transformers(unet):
    """The transformers of the windowed level, in the order of execution."""
    level = levels(unet)[2]
    blocks = [unet.down_blocks[level], unet.up_blocks[len(unet.up_blocks) - 1 - level]]
    return [attention for block in blocks for attention in block.attentions]


def draw(unet, seed, steps):
    """[steps, blocks] of 0 to 3: one uniform number of torch's CPU generator each."""
    generator = torch.Generator().manual_seed(seed)
    blocks = sum(len(attention.transformer_blocks) for attention in transformers(unet))

    def one():
        u = torch.rand(1, generator=generator).item()
        return 0 if u <= 0.25 else 1 if u <= 0.5 else 2 if u <= 0.75 else 3

    return torch.tensor([[one() for _ in range(blocks)] for _ in range(steps)])


def windowed(attend, x, height, width, k):
    """`attend` of the tokens x [B, H W, C] in four windows, shifted by k quarters of one."""
    batch, _, channels = x.shape
    wh, ww = math.ceil(height / 2), math.ceil(width / 2)
    shift = (k * (wh // 4), k * (ww // 4))
    odd = (2 * wh, 2 * ww) != (height, width)
    bicubic = lambda y, size: F.interpolate(y, size=size, mode="bicubic", align_corners=False)
    y = x.reshape(batch, height, width, channels)
    if odd:
        y = bicubic(y.permute(0, 3, 1, 2), (2 * wh, 2 * ww)).permute(0, 2, 3, 1)
    if shift[0] > 0:  # the rows decide, as published
        y = torch.roll(y, (-shift[0], -shift[1]), dims=(1, 2))
    y = y.reshape(batch, 2, wh, 2, ww, channels).permute(0, 1, 3, 2, 4, 5).reshape(batch * 4, wh * ww, channels)
    y = attend(y)
    y = y.reshape(batch, 2, 2, wh, ww, channels).permute(0, 1, 3, 2, 4, 5).reshape(batch, 2 * wh, 2 * ww, channels)
    if shift[0] > 0:
        y = torch.roll(y, shift, dims=(1, 2))
    if odd:
        y = bicubic(y.permute(0, 3, 1, 2), (height, width)).permute(0, 2, 3, 1)
    return y.reshape(batch, height * width, channels)


def pooled_down(block):
    def forward(hidden_states, temb=None, encoder_hidden_states=None, **_):
        x, outputs = hidden_states, ()
        for i, (resnet, attention) in enumerate(zip(block.resnets, block.attentions)):
            x = attention(resnet(x, temb), encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]
            if i == 0:
                x = F.avg_pool2d(x, kernel_size=2, stride=2, ceil_mode=True)
            outputs += (x,)
        for downsampler in block.downsamplers or ():
            x = downsampler(x)
            outputs += (x,)
        return x, outputs

    return forward


def pooled_up(block):
    def forward(hidden_states, res_hidden_states_tuple, temb=None, encoder_hidden_states=None, upsample_size=None, **_):
        x, skips = hidden_states, list(res_hidden_states_tuple)
        for i, (resnet, attention) in enumerate(zip(block.resnets, block.attentions)):
            skip = skips.pop()
            if i == len(block.resnets) - 1:
                x = F.interpolate(x, size=skip.shape[2:], mode="bicubic", align_corners=False)
            x = resnet(torch.cat([x, skip], dim=1), temb)
            x = attention(x, encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]
        for upsampler in block.upsamplers or ():
            x = upsampler(x, upsample_size)
        return x

    return forward


@contextlib.contextmanager
def asked(unet, wide, pooled, shifts):
    """Calls inside do what is asked. `shifts`: k of every windowed self-attention; None: without windows."""
    undo = []

    def replace(owner, name, value):
        # A method is an attribute of its class: there is nothing to put back, only to take away.
        own = vars(owner).get(name)
        undo.append((lambda: setattr(owner, name, own)) if own is not None else (lambda: delattr(owner, name)))
        setattr(owner, name, value)

    wide_level, pooled_level, *_ = levels(unet)
    if wide:
        conv = unet.down_blocks[wide_level].downsamplers[0].conv
        for name, value in {"stride": (4, 4), "padding": (2, 2), "dilation": (2, 2)}.items():
            replace(conv, name, value)
    # Every up block is told the size of the next skip connection, whatever the sample's size.
    replace(unet, "num_upsamplers", unet.num_upsamplers + 12)
    if pooled:
        down, up = unet.down_blocks[pooled_level], unet.up_blocks[len(unet.up_blocks) - 1 - pooled_level]
        replace(down, "forward", pooled_down(down))
        replace(up, "forward", pooled_up(up))
    if shifts is not None:
        numbers = iter(shifts)
        for attention in transformers(unet):
            size = []
            hook = attention.register_forward_pre_hook(lambda _, args, size=size: size.__setitem__(slice(None), args[0].shape[2:]))
            undo.append(hook.remove)
            for block in attention.transformer_blocks:
                inner = block.attn1.forward
                attend = lambda x, inner=inner, **_: inner(x)
                forward = lambda x, attend=attend, size=size, k=int(next(numbers)), **_: windowed(attend, x, *size, k)
                replace(block.attn1, "forward", forward)
    try:
        yield
    finally:
        for back in reversed(undo):
            back()
