"""Image files <-> tensors. An image is RGB, (3, H, W), or grey, (1, H, W): uint8 or uint16 as in
the file, or float32 in [0, 1]."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from trainers.errors import InputError
from trainers.files import replace_file

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
PEAKS = {torch.uint8: 255, torch.uint16: 65535}  # largest pixel values
# What Pillow raises for files that are no images, damaged, or larger than it believes.
DAMAGED = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def read_image(path: Path, *, grey: bool = False) -> Tensor:
    """The image as uint8, or uint16 for PNG of 16 bits: (3, H, W), or (1, H, W) if `grey`: 0.299 R + 0.587 G + 0.114 B, rounded.

    Grey files become RGB with equal channels; the EXIF orientation is applied; an opaque alpha channel is dropped.
    InputError for what cannot be read without loss: CMYK, transparency, several pages; and for damaged files.
    """
    try:
        with Image.open(path) as image:
            refuse_lossy(path, image)
            deep = bits_per_channel(path, image) == 16
            rgb = sixteen_bits(path, image) if deep else np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except DAMAGED as error:
        raise InputError(f"{path}: cannot be read as an image ({error}); replace or remove it") from None
    return torch.from_numpy(luma(rgb) if grey else rgb).permute(2, 0, 1).contiguous()


def luma(rgb: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(H, W, 3) -> (H, W, 1) of the same dtype; weights in 1/65536, as Pillow has them."""
    red, green, blue = (rgb[..., channel].astype(np.uint32) for channel in range(3))
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).astype(rgb.dtype)[..., None]


def sixteen_bits(path: Path, image: Image.Image) -> npt.NDArray[np.uint16]:
    """A PNG of 16 bits a channel, (H, W, 3). Grey by Pillow; colour by OpenCV, as Pillow would drop half of the bits."""
    if image.mode.startswith("I"):
        return np.array(image).astype(np.uint16)[..., None].repeat(3, axis=2)
    try:
        import cv2
    except ImportError:
        raise InputError(
            f"{path}: colour of 16 bits a channel is read by OpenCV, which is absent: pip install 'kdops[png16]', or convert it to 8 bits"
        ) from None
    # Colour and depth as they are, so BGR; an opaque alpha channel has been seen by refuse_lossy.
    bgr = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_COLOR_BGR | cv2.IMREAD_ANYDEPTH)
    if bgr is None or bgr.dtype != np.uint16:
        raise OSError("OpenCV cannot decode it")
    return np.ascontiguousarray(bgr[..., ::-1], dtype=np.uint16)


def stored_size(path: Path) -> tuple[int, int]:
    """(height, width) from the file's header. An EXIF rotation may swap them: finding it would mean decoding a PNG.

    InputError for what the header tells that cannot be read.
    """
    try:
        with Image.open(path) as image:
            refuse_mode(path, image)
            return image.height, image.width
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except DAMAGED as error:
        raise InputError(f"{path}: cannot be read as an image ({error}); replace or remove it") from None


def refuse_lossy(path: Path, image: Image.Image) -> None:
    """InputError if turning this open image into RGB would lose something."""
    refuse_mode(path, image)
    if getattr(image, "n_frames", 1) > 1:
        raise InputError(f"{path}: holds several frames or pages; split it into single images")
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise InputError(f"{path}: has transparent pixels; flatten it to RGB")


def refuse_mode(path: Path, image: Image.Image) -> None:
    """InputError for colours other than RGB and for depths that are not read, of which the header tells."""
    if image.mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        return
    deep = bits_per_channel(path, image) > 8
    if not (deep and image.format == "PNG"):
        kind = f"16 bits a channel in {image.format}" if deep else f"mode {image.mode}"
        raise InputError(f"{path}: {kind} is not supported; convert it to RGB or grey, PNG")


def bits_per_channel(path: Path, image: Image.Image) -> int:
    """8 or 16. Pillow opens 16-bit colour PNG as 8-bit RGB without a word, so the header is asked."""
    if image.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24]  # signature 8, chunk length and name 8, width 4, height 4, then the bit depth
    return 16 if image.mode.startswith("I") else 8


def write_png(path: Path, image: Tensor) -> None:
    """Writes (3, H, W) or grey (1, H, W), uint8 or float in [0, 1] (clipped and rounded), as PNG, whole or not at all; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = image if image.dtype == torch.uint8 else to_uint8(image)
    last = pixels.permute(1, 2, 0).cpu().contiguous().numpy()
    encoded = io.BytesIO()
    Image.fromarray(last[..., 0] if last.shape[2] == 1 else last).save(encoded, format="PNG")
    replace_file(path, encoded.getvalue())


def to_uint8(image: Tensor) -> Tensor:
    """Float in [0, 1] -> uint8, clipped, rounded half up."""
    return (image.double() * 255).clamp(0, 255).add(0.5).floor().to(torch.uint8)


def to_float(image: Tensor) -> Tensor:
    """uint8 or uint16 -> float32 in [0, 1]."""
    return image.float() / PEAKS[image.dtype]
