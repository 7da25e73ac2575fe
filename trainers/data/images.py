"""Image files <-> tensors. An image is RGB, (3, H, W), or grey, (1, H, W): uint8 as in the file, or float32 in [0, 1]."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from trainers.errors import InputError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
# What Pillow raises for files that are no images, damaged, or larger than it believes.
DAMAGED = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def read_image(path: Path, *, grey: bool = False) -> Tensor:
    """The image as uint8, (3, H, W), or (1, H, W) if `grey`: the luma 0.299 R + 0.587 G + 0.114 B, rounded.

    Grey files become RGB with equal channels; the EXIF orientation is applied; an opaque alpha channel is dropped.
    InputError for what cannot be read without loss: 16 bits, CMYK, transparency, several pages; and for damaged files.
    """
    try:
        with Image.open(path) as image:
            refuse_lossy(path, image)
            upright = ImageOps.exif_transpose(image).convert("RGB")
            pixels = np.array(upright.convert("L"))[..., None] if grey else np.array(upright)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except DAMAGED as error:
        raise InputError(f"{path}: cannot be read as an image ({error}); replace or remove it") from None
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def stored_size(path: Path) -> tuple[int, int]:
    """(height, width) from the file's header. An EXIF rotation may swap them: finding it would mean decoding a PNG."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except DAMAGED as error:
        raise InputError(f"{path}: cannot be read as an image ({error}); replace or remove it") from None


def refuse_lossy(path: Path, image: Image.Image) -> None:
    """InputError if turning this open image into 8-bit RGB would lose something."""
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA") or bits_per_channel(path, image) > 8:
        kind = "16 bits a channel" if bits_per_channel(path, image) > 8 else f"mode {image.mode}"
        raise InputError(f"{path}: {kind} is not supported; convert it to 8-bit RGB or grey")
    if getattr(image, "n_frames", 1) > 1:
        raise InputError(f"{path}: holds several frames or pages; split it into single images")
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise InputError(f"{path}: has transparent pixels; flatten it to RGB")


def bits_per_channel(path: Path, image: Image.Image) -> int:
    """8 or 16. Pillow opens 16-bit colour PNG as 8-bit RGB without a word, so the header is asked."""
    if image.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24]  # signature 8, chunk length and name 8, width 4, height 4, then the bit depth
    return 16 if image.mode.startswith("I") else 8


def write_png(path: Path, image: Tensor) -> None:
    """Writes (3, H, W) or grey (1, H, W), uint8 or float in [0, 1] (clipped and rounded), as PNG; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = image if image.dtype == torch.uint8 else to_uint8(image)
    last = pixels.permute(1, 2, 0).cpu().contiguous().numpy()
    Image.fromarray(last[..., 0] if last.shape[2] == 1 else last).save(path, format="PNG")


def to_uint8(image: Tensor) -> Tensor:
    """Float in [0, 1] -> uint8, clipped, rounded half up."""
    return (image.double() * 255).clamp(0, 255).add(0.5).floor().to(torch.uint8)


def to_float(image: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1]."""
    return image.float() / 255
