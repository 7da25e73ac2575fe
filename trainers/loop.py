"""The training loop: steps, losses, shares, validation, checkpoints, and how it stops."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

import torch
import torch.distributed
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule
from torch import Tensor, nn
from torch.optim import Optimizer

from trainers import architectures, sharding
from trainers.checkpoint import SaveFailed, Weights
from trainers.config import Config, stages
from trainers.data.loader import batches
from trainers.data.sets import TrainSet
from trainers.ema import EMA
from trainers.errors import Diverged, ImageLost, InputError, out_of_memory
from trainers.files import replace_file
from trainers.loss_weights import LossWeights, gradient_norms, weighted_sum
from trainers.micro_batches import MicroBatches, stage_at
from trainers.networks import any_size
from trainers.position import Position, Window
from trainers.progress import TrainingProgress
from trainers.randomness import random_state, restore_random_state
from trainers.run_folder import RunFolder
from trainers.schedule import learning_rate
from trainers.sharding import gathered, scattered, scattered_optimizer, whole
from trainers.signals import Interrupted, StopRequest
from trainers.step import TrainStep
from trainers.validation import Validation

STEPS_BETWEEN_AGREEMENTS = 10  # on several devices, how often all ask each other whether one was told to stop


class Loop:
    """Trains `model` (the TrainStep as Fabric has set it up) from `position` to the last step.

    The step's batch is `data.batch` samples; each of W devices takes an equal run of its rows and splits it into
    `train.accumulate` micro-batches. The result is the same for every split, up to rounding.
    """

    def __init__(
        self,
        fabric: Fabric,
        config: Config,
        train_step: TrainStep,
        model: _FabricModule,
        optimizer: Optimizer,
        train_sets: Sequence[TrainSet],
        validation: Validation,
        folder: RunFolder,
        ema: EMA | None,
    ) -> None:
        self.fabric = fabric
        self.config = config
        self.train_step = train_step
        self.model = model
        self.optimizer = optimizer
        self.stages = stages(config)
        self.train_sets = train_sets  # one for each stage
        self.validation = validation
        self.folder = folder
        self.checkpoints = folder.checkpoints(config.train.keep)
        self.weights = LossWeights(config.method.weights)
        self.ema = ema
        self.position = Position()
        self.window = Window()
        self.validated: dict[str, float] = {}
        """After a resume: PSNR on the sets that metrics.jsonl has for this step."""
        self.renewed: list[str] = []
        """After a resume: sets that are measured in another way than before."""
        self.micro_batches = MicroBatches(fabric, self.stages, train_step)

    def result(self) -> nn.Module:
        """The network that is validated and shipped: the average of the student's weights, or the last ones.

        Every device must ask for it, since sharded weights are gathered.
        """
        network = self.ema.network if self.ema else self.train_step.student
        return whole(network, self.config.student, self.fabric.device)

    def run(self, progress: TrainingProgress) -> None:
        """Trains to the last step.

        Raises:
            Diverged: a loss became NaN or infinite. Nothing is saved of such a state.
            Interrupted: SIGINT or SIGTERM. The state is saved.
        """
        train = self.config.train
        self._catch_up(progress)
        with closing(self._batches()) as data, StopRequest() as stop:
            while self.position.step < train.steps:
                started = time.perf_counter()
                lq, gt = next(data)
                waited = time.perf_counter() - started
                self.window.losses.append(self._step(lq, gt, progress))
                self.position.step += 1
                if self.fabric.device.type == "cpu" and self.fabric.world_size == 1:
                    self._check_finite(
                        self.window.losses[-1:]
                    )  # costs nothing here; elsewhere it would wait for the device
                elapsed = time.perf_counter() - started
                self.position.seconds += elapsed
                self.window.seconds += elapsed
                self.window.waited += waited
                progress.advance(self.position.step)
                stopping = self._agree(stop.requested)
                self._after_step(progress, stopping)
                if stopping:
                    raise Interrupted(self.position.step)

    def _catch_up(self, progress: TrainingProgress) -> None:
        """After a resume: what a run that never stopped would know from the validation of this step."""
        if self.renewed:
            progress.say(f"val: {', '.join(self.renewed)}: measured in another way from here on, in a new curve")
            self._write({"kind": "series", "step": self.position.step, "sets": self.renewed})
        if set(self.validated) == set(self.validation.sets):
            improved = self._is_best(self.validated[self.validation.first])
        else:
            improved = self.position.step > 0 and self._due(self.config.val.every) and self._validate(progress)
        self.renewed, self.validated = [], {}
        if improved:
            self.save(best=True)

    def _after_step(self, progress: TrainingProgress, stopping: bool) -> None:
        """Log, save and validate, each when it is due."""
        train, validating = self.config.train, self._due(self.config.val.every)
        # A first validation is the best so far and would be saved in any case.
        saving = stopping or self._due(train.save_every) or (validating and self.position.best is None)
        if self._due(train.log_every):
            self._log(progress)
            self.window = Window()
        elif validating or saving:
            self._check_finite(self.window.losses)
        if saving:
            self.save()  # first: a validation may fail
        if validating and self._validate(progress):
            self.save(best=True)

    def _due(self, every: int) -> bool:
        """Whether this step is one of every so many, or the last."""
        return self.position.step % every == 0 or self.position.step == self.config.train.steps

    def _step(self, lq: Tensor, gt: Tensor, progress: TrainingProgress) -> Tensor:
        """One optimiser step; where memory runs out, the same step again in smaller micro-batches.

        Raises:
            OutOfMemory: a single sample does not fit.
        """
        while True:
            before = random_state(self.fabric.device)
            try:
                return self._attempt(lq, gt)
            except Exception as error:
                # On several devices the others wait within this step for this one's gradients: it cannot be repeated alone.
                if self.fabric.world_size > 1 or not out_of_memory(error):
                    raise
            # Not within the handler: the error holds the frames, and they hold the tensors of the failed step.
            self.optimizer.zero_grad(set_to_none=True)
            self.micro_batches.shrink(self.position.step)
            restore_random_state(before, self.fabric.device)
            size = self.micro_batches.size(self.position.step)
            progress.say(
                f"step {self.position.step + 1}: out of memory; micro-batches of {size} from here on, the same batch"
            )
            self._write({"kind": "memory", "step": self.position.step, "micro_batch": size})

    def _attempt(self, lq: Tensor, gt: Tensor) -> Tensor:
        """One optimiser step on this device's rows; the unweighted losses (terms,), means over its samples."""
        step, train = self.position.step, self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(train, step)
        parts = self.micro_batches.split(lq, gt, step)
        if self.weights.measured_terms and step % train.share_every == 0:
            norms = sharding.gradient_norms if self.config.train.strategy == "fsdp" else gradient_norms
            self.weights.update(norms(self.fabric, self.train_step, parts))
        weights, seen = self.weights.at(step), []
        for index, batch in enumerate(parts):
            with self.fabric.no_backward_sync(self.model, enabled=index < len(parts) - 1):
                losses = self.model(batch)
                self.fabric.backward(weighted_sum(losses, weights) / len(parts))
            seen.append(torch.stack([losses[name].detach() for name in self.train_step.method.losses]))
        if train.clip is not None:
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=train.clip, error_if_nonfinite=False)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(step)
        self.train_step.method.after_step(step + 1, self.result)
        return seen[0] if len(seen) == 1 else torch.stack(seen).mean(dim=0)

    def _batches(self) -> Generator[tuple[Tensor, Tensor]]:
        """Inputs and ground truths of this device's rows, step by step, through the stages of the patch schedule."""
        starts = [first for first, _ in self.stages] + [self.config.train.steps]
        for index, train_set in enumerate(self.train_sets):
            made = batches(
                train_set,
                seed=self.config.train.seed,
                start_step=max(self.position.step, starts[index]),
                stop_step=starts[index + 1],
                rows=self.micro_batches.rows(starts[index]),
                workers=self.config.data.workers,
            )
            try:
                with closing(made):
                    yield from ((lq, gt) for _, lq, gt in made)
            except InputError as error:
                raise ImageLost(error) from None

    def _log(self, progress: TrainingProgress) -> None:
        window, step = self.window, self.position.step
        self._check_finite(window.losses)
        mean = self._everywhere(torch.stack(window.losses).mean(dim=0)).tolist()
        losses = dict(zip(self.train_step.method.losses, mean, strict=True))
        weights = self.weights.at(step - 1)
        rate = len(window.losses) / window.seconds
        progress.losses(step, losses, rate)
        self._write(
            {
                "kind": "train",
                "step": step,
                "losses": losses,
                "weights": weights,
                "shares": self.weights.shares(step - 1),
                "total": sum(weights[name] * value for name, value in losses.items()),
                "lr": learning_rate(self.config.train, step - 1),
                "seconds": self.position.seconds,
                "steps_per_second": rate,
                "data_wait": window.waited / window.seconds,
            }
        )

    def _validate(self, progress: TrainingProgress) -> bool:
        """Measures the result on every set; whether it is the best so far on the first.

        Raises:
            ImageLost: an image of a set cannot be read or measured.
        """
        improved, result = False, self.result()
        if self.fabric.is_global_zero:
            try:
                found = self.validation(any_size(self.config.student, result, self.config.val.tile))
            except InputError as error:
                raise ImageLost(error) from None
            for measured in found:
                if measured["set"] not in self.validated:
                    self._write(
                        {"kind": "val", "step": self.position.step, **measured, "seconds": self.position.seconds}
                    )
                best = measured["set"] == self.validation.first and self._is_best(measured["psnr"])
                improved, mark = improved or best, "  (best)" if best else ""
                progress.say(
                    f"step {self.position.step}: {measured['set']}  PSNR {measured['psnr']:.3f} dB  "
                    f"SSIM {measured['ssim']:.4f}  ({measured['protocol']}){mark}"
                )
        improved, self.position.best = self.fabric.broadcast((improved, self.position.best))
        return improved

    def _is_best(self, psnr: float) -> bool:
        """Whether this step's PSNR on the first set is the best so far, which it is from here on."""
        if not psnr > (self.position.best["psnr"] if self.position.best else -math.inf):
            return False  # nor is NaN, to which nothing would compare later
        self.position.best = {"step": self.position.step, "psnr": psnr}
        return True

    def _check_finite(self, losses: Sequence[Tensor]) -> None:
        """Raises Diverged at the first of the latest steps with a NaN or infinite loss, and saves that step's batch."""
        values = self._everywhere(torch.stack(list(losses)))  # (steps, terms)
        finite = values.isfinite()
        if bool(finite.all()):
            return
        first = int((~finite.all(dim=1)).nonzero()[0])
        step = self.position.step - len(losses) + 1 + first
        named = dict(zip(self.train_step.method.losses, values[first].tolist(), strict=True))
        term = next(name for name, good in zip(named, finite[first].tolist(), strict=True) if not good)
        kept = self._keep_batch(step, named) if self.fabric.is_global_zero else ""
        raise Diverged(
            f"the loss term {term} became {named[term]} in step {step}; {kept}. "
            "Lower train.lr, set train.clip, or give the term a smaller weight or a ramp, with --set"
        )

    def _keep_batch(self, step: int, losses: dict[str, float]) -> str:
        """Writes the batch of a step that diverged; where it is, or why not."""
        path, content = self.folder.path / f"diverged-step-{step:06d}.pt", io.BytesIO()
        # A batch is a function of (seed, step), so it need not be kept around: it is made again.
        index, stage = stage_at(self.stages, step - 1)
        lq, gt = self.train_sets[index].samples(self.config.train.seed, step - 1, range(stage.data.batch))
        torch.save({"step": step, "losses": losses, "lq": lq, "gt": gt}, content)
        try:
            replace_file(path, content.getvalue())
        except OSError as error:
            return f"its batch could not be written ({error})"
        return f"its batch is in {path}"

    def save(self, *, best: bool = False) -> None:
        """A checkpoint of everything that the next step depends on, written by the first rank.

        Raises:
            SaveFailed, on every rank: it could not be written. Diverged: the weights are not finite; nothing is written.
        """
        randomness = gather_objects(self.fabric, random_state(self.fabric.device))
        if self.window.losses:
            self.window.losses = list(self._everywhere(torch.stack(self.window.losses)))
        weights, state = self._state(randomness)
        if not all(bool(value.isfinite().all()) for value in weights["student"].values()):
            raise Diverged(
                f"the student's weights are not finite after step {self.position.step}; nothing was saved of it"
            )
        failure: SaveFailed | None = None
        if self.fabric.is_global_zero:
            try:
                self.folder.sync()
                metadata = architectures.metadata(self.config.student)
                self.checkpoints.save(self.position.step, weights, state, best=best, metadata=metadata)
            except SaveFailed as error:
                failure = error
        failure = self.fabric.broadcast(failure)
        if failure is not None:
            raise failure

    def _state(self, randomness: list[Any]) -> tuple[dict[str, Weights], dict[str, Any]]:
        """(weights, state) of a checkpoint, the same for any strategy and number of devices."""
        weights = {"student": self.train_step.student.state_dict()}
        if self.ema:
            weights["ema"] = self.ema.network.state_dict()
        state = {
            "step": self.position.step,
            "seconds": self.position.seconds,
            "best": self.position.best,
            "validation": self.validation.described,
            "optimizer": self.optimizer.state_dict(),
            "others": self.train_step.others(),
            "loss_weights": self.weights.state(),
            "window": vars(self.window),
            "terms": list(self.train_step.method.losses),
            "randomness": randomness,
        }
        return gathered(weights), gathered(state)

    def restore(self) -> None:
        """Goes back to the last checkpoint, and metrics.jsonl with it.

        Raises:
            InputError: there is none, it is damaged, or it does not fit the config.
        """
        path, weights, state = self.checkpoints.read_last()
        if state["step"] > self.config.train.steps:
            raise InputError(
                f"train.steps: {self.config.train.steps}, but {path} is of step {state['step']}: "
                "give no fewer, or start a new run"
            )
        try:
            student, others = self.train_step.student, state["others"]
            student.load_state_dict(scattered(weights["student"], student))
            self.train_step.load_state_dict(scattered(others, self.train_step), strict=False)
            if set(others) != set(self.train_step.others()):
                raise KeyError("its adapters and method state are those of another method")
            if self.ema:
                average = self.ema.network
                average.load_state_dict(scattered(weights.get("ema", weights["student"]), average))
            self.optimizer.load_state_dict(scattered_optimizer(state["optimizer"], self.optimizer))
        except (RuntimeError, KeyError, ValueError) as error:
            if out_of_memory(error):
                raise
            raise InputError(f"{path} does not fit the config: {error}; undo the change, or start a new run") from None
        self.weights.load(state["loss_weights"])
        self.position = Position(state["step"], state["seconds"], state["best"])
        terms = list(self.train_step.method.losses)
        self.window = Window(**state.get("window", {}))  # the oldest checkpoints have none
        if state.get("terms", terms) != terms or any(len(losses) != len(terms) for losses in self.window.losses):
            self.window = Window()  # the method has other terms than before: the next line is of the steps from here on
        self.window.losses = [losses.to(self.fabric.device) for losses in self.window.losses]
        if len(state["randomness"]) == self.fabric.world_size:
            restore_random_state(state["randomness"][self.fabric.global_rank], self.fabric.device)
        self._restore_validation(state.get("validation", self.validation.described))

    def _restore_validation(self, before: dict[str, Any]) -> None:
        """What is known of the validation of this step, whose checkpoint was written before; nothing where it was another one."""
        now = self.validation.described
        self.renewed = [name for name, described in now.items() if before.get(name) != described]
        if self.validation.first in self.renewed or self.validation.first != next(iter(before)):
            self.position.best = None
        if self.fabric.is_global_zero:
            self.folder.cut_metrics(self.position.step)
            found = self.folder.validated(self.position.step)
            self.validated = {name: psnr for name, psnr in found.items() if name in now and name not in self.renewed}
        self.validated = self.fabric.broadcast(self.validated)

    def _everywhere(self, values: Tensor) -> Tensor:
        """The mean over devices; NaN anywhere is NaN everywhere, so that all stop together."""
        if self.fabric.world_size == 1:
            return values
        reduced = self.fabric.all_reduce(values.clone(), reduce_op="mean")
        assert isinstance(reduced, Tensor)
        return reduced

    def _agree(self, requested: bool) -> bool:
        """Whether any device's process was told to stop: all must stop after the same step."""
        if self.fabric.world_size == 1:
            return requested
        if self.position.step % STEPS_BETWEEN_AGREEMENTS:
            return False
        return bool(self._everywhere(torch.tensor(float(requested), device=self.fabric.device)) > 0)

    def _write(self, line: dict[str, Any]) -> None:
        if self.fabric.is_global_zero:
            self.folder.log(line)


def gather_objects(fabric: Fabric, value: Any) -> list[Any]:
    """The value of every rank, on every rank."""
    if fabric.world_size == 1:
        return [value]
    found = [None] * fabric.world_size
    torch.distributed.all_gather_object(found, value)
    return found
