"""The ways in which a product with a 4-bit weight can be worked out, and which of them take a given one."""

from __future__ import annotations

from typing import List

import torch

from bnb_cuda_jetson import _native
from bnb_cuda_jetson.calls import DTYPES

#: Dequantized panels, with torch's own product. All others are the native module's, which names them: `any`, for any shape; `one`
#: and `few`, for one row of x and for few; `wmma`, for tensor cores before sm_80; and those for many, in tiles of so many rows.
PANELS, WMMA = "panels", "wmma"
MANY_TOKENS = {"many32": 32, "many64": 64, "many128": 128}

#: The largest panel: a whole weight would double what an 8 GB board has to hold.
PANEL_BYTES = 32 << 20
#: Rows of x from which on the kernels for many rows, and panels, are thought of: below they are never the fastest.
FEWEST_MANY, FEWEST_PANELS = 5, 32


def possible(ordinal: int, dtype: int, M: int, N: int, K: int, blocksize: int, nested_blocksize: int, alignment: int) -> List[str]:
    """List the paths that take a product x W^T, and may be the fastest.

    Args:
        ordinal: the CUDA device's.
        dtype: of x, by its number.
        M: rows of x.
        N, K: rows and columns of W.
        blocksize: elements that share a scale.
        nested_blocksize: scales that share a scale; 0 where they are not quantized.
        alignment: what the address of x or of the codes, whichever is aligned less, leaves when divided by 16.
    """
    aligned = not alignment and nested_blocksize & (nested_blocksize - 1) == 0
    found: List[str] = _native.gemm_4bit_paths(ordinal, dtype, M, N, K, blocksize, nested_blocksize > 0) if aligned else ["any"]
    if M < FEWEST_MANY:
        found = [path for path in found if path not in MANY_TOKENS]
    if WMMA in found and _native.device(ordinal).compute_capability >= 80:  # where the other paths have tensor cores too
        found.remove(WMMA)
    if M >= FEWEST_PANELS and takes_panels(ordinal, dtype, K, alignment):
        found.append(PANELS)
    return found


def takes_panels(ordinal: int, dtype: int, K: int, alignment: int) -> bool:
    """Say whether a weight can be dequantized in panels; see `possible` for the arguments.

    Only for bfloat16: a float16 weight could overflow, where its scale is large, although the product does not.
    """
    bfloat16 = dtype == DTYPES[torch.bfloat16] and _native.device(ordinal).compute_capability >= 80
    return bfloat16 and K % 8 == 0 and alignment % 4 == 0


def panel_lines(lines: int, length: int) -> int:
    """Return how many of `lines` rows of W of this length are in a panel; of columns, for the product with a gradient."""
    most = PANEL_BYTES // (2 * length)
    return lines if most >= lines else most // 8 * 8
