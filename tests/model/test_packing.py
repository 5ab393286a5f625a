import torch
from contracap.model.layout import GRID, ROWS, pack, share


def test_rows_spread_over_the_grid_come_back() -> None:
    lengths = torch.tensor([3, 0, 5, 1])
    layout = pack(lengths, device=torch.device("cpu"))
    rows = torch.arange(20.0).reshape(-1, 1)[: len(layout.cells)]
    grid = layout.spread(rows)
    assert grid.shape == (4, 5, 1)
    assert [grid[text, :length, 0].tolist() for text, length in enumerate(lengths)] == [
        [0, 1, 2],
        [],
        [3, 4, 5, 6, 7],
        [8],
    ]
    assert layout.ends[[0, 2, 3]].tolist() == [2, 7, 8]
    assert torch.equal(layout.collect(grid), rows)
    assert GRID.collect(GRID.spread(grid)) is grid


def test_an_empty_cell_repeats_its_texts_last_row_and_passes_no_gradient() -> None:
    layout = pack(torch.tensor([40, *[3] * 20]), device=torch.device("cpu"))
    rows = torch.randn(len(layout.cells), 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    grid = layout.spread(rows)
    assert grid[:, :, 0].numel() > len(rows)
    assert torch.equal(grid[20, 3:], grid[20, 2].expand(37, -1))
    layout.collect(grid).sum().backward()
    assert torch.equal(rows.grad, torch.ones_like(rows))


def test_packed_rows_are_filled_up_to_a_multiple_and_never_exceed_the_grid() -> None:
    many = pack(torch.tensor([40, *[3] * 20]), device=torch.device("cpu"))
    assert len(many.cells) == 2 * ROWS
    assert len(set(many.cells.tolist())) == 2 * ROWS
    assert len(pack(torch.tensor([7, 3]), device=torch.device("cpu")).cells) == 14


def test_texts_are_cut_or_filled_to_the_grid() -> None:
    layout = pack(torch.tensor([1, 3]), device=torch.device("cpu"))
    expected = [[5, 0, 0], [5, 6, 7]]
    assert layout.fit(torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]]), fill=0).tolist() == expected
    assert layout.fit(torch.tensor([[5, 6], [5, 6]]), fill=-1).tolist() == [[5, -1, -1], [5, 6, -1]]


def test_common_beginnings_have_their_rows_once() -> None:
    ids = torch.tensor([[1, 2, 3, 9, 0], [1, 2, 9, 0, 0], [4, 2, 3, 9, 0], [1, 2, 3, 9, 7], [1, 2, 3, 5, 9]])
    shared = torch.tensor([4, 3, 4, 4, 5])
    layout = share(ids, shared, shared + 1, device=torch.device("cpu"))
    assert layout.columns == 6
    rows = layout.collect(torch.arange(5.0 * 6).view(5, 6, 1))
    assert torch.equal(rows, layout.collect(layout.spread(rows)))
    grid = layout.sources.view(5, 6)
    for first, second, alike in ((0, 1, 2), (0, 3, 4), (0, 4, 3), (0, 2, 0), (1, 4, 2), (3, 4, 3)):
        both = grid[first] == grid[second]
        assert both.tolist() == [True] * alike + [False] * (6 - alike), (first, second)
    # 1 2 3 9, 9 of the second, 4 2 3 9 of the third, 5 9 of the last, and one more of each text
    assert len(set(layout.sources.tolist())) == 4 + 1 + 4 + 2 + 5
    assert layout.ends.tolist() == [grid[text, length] for text, length in enumerate(shared)]
    assert len(layout.cells) == 5 * 6  # never more than the grid


def test_shared_rows_are_filled_up_to_a_multiple() -> None:
    ids = torch.arange(40)[:, None] // torch.tensor([40, 10, 1])
    layout = share(ids, torch.full((40,), 3), torch.full((40,), 3), device=torch.device("cpu"))
    assert len(set(layout.sources.tolist())) == 1 + 4 + 40
    assert len(layout.cells) == ROWS
