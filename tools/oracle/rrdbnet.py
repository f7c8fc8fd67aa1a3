"""Small super-resolution networks and their results: tests/data/rrdbnet, for tests/rrdbnet.rs.

    tools/oracle/venv tools/oracle/rrdbnet.py

RRDBNet written for reading, from the papers (Wang et al. 2018, arXiv:1809.00219; Wang et al. 2021, arXiv:2107.10833). Four
networks with random weights, one per way in which published files come: names of the tensors, wrapper, container, dtype.
`values.safetensors` holds per network the picture [1, 3, H, W] in [0, 1], the result in f64 kept as f32, and how far torch's own
f16 and bf16 are off; `odd.picture` and `odd.out`: 8 bits [H, W, 3], a size that x2-bsrgan cannot read, continued by reflection and cut.
"""

import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

DATA = pathlib.Path(__file__).resolve().parents[2] / "tests/data/rrdbnet"


def lrelu(x):
    return F.leaky_relu(x, 0.2)


class RRDBNet:
    """Weights by the names of Real-ESRGAN."""

    def __init__(self, weights, blocks, unshuffle, doublings):
        self.w, self.blocks, self.unshuffle, self.doublings = weights, blocks, unshuffle, doublings

    def conv(self, name, x):
        return F.conv2d(x, self.w[name + ".weight"], self.w[name + ".bias"], padding=1)

    def dense(self, name, x):
        maps = [x]
        for j in range(1, 5):
            maps.append(lrelu(self.conv(f"{name}.conv{j}", torch.cat(maps, 1))))
        return x + 0.2 * self.conv(f"{name}.conv5", torch.cat(maps, 1))

    def __call__(self, x):
        f = first = self.conv("conv_first", F.pixel_unshuffle(x, self.unshuffle))
        for i in range(self.blocks):
            h = f
            for k in range(1, 4):
                h = self.dense(f"body.{i}.rdb{k}", h)
            f = f + 0.2 * h
        f = first + self.conv("conv_body", f)
        for i in range(1, self.doublings + 1):
            f = lrelu(self.conv(f"conv_up{i}", F.interpolate(f, scale_factor=2, mode="nearest")))
        return self.conv("conv_last", lrelu(self.conv("conv_hr", f)))


def random_weights(blocks, features, growth, inputs, doublings, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {}

    def conv(name, outputs, inputs, gain=1.0):
        weights[name + ".weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) * gain * (9 * inputs) ** -0.5
        weights[name + ".bias"] = torch.randn(outputs, generator=generator) * 0.1

    conv("conv_first", features, inputs, 2.0)
    for i in range(blocks):
        for k in range(1, 4):
            for j in range(1, 5):
                conv(f"body.{i}.rdb{k}.conv{j}", growth, features + (j - 1) * growth, 1.4)
            conv(f"body.{i}.rdb{k}.conv5", features, features + 4 * growth, 2.0)
    conv("conv_body", features, features)
    for i in range(1, doublings + 1):
        conv(f"conv_up{i}", features, features, 1.4)
    conv("conv_hr", features, features, 1.4)
    conv("conv_last", 3, features)
    weights["conv_last.bias"] += 0.5
    return weights


def of_bsrgan(key):
    if key.startswith("body."):
        return key.replace("body.", "RRDB_trunk.").replace(".rdb", ".RDB")
    return key.replace("conv_body", "trunk_conv").replace("conv_up", "upconv").replace("conv_hr", "HRconv")


def of_first_esrgan(blocks, doublings):
    """Numbers in one Sequential: an upsampling layer, its convolution and its activation are three."""
    tail = 3 * doublings + 2
    names = {"conv_first": "0", "conv_body": f"1.sub.{blocks}", "conv_hr": f"{tail}", "conv_last": f"{tail + 2}"}
    names |= {f"conv_up{i}": f"{3 * i}" for i in range(1, doublings + 1)}

    def name(key):
        layer, kind = key.rsplit(".", 1)
        if layer.startswith("body."):
            return f"model.1.sub.{layer.removeprefix('body.').replace('.rdb', '.RDB')}.0.{kind}"
        return f"model.{names[layer]}.{kind}"

    return name


def error(got, want):
    """The largest of an element, relative to the larger of its size and the root mean square of all."""
    got, want = got.double(), want.double()
    return ((got - want).abs() / want.abs().clamp(min=want.pow(2).mean().sqrt())).max()


def main():
    values = {}
    # Name; blocks, features, growth, unshuffle, doublings; dtype of the file; height and width.
    networks = [
        ("x4", (2, 16, 8, 1, 2), torch.float16, (13, 10)),
        ("x2-bsrgan", (1, 8, 4, 2, 2), torch.float32, (14, 18)),
        ("x1", (1, 8, 4, 4, 2), torch.bfloat16, (20, 28)),
        ("x2-esrgan", (1, 6, 5, 1, 1), torch.float32, (9, 11)),
    ]
    for seed, (name, (blocks, features, growth, unshuffle, doublings), dtype, size) in enumerate(networks):
        weights = random_weights(blocks, features, growth, 3 * unshuffle**2, doublings, seed)
        weights = {key: value.to(dtype) for key, value in weights.items()}
        if name == "x4":
            # As training writes it: the weights, and their moving average, which counts.
            torch.save({"params": {"conv_first.weight": torch.zeros(1)}, "params_ema": weights, "iter": 7}, DATA / "x4.pth")
        elif name == "x2-bsrgan":
            save_file({of_bsrgan(key): value for key, value in weights.items()}, DATA / f"{name}.safetensors")
        elif name == "x1":
            save_file({"module." + key: value for key, value in weights.items()}, DATA / f"{name}.safetensors")
        else:
            rename = of_first_esrgan(blocks, doublings)
            old = {rename(key): value for key, value in weights.items()}
            torch.save(old, DATA / f"{name}.pth", _use_new_zipfile_serialization=False)
        picture = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(100 + seed))

        def run(dtype):
            of_dtype = {key: value.to(dtype) for key, value in weights.items()}
            return RRDBNet(of_dtype, blocks, unshuffle, doublings)(picture.to(dtype))

        want = run(torch.float64)
        values |= {f"{name}.picture": picture, f"{name}.out": want.float()}
        for low, dtype in [("f16", torch.float16), ("bf16", torch.bfloat16)]:
            values[f"{name}.torch_error_{low}"] = error(run(dtype), want).float().reshape(1)
        print(name, tuple(want.shape), f"mean {want.mean():.3f} std {want.std():.3f}", f"f32 off by {error(run(torch.float32), want):.2g}")
        if name == "x2-bsrgan":
            odd = torch.randint(0, 256, (7, 9, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
            whole = F.pad((odd.double() / 255).permute(2, 0, 1)[None], (0, 1, 0, 1), mode="reflect")
            of_f64 = {key: value.double() for key, value in weights.items()}
            out = RRDBNet(of_f64, blocks, unshuffle, doublings)(whole)[0, :, :14, :18].permute(1, 2, 0)
            values |= {"odd.picture": odd, "odd.out": (out.clamp(0, 1) * 255).round().to(torch.uint8)}
    save_file({key: value.contiguous() for key, value in values.items()}, DATA / "values.safetensors")


with torch.no_grad():
    main()
