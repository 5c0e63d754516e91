"""Cutting tensors into pieces."""

import pytest
import torch
from bnb_reference import devices
from bnb_reference.blocks import pieces, row_pieces
from hypothesis import given
from hypothesis import strategies as st

LIMIT = 12


@given(n=st.integers(1, 100), blocksize=st.integers(1, 40))
def test_pieces_cover_each_element_once_and_are_matrices_of_blocks(n, blocksize):
    covered = []
    for elements, blocks in pieces(n, blocksize, LIMIT):
        numbers = range(elements.start, elements.stop)
        covered += numbers
        assert 0 < len(numbers) <= LIMIT
        rows = blocks.stop - blocks.start
        columns, rest = divmod(len(numbers), rows)
        assert rest == 0
        assert [i // blocksize for i in numbers] == [blocks.start + i // columns for i in range(len(numbers))]
        assert blocksize % 2 or elements.start % 2 == 0
    assert covered == list(range(n))


@given(rows=st.integers(1, 30), columns=st.integers(1, 30))
def test_row_pieces_cover_each_row_once(rows, columns):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "CPU_PIECE", LIMIT)
        found = [range(piece.start, piece.stop) for piece in row_pieces(rows, columns, torch.device("cpu"))]
    assert [row for piece in found for row in piece] == list(range(rows))
    assert all(len(piece) * columns <= LIMIT or len(piece) == 1 for piece in found)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_a_piece_in_float32_takes_less_than_32_megabytes(device):
    assert devices.piece_size(torch.device(device)) * 4 < 32 * 2**20
