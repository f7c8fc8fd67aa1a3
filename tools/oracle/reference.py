"""Plain sampling, MegaFusion and HiDiffusion in plain torch over diffusers' modules, batch 1.

    reference.py --model DIR --out FILE.safetensors [the options of `megafuse generate`] [PROMPT]

Noise comes from one torch CPU generator seeded with --seed, in this order: the initial latents; then, as they are used,
a sampler's noise of each step and one draw per relay (with --reference-compat two: the posterior's, then the relay's).

With --f64 the weights, latents and pictures are f64 (tables, draws and PIL's resize stay f32): that is what the stored
expected values are, so that a comparison in f32 sees one program's rounding and not the sum of two.

The tensors written, all f32 NCHW:
    noise<j>             the j-th draw, from 0, as drawn (N(0, 1), before any scaling)
    timesteps            one per model evaluation, over all stages
    alpha_bar            [stages, 1000], re-scheduled where the stage is
    step<n>              latents after the n-th update, from 1
    relay<k>.x0          the clean latents leaving a stage; k is the stage entered, from 1 = the second
    relay<k>.decoded     the VAE's picture of them, before any clamp
    relay<k>.upsampled   the picture that is encoded: resized, and clamped if asked
    relay<k>.encoded     its latents, scaled
    relay<k>.noised      what the stage starts from
    latent               the latents that are decoded at the end: the last stepped ones (plain), the last x0 (MegaFusion)
    image                the final picture, not clamped
    shifts               HiDiffusion's, [steps, windowed self-attentions], i64
Further ones of other methods: see their files.
"""

import argparse
import contextlib
import copy
import importlib
import pathlib
import sys

import torch

import hidiffusion
import resize
import step_caches
from module_values import encode_prompt, run_unet, set_mid_dilation

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
}
# For plain sampling only; those with two evaluations in a step are not here.
MORE_SAMPLERS = {
    "dpm++-2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
    "deis": "DEISMultistepScheduler",
}
CLASSES = SAMPLERS | MORE_SAMPLERS


class Settings:
    """The options of `megafuse generate` that change numbers, with their defaults."""

    prompt = ""
    negative = None  # not given: the same as "", except where SDXL takes zeros
    method = "megafusion"
    size = (16, 16)  # width, height
    stages = ()  # ((width, height), steps) each; ((width, height), steps, "windows+dilation") with parts: compose.py
    upsampler = "bicubic"
    relay_clamp = "both"
    reschedule = None  # None: as the method says
    dilation = None
    relay_noise_offset = 0
    scheduler = None
    eta = None  # as the method says
    steps = 4
    guidance = 7.0
    guidance_rescale = 0.0
    guidance_high = None  # of the high band; None: guidance is not split
    seed = 0
    original_size = None  # SDXL's size ids, (width, height); None: the size of the stage
    target_size = None
    crop = (0, 0)  # pixels cut off at the left and at the top
    reference_compat = False
    # Of views: None is the method's default.
    window = None
    stride = None
    view_batch = 16
    circular = False
    # DemoFusion
    cosine = (3.0, 1.0, 1.0)
    sigma = 0.8
    # PixelRush
    refine_timestep = 249
    inject_noise = 0.5
    # HiDiffusion; None: as the model and the size say
    raunet = True
    windows = True
    t1 = None
    t2 = None
    aggressive = None
    # DiffuseHigh; wavelet_steps None: a third of a stage's
    refine_guidance = 10.0
    wavelet_steps = None
    sharpen = True
    # Upsample guidance
    up_scale = 2
    up_theta = 1.2
    up_share = 0.6
    # Of steps; None: every step asks the network
    cache = None
    cache_options = ""
    # ScaleCrafter; None: as the model and the size say
    redilate = None
    redilate_steps = None
    progressive = None
    damped = None
    damped_steps = None
    disperse = None
    disperse_steps = None
    freeu = None
    # FouriScale; None: as the model and the size say
    fourier = None
    fourier_dilation = None
    fourier_start = None
    fourier_stop = None
    fourier_floor = None
    amplified_guidance = False
    # ScaleDiff
    restart_ratio = None
    low_pass = 0.125
    # FreCaS; None: as the stages say
    frecas_ends = None
    frecas_gamma = None
    map_reuse = None
    frecas_upsampler = "nearest"

    def __init__(self, **changes):
        for key, value in changes.items():
            assert hasattr(Settings, key), key
            setattr(self, key, value)
        if self.eta is None:
            self.eta = 1.0 if self.method in ("scalecrafter", "fouriscale") else 0.0

    def sampler(self, scheduler_config):
        """Without --scheduler: DDIM for MegaFusion, ScaleCrafter and FouriScale; else the class of scheduler_config.json, which must be
        one of these."""
        if self.method.startswith("megafusion") or self.method in ("scalecrafter", "fouriscale"):
            return self.scheduler or "ddim"
        own = {v: k for k, v in CLASSES.items()}
        return self.scheduler or own[scheduler_config["_class_name"]]

    def args(self, changed):
        """The command line that sets the `changed` names (prompt first)."""
        out = [self.prompt]
        for key in changed:
            value, option = getattr(self, key), "--" + key.replace("_", "-")
            if key == "prompt":
                continue
            if key.endswith("size"):
                value = "x".join(map(str, value))
            if key in ("crop", "cosine"):
                value = ",".join(map(str, value))
            if key == "stages":
                value = ",".join(f"{w}x{h}:{n}" + "".join("+" + part for part in parts) for (w, h), n, *parts in value)
            bools = ("reschedule", "raunet", "windows", "aggressive", "sharpen", "progressive")
            if isinstance(value, bool) and key not in bools:
                assert value
                out.append(option)
                continue
            out += [option, str(value).lower() if isinstance(value, bool) else str(value)]
        return out


class Draws:
    """The run's one source of noise, remembering every draw."""

    def __init__(self, seed, tensors, dtype):
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors, self.count, self.dtype = tensors, 0, dtype

    def normal(self, shape):
        x = torch.randn(shape, generator=self.generator, dtype=torch.float32)
        self.tensors[f"noise{self.count}"] = x
        self.count += 1
        return x.to(self.dtype)


def make_scheduler(class_name, config, gamma=1.0):
    """The class, from scheduler_config.json (a key it lacks takes the class's default), re-scheduled by gamma.

    As in diffusers' Stable Diffusion pipelines, whatever the config says or leaves out: steps_offset is 1, and
    clip_sample (for pictures; it would cut latents at 1) is off.
    abar' = abar / (gamma - (gamma - 1) abar), and the final abar is taken after that.
    """
    import diffusers

    config = {k: v for k, v in config.items() if k[0] != "_"} | {"steps_offset": 1, "clip_sample": False}
    scheduler = getattr(diffusers, class_name).from_config(config)
    if gamma != 1.0:
        a = scheduler.alphas_cumprod.double()
        scheduler.alphas_cumprod = (a / (gamma - (gamma - 1) * a)).float()
        if not scheduler.config.get("set_alpha_to_one", True):
            scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


class Guided:
    """The UNet with classifier-free guidance: e_u + w (e_c - e_u) when w > 1, else the prompt's prediction alone.

    With guidance_rescale, diffusers' rescaling to the prompt's standard deviation follows. A UNet with time_cond_proj_dim is
    told w - 1 in place of guidance.

    SDXL without a negative prompt: zeros in place of its embeddings, unless model_index.json asks for an encoded "".
    """

    cache = None
    view = None  # of a map: (first row, first column, cells from one to the next, (height, width) of the map)
    split = None  # (height and width of the low band's map, the high band's scale)
    before = None

    def __init__(self, model, settings):
        self.model, self.settings, self.w = model, settings, settings.guidance
        rows = [encode_prompt(model, settings.prompt)]
        width = model.unet.config.time_cond_proj_dim
        self.timestep_cond = None if width is None else guidance_embedding(self.w - 1, width)
        self.guided = self.w > 1 and width is None
        if self.guided:
            if settings.negative is None and model.force_zeros:
                rows.insert(0, [torch.zeros_like(x) for x in rows[0]])
            else:
                rows.insert(0, encode_prompt(model, settings.negative or ""))
        self.embeds = torch.cat([embeds for embeds, _ in rows])
        self.pooled = None if model.text_2 is None else torch.cat([pooled for _, pooled in rows])

    def enter(self, size):
        """Begins a stage of `size` (width, height): SDXL's size ids are its own unless set, the same in every row."""
        (ow, oh), (tw, th) = (given or size for given in (self.settings.original_size, self.settings.target_size))
        if self.settings.guidance_high is not None:
            side = self.model.unet.config.sample_size * self.model.vae_factor
            # A first stage larger than the trained size would take the trained one's map.
            assert self.before or size[0] * size[1] <= side * side
            cells = self.before and [length // self.model.vae_factor for length in self.before[::-1]]
            self.split = (cells, self.settings.guidance_high) if size[0] * size[1] > side * side else None
            self.before = size
        left, top = self.settings.crop
        self.time_ids = torch.tensor([[oh, ow, top, left, th, tw]] * len(self.embeds), dtype=torch.float32)

    def __call__(self, x, t):
        return self.guide(self.rows(x, t)) if self.cache is None else self.cache(self, x, t)

    def rows(self, x, t):
        n = len(self.embeds)
        ids = None if self.pooled is None else self.time_ids
        return run_unet(self.model.unet, torch.cat([x] * n), t, self.embeds, self.pooled, ids, self.timestep_cond)

    def guide(self, output):
        if not self.guided:
            return output
        e_u, e_c = output.chunk(2)
        guided = e_u + self.w * (e_c - e_u)
        if self.split is not None:
            grid, high = self.split
            resized = lambda x, size: torch.nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
            low = resized(resized(e_c - e_u, grid), e_u.shape[2:])
            guided = e_u + self.w * low + high * (e_c - e_u - low)
        if self.settings.guidance_rescale == 0:
            return guided
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

        return rescale_noise_cfg(guided, e_c, guidance_rescale=self.settings.guidance_rescale)


def guidance_embedding(w, width):
    """The published sinusoid of a guidance scale; the method reads nothing of its object."""
    from diffusers import LatentConsistencyModelPipeline

    return LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, torch.tensor([w]), width)


def trained_size(model, size):
    """The trained area in the proportions of a size, of whole cells: (width, height)"""
    (w, h), factor = size, model.vae_factor
    native = model.unet.config.sample_size * factor
    side = lambda ratio: max(1, int(native * ratio**0.5 / factor + 0.5)) * factor
    return side(w / h), side(h / w)


def decode(model, latent):
    return model.vae.decode(latent / model.vae.config.scaling_factor).sample


def plain(model, settings, tensors, hi=None, predicted=None):
    """`hi`: HiDiffusion's steps of the wide downsampler and of the pooled block, and its shifts. `predicted`: from the class that
    calls the UNet, the scheduler, its name, its step's number and the latents to what the step takes for the output."""
    draws = Draws(settings.seed, tensors, model.unet.dtype)
    sampler = settings.sampler(model.scheduler_config)
    scheduler = make_scheduler(CLASSES[sampler], model.scheduler_config)
    scheduler.set_timesteps(settings.steps)
    width, height = settings.size
    shape = (1, 4, height // model.vae_factor, width // model.vae_factor)
    predict = Guided(model, settings)
    predict.enter(settings.size)
    predict.cache = step_caches.begin(settings, scheduler, sampler, 0, len(scheduler.timesteps))
    x = draws.normal(shape) * scheduler.init_noise_sigma
    for n, t in enumerate(scheduler.timesteps):
        with contextlib.ExitStack() as stack:
            if hi:
                wide, pooled, shifts = hi(shape)
                k = None if shifts is None else shifts[n]
                stack.enter_context(hidiffusion.asked(model.unet, n in wide, n in pooled, k))
            scaled = scheduler.scale_model_input(x, t)
            output = predicted(predict, scheduler, sampler, n, x) if predicted else predict(scaled, t)
        x = step(scheduler, sampler, output, t, x, draws, settings.eta).prev_sample
        tensors[f"step{n + 1}"] = x
    tensors["timesteps"] = scheduler.timesteps.float()
    tensors["alpha_bar"] = scheduler.alphas_cumprod[None].float()
    tensors["latent"] = x
    tensors["image"] = decode(model, x)


def hidiffused(model, settings, tensors):
    """Plain sampling in which the UNet does what HiDiffusion asks of it at each step."""
    shifts = hidiffusion.draw(model.unet, settings.seed, settings.steps) if settings.windows else None
    if shifts is not None:
        tensors["shifts"] = shifts
    distilled = "turbo" in model.name
    plain(model, settings, tensors, lambda shape: (
        *hidiffusion.schedule(model.unet, settings, shape[2], shape[3], distilled), shifts))


def step(scheduler, sampler, output, t, x, draws, eta):
    """A step of the class, drawing from our source."""
    if sampler == "ddim":
        noise = draws.normal(x.shape) if eta > 0 else None
        return scheduler.step(output, t, x, eta=eta, variance_noise=noise)
    if sampler in ("euler", "unipc", "deis"):  # Euler has a generator too, for churn
        return scheduler.step(output, t, x)
    module = sys.modules[type(scheduler).__module__]
    theirs = module.randn_tensor
    module.randn_tensor = lambda shape, **_: draws.normal(shape)
    try:
        return scheduler.step(output, t, x)
    finally:
        module.randn_tensor = theirs


def megafusion(model, settings, tensors):
    plus = settings.method == "megafusion++"
    reschedule = plus if settings.reschedule is None else settings.reschedule
    dilation = (2 if plus else 1) if settings.dilation is None else settings.dilation
    compat = settings.reference_compat
    sampler = settings.sampler(model.scheduler_config)
    draws = Draws(settings.seed, tensors, model.unet.dtype)
    total = sum(steps for _, steps in settings.stages)
    (first_w, first_h), _ = settings.stages[0]

    schedulers = []
    for s, ((w, h), _) in enumerate(settings.stages):
        # --reference-compat: the published base scheduler carries gamma 2.25 from its default argument, and it is the
        # one used in every stage that is not re-scheduled by itself. Not for SDXL: its code knows other sizes.
        gamma = 2.25 if compat and model.text_2 is None else 1.0
        if reschedule and s > 0:
            gamma = (w * h) / (first_w * first_h)
        scheduler = make_scheduler(SAMPLERS[sampler], model.scheduler_config, gamma)
        scheduler.set_timesteps(total)
        schedulers.append(scheduler)
    timesteps = schedulers[0].timesteps
    tensors["timesteps"] = timesteps.float()
    tensors["alpha_bar"] = torch.stack([s.alphas_cumprod for s in schedulers])
    assert all(torch.equal(s.timesteps, timesteps) for s in schedulers)

    predict = Guided(model, settings)
    shape = lambda size: (1, 4, size[1] // model.vae_factor, size[0] // model.vae_factor)
    z, x0, done = draws.normal(shape(settings.stages[0][0])) * schedulers[0].init_noise_sigma, None, 0
    for s, (size, steps) in enumerate(settings.stages):
        scheduler = schedulers[s]
        if s > 0:
            z = relay(model, settings, tensors, draws, s, x0, scheduler, sampler,
                      done + settings.relay_noise_offset)
            assert z.shape == shape(size)
        predict.enter(size)
        predict.cache = step_caches.begin(settings, scheduler, sampler, done, steps)
        # The paper dilates above the native size only; the published code builds its UNet once, so everywhere.
        set_mid_dilation(model.unet, dilation if s > 0 or compat else 1)
        for t in timesteps[done : done + steps]:
            output = predict(scheduler.scale_model_input(z, t), t)
            stepped = step(scheduler, sampler, output, t, z, draws, settings.eta)
            z, x0 = stepped.prev_sample, stepped.pred_original_sample
            if compat:
                # The published code applies the x0 formula to the latents it has already stepped.
                assert sampler == "ddim" and scheduler.config.prediction_type == "epsilon"
                abar = scheduler.alphas_cumprod[t]
                x0 = (z - (1 - abar).sqrt() * output) / abar.sqrt()
            done += 1
            tensors[f"step{done}"] = z
    set_mid_dilation(model.unet, 1)
    tensors["latent"] = x0
    tensors["image"] = decode(model, x0)


def relay(model, settings, tensors, draws, k, x0, scheduler, sampler, level):
    """x0 -> picture -> larger picture -> latents -> noised to where step `level` of the run begins."""
    (w, h), _ = settings.stages[k]
    decoded = decode(model, x0)
    if settings.reference_compat:
        levels = (decoded.double() / 2 + 0.5).clamp(0, 1) * 255
        model.u8_margin = min(model.u8_margin, ((levels % 1) - 0.5).abs().min().item())
        up = resize.upsample_u8(decoded, (h, w), settings.upsampler)
    else:
        picture = decoded if settings.relay_clamp == "none" else decoded.clamp(-1, 1)
        up = resize.upsample(picture, (h, w), settings.upsampler)
        if settings.relay_clamp == "both":
            up = up.clamp(-1, 1)
    posterior = model.vae.encode(up).latent_dist
    y = posterior.mean
    if settings.reference_compat:
        y = y + posterior.std * draws.normal(y.shape)
    y = y * model.vae.config.scaling_factor
    if sampler.startswith("euler"):
        z = y + scheduler.sigmas[level] * draws.normal(y.shape)
    else:
        abar = scheduler.alphas_cumprod[scheduler.timesteps[level]]
        z = abar.sqrt() * y + (1 - abar).sqrt() * draws.normal(y.shape)
    for name, tensor in [("x0", x0), ("decoded", decoded), ("upsampled", up), ("encoded", y), ("noised", z)]:
        tensors[f"relay{k}.{name}"] = tensor
    return z


@torch.no_grad()
def run(model, settings):
    tensors = {}
    model.u8_margin = 0.5  # how close a relay's 8-bit rounding came to falling the other way, in levels
    if any(len(stage) > 2 for stage in settings.stages):
        method = importlib.import_module("compose").run
    elif settings.method.startswith("megafusion"):
        method = megafusion
    elif settings.method in ("plain", "hidiffusion"):
        method = {"plain": plain, "hidiffusion": hidiffused}[settings.method]
    else:
        method = importlib.import_module(settings.method.replace("-", "_")).run  # a file per method
    method(model, settings, tensors)
    stored = lambda v: v if v.dtype == torch.int64 else v.float()
    return {k: stored(v).contiguous().clone() for k, v in tensors.items()}


def double(model):
    """The same model in f64."""
    out = copy.copy(model)
    for name in model.modules():
        setattr(out, name, copy.deepcopy(getattr(model, name)).double())
    return out


def load(folder):
    """The modules of a model directory, through diffusers and transformers, in f32."""
    import json

    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    import drawn
    import small_models

    folder = drawn.folder(folder)
    model = small_models.Model()
    model.name, model.folder = folder.name, folder
    variant = {"variant": "fp16"} if list(folder.glob("unet/*.fp16*safetensors")) else {}
    options = {"torch_dtype": torch.float32, **variant}
    text = {"dtype": torch.float32, "attn_implementation": "sdpa", **variant}
    model.text = CLIPTextModel.from_pretrained(folder / "text_encoder", **text)
    model.tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    if (folder / "text_encoder_2").exists():
        model.text_2 = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", **text)
        model.tokenizer_2 = CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
        index = json.loads((folder / "model_index.json").read_text())
        model.force_zeros = index.get("force_zeros_for_empty_prompt", True)
    model.unet = UNet2DConditionModel.from_pretrained(folder / "unet", **options)
    model.vae = AutoencoderKL.from_pretrained(folder / "vae", **options)
    for name in model.modules():
        getattr(model, name).eval().requires_grad_(False)
    model.vae_factor = 2 ** (len(model.vae.config.block_out_channels) - 1)
    model.scheduler_config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    return model


def main():
    from safetensors.torch import save_file

    truth = lambda text: {"true": True, "false": False}[text]
    size = lambda text: tuple(int(n) for n in text.split("x"))
    stages = lambda text: tuple((size(s.split(":")[0]), int(s.split(":")[1])) for s in text.split(","))
    types = {"size": size, "stages": stages, "scheduler": str, "cache": str, "reschedule": truth, "raunet": truth, "windows": truth, "aggressive": truth, "sharpen": truth, "wavelet_steps": int, "t1": float, "t2": float,
             "eta": float, "redilate": str, "redilate_steps": int, "progressive": truth, "damped": str, "damped_steps": int,
             "disperse": str, "disperse_steps": int, "freeu": str, "fourier": str, "fourier_dilation": float,
             "fourier_start": int, "fourier_stop": int, "fourier_floor": float, "restart_ratio": float,
             "dilation": int, "negative": str, "original_size": size, "target_size": size,
             "crop": lambda text: tuple(int(n) for n in text.split(",")), "window": int, "stride": int,
             "cosine": lambda text: tuple(float(n) for n in text.split(",")),
             "guidance_high": float, "frecas_ends": str, "frecas_gamma": float, "map_reuse": float}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="")
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--f64", action="store_true")
    for key, default in vars(Settings).items():
        if key.startswith("_") or callable(default) or key == "prompt":
            continue
        option = "--" + key.replace("_", "-")
        if key in ("reference_compat", "circular", "amplified_guidance"):
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, default=default, type=types.get(key, type(default)))
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    model, out = load(options.pop("model")), options.pop("out")
    if options.pop("f64"):
        model = double(model)
    save_file(run(model, Settings(**options)), out)


if __name__ == "__main__":
    main()
