"""Writes tests/data/if: small random DeepFloyd IF directories of stage I and II, values of their UNets, and whole runs.

    tools/oracle/venv tools/oracle/deepfloyd.py

A directory is as diffusers saves it, with described weights (drawn.py); lowres*.png are the pictures that stage II enlarges.
runs.json: `unets` lists one call of a UNet each, whose tensors are MODEL.NAME.* of unets.safetensors (`prompt_embeds` are states of T5,
before encoder_hid_proj), with the largest error of torch in f32, f16 and bf16; `texts` whose prompts stand in text.safetensors as
MODEL.*; `runs` one file each, computed in f64 (tables, draws and PIL's resize stay f32). The tensors of a run, all NCHW:

    timesteps          one per evaluation, over all stages
    alpha_bar          [stages, 1000], re-scheduled where the stage is (of two runs)
    step<n>            the sample after the n-th update, from 1
    relay<k>.x0        the thresholded x0 that leaves a stage; k is the stage entered, from 1 = the second
    relay<k>.upsampled resized by PIL's bicubic, clamped to [-1, 1]
    relay<k>.noised    what the stage starts from
    cond<k>            stage II: the low resolution as the UNet of stage k reads it, from 0 = the first
    image              the picture, not clamped: the last sample (plain), the last x0 (MegaFusion)

Draws of a stage: x_T or the relay's noise; of stage II that of the low resolution; then one of every step with a variance (DDPM: all
but that of t = 0). Prompts are lower case and stripped before they are cut to 77 tokens; T5 is told which are padding, the UNet is not.

MegaFusion (Wu et al., WACV 2025, arXiv:2408.11001) has no published code for IF. Between stages there is no VAE:
    x = sqrt(abar) clamp(bicubic(x0)) + sqrt(1 - abar) n,   abar of the next step's timestep, re-scheduled where asked
and stage II noises the low resolution, resized to the stage with aligned corners, anew in every stage; that noise's level is of
image_noising_scheduler's own table. `--scheduler ddim` drops the predicted variance. Plain runs are compared with IFPipeline and
IFSuperResolutionPipeline on the same seed, but those of `i-clip`: the pipelines want a predicted variance whatever the scheduler.

What is published. UNets of IF-I-XL and IF-II-L as people saved them again (huggingface.co: lucostiguy11/dreambooth_if,
williamberman/dreambooth_me_upscale); both have act_fn gelu, addition_embed_type text with 64 heads, attention_head_dim 64,
cross_attention_norm group_norm (of 32 groups, whatever norm_num_groups says), encoder_hid_dim 4096 as text_proj, flip_sin_to_cos,
freq_shift 0, norm_eps 1e-5, norm_num_groups 32, only_cross_attention false, mid_block_only_cross_attention null, out_channels 6,
resnet_time_scale_shift scale_shift.
    IF-I-XL  704, 1408, 2112, 2816; layers 3; attention in all levels but the first; cross_attention_dim 2816; in_channels 3; sample 64
    IF-II-L  160, 320, 640, 960, 1280; layers 2, 2, 3, 5, 5; attention in the last two levels; cross_attention_dim 1280; in_channels 6;
             class_embed_type timestep; resnet_skip_time_act; mid_block_scale_factor and resnet_out_scale_factor 1.4142271248762552
diffusers' convert_if.py adds for stage II time_embedding_dim (the last channels) and time_embedding_act_fn gelu; it, too, says the
schedulers: DDPM, squaredcos_cap_v2, learned_range, thresholding of ratio 0.95 with a sample_max_value of 1.5 (I) or 1.0 (II), and for
the low resolution squaredcos_cap_v2 alone.
"""

import copy
import json
import pathlib
import shutil

import diffusers
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel, T5Tokenizer

import drawn
import reference
import resize
import small_models
from module_values import normal, relative, set_mid_dilation

DATA = pathlib.Path(__file__).resolve().parents[2] / "tests/data"
ROOT = DATA / "if"
LENGTH = 77
OUT_SCALE = 1.4142271248762552
DOWN = {"R": "ResnetDownsampleBlock2D", "S": "SimpleCrossAttnDownBlock2D"}
UP = {"R": "ResnetUpsampleBlock2D", "S": "SimpleCrossAttnUpBlock2D"}
COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
NOISING = {"_class_name": "DDPMScheduler", **COSINE}


def unet(levels, channels, layers, head, cross, size, stage=1, **more):
    """levels: R or S of each, the highest resolution first."""
    return {"sample_size": size, "in_channels": 3 * stage, "out_channels": 6, "block_out_channels": channels, "layers_per_block": layers,
            "down_block_types": [DOWN[kind] for kind in levels], "up_block_types": [UP[kind] for kind in reversed(levels)],
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "attention_head_dim": head, "cross_attention_dim": cross,
            "act_fn": "gelu", "addition_embed_type": "text", "cross_attention_norm": "group_norm", "norm_num_groups": 4,
            "resnet_time_scale_shift": "scale_shift"} | more


def second(time, **more):
    """What stage II has beside the same."""
    return {"class_embed_type": "timestep", "time_embedding_dim": time, "time_embedding_act_fn": "gelu", "resnet_skip_time_act": True,
            "resnet_out_scale_factor": OUT_SCALE, "mid_block_scale_factor": OUT_SCALE, **more}


def ddpm(largest, **more):
    return {"_class_name": "DDPMScheduler", **COSINE, "variance_type": "learned_range", "prediction_type": "epsilon", "clip_sample": True,
            "thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": largest, **more}


def t5(width, **more):
    return {"vocab_size": 256, "d_model": width, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 3,
            "feed_forward_proj": "gated-gelu", **more}


MODELS = {
    # IF-I-XL in small: attention in all levels but the first. Text of one channel in a group of its norm would be ill-conditioned:
    # the padding of an empty prompt is 76 nearly equal tokens.
    "i-xl": {
        "seed": 401, "tokenizer": "spiece", "text": t5(24), "scheduler": ddpm(1.5),
        "unet": unet("RSSS", [8, 16, 24, 32], 1, 8, 64, 16, encoder_hid_dim=24, encoder_hid_dim_type="text_proj",
                     addition_embed_type_num_heads=4),
    },
    # Lists; no projection of the text, whose pooling has the default of 64 heads; the text alone is attended to.
    "i-lists": {
        "seed": 402, "tokenizer": "tokenizer", "text": t5(64, num_layers=1), "scheduler": ddpm(1.5),
        "unet": unet("SRS", [8, 12, 16], [1, 2, 1], 4, 64, 12, only_cross_attention=True),
    },
    # Some levels attend to the text alone, among them the middle; the type of the projection is not named; narrow heads; ratios.
    "i-two": {
        "seed": 403, "tokenizer": "spiece", "text": t5(40, num_heads=2), "scheduler": ddpm(1.2, dynamic_thresholding_ratio=0.9),
        "unet": unet("SS", [16, 8], 2, 2, 96, 8, encoder_hid_dim=40, addition_embed_type_num_heads=5, only_cross_attention=[False, True],
                     mid_block_only_cross_attention=True, norm_num_groups=8),
    },
    # No predicted variance: x0 is clipped, the variance is a table's. No attention in the last level.
    "i-clip": {
        "seed": 404, "tokenizer": "spiece", "text": t5(32),
        "scheduler": {"_class_name": "DDPMScheduler", **COSINE, "variance_type": "fixed_small", "prediction_type": "epsilon",
                      "clip_sample": True},
        "unet": unet("RSR", [8, 8, 16], 1, 8, 64, 16, out_channels=3, encoder_hid_dim=32, addition_embed_type_num_heads=8,
                     norm_num_groups=2, mid_block_only_cross_attention=False),
    },
    # IF-II-L in small, in f16.
    "ii-l": {
        "seed": 405, "tokenizer": "spiece", "text": t5(24), "scheduler": ddpm(1.0), "noising": NOISING, "dtype": torch.float16,
        "unet": unet("RRSS", [8, 8, 16, 24], [1, 1, 2, 1], 8, 128, 16, 2, encoder_hid_dim=24, encoder_hid_dim_type="text_proj",
                     addition_embed_type_num_heads=6, **second(24)),
    },
    # Text alone, not projected; another table of the low resolution.
    "ii-only": {
        "seed": 406, "tokenizer": "tokenizer", "text": t5(64, num_layers=1), "scheduler": ddpm(1.0),
        "noising": {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 0.0001,
                    "beta_end": 0.02},
        "unet": unet("RSS", [8, 12, 16], [2, 1, 1], 4, 64, 16, 2, only_cross_attention=True, addition_embed_type_num_heads=2, **second(16)),
    },
    # The embedding's activation in every block and before; the middle's factor is not the others'.
    "ii-factors": {
        "seed": 407, "tokenizer": "spiece", "text": t5(40, num_heads=2), "scheduler": ddpm(1.0), "noising": NOISING,
        "unet": unet("RS", [8, 16], 2, 16, 64, 16, 2, encoder_hid_dim=40, addition_embed_type_num_heads=5,
                     **second(20, resnet_skip_time_act=False, mid_block_scale_factor=1.25, resnet_out_scale_factor=1.5)),
    },
    # Neither activation nor width of the embedding is named; attention in the first level alone; a larger bound.
    "ii-bare": {
        "seed": 408, "tokenizer": "spiece", "text": t5(32), "scheduler": ddpm(2.0), "noising": NOISING,
        "unet": unet("SRR", [8, 16, 8], 1, 4, 96, 20, 2, encoder_hid_dim=32, addition_embed_type_num_heads=4, class_embed_type="timestep",
                     resnet_out_scale_factor=OUT_SCALE),
    },
}

CAT = "a photo of a cat"
LONG = "An old House by the Sea, oil on canvas; " * 5 + "A Lighthouse, two cats and a red fox.  "

# Name: model, settings. A run without `size` is of the UNet's sample_size, one of stage II without `noise_level` of 250.
RUNS = {
    "plain": ("i-xl", {"method": "plain", "steps": 4, "guidance": 3.0, "seed": 1}),
    "plain-unguided": ("i-two", {"method": "plain", "size": (12, 8), "steps": 3, "guidance": 1.0, "seed": 2}),
    "plain-cut": ("i-lists", {"method": "plain", "size": (8, 12), "steps": 3, "guidance": 2.0, "seed": 3, "prompt": LONG,
                              "negative": " Blurry, LOW quality"}),
    "plain-many": ("i-two", {"method": "plain", "size": (6, 6), "steps": 25, "guidance": 1.5, "seed": 4}),
    "plain-ddim": ("i-xl", {"method": "plain", "size": (8, 16), "steps": 3, "guidance": 3.0, "seed": 5, "scheduler": "ddim"}),
    "plain-clip": ("i-clip", {"method": "plain", "size": (16, 12), "steps": 4, "guidance": 2.0, "seed": 6}),
    "mega": ("i-xl", {"method": "megafusion", "stages": (((16, 16), 3), ((24, 32), 2)), "guidance": 3.0, "seed": 7}),
    "mega-plus": ("i-lists", {"method": "megafusion++", "stages": (((12, 12), 2), ((16, 20), 2), ((20, 24), 1)), "guidance": 2.0, "seed": 8}),
    "mega-unguided": ("i-two", {"method": "megafusion", "stages": (((8, 8), 3), ((12, 10), 2)), "guidance": 1.0, "seed": 9, "reschedule": True}),
    "mega-ddim": ("i-two", {"method": "megafusion++", "stages": (((8, 8), 3), ((14, 16), 2)), "guidance": 2.0, "seed": 10,
                            "scheduler": "ddim"}),
    "mega-clip": ("i-clip", {"method": "megafusion++", "stages": (((12, 16), 2), ((20, 24), 2)), "guidance": 2.0, "seed": 11,
                             "dilation": 1}),
    "ii-plain": ("ii-l", {"method": "plain", "steps": 3, "guidance": 3.0, "seed": 12, "lowres": "lowres.png"}),
    "ii-level-0": ("ii-only", {"method": "plain", "size": (16, 16), "steps": 3, "guidance": 1.0, "seed": 13, "lowres": "lowres.png",
                               "noise_level": 0}),
    "ii-wide": ("ii-factors", {"method": "plain", "size": (20, 12), "steps": 4, "guidance": 2.0, "seed": 14, "lowres": "lowres-wide.png",
                               "noise_level": 100, "negative": "a dog"}),
    "ii-ddim": ("ii-bare", {"method": "plain", "size": (16, 12), "steps": 3, "guidance": 2.0, "seed": 15, "lowres": "lowres-wide.png",
                            "scheduler": "ddim"}),
    "ii-mega": ("ii-l", {"method": "megafusion", "stages": (((16, 16), 2), ((24, 32), 2)), "guidance": 3.0, "seed": 16,
                         "lowres": "lowres.png"}),
    "ii-mega-plus": ("ii-only", {"method": "megafusion++", "stages": (((12, 12), 2), ((16, 16), 1), ((20, 24), 1)), "guidance": 2.0, "seed": 17,
                                 "lowres": "lowres.png", "noise_level": 250}),
    "ii-mega-wide": ("ii-bare", {"method": "megafusion", "stages": (((16, 12), 2), ((28, 20), 2)), "guidance": 1.0, "seed": 18,
                                 "lowres": "lowres-wide.png", "noise_level": 0}),
}
WITH_TABLES = {"plain", "mega-plus"}
# A model and a prompt; the second one is cut.
TEXTS = {"i-xl": CAT, "i-lists": LONG.lower().strip()}


class Settings(reference.Settings):
    lowres, noise_level = None, 250

    def __init__(self, lowres=None, noise_level=250, **changes):
        super().__init__(**changes)
        self.lowres, self.noise_level = lowres, noise_level


class Model:
    def modules(self):
        return self.text, self.unet

    def to(self, dtype):
        for module in self.modules():
            module.to(dtype)
        return self


def build(name):
    spec, folder, model = MODELS[name], ROOT / name, Model()
    model.name, model.spec, model.second = name, spec, "noising" in spec
    dtype = spec.get("dtype", torch.float32)
    for part in "tokenizer", "text_encoder", "unet", "scheduler":
        (folder / part).mkdir(parents=True)
    if spec["tokenizer"] == "spiece":
        shutil.copy(DATA / "t5/tokenizer/plain.model", folder / "tokenizer/spiece.model")
    else:
        shutil.copy(DATA / "t5/tokenizer/plain.tokenizer.json", folder / "tokenizer/tokenizer.json")
    extra = 0 if spec["tokenizer"] == "spiece" else 100
    small_models.write_json(folder / "tokenizer/tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": extra})
    model.tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer")
    if extra:
        # As wide as the tokenizer with its further tokens, as published.
        spec["text"] = spec["text"] | {"vocab_size": 352}
    assert len(model.tokenizer) <= spec["text"]["vocab_size"], len(model.tokenizer)
    model.text = T5EncoderModel(T5Config(**spec["text"]))
    known = {"architectures": ["T5EncoderModel"], "model_type": "t5"}
    small_models.write_json(folder / "text_encoder/config.json", known | spec["text"])
    model.unet = diffusers.UNet2DConditionModel(**spec["unet"])
    small_models.write_json(folder / "unet/config.json", {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.16.0.dev0",
                                                          **spec["unet"]})
    small_models.write_json(folder / "scheduler/scheduler_config.json", spec["scheduler"])
    index = {"_class_name": "IFSuperResolutionPipeline" if model.second else "IFPipeline", "_diffusers_version": "0.16.0.dev0",
             "feature_extractor": [None, None], "requires_safety_checker": False, "safety_checker": [None, None],
             "scheduler": ["diffusers", "DDPMScheduler"], "text_encoder": ["transformers", "T5EncoderModel"],
             "tokenizer": ["transformers", "T5Tokenizer"], "unet": ["diffusers", "UNet2DConditionModel"], "watermarker": [None, None]}
    if model.second:
        (folder / "image_noising_scheduler").mkdir()
        small_models.write_json(folder / "image_noising_scheduler/scheduler_config.json", spec["noising"])
        index["image_noising_scheduler"] = ["diffusers", "DDPMScheduler"]
    if name == "i-xl":
        # As published; copies often lack these folders.
        index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"], "requires_safety_checker": True,
                  "safety_checker": ["deepfloyd_if", "IFSafetyChecker"], "watermarker": ["deepfloyd_if", "IFWatermarker"]}
    small_models.write_json(folder / "model_index.json", index)

    small_models.fill(model.text, spec["seed"], "text_encoder", dtype)
    # One tensor under two names.
    shared = small_models.draw(spec["seed"], "text_encoder.shared.weight", model.text.shared.weight).to(dtype).float()
    model.text.load_state_dict(model.text.state_dict() | {"shared.weight": shared, drawn.TWIN: shared})
    small_models.fill(model.unet, spec["seed"], "unet", dtype)
    for part, stem, module in ("text_encoder", "model", model.text), ("unet", "diffusion_pytorch_model", model.unet):
        drawn.write(folder / part, stem, drawn.Described(module.state_dict(), module.config), spec["seed"], part, dtype)
    return model


def tokens(model, prompt):
    """(ids, mask) of 77 tokens"""
    found = model.tokenizer([prompt.lower().strip()], padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    return found.input_ids, found.attention_mask


def encode(model, prompt):
    ids, mask = tokens(model, prompt)
    return model.text(input_ids=ids, attention_mask=mask).last_hidden_state


def scheduler_of(model, name, gamma):
    config = {k: v for k, v in model.spec["scheduler"].items() if k[0] != "_"}
    if name == "ddim":
        scheduler = diffusers.DDIMScheduler.from_config(config | {"variance_type": "fixed_small"})
    else:
        scheduler = diffusers.DDPMScheduler(**config)
    if gamma != 1:
        a = scheduler.alphas_cumprod.double()
        scheduler.alphas_cumprod = (a / (gamma - (gamma - 1) * a)).float()
    return scheduler


def picture(name, dtype):
    levels = np.array(Image.open(ROOT / name)).astype(np.float32) / 127.5 - 1.0
    return torch.from_numpy(levels.transpose(2, 0, 1))[None].to(dtype)


def condition(model, settings, size, draws):
    """The low resolution at a stage's size (width, height), noised."""
    noising = diffusers.DDPMScheduler(**{k: v for k, v in model.spec["noising"].items() if k[0] != "_"})
    low = picture(settings.lowres, model.unet.dtype)
    up = torch.nn.functional.interpolate(low, size[::-1], mode="bilinear", align_corners=True)
    return noising.add_noise(up, draws.normal(up.shape), torch.tensor([settings.noise_level]))


@torch.no_grad()
def run(model, settings):
    tensors = {}
    draws = reference.Draws(settings.seed, tensors, model.unet.dtype)
    native = model.unet.config.sample_size
    stages = settings.stages or ((settings.size or (native, native), settings.steps),)
    plus, total = settings.method == "megafusion++", sum(steps for _, steps in stages)
    reschedule = plus if settings.reschedule is None else settings.reschedule
    dilation = (2 if plus else 1) if settings.dilation is None else settings.dilation
    first = stages[0][0]
    sampler, schedulers = settings.scheduler or "ddpm", []
    for s, ((w, h), _) in enumerate(stages):
        gamma = w * h / (first[0] * first[1]) if reschedule and s > 0 else 1
        schedulers.append(scheduler_of(model, sampler, gamma))
        schedulers[-1].set_timesteps(total)
    timesteps = schedulers[0].timesteps
    tensors["timesteps"] = timesteps.float()
    tensors["alpha_bar"] = torch.stack([scheduler.alphas_cumprod for scheduler in schedulers])
    prompts = [settings.prompt]
    if settings.guidance > 1:
        prompts.insert(0, settings.negative or "")
    embeds = torch.cat([encode(model, prompt) for prompt in prompts])
    labels = {"class_labels": torch.tensor([settings.noise_level] * len(prompts))} if model.second else {}
    x = draws.normal((1, 3, first[1], first[0]))
    x0, low, done = None, None, 0
    for s, (size, steps) in enumerate(stages):
        scheduler = schedulers[s]
        if s > 0:
            up = resize.upsample(x0, size[::-1], "bicubic").clamp(-1, 1)
            x = scheduler.add_noise(up, draws.normal(up.shape), timesteps[done : done + 1])
            tensors |= {f"relay{s}.x0": x0, f"relay{s}.upsampled": up, f"relay{s}.noised": x}
        if model.second:
            low = condition(model, settings, size, draws)
            tensors[f"cond{s}"] = low
        set_mid_dilation(model.unet, dilation if s > 0 else 1)
        for i in range(done, done + steps):
            told = x if low is None else torch.cat([x, low], 1)
            out = model.unet(torch.cat([told] * len(prompts)), timesteps[i], encoder_hidden_states=embeds, **labels).sample
            noise, variance = out[:, :3], out[-1:, 3:]
            if len(prompts) > 1:
                noise = noise[:1] + settings.guidance * (noise[1:] - noise[:1])
            if scheduler.config.variance_type == "learned_range":
                noise = torch.cat([noise, variance], 1)
            stepped = reference.step(scheduler, sampler, noise, timesteps[i], x, draws, 0.0)
            x, x0 = stepped.prev_sample, stepped.pred_original_sample
            tensors[f"step{i + 1}"] = x
        done += steps
    set_mid_dilation(model.unet, 1)
    tensors["image"] = x if settings.method == "plain" else x0
    return tensors


def check_published(model, settings, image):
    """The published pipeline makes the same picture of the same seed, drawing for itself."""
    parts = {"tokenizer": model.tokenizer, "text_encoder": model.text, "unet": model.unet, "safety_checker": None,
             "feature_extractor": None, "watermarker": None, "requires_safety_checker": False,
             "scheduler": scheduler_of(model, settings.scheduler or "ddpm", 1)}
    more = {}
    if model.second:
        noising = {k: v for k, v in model.spec["noising"].items() if k[0] != "_"}
        pipeline = diffusers.IFSuperResolutionPipeline(image_noising_scheduler=diffusers.DDPMScheduler(**noising), **parts)
        more = {"image": Image.open(ROOT / settings.lowres), "noise_level": settings.noise_level}
    else:
        pipeline = diffusers.IFPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    w, h = settings.size or (None, None)
    got = pipeline(prompt=settings.prompt, negative_prompt=settings.negative, height=h, width=w, num_inference_steps=settings.steps,
                   guidance_scale=settings.guidance, generator=torch.Generator().manual_seed(settings.seed), output_type="pt",
                   clean_caption=False, **more).images
    error = relative(got, image)
    assert error < 1e-6, (model.name, error)
    return error


def write_pictures():
    for seed, (name, size) in enumerate({"lowres.png": (8, 8), "lowres-wide.png": (10, 6)}.items()):
        rough = normal(5000 + seed, 1, 3, 4, 5)
        smooth = torch.nn.functional.interpolate(rough, size[::-1], mode="bilinear", align_corners=False)[0]
        levels = (smooth * 60 + 128).clamp(0, 255).round().to(torch.uint8)
        Image.fromarray(levels.permute(1, 2, 0).numpy()).save(ROOT / name)


@torch.no_grad()
def unet_values(models):
    """(cases, tensors): a square and a wide size, one and two timesteps in a call, and a dilated middle."""
    cases, tensors = [], {}
    table = [("square", 1, 1, [501.0, 501.0], [250, 250], 1, 9), ("wide", 2, 1, [999.0, 20.0], [0, 250], 1, 5),
             ("dilated", 2, 3, [181.0, 181.0], [100, 100], 2, 7)]
    for m, (name, model) in enumerate(models.items()):
        config = model.unet.config
        smallest = max(4, 2 ** (len(config.block_out_channels) - 1))
        for i, (case, w, h, t, labels, dilation, length) in enumerate(table):
            seed = 6000 + 10 * m + i
            inputs = {"sample": normal(seed, 2, config.in_channels, h * smallest, w * smallest), "timestep": torch.tensor(t),
                      "prompt_embeds": normal(seed + 500, 2, length, config.encoder_hid_dim or config.cross_attention_dim)}
            if model.second:
                inputs["class_labels"] = torch.tensor(labels, dtype=torch.float32)

            def call(unet):
                dtype = unet.dtype
                more = {"class_labels": inputs["class_labels"]} if model.second else {}
                set_mid_dilation(unet, dilation)
                out = unet(inputs["sample"].to(dtype), inputs["timestep"], encoder_hidden_states=inputs["prompt_embeds"].to(dtype), **more).sample
                set_mid_dilation(unet, 1)
                return out

            out = call(copy.deepcopy(model.unet).double())
            types = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
            errors = {key: float(f"{relative(call(copy.deepcopy(model.unet).to(dtype)), out):.1e}") for key, dtype in types.items()}
            assert errors["f32"] < 1e-5, (name, case, errors)
            cases.append({"model": f"if/{name}", "name": f"{name}.{case}", "dilation": dilation, "torch_error": errors})
            tensors |= {f"{name}.{case}.{key}": value for key, value in (inputs | {"out": out}).items()}
            print(name, case, list(out.shape), errors)
    return cases, tensors


@torch.no_grad()
def text_values(models):
    cases, tensors = [], {}
    for name, prompt in TEXTS.items():
        ids, mask = tokens(models[name], prompt)
        hidden = encode(models[name].to(torch.float64), prompt)
        models[name].to(torch.float32)
        tensors |= {f"{name}.t5.input_ids": ids, f"{name}.t5.attention_mask": mask, f"{name}.t5.last_hidden_state": hidden}
        cases.append({"model": f"if/{name}", "name": name, "prompt": prompt})
        print(name, "tokens:", int(mask.sum()))
    return cases, tensors


def save(tensors, name):
    kept = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    assert all(torch.isfinite(v).all() for v in kept.values() if v.is_floating_point()), name
    save_file({k: v.contiguous().clone() for k, v in kept.items()}, ROOT / f"{name}.safetensors")


def main():
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir(parents=True)
    write_pictures()
    models = {name: build(name) for name in MODELS}
    unets, tensors = unet_values(models)
    save(tensors, "unets")
    texts, tensors = text_values(models)
    save(tensors, "text")
    listed = []
    for name, (on, changes) in RUNS.items():
        model, changes = models[on], {"prompt": CAT} | changes
        settings = Settings(**{"size": None} | changes)
        tensors = run(model.to(torch.float64), settings)
        kept = {k: v for k, v in tensors.items() if not k.startswith("noise") and (k != "alpha_bar" or name in WITH_TABLES)}
        in_f32 = run(model.to(torch.float32), settings)
        error = max(relative(in_f32[key], kept[key]) for key in kept)
        assert error < 1e-4, (name, error)
        note = ""
        if settings.method == "plain" and model.unet.config.out_channels == 6:
            note = f"published pipeline: {check_published(model, settings, in_f32['image']):.1e}"
        save(kept, name)
        listed.append({"name": name, "model": f"if/{on}", "args": settings.args(changes), "f32_error": float(f"{error:.1e}")})
        print(name, f"torch in f32: {error:.1e}", f"image up to {float(kept['image'].abs().max()):.2f}", note)
    line = lambda entry: " " + json.dumps(entry)
    lists = {"unets": unets, "texts": texts, "runs": listed}
    text = ",\n".join(f'"{key}": [\n' + ",\n".join(map(line, entries)) + "\n]" for key, entries in lists.items())
    (ROOT / "runs.json").write_text("{\n" + text + "\n}\n")


if __name__ == "__main__":
    main()
