"""MegaFusion's relays whose stages have parts of other methods, in plain torch; batch 1.

Stages are ((width, height), steps, parts), parts "raunet+windows" and the like. A stage without parts is reference.py's. Tensors
beside reference.py's: shifts<k> [steps of stage k, windowed self-attentions], jitter<k> [steps, windows, 2]; k from 1.

- raunet, windows (hidiffusion: both): hidiffusion.py, whose schedule has the stage's steps and size; shifts go on from stage to
  stage in one generator.
- dilation: the middle block's, in the stages that have it alone.
- crops: multidiffusion.py's windows; samples and clean samples are both the means over the windows.
- demofusion: demofusion.py's jittered windows and dilated samples without its skip residual. The scale is the stage's longer side
  over a window's, rounded; the factors take a timestep that falls from 1000 to 0 over the stage.
"""

import copy
import random

import torch
import torch.nn.functional as F

import contextlib
import demofusion
import hidiffusion
import multidiffusion
import reference
from module_values import set_mid_dilation


def parts_of(stage):
    parts = set(stage[2].split("+")) if len(stage) > 2 else set()
    return (parts | {"raunet", "windows"} if "hidiffusion" in parts else parts) - {"hidiffusion"}


def run(model, settings, tensors):
    plus = settings.method == "megafusion++"
    dilation = (2 if plus else 1) if settings.dilation is None else settings.dilation
    sampler = settings.sampler(model.scheduler_config)
    draws = reference.Draws(settings.seed, tensors, model.unet.dtype)
    offsets = random.Random(settings.seed)
    stages = [((w, h), steps, parts_of(stage)) for stage in settings.stages for (w, h), steps in [stage[:2]]]
    total = sum(steps for _, steps, _ in stages)
    dilated = [("dilation" in parts) if any("dilation" in p for *_, p in stages) else plus and s > 0
               for s, (*_, parts) in enumerate(stages)]
    first = stages[0][0][0] * stages[0][0][1]
    schedulers = []
    for (w, h), _, _ in stages:
        scheduler = reference.make_scheduler(reference.SAMPLERS[sampler], model.scheduler_config,
                                             w * h / first if plus else 1.0)
        scheduler.set_timesteps(total)
        scheduler.is_scale_input_called = True
        schedulers.append(scheduler)
    timesteps = schedulers[0].timesteps
    tensors["timesteps"] = timesteps.float()
    tensors["alpha_bar"] = torch.stack([s.alphas_cumprod for s in schedulers])

    windowed = sum(steps for _, steps, parts in stages if "windows" in parts and settings.windows)
    shifts = iter(hidiffusion.draw(model.unet, settings.seed, windowed)) if windowed else None
    predict = reference.Guided(model, settings)
    factor, done, x, x0 = model.vae_factor, 0, None, None
    for s, (size, steps, parts) in enumerate(stages):
        scheduler = schedulers[s]
        height, width = size[1] // factor, size[0] // factor
        if s == 0:
            x = draws.normal((1, 4, height, width)) * scheduler.init_noise_sigma
        else:
            x = reference.relay(model, with_stages(settings, stages), tensors, draws, s, x0, scheduler, sampler, done)
        predict.enter(size)
        set_mid_dilation(model.unet, dilation if dilated[s] else 1)
        own = copy.copy(settings)
        own.steps, own.raunet = steps, settings.raunet and "raunet" in parts
        wide, pooled = hidiffusion.schedule(model.unet, own, height, width) if "raunet" in parts else (range(0), range(0))
        k = None
        if "windows" in parts and settings.windows:
            k = torch.stack([next(shifts) for _ in range(steps)])
            tensors[f"shifts{s + 1}"] = k
        views = None
        if "crops" in parts:
            views = Crops(model, settings, height, width)
        if "demofusion" in parts:
            views = Dilated(model, settings, height, width, (done, done + steps, total), offsets)
            tensors[f"jitter{s + 1}"] = views.jitter
        for i in range(steps):
            t = timesteps[done]

            def step(output, y):
                multidiffusion.at(scheduler, done)
                stepped = scheduler.step(output, t, y)
                return stepped.prev_sample, stepped.pred_original_sample

            def denoise(y):
                multidiffusion.at(scheduler, done)
                return predict(scheduler.scale_model_input(y, t), t)

            if views is not None:
                x, x0 = views.step(i, float(t), x, predict, denoise, step)
            else:
                with contextlib.ExitStack() as stack:
                    if wide or pooled or k is not None:
                        asked = (i in wide, i in pooled, None if k is None else k[i])
                        stack.enter_context(hidiffusion.asked(model.unet, *asked))
                    x, x0 = step(denoise(x), x)
            done += 1
            tensors[f"step{done}"] = x
    set_mid_dilation(model.unet, 1)
    tensors["latent"] = x0
    tensors["image"] = reference.decode(model, x0)


def with_stages(settings, stages):
    """reference.relay() reads the sizes of stages of two."""
    plain = copy.copy(settings)
    plain.stages = [stage[:2] for stage in stages]
    return plain


class Crops:
    def __init__(self, model, settings, height, width):
        self.places = multidiffusion.views(height, width, *multidiffusion.sizes(model, settings), False)

    def step(self, i, t, x, predict, denoise, step):
        sums, count = [torch.zeros_like(x), torch.zeros_like(x)], torch.zeros_like(x)
        for rows, columns in self.places:
            crop = x[:, :, rows][:, :, :, columns]
            part = (..., slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1))
            for to, stepped in zip(sums, step(denoise(crop), crop)):
                to[part] += stepped
            count[part] += 1
        assert count.min() > 0
        return [of / count for of in sums]


class Dilated:
    def __init__(self, model, settings, height, width, steps, offsets):
        self.window, self.factor, self.settings = model.unet.config.sample_size, model.vae_factor, settings
        stride = settings.stride or max(self.window // 2, 1)
        self.reach = (self.window - stride) // 4
        self.map, self.steps = (height, width), steps
        self.scale = max(1, int(max(height, width) / self.window + 0.5))
        self.rows, self.columns = (demofusion.windows(n, self.window, stride, self.reach) for n in (height, width))
        count = len(self.rows) * len(self.columns)
        self.jitter = torch.zeros(steps[1] - steps[0], count, 2, dtype=torch.int64)
        for step in range(len(self.jitter)):
            for v in range(count):
                row, column = self.rows[v // len(self.columns)], self.columns[v % len(self.columns)]
                for axis, (_, allowed) in enumerate((column, row)):
                    if allowed:
                        self.jitter[step, v, axis] = offsets.randint(*allowed)

    def step(self, i, t, x, predict, denoise, step):
        begin, end, total = self.steps
        of_stage = 1000 - (1000 - t - 1000 * begin / total) * total / (end - begin)
        _, c2, c3 = demofusion.factors(min(max(of_stage, 0.0), 1000.0), self.settings.cosine)
        (height, width), reach, s = self.map, self.reach, self.scale
        size = (min(self.window, height), min(self.window, width))
        whole = getattr(predict, "time_ids", None)
        padded = F.pad(x, (reach,) * 4)
        sums, count = [torch.zeros_like(padded), torch.zeros_like(padded)], torch.zeros_like(padded)
        for v in range(self.jitter.shape[1]):
            top = self.rows[v // len(self.columns)][0] + int(self.jitter[i, v, 1]) + reach
            left = self.columns[v % len(self.columns)][0] + int(self.jitter[i, v, 0]) + reach
            part = (..., slice(top, top + size[0]), slice(left, left + size[1]))
            if whole is not None:
                predict.time_ids = whole.clone()
                predict.time_ids[:, 2], predict.time_ids[:, 3] = top * self.factor, left * self.factor
            for to, stepped in zip(sums, step(denoise(padded[part]), padded[part])):
                to[part] += stepped
            count[part] += 1
        inner = (..., slice(reach, reach + height), slice(reach, reach + width))
        local = [of[inner] / count[inner] for of in sums]

        predict.time_ids = whole
        pad = [(-n) % s for n in (height, width)]
        padded = F.pad(x, (pad[1], 0, pad[0], 0))
        blurred = demofusion.blur(padded, s, self.settings.sigma * c3)
        dilated = [torch.zeros_like(padded), torch.zeros_like(padded)]
        for a in range(s):
            for b in range(s):
                part = (..., slice(a, None, s), slice(b, None, s))
                for to, stepped in zip(dilated, step(denoise(blurred[part]), padded[part])):
                    to[part] = stepped
        cut = (..., slice(pad[0], None), slice(pad[1], None))
        return [(1 - c2) * near + c2 * far[cut] for near, far in zip(local, dilated)]
