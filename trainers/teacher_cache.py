"""A teacher's answers on the disk: runs with the same seed and batches, such as a comparison's, ask for the same ones.

The key of an answer is everything that it depends on: the teacher (weights, options, code, taps), the machine's arithmetic
(torch, device, threads, autocast), and the whole input of the call, bit for bit. The input is a pure function of (seed, step): image,
crop, flip, degradation, and whatever the method makes of it. Hashing the input and not its recipe makes any change of them another key.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from trainers.config import Config
from trainers.errors import InputError
from trainers.fields import parse_bytes
from trainers.methods import Batch, Features
from trainers.step import TrainStep
from trainers.taps import Tapped

DIGEST = 32  # bytes of a key, and of the checksum before an entry
SUFFIX = ".answer"


@dataclass
class TeacherCache:
    """A folder of answers; several runs and processes may share it."""

    folder: Path
    limit: int
    """Bytes; an answer that would pass it is not written."""
    writers: int = 1
    """Processes that write at the same time."""
    hits: int = 0
    misses: int = 0
    refused: int = 0
    """Answers that were not written, for want of space."""
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = sum(path.stat().st_size for path in self.folder.glob(f"*/*/*{SUFFIX}"))

    def read(self, key: str) -> tuple[Tensor, Features] | None:
        """The answer with this key; None where there is none or it is damaged."""
        try:
            content = self._path(key).read_bytes()
        except OSError:
            content = b""
        checksum, body = content[:DIGEST], content[DIGEST:]
        if not body or hashlib.blake2b(body, digest_size=DIGEST).digest() != checksum:
            self.misses += 1
            return None
        self.hits += 1
        output, taps = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        return output, taps

    def write(self, key: str, answer: tuple[Tensor, Features]) -> None:
        """Keeps an answer, with its memory layout; whoever reads it, whenever, finds all of it or a wrong checksum."""
        output, taps = answer
        buffer = io.BytesIO()
        torch.save((output.cpu(), {name: tap.cpu() for name, tap in taps.items()}), buffer)
        body, path = buffer.getvalue(), self._path(key)
        if self.size + len(body) * self.writers > self.limit:
            self.refused += 1
            return
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not synced: what a crash leaves is detected by the checksum and made again.
            unfinished.write_bytes(hashlib.blake2b(body, digest_size=DIGEST).digest() + body)
            os.replace(unfinished, path)
        except OSError:  # a full disk ends no run for the sake of a cache
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            self.refused += 1
            return
        self.size += len(body) * self.writers

    def summary(self) -> str:
        """One line on what it did."""
        text = f"teacher cache {self.folder}: {self.hits} answers read, {self.misses} computed"
        return text + (f", {self.refused} of them not kept: no space" if self.refused else "")

    def _path(self, key: str) -> Path:
        teacher, call = key.split("/")
        return self.folder / teacher / call[:2] / f"{call}{SUFFIX}"


class CachedTeacher(Tapped):
    """A teacher that looks its answers up. A call is answered from the cache as a whole or computed as a whole, so the bits are those
    of a run without a cache: what a network gives for a sample may depend on the size of its batch in the last place.

    Args:
        teacher: the frozen network with its taps, on its device.
        options: everything besides the weights that makes the network what it is.
    """

    def __init__(self, teacher: Tapped, options: str, cache: TeacherCache) -> None:
        super().__init__(teacher.network, teacher.paths)
        self.cache = cache
        self.asked = 0  # bytes that were asked of it
        self.enabled = False  # until `enable`: the calibration's few calls are not worth keeping
        self.identity = identity(teacher, options)

    def __call__(self, x: Tensor) -> tuple[Tensor, Features]:
        if not self.enabled or isinstance(x, FakeTensor):  # a fake tensor has no contents
            return self._counted(super().__call__(x))
        key = f"{self.identity}/{call_key(x)}"
        found = self.cache.read(key)
        if found is None:
            found = super().__call__(x)
            self.cache.write(key, found)
        output, taps = found
        return self._counted((output.to(x.device), {name: tap.to(x.device) for name, tap in taps.items()}))

    def _counted(self, answer: tuple[Tensor, Features]) -> tuple[Tensor, Features]:
        output, taps = answer
        self.asked += sum(tensor.nbytes for tensor in (output, *taps.values()))
        return answer


def identity(teacher: Tapped, options: str) -> str:
    """16 hex digits that tell teachers and machines apart."""
    device = next(teacher.network.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    code = inspect.getsource(inspect.getmodule(type(teacher.network)) or type(teacher.network))
    found = hashlib.blake2b(
        repr((options, teacher.paths, torch.__version__, name, threads, code)).encode(), digest_size=8
    )
    for key, value in teacher.network.state_dict().items():
        found.update(key.encode())
        found.update(_bytes(value))
    return found.hexdigest()


def call_key(x: Tensor) -> str:
    """The input of a call, its layout and the precision it is computed in."""
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    found = hashlib.blake2b(repr((x.dtype, tuple(x.shape), x.stride(), autocast)).encode(), digest_size=DIGEST)
    found.update(_bytes(x))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def open_cache(config: Config, writers: int) -> TeacherCache | None:
    """The cache of a config, if it has one."""
    wanted = config.train.teacher_cache
    if wanted is None:
        return None
    folder = Path(config.out) / "teacher-cache" if wanted.path == "auto" else Path(wanted.path)
    folder.mkdir(parents=True, exist_ok=True)  # what cannot be one is told before the first step
    return TeacherCache(folder, parse_bytes(wanted.max_size), writers)


def expected_bytes(stages: Sequence[tuple[int, Config]], train_step: TrainStep, device: torch.device) -> int:
    """What a whole run asks of its teachers: the steps of each stage times the bytes of one, tried on a few black samples."""
    teachers = [teacher for teacher in train_step.tapped_teachers.values() if isinstance(teacher, CachedTeacher)]
    ends = [first for first, _ in stages[1:]] + [stages[-1][1].train.steps]
    total = 0
    for (first, config), end in zip(stages, ends, strict=True):
        samples = config.method.smallest_batch
        for teacher in teachers:
            teacher.asked = 0
        _try(train_step, config, samples, device)
        total += (end - first) * config.data.batch * sum(teacher.asked for teacher in teachers) // samples
    for teacher in teachers:
        teacher.asked = 0
    return total


@torch.no_grad()
def _try(train_step: TrainStep, config: Config, count: int, device: torch.device) -> None:
    """The forward pass of a step, which leaves no trace."""
    side, channels = config.data.patch, 1 if config.data.grey else 3
    lq = torch.zeros(count, channels, side // config.scale, side // config.scale, device=device)
    batch = Batch(lq, torch.zeros(count, channels, side, side, device=device), slice(0, count))
    train_step.eval()  # a batch normalisation learns nothing from black samples
    if train_step.method.requirements().batch_coupled:
        batch.shared = train_step.method.share(batch, train_step.teachers)
    train_step(batch)
    train_step.train()


def enable(
    cache: TeacherCache, stages: Sequence[tuple[int, Config]], train_step: TrainStep, device: torch.device
) -> None:
    """From here on the teachers look their answers up.

    Raises:
        InputError: the answers of the whole run do not fit.
    """
    expected = expected_bytes(stages, train_step, device)
    if expected > cache.limit:
        raise InputError(
            f"train.teacher_cache: the teachers' answers of this run take {expected / 2**30:.2f} GiB, above max_size "
            f"{cache.limit / 2**30:.2f} GiB: raise train.teacher_cache.max_size, or leave train.teacher_cache out"
        )
    for teacher in train_step.tapped_teachers.values():
        if isinstance(teacher, CachedTeacher):
            teacher.enabled = True
