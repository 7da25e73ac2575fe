"""Starts or resumes a training run: builds everything the loop needs, runs it, and writes the results."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from lightning_fabric import Fabric
from rich.console import Console
from torch import Tensor, nn

from trainers import methods, networks
from trainers.architectures import Network
from trainers.checkpoint import step_of
from trainers.config import Config, Train, stages
from trainers.config_file import changes, load_config
from trainers.data.sets import TrainSet, open_train_set
from trainers.devices import device_problems, machine_problems
from trainers.ema import EMA
from trainers.errors import InputError, unusable_path
from trainers.events import Events
from trainers.loop import Loop
from trainers.memory import keep_memory, memory_given_back
from trainers.networks import placed
from trainers.progress import TrainingProgress
from trainers.randomness import seed_everything
from trainers.recompute import recompute
from trainers.run_folder import RunFolder
from trainers.sharding import Sharded
from trainers.signals import sigterm_interrupts
from trainers.slicing import build_student
from trainers.step import TrainStep
from trainers.taps import Adapters, Tapped, tap_group
from trainers.teacher_cache import CachedTeacher, TeacherCache, enable, open_cache
from trainers.validation import Validation, write_results


def train(config: Config, console: Console | None = None) -> Path:
    """Trains a new run and writes its report; returns its folder.

    Raises:
        InputError, Diverged, Interrupted, SaveFailed: see their docstrings.
    """
    with sigterm_interrupts():
        return _run(config, lambda: RunFolder.create(config), console or Console(stderr=True), resuming=False)


def resume(path: Path, overrides: Sequence[str] = (), console: Console | None = None) -> Path:
    """Goes on with the run in a folder, from its last checkpoint; exactly as if it had never stopped.

    Raises:
        InputError, Diverged, Interrupted, SaveFailed: see their docstrings.
    """
    console = console or Console(stderr=True)
    if not (path / "config.yaml").is_file():
        raise InputError(f"{path} is no run folder: it has no config.yaml; start one with kdtrain train")
    before, config = load_config(path / "config.yaml"), load_config(path / "config.yaml", overrides)
    changed = changes(before, config)
    _refuse_changes(path, before, config, changed)
    for change in changed:
        console.print(f"changed: {change}", markup=False, highlight=False, soft_wrap=True)
    with sigterm_interrupts():
        return _run(config, lambda: RunFolder.open(path), console, resuming=True, judged_anew=bool(changed))


def _refuse_changes(path: Path, before: Config, config: Config, changed: Sequence[str]) -> None:
    """Those that would change nothing but what the run says of itself."""
    if (before.out, before.name) != (config.out, config.name):
        raise InputError(
            f"name and out: {path} keeps its name and place: leave them out, and move the folder if you want"
        )
    last = RunFolder(path).checkpoints(keep=1).last()
    if last is not None and step_of(last) >= config.train.steps:
        late = [change for change in changed if not change.startswith(("val.", "data.val", "train.steps"))]
        if late:
            raise InputError(
                f"{path} is done at step {step_of(last)}, and this would change nothing of it: {'; '.join(late)}. Raise train.steps "
                "too, or start a new run"
            )


def restart(path: Path, console: Console) -> Path:
    """Trains the run in a folder from the start, which has no checkpoint.

    Raises:
        InputError, Diverged, Interrupted, SaveFailed: see their docstrings.
    """

    def emptied() -> RunFolder:
        folder = RunFolder.open(path)
        folder.cut_metrics(-1)
        return folder

    with sigterm_interrupts():
        return _run(load_config(path / "config.yaml"), emptied, console, resuming=False)


def _run(
    config: Config, open_folder: Callable[[], RunFolder], console: Console, *, resuming: bool, judged_anew: bool = False
) -> Path:
    fabric = make_fabric(config.train)
    alone = machine_problems(fabric, config.train.nodes)
    if alone:
        raise InputError(alone)
    fabric.launch()
    if fabric.device.type == "cpu":
        keep_memory()
    if torch.distributed.is_initialized():
        atexit.register(_leave_processes)
    for _, stage in stages(config):
        share = fabric.world_size * stage.train.accumulate
        if stage.data.batch % share:
            raise InputError(
                f"data.batch: {stage.data.batch} does not divide into {fabric.world_size} devices x "
                f"{stage.train.accumulate} micro-batches: make it a multiple of {share}"
            )
    if config.method.indivisible and fabric.world_size > 1:
        raise InputError(
            f"train.devices: {fabric.world_size}, but method {config.method.name} runs on one: {config.method.indivisible}"
        )
    folder = _on_first_rank(fabric, open_folder)
    try:
        cache = open_cache(config, fabric.world_size)
        loop = build_loop(fabric, config, folder, resuming=resuming, cache=cache)
        if fabric.is_global_zero:
            # Not before all of the config has been used: a start that fails leaves no run behind.
            if config.train.tensorboard:
                folder.events = Events(folder.path / "events", loop.position.step)
            with folder.telling_how_to_go_on():
                folder.describe(config)
            if loop.position.step < config.train.steps or judged_anew:
                folder.set_result_aside()
        shown = TrainingProgress(console, loop.position.step, config.train.steps, shown=fabric.is_global_zero)
        with folder.telling_how_to_go_on():
            with shown as progress:
                progress.say(summary(config, fabric, folder))
                loop.run(progress)
                if cache is not None:
                    progress.say(cache.summary())
            result = loop.result()
            if fabric.is_global_zero:
                position = loop.position
                with memory_given_back():
                    write_results(loop.validation, result, folder, position)
            fabric.barrier()
    finally:
        folder.close()
    return folder.path


def _leave_processes() -> None:
    """Closes the connections to other processes: threads that still serve them when Python is gone can abort the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def summary(config: Config, fabric: Fabric, folder: RunFolder) -> str:
    """One line about what starts."""
    data, device = config.data, fabric.device.type
    devices = device if fabric.world_size == 1 else f"{fabric.world_size} x {device}"
    return (
        f"{folder.path}: {config.method.name}, {config.train.steps} steps of {data.batch} patches of {data.patch} pixels, "
        f"{config.student.arch} x{config.scale} on {devices}"
    )


def make_fabric(train: Train) -> Fabric:
    """Fabric for the config's devices and precision; it starts the other processes by itself.

    Raises:
        InputError: devices that are not there, a student to be shared among one.
    """
    wrong = device_problems(train)
    if wrong:
        raise InputError(wrong)
    return Fabric(
        accelerator=train.accelerator,
        devices=train.devices,
        num_nodes=train.nodes,
        precision="bf16-mixed" if train.precision == "bf16" else "32-true",
        strategy=Sharded() if train.strategy == "fsdp" else "auto",
    )


def build_loop(
    fabric: Fabric, config: Config, folder: RunFolder, *, resuming: bool, cache: TeacherCache | None = None
) -> Loop:
    """Networks, data, optimiser and the loop over them, at the start or at the last checkpoint."""
    seed_everything(config.train.seed)
    # The student comes first: methods to be compared start from the same weights.
    student = build_student(config)
    train_sets = [open_train_set(stage.data, stage.scale, stage.data.patch) for _, stage in stages(config)]
    train_step = build_step(config, student, train_sets[0], fabric.device, calibrate=not resuming, cache=cache)
    if cache is not None:
        enable(cache, stages(config), train_step, fabric.device)
    ema = None if config.train.ema is None else EMA(student, config.train.ema)
    if ema and isinstance(fabric.strategy, Sharded):
        fabric.strategy.shard(ema.network)
    model = fabric.setup_module(train_step)
    # After the set-up: sharding puts other parameters in the places of the student's.
    optimizer = fabric.setup_optimizers(make_optimizer(config.train, train_step))
    assert isinstance(optimizer, torch.optim.Optimizer)  # Fabric gives a tuple for several
    validation = Validation(config, fabric.device)
    loop = Loop(fabric, config, train_step, model, optimizer, train_sets, validation, folder, ema)
    if resuming:
        loop.restore()
    return loop


def build_step(
    config: Config,
    student: nn.Module,
    train_set: TrainSet,
    device: torch.device,
    *,
    calibrate: bool,
    cache: TeacherCache | None = None,
) -> TrainStep:
    """The TrainStep of a config, on the device; its adapters calibrated on the batch of step 0 if asked."""
    channels_last = config.train.channels_last
    method = methods.build(config.method)
    needs = method.requirements()
    tapped = Tapped(placed(student, device, channels_last), wanted_taps(config.student, needs))
    if config.train.recompute:
        recompute(student, tapped.paths.values())
    teachers = {}
    for name in needs.teachers:
        assert config.teacher is not None  # config.contradictions saw to it
        described = config.teacher.model_copy(update={"weights": needs.weights.get(name, config.teacher.weights)})
        teacher = networks.build_network(described, name).eval().requires_grad_(False)
        teachers[name] = Tapped(placed(teacher, device, channels_last), wanted_taps(config.teacher, needs))
        if cache is not None:
            teachers[name] = CachedTeacher(teachers[name], described.model_dump_json(exclude={"weights"}), cache)
    first_batch = FirstBatch(config, train_set, device)
    adapters = None
    if needs.taps and needs.adapters:
        with torch.no_grad():
            lq, gt = next(iter(first_batch))
            adapters = placed(Adapters(tapped(lq)[1], method.targets(lq, gt, teachers)), device, channels_last)
            if calibrate:
                adapters.calibrate((tapped(lq)[1], method.targets(lq, gt, teachers)) for lq, gt in first_batch)
    method.prepare(tapped.network)
    train_step = TrainStep(tapped, placed(method, device, channels_last), adapters, teachers).train()
    if calibrate:
        with torch.no_grad():
            method.calibrate(first_batch, train_step.teachers)
    return train_step


def wanted_taps(network: Network, needs: methods.Requirements) -> dict[str, str]:
    """Name and module path of the taps that a method wants of a network."""
    paths = networks.tap_paths(network) if needs.taps else {}
    groups = needs.tap_groups
    return {name: path for name, path in paths.items() if groups is None or tap_group(name) in groups}


class FirstBatch:
    """The samples of step 0, one at a time: lq (1, 3, h, w) and gt (1, 3, H, W) on the device."""

    def __init__(self, config: Config, train_set: TrainSet, device: torch.device) -> None:
        self.config, self.train_set, self.device = config, train_set, device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(self.config.data.batch):
            lq, gt = self.train_set.sample(self.config.train.seed, 0, index)
            yield lq[None].to(self.device), gt[None].to(self.device)


def make_optimizer(train: Train, train_step: TrainStep) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
    first, second = train.betas
    return kind(
        train_step.parameters(), lr=train.lr, betas=(first, second), weight_decay=train.weight_decay, fused=True
    )


def _on_first_rank(fabric: Fabric, open_folder: Callable[[], RunFolder]) -> RunFolder:
    """The run folder, opened by the first rank; where that fails, all ranks fail together."""
    folder: RunFolder | None = None
    path, problems = Path(), []
    if fabric.is_global_zero:
        try:
            folder = open_folder()
            path = folder.path
        except InputError as error:
            problems = error.problems
        except OSError as error:
            unusable = unusable_path(error)
            if unusable is None:
                raise
            problems = [unusable]
    path, problems = fabric.broadcast((path, problems))
    if problems:
        raise InputError(problems)
    return folder or RunFolder(path)
