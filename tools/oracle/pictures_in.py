"""Writes tests/data/pictures-in: runs that begin from a picture (img2img), repaint a part of one (inpainting, with UNets of 4
and of 9 channels), alone and in relays, and hires fix.

    tools/oracle/venv tools/oracle/pictures_in.py

photo.png, tall.png, mask.png and kinds/ are made here, with kinds.safetensors of what PIL reads of the latter; unet-sd and unet-sdxl are UNets of 9 channels for the models sd15 and sdxl-odd;
runs.json lists the runs as tests/data/runs does, files named without their folder. Everything in f64 as in reference.py, whose
names the tensors have; further ones:

    init<k>.picture   the picture at the size of stage k (from 0), resized by diffusers' image processor
    init<k>.encoded   a sample of its posterior, scaled
    init<k>.mask      [1, 1, h, w]: 1 is repainted
    init<k>.masked    a sample of the masked picture's posterior, scaled: what a UNet of 9 channels reads
    init<k>.noised    what the run begins with

Every run of one stage is compared with diffusers' StableDiffusionImg2ImgPipeline or StableDiffusionInpaintPipeline, or those
of SDXL, on the same modules and seed, draws of every kind included; hires fix with the img2img pipeline from its second pass
on. Relays have no published pipeline. What they do:

- With strength s of n steps the first n - int(n s) are not made. The run begins in the stage that has the next one, with the
  picture at that stage's size; stages before it are not run. gamma and dilation of a stage are what they are in a whole run.
- With a mask and 4 channels the clean samples that leave a stage get the picture's where it is kept, before they are decoded
  and again after the relay has encoded them; the stage's noise is the relay's. Each stage draws: the picture's posterior, the
  noise, the masked picture's posterior (unused).
- With 9 channels mask and masked picture are those of each stage's size; it draws the noise, then the masked posterior.
- MultiDiffusion begins as one of one stage. DemoFusion has the picture's latents in place of those of phase 1, at its size.
- Hires fix, DiffuseHigh, ScaleDiff, PixelRush and FreCaS have the picture at the size of their first stage in place of what that decodes to,
  and do not run it. Where latents are enlarged, they begin with the mean of the picture's posterior: init0.encoded.
- Hires fix encodes the enlarged picture to the posterior's mean, and draws its noise alone.
"""

import json
import pathlib

import numpy
import PIL.Image
import PIL.ImageOps
import torch
from diffusers import UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import save_file

import demofusion
import diffusehigh
import frecas
import multidiffusion
import pixelrush
import reference
import resize
import run_values
import scalediff
import small_models
import small_sdxl
from module_values import relative, set_mid_dilation

DATA = pathlib.Path(__file__).resolve().parents[2] / "tests/data"
ROOT = DATA / "pictures-in"
CLASSES = reference.CLASSES | {"heun": "HeunDiscreteScheduler"}


class Settings(reference.Settings):
    init_image = None  # a file of ROOT
    mask = None
    strength = None
    denoise = None
    enlarge = "picture"

    def __init__(self, **changes):
        for key, value in changes.items():
            assert hasattr(Settings, key), key
            setattr(self, key, value)
        self.eta = self.eta or 0.0


def runs():
    """name -> (model, UNet in place of the model's, settings)"""
    plain = {"method": "plain", "size": (16, 16), "steps": 5, "guidance": 2.0, "scheduler": "ddim", "init_image": "photo.png",
             "strength": 0.6, "seed": 71}
    paint = plain | {"mask": "mask.png"}
    mega = {"method": "megafusion", "stages": (((12, 12), 3), ((18, 18), 2)), "guidance": 1.5, "seed": 72, "strength": 0.8,
            "init_image": "photo.png"}
    plus = mega | {"method": "megafusion++"}
    hires = {"method": "hires-fix", "stages": (((10, 10), 4), ((16, 14), 2)), "guidance": 1.5, "seed": 73, "scheduler": "ddim"}
    full = {"strength": None}
    out = {
        "img2img-ddim": ("sd15", None, plain),
        "img2img-defaults": ("sd15", None, plain | full | {"size": None, "init_image": "tall.png", "scheduler": "euler"}),
        "img2img-all-steps": ("sd21", None, plain | {"strength": 1.0, "steps": 3, "scheduler": "euler-ancestral"}),
        "img2img-dpm": ("mixed", None, plain | {"size": (16, 12), "scheduler": "dpm++-2m", "strength": 0.7}),
        "img2img-unipc": ("sd15", None, plain | {"scheduler": "unipc", "strength": 0.8}),
        "img2img-heun": ("sd15", None, plain | {"scheduler": "heun", "strength": 0.5}),
        "img2img-eta": ("sd15", None, plain | {"eta": 0.5}),
        "img2img-sdxl": ("sdxl-odd", None, plain | {"scheduler": "euler"}),
        "inpaint-ddim": ("sd15", None, paint | full | {"steps": 3}),
        "inpaint-euler": ("sd15", None, paint | {"scheduler": "euler"}),
        "inpaint-ancestral": ("sd15", None, paint | full | {"steps": 3, "scheduler": "euler-ancestral"}),
        "inpaint-heun": ("sd15", None, paint | {"scheduler": "heun", "strength": 0.4}),
        "inpaint-unipc": ("sd15", None, paint | {"scheduler": "unipc", "strength": 0.8}),
        "inpaint-sdxl": ("sdxl-odd", None, paint | {"scheduler": "euler", "strength": 0.4}),
        "inpaint-channels": ("sd15", "unet-sd", paint | full | {"steps": 3}),
        "inpaint-channels-part": ("sd15", "unet-sd", paint | {"scheduler": "euler-ancestral"}),
        "inpaint-channels-sdxl": ("sdxl-odd", "unet-sdxl", paint | full | {"steps": 2, "scheduler": "euler"}),
        "mega-first-stage": ("sd15", None, mega),
        "mega-second-stage": ("sd15", None, plus | {"strength": 0.4}),
        "mega-euler": ("sd15", None, plus | {"scheduler": "euler", "strength": 0.6}),
        "mega-inpaint": ("sd15", None, mega | full | {"mask": "mask.png"}),
        "mega-inpaint-channels": ("sd15", "unet-sd", plus | {"mask": "mask.png", "scheduler": "euler"}),
        "hires-picture": ("sd15", None, hires),
        "hires-latents": ("sd15", None, hires | {"enlarge": "latents", "upsampler": "bilinear", "scheduler": "euler"}),
        "hires-ancestral": ("sd21", None, hires | {"stages": (((12, 12), 3), ((20, 16), 3)), "scheduler": "euler-ancestral"}),
        "hires-sdxl": ("sdxl-odd", None, hires | {"scheduler": "euler"}),
    }
    views = {"steps": 5, "guidance": 2.0, "init_image": "photo.png", "seed": 74}
    multi = views | {"method": "multidiffusion", "size": (28, 20), "window": 6, "stride": 4, "strength": 0.6}
    demo = views | {"method": "demofusion", "size": (32, 32), "guidance": 1.5, "steps": 2}
    out |= {
        "views-multidiffusion": ("sd15", None, multi | {"steps": 4}),
        "views-multidiffusion-euler": ("sdxl-odd", None, multi | full | {"scheduler": "euler", "steps": 3, "circular": True}),
        "views-demofusion": ("sdxl-turbo", None, demo | {"scheduler": "euler"}),
        "views-demofusion-ddim": ("sdxl-turbo", None, demo | {"size": (22, 32), "scheduler": "ddim", "init_image": "tall.png",
                                                              "strength": 1.0, "stride": 3}),
        # Of a picture larger than the trained size.
        "views-demofusion-larger": ("sdxl-turbo", None, demo | {"size": None, "steps": None, "scheduler": "euler",
                                                                "stages": (((24, 6), 1), ((48, 12), 1))}),
    }
    own = {"init_image": "photo.png", "guidance": 1.5, "seed": 75}
    two, three = (((10, 8), 4), ((18, 14), 2)), (((8, 6), 3), ((12, 10), 2), ((16, 14), 2))
    again, high = hires | own | {"stages": two}, own | {"method": "diffusehigh", "refine_guidance": 2.0}
    rush = own | {"method": "pixelrush"}
    scale = own | {"method": "scalediff", "scheduler": "ddim"}
    out |= {
        "cascade-hires": ("sd15", None, again),
        "cascade-hires-latents": ("sdxl-odd", None, again | {"enlarge": "latents", "scheduler": "euler"}),
        "cascade-diffusehigh": ("sdxl", None, high | {"stages": two, "wavelet_steps": 1}),
        "cascade-diffusehigh-three": ("sd15", None, high | {"stages": three, "sharpen": False,
                                                           "scheduler": "ddim", "seed": 79}),
        # Of a smaller picture than the trained size, and of a larger one.
        "cascade-scalediff": ("sdxl-turbo", None, scale | {"stages": (((12, 10), 4), ((24, 20), 2))}),
        "cascade-scalediff-larger": ("sdxl-turbo", None, scale | {"scheduler": "euler",
                                                                  "stages": (((28, 12), 3), ((36, 16), 1))}),
        "cascade-frecas": ("sd15", None, own | {"method": "frecas", "guidance_high": 3.0, "frecas_ends": "400,150",
                                                "stages": (((8, 6), 2), ((12, 10), 2), ((16, 14), 1))}),
        "cascade-pixelrush": ("sdxl-turbo", None, rush | {"stages": (((10, 8), 2), ((20, 16), 1))}),
        "cascade-pixelrush-three": ("sd15", None, rush | {"scheduler": "ddim", "inject_noise": 0.0,
                                                         "stages": (((8, 6), 2), ((16, 12), 1), ((24, 18), 1))}),
    }
    planned = {"stages": (), "size": (28, 26), "steps": 3, "denoise": 0.7}
    return out | {"hires-planned": ("mixed", None, hires | planned)}


def pictures():
    """A photo of no size that a model makes, one upright, and a mask of another size and shape, not only black and white."""
    generator = torch.Generator().manual_seed(70)

    def photo(width, height):
        y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
        waves = torch.stack([torch.sin(7 * x + 3 * y), torch.cos(9 * y), x * y * 2 - 1], dim=-1)
        noise = 0.3 * torch.randn(height, width, 3, generator=generator)
        return PIL.Image.fromarray(((waves + noise) * 127 + 128).clamp(0, 255).to(torch.uint8).numpy())

    photo(37, 29).save(ROOT / "photo.png")
    photo(15, 19).save(ROOT / "tall.png")
    mask = numpy.zeros((40, 50), dtype=numpy.uint8)
    mask[8:34, 12:37] = 255
    mask[20:40, 30:44] = 140
    mask[0:10, 40:50] = 120
    PIL.Image.fromarray(mask).save(ROOT / "mask.png")


def kinds():
    """kinds/: files of every kind that is read, and in kinds.safetensors what PIL reads of them: [height, width, 3], levels.

    Exif orientation applied; of 16 bits the nearest 8 (PIL itself cuts grey ones off at 255).
    """
    folder = ROOT / "kinds"
    folder.mkdir(exist_ok=True)
    photo = PIL.Image.open(ROOT / "photo.png").resize((11, 7), PIL.Image.BICUBIC)
    other = PIL.Image.fromarray(255 - numpy.asarray(photo))
    alpha = PIL.Image.fromarray((numpy.arange(77, dtype=numpy.uint8) * 3).reshape(7, 11))
    rgba = photo.copy()
    rgba.putalpha(alpha)
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    deep = (numpy.arange(77, dtype=numpy.uint16) * 851).reshape(7, 11)
    photo.convert("L").save(folder / "grey.png")
    rgba.convert("LA").save(folder / "grey-alpha.png")
    rgba.save(folder / "alpha.png")
    photo.quantize(16).save(folder / "palette.png", transparency=3)
    photo.convert("1").save(folder / "one-bit.png")
    PIL.Image.fromarray(deep).save(folder / "grey-16.png")
    photo.save(folder / "turned.png", exif=turned)
    photo.save(folder / "photo.jpg", quality=95, subsampling=0)
    photo.save(folder / "progressive.jpg", quality=95, subsampling=0, progressive=True)
    photo.convert("L").save(folder / "grey.jpg", quality=95)
    photo.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    photo.save(folder / "turned.jpg", quality=95, subsampling=0, exif=turned)
    photo.save(folder / "lossless.webp", lossless=True)
    photo.save(folder / "lossy.webp", quality=95)
    rgba.save(folder / "alpha.webp", lossless=True, exact=True)
    photo.save(folder / "turned.webp", lossless=True, exif=turned)
    photo.save(folder / "animated.webp", lossless=True, save_all=True, append_images=[other], duration=100)
    expected = {}
    for path in sorted(folder.iterdir()):
        image = PIL.ImageOps.exif_transpose(PIL.Image.open(path))
        levels = numpy.asarray(image.convert("RGB"))
        if path.name == "grey-16.png":
            levels = ((deep.astype(numpy.int64) * 255 + 32767) // 65535).astype(numpy.uint8)[..., None].repeat(3, axis=-1)
        expected[path.name] = torch.from_numpy(levels.copy())
    save_file(expected, ROOT / "kinds.safetensors")


def unets():
    """UNets of 9 channels, of the widths that sd15 and sdxl-odd read."""
    configs = {
        "unet-sd": {"sample_size": 8, "block_out_channels": [8, 8], "layers_per_block": 1, "attention_head_dim": 2,
                    "cross_attention_dim": 16, "norm_num_groups": 4, "in_channels": 9,
                    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
                    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]},
        "unet-sdxl": small_sdxl.unet([6, 6], 1, [1, 1], 24, 22, 10) | {
            "norm_num_groups": 3, "in_channels": 9, "sample_size": 8},
    }
    for seed, (name, config) in enumerate(configs.items()):
        unet = UNet2DConditionModel(**config)
        small_models.fill(unet, 700 + seed, "unet", torch.float16)
        folder = ROOT / name
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"_class_name": "UNet2DConditionModel"} | config, indent=2)
        (folder / "config.json").write_text(text + "\n")
        state = {key: tensor.half() for key, tensor in unet.state_dict().items()}
        save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


class Pictures:
    """A run's picture and mask at the size of any stage, and what they become."""

    def __init__(self, model, settings, draws, tensors):
        self.model, self.draws, self.tensors = model, draws, tensors
        self.image = PIL.Image.open(ROOT / settings.init_image)
        self.mask = settings.mask and PIL.Image.open(ROOT / settings.mask)
        factor = model.vae_factor
        self.processor = VaeImageProcessor(vae_scale_factor=factor)
        self.mask_processor = VaeImageProcessor(vae_scale_factor=factor, do_normalize=False, do_binarize=True,
                                                do_convert_grayscale=True)
        self.reads_mask = model.unet.config.in_channels == 9

    def pixels(self, size):
        return self.processor.preprocess(self.image, height=size[1], width=size[0]).to(self.model.unet.dtype)

    def sampled(self, pixels):
        posterior = self.model.vae.encode(pixels).latent_dist
        return (posterior.mean + posterior.std * self.draws.normal(posterior.mean.shape)) * self.model.vae.config.scaling_factor

    def known(self, k, size):
        pixels = self.pixels(size)
        self.tensors[f"init{k}.picture"] = pixels
        self.tensors[f"init{k}.encoded"] = known = self.sampled(pixels)
        return known

    def enter(self, k, size, known, noise):
        """(what the UNet reads beside the samples, or None; (mask, known, noise) of a stage that keeps a part, or None)"""
        if self.mask is None:
            return None, None
        pixels = self.mask_processor.preprocess(self.mask, height=size[1], width=size[0])
        factor = self.model.vae_factor
        mask = torch.nn.functional.interpolate(pixels, size=(size[1] // factor, size[0] // factor)).to(noise.dtype)
        self.tensors[f"init{k}.mask"] = mask
        masked = self.sampled(self.pixels(size) * (pixels < 0.5))
        if not self.reads_mask:
            return None, (mask, known, noise)
        self.tensors[f"init{k}.masked"] = masked
        return torch.cat([mask, masked], dim=1), None


def level(scheduler, sampler, i):
    """(signal, sigma) where evaluation i of the scheduler's list begins."""
    if sampler in ("euler", "euler-ancestral", "heun"):
        return 1.0, scheduler.sigmas[i].double()
    if sampler in ("dpm++-2m", "unipc", "deis"):
        sigma = scheduler.sigmas[i].double()
        return 1 / (sigma**2 + 1).sqrt(), sigma / (sigma**2 + 1).sqrt()
    abar = scheduler.alphas_cumprod[scheduler.timesteps[i]].double()
    return abar.sqrt(), (1 - abar).sqrt()


def add_noise(x0, noise, at):
    signal, sigma = at
    return (signal * x0 + sigma * noise).to(x0.dtype)


def blend(kept, x, at=None):
    """The samples with the picture's, noised to `at`, where the mask keeps them."""
    if kept is None:
        return x
    mask, known, noise = kept
    return (1 - mask) * (known if at is None else add_noise(known, noise, at)) + mask * x


def denoise(model, settings, tensors, draws, predict, scheduler, sampler, steps, x, done, channels=None, kept=None):
    """Steps [first, end) of the schedule: (last samples, clean samples of the last evaluation, steps done)."""
    first, end = steps
    order = 2 if sampler == "heun" else 1
    scheduler.set_begin_index(first * order) if hasattr(scheduler, "set_begin_index") else None
    # Heun's list has each timestep but the first twice.
    last = min(end * order, len(scheduler.timesteps))
    x0 = None
    for i in range(first * order, last):
        t = scheduler.timesteps[i]
        scaled = scheduler.scale_model_input(x, t)
        output = predict(scaled if channels is None else torch.cat([scaled, channels], dim=1), t)
        if sampler == "heun":
            stepped = scheduler.step(output, t, x)
        else:
            stepped = reference.step(scheduler, sampler, output, t, x, draws, settings.eta)
        x0 = getattr(stepped, "pred_original_sample", None)
        x = blend(kept, stepped.prev_sample, level(scheduler, sampler, i + 1) if i + 1 < last else None)
        if (i + 1) % order == 0 or i + 1 == len(scheduler.timesteps):
            done += 1
            tensors[f"step{done}"] = x
    return x, None if x0 is None else blend(kept, x0), done


def scheduler_of(model, sampler, steps, gamma=1.0):
    scheduler = reference.make_scheduler(CLASSES[sampler], model.scheduler_config, gamma)
    scheduler.set_timesteps(steps)
    return scheduler


def tables(tensors, schedulers):
    timesteps = schedulers[0].timesteps.float()
    tensors["timesteps"] = torch.unique_consecutive(timesteps) if len(timesteps.unique()) < len(timesteps) else timesteps
    tensors["alpha_bar"] = torch.stack([s.alphas_cumprod for s in schedulers]).float()


def begin(pictures, k, size, scheduler, sampler, first, noise_only, draws, shape):
    """(samples, channels, what is kept) of the run's first stage."""
    known = None if noise_only and pictures.reads_mask else pictures.known(k, size)
    noise = draws.normal(shape)
    order = 2 if sampler == "heun" else 1
    x = noise * scheduler.init_noise_sigma if noise_only else add_noise(known, noise, level(scheduler, sampler, first * order))
    channels, kept = pictures.enter(k, size, known, noise)
    pictures.tensors[f"init{k}.noised"] = x
    return x, channels, kept


def begin_of(settings, total):
    strength = settings.strength if settings.strength is not None else (1.0 if settings.mask else 0.8)
    first = total - min(int(total * strength), total)
    return first, settings.mask is not None and strength == 1.0


def plain(model, settings, tensors):
    draws = reference.Draws(settings.seed, tensors, model.unet.dtype)
    sampler = settings.scheduler
    scheduler = scheduler_of(model, sampler, settings.steps)
    tables(tensors, [scheduler])
    pictures = Pictures(model, settings, draws, tensors)
    factor = model.vae_factor
    size = settings.size or tuple(side - side % factor for side in pictures.image.size)
    predict = reference.Guided(model, settings)
    predict.enter(size)
    first, noise_only = begin_of(settings, settings.steps)
    shape = (1, 4, size[1] // factor, size[0] // factor)
    x, channels, kept = begin(pictures, 0, size, scheduler, sampler, first, noise_only, draws, shape)
    steps = (first, settings.steps)
    x, _, _ = denoise(model, settings, tensors, draws, predict, scheduler, sampler, steps, x, 0, channels, kept)
    tensors["latent"] = x
    tensors["image"] = reference.decode(model, x)


def megafusion(model, settings, tensors):
    plus = settings.method == "megafusion++"
    sampler = settings.scheduler or "ddim"
    draws = reference.Draws(settings.seed, tensors, model.unet.dtype)
    pictures = Pictures(model, settings, draws, tensors)
    total = sum(steps for _, steps in settings.stages)
    (first_w, first_h), _ = settings.stages[0]
    gammas = [w * h / (first_w * first_h) if plus else 1.0 for (w, h), _ in settings.stages]
    schedulers = [scheduler_of(model, sampler, total, gamma) for gamma in gammas]
    tables(tensors, schedulers)
    first, noise_only = begin_of(settings, total)
    predict = reference.Guided(model, settings)
    x0, at, done = None, 0, 0
    for k, ((w, h), steps) in enumerate(settings.stages):
        here, at = (max(at, first), at + steps), at + steps
        if here[0] >= here[1]:
            continue
        shape = (1, 4, h // model.vae_factor, w // model.vae_factor)
        if x0 is None:
            x, channels, kept = begin(pictures, k, (w, h), schedulers[k], sampler, first, noise_only, draws, shape)
        else:
            decoded = reference.decode(model, x0)
            up = resize.upsample(decoded.clamp(-1, 1), (h, w), "bicubic").clamp(-1, 1)
            y = model.vae.encode(up).latent_dist.mean * model.vae.config.scaling_factor
            for name, tensor in [("x0", x0), ("decoded", decoded), ("upsampled", up), ("encoded", y)]:
                tensors[f"relay{k}.{name}"] = tensor
            known = pictures.known(k, (w, h)) if pictures.mask and not pictures.reads_mask else None
            noise = draws.normal(shape)
            channels, kept = pictures.enter(k, (w, h), known, noise)
            x = add_noise(blend(kept, y), noise, level(schedulers[k], sampler, here[0]))
            tensors[f"relay{k}.noised"] = x
        predict.enter((w, h))
        if plus:
            set_mid_dilation(model.unet, 2 if k > 0 else 1)
        x, x0, done = denoise(model, settings, tensors, draws, predict, schedulers[k], sampler, here, x, done, channels, kept)
    set_mid_dilation(model.unet, 1)
    tensors["latent"] = x0
    tensors["image"] = reference.decode(model, x0)


def hires_stages(model, settings):
    if settings.stages:
        return settings.stages
    # The model's own area in the final aspect ratio, of whole cells.
    (w, h), factor = settings.size, model.vae_factor
    native = model.sample_size * factor
    side = lambda ratio: int(native * ratio**0.5 / factor + 0.5) * factor
    return (((side(w / h), side(h / w)), settings.steps), ((w, h), int(settings.steps * settings.denoise)))


def hires_fix(model, settings, tensors):
    ((w, h), steps), ((to_w, to_h), again) = hires_stages(model, settings)
    sampler, factor = settings.scheduler, model.vae_factor
    draws = reference.Draws(settings.seed, tensors, model.unet.dtype)
    predict = reference.Guided(model, settings)
    scheduler, second = (scheduler_of(model, sampler, steps) for _ in range(2))
    tables(tensors, [scheduler, second])
    begin, done = in_place(model, settings, draws, tensors), 0
    mean = lambda picture: model.vae.encode(picture).latent_dist.mean * model.vae.config.scaling_factor
    if begin is None:
        predict.enter((w, h))
        x = draws.normal((1, 4, h // factor, w // factor)) * scheduler.init_noise_sigma
        x, _, done = denoise(model, settings, tensors, draws, predict, scheduler, sampler, (0, steps), x, 0)
    else:
        picture = begin((w, h))
    if settings.enlarge == "latents":
        if begin is not None:
            tensors["init0.encoded"] = x = mean(picture)
        y = resize.upsample(x, (to_h // factor, to_w // factor), settings.upsampler)
    else:
        decoded = reference.decode(model, x) if begin is None else picture
        tensors["relay1.upsampled"] = up = resize.upsample(decoded.clamp(-1, 1), (to_h, to_w), settings.upsampler).clamp(-1, 1)
        y = mean(up)
        if begin is None:
            tensors["relay1.decoded"] = decoded
    if begin is None:
        tensors["relay1.x0"] = x
    tensors["relay1.encoded"] = y
    first = steps - again
    tensors["relay1.noised"] = x = add_noise(y, draws.normal(y.shape), level(second, sampler, first))
    predict.enter((to_w, to_h))
    x, _, _ = denoise(model, settings, tensors, draws, predict, second, sampler, (first, steps), x, done)
    tensors["latent"] = x
    tensors["image"] = reference.decode(model, x)


def in_place(model, settings, draws, tensors):
    """Of a size in pixels the run's picture, which stands in place of what a first stage decodes to; None: it begins with noise."""
    if settings.init_image is None:
        return None

    def picture(size):
        tensors["init0.picture"] = pixels = Pictures(model, settings, draws, tensors).pixels(size)
        return pixels

    return picture


def cascade(module):
    return lambda model, settings, tensors: module.run(model, settings, tensors, in_place(model, settings, None, tensors))


def multidiffused(model, settings, tensors):
    def first_samples(scheduler, draws):
        sampler = settings.scheduler or "ddim"
        pictures, first = Pictures(model, settings, draws, tensors), begin_of(settings, settings.steps)[0]
        shape = (1, 4, *(side // model.vae_factor for side in reversed(settings.size)))
        x, _, _ = begin(pictures, 0, settings.size, scheduler, sampler, first, False, draws, shape)
        return x, first

    multidiffusion.run(model, settings, tensors, first_samples)


def demofused(model, settings, tensors):
    demofusion.run(model, settings, tensors, lambda draws, size: Pictures(model, settings, draws, tensors).known(0, size))


METHODS = {"multidiffusion": multidiffused, "demofusion": demofused, "plain": plain, "megafusion": megafusion,
           "megafusion++": megafusion, "hires-fix": hires_fix, "diffusehigh": cascade(diffusehigh), "scalediff": cascade(scalediff),
           "pixelrush": cascade(pixelrush), "frecas": cascade(frecas)}


@torch.no_grad()
def run(model, settings):
    tensors = {}
    METHODS[settings.method](model, settings, tensors)
    stored = lambda v: v if v.dtype == torch.int64 else v.float()
    return {k: stored(v).contiguous().clone() for k, v in tensors.items()}


@torch.no_grad()
def check_against_pipeline(model, settings, tensors, limit):
    """Runs of one stage, and the second pass of hires fix, are what diffusers' own pipelines make of the same modules."""
    import diffusers

    sampler = settings.scheduler
    scheduler = reference.make_scheduler(CLASSES[sampler], model.scheduler_config)
    parts = {"vae": model.vae, "text_encoder": model.text, "tokenizer": model.tokenizer, "unet": model.unet,
             "scheduler": scheduler}
    kind = "Inpaint" if settings.mask else "Img2Img"
    if model.text_2 is None:
        pipe = getattr(diffusers, f"StableDiffusion{kind}Pipeline")(
            **parts, feature_extractor=None, safety_checker=None, requires_safety_checker=False)
    else:
        pipe = getattr(diffusers, f"StableDiffusionXL{kind}Pipeline")(
            **parts, text_encoder_2=model.text_2, tokenizer_2=model.tokenizer_2, feature_extractor=None,
            force_zeros_for_empty_prompt=model.force_zeros, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(settings.seed)
    if settings.method == "hires-fix":
        (_, steps), (size, again) = hires_stages(model, settings)
        # The second pass goes on where the first pass's draws end.
        for j in range(1 + (steps if sampler == "euler-ancestral" else 0)):
            torch.randn(tensors[f"noise{j}"].shape, generator=generator)
        image, strength, total = tensors["relay1.encoded"], min(1.0, again / steps + 1e-9), steps
    else:
        total = settings.steps
        strength = settings.strength if settings.strength is not None else (1.0 if settings.mask else 0.8)
        image = PIL.Image.open(ROOT / settings.init_image)
        size = settings.size or tuple(side - side % model.vae_factor for side in image.size)
        image = image.resize(size, PIL.Image.LANCZOS)
    more = {}
    if settings.mask:
        image = PIL.Image.open(ROOT / settings.init_image)
        more = {"mask_image": PIL.Image.open(ROOT / settings.mask), "height": size[1], "width": size[0]}
    out = pipe(settings.prompt, image=image, num_inference_steps=total, strength=strength, guidance_scale=settings.guidance,
               negative_prompt=settings.negative, eta=settings.eta, generator=generator, output_type="latent", **more)
    error = (out.images - tensors["latent"]).abs().max().item() / tensors["latent"].abs().max().item()
    assert error < limit, error
    return error


def main():
    torch.set_num_threads(1)
    ROOT.mkdir(parents=True, exist_ok=True)
    pictures()
    kinds()
    unets()
    singles, listed = {}, []
    for name, (model, unet, changes) in runs().items():
        key = (model, unet)
        if key not in singles:
            single = reference.load(DATA / model)
            single.sample_size = single.unet.config.sample_size  # diffusers' pipelines write into the configuration
            if unet:
                single.unet = UNet2DConditionModel.from_pretrained(ROOT / unet, torch_dtype=torch.float32)
                single.unet.eval().requires_grad_(False)
            singles[key] = (single, reference.double(single))
        single, double = singles[key]
        changes = {"prompt": run_values.CAT} | {k: v for k, v in changes.items() if v is not None}
        settings = Settings(**({"size": None} | changes))
        tensors, in_f32 = run(double, settings), run(single, settings)
        for key, tensor in tensors.items():
            assert torch.isfinite(tensor).all(), (name, key)
        error = max(relative(in_f32[key], tensors[key]) for key in tensors)
        assert error < run_values.F32_LIMIT, (name, error)
        theirs = None
        if settings.method in ("plain", "hires-fix") and not name.startswith("cascade"):
            theirs = check_against_pipeline(single, settings, tensors, max(2e-5, error))
        print(name, f"{error:.1e}", theirs, len(tensors))
        del tensors["alpha_bar"]  # as in tests/data/runs
        if name.startswith(("views", "cascade")):
            tensors = run_values.stored(name, tensors)
        save_file(tensors, ROOT / f"{name}.safetensors")
        (ROOT / f"{name}.safetensors").chmod(0o644)
        args = [arg for arg in settings.args({k: v for k, v in changes.items() if v not in (None, ())})]
        listed.append({"name": name, "model": model, "args": args, "f32_error": float(f"{error:.1e}"),
                       "unet": unet and f"pictures-in/{unet}"})
    text = json.dumps({"runs": listed}, indent=1, ensure_ascii=False)
    (ROOT / "runs.json").write_text(run_values.compact_args(text))


if __name__ == "__main__":
    main()
