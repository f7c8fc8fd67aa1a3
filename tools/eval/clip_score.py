"""CLIP-T: cosine similarity of a picture and its prompt in CLIP's space (Radford et al. 2021, arXiv:2103.00020).

As Hessel et al. 2021, arXiv:2104.08718, without their factor and without cutting off at 0; the mean over pictures.
"""

from pathlib import Path

import numpy as np

import pictures
from common import EvalError, sha256_file

PUBLISHED = "openai/clip-vit-base-patch32 on the Hugging Face hub, the model of the published MegaFusion code"
NEEDED = (  # of each line, one
    ("config.json",),
    ("model.safetensors", "pytorch_model.bin"),
    ("preprocessor_config.json", "processor_config.json"),
    ("tokenizer.json", "vocab.json"),
)


class Clip:
    """CLIPModel and CLIPProcessor of a directory as transformers saves it."""

    def __init__(self, directory, device="cpu", batch=16):
        directory = Path(directory)
        if not directory.is_dir():
            raise EvalError(f"--clip {directory}: no such folder; get {PUBLISHED} and give its folder")
        found = [[directory / name for name in names if (directory / name).is_file()] for names in NEEDED]
        missing = [names[0] for names, there in zip(NEEDED, found) if not there]
        if missing:
            raise EvalError(f"--clip {directory} lacks {', '.join(missing)}; get all of {PUBLISHED}")
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            self.model = transformers.CLIPModel.from_pretrained(directory, local_files_only=True).float().eval()
            self.processor = transformers.CLIPProcessor.from_pretrained(
                directory, local_files_only=True, use_fast=False
            )
        except Exception as error:  # whatever transformers, safetensors or json raise
            reason = " ".join(str(error).split())[:200]
            raise EvalError(f"--clip {directory} does not load as a CLIP model ({reason}); get {PUBLISHED}") from error
        self.sha256 = sha256_file(found[1][0])
        self.device, self.batch = torch.device(device), batch
        self.model.to(self.device)
        self.text_length = self.model.config.text_config.max_position_embeddings

    def similarities(self, images, texts):
        """f64 [N]: cosine of images[i] (uint8 [h, w, 3]) and texts[i]; texts beyond the model's length are cut."""
        import torch

        inputs = self.processor(
            text=list(texts), images=list(images), return_tensors="pt", padding=True, truncation=True,
            max_length=self.text_length,
        )  # fmt: skip
        with torch.no_grad():
            out = self.model(**inputs.to(self.device))
        image, text = (x.double() / x.double().norm(dim=1, keepdim=True) for x in (out.image_embeds, out.text_embeds))
        return (image * text).sum(dim=1).cpu().numpy()

    def is_cut(self, text):
        """Whether a text has more tokens than the model takes."""
        return len(self.processor.tokenizer(text)["input_ids"]) > self.text_length


def clip_t(folder, references, clip, progress=lambda done, of: None):
    """(similarities f64 [pictures] of the first reference of each id, number of texts cut)."""
    values, cut = [], 0
    for i in range(0, len(folder), clip.batch):
        names, ids = folder.files[i : i + clip.batch], folder.ids()[i : i + clip.batch]
        for key in ids:
            if key not in references:
                raise EvalError(f"picture {key!r} of {folder.path} has no caption; add it to the captions file")
        texts = [references[key][0] for key in ids]
        cut += sum(clip.is_cut(text) for text in texts)
        values.append(clip.similarities([pictures.load(folder.path / name) for name in names], texts))
        progress(min(i + clip.batch, len(folder)), len(folder))
    return np.concatenate(values), cut
