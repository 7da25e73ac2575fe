"""`kdtrain codec`: trains the small encoder and its codebook (trainers/features/codec.py) on images alone."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

import kdops
from trainers.config import Data
from trainers.data.sets import TrainSet, open_train_set
from trainers.errors import InputError
from trainers.features.codec import CODES, LATENT, WIDTHS, Block, Codec
from trainers.files import replace_file
from trainers.progress import TrainingProgress
from trainers.randomness import seed_everything

SCALE = 2  # a training set makes inputs too; only its ground truths are used
PATCH, BATCH, RATE = 64, 8, 2e-3
LATENTS, LLOYD_ROUNDS = 16_384, 30
STEPS_BETWEEN_LINES = 100


class Decoder(nn.Module):
    """The codec's mirror image: latent -> (B, 3, H, W). It is needed for training alone."""

    def __init__(self) -> None:
        super().__init__()
        deep, *shallower = reversed(WIDTHS)
        layers: list[nn.Module] = [nn.Conv2d(LATENT, deep, 3, padding=1), nn.ReLU(), Block(deep)]
        for width in shallower:
            layers += [nn.Conv2d(deep, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.ReLU(), Block(width)]
            deep = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(deep, 3, 3, padding=1))

    def forward(self, latent: Tensor) -> Tensor:
        image: Tensor = self.layers(latent)
        return image


def train_codec(out: Path, data: Data, steps: int, seed: int, progress: TrainingProgress) -> None:
    """Trains an auto-encoder on patches of the images (mean absolute error, Adam with a cosine schedule), then its codebook by k-means.

    Afterwards the latent is scaled so that its mean squared distance to the nearest code is 1: at temperature 1 a softmax over
    -||z - e_k||^2 is then neither uniform nor one-hot (our reading).

    Raises:
        InputError: `out` exists or is no .safetensors file, there are no steps, or the images are missing or too small.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"{out}: weights of a codec are a .safetensors file: give {out.with_suffix('.safetensors')}")
    if steps < 1:
        raise InputError(f"--steps {steps}: a codec is trained for at least 1 step")
    if out.exists():
        raise InputError(f"{out} exists already: give another file name")
    out.parent.mkdir(parents=True, exist_ok=True)
    train_set = open_train_set(data.model_copy(update={"batch": BATCH}), SCALE, PATCH)
    seed_everything(seed)
    codec, decoder = Codec(), Decoder()
    codec.codebook.requires_grad_(False)
    parameters = [p for p in (*codec.parameters(), *decoder.parameters()) if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with progress:
        for step in range(steps):
            images = patches(train_set, seed, step)
            loss = l1_loss(decoder(codec(images).latent), images)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            progress.advance(step + 1)
            if (step + 1) % STEPS_BETWEEN_LINES == 0:
                progress.say(f"step {step + 1}/{steps}  mean absolute error {loss.item():.4f}")
    make_codebook(codec, train_set, seed, steps)
    replace_file(out, safetensors.torch.save(codec.state_dict()))


@torch.no_grad()
def make_codebook(codec: Codec, train_set: TrainSet, seed: int, first_step: int) -> None:
    """Codes at the means of clusters of latents, and the latent's scale."""
    latents, step = torch.empty(0, LATENT), first_step
    while len(latents) < LATENTS:
        found = codec(patches(train_set, seed, step)).latent
        latents, step = torch.cat([latents, found.movedim(1, -1).flatten(0, 2)]), step + 1
    codes = k_means(latents, CODES)
    nearest = kdops.pairwise_distance(latents, codes, p=2, statistic="sum").amin(dim=1).mean()
    scale = nearest.clamp(min=1e-12).rsqrt()
    codec.codebook.copy_(codes * scale)
    codec.to_latent.weight.mul_(scale)
    assert codec.to_latent.bias is not None
    codec.to_latent.bias.mul_(scale)


def k_means(points: Tensor, count: int) -> Tensor:
    """Lloyd's algorithm from `count` of the points, evenly spaced in their order: (N, D) -> (count, D). An empty cluster keeps its code."""
    codes = points[torch.linspace(0, len(points) - 1, count).long()]
    for _ in range(LLOYD_ROUNDS):
        assigned = kdops.pairwise_distance(points, codes, p=2, statistic="sum").argmin(dim=1)
        sums = torch.zeros_like(codes).index_add_(0, assigned, points)
        sizes = assigned.bincount(minlength=count)[:, None]
        codes = torch.where(sizes > 0, sums / sizes.clamp(min=1), codes)
    return codes


def patches(train_set: TrainSet, seed: int, step: int) -> Tensor:
    """(BATCH, 3, PATCH, PATCH)."""
    return train_set.samples(seed, step, range(BATCH))[1]
