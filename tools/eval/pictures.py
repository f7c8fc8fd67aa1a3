"""Folders of pictures: their list, their pixels, their digest, and crops of them."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from common import EvalError, sha256_file

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff")


@dataclass(frozen=True)
class Folder:
    """The pictures of a folder, sorted by file name. An id is a file name without its ending."""

    path: Path
    files: tuple  # file names

    def __len__(self):
        return len(self.files)

    def ids(self):
        return tuple(Path(name).stem for name in self.files)

    def digest(self):
        """Hex digest of names and contents: any changed, added or missing picture changes it."""
        digest = hashlib.sha256()
        for name in self.files:
            digest.update(f"{name}\0{sha256_file(self.path / name)}\n".encode())
        return digest.hexdigest()


def list_folder(path):
    """Folder of the pictures directly in path.

    Errors: not a folder; no pictures; two pictures with one id.
    """
    path = Path(path)
    if not path.is_dir():
        raise EvalError(f"{path} is not a folder; name the folder that holds the pictures")
    names = sorted(p.name for p in path.iterdir() if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))
    if not names:
        raise EvalError(f"{path} holds no pictures ({', '.join(EXTENSIONS)})")
    folder = Folder(path, tuple(names))
    seen = {}
    for name, picture_id in zip(names, folder.ids()):
        if picture_id in seen:
            raise EvalError(f"{path} holds {seen[picture_id]} and {name}: two pictures with one id; remove one")
        seen[picture_id] = name
    return folder


def load(path):
    """uint8 [h, w, 3] of a picture file; grey and palette pictures become RGB. EvalError for a damaged file."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise EvalError(f"{path} is missing") from None
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise EvalError(f"{path} is not a readable picture ({error}); make it again or remove it") from error


def check_equal_sizes(folder):
    """EvalError when the pictures of a folder differ in size, from the files' headers."""
    first = None
    for name in folder.files:
        try:
            with Image.open(folder.path / name) as image:
                size = image.size
        except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise EvalError(
                f"{folder.path / name} is not a readable picture ({error}); make it again or remove it"
            ) from error
        first = first or size
        if size != first:
            raise EvalError(
                f"{folder.path}: {name} is {size[0]}x{size[1]}, {folder.files[0]} is {first[0]}x{first[1]}; "
                "pictures of one method have one size (--any-size where that is meant)"
            )
    return first


@dataclass(frozen=True)
class Crops:
    """`count` square crops of `side` pixels of every picture, at places that depend on seed and id alone."""

    side: int
    count: int
    seed: int = 0

    def boxes(self, picture_id, width, height):
        """[(left, top)] of the crops of one picture, uniform over all places, repetition allowed."""
        if min(width, height) < self.side:
            raise EvalError(
                f"picture {picture_id!r} is {width}x{height}: too small for crops of {self.side}x{self.side}; "
                "give a smaller --crop-size"
            )
        seed = hashlib.sha256(f"{self.seed}\0{picture_id}".encode()).digest()[:8]
        rng = np.random.default_rng(int.from_bytes(seed, "little"))
        return [
            (int(rng.integers(width - self.side + 1)), int(rng.integers(height - self.side + 1)))
            for _ in range(self.count)
        ]

    def of(self, picture_id, picture):
        """List of [side, side, 3] crops of a picture [h, w, 3]."""
        height, width = picture.shape[:2]
        return [picture[y : y + self.side, x : x + self.side] for x, y in self.boxes(picture_id, width, height)]

    def name(self):
        return f"{self.count} of {self.side}x{self.side}, seed {self.seed}"
