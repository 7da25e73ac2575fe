"""Pairs of images in memory: read and prepared when first asked for, kept while there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor

from trainers.data.degradations import Bicubic, Degradation
from trainers.data.folders import PairFiles, wrong_scale
from trainers.data.images import read_image
from trainers.errors import InputError

CACHE_BYTES = 1 << 30  # per process, so each loader worker may use as much


class Pairs:
    """`pairs[i]` is (lq (C, h, w), gt (C, scale * h, scale * w)), uint8 or uint16 as in their files, C = 3, or 1 if `grey`.

    The ground truth is cropped at the bottom and right to a multiple of the scale. Without an input file, lq is what the
    degradation prepares from the whole ground truth (bicubic: the downscaled image). For many large images that do not fit
    the cache, prepare a folder of inputs: downscaling costs more than reading.
    """

    def __init__(
        self,
        files: Sequence[PairFiles],
        scale: int,
        degradation: Degradation | None = None,
        *,
        grey: bool = False,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.files = list(files)
        self.scale = scale
        self.degradation = degradation or Bicubic()
        self.grey = grey
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()  # the least recently used first
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        pair = self._load(self.files[index])
        self._cache[index] = pair
        self._cached_bytes += nbytes(pair)
        while self._cached_bytes > self.cache_bytes:
            _, dropped = self._cache.popitem(last=False)
            self._cached_bytes -= nbytes(dropped)
        return pair

    def _load(self, files: PairFiles) -> tuple[Tensor, Tensor]:
        gt = read_image(files.gt, grey=self.grey)
        height, width = (side // self.scale * self.scale for side in gt.shape[1:])
        cropped = gt[:, :height, :width].contiguous()
        if files.lq is None:
            return self.degradation.prepare(cropped, self.scale), cropped
        lq = read_image(files.lq, grey=self.grey)
        problems = wrong_scale(files, gt.shape[1:], lq.shape[1:], self.scale)
        if problems:
            raise InputError(problems)
        return lq, cropped


def nbytes(pair: tuple[Tensor, Tensor]) -> int:
    lq, gt = pair
    return gt.nbytes if lq is gt else lq.nbytes + gt.nbytes
