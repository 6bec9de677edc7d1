"""Decode attention in Triton: each row reads only the keys it may see; knows nothing but tensors.

Masked SDPA reads every slot to its full capacity; with rows at all positions that is twice the memory traffic or more.
The kernel is used on CUDA in half precision once `check` found that it agrees with SDPA there.
"""

import math
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None

BLOCK = 64
MIN_GROUP = 16  # the smallest tile of a tensor-core product
NO_WINDOW = 2**30
DTYPES = (torch.bfloat16, torch.float16)
HEAD_SIZES = (32, 64, 128, 256)
_checked: bool | None = None

if triton is not None:

    @triton.jit
    def _attend(
        query, key, value, out, position, scale, window,
        query_row, query_head, key_row, key_head, key_step, value_row, value_head, value_step, out_row, out_head,
        GROUP: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program per row and key/value head; scale includes log2(e), so that exp2 does the softmax."""
        row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        last = tl.load(position + row)
        first = tl.maximum(last + 1 - window, 0)
        group, dim = tl.arange(0, TILE), tl.arange(0, DIM)
        heads = head * GROUP + group
        real = (group < GROUP)[:, None]
        q = tl.load(query + row * query_row + heads[:, None] * query_head + dim[None, :], mask=real, other=0.0)
        best = tl.full([TILE], float("-inf"), tl.float32)
        total = tl.zeros([TILE], tl.float32)
        answer = tl.zeros([TILE, DIM], tl.float32)
        keys = key + row * key_row + head * key_head
        values = value + row * value_row + head * value_head
        for start in range((first // BLOCK) * BLOCK, last + 1, BLOCK):
            step = start + tl.arange(0, BLOCK)
            seen = (step <= last) & (step >= first)
            k = tl.load(keys + step[None, :] * key_step + dim[:, None], mask=seen[None, :], other=0.0)
            score = tl.where(seen[None, :], tl.dot(q, k) * scale, float("-inf"))
            top = tl.maximum(best, tl.max(score, 1))
            weight = tl.exp2(score - top[:, None])
            fade = tl.exp2(best - top)
            v = tl.load(values + step[:, None] * value_step + dim[None, :], mask=seen[:, None], other=0.0)
            answer = answer * fade[:, None] + tl.dot(weight.to(v.dtype), v)
            total = total * fade + tl.sum(weight, 1)
            best = top
        answer = answer / total[:, None]
        places = out + row * out_row + heads[:, None] * out_head + dim[None, :]
        tl.store(places, answer.to(out.dtype.element_ty), mask=real)


def attend(query: Tensor, key: Tensor, value: Tensor, position: Tensor, scaling: float, window: int | None) -> Tensor:
    """query [B, heads, 1, D] over key and value [B, kv_heads, S, D], row b seeing keys 0..position[b]; as query."""
    rows, heads, _, dim = query.shape
    group = heads // key.shape[1]
    out = torch.empty((rows, heads, 1, dim), dtype=query.dtype, device=query.device)
    _attend[(rows, key.shape[1])](
        query, key, value, out, position, scaling * math.log2(math.e), window or NO_WINDOW,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), key.stride(2),
        value.stride(0), value.stride(1), value.stride(2), out.stride(0), out.stride(1),
        GROUP=group, TILE=max(MIN_GROUP, 1 << (group - 1).bit_length()), DIM=dim, BLOCK=BLOCK,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def usable(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes these tensors; `check` must have succeeded before."""
    dim = query.shape[-1]
    return (
        _checked is True
        and query.is_cuda
        and query.dtype in DTYPES
        and dim == value.shape[-1]
        and dim in HEAD_SIZES
        and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    )


@torch.inference_mode()
def agrees(device: torch.device | str, dtype: torch.dtype, tolerance: float = 2e-2) -> bool:
    """Compare with masked SDPA on random rows at all kinds of positions, with and without a window."""
    from dflash_core.training.slots import plain_decode

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    query, key, value = random(6, 9, 1, 64), random(6, 3, 192, 64), random(6, 3, 192, 64)
    position = torch.tensor([0, 1, 63, 64, 100, 191], device=device)
    for window in (None, 50):
        expected = plain_decode(query, key, value, 0.125, position, window)
        if not torch.allclose(
            attend(query, key, value, position, 0.125, window), expected, atol=tolerance, rtol=tolerance
        ):
            return False
    return True


def check(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Decide once whether the kernel is used on this device; returns why or why not, in a few words."""
    global _checked
    if triton is None or device.type != "cuda":
        return "masked SDPA (no Triton on this device)"
    if dtype not in DTYPES or head_size not in HEAD_SIZES:
        return f"masked SDPA (no kernel for {str(dtype).removeprefix('torch.')} heads of {head_size})"
    if _checked is None:
        try:
            torch.cuda.set_device(device)
            _checked = agrees(device, dtype)
        except Exception as error:  # a compiler that is missing or broken shows itself in many types
            _checked = False
            return f"masked SDPA (the Triton kernel failed: {_first_line(error)})"
    return "Triton kernel" if _checked else "masked SDPA (the Triton kernel disagreed)"


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
