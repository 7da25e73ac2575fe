"""kdops: fused, memory-linear autograd ops for knowledge distillation in image restoration.

Importing never needs a GPU, triton or a compiler. What runs where is said by `info()` and, per call, by `explain()`.
"""

from importlib.metadata import PackageNotFoundError, version

from . import nn
from .affinity import affinity_distance
from .channel_attention import channel_attention, channel_attention_distance
from .codebook import codebook_cross_entropy
from .contrast import contrastive_ratio, matched_distance, pairwise_distance
from .dispatch import backend, explain, info
from .gaussian import gaussian_distance
from .nss import brisque_features, mscn, piqe
from .spatial_attention import spatial_attention

try:
    __version__ = version("kdops")
except PackageNotFoundError:  # used from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "__version__",
    "affinity_distance",
    "backend",
    "brisque_features",
    "channel_attention",
    "channel_attention_distance",
    "codebook_cross_entropy",
    "contrastive_ratio",
    "explain",
    "gaussian_distance",
    "info",
    "matched_distance",
    "mscn",
    "nn",
    "pairwise_distance",
    "piqe",
    "spatial_attention",
]
