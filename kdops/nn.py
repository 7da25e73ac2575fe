"""Thin modules over the functions, for models and losses that are built from modules. Each takes the function's options."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .affinity import affinity_distance
from .channel_attention import channel_attention, channel_attention_distance
from .codebook import codebook_cross_entropy
from .contrast import contrastive_ratio, matched_distance, pairwise_distance
from .gaussian import gaussian_distance
from .nss import brisque_features, mscn, piqe
from .spatial_attention import spatial_attention


class Op(nn.Module):
    """What all have in common: they show their options when they are printed."""

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if k != "training" and not k.startswith("_"))


class PairwiseDistance(Op):
    """`kdops.pairwise_distance` as a module: (B, *F), (K, *F) -> (B, K)."""

    def __init__(self, *, p: int = 1, statistic: str = "mean", backend: str = "auto") -> None:
        super().__init__()
        self.p, self.statistic, self.backend = p, statistic, backend

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return pairwise_distance(x, y, p=self.p, statistic=self.statistic, backend=self.backend)


class MatchedDistance(Op):
    """`kdops.matched_distance` as a module: (B, *F), (B, K, *F) -> (B, K)."""

    def __init__(self, *, p: int = 1, statistic: str = "mean", backend: str = "auto") -> None:
        super().__init__()
        self.p, self.statistic, self.backend = p, statistic, backend

    def forward(self, anchor: Tensor, others: Tensor) -> Tensor:
        return matched_distance(anchor, others, p=self.p, statistic=self.statistic, backend=self.backend)


class ContrastiveRatio(Op):
    """`kdops.contrastive_ratio` as a module: anchor (B, *F), positive (B, *F), negatives (K, *F) or (B, K, *F) -> scalar or (B,)."""

    def __init__(
        self, *, p: int = 1, eps: float = 1e-7, statistic: str = "mean", reduction: str = "mean", backend: str = "auto"
    ) -> None:
        super().__init__()
        self.p, self.eps, self.statistic, self.reduction, self.backend = p, eps, statistic, reduction, backend

    def forward(self, anchor: Tensor, positive: Tensor, negatives: Tensor, mask: Tensor | None = None) -> Tensor:
        return contrastive_ratio(
            anchor,
            positive,
            negatives,
            p=self.p,
            eps=self.eps,
            statistic=self.statistic,
            mask=mask,
            reduction=self.reduction,
            backend=self.backend,
        )


class SpatialAttention(Op):
    """`kdops.spatial_attention` as a module: query (B, C, *Sq), key (B, C, *Sk), value (B, Cv, *Sk) -> (B, Cv, *Sq)."""

    def __init__(self, *, scale: float | None = None, normalize: str = "key", backend: str = "auto") -> None:
        super().__init__()
        self.scale, self.normalize, self.backend = scale, normalize, backend

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return spatial_attention(query, key, value, scale=self.scale, normalize=self.normalize, backend=self.backend)


class ChannelAttention(Op):
    """`kdops.channel_attention` as a module: query (B, Cq, *Sq), key (B, Ck, *Sk), value (B, Ck, *S) -> (B, Cq, *S)."""

    def __init__(self, *, scale: float | None = None, heads: int = 1, backend: str = "auto") -> None:
        super().__init__()
        self.scale, self.heads, self.backend = scale, heads, backend

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return channel_attention(query, key, value, scale=self.scale, heads=self.heads, backend=self.backend)


class ChannelAttentionDistance(Op):
    """`kdops.channel_attention_distance` as a module: the same and target (B, Cq, *S) -> (B,)."""

    def __init__(
        self, *, scale: float | None = None, heads: int = 1, statistic: str = "mean", backend: str = "auto"
    ) -> None:
        super().__init__()
        self.scale, self.heads, self.statistic, self.backend = scale, heads, statistic, backend

    def forward(self, query: Tensor, key: Tensor, value: Tensor, target: Tensor) -> Tensor:
        return channel_attention_distance(
            query,
            key,
            value,
            target,
            scale=self.scale,
            heads=self.heads,
            statistic=self.statistic,
            backend=self.backend,
        )


class AffinityDistance(Op):
    """`kdops.affinity_distance` as a module: student (B, Cs, *S), teacher (B, Ct, *S) -> (B,)."""

    def __init__(self, *, p: int = 1, statistic: str = "mean", eps: float = 1e-8, backend: str = "auto") -> None:
        super().__init__()
        self.p, self.statistic, self.eps, self.backend = p, statistic, eps, backend

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return affinity_distance(
            student, teacher, p=self.p, statistic=self.statistic, eps=self.eps, backend=self.backend
        )


class CodebookCrossEntropy(Op):
    """`kdops.codebook_cross_entropy` as a module: student, teacher (B, D, *S) or (M, D), codebook (K, D) -> scalar, or (B, *S) or (M,)."""

    def __init__(self, *, temperature: float = 1.0, reduction: str = "mean", backend: str = "auto") -> None:
        super().__init__()
        self.temperature, self.reduction, self.backend = temperature, reduction, backend

    def forward(self, student: Tensor, teacher: Tensor, codebook: Tensor) -> Tensor:
        return codebook_cross_entropy(
            student,
            teacher,
            codebook,
            temperature=self.temperature,
            reduction=self.reduction,
            backend=self.backend,
        )


class GaussianDistance(Op):
    """`kdops.gaussian_distance` as a module: x and y (B, *F) -> scalar or (B,), or lists of T taps -> (T,) or (T, B)."""

    def __init__(
        self,
        *,
        sigma: float | Sequence[float] | str = 1.0,
        statistic: str = "mean",
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.sigma, self.statistic, self.reduction, self.backend = sigma, statistic, reduction, backend

    def forward(self, x: Tensor | Sequence[Tensor], y: Tensor | Sequence[Tensor]) -> Tensor:
        return gaussian_distance(
            x, y, sigma=self.sigma, statistic=self.statistic, reduction=self.reduction, backend=self.backend
        )


class MSCN(Op):
    """`kdops.mscn` as a module: image (B, C, H, W) -> normalised, local_std, each (B, C, H, W)."""

    def __init__(
        self,
        *,
        window: int = 7,
        sigma: float = 7 / 6,
        c: float = 1.0,
        padding: str = "zeros",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.window, self.sigma, self.c, self.padding, self.backend = window, sigma, c, padding, backend

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return mscn(image, window=self.window, sigma=self.sigma, c=self.c, padding=self.padding, backend=self.backend)


class BrisqueFeatures(Op):
    """`kdops.brisque_features` as a module: luma (B, 1, H, W) in 0..255 -> (B, 36)."""

    def __init__(self, *, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend

    def forward(self, image: Tensor) -> Tensor:
        return brisque_features(image, backend=self.backend)


class PIQE(Op):
    """`kdops.piqe` as a module: grey (B, 1, H, W) -> score (B,) and the masks artifact, noise, activity."""

    def __init__(self, *, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return piqe(image, backend=self.backend)
