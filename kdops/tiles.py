# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (The arguments of a kernel have types of Triton, which Python's annotations cannot say.)
"""What the Triton kernels of all ops share: reading, writing and multiplying tiles, the same on a GPU and in the interpreter.

Only the `triton.py` modules import this, and they are imported at their first call: `import kdops` works without triton.

Under TRITON_INTERPRET=1 a kernel runs on NumPy, which has no bfloat16: casts truncate, subnormals go wrong, products multiply bits.
Kernels therefore compute in float32 and go through `load`, `store` and `dot`; tests/test_tiles.py refuses the bare forms.
"""

import torch
import triton
import triton.language as tl

INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)
IEEE = tl.constexpr("ieee")  # triton 3.6 takes no plain string as a default

# Fuse multiply and add. Stated, because triton 3.10 changes the default and 3.9 warns about that where it is left open.
OPTIONS = {"enable_fp_fusion": True}


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors to share the work among; in the interpreter a few, so that tests see work that is shared."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


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
def store(pointers, values, mask):
    """Write float32 values in the dtype that the pointers have, rounded to nearest even."""
    dtype: tl.constexpr = pointers.dtype.element_ty
    if INTERPRETING and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Rounding would carry a NaN with a full mantissa into another number.
        values = tl.where(values == values, nearest, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    tl.store(pointers, values.to(dtype), mask=mask)


@triton.jit
def dot(a, b, precision: tl.constexpr = IEEE):
    """a (M, K) times b (K, N) -> (M, N) float32. `precision` is that of float32 operands: "ieee", "tf32x3" or "tf32"."""
    if INTERPRETING:
        a = widen(a)
        b = widen(b)
    return tl.dot(a, b, input_precision=precision)
