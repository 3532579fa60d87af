"""Images: a folder with one sub-folder per class, decoded to (n, channels, height, width) in [0, 1]."""

__all__ = ["ImageFiles", "decode_images", "find_images", "resize"]

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch.nn import functional as F

from theodolite.core.errors import DataError
from theodolite.core.loading.options import DataOptions

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
_PARTS = {"train": False, "training": False, "val": False, "valid": False, "validation": False, "test": True}
_BROKEN = (UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning, OSError, SyntaxError,
           ValueError, EOFError)  # fmt: skip


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Files (or their bytes) with the class of each and whether it is known to be for testing."""

    files: Sequence[Path | bytes]
    labels: Sequence[str]
    test: np.ndarray


def find_images(folder: Path) -> ImageFiles:
    """Image files below folder/CLASS/, or below folder/train/CLASS/ and folder/test/CLASS/."""
    below = _folders(folder)
    parts = [part for part in below if part.name.lower() in _PARTS and _folders(part)]
    if parts and len(parts) == len(below):
        given = [(inner, _PARTS[part.name.lower()]) for part in parts for inner in _folders(part)]
    else:
        given = [(inner, False) for inner in below]
    found = [(file, inner.name, test) for inner, test in given for file in _images_below(inner)]
    if not found:
        loose = "; the images must lie in one sub-folder per class" if _images_below(folder) else ""
        raise DataError(f"{folder} holds no images in sub-folders: expected {folder.name}/CLASS/image.png{loose}")
    return ImageFiles(
        [f for f, _, _ in found], [c for _, c, _ in found], np.array([t for _, _, t in found], dtype=bool)
    )


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from error


def _images_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())


def _open(file: Path | bytes) -> Image.Image:
    return Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)


def decode_images(files: Sequence[Path | bytes], options: DataOptions) -> tuple[np.ndarray, list[int]]:
    """uint8 pixels (n, height, width, channels), and the positions of the files that cannot be decoded (left out).

    Grey where every image is grey, otherwise three colours. Images of different sizes need ``image_size``.
    """
    sizes, modes, broken = set[tuple[int, int]](), set[str](), list[int]()
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for i, file in enumerate(files):
            try:
                with _open(file) as image:
                    sizes.add(image.size)
                    modes.add(image.mode)
            except _BROKEN:
                broken.append(i)
        if not sizes:
            raise DataError(f"none of the {len(files)} image files can be decoded")
        if options.image_size is None and len(sizes) > 1:
            shown = ", ".join(f"{w} x {h}" for w, h in sorted(sizes)[:4])
            raise DataError(f"the images have different sizes ({shown}, ...); say to which to scale: --image-size 64")
        size = next(iter(sizes)) if options.image_size is None else (options.image_size, options.image_size)
        mode = "L" if modes <= {"L", "1", "LA"} else "RGB"
        check_size(len(files) * size[0] * size[1] * (1 if mode == "L" else 3))
        pixels = np.empty((len(files), size[1], size[0], 1 if mode == "L" else 3), dtype=np.uint8)
        for i in sorted(set(range(len(files))) - set(broken)):
            try:
                with _open(files[i]) as image:
                    flat = image.convert(mode)
                    scaled = flat if flat.size == size else flat.resize(size, Image.Resampling.BILINEAR)
                    pixels[i] = np.asarray(scaled).reshape(pixels.shape[1:])
            except _BROKEN:
                broken.append(i)
    return pixels, sorted(broken)


def check_size(count: int) -> None:
    """DataError where ``count`` float32 numbers do not fit into 4 GiB."""
    if count * 4 > 4 << 30:
        raise DataError(
            f"the data would take {count * 4 / 2**30:.1f} GiB as numbers; keep fewer rows with --max-rows"
            " or, of images, fewer pixels with --image-size"
        )


def resize(x: Float[np.ndarray, "row channel height width"], side: int) -> Float[np.ndarray, "row channel side side"]:
    """Images scaled to side x side pixels."""
    scaled = F.interpolate(torch.from_numpy(x), size=(side, side), mode="bilinear", antialias=True)
    return scaled.numpy()
