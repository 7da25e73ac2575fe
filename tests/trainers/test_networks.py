"""Every network of the registry: options, taps, sizes and weights; what is published of each."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from trainers.architectures import Network
from trainers.config_file import load_config, read_config
from trainers.errors import InputError
from trainers.evaluate import count_macs, count_parameters
from trainers.models import MODELS
from trainers.networks import AnySize, network_of_weights
from trainers.pretrained import read_weights, recognise
from trainers.taps import Tapped, tap_group

# A network of each architecture that runs in milliseconds.
SMALL: dict[str, dict[str, Any]] = {
    "dncnn": {"features": 4, "depth": 5, "image_channels": 1},
    "edsr": {"scale": 2, "features": 4, "blocks": 3},
    "imdn": {"scale": 2, "features": 8, "blocks": 3},
    "nafnet": {"width": 4, "encoder_blocks": [1, 2], "middle_blocks": 1, "decoder_blocks": [1, 1]},
    "rcan": {"scale": 2, "features": 8, "groups": 3, "blocks": 1, "attention_features": 4, "pixel_range": 255},
    "restormer": {"dim": 8, "blocks": [1, 2, 1, 1], "refinement": 1, "norm": "bias-free"},
    "rlfn": {"scale": 2, "features": 8, "blocks": 3, "esa_features": 4},
    "swinir": {"scale": 2, "embed_dim": 8, "depths": [2, 1, 2], "heads": [2, 2, 2], "window": 4},
    "uformer": {"embed_dim": 4, "depths": [1, 1, 2, 2, 1], "heads": [1, 2, 2, 2, 1], "window": 2},
}

SLOW_TO_EXPORT = ["nafnet", "restormer", "swinir", "uformer"]  # 5 to 100 s

LIGHT = {"embed_dim": 60, "depths": [6] * 4, "heads": [6] * 4, "upsampler": "pixelshuffledirect"}
PUBLISHED = [
    # arch, options, parameters, where the figure is published
    ("dncnn", {"image_channels": 1}, 555_137, "0.56 M: DnCNN, 17 layers, grey"),
    ("dncnn", {"depth": 20}, 668_227, "0.67 M: DnCNN-B, 20 layers, colour"),
    ("edsr", {"scale": 2}, 1_369_859, "1.37 M: Lim et al. 2017 and its released code"),
    ("edsr", {"scale": 2, "features": 256, "blocks": 32}, 40_729_603, "40.7 M: SwinIR, table 2 (EDSR x2)"),
    ("imdn", {"scale": 4}, 893_936, "0.894 M: NTIRE 2022 ESR report, table 1"),
    ("nafnet", {}, 17_111_907, "17.1 M: NAFNet, width 32, GoPro release"),
    ("nafnet", {"width": 64}, 67_888_835, "67.9 M: NAFNet, width 64, GoPro release"),
    ("rcan", {"scale": 4}, 15_592_355, "15.59 M: RCAN x4"),
    ("restormer", {}, 26_126_644, "26.13 M: Restormer release, deraining and deblurring"),
    ("restormer", {"norm": "bias-free"}, 26_111_668, "26.11 M: Restormer release, Gaussian colour denoising"),
    ("rlfn", {"scale": 2}, 526_856, "527 K: RLFN, table 2"),
    ("rlfn", {"scale": 4}, 543_740, "544 K: RLFN, table 2"),
    ("rlfn", {"scale": 4, "features": 48}, 470_208, "released weights of RLFN-S"),
    ("swinir", {}, 11_752_487, "11.8 M: SwinIR, classical x2"),
    # The paper's counts for the lightweight networks leave out the position bias tables, 24 blocks of 225 x 6 numbers.
    ("swinir", LIGHT | {"scale": 2}, 877_752 + 32_400, "878 K: SwinIR, lightweight x2"),
    ("swinir", LIGHT | {"scale": 3}, 885_867 + 32_400, "886 K: SwinIR, lightweight x3"),
    ("swinir", LIGHT | {"scale": 4}, 897_228 + 32_400, "897 K: SwinIR, lightweight x4"),
    ("uformer", {}, 50_880_946, "50.88 M: Uformer-B"),
    ("uformer", {"depths": [2] * 9, "modulator": False}, 20_628_317, "20.63 M: Uformer-S"),
    ("uformer", {"depths": [2] * 9, "modulator": False, "embed_dim": 16}, 5_230_413, "5.23 M: Uformer-T"),
]


def make(arch: str, **options: Any) -> tuple[nn.Module, Any]:
    entry = MODELS[arch]
    chosen = entry.options(**{**SMALL[arch], **options})
    torch.manual_seed(0)
    network = entry.build(chosen)
    for parameter in network.parameters():  # NAFNet's beta and gamma start at 0, which would hide its blocks
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network.eval(), chosen


def image(arch: str, options: Any, side: int = 32) -> Tensor:
    return torch.rand(2, MODELS[arch].image_channels(options), side, side, generator=torch.Generator().manual_seed(1))


def test_every_network_has_a_small_sample() -> None:
    assert SMALL.keys() == MODELS.keys()


@pytest.mark.parametrize(("arch", "options", "parameters", "source"), PUBLISHED)
def test_published_parameter_counts(arch: str, options: dict[str, Any], parameters: int, source: str) -> None:
    entry = MODELS[arch]
    with torch.device("meta"):
        assert count_parameters(entry.build(entry.options(**options))) == parameters, source


counts = st.integers(1, 3)
pixel_ranges = st.sampled_from([1, 255])
scales = st.sampled_from([1, 2, 3, 4, 8])
per_group = st.lists(counts, min_size=2, max_size=2)
OPTIONS = {
    "dncnn": st.fixed_dictionaries(
        {"features": counts, "depth": st.integers(2, 6), "image_channels": st.sampled_from([1, 3])}
    ),
    "edsr": st.fixed_dictionaries({"scale": st.sampled_from([2, 3, 4, 8]), "features": counts, "blocks": counts}),
    "imdn": st.fixed_dictionaries(
        {"scale": st.sampled_from([2, 3, 4, 8]), "features": st.sampled_from([4, 12]), "blocks": counts}
    ),
    "nafnet": st.integers(1, 4).flatmap(
        lambda levels: st.fixed_dictionaries(
            {
                "width": st.sampled_from([2, 4, 6]),
                "encoder_blocks": st.lists(counts, min_size=levels, max_size=levels),
                "middle_blocks": counts,
                "decoder_blocks": st.lists(counts, min_size=levels, max_size=levels),
                "dw_expansion": st.sampled_from([1, 2, 4]),
                "ffn_expansion": st.sampled_from([1, 2, 4]),
                "image_channels": st.sampled_from([1, 3]),
            }
        )
    ),
    "rcan": st.fixed_dictionaries(
        {
            "scale": scales,
            "features": counts,
            "groups": counts,
            "blocks": counts,
            "attention_features": counts,
            "pixel_range": pixel_ranges,
        }
    ),
    "restormer": st.fixed_dictionaries(
        {
            "dim": st.sampled_from([4, 8, 16]),
            "blocks": st.lists(counts, min_size=4, max_size=4),
            "refinement": counts,
            "heads": st.lists(st.sampled_from([1, 2, 4]), min_size=4, max_size=4),
            "ffn_expansion": st.sampled_from([1.0, 1.5, 2.0, 2.66, 3.0]),
            "norm": st.sampled_from(["with-bias", "bias-free"]),
            "bias": st.booleans(),
            "image_channels": st.sampled_from([1, 3]),
        }
    ),
    "rlfn": st.fixed_dictionaries(
        {"scale": st.sampled_from([2, 3, 4, 8]), "features": counts, "blocks": counts, "esa_features": counts}
    ),
    "swinir": st.sampled_from(
        [(1, "none"), (2, "pixelshuffle"), (3, "pixelshuffle"), (8, "pixelshuffle")]
        + [(scale, "pixelshuffledirect") for scale in (2, 3, 4)]
        + [(scale, "nearest+conv") for scale in (2, 4)]
    ).flatmap(
        lambda end: st.fixed_dictionaries(
            {
                "scale": st.just(end[0]),
                "upsampler": st.just(end[1]),
                "embed_dim": st.sampled_from([6, 12]),
                "depths": per_group,
                "heads": per_group,
                "window": st.sampled_from([2, 4, 8]),
                "mlp_ratio": st.sampled_from([1.5, 2.0, 4.0]),
                "residual_conv": st.sampled_from(["1conv", "3conv"]),
                "image_channels": st.sampled_from([1, 3]),
            }
        )
    ),
    "uformer": st.fixed_dictionaries(
        {
            "embed_dim": st.sampled_from([6, 12]),
            "depths": st.lists(counts, min_size=5, max_size=5),
            "heads": st.lists(counts, min_size=5, max_size=5),
            "window": st.sampled_from([2, 4, 8]),
            "mlp_ratio": st.sampled_from([1.5, 2.0, 4.0]),
            "modulator": st.booleans(),
            "image_channels": st.sampled_from([1, 3]),
        }
    ),
}


@pytest.mark.parametrize("arch", SMALL)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_options_from_state_dict_inverts_construction(arch: str, data: st.DataObject) -> None:
    entry = MODELS[arch]
    options = entry.options(**data.draw(OPTIONS[arch]))
    found, recognised = recognise(entry.build(options).state_dict())
    assert (found, recognised) == (entry, options)


@settings(deadline=None, max_examples=25)
@given(dim=st.sampled_from([4, 8, 24, 48]), expansion=st.floats(0.5, 4.0))
def test_any_restormer_expansion_is_found_up_to_the_shapes(dim: int, expansion: float) -> None:
    """Many numbers give the same hidden channels; the one that is found gives them too."""
    entry = MODELS["restormer"]
    options = entry.options(dim=dim, blocks=[1, 1, 1, 1], refinement=1, heads=[1, 1, 1, 1], ffn_expansion=expansion)
    with torch.device("meta"):
        given_shapes, found_shapes = (
            {key: value.shape for key, value in entry.build(chosen).state_dict().items()}
            for chosen in (options, entry.options_from_state_dict(entry.build(options).state_dict()))
        )
    assert given_shapes == found_shapes


@pytest.mark.parametrize("arch", SMALL)
def test_natural_taps_are_feature_maps_in_the_order_of_the_forward_pass(arch: str) -> None:
    network, options = make(arch)
    paths = MODELS[arch].natural_taps(options)
    order: list[str] = []
    for name, path in paths.items():
        network.get_submodule(path).register_forward_hook(lambda *_, name=name: order.append(name))
    _, taps = Tapped(network, paths)(image(arch, options))
    assert order == list(paths) == list(taps)
    assert all(tap.ndim == 4 for tap in taps.values())


@pytest.mark.parametrize("arch", SMALL)
def test_no_tap_is_changed_after_it_was_taken(arch: str) -> None:
    network, options = make(arch)
    kept: list[tuple[Tensor, Tensor]] = []
    for path in MODELS[arch].natural_taps(options).values():
        network.get_submodule(path).register_forward_hook(lambda m, i, o: kept.append((o, o.clone())))
    network(image(arch, options))
    assert all(torch.equal(now, then) for now, then in kept)


@pytest.mark.parametrize("arch", ["nafnet", "restormer", "uformer"])
def test_taps_of_a_u_shape_halve_their_size_level_by_level(arch: str) -> None:
    network, options = make(arch)
    _, taps = Tapped(network, MODELS[arch].natural_taps(options))(image(arch, options))
    levels = len([name for name in taps if tap_group(name) == "encoder"])
    assert [name for name in taps if tap_group(name) == "decoder"] == [f"dec{n}" for n in range(levels, 0, -1)]
    for level in range(1, levels + 1):
        side = 32 // 2 ** (level - 1)
        assert taps[f"enc{level}"].shape[-2:] == taps[f"dec{level}"].shape[-2:] == (side, side)
    assert taps["latent"].shape[-2:] == (32 // 2**levels,) * 2


@pytest.mark.parametrize(
    ("name", "group"),
    [("enc1", "encoder"), ("encoder_level2", "encoder"), ("dec3", "decoder"), ("latent", "latent"), ("t1", "body")],
)
def test_tap_groups(name: str, group: str) -> None:
    assert tap_group(name) == group


@pytest.mark.parametrize("arch", SMALL)
def test_every_parameter_is_trained(arch: str) -> None:
    network, options = make(arch)
    network.train()(image(arch, options)).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("arch", SMALL)
def test_channels_last_changes_nothing_but_rounding(arch: str) -> None:
    network, options = make(arch)
    network.double()
    x = image(arch, options).double()
    expected = network(x)
    restored = network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(restored, expected)


@pytest.mark.parametrize("arch", SMALL)
def test_pixels_are_zero_to_one_inside_and_out(arch: str) -> None:
    """A network that has learnt nothing yet restores an image of about the input's size, not one of 0 to 255."""
    network, options = make(arch)
    assert network(image(arch, options)).abs().max() < 10


@pytest.mark.parametrize("arch", SMALL)
@settings(deadline=None, max_examples=8)
@given(height=st.integers(1, 40), width=st.integers(1, 40))
def test_any_size(arch: str, height: int, width: int) -> None:
    network, options = make(arch)
    entry = MODELS[arch]
    x = image(arch, options, 40)[..., :height, :width]
    restored = AnySize(network, entry, options)(x)
    scale = entry.scale(options)
    assert restored.shape == (2, entry.image_channels(options), scale * height, scale * width)
    unit, least = entry.multiple_of(options), entry.least_side(options)
    if height % unit == width % unit == 0 and min(height, width) >= least:
        assert torch.equal(restored, network(x))


@pytest.mark.parametrize("arch", SMALL)
def test_stated_sizes_are_the_least(arch: str) -> None:
    """The network runs on a side of max(multiple_of, least_side), and not on a pixel less."""
    network, options = make(arch)
    entry = MODELS[arch]
    side = max(entry.multiple_of(options), entry.least_side(options))
    network(image(arch, options, side))
    if side > 1:
        with pytest.raises((RuntimeError, ValueError)):
            network(image(arch, options, side - 1))


@pytest.mark.parametrize("arch", [pytest.param(a, marks=pytest.mark.slow) if a in SLOW_TO_EXPORT else a for a in SMALL])
def test_exported_program_equals_the_network_at_another_size(arch: str) -> None:
    """torch.export is what the ONNX exporter starts from; height and width stay free."""
    if arch == "rlfn" and torch.__version__.startswith("2.11."):
        pytest.skip("torch 2.11 exports max pooling of stride 3 only for sizes of which each leaves the same remainder")
    network, options = make(arch)
    unit = MODELS[arch].multiple_of(options)
    sizes = [unit * torch.export.Dim(name, min=-(-24 // unit), max=128 // unit) for name in ("height", "width")]
    shapes = ({2: sizes[0], 3: sizes[1]},)
    program = torch.export.export(network, (image(arch, options),), dynamic_shapes=shapes)
    x = image(arch, options, 64)[..., :48, :]
    torch.testing.assert_close(program.module()(x), network(x))


@pytest.mark.parametrize("wrapper", [None, "params", "params_ema", "state_dict", "module."])
def test_weights_alone_open_a_checkpoint(tmp_path: Path, wrapper: str | None) -> None:
    network, options = make("nafnet")
    state: dict[str, Any] = dict(network.state_dict())
    if wrapper == "module.":
        state = {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}
    elif wrapper is not None:
        state = {wrapper: state, "optimizer": {"lr": 0.1}}
    torch.save(state, tmp_path / "file.pth")
    entry, found, opened = network_of_weights(read_weights(str(tmp_path / "file.pth")))
    assert (entry.name, found) == ("nafnet", options)
    x = image("nafnet", options)
    assert torch.equal(opened.eval()(x), network(x))


def test_a_config_needs_no_more_than_weights(tmp_path: Path) -> None:
    network, options = make("rlfn")
    save_file(network.state_dict(), tmp_path / "teacher.safetensors")
    (tmp_path / "run.yaml").write_text(
        "name: run\nteacher: {weights: teacher.safetensors}\nstudent: {arch: edsr, features: 4, blocks: 1}\n"
        "method: {name: output}\ntrain: {steps: 1}\n"
    )
    teacher: Network | None = load_config(tmp_path / "run.yaml").teacher
    assert teacher is not None
    assert teacher.arch == "rlfn"
    assert {name: getattr(teacher, name) for name in type(options).model_fields} == options.model_dump()
    assert read_config(tmp_path / "run.yaml", ["teacher.features=9"]).problems == []  # found when weights are loaded


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(SMALL, 2)))
def test_each_network_knows_its_own(one: str, other: str) -> None:
    with pytest.raises(ValueError, match="not a state dict of"):
        MODELS[one].options_from_state_dict(make(other)[0].state_dict())


def test_a_foreign_file_says_what_it_looks_like() -> None:
    state_dict = make("nafnet")[0].state_dict()
    del state_dict["intro.weight"]
    with pytest.raises(InputError, match=r"look most like NAFNet \(\d\d% of the key names agree\)"):
        recognise(state_dict)
    with pytest.raises(InputError, match="no key has a name like theirs"):
        recognise(nn.LSTM(2, 2).state_dict())


@pytest.mark.parametrize(
    ("arch", "wrong", "said"),
    [
        ("restormer", {"dim": 12, "heads": [1, 5, 4, 8]}, "heads: 5 do not divide the 24 channels of level 2"),
        ("restormer", {"blocks": [1, 1, 1]}, "blocks"),
        ("nafnet", {"decoder_blocks": [1]}, "encoder_blocks has 4 levels and decoder_blocks 1"),
        ("nafnet", {"width": 3, "dw_expansion": 1}, "width: 3 channels cannot be halved"),
        ("rlfn", {"scale": 5}, "scale"),
        ("imdn", {"features": 10}, "features"),
    ],
)
def test_wrong_options(arch: str, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(said)):
        MODELS[arch].options(**wrong)


# Key names of published checkpoints; N stands for a number.
KEYS = {
    "restormer": """
        patch_embed.proj.weight encoder_levelN.N.normN.body.weight encoder_levelN.N.attn.temperature
        encoder_levelN.N.attn.qkv.weight encoder_levelN.N.attn.qkv_dwconv.weight encoder_levelN.N.attn.project_out.weight
        encoder_levelN.N.ffn.project_in.weight encoder_levelN.N.ffn.dwconv.weight encoder_levelN.N.ffn.project_out.weight
        downN_N.body.N.weight upN_N.body.N.weight reduce_chan_levelN.weight output.weight
    """,
    "dncnn": "model.N.weight model.N.bias",
    "rcan": """
        head.N.weight head.N.bias body.N.body.N.body.N.weight body.N.body.N.body.N.bias body.N.body.N.body.N.conv_du.N.weight
        body.N.body.N.body.N.conv_du.N.bias body.N.body.N.weight body.N.body.N.bias body.N.weight body.N.bias
        tail.N.N.weight tail.N.N.bias tail.N.weight tail.N.bias
        sub_mean.weight sub_mean.bias add_mean.weight add_mean.bias
    """,
    "swinir": """
        conv_first.weight conv_first.bias patch_embed.norm.weight patch_embed.norm.bias norm.weight norm.bias
        layers.N.residual_group.blocks.N.normN.weight layers.N.residual_group.blocks.N.normN.bias
        layers.N.residual_group.blocks.N.attn.relative_position_bias_table
        layers.N.residual_group.blocks.N.attn.relative_position_index
        layers.N.residual_group.blocks.N.attn.qkv.weight layers.N.residual_group.blocks.N.attn.qkv.bias
        layers.N.residual_group.blocks.N.attn.proj.weight layers.N.residual_group.blocks.N.attn.proj.bias
        layers.N.residual_group.blocks.N.mlp.fcN.weight layers.N.residual_group.blocks.N.mlp.fcN.bias
        layers.N.conv.weight layers.N.conv.bias conv_after_body.weight conv_after_body.bias
        conv_before_upsample.N.weight conv_before_upsample.N.bias upsample.N.weight upsample.N.bias
        conv_last.weight conv_last.bias
    """,
    "uformer": """
        input_proj.proj.N.weight input_proj.proj.N.bias output_proj.proj.N.weight output_proj.proj.N.bias
        dowsample_N.conv.N.weight dowsample_N.conv.N.bias upsample_N.deconv.N.weight upsample_N.deconv.N.bias
        encoderlayer_N.blocks.N.normN.weight encoderlayer_N.blocks.N.normN.bias
        encoderlayer_N.blocks.N.attn.relative_position_bias_table encoderlayer_N.blocks.N.attn.relative_position_index
        encoderlayer_N.blocks.N.attn.qkv.to_q.weight encoderlayer_N.blocks.N.attn.qkv.to_q.bias
        encoderlayer_N.blocks.N.attn.qkv.to_kv.weight encoderlayer_N.blocks.N.attn.qkv.to_kv.bias
        encoderlayer_N.blocks.N.attn.proj.weight encoderlayer_N.blocks.N.attn.proj.bias
        encoderlayer_N.blocks.N.mlp.linearN.N.weight encoderlayer_N.blocks.N.mlp.linearN.N.bias
        encoderlayer_N.blocks.N.mlp.dwconv.N.weight encoderlayer_N.blocks.N.mlp.dwconv.N.bias
        encoderlayer_N.blocks.N.modulator.weight
    """,
    "nafnet": """
        intro.weight intro.bias ending.weight ending.bias downs.N.weight downs.N.bias ups.N.N.weight
        encoders.N.N.beta encoders.N.N.gamma encoders.N.N.convN.weight encoders.N.N.convN.bias encoders.N.N.sca.N.weight
        encoders.N.N.sca.N.bias encoders.N.N.normN.weight encoders.N.N.normN.bias
    """,
}


def test_masks_in_a_swinir_checkpoint_are_left_out() -> None:
    network, options = make("swinir")
    state = dict(network.state_dict())
    state["layers.0.residual_group.blocks.1.attn_mask"] = torch.zeros(64, 16, 16)
    entry, found, opened = network_of_weights(state)
    assert (entry.name, found) == ("swinir", options)
    x = image("swinir", options)
    assert torch.equal(opened.eval()(x), network(x))
    assert "layers.0.residual_group.blocks.1.attn_mask" in state  # the caller's dictionary stays as it was


@pytest.mark.parametrize("arch", KEYS)
def test_published_key_names(arch: str) -> None:
    def without_levels(key: str) -> str:
        key = re.sub(r"(decoder_level\d|latent|refinement)\.", "encoder_level1.", key)
        key = re.sub(r"^(decoders\.\d+|middle_blks)\.", "encoders.0.", key)
        key = re.sub(r"^(decoderlayer_\d|conv)\.blocks", "encoderlayer_0.blocks", key)
        return re.sub(r"\d+", "N", key)

    assert {without_levels(key) for key in make(arch)[0].state_dict()} == set(KEYS[arch].split())


def test_macs() -> None:
    """Convolutions and matrix products of NAFNet-32 at 256 x 256: 16 G are published."""
    entry = MODELS["nafnet"]
    with torch.device("meta"):
        network = entry.build(entry.options())
    assert round(count_macs(network, (1, 3, 256, 256)) / 1e9, 1) == 16.0
