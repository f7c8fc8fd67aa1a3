"""Writes tests/data/sd3: small random Stable Diffusion 3 directories, and whole runs of diffusers' modules on them.

    tools/oracle/venv tools/oracle/sd3.py

A directory is as diffusers saves it, with described weights (drawn.py). runs.json lists the runs, one file each: per evaluation the
timesteps, sigmas [stages, steps + 1], the latents after every step, what a relay goes through, the last latents and the picture,
computed in f64 (tables, draws and PIL's resize stay f32); NAME-text.safetensors of three runs is what the transformer is told of
the prompt. ldm.json of one model: the names of its transformer's and VAE's tensors in a single file, in the order of drawn.json,
[name, i] for a third of rows that stand together there, [name, "swapped"] where the halves stand the other way round.

The sampler is Euler's step of a rectified flow, x += (sigma' - sigma) v, at the sigmas of diffusers'
FlowMatchEulerDiscreteScheduler, whose shift is there twice. MegaFusion relays by
    y = (E(clamp(bicubic(clamp(D(x0))))) - shift) * scaling,   x = sigma n + (1 - sigma) y,   x0 = x - sigma v
at the sigma of the next step (Wu et al., WACV 2025, arXiv:2408.11001; sigma is re-scheduled to g s / (1 + (g - 1) s),
g = sqrt(area / first area), where asked: noise over signal times g). A plain run's latents are compared with
StableDiffusion3Pipeline's, which steps in f32.
"""

import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file

import drawn
import reference
import resize
import small_models
import small_tokenizer
from module_values import relative, tokenize
from single_file import vae_name
from small_sdxl import text, tokenizer

DATA = pathlib.Path(__file__).resolve().parents[2] / "tests/data"
ROOT = DATA / "sd3"
SHIFTED = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def vae(channels, latents, **more):
    return {"block_out_channels": channels, "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": latents,
            "scaling_factor": 1.5305, "shift_factor": 0.0609, "sample_size": 32, "use_quant_conv": False,
            "use_post_quant_conv": False, "down_block_types": ["DownEncoderBlock2D"] * len(channels),
            "up_block_types": ["UpDecoderBlock2D"] * len(channels), **more}


def transformer(layers, heads, width, channels, joint, pooled, **more):
    return {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": width, "in_channels": channels,
            "out_channels": channels, "joint_attention_dim": joint, "caption_projection_dim": heads * width,
            "pooled_projection_dim": pooled, "patch_size": 2, "sample_size": 16, "pos_embed_max_size": 24,
            "dual_attention_layers": (), "qk_norm": None, **more}


def t5(width, **more):
    return {"vocab_size": 160, "d_model": width, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 3,
            "feed_forward_proj": "gated-gelu", **more}


MODELS = {
    # SD3-medium in small: no norm of q and k, one attention, T5.
    "medium": {
        "seed": 301,
        "tokenizer": tokenizer(40, max_length=32, pad=small_tokenizer.EOS), "tokenizer_2": tokenizer(40, max_length=32),
        "text": text(8, 3, 2, "quick_gelu", 12, max_position_embeddings=32),
        "text_2": text(12, 2, 3, "gelu", 8, max_position_embeddings=32),
        "text_3": t5(24), "transformer": transformer(2, 2, 8, 4, 24, 20), "vae": vae([4, 8], 4), "scheduler": SHIFTED,
    },
    # SD3.5-medium in small, without T5.
    "medium-3.5": {
        "seed": 302,
        "tokenizer": tokenizer(0, max_length=16, pad=small_tokenizer.EOS), "tokenizer_2": tokenizer(0, max_length=16),
        "text": text(16, 2, 2, "quick_gelu", 16, max_position_embeddings=16),
        "text_2": text(8, 2, 1, "gelu", 8, max_position_embeddings=16),
        "transformer": transformer(3, 3, 8, 6, 32, 24, qk_norm="rms_norm", dual_attention_layers=(0, 1),
                                   pos_embed_max_size=20, sample_size=12),
        "vae": vae([4, 4, 8], 6, sample_size=48), "scheduler": SHIFTED | {"shift": 1.5},
    },
    # The norm without a second attention (SD3.5-large); nothing is left to pad.
    "large": {
        "seed": 303,
        "tokenizer": tokenizer(20, max_length=20, pad=small_tokenizer.EOS), "tokenizer_2": tokenizer(20, max_length=20),
        "text": text(8, 2, 2, "quick_gelu", 8, max_position_embeddings=20),
        "text_2": text(8, 3, 2, "gelu", 12, max_position_embeddings=20),
        "text_3": t5(16, num_layers=1, num_heads=2),
        "transformer": transformer(1, 5, 4, 4, 16, 20, qk_norm="rms_norm", sample_size=8),
        "vae": vae([8, 8], 4, layers_per_block=2, sample_size=16), "scheduler": SHIFTED,
    },
    # Every block with a second attention and no norm; another patch.
    "dual": {
        "seed": 304,
        "tokenizer": tokenizer(10, max_length=16, pad=small_tokenizer.EOS), "tokenizer_2": tokenizer(10, max_length=16),
        "text": text(12, 2, 3, "quick_gelu", 8, max_position_embeddings=16),
        "text_2": text(8, 2, 2, "gelu", 16, max_position_embeddings=16),
        "transformer": transformer(2, 2, 16, 4, 20, 24, dual_attention_layers=(0, 1), patch_size=1, pos_embed_max_size=32),
        "vae": vae([4, 8], 4), "scheduler": SHIFTED,
    },
}

# Name: model, settings; `t5_length` is --t5-length.
RUNS = {
    "plain": ("medium", {"method": "plain", "size": (32, 24), "steps": 3, "guidance": 3.0, "seed": 1}),
    "plain-3.5": ("medium-3.5", {"method": "plain", "size": (24, 32), "steps": 2, "guidance": 1.0, "seed": 2}),
    "plain-negative": ("large", {"method": "plain", "size": (12, 20), "steps": 3, "guidance": 5.0, "seed": 3, "negative": "a dog"}),
    "plain-dual": ("dual", {"method": "plain", "size": (22, 18), "steps": 2, "guidance": 4.0, "seed": 4}),
    "mega": ("medium", {"method": "megafusion", "stages": (((32, 32), 3), ((48, 40), 2)), "guidance": 4.0, "seed": 5}),
    "mega-3.5": ("medium-3.5", {"method": "megafusion", "stages": (((24, 32), 2), ((32, 40), 1), ((48, 40), 1)), "guidance": 2.0, "seed": 6}),
    "mega-reschedule": ("large", {"method": "megafusion", "stages": (((16, 16), 2), ((28, 24), 2)), "guidance": 3.0, "seed": 7, "reschedule": True}),
    "mega-dual": ("dual", {"method": "megafusion", "stages": (((24, 24), 2), ((30, 32), 2)), "guidance": 1.0, "seed": 8}),
}
# Whose tensors' names in a single file are stored.
LDM = "medium-3.5"
PARTS = [("text_encoder", "text"), ("text_encoder_2", "text_2"), ("text_encoder_3", "text_3"), ("transformer", "transformer"), ("vae", "vae")]


class Model:
    tokenizer_3 = text_3 = None


def build(name):
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

    spec, folder, model = MODELS[name], ROOT / name, Model()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.spec = spec
    index = {"_class_name": "StableDiffusion3Pipeline", "scheduler": ["diffusers", spec["scheduler"]["_class_name"]],
             "transformer": ["diffusers", "SD3Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    for suffix in ("", "_2"):
        vocab, eos, _ = small_tokenizer.write(folder / f"tokenizer{suffix}", **spec[f"tokenizer{suffix}"])
        setattr(model, f"tokenizer{suffix}", CLIPTokenizer.from_pretrained(folder / f"tokenizer{suffix}"))
        config = small_models.text_config(spec[f"text{suffix}"], vocab, eos)
        setattr(model, f"text{suffix}", CLIPTextModelWithProjection(CLIPTextConfig(**config)))
        index |= {f"text_encoder{suffix}": ["transformers", "CLIPTextModelWithProjection"],
                  f"tokenizer{suffix}": ["transformers", "CLIPTokenizer"]}
        known = {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model"}
        (folder / f"text_encoder{suffix}").mkdir()
        small_models.write_json(folder / f"text_encoder{suffix}/config.json", known | config)
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    if "text_3" in spec:
        (folder / "tokenizer_3").mkdir()
        shutil.copy(DATA / "t5/tokenizer/plain.model", folder / "tokenizer_3/spiece.model")
        small_models.write_json(folder / "tokenizer_3/tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", "extra_ids": 0})
        model.tokenizer_3 = T5Tokenizer.from_pretrained(folder / "tokenizer_3")
        model.text_3 = T5EncoderModel(T5Config(**spec["text_3"]))
        (folder / "text_encoder_3").mkdir()
        known = {"architectures": ["T5EncoderModel"], "model_type": "t5"}
        small_models.write_json(folder / "text_encoder_3/config.json", known | spec["text_3"])
        index |= {"text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5Tokenizer"]}
    model.transformer, model.vae = SD3Transformer2DModel(**spec["transformer"]), AutoencoderKL(**spec["vae"])
    for part, cls in ("transformer", "SD3Transformer2DModel"), ("vae", "AutoencoderKL"):
        (folder / part).mkdir()
        small_models.write_json(folder / part / "config.json", {"_class_name": cls, **spec[part]})
    (folder / "scheduler").mkdir()
    small_models.write_json(folder / "scheduler/scheduler_config.json", spec["scheduler"])
    small_models.write_json(folder / "model_index.json", index)

    for part, attribute in PARTS:
        module = getattr(model, attribute)
        if module is None:
            continue
        small_models.fill(module, spec["seed"], part, torch.float32)
        factors = {}
        if attribute == "transformer":
            # As large as the patches' own embedding.
            table = "pos_embed.pos_embed"
            state = module.state_dict()
            factors[table] = (1, float(state[table][0].numel() ** 0.5))
            state[table] = state[table] * factors[table][1]
            module.load_state_dict(state)
        if attribute == "text_3":
            # One tensor under two names.
            shared = small_models.draw(spec["seed"], f"{part}.shared.weight", module.shared.weight)
            module.load_state_dict(module.state_dict() | {"shared.weight": shared, "encoder.embed_tokens.weight": shared})
        drawn.write(folder / part, "model" if "text" in part else "diffusion_pytorch_model", drawn.Described(module.state_dict(), module.config), spec["seed"], part,
                    factors=factors)
        setattr(model, attribute, module.double())
    if name == LDM:
        write_ldm(model, folder)
    return model


def ldm_name(key, last):
    """What the first files of Stable Diffusion 3 call a tensor of the transformer; or [name, i], the i-th third of its rows; or
    [name, "swapped"], its halves the other way round. last: the number of the last block."""
    top = {"pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder", "proj_out": "final_layer.linear",
           "norm_out.linear": "final_layer.adaLN_modulation.1"}
    top |= {f"time_text_embed.{to}.linear_{i + 1}": f"{at}.mlp.{2 * i}"
            for to, at in (("timestep_embedder", "t_embedder"), ("text_embedder", "y_embedder")) for i in (0, 1)}
    pixels, text = "x_block", "context_block"
    inside = {"norm1.linear": f"{pixels}.adaLN_modulation.1", "norm1_context.linear": f"{text}.adaLN_modulation.1",
              "attn.to_add_out": f"{text}.attn.proj"}
    for stream, ff in (pixels, "ff"), (text, "ff_context"):
        inside |= {f"{ff}.net.0.proj": f"{stream}.mlp.fc1", f"{ff}.net.2": f"{stream}.mlp.fc2"}
    for at in "attn", "attn2":
        inside[f"{at}.to_out.0"] = f"{pixels}.{at}.proj"
        for i, x in enumerate("qkv"):
            inside |= {f"{at}.to_{x}": (f"{pixels}.{at}.qkv", i), f"{at}.add_{x}_proj": (f"{text}.{at}.qkv", i),
                       f"{at}.norm_{x}": f"{pixels}.{at}.ln_{x}", f"{at}.norm_added_{x}": f"{text}.{at}.ln_{x}"}
    if key == "pos_embed.pos_embed":
        return "pos_embed"
    module, kind = key.rsplit(".", 1)
    if module in top:
        name = f"{top[module]}.{kind}"
        return [name, "swapped"] if module == "norm_out.linear" else name
    _, block, rest = module.split(".", 2)
    found, at = inside[rest], f"joint_blocks.{block}"
    if isinstance(found, tuple):
        return [f"{at}.{found[0]}.{kind}", found[1]]
    name = f"{at}.{found}.{kind}"
    return [name, "swapped"] if rest == "norm1_context.linear" and int(block) == last else name


def write_ldm(model, folder):
    """The names of transformer and VAE in a single file, in the order of their drawn.json; diffusers reads the same out of it."""
    from diffusers.loaders import single_file_utils as published

    state, file, thirds = model.transformer.state_dict(), {}, {}
    names = {key: ldm_name(key, len(model.transformer.transformer_blocks) - 1) for key in state}
    for key, name in names.items():
        if isinstance(name, str):
            file[name] = state[key]
        elif name[1] == "swapped":
            file[name[0]] = torch.cat(state[key].chunk(2)[::-1])
        else:
            thirds.setdefault(name[0], [None] * 3)[name[1]] = state[key]
    file |= {name: torch.cat(parts) for name, parts in thirds.items()}
    file = {f"model.diffusion_model.{name}": tensor for name, tensor in file.items()}
    own = model.vae.state_dict()
    of_vae = {key: "first_stage_model." + vae_name(key, len(model.vae.config.block_out_channels)) for key in own}
    for read, want in [
        (published.convert_sd3_transformer_checkpoint_to_diffusers(file), state),
        # Products of one pixel were convolutions.
        (published.convert_ldm_vae_checkpoint(
            {name: own[key][:, :, None, None] if ".attn_1." in name and own[key].ndim == 2 else own[key]
             for key, name in of_vae.items()}, model.vae.config), own),
    ]:
        assert read.keys() == want.keys(), read.keys() ^ want.keys()
        assert all(torch.equal(read[key], want[key]) for key in want)
    lists = {"transformer": list(names.values()), "vae": [name.removeprefix("first_stage_model.") for name in of_vae.values()]}
    lines = ",\n".join(f'"{part}": [\n' + ",\n".join(map(json.dumps, listed)) + "\n]" for part, listed in lists.items())
    (folder / "ldm.json").write_text("{" + lines + "}\n")


def encode(model, prompt, length):
    """([1, L, C], [1, P])"""
    hidden, pooled = [], []
    for tokens, clip in (model.tokenizer, model.text), (model.tokenizer_2, model.text_2):
        out = clip(torch.tensor([tokenize(tokens, prompt)]), output_hidden_states=True)
        hidden.append(out.hidden_states[-2])
        pooled.append(out.text_embeds)
    short = torch.cat(hidden, -1)
    width = model.transformer.config.joint_attention_dim
    short = torch.nn.functional.pad(short, (0, width - short.shape[-1]))
    if model.text_3 is None:
        long = torch.zeros(1, length, width, dtype=short.dtype)
    else:
        ids = model.tokenizer_3(prompt, padding="max_length", max_length=length, truncation=True).input_ids
        long = model.text_3(torch.tensor([ids])).last_hidden_state
    return torch.cat([short, long], 1), torch.cat(pooled, -1)


def sigmas_of(model, steps, gamma):
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = {k: v for k, v in model.spec["scheduler"].items() if k[0] != "_"}
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    g = gamma**0.5
    return g * sigmas / (1 + (g - 1) * sigmas)


def decode(model, x0):
    config = model.vae.config
    return model.vae.decode(x0 / config.scaling_factor + config.shift_factor).sample


@torch.no_grad()
def run(model, settings, length):
    tensors = {}
    draws = reference.Draws(settings.seed, tensors, model.vae.dtype)
    stages = settings.stages or ((settings.size, settings.steps),)
    total, factor = sum(steps for _, steps in stages), 2 ** (len(model.vae.config.block_out_channels) - 1)
    first = stages[0][0]
    schedules, dtype = [], model.vae.dtype
    for s, ((w, h), _) in enumerate(stages):
        gamma = w * h / (first[0] * first[1]) if settings.reschedule and s > 0 else 1.0
        schedules.append(sigmas_of(model, total, gamma).to(dtype))
    tensors["sigmas"] = torch.stack(schedules)
    tensors["timesteps"] = (schedules[0][:-1] * 1000).float()
    prompts = [settings.prompt]
    if settings.guidance > 1:
        prompts.insert(0, settings.negative or "")
    encoded = [encode(model, prompt, length) for prompt in prompts]
    embeds, pooled = (torch.cat(parts) for parts in zip(*encoded))
    shape = lambda size: (1, model.vae.config.latent_channels, size[1] // factor, size[0] // factor)
    x, x0, done = draws.normal(shape(first)), None, 0
    for s, (size, steps) in enumerate(stages):
        sigmas = schedules[s]
        if s > 0:
            w, h = size
            decoded = decode(model, x0)
            up = resize.upsample(decoded.clamp(-1, 1), (h, w), "bicubic").clamp(-1, 1)
            config = model.vae.config
            y = (model.vae.encode(up).latent_dist.mean - config.shift_factor) * config.scaling_factor
            x = sigmas[done] * draws.normal(y.shape) + (1 - sigmas[done]) * y
            for name, tensor in ("x0", x0), ("encoded", y), ("noised", x):
                tensors[f"relay{s}.{name}"] = tensor
        for i in range(done, done + steps):
            # The network is told the timestep in f32.
            t = (sigmas[i].float() * 1000).to(dtype)
            v = model.transformer(torch.cat([x] * len(prompts)), encoder_hidden_states=embeds, pooled_projections=pooled,
                                  timestep=t.expand(len(prompts))).sample
            if len(prompts) > 1:
                v = v[:1] + settings.guidance * (v[1:] - v[:1])
            x0 = x - sigmas[i] * v
            x = x + (sigmas[i + 1] - sigmas[i]) * v
            tensors[f"step{i + 1}"] = x
        done += steps
    latent = x if settings.method == "plain" else x0
    tensors["image"] = decode(model, latent)
    tensors["latent"] = latent
    return tensors


def check_published(model, settings, length, latent, noise):
    """The published pipeline gives the same latents."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    config = {k: v for k, v in model.spec["scheduler"].items() if k[0] != "_"}
    pipeline = StableDiffusion3Pipeline(
        transformer=model.transformer, scheduler=FlowMatchEulerDiscreteScheduler(**config), vae=model.vae, text_encoder=model.text,
        tokenizer=model.tokenizer, text_encoder_2=model.text_2, tokenizer_2=model.tokenizer_2, text_encoder_3=model.text_3,
        tokenizer_3=model.tokenizer_3,
    )
    pipeline.set_progress_bar_config(disable=True)
    w, h = settings.size
    got = pipeline(
        prompt=settings.prompt, negative_prompt=settings.negative or "", height=h, width=w, num_inference_steps=settings.steps,
        guidance_scale=settings.guidance, latents=noise.double(), max_sequence_length=length, output_type="latent",
    ).images
    error = relative(got, latent)
    assert error < 1e-5, error
    return error


def main():
    torch.set_num_threads(1)
    ROOT.mkdir(parents=True, exist_ok=True)
    models = {name: build(name) for name in MODELS}
    listed = []
    for name, (on, changes) in RUNS.items():
        settings, length = reference.Settings(prompt="a photo of a cat", **changes), 77
        tensors = run(models[on], settings, length)
        note = ""
        if settings.method == "plain":
            note = f"published pipeline: {check_published(models[on], settings, length, tensors['latent'], tensors['noise0']):.1e}"
        kept = {k: v for k, v in tensors.items() if not k.startswith("noise") and k != "latent"}
        for _, attribute in PARTS:
            if getattr(models[on], attribute) is not None:
                getattr(models[on], attribute).float()
        in_f32 = run(models[on], settings, length)
        for _, attribute in PARTS:
            if getattr(models[on], attribute) is not None:
                getattr(models[on], attribute).double()  # what was f32 before: the same values
        error = max(relative(in_f32[key], kept[key]) for key in kept)
        save_file({k: v.float().contiguous() for k, v in kept.items()}, ROOT / f"{name}.safetensors")
        if name in ("plain", "plain-3.5", "plain-negative"):
            # As `probe` has it, with 256 tokens of T5; the first 40 rows.
            with torch.no_grad():
                embeds, pooled = encode(models[on], settings.prompt, 256)
            save_file({"prompt_embeds": embeds[:, :40].float().contiguous(), "pooled_prompt_embeds": pooled.float()},
                      ROOT / f"{name}-text.safetensors")
        args = settings.args({"prompt": None} | changes) + ["--t5-length", str(length)]
        listed.append({"name": name, "model": f"sd3/{on}", "args": args, "f32_error": float(f"{error:.1e}")})
        print(name, f"torch in f32: {error:.1e}", note)
    (ROOT / "runs.json").write_text(json.dumps({"runs": listed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
