import numpy as np
import torch

from contracap.model.packing import GRID, ROWS, Packed, pack, pack_shared_prefixes

CPU = torch.device("cpu")


def packed(*lengths: int) -> Packed:
    return pack(np.array(lengths), np.array(lengths), device=CPU)


def test_padded_rows_come_back() -> None:
    layout = packed(3, 0, 5, 1)
    rows = torch.arange(20.0).reshape(-1, 1)[: len(layout.cells)]
    grid = layout.pad(rows)
    assert grid.shape == (4, 5, 1)
    assert [grid[text, :length, 0].tolist() for text, length in enumerate(layout.lengths)] == [
        [0, 1, 2],
        [],
        [3, 4, 5, 6, 7],
        [8],
    ]
    assert layout.last_rows[[0, 2, 3]].tolist() == [2, 7, 8]
    assert torch.equal(layout.unpad(grid), rows)
    assert GRID.unpad(GRID.pad(grid)) is grid


def test_padding_repeats_a_texts_last_row_and_passes_no_gradient() -> None:
    layout = packed(40, *[3] * 20)
    rows = torch.randn(len(layout.cells), 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    grid = layout.pad(rows)
    assert grid[:, :, 0].numel() > len(rows)
    assert torch.equal(grid[20, 3:], grid[20, 2].expand(37, -1))
    layout.unpad(grid).sum().backward()
    assert torch.equal(rows.grad, torch.ones_like(rows))


def test_rows_come_in_multiples_and_never_exceed_the_grid() -> None:
    many = packed(40, *[3] * 20)
    assert len(set(many.cells.tolist())) == len(many.cells) == 2 * ROWS
    assert len(packed(7, 3).cells) == 14


def test_ids_are_cut_or_padded_to_the_grid() -> None:
    layout = packed(1, 3)
    expected = [[5, 0, 0], [5, 6, 7]]
    assert layout.fit(torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]]), padding=0).tolist() == expected
    assert layout.fit(torch.tensor([[5, 6], [5, 6]]), padding=-1).tolist() == [[5, -1, -1], [5, 6, -1]]


def test_common_beginnings_have_their_rows_once() -> None:
    ids = np.array([[1, 2, 3, 9, 0], [1, 2, 9, 0, 0], [4, 2, 3, 9, 0], [1, 2, 3, 9, 7], [1, 2, 3, 5, 9]])
    tokens = np.array([4, 3, 4, 4, 5])
    layout = pack_shared_prefixes(ids, tokens, tokens + 1, device=CPU)
    assert layout.columns == 6
    rows = layout.unpad(torch.arange(5.0 * 6).view(5, 6, 1))
    assert torch.equal(rows, layout.unpad(layout.pad(rows)))
    grid = layout.sources.view(5, 6)
    for first, second, alike in ((0, 1, 2), (0, 3, 4), (0, 4, 3), (0, 2, 0), (1, 4, 2), (3, 4, 3)):
        both = grid[first] == grid[second]
        assert both.tolist() == [True] * alike + [False] * (6 - alike), (first, second)
    # 1 2 3 9, 9 of the second, 4 2 3 9 of the third, 5 9 of the last, and one more of each text
    assert len(set(layout.sources.tolist())) == 4 + 1 + 4 + 2 + 5
    assert layout.last_rows.tolist() == [grid[text, length] for text, length in enumerate(tokens)]
    assert len(layout.cells) == 5 * 6  # never more than the grid


def test_shared_rows_come_in_multiples() -> None:
    ids = np.arange(40)[:, None] // np.array([40, 10, 1])
    layout = pack_shared_prefixes(ids, np.full(40, 3), np.full(40, 3), device=CPU)
    assert len(set(layout.sources.tolist())) == 1 + 4 + 40
    assert len(layout.cells) == ROWS
