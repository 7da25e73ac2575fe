"""The definition of spatial attention, in eager torch: oracle of the tests and portable fallback.

It holds the (B, Nk, Nq) matrix of weights, which is what the kernels exist to avoid.
"""

from __future__ import annotations

from torch import Tensor


def spatial_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None, over_query: bool) -> Tensor:
    """query (B, C, *Sq), key (B, C, *Sk), value (B, Cv, *Sk) -> (B, Cv, *Sq); the softmax over Sk, or over Sq if `over_query`."""
    scale = query.shape[1] ** -0.5 if scale is None else scale
    logits = scale * key.flatten(2).transpose(1, 2) @ query.flatten(2)  # (B, Nk, Nq)
    weights = logits.softmax(dim=2 if over_query else 1)
    return (value.flatten(2) @ weights).reshape(*value.shape[:2], *query.shape[2:])
