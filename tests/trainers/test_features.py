"""Feature networks: published key names and shapes, real weights where they are here, and what a missing file says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trainers.data.images import read_image, to_float
from trainers.data.resize import imresize
from trainers.errors import InputError
from trainers.features import FEATURES, FeatureOptions, build, codec, resnet20, taesd, vgg19, vqgan

WEIGHTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "weights"
RESNET, TAESD = WEIGHTS / "pytorch_resnet_cifar10__resnet20-12fca82f.th", WEIGHTS / "taesd__taef2_encoder.pth"
needs_weights = pytest.mark.skipif(not RESNET.is_file(), reason=f"{WEIGHTS} is not here")


def saved(network: nn.Module, path: Path, prefix: str = "") -> str:
    save_file({f"{prefix}{key}": value for key, value in network.state_dict().items()}, path)
    return str(path)


def test_vgg19_has_torchvisions_keys_and_levels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = vgg19.VGG19(normalize=False)
    convolutions = [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28]
    assert list(plain.state_dict()) == [f"features.{i}.{kind}" for i in convolutions for kind in ("weight", "bias")]
    network = build(vgg19.VGG19Options(name="vgg19", weights=saved(plain, tmp_path / "vgg.safetensors")))
    image = torch.rand(1, 3, 32, 48)
    levels = network(image).levels
    assert [tuple(level.shape[1:]) for level in levels] == [
        (64, 32, 48), (128, 16, 24), (256, 8, 12), (512, 4, 6), (512, 2, 3),
    ]  # fmt: skip
    sequential: list[nn.Module] = []  # torchvision's list of layers
    for index in range(30):
        sequential.append(plain.features[str(index)] if str(index) in plain.features else nn.ReLU())
    for place in (4, 9, 18, 27):
        sequential[place] = nn.MaxPool2d(2)
    with torch.no_grad():
        for level, stop in zip(levels, (2, 7, 12, 21, 30), strict=True):
            torch.testing.assert_close(level, nn.Sequential(*sequential[:stop])(image))


def test_vqgan_has_the_published_keys_and_levels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = vqgan.VQGAN(rescale=False)
    shapes = {key: tuple(value.shape) for key, value in plain.state_dict().items()}
    assert shapes["encoder.conv_in.weight"] == (128, 3, 3, 3)
    assert shapes["encoder.down.2.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert shapes["encoder.down.3.downsample.conv.bias"] == (256,)
    assert shapes["encoder.down.4.attn.1.proj_out.weight"] == (512, 512, 1, 1)
    assert shapes["encoder.mid.block_2.norm1.weight"] == (512,)
    assert shapes["encoder.norm_out.bias"] == (512,)
    assert shapes["encoder.conv_out.weight"] == (256, 512, 3, 3)
    assert shapes["quant_conv.weight"] == (256, 256, 1, 1)
    assert shapes["quantize.embedding.weight"] == (1024, 256)
    assert not any("down.4.downsample" in key or "down.3.attn" in key for key in shapes)
    # A checkpoint as PyTorch Lightning writes it: other networks beside, and a callback's class that is not installed here.
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": plain.state_dict() | {"decoder.x": torch.zeros(1)}, "callbacks": Callback()}, path)
    network = build(vqgan.VQGANOptions(name="vqgan", weights=str(path)))
    levels, latent = network(torch.rand(1, 3, 32, 32))
    assert [tuple(level.shape[1:]) for level in levels] == [
        (128, 32, 32), (128, 16, 16), (256, 8, 8), (256, 4, 4), (512, 2, 2),
    ]  # fmt: skip
    assert latent.shape == (1, 256, 2, 2)
    assert network.codebook is not None
    assert torch.equal(network.codebook, plain.state_dict()["quantize.embedding.weight"])


class Callback:
    """A class that torch.load(weights_only=True) does not know."""

    def __init__(self) -> None:
        self.best = 1.0


@needs_weights
def test_resnet20_sees_photographs_as_it_was_trained() -> None:
    """What its layers see of photographs is what their running statistics, which lie in the file, say: shapes alone would not."""
    network = build(resnet20.ResNet20Options(name="resnet20", weights=str(RESNET)))
    apart: dict[str, float] = {}

    def measure(name: str, norm: nn.BatchNorm2d, x: Tensor) -> None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        apart[name] = float(((x.mean((0, 2, 3)) - norm.running_mean) / norm.running_var.sqrt()).abs().mean())

    for name, module in network.network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda norm, x, _, name=name: measure(name, norm, x[0]))
    photographs = [to_float(read_image(path)) for path in sorted((WEIGHTS.parent / "set14" / "HR").glob("*.png"))]
    small = [imresize(photo, 36 / min(photo.shape[1:]))[:, :32, :32] for photo in photographs]
    levels = network(torch.stack(small)).levels
    assert [tuple(level.shape[1:]) for level in levels] == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert len(apart) == 19
    assert max(apart.values()) < 0.4, apart  # deviations; 0.24 measured


@needs_weights
def test_taesd_encodes() -> None:
    network = build(taesd.TAESDOptions(name="taesd", weights=str(TAESD)))
    levels, latent = network(torch.full((1, 3, 32, 32), 0.5))
    assert [tuple(level.shape[1:]) for level in levels] == [(64, 32, 32), (64, 16, 16), (64, 8, 8), (64, 4, 4)]
    assert latent.shape == (1, 32, 4, 4)
    assert float(latent.abs().mean()) < 5  # its latent is of unit order


def test_the_codec_ships_with_the_package() -> None:
    network = build(codec.CodecOptions())
    encoded = network(torch.rand(2, 3, 16, 16))
    assert [tuple(level.shape[1:]) for level in encoded.levels] == [(16, 16, 16), (32, 8, 8), (48, 4, 4), (64, 2, 2)]
    assert network.codebook is not None
    assert network.codebook.shape == (256, encoded.latent.shape[1])


def test_a_feature_network_is_frozen_and_saves_nothing() -> None:
    holder = nn.Module()
    holder.features = build(codec.CodecOptions())
    assert holder.state_dict() == {}
    assert not any(parameter.requires_grad for parameter in holder.parameters())
    holder.train()
    assert not holder.features.training
    assert not any(module.training for module in holder.features.modules())
    image = torch.rand(1, 3, 16, 16, requires_grad=True)
    holder.features(image).levels[-1].sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0


@pytest.mark.parametrize("options", [kind for kind in FEATURES if kind is not codec.CodecOptions])
def test_missing_weights_say_where_they_are(options: type[FeatureOptions]) -> None:
    (name,) = options.model_fields["name"].annotation.__args__  # type: ignore[union-attr]
    for weights, said in ((None, "give the path"), ("/nowhere/x.pth", "/nowhere/x.pth is not there")):
        with pytest.raises(InputError, match=said) as error:
            build(options.model_validate({"name": name, "weights": weights}))
        assert "get " in str(error.value)


def test_other_weights_are_named(tmp_path: Path) -> None:
    path = saved(nn.Conv2d(3, 3, 3), tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"lacks or differs in .* tensors \(features\.0\.weight"):
        build(vgg19.VGG19Options(name="vgg19", weights=path))
