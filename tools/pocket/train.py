"""Trains, exports and scores the pocket model: a Stable Diffusion of five million parameters that draws scenes.py.

The stages, in order (each resumes from its checkpoint in --work, so a stopped run is continued by the same command):

    python train.py vae    --work run --minutes 20
    python train.py unet   --work run --minutes 600
    python train.py vae    --work run --minutes 60 --decoder-only
    python train.py export --work run --out ../../models/pocket
    python train.py eval   --model ../../models/pocket --pictures out

or, all but the last in one command, which shares out the minutes:

    python train.py all    --work run --minutes 60 --out ../../models/pocket

The model is the same shape as Stable Diffusion 1.x (CLIP text encoder, cross-attention UNet that predicts the noise,
KL autoencoder), only smaller: 64x64 pictures, latents 4x16x16. The text encoder is trained together with the UNet. The
third stage keeps the encoder, and with it the latents the UNet has learned; it may run beside the second. --warm DIR
starts the first two stages from an exported model instead of from random weights. On a GPU (--device cuda) the UNet
runs in bf16, everything else in TF32; take a larger --batch there, and --workers to render the pictures.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import read
import scenes

NATIVE = 64
MAX_TOKENS = 20
CLOSE_UP_BELOW = 600  # timesteps
CLOSE_UP_SHARE = 0.35  # of the UNet's samples at those
ASPECTS = ((44, 92), (92, 44), (32, 128), (128, 32))  # width, height: the native area at about 1:2, 2:1, 1:4 and 4:1
ASPECTS_SHARE = 0.3  # of the UNet's steps
PAIR_SHARE = 2 / 3  # of the UNet's samples: which object has which colour, shape and side is the hardest to learn
LATENT_SCALE = 0.18215  # one over the standard deviation of the latents, as in Stable Diffusion 1.x
HERE = Path(__file__).resolve().parent


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def byte_symbols():
    """CLIP's (and GPT-2's) printable character for each byte, in vocabulary order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(rest))]


def caption_words():
    text = " ".join(scenes.KIND_OF) + " a and"
    return sorted(set(text.replace(",", " , ").split()))


def learn_merges(words):
    """Byte-pair merges, most frequent pair first, until every word is one symbol."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(s) > 1 for s in spelled):
        count = {}
        for s in spelled:
            for pair in zip(s, s[1:]):
                count[pair] = count.get(pair, 0) + 1
        best = min(count, key=lambda pair: (-count[pair], pair))
        merges.append(best)
        for k, s in enumerate(spelled):
            joined, i = [], 0
            while i < len(s):
                if tuple(s[i : i + 2]) == best:
                    joined.append(s[i] + s[i + 1])
                    i += 2
                else:
                    joined.append(s[i])
                    i += 1
            spelled[k] = joined
    return merges


def write_tokenizer(directory):
    """The files of a CLIPTokenizer whose merges cover the caption words; other text falls back to bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    symbols, merges = byte_symbols(), learn_merges(caption_words())
    entries = symbols + [s + "</w>" for s in symbols] + ["".join(m) for m in merges]
    entries = list(dict.fromkeys(entries)) + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {entry: i for i, entry in enumerate(entries)}
    (directory / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    start, end = (
        {"content": c, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        for c in ("<|startoftext|>", "<|endoftext|>")
    )
    special = {"bos_token": start, "eos_token": end, "pad_token": "<|endoftext|>", "unk_token": end}
    write_json(directory / "special_tokens_map.json", special)
    write_json(
        directory / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "bos_token": start | {"__type": "AddedToken"},
            "do_lower_case": True,
            "eos_token": end | {"__type": "AddedToken"},
            "errors": "replace",
            "model_max_length": MAX_TOKENS,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": end | {"__type": "AddedToken"},
        },
    )
    return CLIPTokenizer.from_pretrained(directory)


def tokenize(tokenizer, captions):
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids


# ---- models ----------------------------------------------------------------------------------------------------------


def new_vae():
    return AutoencoderKL(
        sample_size=NATIVE,
        latent_channels=4,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def new_unet():
    return UNet2DConditionModel(
        sample_size=NATIVE // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 96, 96),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,  # diffusers' name for the number of heads
    )


def new_text_encoder(tokenizer):
    """With word embeddings far larger than CLIP's 0.02: there the biases, learned first, drown the words."""
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    torch.nn.init.normal_(model.embeddings.position_embedding.weight, std=0.1)
    return model


def new_scheduler():
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
        timestep_spacing="leading",
        prediction_type="epsilon",
    )


def exported_weights(directory, part):
    """The weights of one part of an exported model, in f32."""
    (path,) = (directory / part).glob("*.safetensors")
    return {k.removeprefix("text_model."): v.float() for k, v in load_file(path).items()}


def warm_text_encoder(directory, module, tokenizer):
    """Loads an exported text encoder that may know other words: those new to it keep their fresh embeddings."""
    weights = exported_weights(directory, "text_encoder")
    key = "embeddings.token_embedding.weight"
    old, known = weights[key], json.loads((directory / "tokenizer" / "vocab.json").read_text())
    weights[key] = module.get_input_embeddings().weight.data.clone()
    for word, row in tokenizer.get_vocab().items():
        if word in known:
            weights[key][row] = old[known[word]]
    prefix = "text_model." if any(k.startswith("text_model.") for k in module.state_dict()) else ""
    module.load_state_dict({prefix + k: v for k, v in weights.items()})


# ---- training, shared ------------------------------------------------------------------------------------------------


class Run:
    """One stage's models, optimizer, averaged weights and clock; saved and restored as one file."""

    def __init__(self, path, modules, rate, minutes, device, ema_decay):
        self.path, self.modules, self.rate, self.ema_decay = path, modules, rate, ema_decay
        self.seconds_planned, self.seconds_done, self.step = minutes * 60.0, 0.0, 0
        for m in modules.values():
            m.to(device=device, memory_format=torch.channels_last)
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=device != "cpu"
        )
        self.rng = np.random.default_rng(0)
        self.averages = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in modules.items()}
        if path.exists():
            saved = torch.load(path, map_location=device, weights_only=False)
            for n, m in modules.items():
                m.load_state_dict(saved["modules"][n])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.averages, self.step, self.seconds_done = saved["averages"], saved["step"], saved["seconds_done"]
            self.rng.bit_generator.state = saved["numpy_rng"]
            torch.set_rng_state(saved["torch_rng"].cpu())
            print(f"resumed {path.name} at step {self.step}, {self.seconds_done / 60:.1f} min", flush=True)
        self.last_tick, self.stopped = time.monotonic(), False
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, lambda *_: setattr(self, "stopped", True))

    def goes_on(self):
        """Whether to take another step. Once interrupted: the state is saved and the program ends."""
        if self.stopped:
            self.save()
            raise SystemExit(f"stopped at step {self.step}; the same command goes on from there")
        return self.progress() < 1

    def progress(self):
        """Fraction of the planned time that is used up; the learning rate follows it, not the step count."""
        return min(self.seconds_done / self.seconds_planned, 1.0)

    def update(self, loss):
        """One optimizer step; rate: 200 steps of warm-up, constant for half the planned time, then half a cosine."""
        fall = max(0.0, 2.0 * self.progress() - 1.0)
        rate = self.rate * min(1.0, (self.step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * fall)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for n, m in self.modules.items():
                now = {k: v for k, v in m.state_dict().items() if v.dtype.is_floating_point}
                torch._foreach_lerp_([self.averages[n][k] for k in now], list(now.values()), 1 - decay)
        now = time.monotonic()
        self.seconds_done += now - self.last_tick
        self.last_tick = now

    def save(self):
        saved = {
            "modules": {n: m.state_dict() for n, m in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "averages": self.averages,
            "step": self.step,
            "seconds_done": self.seconds_done,
            "numpy_rng": self.rng.bit_generator.state,
            "torch_rng": torch.get_rng_state(),
        }
        write_atomically(self.path, lambda path: torch.save(saved, path))

    def averaged(self, name):
        """The averaged weights of one module, loaded into it."""
        self.modules[name].load_state_dict(self.averages[name])
        return self.modules[name].eval()


def averaged_weights(path, name, device):
    """The averaged weights of one module in a checkpoint."""
    if not path.exists():
        raise SystemExit(f"{path} is missing: run the {path.stem} stage with this --work first")
    return torch.load(path, map_location=device, weights_only=False)["averages"][name]


def write_atomically(path, write):
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def save_array(path, array):
    with path.open("wb") as file:
        np.save(file, array)


def in_bytes(picture):
    return (picture * 255.0 + 0.5).astype(np.uint8)


def to_tensor(pictures):
    """[n, h, w, 3] in 0..1 or in bytes -> float [n, 3, h, w] in -1..1."""
    pictures = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return (pictures.float() / 255.0 if pictures.dtype == torch.uint8 else pictures) * 2 - 1


def in_parallel(function, items, workers):
    """[function(item) for item in items], by so many processes."""
    if workers == 1:
        return [function(item) for item in items]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return pool.map(function, items, chunksize=64)


# ---- stage vae -------------------------------------------------------------------------------------------------------


def vae_picture(seed):
    """A 64x64 picture in bytes: a scene or a crowd, whole or a window of it at two or four times the size."""
    rng = np.random.default_rng([4, seed])
    scale = (1, 1, 2, 4)[rng.integers(4)]
    size = NATIVE * scale
    crowd = rng.random() < 0.5
    scene = scenes.random_scene(rng, scenes.random_kind(rng))
    things = scene.things(size, size)
    x, y = rng.uniform(0, 1, 2) if crowd else things[rng.integers(len(things))].centre
    left, top = (int(np.clip((c + rng.uniform(-0.12, 0.12)) * size - NATIVE / 2, 0, size - NATIVE)) for c in (x, y))
    window = (left, top, NATIVE, NATIVE)
    picture = scenes.render_crowd(rng, size, window) if crowd else scenes.render(scene, size, window=window)
    return in_bytes(picture)


def vae_pictures(args):
    """The autoencoder's training pictures, bytes [n, 64, 64, 3], drawn once and kept in --work."""
    path = args.work / "pictures.npy"
    if not path.exists():
        drawn = np.stack(in_parallel(vae_picture, range(args.pictures), args.workers))
        write_atomically(path, lambda part: save_array(part, drawn))
    return np.load(path)


def picture_loss(out, target):
    """L1 on the pixels and on their differences to the right and lower neighbour; the objects count five times.

    They cover little of most pictures: unweighted, the colours of the objects are learned long after the grounds.
    """
    apart = (target - target.flatten(2).median(dim=2).values[..., None, None]).abs().amax(dim=1, keepdim=True) > 0.3
    weight = 1.0 + 4.0 * F.max_pool2d(apart.float(), 3, stride=1, padding=1)
    error = out - target
    edges = (error.diff(dim=-1).abs() * weight[..., 1:]).mean() + (error.diff(dim=-2).abs() * weight[..., 1:, :]).mean()
    return (error.abs() * weight).mean() + 0.5 * edges


def psnr(out, target):
    """Mean over the pictures of 10 log10(1 / mse), values in 0..1."""
    mse = ((out.clamp(-1, 1) - target) / 2).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(1 / mse)).mean())


def stage_vae(args):
    """The autoencoder; with --decoder-only the encoder stays as it is, so latents made with it stay valid."""
    vae = new_vae()
    with torch.no_grad():  # little posterior noise from the start: it falls slowly, and blurs the pictures until then
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = -6.0
    if args.warm:
        vae.load_state_dict(exported_weights(args.warm, "vae"))
    if args.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    path = args.work / ("decoder.ckpt" if args.decoder_only else "vae.ckpt")
    run = Run(path, {"vae": vae}, args.rate or 4e-4, args.minutes, args.device, 0.995)
    if args.decoder_only and run.step == 0:
        saved = averaged_weights(args.work / "vae.ckpt", "vae", args.device)
        vae.load_state_dict(saved)
        run.averages["vae"] = {k: v.clone() for k, v in saved.items()}
    if run.progress() >= 1:
        return
    if not args.decoder_only and (args.work / "latents.safetensors").exists():
        print("the autoencoder stays: latents.safetensors was encoded with it; delete that to train it on", flush=True)
        return
    vae.train()
    pictures = vae_pictures(args)
    run.last_tick = time.monotonic()
    while run.goes_on():
        target = to_tensor(pictures[run.rng.integers(len(pictures), size=args.batch or 8)]).to(args.device)
        target = target.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(target).latent_dist
        out = vae.decode(posterior.sample()).sample
        loss = picture_loss(out, target)
        if not args.decoder_only:
            loss = loss + 3e-5 * posterior.kl().mean() / posterior.mean[0].numel()
        run.update(loss)
        if run.step % 50 == 0:
            with torch.no_grad():
                print(
                    f"step {run.step} {run.seconds_done / 60:.1f} min loss {loss.item():.4f} "
                    f"psnr {psnr(out, target):.2f} std {posterior.mean.std():.2f} noise {posterior.std.mean():.4f}",
                    flush=True,
                )
        if run.step % 200 == 0:
            run.save()
    if not args.decoder_only:
        run.averages["vae"] = standardised(run.averages["vae"], run.averaged("vae"))
    run.save()


@torch.no_grad()
def standardised(weights, vae):
    """The same autoencoder with every latent channel at mean 0 and at Stable Diffusion's usual standard deviation.

    Both are folded into the 1x1 convolutions around the latents. Without it the channels' deviations were 3.7, 1.7, 1.6
    and 0.65: the noise would hide the last channel long before the first.
    """
    device = vae.quant_conv.weight.device
    parts = [to_tensor([whole_scene(i)[0] for i in range(k, k + 64)]).to(device) for k in range(0, 512, 64)]
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in parts])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)) * LATENT_SCALE
    weights = {k: v.clone() for k, v in weights.items()}
    quant, post = weights["quant_conv.weight"], weights["post_quant_conv.weight"]
    quant[:4] /= std[:, None, None, None]
    weights["quant_conv.bias"][:4] = (weights["quant_conv.bias"][:4] - mean) / std
    weights["quant_conv.bias"][4:] -= 2 * std.log()
    weights["post_quant_conv.bias"] += post[:, :, 0, 0] @ mean
    post *= std[None, :, None, None]
    return weights


def load_vae(work, device):
    """The averaged autoencoder, with the later-trained decoder where there is one."""
    path = work / "decoder.ckpt"
    path = path if path.exists() else work / "vae.ckpt"
    vae = new_vae()
    vae.load_state_dict(averaged_weights(path, "vae", device))
    return vae.to(device=device, memory_format=torch.channels_last).eval()


TRAINING_KINDS = scenes.TRAINING_GROUPS + scenes.TRAINING_PAIRS
ROW_OF = {kind: row for row, kind in enumerate(TRAINING_KINDS)}


def whole_scene(seed, size=(NATIVE, NATIVE)):
    """(a training scene of `size`, width and height, in bytes; the row of its kind in TRAINING_KINDS)."""
    rng = np.random.default_rng([1, seed])
    kind = scenes.random_kind(rng)
    return in_bytes(scenes.render(scenes.random_scene(rng, kind), *size)), ROW_OF[kind]


def close_up(seed):
    """(a 64x64 window around an object of a training scene at 80x80 to 256x256, the row of its kind).

    Without these the model knows objects of two sizes and textures of one; photographs have both at every scale.
    """
    rng = np.random.default_rng([7, seed])
    kind, size = scenes.random_kind(rng), int(rng.integers(80, 257))
    scene = scenes.random_scene(rng, kind)
    things = scene.things(size, size)
    centre = things[rng.integers(len(things))].centre
    left, top = (int(np.clip(c * size + rng.uniform(-40, 40) - NATIVE / 2, 0, size - NATIVE)) for c in centre)
    return in_bytes(scenes.render(scene, size, window=(left, top, NATIVE, NATIVE))), ROW_OF[kind]


@torch.no_grad()
def encoded(args, name, draw, count):
    """(latents, rows in TRAINING_KINDS) of draw(0) to draw(count - 1), encoded once, kept in --work."""
    path = args.work / f"{name}.safetensors"
    if not path.exists():
        vae, latents, rows = load_vae(args.work, args.device), [], []
        for i in range(0, count, 4096):
            drawn = in_parallel(draw, range(i, min(i + 4096, count)), args.workers)
            rows += [row for _, row in drawn]
            for k in range(0, len(drawn), 64):
                pictures = to_tensor([picture for picture, _ in drawn[k : k + 64]]).to(args.device)
                latents.append(vae.encode(pictures).latent_dist.mean.contiguous().cpu())
            print(f"{name}: encoded {len(rows)} of {count}", flush=True)
        tensors = {"latents": torch.cat(latents), "kinds": torch.tensor(rows)}
        write_atomically(path, lambda part: save_file(tensors, part))
    saved = load_file(path)
    return saved["latents"], saved["kinds"]


def encode_scenes(args):
    """(latents, rows in TRAINING_KINDS, scaling factor) of --scenes training scenes."""
    latents, rows = encoded(args, "latents", whole_scene, args.scenes)
    return latents, rows, 1.0 / float(latents.std())


# ---- stage unet ------------------------------------------------------------------------------------------------------


class Samples:
    """Latents of pictures of one size, scaled, on the training device, and the rows of their kinds in TRAINING_KINDS.

    Whole scenes first, close-ups behind them.
    """

    def __init__(self, latents, kinds, scale, device, close_ups=None):
        self.whole = len(latents)
        of_groups = (kinds < len(scenes.TRAINING_GROUPS)).numpy()
        self.group_rows, self.pair_rows = np.flatnonzero(of_groups), np.flatnonzero(~of_groups)
        if close_ups is not None:
            latents, kinds = torch.cat([latents, close_ups[0]]), torch.cat([kinds, close_ups[1]])
        self.latents, self.kinds = (latents * scale).to(device), kinds

    def __len__(self):
        return len(self.latents)

    def choose(self, rng, t):
        """A row for every timestep of t [n]."""
        n = len(t)
        of_pair = rng.random(n) < PAIR_SHARE
        rows = np.where(of_pair, rng.choice(self.pair_rows, n), rng.choice(self.group_rows, n))
        if len(self) == self.whole:
            return rows
        near = (t.numpy() < CLOSE_UP_BELOW) & (rng.random(n) < CLOSE_UP_SHARE)
        return np.where(near, rng.integers(self.whole, len(self), n), rows)


def encode_samples(args):
    """([Samples at the native size, then at every one of ASPECTS], the scaling factor)."""
    latents, kinds, scale = encode_scenes(args)
    close_ups = encoded(args, "close-ups", close_up, args.close_ups) if args.close_ups else None
    samples = [Samples(latents, kinds, scale, args.device, close_ups)]
    for width, height in ASPECTS if args.aspects else ():
        draw = functools.partial(whole_scene, size=(width, height))
        samples.append(Samples(*encoded(args, f"{width}x{height}", draw, args.aspects), scale, args.device))
    return samples, scale


def stage_unet(args):
    """The noise predictor and the text encoder, on encoded scenes.

    The error of the noise is weighted by clamp(SNR, 0.1, 5) / SNR. The upper bound is min-SNR weighting (Hang et al.
    2023, arXiv:2303.09556). The lower one is for the caption: number and position are settled at an SNR near 0.01,
    where the noise is easily told from the picture and a wrong picture costs next to nothing in the noise.

    Close-ups are learned at little noise only, where the picture itself shows its scale: a caption stays that of a
    whole scene. A step's samples are all of one size, as in SDXL's multi-aspect training (Podell et al. 2023,
    arXiv:2307.01952).
    """
    samples, scale = encode_samples(args)
    native, others = samples[0], samples[1:]
    close_ups, at_others = len(native) - native.whole, sum(map(len, others))
    print(f"{native.whole} scenes, {close_ups} close-ups, {at_others} at other aspects, scale {scale:.4f}", flush=True)
    tokenizer = write_tokenizer(args.work / "tokenizer")
    modules = {"unet": new_unet(), "text_encoder": new_text_encoder(tokenizer)}
    if args.warm:
        modules["unet"].load_state_dict(exported_weights(args.warm, "unet"))
        warm_text_encoder(args.warm, modules["text_encoder"], tokenizer)
    run = Run(args.work / "unet.ckpt", modules, args.rate or 4e-4, args.minutes, args.device, 0.999)
    unet, text_encoder = (m.train() for m in modules.values())
    if args.compile:
        unet = torch.compile(unet)
    abar = new_scheduler().alphas_cumprod.to(args.device)
    batch, total, tokens = args.batch or 32, 0.0, {}
    while run.goes_on():
        chosen = native
        if others and run.rng.random() < ASPECTS_SHARE:
            chosen = others[run.rng.integers(len(others))]
        t = (1000 * torch.rand(batch) ** 0.75).long().clamp(max=999)  # noisier pictures more often
        rows = chosen.choose(run.rng, t)
        captions = [scenes.random_caption(run.rng, TRAINING_KINDS[k]) for k in chosen.kinds[rows].tolist()]
        for new in set(captions) - tokens.keys():
            tokens[new] = tokenize(tokenizer, new)[0]
        clean = chosen.latents[torch.from_numpy(rows).to(args.device)].contiguous(memory_format=torch.channels_last)
        noise = torch.randn_like(clean)
        t = t.to(args.device)
        a = abar[t][:, None, None, None]
        with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.bf16):
            context = text_encoder(torch.stack([tokens[c] for c in captions]).to(args.device)).last_hidden_state
            out = unet(a.sqrt() * clean + (1 - a).sqrt() * noise, t, context).sample
        snr = abar[t] / (1 - abar[t])
        loss = ((out.float() - noise).square().mean(dim=(1, 2, 3)) * snr.clamp(0.1, 5) / snr).mean()
        run.update(loss)
        total += loss.detach()
        if run.step % 100 == 0:
            print(f"step {run.step} {run.seconds_done / 60:.1f} min loss {float(total) / 100:.4f}", flush=True)
            total = 0.0
        if run.step % 200 == 0:
            run.save()
    run.save()


# ---- stages export and eval ------------------------------------------------------------------------------------------


def stage_export(args):
    """The averaged weights as a diffusers directory in f16; a part without a checkpoint yet is exported untrained."""
    tokenizer = write_tokenizer(args.out / "tokenizer")
    modules = {"unet": new_unet(), "text_encoder": new_text_encoder(tokenizer), "vae": new_vae()}
    if (args.work / "vae.ckpt").exists():
        modules["vae"] = load_vae(args.work, "cpu")
    if (args.work / "unet.ckpt").exists():
        saved = torch.load(args.work / "unet.ckpt", map_location="cpu", weights_only=False)["averages"]
        for name, weights in saved.items():
            modules[name].load_state_dict(weights)
        _, _, scale = encode_scenes(args)
        modules["vae"].register_to_config(scaling_factor=round(scale, 6))
    for name, module in modules.items():
        module.half().to(memory_format=torch.contiguous_format).save_pretrained(args.out / name)
        print(f"{name}: {sum(p.numel() for p in module.parameters())} parameters")
    # transformers 5 drops the prefix that every published Stable Diffusion checkpoint has, and would load the text
    # encoder in the type named here while diffusers loads the other parts in f32.
    text_encoder = args.out / "text_encoder"
    weights = load_file(text_encoder / "model.safetensors")
    weights = {k if k.startswith("text_model.") else "text_model." + k: v for k, v in weights.items()}
    save_file(weights, text_encoder / "model.safetensors", {"format": "pt"})
    config = json.loads((text_encoder / "config.json").read_text())
    config.pop("dtype", None)
    write_json(text_encoder / "config.json", config | {"torch_dtype": "float32"})
    for file in args.out.rglob("*.safetensors"):
        file.chmod(0o644)
    new_scheduler().save_pretrained(args.out / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(args.out / "model_index.json", index)


def stage_all(args):
    """Autoencoder, UNet with text encoder, decoder, export: 20, 70 and 10 % of the minutes."""
    minutes = args.minutes
    args.decoder_only, args.minutes, args.batch = False, 0.2 * minutes, args.vae_batch
    stage_vae(args)
    args.minutes, args.batch = 0.7 * minutes, args.unet_batch
    stage_unet(args)
    args.decoder_only, args.minutes, args.batch = True, 0.1 * minutes, args.vae_batch
    stage_vae(args)
    stage_export(args)


def captions_to_score(args):
    """The first of --captions; or, with --split training, complete captions trained on, to choose a guidance by."""
    if args.split == "heldout":
        return read.held_out_captions(args.captions)[: args.count]
    rng = np.random.default_rng(5)
    return [scenes.random_wording(rng, scenes.random_kind(rng)) for _ in range(args.count)]


def stage_eval(args):
    """Pictures of captions through diffusers, and what read.py finds in them."""
    pipe = StableDiffusionPipeline.from_pretrained(args.model, safety_checker=None).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    captions = captions_to_score(args)
    args.pictures.mkdir(parents=True, exist_ok=True)
    for i in range(0, len(captions), 25):
        part = captions[i : i + 25]
        seeds = [torch.Generator("cpu").manual_seed(args.seed + i + k) for k in range(len(part))]
        pictures = pipe(part, num_inference_steps=args.steps, guidance_scale=args.guidance, generator=seeds).images
        for k, picture in enumerate(pictures):
            picture.save(args.pictures / f"{i + k:03d}.png")
    (args.pictures / "captions.txt").write_text("\n".join(captions) + "\n")
    print(f"{args.steps} DDIM steps, guidance {args.guidance}, seeds {args.seed}..{args.seed + len(captions) - 1}")
    read.score_directory(args.pictures, captions)
    for size in (NATIVE, 4 * NATIVE):
        print(f"autoencoder at {size}x{size}: psnr {vae_psnr(pipe.vae, size, 50):.2f} dB on 50 held-out scenes")


@torch.no_grad()
def vae_psnr(vae, size, count):
    """Of renderings of held-out kinds, encoded to the posterior's mean and decoded."""
    rng, values = np.random.default_rng(3), []
    for caption in read.held_out_captions()[:count]:
        scene = scenes.random_scene(rng, scenes.KIND_OF[caption])
        picture = to_tensor([scenes.render(scene, size)]).to(vae.device)
        values.append(psnr(vae.decode(vae.encode(picture).latent_dist.mean).sample, picture))
    return float(np.mean(values))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="stage", required=True)

    vae = commands.add_parser("vae", help="train the autoencoder")
    vae.add_argument("--decoder-only", action="store_true", help="train on with the encoder frozen")
    unet = commands.add_parser("unet", help="train the UNet and the text encoder")
    export = commands.add_parser("export", help="write the diffusers directory")
    everything = commands.add_parser("all", help="vae, unet, vae --decoder-only and export, one after another")
    for command in (export, everything):
        command.add_argument("--out", type=Path, required=True, help="directory to write")
    for command in (vae, unet):
        command.add_argument("--batch", type=int, help="samples in a step (default 8; of the UNet 32)")
    everything.add_argument("--vae-batch", type=int, default=8, help="samples in a step of the autoencoder")
    everything.add_argument("--unet-batch", type=int, default=32, help="samples in a step of the UNet")
    for command in (vae, unet, everything):
        command.add_argument("--minutes", type=float, required=True, help="planned training time, over all resumptions")
        command.add_argument("--rate", type=float, help="peak learning rate (default 4e-4)")
        command.add_argument("--warm", type=Path, metavar="DIR", help="start from this exported model")
    for command in (vae, everything):
        command.add_argument("--pictures", type=int, default=16000, help="pictures to draw for the autoencoder")
    for command in (unet, everything):
        command.add_argument("--bf16", action="store_true", help="multiply in bf16 (default: on a GPU)")
        command.add_argument("--compile", action="store_true", help="torch.compile the UNet")
    for command in (vae, unet, export, everything):
        command.add_argument("--work", type=Path, required=True, help="directory of checkpoints and encoded scenes")
        command.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
    for command in (unet, export, everything):
        command.add_argument("--scenes", type=int, default=30000, help="scenes to encode for the UNet")
        command.add_argument("--close-ups", type=int, default=8000, help="close-ups to encode for the UNet; 0: none")
        command.add_argument("--aspects", type=int, default=4000, help="scenes at each other aspect ratio; 0: none")

    score = commands.add_parser("eval", help="generate the held-out captions and score the pictures")
    score.add_argument("--model", type=Path, required=True, help="exported directory")
    score.add_argument("--pictures", type=Path, required=True, help="directory for the pictures")
    score.add_argument("--split", choices=("heldout", "training"), default="heldout", help="which captions")
    score.add_argument("--captions", type=Path, default=read.HELD_OUT, help="file of captions, one a line")
    score.add_argument("--count", type=int, default=500, help="how many captions")
    score.add_argument("--steps", type=int, default=50, help="DDIM steps")
    score.add_argument("--guidance", type=float, default=2.0, help="guidance scale")
    score.add_argument("--seed", type=int, default=0, help="seed of the first picture; the others count up")

    for command in (vae, unet, export, everything, score):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device != "cpu":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        args.bf16 = True
    if args.stage != "eval":
        torch.manual_seed(0)
        args.work.mkdir(parents=True, exist_ok=True)
    stages = {"vae": stage_vae, "unet": stage_unet, "export": stage_export, "all": stage_all, "eval": stage_eval}
    stages[args.stage](args)


if __name__ == "__main__":
    main()
