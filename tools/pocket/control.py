"""Trains, exports and scores a ControlNet for the pocket model: objects where outlines have them, and of their shape.

    python control.py train  --work run --minutes 60        goes on where it stopped
    python control.py export --work run --out ../../models/pocket-outlines
    python control.py draw   --set scattered --out set      outlines and manifest.jsonl, for megafuse generate --manifest
    python control.py score  --set scattered --pictures pictures

ControlNet: Zhang, Rao & Agrawala 2023, arXiv:2302.05543. It begins as a copy of the UNet's encoder and middle block;
the UNet and the text encoder stay as they are. The condition is what scenes.outlines draws. Half of the scenes are
those of the captions, half are scattered: objects anywhere and in any size, with captions that say nothing of either,
so that the outlines must be read. Three captions in ten are empty, three outlines in ten have gaps.
"""

import argparse
import functools
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from transformers import CLIPTextModel, CLIPTokenizer

import read
import scenes
import train
from train import ASPECTS, ASPECTS_SHARE, CLOSE_UP_BELOW, CLOSE_UP_SHARE, NATIVE, PAIR_SHARE, TRAINING_KINDS

HINT_CHANNELS = (16, 32, 64)  # three levels: the autoencoder's factor is 4
EMPTY_SHARE = 0.3  # of the captions
LINES = (0.25, 3.0)  # pixels: a line of one pixel is a quarter of one in the stage of 64x64 of a picture of 256x256
BROKEN_SHARE = 0.3
NEAR = 0.05  # shorter sides; 3 pixels of 64. Further away, an object is not that of an outline
SETS = ("kinds", "scattered", "empty", "moved", "reshaped")


# ---- what is trained on ----------------------------------------------------------------------------------------------


def random_kind(rng):
    groups, pairs = scenes.TRAINING_GROUPS, scenes.TRAINING_PAIRS
    return pairs[rng.integers(len(pairs))] if rng.random() < PAIR_SHARE else groups[rng.integers(len(groups))]


def sample(seed, width=NATIVE, height=NATIVE, closer=False):
    """(picture, outlines, both in bytes, row of the kind, whether scattered); closer: of a window around an object."""
    rng = np.random.default_rng([9, width, height, closer, seed])
    kind, scattered = random_kind(rng), rng.random() < 0.5
    line = np.exp(rng.uniform(*np.log(LINES)))
    side = int(rng.integers(80, 257)) if closer else None
    whole = (side, side) if closer else (width, height)
    scene = scenes.scattered_scene(rng, kind, *whole) if scattered else scenes.random_scene(rng, kind)
    window = None
    if closer:
        things = scene.things(*whole)
        centre = np.array(things[rng.integers(len(things))].centre) * side + rng.uniform(-0.12, 0.12, 2) * side
        left, top = np.clip((centre - NATIVE / 2).astype(int), 0, side - NATIVE)
        window = (int(left), int(top), NATIVE, NATIVE)
    picture, drawn = scenes.render(scene, *whole, window), scenes.outlines(scene, *whole, line, window)
    if rng.random() < BROKEN_SHARE:
        drawn = broken(rng, drawn, min(whole))
    return train.in_bytes(picture), train.in_bytes(drawn), train.ROW_OF[kind], scattered


def broken(rng, drawn, short):
    """Outlines with one to three gaps, as Canny leaves them."""
    drawn, (rows, columns) = drawn.copy(), np.nonzero(drawn)
    for _ in range(rng.integers(1, 4) if len(rows) else 0):
        k, half = rng.integers(len(rows)), rng.uniform(0.01, 0.04) * short
        top, left = (max(0, round(at[k] + 0.5 - half)) for at in (rows, columns))
        drawn[top : round(rows[k] + 0.5 + half), left : round(columns[k] + 0.5 + half)] = 0.0
    return drawn


@torch.no_grad()
def encoded(args, name, draw, count, first=0):
    """latents (scaled), outlines, kinds and whether scattered of count samples, drawn once and kept in --work."""
    path = args.work / f"{name}.safetensors"
    if not path.exists():
        vae = load(args.model, "vae")
        rows = {"latents": [], "outlines": [], "kinds": [], "scattered": []}
        for i in range(first, first + count, 64):
            drawn = train.in_parallel(draw, range(i, min(i + 64, first + count)), args.workers)
            pictures, lines, kinds, scattered = zip(*drawn)
            latents = vae.encode(train.to_tensor(pictures)).latent_dist.mean * vae.config.scaling_factor
            rows["latents"].append(latents.contiguous())
            rows["outlines"].append(torch.from_numpy(np.stack(lines)))
            rows["kinds"].append(torch.tensor(kinds))
            rows["scattered"].append(torch.tensor(scattered))
        tensors = {k: torch.cat(v) for k, v in rows.items()}
        train.write_atomically(path, lambda part: save_file(tensors, part))
        print(f"{name}: encoded {count}", flush=True)
    return load_file(path)


def encode_samples(args):
    """(whole scenes, close-ups, [whole scenes of another aspect ratio])."""
    whole = encoded(args, "whole", sample, args.samples)
    closer = encoded(args, "closer", functools.partial(sample, closer=True), args.samples // 4)
    others = [
        encoded(args, f"{w}x{h}", functools.partial(sample, width=w, height=h), args.samples // 10)
        for w, h in ASPECTS
    ]
    return whole, closer, others


def caption_of(rng, kind, scattered):
    """A caption as seen in training; of a scattered scene without places and sizes."""
    if rng.random() < EMPTY_SHARE:
        return ""
    kept = 0.85 if scattered or rng.random() < 0.3 else 1.0
    words = [w for w in (scenes.SCATTERED_WORDS if scattered else kind.WORDS) if rng.random() < kept]
    return worded(rng, kind, words)


def worded(rng, kind, words):
    return kind.caption(words, turned=rng.random() < 0.5) if isinstance(kind, scenes.Pair) else kind.caption(words)


# ---- training --------------------------------------------------------------------------------------------------------


def load(model, part):
    """A part of an exported model, frozen."""
    if part == "vae":
        module = train.new_vae()
        module.register_to_config(**json.loads((model / "vae" / "config.json").read_text()))
    elif part == "unet":
        module = train.new_unet()
    if part == "text_encoder":
        module = CLIPTextModel.from_pretrained(model / "text_encoder", dtype=torch.float32)
    else:
        module.load_state_dict(train.exported_weights(model, part))
    return module.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def new_controlnet(unet):
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINT_CHANNELS)


class Denoiser:
    """The frozen UNet and text encoder, and the loss of a batch with them."""

    def __init__(self, model):
        self.unet, self.text_encoder = load(model, "unet"), load(model, "text_encoder")
        self.tokenizer, self.contexts = CLIPTokenizer.from_pretrained(model / "tokenizer"), {}
        self.abar = train.new_scheduler().alphas_cumprod

    @torch.no_grad()
    def context(self, captions):
        new = sorted(set(captions) - self.contexts.keys())
        if new:
            states = self.text_encoder(train.tokenize(self.tokenizer, new)).last_hidden_state
            self.contexts.update(zip(new, states))
        return torch.stack([self.contexts[c] for c in captions])

    def errors(self, controlnet, clean, lines, captions, t, noise):
        """Squared error of the noise, of every sample; without a ControlNet that of the UNet alone."""
        a, context = self.abar[t][:, None, None, None], self.context(captions)
        noisy = (a.sqrt() * clean + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        added = {}
        if controlnet is not None:
            hint = (lines.float() / 255.0)[:, None].repeat(1, 3, 1, 1)
            skips, middle = controlnet(noisy, t, context, hint, return_dict=False)
            added = {"down_block_additional_residuals": skips, "mid_block_additional_residual": middle}
        out = self.unet(noisy, t, context, **added).sample
        return (out - noise).square().mean(dim=(1, 2, 3))


def weight(abar):
    """Of a sample's error: train.py's stage_unet says why."""
    snr = abar / (1 - abar)
    return snr.clamp(0.1, 5) / snr


class Validation:
    """Scattered and other scenes that are not trained on, at fixed timesteps with fixed noise."""

    def __init__(self, args, denoiser):
        held = encoded(args, "validation", sample, 512, first=10_000_000)
        rng, generator = np.random.default_rng(1), torch.Generator().manual_seed(1)
        self.denoiser, self.latents, self.outlines = denoiser, held["latents"], held["outlines"]
        pairs = zip(held["kinds"].tolist(), held["scattered"].tolist())
        self.captions = [
            worded(rng, TRAINING_KINDS[k], scenes.SCATTERED_WORDS if s else TRAINING_KINDS[k].WORDS) for k, s in pairs
        ]
        self.scattered = held["scattered"]
        self.t = torch.randint(0, 1000, (len(self.latents),), generator=generator)
        self.noise = torch.randn(self.latents.shape, generator=generator)

    @torch.no_grad()
    def __call__(self, controlnet, outlines=None):
        """Mean squared error of the noise: of the caption's scenes, of scattered ones."""
        outlines = self.outlines if outlines is None else outlines
        values = []
        for i in range(0, len(self.latents), 64):
            part = slice(i, i + 64)
            values.append(
                self.denoiser.errors(
                    controlnet, self.latents[part], outlines[part], self.captions[part], self.t[part], self.noise[part]
                )
            )
        values = torch.cat(values)
        return [float(values[self.scattered == s].mean()) for s in (False, True)]


def stage_train(args):
    """The ControlNet, with train.py's weighting of the error, timesteps, close-ups and aspect ratios."""
    whole, closer, others = encode_samples(args)
    denoiser = Denoiser(args.model)
    validation = Validation(args, denoiser)
    controlnet = new_controlnet(denoiser.unet)
    run = train.Run(args.work / "control.ckpt", {"controlnet": controlnet}, args.rate, args.minutes, "cpu", 0.998)
    print("validation alone: {:.5f} of kinds, {:.5f} scattered".format(*validation(None)), flush=True)
    averaged, total = new_controlnet(denoiser.unet).to(memory_format=torch.channels_last), 0.0
    controlnet.train()
    run.last_tick = time.monotonic()
    while run.goes_on():
        t = (1000 * torch.rand(args.batch) ** 0.75).long().clamp(max=999)  # noisier pictures more often
        if run.rng.random() < ASPECTS_SHARE:
            chosen = [others[run.rng.integers(len(others))]]
        else:
            near = (t < CLOSE_UP_BELOW) & (torch.rand(args.batch) < CLOSE_UP_SHARE)
            t, chosen = torch.cat([t[~near], t[near]]), [whole, closer]
        counts = [args.batch] if len(chosen) == 1 else [int((~near).sum()), int(near.sum())]
        rows = [torch.from_numpy(run.rng.integers(len(s["kinds"]), size=n)) for s, n in zip(chosen, counts)]
        batch = {k: torch.cat([s[k][r] for s, r in zip(chosen, rows)]) for k in whole}
        captions = [
            caption_of(run.rng, TRAINING_KINDS[k], s)
            for k, s in zip(batch["kinds"].tolist(), batch["scattered"].tolist())
        ]
        noise = torch.randn_like(batch["latents"])
        errors = denoiser.errors(controlnet, batch["latents"], batch["outlines"], captions, t, noise)
        loss = (errors * weight(denoiser.abar[t])).mean()
        run.update(loss)
        total += float(loss.detach())
        if run.step % 100 == 0:
            print(f"step {run.step} {run.seconds_done / 60:.1f} min loss {total / 100:.4f}", flush=True)
            total = 0.0
        if run.step % 200 == 0:
            run.save()
        if run.step % 400 == 0:
            averaged.load_state_dict(run.averages["controlnet"])
            print("validation: {:.5f} of kinds, {:.5f} scattered".format(*validation(averaged)), flush=True)
    run.save()


def stage_export(args):
    """The averaged weights in f16, and what they make of the error of the noise."""
    denoiser = Denoiser(args.model)
    controlnet = new_controlnet(denoiser.unet)
    controlnet.load_state_dict(train.averaged_weights(args.work / "control.ckpt", "controlnet", "cpu"))
    controlnet.half().to(memory_format=torch.contiguous_format).save_pretrained(args.out)
    (args.out / "diffusion_pytorch_model.safetensors").chmod(0o644)
    print(f"{sum(p.numel() for p in controlnet.parameters())} parameters")
    controlnet, validation = ControlNetModel.from_pretrained(args.out).float(), Validation(args, denoiser)
    others = validation.outlines.roll(1, 0)
    cases = ("alone", None, None), ("with outlines", controlnet, None), ("with others'", controlnet, others)
    for name, of, lines in cases:
        print(f"{name:14} " + "{:.5f} of kinds, {:.5f} scattered".format(*validation(of, lines)))


# ---- scores ----------------------------------------------------------------------------------------------------------


def cases(name, count, width, height):
    """[(caption, kind that it is of, scene of the outlines)], of held-out kinds, always the same ones.

    kinds: the caption's own scene. scattered: objects anywhere, a caption without places and sizes. empty: the same
    without a caption. moved: a complete caption, outlines of the same objects at another place (a pair: exchanged).
    reshaped: outlines of other shapes, all else as the caption has it.
    """
    rng = np.random.default_rng([11, SETS.index(name)])
    out = []
    for caption in read.held_out_captions()[:count]:
        kind, group = scenes.KIND_OF[caption], isinstance(scenes.KIND_OF[caption], scenes.Group)
        if name in ("scattered", "empty"):
            text = worded(rng, kind, scenes.SCATTERED_WORDS) if name == "scattered" else ""
            out.append((text, kind, scenes.scattered_scene(rng, kind, width, height)))
            continue
        drawn = kind
        if name == "moved" and group:
            places = [p for p in scenes.POSITIONS if p != kind.position]
            drawn = replace(kind, position=places[rng.integers(len(places))])
        elif name == "moved":
            first, second = (kind.size, kind.colour, kind.shape), (kind.size2, kind.colour2, kind.shape2)
            drawn = scenes.Pair(*second, kind.relation, *first, kind.ground)
        elif name == "reshaped":
            turn = int(rng.integers(1, 3))
            other = {s: scenes.SHAPES[(i + turn) % 3] for i, s in enumerate(scenes.SHAPES)}
            drawn = replace(kind, shape=other[kind.shape], **({} if group else {"shape2": other[kind.shape2]}))
        out.append((caption, kind, scenes.random_scene(rng, drawn)))
    return out


def stage_draw(args):
    """The outlines of a set, or with --rendered its pictures, and a manifest."""
    args.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (caption, _, scene) in enumerate(cases(args.set, args.count, *args.size)):
        file = f"outlines-{i:03d}.png"
        drawn = scenes.render(scene, *args.size) if args.rendered else scenes.outlines(scene, *args.size, args.line)
        scenes.to_image(drawn).save(args.out / file)
        lines.append({"id": f"{i:03d}", "prompt": caption, "seed": i, "control_image": file})
    (args.out / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for line in lines:
        del line["control_image"]
    (args.out / "alone.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def matched(reading, things):
    """[(thing, the object seen nearest to it, their distance in shorter sides)], each object once."""
    short = min(reading.width, reading.height)
    apart = np.array(
        [[np.hypot(*(np.array(o.centre) / short - t.centre)) for o in reading.objects] for t in things]
    ).reshape(len(things), len(reading.objects))
    return [(things[i], reading.objects[k], apart[i, k]) for i, k in zip(*linear_sum_assignment(apart))]


def judge(reading, kind, scene):
    """What a picture has of its outlines, and what of its caption."""
    things = scene.things(reading.width, reading.height)
    pairs = matched(reading, things)
    number = len(reading.objects) == len(things)
    near = [apart <= NEAR for _, _, apart in pairs]
    found = number and all(near)
    shape = found and all(t.shape == o.shape for t, o, _ in pairs)
    own = sorted(t.shape for t in things) == sorted(o.shape for o in reading.objects)
    words = read.judge(reading, kind)
    seen, asked = (sorted(o.colour for o in s) for s in (reading.objects, kind.asked()))
    return {
        "number": number,
        "place": found,
        "shape": shape,
        "obeys": shape and all(abs(o.radius - t.radius) < 0.02 for t, o, _ in pairs),
        "shapes, wherever": own,
        "colours, wherever": seen == asked,
        "ground": words.ground,
        "caption's place": words.place,
        "caption's shapes": words.shape,
        "caption's all": words.right,
        "position error": [apart for _, _, apart in pairs],
        "radius error": [abs(o.radius - t.radius) for t, o, a in pairs if a <= NEAR],
        "colours by place": found and all(t.colour == o.colour for t, o, _ in pairs),
    }


def stage_score(args):
    """Pictures NNN.png of a set, drawn at --size, by their outlines."""
    verdicts = []
    for i, (caption, kind, scene) in enumerate(cases(args.set, args.count, *args.size)):
        reading = read.read(read.load(args.pictures / f"{i:03d}.png"))
        verdicts.append(judge(reading, kind, scene))
        if args.verbose and not verdicts[-1]["obeys"]:
            drawn = "; ".join(f"{t.shape} at {t.centre[0]:.2f},{t.centre[1]:.2f}" for t in scene.things(*args.size))
            print(f"{i:03d} {caption!r} | outlines: {drawn} | seen: {reading}")
    groups = [isinstance(kind, scenes.Group) for _, kind, _ in cases(args.set, args.count, *args.size)]
    print(f"{'':18} {'all':>7} {'groups':>7} {'pairs':>7}")
    for name in verdicts[0]:
        values = [v[name] for v in verdicts]
        parts = [values, [v for v, g in zip(values, groups) if g], [v for v, g in zip(values, groups) if not g]]
        if isinstance(values[0], list):
            cells = [f"{np.mean([x for v in part for x in v]):7.4f}" for part in parts]
        else:
            cells = [f"{sum(part):3}/{len(part):3}" for part in parts]
        print(f"{name:18}", *cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="stage", required=True)
    trained = commands.add_parser("train", help="train the ControlNet")
    export = commands.add_parser("export", help="write the diffusers directory, and measure the loss")
    draw = commands.add_parser("draw", help="draw the outlines of a set of held-out captions")
    score = commands.add_parser("score", help="score the pictures of a set")
    trained.add_argument("--minutes", type=float, required=True, help="planned training time, over all resumptions")
    trained.add_argument("--samples", type=int, default=20000, help="whole scenes to draw, beside others")
    trained.add_argument("--batch", type=int, default=32, help="samples in a step")
    trained.add_argument("--rate", type=float, default=4e-4, help="peak learning rate")
    export.add_argument("--out", type=Path, required=True, help="directory to write")
    for command in (trained, export):
        command.add_argument("--work", type=Path, required=True, help="directory of checkpoint and encoded scenes")
        command.add_argument("--model", type=Path, default=train.HERE / "../../models/pocket", help="exported model")
        command.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
        command.add_argument("--threads", type=int, default=1, help="CPU threads")
    for command in (draw, score):
        command.add_argument("--set", choices=SETS, required=True, help="which captions and outlines")
        command.add_argument("--count", type=int, default=200, help="how many captions of heldout.txt")
        command.add_argument("--size", type=size, default=(NATIVE, NATIVE), help="WIDTHxHEIGHT")
    draw.add_argument("--out", type=Path, required=True, help="folder to write")
    draw.add_argument("--line", type=float, help="width of the lines in pixels (default: a 64th of the shorter side)")
    draw.add_argument("--rendered", action="store_true", help="the scenes' pictures instead, to find edges in")
    score.add_argument("--pictures", type=Path, required=True, help="folder of the pictures")
    score.add_argument("--verbose", action="store_true", help="also what is seen in pictures that do not obey")
    args = parser.parse_args()
    if args.stage in ("train", "export"):
        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        args.work.mkdir(parents=True, exist_ok=True)
    {"train": stage_train, "export": stage_export, "draw": stage_draw, "score": stage_score}[args.stage](args)


def size(text):
    return tuple(map(int, text.split("x")))


if __name__ == "__main__":
    main()
