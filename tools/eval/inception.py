"""InceptionV3 features of folders of pictures, with the weights of the TensorFlow graph that FID is defined on.

The network is torch-fidelity's; what a picture goes through before it differs between libraries, and figures with it:

    torch       bilinear to 299x299, no antialias; 2 x/255 - 1          pytorch-fid; the published MegaFusion code's FID
    clean       bicubic of PIL with antialias, in float; (x - 128)/128  clean-fid and nicefid; that code's KID
    tensorflow  bilinear of TensorFlow 1; (x - 128)/128                 the first FID code; torch-fidelity
"""

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from cleanfid.resize import build_resizer
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

import pictures
from common import INCEPTION_FILE, EvalError, sha256_file, write_whole

SIDE = 299
RESIZES = ("torch", "clean", "tensorflow")
LAYERS = {"64": "MaxPool_1", "192": "MaxPool_2", "768": "Mixed_6e", "2048": "AvgPool"}  # features -> last module
PUBLISHED_SHA256 = "6726825d"  # the name's own ending: how this file's digest begins
CACHE_FORMAT = 1


def resize(picture, how):
    """uint8 [h, w, 3] to the network's input, f32 [3, 299, 299]."""
    if how == "clean":
        x = torch.from_numpy(build_resizer("clean")(np.ascontiguousarray(picture))).permute(2, 0, 1)
        return (x - 128) / 128
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    if how == "torch":
        x = torch.nn.functional.interpolate(x / 255, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        return (2 * x - 1)[0]
    if how == "tensorflow":
        x = interpolate_bilinear_2d_like_tensorflow1x(x, size=(SIDE, SIDE), align_corners=False)
        return ((x - 128) / 128)[0]
    raise EvalError(f"resize {how!r} is not one of {', '.join(RESIZES)}")


class Inception:
    """The network, up to a layer of 64, 192, 768 or 2048 features; and the 1008 class logits after the last."""

    def __init__(self, weights, layer="2048", device="cpu", batch=16):
        """weights: path of the state dict file. EvalError when it is missing or not this network's."""
        weights = Path(weights)
        if not weights.is_file():
            raise EvalError(f"--inception {weights}: no such file; get {INCEPTION_FILE} and give its path")
        if str(layer) not in LAYERS:
            raise EvalError(f"--layer {layer} is not one of {', '.join(LAYERS)}")
        self.sha256 = sha256_file(weights)
        self.published = self.sha256.startswith(PUBLISHED_SHA256)
        self.layer, self.device, self.batch = str(layer), torch.device(device), batch
        try:
            torch.load(weights, map_location="cpu", weights_only=True)  # tensors only: runs no code from the file
            network = FeatureExtractorInceptionV3(
                "inception", [self.layer], feature_extractor_weights_path=str(weights)
            )
        except Exception as error:  # pickle, zip and state dict errors have no common class
            reason = " ".join(str(error).split())[:200]
            raise EvalError(
                f"--inception {weights} does not hold this network's weights ({reason}); get {INCEPTION_FILE}"
            ) from error
        trunk = []
        for name, module in network.named_children():  # one after the other, but for the resize before and fc after
            trunk.append(module)
            if name == LAYERS[self.layer]:
                break
        self.trunk = torch.nn.Sequential(*trunk).to(self.device)
        self.fc = network.fc.to(self.device) if self.layer == "2048" else None

    def key(self):
        return {"extractor": "inception-v3", "weights_sha256": self.sha256, "layer": self.layer}

    @torch.no_grad()
    def __call__(self, batch):
        """f32 [N, 3, 299, 299] -> (features [N, D], logits without bias [N, 1008] or None), numpy f32.

        The logits leave out the bias, as in the first Inception Score code (there by accident, kept by all since).
        """
        x = self.trunk(batch.to(self.device))
        x = torch.nn.functional.adaptive_avg_pool2d(x, 1).flatten(1)
        logits = None if self.fc is None else (x @ self.fc.weight.T).cpu().numpy()
        return x.cpu().numpy(), logits


@dataclass(frozen=True)
class FeatureSet:
    """Features of a folder and where they come from. Row i * crops + c is crop c of picture i."""

    features: np.ndarray  # f32 [rows, D]
    logits: np.ndarray | None  # f32 [rows, 1008]
    key: dict  # extractor, weights, layer, resize, crops
    pictures: int
    folder: str
    digest: str

    def save(self, path):
        """Writes an .npz; `mu` and `sigma` (f64) are in it too, as pytorch-fid and clean-fid read them."""
        features = self.features.astype(np.float64)
        arrays = {"features": self.features, "mu": features.mean(axis=0), "sigma": np.cov(features, rowvar=False)}
        if self.logits is not None:
            arrays["logits"] = self.logits
        meta = {"format": CACHE_FORMAT, "key": self.key, "pictures": self.pictures, "folder": self.folder}
        buffer = io.BytesIO()
        np.savez(buffer, meta=json.dumps(meta | {"digest": self.digest}, sort_keys=True), **arrays)
        write_whole(path, buffer.getvalue())

    @staticmethod
    def load(path, key):
        """The set in an .npz written by save; EvalError when it is damaged or was made in another way than `key`."""
        try:
            with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as file:
                if "meta" not in file:
                    raise EvalError(f"{path} was not written by tools/eval/score; give the folder of pictures instead")
                meta = json.loads(str(file["meta"]))
                arrays = {name: file[name] for name in ("features", "logits") if name in file}
        except EvalError:
            raise
        except Exception as error:  # zip, numpy and json errors have no common class
            raise EvalError(
                f"{path} is not a readable .npz ({error}); delete it, or give the folder instead"
            ) from error
        if meta.get("format") != CACHE_FORMAT:
            raise EvalError(f"{path} has format {meta.get('format')}, this program writes {CACHE_FORMAT}; delete it")
        for name, value in key.items():
            if meta["key"].get(name) != value:
                raise EvalError(
                    f"{path} was made with {name} {meta['key'].get(name)!r}, asked for {value!r}; make it again"
                )
        return FeatureSet(
            arrays["features"], arrays.get("logits"), meta["key"], meta["pictures"], meta["folder"], meta["digest"]
        )


def features_of(source, network, how, crops=None, cache=None, progress=lambda done, of: None):
    """FeatureSet of a folder (pictures.Folder) or of an .npz written before (path).

    `cache`: a folder. An .npz in it is used when the digest of all names and contents, the weights, the resize and the
    crops are the same; it is written when there is none.
    """
    key = network.key() | {"resize": how, "crops": crops.name() if crops else None}
    if not isinstance(source, pictures.Folder):
        return FeatureSet.load(source, key)
    digest = source.digest()
    path = None
    if cache is not None:
        name = hashlib.sha256(json.dumps([key, digest], sort_keys=True).encode()).hexdigest()[:16]
        path = Path(cache) / f"{source.path.resolve().name}-{name}.npz"
        if path.exists():
            found = FeatureSet.load(path, key)
            if found.digest == digest:
                return found
    features, logits, waiting = [], [], []

    def flush():
        if waiting:
            f, p = network(torch.stack(waiting))
            features.append(f)
            logits.append(p)
            waiting.clear()

    for i, (name, picture_id) in enumerate(zip(source.files, source.ids())):
        picture = pictures.load(source.path / name)
        for part in crops.of(picture_id, picture) if crops else [picture]:
            waiting.append(resize(part, how))
            if len(waiting) == network.batch:
                flush()
        progress(i + 1, len(source))
    flush()
    found = FeatureSet(
        np.concatenate(features),
        None if logits[0] is None else np.concatenate(logits),
        key,
        len(source),
        source.path.resolve().name,
        digest,
    )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
    return found
