"""Whole runs: which settings there are, and their expected tensors (reference.py says under which names)."""

import copy
import json
import pathlib

import torch
from safetensors.torch import save_file

import multidiffusion
import reference
from module_values import relative

CAT = "a photo of a cat"
TWO = (((16, 16), 3), ((24, 24), 2))
THREE = (((16, 16), 2), ((20, 20), 2), ((24, 24), 1))
FOX = "The quick brown fox, oil on canvas"
# The most f32 may differ from f64 in a run that is kept: a test that allows 1e-4 then has room for one more program. How
# far it is depends on the processor: mega-plus-four-levels is 2.7e-5 on one and 6e-5 on another.
F32_LIMIT = 7e-5
# Except here: the first of these steps takes a difference of numbers near sigma = 4096. Tests allow 2.5 times f32_error.
ILL_CONDITIONED = {"sdxl-plain-v-zero-snr-euler", "zero-snr-plain-euler"}
# Stored with all that a run dumps: among them they have every table of noise levels, every kind of draw and every relay.
# The others are stored without what shows in the tensors that follow: see `stored`.
WHOLE = {
    "plain-ddim", "plain-euler-ancestral", "plain-eta", "plain-defaults", "sdxl-plain", "sdxl-plain-v-zero-snr",
    "zero-snr-plain-euler", "scheduler-sigmoid", "mega-two", "mega-three", "mega-eta", "mega-bilinear", "mega-bicubic",
    "mega-bicubic-torch", "mega-bicubic-gaussian", "mega-bicubic-edge", "mega-edge-clamp-none", "mega-clamp-none",
    "mega-clamp-decode", "mega-clamp-both", "mega-defaults", "mega-plus", "mega-plus-three", "mega-plus-no-scheduler",
    "mega-plus-sd21", "mega-plus-defaults", "mega-plus-mixed", "sdxl-mega-eta", "sdxl-mega-plus-three-ids",
    "zero-snr-mega-plus", "compat", "compat-reschedule", "compat-plus", "hi-sdxl", "multidiffusion", "sdxl-demofusion",
}
# Where unet_options.py writes its UNets.
UNETS = pathlib.Path(__file__).resolve().parents[2] / "tests/data"


def runs():
    """name -> (model, settings that differ from the defaults)"""
    out = {}
    # Plain: each sampler, each model.
    for sampler in reference.SAMPLERS:
        out[f"plain-{sampler}"] = ("sd15", {"method": "plain", "size": (16, 16), "steps": 4, "scheduler": sampler,
                                            "seed": 11})
    for model in ("sd21", "four-levels", "no-quant", "defaults", "mixed", "wide"):
        size = {"four-levels": (40, 32), "sd21": (20, 16), "defaults": (9, 8)}.get(model, (18, 16))
        # The program takes no-quant's Euler-ancestral with trailing timesteps for a model without guidance.
        more = {"guidance": 7.0} if model == "no-quant" else {}
        plain = {"method": "plain", "size": size, "steps": 3, "scheduler": "ddim", "seed": 5}
        out[f"plain-{model}"] = (model, plain | more)
    out["plain-sd21-euler"] = ("sd21", {"method": "plain", "size": (16, 16), "steps": 3, "scheduler": "euler"})
    out["plain-four-levels-euler-linspace"] = (
        "four-levels", {"method": "plain", "size": (32, 32), "steps": 3, "scheduler": "euler"})
    out["plain-no-quant-euler-trailing"] = (
        "no-quant", {"method": "plain", "size": (16, 16), "steps": 3, "scheduler": "euler", "guidance": 7.0})
    out["plain-wide-euler-ancestral"] = (
        "wide", {"method": "plain", "size": (16, 16), "steps": 3, "scheduler": "euler-ancestral"})
    out["plain-mixed-ddpm"] = ("mixed", {"method": "plain", "size": (16, 16), "steps": 3, "scheduler": "ddpm"})
    plain = {"method": "plain", "size": (26, 18), "steps": 3, "scheduler": "ddim"}
    out |= {
        "plain-odd": ("sd15", plain | {"seed": 3}),
        "plain-eta": ("sd15", plain | {"eta": 0.7}),
        "plain-guidance-1": ("sd15", plain | {"guidance": 1.0}),
        "plain-guidance-half": ("sd15", plain | {"guidance": 0.5}),
        "plain-negative": ("sd15", plain | {"negative": "blurry, low quality"}),
        "plain-seed-large": ("sd15", plain | {"seed": 2**40 + 5}),
        "plain-one-step": ("sd15", plain | {"steps": 1}),
        "plain-fifty": ("sd15", {"method": "plain", "size": (6, 6), "steps": 50, "scheduler": "ddim"}),
    }
    for model, config in [("four-levels", "euler"), ("mixed", "ddpm"), ("sd21", "ddim")]:
        size = {"four-levels": (32, 24)}.get(model, (16, 16))
        out[f"plain-own-{config}"] = (model, {"method": "plain", "size": size, "steps": 3, "seed": 2, "guidance": 3.0})
    # MegaFusion, one option at a time.
    # Guidance multiplies rounding by about 2w: most runs take less than the default of 7.
    mega = {"method": "megafusion", "stages": TWO, "seed": 9, "guidance": 2.5}
    out |= {
        "mega-two": ("sd15", mega),
        "mega-three": ("sd15", mega | {"stages": THREE}),
        "mega-one-stage": ("sd15", mega | {"stages": (((16, 16), 4),)}),
        "mega-same-size": ("sd15", mega | {"stages": (((16, 16), 2), ((16, 16), 2))}),
        "mega-wide": ("sd15", mega | {"stages": (((24, 16), 2), ((36, 20), 2))}),
        "mega-tall": ("sd15", mega | {"stages": (((14, 22), 2), ((18, 34), 1), ((22, 42), 1))}),
        "mega-guidance-default": ("sd15", {k: v for k, v in mega.items() if k != "guidance"}),
        "mega-guidance-1": ("sd15", mega | {"guidance": 1.0}),
        "mega-negative": ("sd15", mega | {"negative": "text, watermark", "guidance": 3.5}),
        "mega-eta": ("sd15", mega | {"eta": 0.5}),
        "mega-reschedule": ("sd15", mega | {"reschedule": True}),
        "mega-dilation": ("sd15", mega | {"dilation": 2}),
        "mega-dilation-3": ("sd15", mega | {"dilation": 3}),
        "mega-offset": ("sd15", mega | {"relay_noise_offset": 1}),
        "mega-offset-reschedule": ("sd15", mega | {"relay_noise_offset": 1, "reschedule": True}),
        "mega-clamp-none": ("sd15", mega | {"relay_clamp": "none"}),
        "mega-clamp-decode": ("sd15", mega | {"relay_clamp": "decode"}),
        "mega-clamp-both": ("sd15", mega | {"relay_clamp": "both"}),
        "mega-plus": ("sd15", mega | {"method": "megafusion++"}),
        "mega-plus-three": ("sd15", mega | {"method": "megafusion++", "stages": THREE}),
        "mega-plus-no-reschedule": ("sd15", mega | {"method": "megafusion++", "reschedule": False}),
        "mega-plus-no-dilation": ("sd15", mega | {"method": "megafusion++", "dilation": 1}),
        "mega-plus-eta-negative": ("sd15", mega | {"method": "megafusion++", "stages": THREE, "eta": 1.0,
                                                   "negative": "blurry", "prompt": FOX}),
    }
    for upsampler in ("bilinear", "bicubic", "bicubic-torch", "bicubic-gaussian", "bicubic-edge"):
        out[f"mega-{upsampler}"] = ("sd15", mega | {"upsampler": upsampler})
    out["mega-edge-clamp-none"] = ("sd15", mega | {"upsampler": "bicubic-edge", "relay_clamp": "none"})
    for sampler in ("euler", "euler-ancestral", "ddpm"):
        out[f"mega-plus-{sampler}"] = ("sd15", mega | {"method": "megafusion++", "scheduler": sampler})
    far = {"method": "megafusion++", "stages": (((24, 24), 2), ((32, 40), 1)), "guidance": 1.0, "seed": 4}
    out["mega-plus-four-levels-euler"] = ("four-levels", far | {"scheduler": "euler"})
    out["mega-plus-no-scheduler"] = ("four-levels", far)
    # The published code's quirks.
    # 8-bit pictures: a value close to half a level falls to either side in f32, so small pictures, and seeds
    # (found by trying) with which none comes close; write() checks.
    small, smaller = (((8, 8), 2), ((12, 12), 2)), (((6, 6), 2), ((8, 10), 1), ((12, 14), 1))
    compat = mega | {"reference_compat": True, "stages": small, "guidance": 1.5}
    out |= {
        "compat": ("sd15", compat | {"seed": 1}),
        "compat-reschedule": ("sd15", compat | {"seed": 1, "reschedule": True, "stages": (((8, 8), 2), ((12, 10), 2))}),
        "compat-plus": ("sd15", compat | {"seed": 2, "method": "megafusion++", "stages": smaller}),
        "compat-bilinear": ("sd15", compat | {"seed": 1, "upsampler": "bilinear"}),
        "compat-eta": ("sd15", compat | {"seed": 1, "eta": 0.5}),
    }
    # Every model once: prediction types, VAE factors 1 to 8, set_alpha_to_one.
    for model, stages in {
        "sd21": (((16, 16), 2), ((24, 20), 2)),
        "four-levels": (((32, 32), 2), ((48, 40), 1)),
        "no-quant": (((16, 16), 2), ((24, 24), 1)),
        "defaults": (((8, 8), 2), ((12, 10), 2)),
        "mixed": (((16, 16), 2), ((22, 18), 1)),
        "wide": (((16, 16), 2), ((24, 24), 1)),
    }.items():
        out[f"mega-plus-{model}"] = (model, {"method": "megafusion++", "stages": stages, "seed": 21, "prompt": FOX,
                                       "guidance": 1.5, "scheduler": "ddim"})
        out[f"mega-{model}"] = (model, {"method": "megafusion", "stages": stages, "seed": 22, "guidance": 2.0,
                                     "scheduler": "ddim"})
    return out | sdxl_runs() | zero_snr_runs() | rescale_runs() | view_runs() | hidiffusion_runs() | pixelrush_runs() | diffusehigh_runs() | upsample_guidance_runs() | cache_runs() | composed_runs() | scalecrafter_runs() | scalediff_runs() | frecas_runs() | fouriscale_runs()


def sdxl_runs():
    """Guidance is always named, and stays small: it multiplies rounding."""
    plain = {"method": "plain", "size": (16, 16), "steps": 3, "guidance": 2.0, "seed": 31}
    mega = {"method": "megafusion", "stages": TWO, "scheduler": "ddim", "guidance": 1.5, "seed": 32}
    plus = mega | {"method": "megafusion++"}
    ids = {"original_size": (40, 24), "crop": (5, 3), "target_size": (32, 48)}
    out = {
        # Without --scheduler: Euler, as the config says.
        "sdxl-plain": ("sdxl", plain),
        "sdxl-plain-ddim": ("sdxl", plain | {"scheduler": "ddim"}),
        "sdxl-plain-wide": ("sdxl", plain | {"size": (24, 16), "prompt": FOX}),
        "sdxl-plain-odd": ("sdxl", plain | {"size": (18, 26), "scheduler": "ddim"}),
        "sdxl-plain-guidance-1": ("sdxl", plain | {"guidance": 1.0}),
        "sdxl-plain-negative": ("sdxl", plain | {"negative": "blurry, low quality"}),
        "sdxl-plain-negative-empty": ("sdxl", plain | {"negative": ""}),
        "sdxl-plain-original-size": ("sdxl", plain | {"original_size": (40, 24)}),
        "sdxl-plain-crop": ("sdxl", plain | {"crop": (5, 3)}),
        "sdxl-plain-target-size": ("sdxl", plain | {"target_size": (32, 48)}),
        "sdxl-plain-encoded-negative": ("sdxl-encoded-negative", plain),
        "sdxl-plain-encoded-negative-given": ("sdxl-encoded-negative", plain | {"negative": "text, watermark", **ids}),
        "sdxl-plain-turbo": ("sdxl-turbo", plain | {"steps": 2, "guidance": 0.0}),
        "sdxl-plain-turbo-one-step": ("sdxl-turbo", plain | {"steps": 1, "guidance": 0.0, "scheduler": "euler"}),
        "sdxl-plain-v-zero-snr": ("sdxl-v-zero-snr", plain | {"scheduler": "ddim"}),
        "sdxl-plain-v-zero-snr-euler": ("sdxl-v-zero-snr", plain),
        "sdxl-plain-shards": ("sdxl-shards", plain | {"size": (32, 24)}),
        "sdxl-plain-shards-euler": ("sdxl-shards", plain | {"size": (24, 32), "scheduler": "euler"}),
        "sdxl-plain-odd-model": ("sdxl-odd", plain | {"size": (24, 16)}),
        # MegaFusion, one option at a time.
        "sdxl-mega": ("sdxl", mega),
        "sdxl-mega-three": ("sdxl", mega | {"stages": THREE}),
        "sdxl-mega-ids": ("sdxl", mega | ids),
        "sdxl-mega-negative": ("sdxl", mega | {"negative": "blurry"}),
        "sdxl-mega-guidance-1": ("sdxl", mega | {"guidance": 1.0}),
        "sdxl-mega-reschedule": ("sdxl", mega | {"reschedule": True}),
        "sdxl-mega-dilation": ("sdxl", mega | {"dilation": 2}),
        "sdxl-mega-offset": ("sdxl", mega | {"relay_noise_offset": 1}),
        "sdxl-mega-bilinear": ("sdxl", mega | {"upsampler": "bilinear"}),
        "sdxl-mega-clamp-none": ("sdxl", mega | {"relay_clamp": "none"}),
        "sdxl-mega-eta": ("sdxl", mega | {"eta": 0.5}),
        "sdxl-mega-euler": ("sdxl", mega | {"scheduler": "euler"}),
        "sdxl-mega-plus": ("sdxl", plus),
        "sdxl-mega-plus-three-ids": ("sdxl", plus | {"stages": (((16, 16), 2), ((24, 16), 1), ((36, 20), 1)), **ids}),
        "sdxl-mega-plus-euler": ("sdxl", plus | {"scheduler": "euler"}),
        "sdxl-mega-plus-offset": ("sdxl", plus | {"relay_noise_offset": 1}),
        # Every other model once.
        "sdxl-mega-plus-encoded-negative": ("sdxl-encoded-negative", plus | {"prompt": FOX}),
        "sdxl-mega-plus-turbo": ("sdxl-turbo", plus | {"scheduler": "euler-ancestral"}),
        "sdxl-mega-plus-v-zero-snr": ("sdxl-v-zero-snr", plus),
        "sdxl-mega-plus-shards": ("sdxl-shards", plus | {"stages": (((24, 24), 2), ((32, 40), 1))}),
        "sdxl-mega-plus-odd-model": ("sdxl-odd", plus),
        # The published code's quirks; a seed with which no value comes close to half a level.
        "sdxl-compat": ("sdxl", plus | {"reference_compat": True, "stages": (((8, 8), 2), ((12, 12), 2)), "seed": 3}),
    }
    return out


def zero_snr_runs():
    plain = {"method": "plain", "size": (16, 16), "steps": 3, "guidance": 2.0, "seed": 41}
    return {
        "zero-snr-plain": ("zero-snr", plain),
        "zero-snr-plain-euler": ("zero-snr", plain | {"scheduler": "euler"}),
        "zero-snr-mega-plus": ("zero-snr", {"method": "megafusion++", "stages": TWO, "scheduler": "ddim", "guidance": 1.5,
                                            "seed": 42}),
    }


def rescale_runs():
    plain = {"method": "plain", "size": (16, 16), "steps": 2, "guidance_rescale": 0.7, "seed": 51}
    return {
        "plain-rescale": ("sd15", plain | {"scheduler": "ddim"}),
        "sdxl-plain-rescale": ("sdxl", plain | {"guidance": 3.0}),
        "zero-snr-plain-rescale": ("zero-snr", plain | {"guidance": 5.0}),
        "mega-plus-rescale": ("sd15", plain | {"method": "megafusion++", "size": (12, 12), "guidance": 3.0, "steps": 3,
                                               "stages": (((8, 8), 2), ((12, 12), 1))}),
    }


def cache_runs():
    """Options with which some of few steps are left out, on each side of every branch."""
    plain = {"method": "plain", "size": (16, 16), "steps": 10, "scheduler": "ddim", "guidance": 2.0, "seed": 81}
    mega = {"method": "megafusion", "stages": (((12, 12), 7), ((16, 16), 6)), "scheduler": "ddim", "guidance": 2.0,
            "seed": 82}
    cached = lambda name, options="": {"cache": name} | ({"cache_options": options} if options else {})
    return {
        "cache-ucache": ("sd15", plain | cached("ucache", "threshold=1.5")),
        "cache-ucache-sdxl-euler": (
            "sdxl", plain | cached("ucache", "threshold=1.3,start=0,end=1,decay=0.5,relative=0,reset=0")
            | {"scheduler": "euler"}),
        "cache-ucache-mega": ("sd15", mega | cached("ucache", "threshold=2,start=0")),
        "cache-easycache": ("sd15", plain | cached("easycache", "threshold=0.8")),
        "cache-easycache-sd21-euler": ("sd21", plain | cached("easycache", "threshold=0.5,start=0")
                                       | {"scheduler": "euler", "guidance": 1.0}),
        "cache-spectrum": ("sd15", plain | cached("spectrum")),
        "cache-spectrum-sd21-euler-ancestral": (
            "sd21", plain | cached("spectrum", "m=2,lam=0.5,stop=0,warmup=3") | {"scheduler": "euler-ancestral"}),
        "cache-spectrum-sdxl-mega-plus": (
            "sdxl", mega | cached("spectrum", "center=1,warmup=2,w=0.7") | {"method": "megafusion++", "scheduler": "euler"}),
    }


def view_runs():
    """Maps of a few windows; every run small, for each step is many evaluations."""
    multi = {"method": "multidiffusion", "size": (40, 20), "window": 8, "stride": 4, "steps": 2, "guidance": 2.0, "seed": 71}
    demo = {"method": "demofusion", "steps": 2, "guidance": 1.5, "seed": 72}
    return {
        # The last column of windows is aligned to the end; DDIM by default.
        "multidiffusion": ("sd15", multi),
        "multidiffusion-default-windows": ("sd15", {"method": "multidiffusion", "size": (48, 32), "steps": 2,
                                                    "guidance": 2.0, "seed": 73}),
        "multidiffusion-circular": ("sd15", multi | {"size": (48, 20), "circular": True}),
        # Euler, windows in groups, a map smaller than a window along one side; v-prediction.
        "multidiffusion-euler": ("sd21", multi | {"size": (72, 24), "scheduler": "euler", "view_batch": 3}),
        "zero-snr-multidiffusion": ("zero-snr", multi | {"guidance": 4.0, "guidance_rescale": 0.7, "negative": "blurry"}),
        "sdxl-multidiffusion": ("sdxl", multi | {"scheduler": "euler"}),
        # Phases of 8, 16 and 24 cells; groups of 4 windows.
        "sdxl-demofusion": ("sdxl-turbo", demo | {"size": (32, 32)}),
        "sdxl-demofusion-three": ("sdxl-turbo", demo | {"size": (48, 32), "view_batch": 4, "steps": 1}),
        "sdxl-demofusion-ddim": ("sdxl-turbo", demo | {"size": (22, 32), "scheduler": "ddim", "negative": "blurry"}),
        "sdxl-demofusion-compat": ("sdxl-turbo", demo | {"size": (32, 32), "reference_compat": True, "scheduler": "euler",
                                                         "view_batch": 2, "stride": 4}),
        "sdxl-demofusion-factors": ("sdxl-turbo", demo | {"size": (32, 32), "cosine": (1.0, 0.5, 2.0), "sigma": 1.5,
                                                          "stride": 2}),
        "sdxl-demofusion-own": ("sdxl", demo | {"size": (64, 48), "steps": 1}),
        "demofusion": ("mixed", demo | {"size": (48, 48), "scheduler": "euler"}),
        "demofusion-guidance-1": ("sd15", demo | {"size": (64, 64), "guidance": 1.0, "steps": 1, "scheduler": "ddim"}),
    }


def hidiffusion_runs():
    """Both maps of blocks; each part alone and all together; even, odd and wide sizes."""
    run = {"method": "hidiffusion", "guidance": 2.0, "seed": 71}
    xl = run | {"size": (32, 32), "steps": 7}
    sd = run | {"size": (16, 20), "steps": 5, "scheduler": "ddim"}
    return {
        # D in step 0, P in step 1, neither from step 2 on.
        "hi-sdxl": ("sdxl", xl),
        "hi-sdxl-odd": ("sdxl", xl | {"size": (36, 28), "steps": 4, "t2": 0.25, "aggressive": False, "negative": "blurry"}),
        "hi-sdxl-both": ("sdxl", xl | {"size": (40, 24), "steps": 4, "t1": 0.75, "t2": 0.5, "aggressive": False}),
        "hi-sdxl-windows": ("sdxl", xl | {"raunet": False, "steps": 2, "scheduler": "euler-ancestral"}),
        "hi-sdxl-raunet": ("sdxl", xl | {"windows": False, "steps": 3, "t1": 0.7, "aggressive": False, "guidance": 1.0}),
        "hi-sdxl-turbo": ("sdxl-turbo", xl | {"steps": 4, "guidance": 0.0, "scheduler": "euler"}),
        "hi-sdxl-shards": ("sdxl-shards", xl | {"size": (72, 64), "steps": 3, "t2": 0.4, "aggressive": False}),
        # D in steps 0 and 1.
        "hi-sd": ("defaults", sd),
        "hi-sd-both": ("defaults", sd | {"size": (23, 17), "steps": 4, "t1": 0.75, "t2": 0.5}),
        "hi-sd-four-levels": ("four-levels", sd | {"size": (64, 72), "steps": 3, "t2": 0.4, "prompt": FOX}),
    }


def pixelrush_runs():
    """Maps of several patches along one side or both; the last size no multiple of the one before."""
    run = {"method": "pixelrush", "guidance": 0.0, "seed": 81}
    return {
        "pixelrush-turbo": ("sdxl-turbo", run | {"stages": (((16, 16), 2), ((32, 24), 1)), "scheduler": "euler"}),
        "pixelrush-three": ("sdxl-turbo", run | {"stages": (((16, 16), 1), ((32, 32), 1), ((44, 40), 1)), "stride": 5,
                                                 "view_batch": 3, "inject_noise": 0.0, "scheduler": "ddim"}),
        "pixelrush-guided": ("sdxl", run | {"stages": (((24, 16), 2), ((48, 32), 1)), "guidance": 2.0, "inject_noise": 1.0,
                                            "refine_timestep": 400, "upsampler": "bilinear"}),
        # v-prediction.
        "pixelrush-sd": ("sd21", run | {"stages": (((24, 24), 2), ((48, 44), 1)), "scheduler": "ddim", "guidance": 2.0, "negative": "blurry"}),
    }


def diffusehigh_runs():
    """Both samplers, both kinds of outputs; odd sizes; every step held, some and none; with and without sharpening."""
    high = {"method": "diffusehigh", "guidance": 2.0, "refine_guidance": 3.0, "seed": 81}
    return {
        "diffusehigh": ("sd15", high | {"stages": (((16, 16), 4), ((24, 24), 3)), "scheduler": "euler"}),
        # Latents of 8x9 and 11x10 cells.
        "diffusehigh-three": ("sd15", high | {"stages": (((12, 12), 3), ((16, 18), 2), ((22, 20), 1)), "scheduler": "ddim",
                                              "wavelet_steps": 2, "negative": "blurry"}),
        "diffusehigh-v": ("sd21", high | {"stages": (((16, 12), 3), ((28, 24), 2)), "scheduler": "euler", "wavelet_steps": 2,
                                          "sharpen": False}),
        "diffusehigh-v-ddim": ("sd21", high | {"stages": (((16, 16), 3), ((20, 24), 3)), "scheduler": "ddim"}),
        "sdxl-diffusehigh": ("sdxl", high | {"stages": (((16, 16), 4), ((24, 20), 4))}),
        # No guidance, no wavelets.
        "sdxl-diffusehigh-turbo": ("sdxl-turbo", {"method": "diffusehigh", "seed": 82, "guidance": 0.0, "wavelet_steps": 0,
                                                  "stages": (((16, 16), 2), ((24, 24), 1)), "scheduler": "euler"}),
    }


def upsample_guidance_runs():
    """Squares of 2 and 3 cells; some steps corrected and all; noise, v, and v without signal at the first step."""
    up = {"method": "upsample-guidance", "guidance": 2.0, "seed": 91, "steps": 4}
    return {
        "upsample-guidance": ("sd15", up | {"size": (24, 16), "scheduler": "ddim", "up_scale": 2}),
        "upsample-guidance-euler": ("sd15", up | {"size": (24, 36), "scheduler": "euler", "up_scale": 3, "up_theta": 0.7,
                                                  "up_share": 1.0, "steps": 3, "negative": "blurry"}),
        "upsample-guidance-v": ("sd21", up | {"size": (24, 16), "scheduler": "ddim", "up_share": 0.9, "up_scale": 2}),
        "upsample-guidance-unipc": ("sd15", up | {"size": (20, 16), "scheduler": "unipc", "guidance": 1.0, "up_scale": 2}),
        "zero-snr-upsample-guidance": ("zero-snr", up | {"size": (16, 24), "scheduler": "ddim", "up_theta": 0.5, "up_scale": 2}),
        "sdxl-upsample-guidance": ("sdxl", up | {"size": (24, 20), "scheduler": "euler-ancestral", "up_scale": 2}),
    }


def composed_runs():
    """Stages with parts: each part, several in one stage, in one run; both maps of blocks; a relay out of a stage of views."""
    run = {"method": "megafusion", "guidance": 1.5, "seed": 81}
    sd, xl = (lambda *stages: {"stages": stages}), (lambda *stages: {"stages": stages, "scheduler": "ddim"})
    return {
        # The windows' shifts go on from stage 2 to stage 3; D in 2 of 3 steps of stage 2.
        "compose-sd": ("defaults", run | sd(((8, 8), 1), ((12, 10), 3, "hidiffusion"), ((14, 12), 1, "windows+dilation"))
                       | {"t1": 0.7, "dilation": 2}),
        # Euler; the relay leaves a stage of windows; the last stage has MegaFusion++'s gamma, and no dilation.
        "compose-crops": ("sd21", run | sd(((16, 16), 2), ((24, 20), 2, "crops"), ((32, 24), 1, "crops+dilation"))
                          | {"method": "megafusion++", "window": 8, "stride": 4, "view_batch": 3, "scheduler": "euler"}),
        "compose-sdxl": ("sdxl-turbo", run | xl(((16, 16), 1), ((20, 24), 2, "demofusion"), ((32, 26), 1, "demofusion"))
                         | {"cosine": (3.0, 0.5, 2.0), "sigma": 1.2, "view_batch": 4}),
        "compose-sdxl-all": ("sdxl", run | xl(((16, 16), 1, "windows"), ((24, 20), 2, "raunet+windows"), ((26, 24), 1, "crops"))
                             | {"method": "megafusion++", "t1": 1.0, "aggressive": False, "window": 10}),
    }


def scalecrafter_runs():
    """Both maps of blocks: published tables, whole and broken factors, both branches, dispersion, odd sides."""
    run = {"method": "scalecrafter", "guidance": 2.0, "seed": 81}
    xl, sd = run | {"size": (22, 26), "steps": 2}, run | {"size": (23, 17), "steps": 2}
    return {
        # Twice the trained sides: step 0 is re-dilated, step 1 is not; then 4x2, with damped guidance in step 0.
        "sc-sdxl": ("sdxl-turbo", xl | {"size": (32, 32)}),
        "sc-sdxl-4x2": ("sdxl-turbo", xl | {"size": (64, 32)}),
        "sc-sdxl-broken": ("sdxl", xl | {"redilate": "M=2.5,D1=1.5,U0=2.25,up_blocks.0.resnets.1.conv1=1",
                                         "redilate_steps": 1}),
        "sc-sdxl-damped": ("sdxl", xl | {"size": (24, 20), "steps": 3, "redilate": "D2=4,M=4,U0=4,U1=3", "damped": "M=3,U0=2",
                                         "damped_steps": 2, "progressive": True, "eta": 0.5}),
        "sc-sdxl-dispersed": ("sdxl", xl | {"size": (24, 20), "redilate": "D2=3,M=4,U0=2", "disperse": "D2,U0,D1", "eta": 0.0,
                                            "negative": "blurry", "freeu": "1.1,0.8,1.5,0.5"}),
        "sc-sd": ("defaults", sd | {"redilate": "D0=2,D1=1.5,D3=2,M=2,U1=3", "disperse": "D0,M", "disperse_steps": 1}),
        "sc-sd-euler": ("defaults", sd | {"size": (16, 20), "redilate": "U0=2.5,U2=2", "damped": "U2=3", "scheduler": "euler",
                                          "freeu": "none"}),
        "sc-sd-unguided": ("mixed", sd | {"size": (16, 20), "guidance": 1.0, "redilate": "M=2,D0=3", "freeu": "1.3,1.2,0.5,0.7"}),
    }


def scalediff_runs():
    """Maps larger than a neighbourhood on each level and on none, short windows, three stages."""
    run = {"method": "scalediff", "guidance": 2.0, "seed": 81, "low_pass": 0.25}
    stages = lambda *sizes: tuple(((w, h), n) for w, h, n in sizes)
    return {
        "scalediff-sdxl": ("sdxl", run | {"stages": stages((16, 16, 3), (28, 20, 2))}),
        "scalediff-sdxl-turbo": ("sdxl-turbo", run | {"stages": stages((8, 8, 4), (16, 16, 2), (28, 24, 1)),
                                                      "scheduler": "euler", "negative": "blurry"}),
        "scalediff-sd": ("sd15", run | {"stages": stages((16, 12, 5), (32, 24, 2)), "restart_ratio": 0.4,
                                        "guidance": 1.0}),
        "scalediff-sd21": ("sd21", run | {"stages": stages((20, 20, 3), (32, 36, 2)), "low_pass": 0.5}),
        "scalediff-four-levels": ("four-levels", run | {"stages": stages((24, 24, 2), (32, 40, 1)), "eta": 0.5}),
    }


def frecas_runs():
    """Both kinds of outputs, two and three stages, doubled and not; without guidance; as published; guidance split in another
    method."""
    run = {"method": "frecas", "guidance": 2.0, "guidance_high": 5.0, "seed": 91}
    stages = lambda *sizes: tuple(((w, h), n) for w, h, n in sizes)
    return {
        "frecas": ("sd15", run | {"stages": stages((12, 12, 2), (20, 20, 2))}),
        "frecas-sd21": ("sd21", run | {"stages": stages((20, 16, 2), (36, 32, 2)), "guidance_high": 4.0, "frecas_ends": "300", "frecas_gamma": 1.5}),
        "frecas-sdxl": ("sdxl", run | {"stages": stages((16, 16, 3), (24, 20, 2)), "map_reuse": 0.8,
                                       "frecas_upsampler": "bilinear"}),
        "frecas-three": ("sd15", run | {"stages": stages((8, 8, 2), (16, 16, 2), (22, 18, 1)), "negative": "blurry",
                                        "frecas_ends": "400,150"}),
        "frecas-compat": ("sdxl", run | {"stages": stages((8, 8, 3), (16, 16, 3)), "reference_compat": True}),
        "frecas-unguided": ("zero-snr", {"method": "frecas", "guidance": 1.0, "seed": 92, "frecas_upsampler": "bicubic",
                                         "stages": stages((8, 12, 3), (16, 20, 2))}),
        "mega-guidance-high": ("sd15", {"method": "megafusion", "guidance": 2.0, "guidance_high": 5.0, "seed": 93,
                                        "stages": stages((12, 12, 1), (34, 32, 1))}),
    }


def fouriscale_runs():
    """Both maps of blocks and a further one: filters over whole and padded maps, of even and odd sides; both dilations of SDXL's
    twins, the same and apart; steps before, between and behind both thresholds."""
    run = {"method": "fouriscale", "guidance": 2.0, "seed": 91}
    return {
        # Twice the trained sides: d is 2, 5/3, 4/3.
        "fs-sdxl": ("sdxl-turbo", run | {"size": (32, 32), "steps": 3, "fourier_start": 0, "fourier_stop": 3}),
        "fs-sdxl-odd": ("sdxl", run | {"size": (36, 28), "steps": 3, "fourier_dilation": 3.5, "fourier_start": 1,
                                       "fourier_stop": 3, "amplified_guidance": True, "negative": "blurry", "eta": 0.5}),
        # In steps 0 and 1 of 4, then all is plain.
        "fs-sd": ("four-levels", run | {"size": (40, 32), "steps": 4, "guidance": 1.5, "fourier_dilation": 3.0}),
        "fs-v-unguided": ("sd21", run | {"size": (36, 28), "steps": 3, "guidance": 1.0, "fourier_dilation": 2.0,
                                         "fourier_stop": 2, "fourier_floor": 0.25}),
        "fs-euler": ("sd15", run | {"size": (36, 20), "steps": 3, "scheduler": "euler", "fourier": "D0,M,up_blocks.0.upsamplers.0.conv",
                                    "freeu": "1.2,1.1,0.8,0.5", "fourier_start": 1, "fourier_stop": 2}),
    }


# Files of schedulers that models are published with, or that people made by hand.
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
         "steps_offset": 1}
ZERO_SNR = {**BETAS, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "set_alpha_to_one": False,
            "clip_sample": False}
LCM = {"_class_name": "LCMScheduler", **BETAS, "original_inference_steps": 50, "timestep_scaling": 10.0,
       "timestep_spacing": "leading", "set_alpha_to_one": True, "clip_sample": False, "prediction_type": "epsilon"}
GUIDANCE_EMBEDDING = "unet-options/guidance-embedding"


def variants():
    """name -> (model, settings, the scheduler's file in place of the model's, the folder of tests/data whose UNet is)"""
    plain = {"method": "plain", "size": (16, 16), "steps": 2, "guidance": 2.0, "seed": 61}
    lcm = {**plain, "guidance": 8.5, "steps": 3}
    return {
        "scheduler-lcm": ("zero-snr", plain | {"steps": 3}, LCM, None),
        "scheduler-dpmsolver-infinity": ("zero-snr", plain | {"steps": 3}, {
            "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", **BETAS,
            "lambda_min_clipped": float("-inf"), "prediction_type": "epsilon", "solver_order": 2,
            "timestep_spacing": "linspace", "use_karras_sigmas": False}, None),
        "scheduler-euler-karras": ("zero-snr", plain, {
            "_class_name": "EulerDiscreteScheduler", **BETAS, "use_karras_sigmas": True}, None),
        "scheduler-euler-log-linear": ("zero-snr", plain, {
            "_class_name": "EulerDiscreteScheduler", **BETAS, "interpolation_type": "log_linear"}, None),
        "scheduler-v-zero-snr-trailing": ("sd15", plain, {
            "_class_name": "DDIMScheduler", **ZERO_SNR, "prediction_type": "v_prediction"}, None),
        "scheduler-eps-zero-snr-euler": ("zero-snr", plain | {"scheduler": "euler"}, {
            "_class_name": "DDIMScheduler", **ZERO_SNR, "prediction_type": "epsilon"}, None),
        "scheduler-eps-zero-snr-unipc": ("zero-snr", plain | {"scheduler": "unipc"}, {
            "_class_name": "DDIMScheduler", **ZERO_SNR, "prediction_type": "epsilon"}, None),
        "scheduler-sigmoid": ("zero-snr", plain, {
            "_class_name": "DDPMScheduler", **BETAS, "beta_schedule": "sigmoid"}, None),
        "scheduler-deis": ("zero-snr", plain | {"steps": 3}, {"_class_name": "DEISMultistepScheduler", **BETAS}, None),
        # Told its guidance scale, with the program's defaults for such a model but the size.
        "guidance-embedding": ("zero-snr", lcm, LCM, GUIDANCE_EMBEDDING),
        "guidance-embedding-one-step": ("zero-snr", lcm | {"steps": 1, "guidance": 1.5}, LCM, GUIDANCE_EMBEDDING),
    }


def varied(model, config, unet, root):
    """The model with another scheduler's file, and another UNet."""
    from diffusers import UNet2DConditionModel

    model = copy.copy(model)
    model.scheduler_config = config
    if unet is not None:
        model.unet = UNet2DConditionModel.from_pretrained(root / unet, torch_dtype=torch.float32)
        model.unet.eval().requires_grad_(False)
    return model


def check_against_pipeline(model, settings, tensors, limit):
    """A plain run is what diffusers' own pipeline makes of the same modules."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    sampler = settings.sampler(model.scheduler_config)
    scheduler = reference.make_scheduler(reference.CLASSES[sampler], model.scheduler_config)
    parts = {"vae": model.vae, "text_encoder": model.text, "tokenizer": model.tokenizer, "unet": model.unet,
             "scheduler": scheduler, "feature_extractor": None}
    more = {}
    if model.text_2 is None:
        pipe = StableDiffusionPipeline(**parts, safety_checker=None, requires_safety_checker=False)
    else:
        pipe = StableDiffusionXLPipeline(**parts, text_encoder_2=model.text_2, tokenizer_2=model.tokenizer_2,
                                         force_zeros_for_empty_prompt=model.force_zeros, add_watermarker=False)
        swapped = lambda pair: pair and pair[::-1]  # ours: width or x first; theirs: height or y first
        more = {"original_size": swapped(settings.original_size), "target_size": swapped(settings.target_size),
                "crops_coords_top_left": swapped(settings.crop)}
    pipe.set_progress_bar_config(disable=True)
    out = pipe(settings.prompt, height=settings.size[1], width=settings.size[0], num_inference_steps=settings.steps,
               guidance_scale=settings.guidance, guidance_rescale=settings.guidance_rescale, negative_prompt=settings.negative, eta=settings.eta,
               generator=torch.Generator().manual_seed(settings.seed), latents=tensors["noise0"].clone(),
               output_type="latent", **more)
    error = (out.images - tensors["latent"]).abs().max().item() / tensors["latent"].abs().max().item()
    assert error < limit, error


def write(root, models):
    """Runs in f64, each also in f32: how far the two are apart says how much a comparison in f32 may ask."""
    folder = root / "runs"
    folder.mkdir(parents=True)
    doubles = {name: reference.double(model) for name, model in models.items()}
    listed = [write_run(folder, name, model, changes, models[model], doubles[model])
              for name, (model, changes) in runs().items()]
    further = []
    for name, (model, changes, config, unet) in variants().items():
        single = varied(models[model], config, unet, UNETS)
        run = write_run(folder, name, model, changes, single, reference.double(single))
        # As text: Python's JSON has infinities.
        further.append(run | {"scheduler": json.dumps(config), "unet": unet})
    text = json.dumps({"runs": listed, "variants": further}, indent=1, ensure_ascii=False)
    (folder / "runs.json").write_text(compact_args(text))


def write_run(folder, name, model, changes, single, double):
    changes = {"prompt": CAT} | changes
    settings = reference.Settings(**changes)
    tensors = reference.run(double, settings)
    for key, tensor in tensors.items():
        assert torch.isfinite(tensor).all(), (name, key)
    assert double.u8_margin > 2e-3, (name, double.u8_margin)
    in_f32 = reference.run(single, settings)
    error = max(relative(in_f32[key], tensors[key]) for key in tensors)
    assert error < (1e-3 if name in ILL_CONDITIONED else F32_LIMIT), (name, error)
    # The pipeline wants multiples of 8 and draws its own initial latents, so noise of steps would differ: only runs
    # without either are compared.
    cached = settings.cache is not None
    if settings.method == "plain" and not cached and "noise1" not in tensors and all(s % 8 == 0 for s in settings.size):
        check_against_pipeline(single, settings, tensors, max(1e-5, error))
    plain_noise = settings.guidance_rescale == 0 and not settings.circular and all(s % 8 == 0 for s in settings.size)
    if settings.method == "multidiffusion" and single.text_2 is None and plain_noise:
        multidiffusion.check_against_pipeline(single, settings, tensors, max(1e-5, error))
    save_file(stored(name, tensors), folder / f"{name}.safetensors")
    return {"name": name, "model": model, "args": settings.args(changes), "f32_error": float(f"{error:.1e}")}


def stored(name, tensors):
    """Without the tables, the draws and the pictures within a relay, which decide all tensors after them; and without the
    last latents where they are those of the last step."""
    if name in WHOLE:
        return tensors
    implied = lambda key: key == "alpha_bar" or key.startswith("noise") or key.endswith((".decoded", ".upsampled"))
    steps = [tensor for key, tensor in tensors.items() if key.startswith("step")]
    last = lambda key: key == "latent" and any(torch.equal(tensors[key], step) for step in steps)
    return {key: tensor for key, tensor in tensors.items() if not implied(key) and not last(key)}


def compact_args(text):
    import re

    return re.sub(r"\[\s+(\"[^\[\]]*?\")\s+\]", lambda m: "[" + re.sub(r",\s+\"", ', "', m.group(1)) + "]", text) + "\n"
