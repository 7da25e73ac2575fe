"""The config: one typed schema from which the parser, the error messages and the editor schema come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, Tag, ValidationInfo, model_validator

from trainers.architectures import Network, described, entry, has_scale, options
from trainers.data.degradations import AnyDegradation, Bicubic
from trainers.fields import PHOTOS, TEACHER, Auto, PathText, Section, Share, SizeText, base_folder, shape_of
from trainers.inference import Tiled
from trainers.methods import AnyMethodOptions, Run
from trainers.metrics import PROTOCOLS
from trainers.tasks import TASKS

Scale = Literal[1, 2, 3, 4, 8]
SCALES = get_args(Scale)


class ImageFolders(Section):
    """Ground truths and, where there is one, a folder of their inputs."""

    gt: PathText
    """Folder of ground-truth images."""
    lq: PathText | None = None
    """Folder of degraded inputs; null makes them by the degradation."""
    lq_template: str = "{}"
    """File name of an input without its extension, where {} is the ground truth's and * anything: {}x2, or {}_* for several inputs."""


class TrainFolders(ImageFolders):
    """Training images in folders."""

    exclude: list[str] = Field(default=[])
    """Names of ground truths (without extension) that are left out, such as those of a test set's scenes."""


class ValSet(ImageFolders):
    """A set of images to validate on."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")
    """Name of the set in the report."""
    gt: PathText
    """Folder of ground-truth images, or photos for the held-out embedded photographs."""
    degradation: AnyDegradation | None = None
    """Makes this set's inputs, from random numbers that depend on the image's name; null takes the one of training."""

    def made_by(self, training: AnyDegradation | None) -> AnyDegradation | None:
        """What makes the inputs: its own degradation or that of training; None where a folder holds them, or nothing does."""
        return None if self.lq else self.degradation or training


TrainImages = Annotated[
    Annotated[Literal["photos"], Tag("text")]
    | Annotated[TrainFolders, Tag("mapping")]
    | Annotated[list[TrainFolders], Field(min_length=1), Tag("list")],
    shape_of("photos, {gt: folder, lq: folder or null} or a list of such folders"),
]


class PatchStage(Section):
    """From some step on, patches of another size."""

    step: int = Field(ge=1)
    """First step with these patches, counted from 0."""
    patch: int = Field(ge=1)
    """Side of a training patch in pixels of the ground truth."""
    batch: int | None = Field(default=None, ge=1)
    """Effective batch size; null keeps data.batch."""
    accumulate: int | None = Field(default=None, ge=1)
    """Micro-batches per step; null keeps train.accumulate."""


class Data(Section):
    """Images."""

    train: TrainImages = "photos"
    """Images to train on: photos (embedded photographs), folders, or a list of folders."""
    val: list[ValSet] = Field(default=[ValSet(name=PHOTOS, gt=PHOTOS)], min_length=1)
    """Sets to validate on; the best checkpoint is chosen on the first."""
    degradation: AnyDegradation | None = Bicubic()
    """How inputs are made where there is no folder of them; the default is the task's."""
    grey: bool = False
    """Read all images as grey, with one channel, for networks of one channel."""
    patch: int = Field(default=96, ge=1)
    """Side of a training patch in pixels of the ground truth."""
    batch: int = Field(default=16, ge=1)
    """Effective batch size: samples per optimiser step, over all micro-batches and devices."""
    schedule: list[PatchStage] = Field(default=[])
    """Progressive patches: later stages of the training with patches and batches of other sizes, in the order of their steps."""
    workers: int = Field(default=0, ge=0)
    """Processes that load images; the batches do not depend on it."""

    @property
    def train_folders(self) -> list[TrainFolders]:
        """The folders to train on; none for the embedded photographs."""
        if isinstance(self.train, str):
            return []
        return self.train if isinstance(self.train, list) else [self.train]


class TeacherCacheOptions(Section):
    """Keeps the teacher's answers on the disk, for other runs with the same seed, data and batches: same results, less time."""

    path: Annotated[Literal["auto"] | PathText, Field(union_mode="left_to_right")] = "auto"
    """Folder, which runs may share; auto: <out>/teacher-cache."""
    max_size: SizeText = "20GiB"
    """Most bytes in the folder; a run that needs more is refused."""


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
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    """Learning rate over the steps after the warm-up."""
    milestones: list[Annotated[int, Field(ge=1)]] = Field(default=[])
    """Steps from which on a step schedule multiplies the learning rate by gamma once more, such as [100000, 200000]."""
    gamma: float = Field(default=0.5, gt=0, le=1)
    """Factor of a step schedule."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """Optimiser."""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """Decays of the optimiser's means of gradients and of their squares; DCKD and many super-resolution recipes take 0.9 and 0.99."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of the optimiser."""
    clip: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient; null leaves it as it is."""
    precision: Literal[32, "bf16"] = 32
    """Precision of the networks' forward pass: 32, or bf16 (autocast; losses and weights stay float32)."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches per step: 2 halves the memory and changes neither batch nor losses."""
    recompute: bool = False
    """Activation checkpointing: the student's blocks keep only their inputs and run again in the backward pass."""
    ema: float | None = Field(default=0.999, ge=0, lt=1)
    """Decay of the moving average of the student's weights, which is validated and shipped; null uses the last weights."""
    channels_last: bool = True
    """Memory layout of images and features; usually faster."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Kind of device."""
    devices: Annotated[Annotated[int, Field(ge=1), Tag("number")] | Auto, shape_of("auto or a number")] = "auto"
    """Number of devices, or auto for all GPUs (one process on a CPU)."""
    nodes: int = Field(default=1, ge=1)
    """Machines, each with as many devices; more than one is started by torchrun or SLURM on each."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How several devices share the work: ddp, each holds the whole student; fsdp, each holds a part of its weights and moments."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the student's initialisation and of the data."""
    teacher_cache: TeacherCacheOptions | None = None
    """Keeps the teacher's answers for other runs with the same seed and data; null computes them in every run."""
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
    protocol: Literal["sr-y", "denoise-rgb", "denoise-grey", "derain-y", "deblur-rgb", "dehaze-rgb"] = "sr-y"
    """How PSNR and SSIM are measured: colour space, range, rounding and border; the default is the task's."""
    tile: int | None = Field(default=None, ge=8)
    """Side of the tiles in which images are restored, in pixels of the input: less memory; null restores them whole."""
    save_images: int = Field(default=4, ge=0)
    """Images per set kept in the run folder for the report."""


class Config(Section):
    """A training run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the run: the folder <out>/<name>."""
    out: str = "runs"
    """Folder of run folders, relative to the current directory."""
    task: Literal["sr", "denoise", "derain", "deblur", "dehaze"] = "sr"
    """Task: chooses the defaults of scale, data.degradation and val.protocol."""
    scale: Scale = 2
    """Upsampling factor: 2, 3, 4 or 8 for sr, 1 for the other tasks."""
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
    def _the_task_fills_in(cls, given: Any, info: ValidationInfo) -> Any:
        """Scale, degradation and protocol of the task, and what weights tell of networks, where they are not given."""
        task = TASKS.get(str(given.get("task", "sr"))) if isinstance(given, dict) else None
        scale = given.get("scale", task.scale) if task else None
        if task is None or not isinstance(scale, int) or scale not in SCALES:
            return given  # the task or the scale itself is the mistake
        filled: dict[str, Any] = {"scale": scale}
        data = given.get("data")
        grey = isinstance(data, dict) and data.get("grey") is True
        for section, defaults in task.defaults(grey=grey).items():
            if isinstance(given.get(section, {}), dict):
                filled[section] = defaults | given.get(section, {})
        for role in ("teacher", "student"):
            if isinstance(given.get(role), dict):
                filled[role] = described(given[role], scale, base_folder(info))
        return given | filled


def stages(config: Config) -> list[tuple[int, Config]]:
    """(first step, config with its patch, batch and micro-batches) of each stage of the patch schedule; the first is the config."""
    found = [(0, config)]
    for stage in config.data.schedule:
        data = {"patch": stage.patch, "batch": stage.batch or config.data.batch}
        train = {"accumulate": stage.accumulate or config.train.accumulate}
        update = {"data": config.data.model_copy(update=data), "train": config.train.model_copy(update=train)}
        found.append((stage.step, config.model_copy(update=update)))
    return found


def contradictions(config: Config) -> list[tuple[str, str]]:
    """What fits no field alone, in any stage of the patch schedule: (dotted key, what is wrong and what to do)."""
    first, *later = (contradictions_at(stage) for _, stage in stages(config))
    found = list(first)
    for index, wrong in enumerate(later):
        found += [(f"data.schedule.{index}", f"{key}: {text}") for key, text in wrong if (key, text) not in first]
    steps = [step for step, _ in stages(config)]
    if steps != sorted(set(steps)) or steps[-1] >= config.train.steps:
        found.append(
            ("data.schedule", f"its steps {steps[1:]} must grow and stay below train.steps, {config.train.steps}")
        )
    return found


def contradictions_at(config: Config) -> list[tuple[str, str]]:
    """The same of one stage."""
    found = []
    method, data, train = config.method, config.data, config.train
    if method.needs_teacher and config.teacher is None:
        found.append(("teacher", f"method {method.name} needs a teacher: give teacher.arch, its size and its weights"))
    if config.teacher is not None and config.teacher.weights is None:
        found.append(("teacher", "a teacher needs trained weights: give teacher.weights"))
    found += slice_contradictions(config)
    if data.batch < method.smallest_batch:
        found.append(
            (
                "data.batch",
                f"method {method.name} relates patches of a batch: {data.batch} is below {method.smallest_batch}",
            )
        )
    if method.indivisible and train.accumulate > 1:
        found.append(
            ("train.accumulate", f"{train.accumulate}, but method {method.name} needs 1: {method.indivisible}")
        )
    for key, text in method.refusals(Run(config.scale, data.patch)):
        found.append((f"method.{key}" if key else "method", f"method {method.name} {text}"))
    if train.schedule == "cosine" and train.lr < train.lr_min:
        found.append(
            (
                "train.lr_min",
                f"{train.lr_min:g} is above train.lr, {train.lr:g}, to which the rate would rise: "
                "give a lower train.lr_min, or train.schedule: constant",
            )
        )
    if data.batch % train.accumulate:
        found.append(
            ("train.accumulate", f"{train.accumulate} does not divide the batch of {data.batch}: choose a divisor")
        )
    for role, network in (("teacher", config.teacher), ("student", config.student)):
        if network is None:
            continue
        found += network_contradictions(config, role, network)
    found += data_contradictions(config)
    if bool(train.milestones) != (train.schedule == "step"):
        found.append(
            ("train.milestones", "a step schedule has milestones, and the others have none: give both or neither")
        )
    weights = dict(method.weights)
    pixel = weights["pixel"]
    if any(isinstance(weight, Share) for weight in weights.values()) and (isinstance(pixel, Share) or not pixel):
        found.append(("method.weights.pixel", "shares are measured against the pixel term: give it a number above 0"))
    return found


def network_contradictions(config: Config, role: str, network: Network) -> Iterator[tuple[str, str]]:
    """A network of another scale, patches of a size that it does not take."""
    chosen, patch, scale = options(network), config.data.patch, config.scale
    if entry(network).scale(chosen) != scale:
        if has_scale(network.arch):
            own = entry(network).scale(chosen)
            yield f"{role}.scale", f"{own}, but the run's scale is {scale}: leave it out"
        else:
            advice = "choose another"
            yield f"{role}.arch", f"{network.arch} keeps the size of an image, but the run's scale is {scale}: {advice}"
    if (entry(network).image_channels(chosen) == 1) != config.data.grey:
        sees, needed = ("colour", "false") if config.data.grey else ("grey", "true")
        yield "data.grey", f"the {role} sees {sees} images: set data.grey to {needed}, or choose another network"
    unit = scale * entry(network).multiple_of(chosen)
    if patch % unit:
        yield "data.patch", f"{patch} is not a multiple of {unit}, as the {role} at scale {scale} needs"
    if config.val.tile is not None:
        try:
            Tiled(lambda image: image, config.val.tile, multiple_of=entry(network).multiple_of(chosen))
        except ValueError as error:
            yield "val.tile", f"does not fit the {role}: {error}"
    least = scale * entry(network).least_side(chosen)
    if patch < least:
        yield "data.patch", f"{patch} is below {least}, the least that the {role} takes at scale {scale}"


def data_contradictions(config: Config) -> list[tuple[str, str]]:
    """A scale that is none of the task, inputs that nothing makes, sets of one name."""
    data, found = config.data, []
    if (config.scale == 1) != (TASKS[config.task].scale == 1):
        needed = "give 2, 3, 4 or 8" if config.scale == 1 else "leave it out"
        found.append(("scale", f"{config.scale} does not belong to task {config.task}: {needed}"))
    train = [folders.lq for folders in data.train_folders] or [None]
    sets = [
        *(("data.train", lq, data.degradation) for lq in train),
        *(("data.val", entry.lq, entry.made_by(data.degradation)) for entry in data.val),
    ]
    for key, lq, degradation in sets:
        if lq is None and degradation is None:
            found.append((key, "nothing makes the inputs: give lq, a folder of them, or data.degradation"))
        elif lq is None and degradation is not None and config.scale > 1 and not isinstance(degradation, Bicubic):
            found.append((key, f"{degradation.name} keeps the size of an image, but the scale is {config.scale}"))
    if data.grey != PROTOCOLS[config.val.protocol].grey:
        fitting = ", ".join(name for name, protocol in PROTOCOLS.items() if protocol.grey == data.grey)
        found.append(
            ("val.protocol", f"{config.val.protocol} is not for {'grey' if data.grey else 'colour'} images: {fitting}")
        )
    names = [entry.name for entry in data.val]
    found += [("data.val", f"two sets are called {name}") for name in sorted({n for n in names if names.count(n) > 1})]
    return found


def slice_contradictions(config: Config) -> list[tuple[str, str]]:
    """Weights that are a slice of a teacher's, where there is none or it is another network."""
    found = []
    if config.teacher is not None and config.teacher.weights == TEACHER:
        found.append(
            ("teacher.weights", "only a student starts as a slice of its teacher: give the teacher's own weights")
        )
    if config.student.weights == TEACHER and (config.teacher is None or config.teacher.arch != config.student.arch):
        found.append(
            ("student.weights", f"a slice of a teacher needs one: give a teacher with arch {config.student.arch}")
        )
    return found
