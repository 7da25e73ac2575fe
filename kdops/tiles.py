# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (The arguments of a kernel have types of Triton, which Python's annotations cannot say.)
"""What the Triton kernels of all ops share: reading, writing and multiplying tiles, the same on a GPU and in the interpreter.

Only the `triton.py` modules import this, and they are imported at their first call: `import kdops` works without triton.

Under TRITON_INTERPRET=1 a kernel runs on NumPy, which has no bfloat16: casts truncate, subnormals go wrong, products multiply bits.
Kernels therefore compute in float32 and go through `load`, `store` and `dot`; tests/test_tiles.py refuses the bare forms.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver

INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)
IEEE = tl.constexpr("ieee")  # triton 3.6 takes no plain string as a default

# Fuse multiply and add. Stated, because triton 3.10 changes the default and 3.9 warns about that where it is left open.
OPTIONS = {"enable_fp_fusion": True}


def cdiv(value: int, by: int) -> int:
    """value / by, rounded up. That of Triton works in kernels too, and takes 1.4 us a call."""
    return -(-value // by)


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is not below a value of at least 1."""
    return 1 << (value - 1).bit_length()


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors to share the work among; in the interpreter a few, so that tests see work that is shared."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def architecture() -> str:
    """What kernels are compiled for now: "cuda:90", "hip:gfx942", or "interpreter". Tables of tile sizes are chosen by it."""
    if INTERPRETING.value:
        return "interpreter"
    return _architecture(driver.active, driver.active.get_current_device())


@cache
def _architecture(active: Any, device: int) -> str:
    target = active.get_current_target()
    return f"{target.backend}:{target.arch}"


def precision() -> str:
    """How float32 tiles are multiplied: on NVIDIA's tensor cores in three products of 11 bits, about as exact as one of 24."""
    return "tf32x3" if architecture().startswith("cuda") else "ieee"


SHORTEST_CHUNK = 256  # positions
LONGEST_CHUNK = 4096  # bounds the rounding error of one sum
WAVES = 4  # programs for each multiprocessor, where chunks can be cut so short


def chunks(positions: int, programs: int, device: torch.device, resident: int = 0) -> int:
    """Into how many chunks a sum over positions is cut, where each chunk is the work of so many programs.

    With `resident`, as many as that many programs for each multiprocessor allow: all of them start at once.
    """
    slots = multiprocessors(device)
    wanted = slots * resident // programs if resident else cdiv(slots * WAVES, programs)
    fewest, most = cdiv(positions, LONGEST_CHUNK), cdiv(positions, SHORTEST_CHUNK)
    return max(fewest, min(most, wanted))


@triton.jit
def start(EARLY: tl.constexpr):
    """What a kernel that is launched with `early()` does first: wait for the launch before it, and let the one behind it start.

    It returns when all that the launch before has written can be read. Programs of the next launch are set up meanwhile, and wait here.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def early() -> dict[str, bool]:
    """Options of a kernel of several short ones in a row, which begins with `start`: from sm_90 on there is nearly no gap before it."""
    kind, _, number = architecture().partition(":")
    return {"EARLY": True, "launch_pdl": True} if kind == "cuda" and int(number) >= 90 else {"EARLY": False}


@triton.jit
def widen(values):
    """Values of any supported dtype as float32, exactly."""
    if INTERPRETING and values.dtype == tl.bfloat16:  # bfloat16 is the upper half of a float32
        wide = (values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = values.to(tl.float32)
    return wide


@triton.jit
def load(pointers, mask):
    """The values as float32, 0 where the mask is False."""
    return widen(tl.load(pointers, mask=mask, other=0.0))


@triton.jit
def narrow(values, dtype: tl.constexpr):
    """float32 values in another dtype, rounded to nearest even."""
    if INTERPRETING and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Rounding would carry a NaN with a full mantissa into another number.
        values = tl.where(values == values, nearest, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return values.to(dtype)


@triton.jit
def store(pointers, values, mask):
    """Write float32 values in the dtype that the pointers have, rounded to nearest even."""
    tl.store(pointers, narrow(values, pointers.dtype.element_ty), mask=mask)


@triton.jit
def arrive(counter, count):
    """Whether this program is the last of `count` to arrive at an int32 counter that was 0 before the launch.

    The last one sees what the others stored before they arrived, if it loads that past the cache of its multiprocessor (".cg").
    """
    tl.debug_barrier()  # one thread arrives for all threads of the program
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1


@triton.jit
def dot(a, b, precision: tl.constexpr = IEEE):
    """a (M, K) times b (K, N) -> (M, N) float32. `precision` is that of float32 operands: "ieee", "tf32x3" or "tf32"."""
    if INTERPRETING:
        a = widen(a)
        b = widen(b)
    return tl.dot(a, b, input_precision=precision)


@triton.jit
def fma(a, b, c):
    """a * b + c of float32, the product not rounded. Triton 3.8's interpreter would round it: in float64 it does not."""
    if INTERPRETING:
        a = a.to(tl.float64)
        c = c.to(tl.float64)
    return tl.fma(a, b, c).to(tl.float32)


@triton.jit
def dot_double(a, b):
    """a (M, K) times b (K, N), both float64 -> (M, N) float64: on tensor cores too, at half to a 64th of the speed of float32."""
    return tl.dot(a, b, out_dtype=tl.float64)


# --- feature maps, in two parts of their channels --------------------------------------------------------------------------------
#
# A tile's sides are powers of two. Channels are split into two of them (180 = 128 + 64), which costs fewer registers and less shared
# memory than the next power of two. A kernel holds the tile as a pair; the second is unused where one power of two is enough.


class Features(NamedTuple):
    """A map (B, C, *S) as kernels take it, whatever its strides."""

    data: Tensor
    batch_stride: int
    channel_stride: int
    position_stride: int
    positions: int


def features(t: Tensor) -> Features:
    """(B, C, *S), read where it lies if its positions are a fixed stride apart (contiguous, channels_last, expanded), else copied."""
    t = t.flatten(2)
    batch, channel, position = t.stride()
    return Features(t, batch, channel, position, t.shape[2])


@cache
def parts(channels: int) -> tuple[int, int]:
    """The two powers of two that hold so many channels, each at least 16 (what a product takes), or one and 0."""
    whole = max(16, next_power_of_2(channels))
    first = whole // 2
    second = max(16, next_power_of_2(channels - first))
    return (first, second) if second < first else (whole, 0)


@triton.jit
def place(rows, width, SLICES: tl.constexpr):
    """What this program works on: the sample, the first of `width` positions of the map `rows`, and which slice of the channels.

    Positions vary fastest: programs that run together stream the same tensors.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(rows.positions, width)
    return program // (blocks * SLICES), program % blocks * width, program // blocks % SLICES


@triton.jit
def _pointers(features, batch, n, c):
    # 64-bit offsets
    row = n.to(tl.int64) * features.position_stride
    column = c.to(tl.int64) * features.channel_stride
    return features.data + batch * features.batch_stride + row[:, None] + column[None, :]


@triton.jit
def _load_part(features, batch, n, c, inside, C: tl.constexpr, WHOLE: tl.constexpr):
    pointers = _pointers(features, batch, n, c)
    if inside is None and WHOLE:
        values = tl.load(pointers)
    elif inside is None:
        values = tl.load(pointers, mask=(c < C)[None, :], other=0.0)
    elif WHOLE:
        values = tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        values = tl.load(pointers, mask=inside[:, None] & (c < C)[None, :], other=0.0)
    return values


@triton.jit
def load_features(features, batch, n, inside, first, C: tl.constexpr, PARTS: tl.constexpr):
    """Positions n of one sample, channels from `first` on: tiles (n, PARTS[0]) and (n, PARTS[1]) in the map's dtype.

    `inside` (n,) says which positions there are, or is None where all are. Channels from C on are 0.
    """
    c = first + tl.arange(0, PARTS[0])
    WHOLE: tl.constexpr = C % PARTS[0] == 0 if PARTS[1] == 0 else True
    one = _load_part(features, batch, n, c, inside, C, WHOLE)
    two = one
    if PARTS[1] > 0:
        c = first + PARTS[0] + tl.arange(0, PARTS[1])
        two = _load_part(features, batch, n, c, inside, C, PARTS[0] + PARTS[1] == C)
    return one, two


@triton.jit
def store_features(features, tile, batch, n, first, C: tl.constexpr, PARTS: tl.constexpr):
    """Write the tile's positions and channels that there are."""
    inside = (n < features.positions)[:, None]
    c = first + tl.arange(0, PARTS[0])
    store(_pointers(features, batch, n, c), tile[0], inside & (c < C)[None, :])
    if PARTS[1] > 0:
        c = first + PARTS[0] + tl.arange(0, PARTS[1])
        store(_pointers(features, batch, n, c), tile[1], inside & (c < C)[None, :])


@triton.jit
def zero_features(ROWS: tl.constexpr, PARTS: tl.constexpr):
    """An accumulator for `add_product`."""
    one = tl.full((ROWS, PARTS[0]), 0.0, tl.float32)  # triton 3.6 takes no element of a tuple in the shape of tl.zeros
    two = one
    if PARTS[1] > 0:
        two = tl.full((ROWS, PARTS[1]), 0.0, tl.float32)
    return one, two


@triton.jit
def scale_features(sums, factors, PARTS: tl.constexpr):
    """The accumulator with every row times its factor."""
    one = sums[0] * factors[:, None]
    two = one
    if PARTS[1] > 0:
        two = sums[1] * factors[:, None]
    return one, two


@triton.jit
def similarities(a, b, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """Sum over the channels: tiles (M, channels) and (N, channels) -> (M, N)."""
    product = dot(a[0], tl.trans(b[0]), PRECISION)
    if PARTS[1] > 0:
        product += dot(a[1], tl.trans(b[1]), PRECISION)
    return product


@triton.jit
def products(
    a,
    a_batch,
    m,
    m_inside,
    a_tile,
    b,
    b_batch,
    n,
    n_inside,
    b_tile,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`similarities` of positions m of one map and n of another: of their tiles, if PARTS hold all C channels.

    Otherwise so many channels at a time pass through: float32 operands take registers in proportion to the channels on chip, three
    times over for "tf32x3". The tiles then are not read, and the compiler drops their loads.
    """
    if PARTS[0] + PARTS[1] < C:
        product = tl.zeros((m.shape[0], n.shape[0]), tl.float32)
        for first in tl.range(0, C, PARTS[0] + PARTS[1]):
            one = load_features(a, a_batch, m, m_inside, first, C, PARTS)
            two = load_features(b, b_batch, n, n_inside, first, C, PARTS)
            product += similarities(one, two, PARTS, PRECISION)
    else:
        product = similarities(a_tile, b_tile, PARTS, PRECISION)
    return product


@triton.jit
def add_product(sums, weights, tile, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """sums (M, channels) + weights (M, N) times the tile (N, channels); the weights are rounded to the tile's dtype."""
    weights = narrow(weights, tile[0].dtype)
    one = sums[0] + dot(weights, tile[0], PRECISION)
    two = one
    if PARTS[1] > 0:
        two = sums[1] + dot(weights, tile[1], PRECISION)
    return one, two
