"""Writes tests/data/control: small random ControlNets (Zhang et al. 2023, arXiv:2302.05543) for the models of tests/data, whose zero
convolutions are not zero, what diffusers' ControlNetModel and UNet2DConditionModel make of them, and whole runs.

    tools/oracle/venv tools/oracle/controlnet.py

NAME/config.json, NAME/diffusion_pytorch_model.drawn.json (drawn.py), and NAME/expected.safetensors: sample, timestep, prompt_embeds
(pooled_prompt_embeds, time_ids), control (the picture, 0 to 1), scale, control.down<i>, control.mid (times the scale), and out, the
UNet's output with them. NAME/ldm.json: the key in an LDM file of each tensor, in the order of drawn.json,
which diffusers' own conversion has read.

picture.png is the condition, stages.safetensors the same as control<k>, unrounded. runs.json lists the runs as tests/data/runs does,
with the ControlNets' names and the files without their folder. In them:

- The picture is resized to each stage's size from the file, by diffusers' image processor (Lanczos).
- A ControlNet is on in step i of n where i / n >= start and (i + 1) / n <= end, of the whole schedule: not of a stage's steps.
- Guess mode: the unconditional row has no ControlNet.
- A view has the picture's part, or every s-th of its pixels, with zeros around the picture: as the published DemoFusion has it.
- HiDiffusion: in the first 0.6 of the steps the ControlNet reads latents and picture resized (nearest) to the trained size in eighths
  of cells, and what it finds is resized (bicubic) to the maps that it is added to; after that it is off. SDXL's pooled block is on
  in the first half of the steps.
"""

import json
import pathlib

import numpy
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel
from diffusers.image_processor import VaeImageProcessor
from safetensors.torch import save_file

import drawn
import reference
import run_values
import small_models
from module_values import added, normal, relative

DATA = pathlib.Path(__file__).resolve().parents[2] / "tests/data"
ROOT = DATA / "control"

# Name: model, seed, further keys; batch, height, width of the module's case.
NETS = {
    "sd15-edges": ("sd15", 201, {"conditioning_embedding_out_channels": [3, 5]}, (2, 6, 5)),
    "sd15-depth": ("sd15", 202, {"conditioning_embedding_out_channels": [4, 6],
                                 "controlnet_conditioning_channel_order": "bgr"}, (1, 8, 4)),
    "sd21": ("sd21", 203, {"conditioning_embedding_out_channels": [4, 4, 6]}, (1, 9, 7)),
    "four-levels": ("four-levels", 204, {"conditioning_embedding_out_channels": [2, 3, 4, 5]}, (1, 5, 7)),
    "sdxl": ("sdxl", 205, {"conditioning_embedding_out_channels": [3, 5]}, (2, 5, 6)),
    "sdxl-turbo": ("sdxl-turbo", 206, {"conditioning_embedding_out_channels": [3, 4]}, (1, 4, 4)),
}
# Whose keys in an LDM file are listed.
LDM = "four-levels"
# Keys of a UNet's configuration that a ControlNet's has.
SHARED = ["block_out_channels", "layers_per_block", "attention_head_dim", "cross_attention_dim", "norm_num_groups",
          "down_block_types", "use_linear_projection", "upcast_attention", "transformer_layers_per_block",
          "addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim", "norm_eps"]


class Settings(reference.Settings):
    control = ()  # names of NETS
    control_image = ()  # files of ROOT
    control_scale = ()
    control_guess = False
    control_start = ()
    control_end = ()

    def __init__(self, **changes):
        for key, value in changes.items():
            assert hasattr(Settings, key), key
            setattr(self, key, value)
        self.eta = self.eta or 0.0

    def args(self, changed):
        out = super().args([key for key in changed if not key.startswith("control") or key == "control_guess"])
        for key in ("control", "control_image", "control_scale", "control_start", "control_end"):
            for value in getattr(self, key):
                out += ["--" + key.replace("_", "-"), str(value)]
        return out


class Resized:
    """What is added to a map of whatever size the UNet has there."""

    def __init__(self, x):
        self.x = x

    def __radd__(self, other):
        if other.shape[2:] == self.x.shape[2:]:
            return other + self.x
        return other + F.interpolate(self.x, size=other.shape[2:], mode="bicubic", align_corners=False)


class Controlled(reference.Guided):
    """The guided UNet with the ControlNets of its settings."""

    def __init__(self, model, settings):
        super().__init__(model, settings)
        sampler = reference.make_scheduler(reference.CLASSES[settings.scheduler], model.scheduler_config)
        sampler.set_timesteps(sum(stage[1] for stage in settings.stages) or settings.steps)
        self.timesteps = sampler.timesteps.tolist()
        self.nets = [model.nets[name] for name in settings.control]
        each = lambda values, default: [*values] * (len(self.nets) if len(values) == 1 else 1) or [default] * len(self.nets)
        self.scales = each(settings.control_scale, 1.0)
        self.ranges = list(zip(each(settings.control_start, 0.0), each(settings.control_end, 1.0)))
        self.stage, self.entered = -1, None

    def picture(self, name, cells):
        """[1, 3, H, W] of a stage."""
        height, width = (n * self.model.vae_factor for n in cells)
        if name.endswith(".safetensors"):
            from safetensors.torch import load_file

            stages = [x for _, x in sorted(load_file(ROOT / name).items())]
            return next(x for x in stages if x.shape[2:] == (height, width)).to(self.model.unet.dtype)
        processor = VaeImageProcessor(vae_scale_factor=self.model.vae_factor, do_convert_rgb=True, do_normalize=False)
        file = PIL.Image.open(ROOT / name)
        return processor.preprocess(file, height=height, width=width).to(self.model.unet.dtype)

    def part(self, picture, x):
        """Of a view: the pixels of its cells, zeros around the picture."""
        if self.view is None:
            return picture
        row, column, stride, _ = self.view
        factor = self.model.vae_factor
        rows = row * factor + stride * torch.arange(x.shape[2] * factor)
        columns = column * factor + stride * torch.arange(x.shape[3] * factor)
        inside = lambda at, n: ((at >= 0) & (at < n)).to(picture.dtype)
        taken = picture[:, :, rows.clamp(0, picture.shape[2] - 1)][:, :, :, columns.clamp(0, picture.shape[3] - 1)]
        return taken * inside(rows, picture.shape[2])[:, None] * inside(columns, picture.shape[3])[None]

    def rows(self, x, t):
        unet, n = self.model.unet, len(self.embeds)
        step, total = self.timesteps.index(float(t)), len(self.timesteps)
        ids = lambda first: None if self.pooled is None else {
            "text_embeds": self.pooled[first:].to(unet.dtype), "time_ids": self.time_ids[first:]}
        down, mid = None, None
        for name, net, scale, (start, end) in zip(self.settings.control_image, self.nets, self.scales, self.ranges):
            if step / total < start or (step + 1) / total > end:
                continue
            cells = x.shape[2:] if self.view is None else self.view[3]
            picture, seen = self.part(self.picture(name, cells), x), x
            if self.settings.method == "hidiffusion":
                if step >= 0.6 * total:
                    continue
                native = unet.config.sample_size
                over = max(x.shape[2] / native, x.shape[3] / native)
                if over > 1:
                    small = [int(n // over) // 8 * 8 for n in x.shape[2:]]
                    seen = F.interpolate(x, size=small, mode="nearest")
                    picture = F.interpolate(picture, size=[n * self.model.vae_factor for n in small], mode="nearest")
            first = n - 1 if self.settings.control_guess else 0
            own_down, own_mid = net(
                torch.cat([seen] * (n - first)), t, encoder_hidden_states=self.embeds[first:].to(unet.dtype),
                controlnet_cond=torch.cat([picture] * (n - first)), conditioning_scale=scale,
                guess_mode=self.settings.control_guess, added_cond_kwargs=ids(first), return_dict=False)
            of_all = lambda x: torch.cat([torch.zeros_like(x)] * first + [x])
            own_down, own_mid = [of_all(x) for x in own_down], of_all(own_mid)
            down = own_down if down is None else [a + b for a, b in zip(down, own_down)]
            mid = own_mid if mid is None else mid + own_mid
        more = {} if down is None else {
            "down_block_additional_residuals": [Resized(x) for x in down], "mid_block_additional_residual": Resized(mid)}
        return unet(torch.cat([x] * n), t, encoder_hidden_states=self.embeds.to(unet.dtype), added_cond_kwargs=ids(0),
                    **more).sample


def runs():
    """name -> (model, settings)"""
    one = {"control": ("sd15-edges",), "control_image": ("picture.png",), "scheduler": "ddim", "guidance": 2.0, "seed": 91}
    plain = one | {"method": "plain", "size": (16, 20), "steps": 3}
    both = {"control": ("sd15-edges", "sd15-depth"), "control_image": ("picture.png", "picture.png"),
            "control_scale": (0.5, 1.25)}
    mega = one | {"method": "megafusion", "stages": (((12, 12), 3), ((20, 16), 2))}
    sdxl = {"control": ("sdxl",), "scheduler": "ddim"}
    demo = {"method": "demofusion", "size": (32, 32), "steps": 2, "guidance": 1.5, "control": ("sdxl-turbo",)}
    hi = {"method": "hidiffusion", "size": (72, 72), "steps": 3, "t2": 0.4, "control": ("four-levels",), "control_scale": (0.7,)}
    hi_xl = {"method": "hidiffusion", "size": (36, 28), "steps": 5, "t2": 0.25, "aggressive": False}
    return {
        "plain": ("sd15", plain | {"control_scale": (0.8,)}),
        "plain-unguided": ("sd15", plain | {"guidance": 1.0, "control_guess": True, "steps": 2}),
        "plain-v": ("sd21", plain | {"control": ("sd21",), "size": (36, 20), "scheduler": "euler"}),
        "several": ("sd15", plain | both),
        "several-shares": ("sd15", plain | both | {"steps": 5, "control_start": (0.0, 0.4), "control_end": (0.6, 1.0)}),
        "guess": ("sd15", plain | both | {"control_guess": True}),
        "sdxl": ("sdxl", plain | sdxl),
        "sdxl-guess": ("sdxl", plain | sdxl | {"control_guess": True, "steps": 2}),
        "mega": ("sd15", mega),
        "mega-shares": ("sd15", mega | {"control_start": (0.2,), "control_end": (0.8,)}),
        "mega-plus-stages": ("sd15", mega | {"method": "megafusion++", "control_image": ("stages.safetensors",)}),
        "hi-sd": ("four-levels", one | hi),
        "hi-sdxl": ("sdxl", one | hi_xl | sdxl),
        "multi": ("sd15", one | {"method": "multidiffusion", "size": (28, 20), "window": 6, "stride": 4, "steps": 2}),
        "demo": ("sdxl-turbo", one | demo),
    }


def picture():
    """8 bits, of odd sides, smooth and sharp; and pictures of a run's stages in f32."""
    y, x = numpy.mgrid[0:37, 0:29]
    wave = lambda a, b, c: 127 + 120 * numpy.sin(a * x + b * y + c)
    rgb = numpy.stack([wave(0.3, 0.1, 0.0), wave(-0.1, 0.35, 1.0), 255.0 * ((x // 5 + y // 7) % 2)], axis=-1)
    PIL.Image.fromarray(rgb.round().astype("uint8")).save(ROOT / "picture.png")
    stages = {f"control{k}": torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(k))
              for k, (h, w) in enumerate([(12, 12), (16, 20)])}
    save(stages, ROOT / "stages.safetensors")


def ldm_key(key, net):
    """The name that the tensor has in the files of the first published code."""
    level = net.config.layers_per_block + 1
    numbers = lambda text: [int(part) if part.isdigit() else part for part in text.split(".")]
    resnet = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
              "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    parts, end = numbers(key), key.rsplit(".", 1)[1]
    hints = 2 * len(net.config.conditioning_embedding_out_channels) - 2
    if key.startswith("time_embedding"):
        return f"time_embed.{0 if 'linear_1' in key else 2}.{end}"
    if key.startswith("conv_in."):
        return f"input_blocks.0.0.{end}"
    if key.startswith("controlnet_cond_embedding"):
        number = {"conv_in": 0, "conv_out": hints + 1}.get(parts[1], parts[2] + 1 if parts[1] == "blocks" else None)
        return f"input_hint_block.{2 * number}.{end}"
    if key.startswith("controlnet_down_blocks"):
        return f"zero_convs.{parts[1]}.0.{end}"
    if key.startswith("controlnet_mid_block"):
        return f"middle_block_out.0.{end}"
    if key.startswith("mid_block"):
        at, kind, rest = f"middle_block.{2 * parts[2] if parts[1] == 'resnets' else 1}", parts[1], parts[3:]
    else:
        block, kind, layer, rest = parts[1], parts[2], parts[3], parts[4:]
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * level}.0.op.{end}"
        at = f"input_blocks.{block * level + layer + 1}.{0 if kind == 'resnets' else 1}"
    if kind == "resnets":
        return f"{at}.{resnet[rest[0]]}.{end}"
    return ".".join([at, *map(str, rest)])


def check_ldm(net, names):
    """diffusers reads the same out of a file with these names."""
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    state = net.state_dict()
    got = convert_controlnet_checkpoint({"control_model." + names[key]: x for key, x in state.items()}, dict(net.config))
    assert got.keys() == state.keys(), (got.keys() - state.keys(), state.keys() - got.keys())
    assert all(torch.equal(got[key], state[key]) for key in state)


def module_case(model, net, number, shape):
    """One call, in f64."""
    n, h, w = shape
    unet, factor = model.unet, model.vae_factor
    tensors = {"sample": normal(5000 + number, n, 4, h, w), "timestep": torch.tensor(421.0), "scale": torch.tensor([0.8]),
               "prompt_embeds": normal(5100 + number, n, 7, unet.config.cross_attention_dim),
               "control": torch.rand(n, 3, h * factor, w * factor, generator=torch.Generator().manual_seed(number)),
               **added(model, number, n)}
    more = None
    if "time_ids" in tensors:
        more = {"text_embeds": tensors["pooled_prompt_embeds"].double(), "time_ids": tensors["time_ids"]}
    told = {"encoder_hidden_states": tensors["prompt_embeds"].double(), "added_cond_kwargs": more}
    sample = tensors["sample"].double()
    down, mid = net(sample, tensors["timestep"], controlnet_cond=tensors["control"].double(), conditioning_scale=0.8,
                    return_dict=False, **told)
    out = unet(sample, tensors["timestep"], down_block_additional_residuals=down, mid_block_additional_residual=mid, **told)
    return tensors | {f"control.down{i}": x for i, x in enumerate(down)} | {"control.mid": mid, "out": out.sample}


def save(tensors, path):
    """In f32, but whole numbers."""
    kept = lambda x: (x.float() if x.is_floating_point() else x).contiguous().clone()
    save_file({name: kept(x) for name, x in tensors.items()}, path)
    path.chmod(0o644)


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    ROOT.mkdir(parents=True, exist_ok=True)
    picture()
    singles = {}
    for number, (name, (of, seed, keys, shape)) in enumerate(NETS.items()):
        if of not in singles:
            single = reference.load(DATA / of)
            singles[of] = (single, reference.double(single))
            for model in singles[of]:
                model.nets = {}
        own = json.loads((DATA / of / "unet/config.json").read_text())
        config = {key: own[key] for key in SHARED if key in own} | keys
        if config.get("upcast_attention", False) is None:
            del config["upcast_attention"]
        net = ControlNetModel(**config)
        small_models.fill(net, seed, "controlnet", torch.float16)
        folder = ROOT / name
        folder.mkdir(exist_ok=True)
        text = json.dumps({"_class_name": "ControlNetModel"} | config, indent=2)
        (folder / "config.json").write_text(text + "\n")
        drawn.write(folder, "diffusion_pytorch_model", net, seed, "controlnet", torch.float16)
        if name == LDM:
            names = {key: ldm_key(key, net) for key in net.state_dict()}
            check_ldm(net, names)
            (folder / "ldm.json").write_text(json.dumps(list(names.values()), indent=0) + "\n")
        single, double = singles[of]
        single.nets[name] = net
        double.nets[name] = ControlNetModel(**config).double()
        double.nets[name].load_state_dict(net.state_dict())
        double.nets[name].eval().requires_grad_(False)
        save(module_case(double, double.nets[name], number, shape), folder / "expected.safetensors")

    reference.Guided = Controlled
    listed = []
    for name, (model, changes) in runs().items():
        single, double = singles[model]
        settings = Settings(**({"prompt": run_values.CAT} | changes))
        if name == "hi-sdxl":
            settings.t1 = 0.5  # what the program takes beside a ControlNet
        if name == "demo":
            settings.original_size = (16, 16)  # that of phase 1, as the published code has it beside a ControlNet
        tensors, in_f32 = reference.run(double, settings), reference.run(single, settings)
        for key, tensor in tensors.items():
            assert torch.isfinite(tensor).all(), (name, key)
        error = max(relative(in_f32[key], tensors[key]) for key in tensors)
        assert error < run_values.F32_LIMIT, (name, error)
        print(name, f"{error:.1e}", len(tensors))
        tensors = run_values.stored(f"control-{name}", tensors)
        if name not in ("plain", "sdxl", "mega"):
            del tensors["image"]
        save(tensors, ROOT / f"{name}.safetensors")
        args = settings.args(["prompt", *changes])
        listed.append({"name": name, "model": model, "args": args, "f32_error": float(f"{error:.1e}")})
    text = json.dumps({"runs": listed}, indent=1, ensure_ascii=False)
    (ROOT / "runs.json").write_text(run_values.compact_args(text))


if __name__ == "__main__":
    main()
