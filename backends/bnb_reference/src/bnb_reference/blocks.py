"""Cut a tensor of blocks into pieces, so that temporaries stay small whatever the size of the tensor."""

from __future__ import annotations

from typing import Iterator, Tuple

import torch


def piece_size(device: torch.device) -> int:
    """Return how many elements to work on at a time: few enough for a CPU's cache, and enough to fill a GPU (16 MB of float32)."""
    return 1 << (18 if device.type == "cpu" else 22)


def pieces(n: int, blocksize: int, limit: int) -> Iterator[Tuple[slice, slice]]:
    """Yield the elements and the blocks of each piece of `n` elements: whole blocks of equal size, or a part of one block.

    So the elements of a piece, seen as a matrix, have a row for each of its blocks.

    Args:
        n: number of elements.
        blocksize: elements in a block; the last block may be shorter.
        limit: most elements in a piece. Pieces start at multiples of it or of the blocksize.
    """
    whole = n - n % blocksize
    step = limit // blocksize * blocksize
    if step:
        for start in range(0, whole, step):
            stop = min(start + step, whole)
            yield slice(start, stop), slice(start // blocksize, stop // blocksize)
    for block in range(whole // blocksize if step else 0, -(-n // blocksize)):
        end = min((block + 1) * blocksize, n)
        for start in range(block * blocksize, end, limit):
            yield slice(start, min(start + limit, end)), slice(block, block + 1)
