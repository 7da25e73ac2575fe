"""trainers.data.photos and trainers.data.images: the embedded photographs; what image files are taken or refused."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trainers.data.folders import PairFiles
from trainers.data.images import read_image, to_float, to_uint8, write_png
from trainers.data.pairs import Pairs
from trainers.data.photos import HELD_OUT_PHOTOS, TRAIN_PHOTOS, load_photo
from trainers.data.sets import TrainSet
from trainers.errors import InputError

needs_skimage = pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="scikit-image is not installed")


def test_the_split() -> None:
    assert set(HELD_OUT_PHOTOS) == {"chelsea", "coffee"}
    assert len(TRAIN_PHOTOS) == 10
    assert not set(TRAIN_PHOTOS) & set(HELD_OUT_PHOTOS)


@needs_skimage
@pytest.mark.parametrize("name", TRAIN_PHOTOS + HELD_OUT_PHOTOS)
def test_photos_are_rgb_with_detail(name: str) -> None:
    photo = load_photo(name)
    assert photo.dtype == torch.uint8
    assert photo.shape[0] == 3
    assert min(photo.shape[1:]) >= 300
    assert photo.float().std() > 10


@needs_skimage
def test_a_photo_equals_what_scikit_image_gives() -> None:
    from skimage import data

    np.testing.assert_array_equal(load_photo("chelsea").permute(1, 2, 0).numpy(), data.chelsea())


def test_unknown_photo_and_absent_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"'lena'.*astronaut"):
        load_photo("lena")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'kdops\[demo\]'"):
        load_photo("coins")


def test_png_round_trip(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    write_png(tmp_path / "new" / "a.png", image)
    assert torch.equal(read_image(tmp_path / "new" / "a.png"), image)
    write_png(tmp_path / "b.png", to_float(image))
    assert torch.equal(read_image(tmp_path / "b.png"), image)


def test_to_uint8_clips_and_rounds() -> None:
    values = torch.tensor([-1.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 1, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)


def test_grey_palette_and_opaque_alpha_become_rgb(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (6, 4), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(grey).convert("RGBA").save(tmp_path / "alpha.png")
    for name in ("grey", "palette", "alpha"):
        np.testing.assert_array_equal(read_image(tmp_path / f"{name}.png").numpy(), np.stack([grey] * 3))


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to view
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 40, 20)


def png16(path: Path, pixels: np.ndarray) -> None:
    """A 16-bit RGB PNG of (H, W, 3): Pillow cannot write one, so it is put together from its chunks."""
    import struct
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels))  # 0: unfiltered
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def deep(height: int, width: int, channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 65536, (height, width, channels), dtype=np.uint16)


def test_16_bit_colour(tmp_path: Path) -> None:
    pytest.importorskip("cv2", reason="OpenCV (kdops[png16]) is not installed")
    pixels = deep(5, 7, 3)
    png16(tmp_path / "a.png", pixels)
    image = read_image(tmp_path / "a.png")
    assert image.dtype == torch.uint16
    assert (image.numpy() == pixels.transpose(2, 0, 1)).all()
    torch.testing.assert_close(
        to_float(image).double(), torch.from_numpy(pixels / 65535).permute(2, 0, 1), atol=1e-7, rtol=0
    )
    grey = read_image(tmp_path / "a.png", grey=True)
    expected = pixels @ np.array([0.299, 0.587, 0.114])
    assert np.abs(grey.numpy()[0] - expected).max() < 1.1
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(InputError, match="cannot be read"):
        read_image(tmp_path / "cut.png")


def test_16_bit_colour_without_opencv_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    png16(tmp_path / "a.png", deep(5, 7, 3))
    with pytest.raises(InputError, match=r"pip install 'kdops\[png16\]'"):
        read_image(tmp_path / "a.png")


def test_16_bit_grey(tmp_path: Path) -> None:
    pixels = deep(6, 4, 1)[..., 0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert (image.numpy() == pixels).all()  # in all three channels
    assert (read_image(tmp_path / "a.png", grey=True).numpy() == pixels).all()


def test_grey_weights_are_those_of_pillow(tmp_path: Path) -> None:
    pixels = (deep(40, 50, 3) >> 8).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (
        read_image(tmp_path / "a.png", grey=True).numpy()[0] == np.array(Image.fromarray(pixels).convert("L"))
    ).all()


def test_16_bit_images_train_and_shrink(tmp_path: Path) -> None:
    """Downscaling rounds them to whole 16-bit values."""
    (tmp_path / "gt").mkdir()
    Image.fromarray(np.full((24, 24), 1000, np.uint16)).save(tmp_path / "gt" / "a.png")
    lq, gt = Pairs([PairFiles("a", tmp_path / "gt" / "a.png", None)], 2)[0]
    assert lq.dtype == gt.dtype == torch.uint16
    assert lq.shape == (3, 12, 12)
    assert bool((lq.int() == 1000).all())
    train_lq, train_gt = TrainSet([PairFiles("a", tmp_path / "gt" / "a.png", None)], 2, 16, 1).sample(0, 0, 0)
    torch.testing.assert_close(train_gt, torch.full((3, 16, 16), 1000 / 65535))
    torch.testing.assert_close(train_lq, torch.full((3, 8, 8), 1000 / 65535))


def test_what_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "grey16.tif")
    Image.new("CMYK", (4, 4)).save(tmp_path / "cmyk.jpg")
    Image.new("RGBA", (4, 4), (1, 2, 3, 4)).save(tmp_path / "clear.png")
    pages = [Image.new("RGB", (4, 4)) for _ in range(2)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    (tmp_path / "text.png").write_text("not an image")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-60])
    expected = {
        "grey16.tif": "16 bits",
        "cmyk.jpg": "CMYK",
        "clear.png": "transparent",
        "pages.tif": "several",
        "text.png": "cannot be read",
        "cut.png": "cannot be read",
        "absent.png": "no such file",
    }
    for name, reason in expected.items():
        with pytest.raises(InputError, match=reason):
            read_image(tmp_path / name)
