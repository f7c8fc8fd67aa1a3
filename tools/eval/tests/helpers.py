"""What the tests share: the modules' path, temporary folders, small random networks and pictures."""

import contextlib
import functools
import io
import json
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

EVAL = Path(__file__).resolve().parent.parent
ROOT = EVAL.parent.parent
sys.path.insert(0, str(EVAL))

from common import EvalError  # noqa: E402


class TempCase(unittest.TestCase):
    """A test with a folder of its own, removed afterwards."""

    def setUp(self):
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.dir = Path(holder.name)

    def refused(self, *parts):
        """Context: an EvalError whose message has all the parts."""
        return _Refused(self, parts)


class _Refused:
    def __init__(self, case, parts):
        self.case, self.parts = case, parts

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _trace):
        self.case.assertIsNotNone(kind, "no error")
        if not issubclass(kind, EvalError):
            return False
        for part in self.parts:
            self.case.assertIn(str(part), str(error))
        return True


def write_pictures(folder, count, size=(48, 40), seed=0, shift=0):
    """count PNGs p000.png ... of smooth random colours; size is (width, height)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        coarse = Image.fromarray((rng.random((5, 5, 3)) * 200 + shift).astype(np.uint8))
        coarse.resize(size, Image.BICUBIC).save(folder / f"p{i:03d}.png")
    return folder


def random_inception(path, seed=0):
    """Writes a state dict of torch-fidelity's InceptionV3 with random weights."""
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as module

    torch.manual_seed(seed)
    with (
        mock.patch.object(module, "load_state_dict_from_url", lambda *a, **k: {}),
        mock.patch.object(torch.nn.Module, "load_state_dict", lambda *a, **k: None),
    ):
        network = module.FeatureExtractorInceptionV3("random", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def random_clip(folder, seed=0):
    """Saves a small random CLIPModel with the tokenizer of the pocket model, as transformers does."""
    import torch
    import transformers
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "models" / "pocket" / "tokenizer")
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 20, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    transformers.utils.logging.disable_progress_bar()
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@functools.cache
def loaded(make, *arguments):
    """make(*arguments), once: a network takes seconds to load."""
    return make(*arguments)


def run_score(*arguments):
    """Results (dict) of the command with these arguments."""
    import inception
    import score

    once = functools.partial(loaded, inception.Inception)
    out = io.StringIO()
    with mock.patch.object(inception, "Inception", once), contextlib.redirect_stdout(out):
        score.main([*map(str, arguments), "--json", "-", "--quiet"])
    return json.loads(out.getvalue())
