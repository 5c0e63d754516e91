"""Cut tensors into pieces, so that temporaries stay small whatever the size of the tensor."""

from __future__ import annotations

from typing import Iterator, Tuple

import torch

from bnb_reference.devices import piece_size


def pieces(n: int, blocksize: int, limit: int) -> Iterator[Tuple[slice, slice]]:
    """Yield the elements and the blocks of each piece of `n` elements: whole blocks of one size, or a part of one block.

    So a piece's elements make a matrix with a row for each of its blocks. With an even blocksize all pieces start at an even
    element.

    Args:
        n: number of elements.
        blocksize: elements in a block; the last block may be shorter.
        limit: most elements in a piece; even.
    """
    whole = n - n % blocksize if blocksize <= limit else 0
    step = max(limit - limit % blocksize, blocksize)
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        yield slice(start, stop), slice(start // blocksize, stop // blocksize)
    for block_start in range(whole, n, blocksize):  # the shorter block at the end, or blocks larger than a piece
        block = block_start // blocksize
        block_stop = min(block_start + blocksize, n)
        for start in range(block_start, block_stop, limit):
            yield slice(start, min(start + limit, block_stop)), slice(block, block + 1)


def row_pieces(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Yield the rows of each piece of a matrix: as many as fit, but one at least."""
    step = max(1, piece_size(device) // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
