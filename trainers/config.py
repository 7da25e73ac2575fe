"""The config: one typed schema from which the parser, the error messages and the editor schema come."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, Tag, model_validator

from trainers.fields import PHOTOS, Auto, PathText, Section, Share, shape_of
from trainers.methods import AnyMethodOptions
from trainers.models import MODELS, ModelEntry, NetworkOptions
from trainers.models.edsr import EDSROptions

TapName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Taps = Annotated[Auto | Annotated[dict[TapName, str], Tag("mapping")], shape_of("auto or {name: module.path, ...}")]


Scale = Literal[2, 3, 4, 8]
SCALES = get_args(Scale)


class NetworkFields(Section):
    """What every network may be given besides its own options."""

    weights: PathText | None = None
    """Weights to start from: a .safetensors or .pth file, a checkpoint folder, builtin:NAME, or null for none."""
    taps: Taps = "auto"
    """Where features are taken for distillation: auto (the network's usual places) or tap name -> module path."""


class EDSRNetwork(EDSROptions, NetworkFields):
    """An EDSR."""

    arch: Literal["edsr"]
    """The network."""


Network = EDSRNetwork  # becomes a union, discriminated by arch, with the second network


def entry(network: Network) -> ModelEntry[Any]:
    """The registry's entry of a network."""
    return MODELS[network.arch]


def options(network: Network) -> NetworkOptions:
    """The options of the network's constructor."""
    chosen: NetworkOptions = entry(network).options.model_validate(
        {name: getattr(network, name) for name in entry(network).options.model_fields}
    )
    return chosen


class TrainFolders(Section):
    """Training images in folders."""

    gt: PathText
    """Folder of ground-truth images."""
    lq: PathText | None = None
    """Folder of degraded inputs of the same names; null makes them by bicubic downscaling."""
    lq_template: str = "{}"
    """File name of an input without its extension, where {} is the ground truth's: {}x2 pairs 0001.png with 0001x2.png."""


class ValSet(Section):
    """A set of images to validate on."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the set in the report."""
    gt: PathText
    """Folder of ground-truth images, or photos for the held-out embedded photographs."""
    lq: PathText | None = None
    """Folder of degraded inputs of the same names; null makes them by bicubic downscaling."""
    lq_template: str = "{}"
    """File name of an input without its extension, where {} is the ground truth's."""


TrainImages = Annotated[
    Annotated[Literal["photos"], Tag("text")] | Annotated[TrainFolders, Tag("mapping")],
    shape_of("photos or {gt: folder, lq: folder or null}"),
]


class Data(Section):
    """Images."""

    train: TrainImages = "photos"
    """Images to train on: photos (embedded photographs) or folders."""
    val: list[ValSet] = Field(default=[ValSet(name=PHOTOS, gt=PHOTOS)], min_length=1)
    """Sets to validate on; the best checkpoint is chosen on the first."""
    patch: int = Field(default=96, ge=1)
    """Side of a training patch in pixels of the ground truth."""
    batch: int = Field(default=16, ge=1)
    """Effective batch size: samples per optimiser step, over all micro-batches and devices."""
    workers: int = Field(default=0, ge=0)
    """Processes that load images; the batches do not depend on it."""


class Train(Section):
    """Optimisation."""

    steps: int = Field(ge=1)
    """Optimiser steps."""
    lr: float = Field(default=2.0e-4, gt=0)
    """Highest learning rate."""
    lr_min: float = Field(default=1.0e-6, ge=0)
    """Learning rate at the end of a cosine schedule."""
    warmup: int = Field(default=0, ge=0)
    """Steps in which the learning rate grows linearly from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate over the steps after the warm-up."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """Optimiser, with betas 0.9 and 0.999."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of the optimiser."""
    clip: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient; null leaves it as it is."""
    precision: Literal[32, "bf16"] = 32
    """Precision of the networks' forward pass: 32, or bf16 (autocast; losses and weights stay float32)."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches per step: 2 halves the memory and changes neither batch nor losses."""
    ema: float | None = Field(default=0.999, ge=0, lt=1)
    """Decay of the moving average of the student's weights, which is validated and shipped; null uses the last weights."""
    channels_last: bool = True
    """Memory layout of images and features; usually faster."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device."""
    devices: Annotated[Annotated[int, Field(ge=1), Tag("number")] | Auto, shape_of("auto or a number")] = "auto"
    """Number of devices, or auto for all GPUs (one process on a CPU)."""
    seed: int = Field(default=0, ge=0)
    """Seed of the student's initialisation and of the data."""
    save_every: int = Field(default=500, ge=1)
    """Steps between checkpoints."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints to keep besides the best."""
    log_every: int = Field(default=50, ge=1)
    """Steps between lines in metrics.jsonl."""
    share_every: int = Field(default=250, ge=1)
    """Steps between measurements of each term's share of the gradient."""
    tensorboard: bool = False
    """Also write TensorBoard events, to <run>/events; needs kdops[tensorboard]."""


class Val(Section):
    """Validation."""

    every: int = Field(default=500, ge=1)
    """Steps between validations; the last step is always validated."""
    protocol: Literal["sr-y"] = "sr-y"
    """How PSNR and SSIM are measured: colour space, range, rounding and border."""
    save_images: int = Field(default=4, ge=0)
    """Images per set kept in the run folder for the report."""


class Config(Section):
    """A training run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the run: the folder <out>/<name>."""
    out: str = "runs"
    """Folder of run folders, relative to the current directory."""
    task: Literal["sr"] = "sr"
    """Task: sr is super-resolution of bicubically downscaled images."""
    scale: Scale = 2
    """Upsampling factor."""
    data: Data = Data()
    """Images."""
    teacher: Network | None = None
    """The frozen teacher, with weights; null where the method needs none."""
    student: Network
    """The network to train."""
    method: AnyMethodOptions
    """The distillation method."""
    train: Train
    """Optimisation."""
    val: Val = Val()
    """Validation."""

    @model_validator(mode="before")
    @classmethod
    def _networks_have_the_scale(cls, given: Any) -> Any:
        scale = given.get("scale", 2) if isinstance(given, dict) else None
        if scale not in SCALES:
            return given  # the scale itself is the mistake
        networks = {
            role: {"scale": scale, **given[role]}
            for role in ("teacher", "student")
            if isinstance(given.get(role), dict)
        }
        return given | networks


def contradictions(config: Config) -> list[tuple[str, str]]:
    """What fits no field alone: (dotted key, what is wrong and what to do)."""
    found = []
    method, data, train = config.method, config.data, config.train
    if method.needs_teacher and config.teacher is None:
        found.append(("teacher", f"method {method.name} needs a teacher: give teacher.arch, its size and its weights"))
    if config.teacher is not None and config.teacher.weights is None:
        found.append(("teacher", "a teacher needs trained weights: give teacher.weights"))
    if data.batch < method.smallest_batch:
        found.append(
            (
                "data.batch",
                f"method {method.name} contrasts patches of a batch: {data.batch} is below {method.smallest_batch}",
            )
        )
    if data.batch % train.accumulate:
        found.append(
            ("train.accumulate", f"{train.accumulate} does not divide the batch of {data.batch}: choose a divisor")
        )
    for role, network in (("teacher", config.teacher), ("student", config.student)):
        if network is None:
            continue
        if network.scale != config.scale:
            found.append((f"{role}.scale", f"{network.scale}, but the run's scale is {config.scale}: leave it out"))
        unit = config.scale * entry(network).multiple_of(options(network))
        if data.patch % unit:
            found.append(
                ("data.patch", f"{data.patch} is not a multiple of {unit}, as the {role} at scale {config.scale} needs")
            )
    names = [entry.name for entry in data.val]
    found += [("data.val", f"two sets are called {name}") for name in sorted({n for n in names if names.count(n) > 1})]
    weights = dict(method.weights)
    pixel = weights["pixel"]
    if any(isinstance(weight, Share) for weight in weights.values()) and (isinstance(pixel, Share) or not pixel):
        found.append(("method.weights.pixel", "shares are measured against the pixel term: give it a number above 0"))
    return found
