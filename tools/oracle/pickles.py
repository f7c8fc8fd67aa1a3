"""Files as torch.save writes them, and what torch reads of them.

    tools/oracle/venv tools/oracle/pickles.py
"""

import argparse
import pathlib

import torch
from safetensors.torch import load_file, save_file

DATA = pathlib.Path(__file__).parents[2] / "tests/data"
OUT = DATA / "pickles"


def state_dict():
    """Every dtype, tensors that share a storage or lie in it out of order."""
    draw = lambda *shape: torch.randn(shape, generator=generator)
    generator = torch.Generator().manual_seed(3)
    stacked = draw(6, 4)
    return {
        "f32": draw(2, 3),
        "f16": draw(5).half(),
        "bf16": draw(3, 1).bfloat16(),
        "f64": draw(2).double(),
        "i64": torch.arange(3),
        "transposed": draw(3, 4).T,
        "channels_last": draw(2, 3, 2, 2).half().to(memory_format=torch.channels_last),
        "rows": stacked[2:4],
        "columns": stacked[:, 1:3],
        "same": stacked,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(draw(2, 2)),
        "one.in.another": draw(1, 4)[:, ::2],
    }


def embedding(module):
    """As webui trains it; the first code for textual inversion kept its vectors in a module."""
    vectors = torch.nn.Parameter(torch.arange(8.0).reshape(2, 4) / 8)
    held = torch.nn.ParameterDict({"*": vectors}) if module else {"*": vectors.data}
    return {"string_to_token": {"*": torch.tensor(265) if module else 265}, "string_to_param": held, "name": "other",
            "step": 500, "sd_checkpoint_name": None}


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    state = state_dict()
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight])
    weight.sum().backward()
    optimizer.step()
    training = {
        "epoch": 2, "global_step": 875000, "pytorch-lightning_version": "1.4.2", "state_dict": state,
        "callbacks": {argparse.ArgumentParser: {"best_model_score": torch.tensor(0.25), "kept": {1, 2}}},
        "optimizer_states": [optimizer.state_dict()], "lr_schedulers": [],
        "hyper_parameters": argparse.Namespace(rate=1e-4, size=[512, 512], range=range(3), of=complex(0, 1)),
    }
    torch.save(training, OUT / "training.ckpt")
    torch.save(state, OUT / "older.pth", _use_new_zipfile_serialization=False)
    torch.save(load_file(DATA / "single-file/lora-kohya.safetensors"), OUT / "lora-kohya.pt")
    torch.save(embedding(False), OUT / "webui.pt")
    torch.save(embedding(True), OUT / "parameters.pt")
    torch.save({"<toy>": torch.arange(4.0).half()}, OUT / "diffusers.bin")
    for name in ["training.ckpt", "older.pth"]:
        read = torch.load(OUT / name, weights_only=False)
        read = read.get("state_dict", read)
        assert read.keys() == state.keys() and all(torch.equal(read[k], state[k]) for k in state), name
    save_file({k: v.detach().contiguous().clone() for k, v in state.items()}, OUT / "values.safetensors")
