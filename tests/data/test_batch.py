import numpy as np
import torch

from contracap.data.batch import Batch


def batch(*lengths: int) -> Batch:
    """Texts of so many tokens, each of which is as high as its text is long."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = length
    pixels = torch.tensor(lengths, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    return Batch(pixels=pixels, ids=ids, lengths=np.array(lengths), keys=[str(length) for length in lengths])


def is_whole(made: Batch, lengths: list[int]) -> bool:
    """Whether each row has the pixels, ids, length and key of its sample."""
    assert made.lengths.tolist() == made.pixels[:, 0, 0, 0].tolist() == made.ids.amax(1).tolist()
    assert made.ids.count_nonzero(1).tolist() == [int(key) for key in made.keys]
    return made.lengths.tolist() == lengths


def test_rows_keep_what_belongs_to_them_when_batches_are_joined_cut_and_split() -> None:
    joined = Batch.join([batch(2, 3), batch(5), batch(4)])
    assert is_whole(joined, [2, 3, 5, 4])
    assert is_whole(joined[1:3], [3, 5])
    first, second = joined.split(2)
    assert is_whole(first, [2, 3]) and is_whole(second, [5, 4])
