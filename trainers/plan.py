"""`kdtrain plan`: what a training step will take, before it is run, and what makes it fit.

Where a step fits, it is run in a process of its own, and its true peak and times are reported as measured. Beyond, bytes and work come from
a run on fake tensors (footprint.py), which need neither memory nor time; what a process takes besides its tensors, and how long a part
takes for its work, is learned from two small measured steps. Such figures are reported as simulated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kdops
from trainers.config import Config, contradictions
from trainers.errors import InputError
from trainers.footprint import Cost, StepCosts, step_costs
from trainers.memory import keep_memory
from trainers.methods import Batch
from trainers.step import TrainStep

BACKENDS = {"kdops": "auto", "reference": "reference"}  # name in the plan -> of kdops.backend()
HEADROOM = 0.9  # of the memory that is free: the rest of the machine goes on
LOW, HIGH = 2**26, 2**29  # bytes of the two steps that are measured to learn what a process takes besides
HOLES = 1.0  # bytes between small storages for each byte in them, where no two steps tell: 0.8 to 1.4 were measured (facd, 60 to 100 MiB)
MOST_WORK = 5e11  # of such a step: seconds on two cores
LONGEST = 60.0  # seconds: a longer step is not run
SHORT = (
    3.0  # seconds: a shorter step is run twice for its time: the first starts threads and makes plans for convolutions
)


@dataclass(frozen=True)
class Point:
    """A step to plan: side of the patch, samples in a micro-batch, whether activations are recomputed, and the backend."""

    patch: int
    micro: int
    recompute: bool
    backend: str


@dataclass(frozen=True)
class Planned:
    """What one point takes."""

    point: Point
    costs: StepCosts
    shared: int
    """Bytes of teacher features of the whole effective batch, where the method shares them."""
    peak: int
    """Bytes of the process at its highest."""
    seconds: float
    """Of one micro-batch with its share of the optimiser's step."""
    measured: bool


def free_memory() -> int:
    """What a new process may take: of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0] * HEADROOM)
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(int(available[1]) * 1024 * HEADROOM) if available else 2**63


# --- on fake tensors -----------------------------------------------------------------------------------------------------------------


class _Blanks:
    """Stands in for the training images: their shapes."""

    def __init__(self, config: Config, patch: int) -> None:
        self.scale, self.patch, self.channels = config.scale, patch, 1 if config.data.grey else 3

    def sample(self, seed: int, step: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        side = self.patch // self.scale
        return torch.rand(self.channels, side, side), torch.rand(self.channels, self.patch, self.patch)


class Planner:
    """Plans steps of one config. Networks are built once for each choice of recomputing; no image is read."""

    def __init__(self, config: Config, memory: int, longest: float = LONGEST) -> None:
        self.config = config
        self.memory = memory
        self.longest = longest
        self._steps: dict[bool, TrainStep] = {}
        self._learned: dict[str, Learned] = {}
        self._measured: dict[Point, Measured] = {}
        self._simulated: dict[Point, tuple[StepCosts, int]] = {}

    def simulate(self, point: Point) -> tuple[StepCosts, int]:
        """Costs of a point on fake tensors, and the bytes of teacher features that its micro-batches share."""
        train_step = self.train_step(point.recompute)
        if point not in self._simulated:
            with FakeTensorMode(allow_non_fake_inputs=True):
                costs, shared = run_parts(train_step, self.config, point)
            self._simulated[point] = (
                costs.map(lambda _, cost: dataclasses.replace(cost, seconds=0.0), seconds=0.0),
                shared,
            )
        return self._simulated[point]

    def plan(self, point: Point) -> Planned:
        """Measured where it fits and takes no longer than allowed, else simulated."""
        if point != self._twin(point):
            return dataclasses.replace(self.plan(self._twin(point)), point=point)
        predicted = self.predict(point)
        if predicted.peak > min(self.memory, free_memory()) or predicted.seconds > self.longest:
            return predicted
        found = self._measure(point)
        return Planned(point, found.costs, predicted.shared, found.peak, found.seconds, measured=True)

    def predict(self, point: Point) -> Planned:
        """What simulation says of a point, whether or not it could be run."""
        costs, shared = self.simulate(point)
        costs, seconds = self._of_backend(self._twin(point).backend).times(costs)
        return Planned(point, costs, shared, self._predicted(point, costs, shared), seconds, measured=False)

    def proposal(self, backend: str, patch: int) -> tuple[Planned, list[str]] | None:
        """The largest micro-batch that fits, first as the config is, then with recomputed activations; None if none does."""
        batch, recompute = self.config.data.batch, self.config.train.recompute
        for again in dict.fromkeys((recompute, True)):
            for accumulate in (n for n in range(1, batch + 1) if batch % n == 0):
                point = Point(patch, batch // accumulate, again, backend)
                try:
                    predicted = self.predict(point)
                except InputError:
                    break  # this network cannot recompute
                if predicted.peak <= self.memory:
                    return predicted, [f"train.accumulate={accumulate}"] + ["train.recompute=true"] * again
        return None

    def _twin(self, point: Point) -> Point:
        """The same step on kdops where it does the same there, as that of a method without an op of ours: it is then measured once."""
        twin = dataclasses.replace(point, backend="kdops")
        return twin if self.simulate(twin) == self.simulate(point) else point

    def train_step(self, recompute: bool) -> TrainStep:
        if recompute not in self._steps:
            self._steps[recompute] = build(self.config, recompute, self.config.data.patch)
        return self._steps[recompute]

    def _predicted(self, point: Point, costs: StepCosts, shared: int) -> int:
        learned = self._of_backend(self._twin(point).backend)
        return int(dynamic(costs, shared) + learned.besides(costs))

    def _of_backend(self, backend: str) -> Learned:
        """Learned from two measured steps, once for each backend."""
        if backend not in self._learned:
            points = [self._nearest(backend, size) for size in (LOW, min(HIGH, self.memory // 4))]
            simulated = [self.simulate(point) for point in points]
            measured = [self._measure(point) for point in points]
            self._learned[backend] = learn(simulated, measured)
        return self._learned[backend]

    def seconds_of(self, part: str, work: float) -> float:
        """What a part takes for some work on kdops."""
        return self._of_backend("kdops").rates[part] * work

    def learned_from(self, point: Point) -> bool:
        """Whether its own measurement is one of those from which its backend's predictions were learned."""
        return self._twin(point) in self._measured

    def _measure(self, point: Point) -> Measured:
        if point not in self._measured:
            self._measured[point] = measure_in_child(self.config, point)
        return self._measured[point]

    def _nearest(self, backend: str, size: int) -> Point:
        """The point whose step is nearest to a size: a process's overhead grows with it, so it is learned at sizes that matter.

        Among those that take seconds: attention's time grows faster than its memory.
        """
        micro = self.config.data.batch // self.config.train.accumulate
        found: list[tuple[float, Point]] = []
        for side in self._sides():
            point = Point(side, micro, self.config.train.recompute, backend)
            costs, _ = self.simulate(point)
            if found and costs.work > MOST_WORK:
                break
            found.append((abs(math.log(costs.peak / size)), point))
            if costs.peak > size:
                break
        return min(found, key=lambda pair: pair[0])[1]

    def _sides(self) -> list[int]:
        """The config's patch, its halves and doubles, as far as the networks take them; from small to large."""
        given = self.config.data.patch
        sides = [given // 8, given // 4, given // 2, given, given * 2, given * 4, given * 8]
        return [side for side in sides if side == given or (side and not patch_problems(self.config, side))]


@dataclass(frozen=True)
class Learned:
    """What two measured steps tell of all others on their backend."""

    rests: tuple[float, float]
    """Bytes that their processes took besides what is counted."""
    small: tuple[float, float]
    """Their bytes in storages that a process keeps, between which there are holes."""
    networks: tuple[float, float]
    """Their student's bytes: its convolutions reorder tensors into buffers that no count from outside sees."""
    rates: dict[str, float]
    """Seconds that each part takes for its work."""
    rest: float
    """Seconds of a step over those of its parts."""

    def besides(self, costs: StepCosts) -> float:
        """Bytes of the process besides what is counted.

        They grow with small storages and with the network's; a line through the two steps over either is too high where it blames the
        growth on the wrong one, so the lower line counts. Where both steps are one, nothing is known of the growth.
        """
        lines = ((costs.small, *self.small), (costs.student.peak, *self.networks))
        growth = max(0.0, self.rests[1] - self.rests[0])
        grown = (growth * (bytes_ - low) / (high - low) for bytes_, low, high in lines if high > low)
        return self.rests[0] + min(grown, default=HOLES * (costs.small - self.small[0]))

    def times(self, costs: StepCosts) -> tuple[StepCosts, float]:
        """Simulated costs with seconds, and the seconds of the whole step."""
        timed = costs.map(lambda name, cost: dataclasses.replace(cost, seconds=self.rates[name] * cost.work))
        return timed, self.rest * timed.parts_seconds


def learn(simulated: Sequence[tuple[StepCosts, int]], measured: Sequence[Measured]) -> Learned:
    """From two steps; the times from the second, which is the larger."""
    (first, one), (second, two) = simulated
    rests = (measured[0].peak - dynamic(first, one), measured[1].peak - dynamic(second, two))
    parts, found = simulated[1][0].parts(), measured[1]
    rates = {name: cost.seconds / max(parts[name].work, 1.0) for name, cost in found.costs.parts().items()}
    small, networks = (first.small, second.small), (first.student.peak, second.student.peak)
    return Learned(rests, small, networks, rates, found.seconds / found.costs.parts_seconds)


def patch_problems(config: Config, patch: int) -> list[str]:
    """Why networks or method cannot take patches of this side."""
    trial = config.model_copy(update={"data": config.data.model_copy(update={"patch": patch})})
    known = contradictions(config)
    return [text for key, text in contradictions(trial) if (key, text) not in known]


def dynamic(costs: StepCosts, shared: int) -> int:
    """Bytes that depend on the config: weights, average, gradients and optimiser, and what the step holds at its highest."""
    return costs.weights + costs.trained + costs.optimizer + shared + costs.peak


def build(config: Config, recompute: bool, patch: int) -> TrainStep:
    """The TrainStep, with real weights and no images; its adapters take their sizes from a patch."""
    from trainers.launch import build_step
    from trainers.randomness import seed_everything
    from trainers.slicing import build_student

    seed_everything(config.train.seed)
    update = {"train": config.train.model_copy(update={"recompute": recompute})}
    student = build_student(config)
    blanks: Any = _Blanks(config, patch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return build_step(config.model_copy(update=update), student, blanks, device, calibrate=False)


def run_parts(train_step: TrainStep, config: Config, point: Point) -> tuple[StepCosts, int]:
    """One step in parts, on the kind of tensors that torch makes at the moment."""
    with kdops.backend(BACKENDS[point.backend]), precision(config):
        batch, shared = make_batch(train_step, config, point)
        return step_costs(train_step, batch), shared


def precision(config: Config) -> Any:
    """Autocast as in training."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, torch.bfloat16) if config.train.precision == "bf16" else contextlib.nullcontext()


def make_batch(train_step: TrainStep, config: Config, point: Point) -> tuple[Batch, int]:
    """A micro-batch of noise, and the bytes of what the method shares of the effective batch."""
    device = next(train_step.parameters()).device
    samples = [_Blanks(config, point.patch).sample(0, 0, index) for index in range(point.micro)]
    lq, gt = (torch.stack(images).to(device) for images in zip(*samples, strict=True))
    if config.train.channels_last:
        lq, gt = (image.contiguous(memory_format=torch.channels_last) for image in (lq, gt))
    if not train_step.method.requirements().batch_coupled:
        return Batch(lq, gt), 0
    parts = max(1, config.data.batch // point.micro)
    with torch.no_grad():
        own = train_step.method.share(Batch(lq, gt), train_step.teachers)
    shared = {
        name: (torch.cat([output] * parts), {key: torch.cat([tap] * parts) for key, tap in taps.items()})
        for name, (output, taps) in own.items()
    }
    size = sum(t.numel() * t.element_size() for output, taps in shared.values() for t in (output, *taps.values()))
    return Batch(lq, gt, slice(0, point.micro), shared), size


# --- in a process of its own ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What a child process says of itself."""

    peak: int
    seconds: float
    costs: StepCosts


def measure_in_child(config: Config, point: Point) -> Measured:
    """Run the point for real. InputError: see in_child."""
    return measured_from(
        in_child(__name__, config, point, f"the step of patch {point.patch} and micro-batch {point.micro}")
    )


def in_child(module: str, config: Config, point: Point, what: str, **others: Any) -> Any:
    """What `python -m module` prints last, given config, point and others as its job.

    Raises:
        InputError: the process ended early, for lack of memory most likely.
    """
    job = {"config": config.model_dump(mode="json"), "point": dataclasses.asdict(point), **others}
    run = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise InputError(f"{what} could not be measured: {last}")
    return json.loads(run.stdout.splitlines()[-1])


def measured_from(found: dict[str, Any]) -> Measured:
    """What dataclasses.asdict made of it, back."""
    return Measured(found["peak"], found["seconds"], _costs(dict(found["costs"])))


def _costs(plain: dict[str, Any]) -> StepCosts:
    several = {key: {name: Cost(**cost) for name, cost in plain.pop(key).items()} for key in ("teachers", "terms")}
    return StepCosts(
        student=Cost(**plain.pop("student")), teachers=several["teachers"], terms=several["terms"], **plain
    )


def _child() -> None:
    """Read a job, run its step as training would, say what it took."""
    import gc
    import time

    config, point, train_step, step = given(json.load(sys.stdin))
    seconds: list[float] = []
    gc.collect()
    gc.disable()  # it takes 0.3 s once in a while, and would be counted for whatever runs then
    while not seconds or (len(seconds) < 2 and seconds[0] < SHORT):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    peak = process_peak()
    for _ in seconds:  # likewise
        costs, _ = run_parts(train_step, config, point)
    print(json.dumps({"peak": peak, "seconds": seconds[-1], "costs": dataclasses.asdict(costs)}))


def given(job: dict[str, Any]) -> tuple[Config, Point, TrainStep, Callable[[], None]]:
    """Config, point and TrainStep of a job for `in_child`, and what makes a training step; memory is kept as in training."""
    from trainers.launch import make_optimizer

    keep_memory()
    config, point = Config.model_validate(job["config"]), Point(**job["point"])
    train_step = build(config, point.recompute, point.patch)
    optimizer = make_optimizer(config.train, train_step)
    make_state(optimizer)
    return config, point, train_step, partial(training_step, train_step, config, point, optimizer)


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """The moments, as all steps but a run's first find them: a step with gradients of zero, which changes no weight but by decay."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def training_step(train_step: TrainStep, config: Config, point: Point, optimizer: torch.optim.Optimizer) -> None:
    """One optimiser step on noise, as training does it."""
    with kdops.backend(BACKENDS[point.backend]):
        with precision(config):
            batch, _ = make_batch(train_step, config, point)
            losses = train_step(batch)
        torch.stack(list(losses.values())).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def process_peak() -> int:
    """Bytes: of the resident set, or of the GPU's memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise InputError("this system does not say how much memory a process took: /proc/self/status has no VmHWM")
    return int(found[1]) * 1024


if __name__ == "__main__":
    _child()
