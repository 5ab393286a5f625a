from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from contracap.data.shards import write_shard
from contracap.evaluation.metrics import ranking
from contracap.evaluation.metrics.ranking import find_positions
from contracap.evaluation.retrieval import compute_recall, evaluate_retrieval

from .oracles import reference
from .worlds import COLOURS, ColourModel, Largest, processor, record, sample

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def embeddings(images: int, captions: tuple[int, int], seed: int, width: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Random unit rows, texts near their images, from `captions[0]` to `captions[1]` of them an image, shuffled."""
    draw = torch.Generator().manual_seed(seed)
    counts = torch.randint(captions[0], captions[1] + 1, (images,), generator=draw)
    owner = torch.arange(images).repeat_interleave(counts)
    owner = owner[torch.randperm(len(owner), generator=draw)]
    pictures = torch.randn(images, width, generator=draw)
    texts = pictures[owner] + 1.5 * torch.randn(len(owner), width, generator=draw)
    return normalize(pictures, dim=-1), normalize(texts, dim=-1), owner


def clip_benchmark_recall(scores: Tensor, positive: Tensor, k: int) -> float:
    """What clip_benchmark computes, of queries 64 at a time."""
    oracle = reference("clip_benchmark.metrics.zeroshot_retrieval")
    found = oracle.batchify(oracle.recall_at_k, scores, positive, 64, "cpu", k=k)
    return (found > 0).float().mean().item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("seed", "side"), [(0, 16), (1, 64), (2, 1024)])
def test_recall_equals_clip_benchmark_with_several_captions_a_picture(
    monkeypatch, seed: int, side: int, device: str
) -> None:
    monkeypatch.setattr(ranking, "SIDE", side)
    images, texts, owner = embeddings(40, (5, 7), seed)
    scores = texts @ images.T
    assert all(len(row.unique()) == len(row) for row in (*scores, *scores.T))  # no ties
    positive = owner[:, None] == torch.arange(len(images))
    found = compute_recall(images.to(device), texts.to(device), owner.to(device), (1, 5, 10))
    for k in (1, 5, 10):
        to_image, to_text = clip_benchmark_recall(scores, positive, k), clip_benchmark_recall(scores.T, positive.T, k)
        assert found[f"text_to_image_recall@{k}"] == pytest.approx(to_image, abs=1e-6)
        assert found[f"image_to_text_recall@{k}"] == pytest.approx(to_text, abs=1e-6)
    assert 0.1 < found["text_to_image_recall@1"] < 0.9


def places_by_definition(scores: Tensor, right: Tensor) -> list[int]:
    """The place of each query's best right candidate; of equal scores the first candidate stands first."""
    found = []
    for row, candidates in zip(scores.tolist(), right, strict=True):
        order = sorted(range(len(row)), key=lambda candidate: (-row[candidate], candidate))
        found.append(min(order.index(int(candidate)) for candidate in candidates.nonzero()))
    return found


@pytest.mark.parametrize("seed", range(2))
def test_ties_across_tiles_go_by_the_order_of_the_data(monkeypatch, seed: int) -> None:
    monkeypatch.setattr(ranking, "SIDE", 16)
    draw = torch.Generator().manual_seed(seed)
    owner = torch.cat([torch.arange(37), torch.randint(0, 37, (60,), generator=draw)])
    owner = owner[torch.randperm(len(owner), generator=draw)]
    # of few whole numbers, so that products are exact and most scores have equals
    images, texts = (torch.randint(-1, 2, (rows, 3), generator=draw).float() for rows in (37, len(owner)))
    scores, right = texts @ images.T, owner[:, None] == torch.arange(37)
    text_ranks, image_ranks = find_positions(images, texts, owner)
    assert text_ranks.tolist() == places_by_definition(scores, right)
    assert image_ranks.tolist() == places_by_definition(scores.T, right.T)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("images", "width"), [(5, 12), (70, 37), (300, 512)])
def test_equal_embeddings_tie_wherever_they_stand(monkeypatch, images: int, width: int, device: str) -> None:
    monkeypatch.setattr(ranking, "SIDE", 128)
    picture, text = (
        normalize(torch.randn(1, width, generator=torch.Generator().manual_seed(i)), dim=-1) for i in (0, 1)
    )
    owner = torch.arange(images).repeat_interleave(3)
    pictures, texts = picture.repeat(images, 1).to(device), text.repeat(3 * images, 1).to(device)
    text_ranks, image_ranks = find_positions(pictures, texts, owner.to(device))
    assert torch.equal(text_ranks, owner)
    assert torch.equal(image_ranks, 3 * torch.arange(images))


def test_k_above_the_number_of_candidates_gets_a_plain_message() -> None:
    images, texts, owner = embeddings(4, (3, 3), 0)
    with pytest.raises(ValueError, match=r"text_to_image_recall@5 needs at least 5 images .*; there are 4"):
        compute_recall(images, texts, owner, (1, 5))
    with pytest.raises(ValueError, match=r"recall@0 needs a K from 1"):
        compute_recall(images, texts, owner, (0,))
    with pytest.raises(ValueError, match=r"recall@-1 needs a K from 1"):
        evaluate_retrieval(ColourModel(), processor(), [], ks=(1, -1))


def test_embeddings_that_cannot_be_ranked_are_refused() -> None:
    images, texts, owner = embeddings(4, (1, 1), 0)
    with pytest.raises(ValueError, match="not finite"):
        find_positions(images.index_fill(0, torch.tensor([1]), torch.nan), texts, owner)
    with pytest.raises(ValueError, match="at least one text"):
        find_positions(images, texts, owner.clamp(max=2))
    for wrong in (owner - 1, owner + 1):
        with pytest.raises(ValueError, match="needs the row of its image, and there are 4 images"):
            find_positions(images, texts, wrong)
    with pytest.raises(ValueError, match=r"each text, at least one, needs .* there are 0 images"):
        find_positions(images[:0], texts[:0], owner[:0])


def test_a_picture_with_most_of_the_texts_needs_no_more_memory_than_its_texts(monkeypatch) -> None:
    monkeypatch.setattr(ranking, "SIDE", 64)
    owner = torch.cat([torch.arange(50), torch.full((950,), 7)])
    draw = torch.Generator().manual_seed(0)
    images, texts = (torch.randint(-1, 2, (rows, 3), generator=draw).float() for rows in (50, 1000))
    with Largest() as largest:
        _, image_ranks = find_positions(images, texts, owner)
    assert largest.elements == 64 * 64  # a tile; not images x most texts, 47,550
    right = owner == torch.arange(50)[:, None]
    assert image_ranks.tolist() == places_by_definition(images @ texts.T, right)


def test_half_precision_features_and_autocast_are_ranked_in_fp32() -> None:
    images, texts, owner = embeddings(30, (2, 2), 1)
    images, texts = images.bfloat16(), texts.bfloat16()
    expected = [rank.tolist() for rank in find_positions(images.float(), texts.float(), owner)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [rank.tolist() for rank in find_positions(images, texts, owner)] == expected


def test_evaluator_ranks_the_pictures_of_shards(tmp_path) -> None:
    names = list(COLOURS)
    write_shard(tmp_path / "0.tar", [record(name, name, captions=[f"a {name} wall", f"all {name}"]) for name in names])
    model = ColourModel().train()
    result = evaluate_retrieval(model, processor(), tmp_path, batch_size=4)
    assert model.training
    assert result.values == {
        "text_to_image_recall@1": 1.0,
        "text_to_image_recall@5": 1.0,
        "image_to_text_recall@1": 1.0,
        "image_to_text_recall@5": 1.0,
        "image_to_text_recall@10": 1.0,
    }
    assert result.reasons == {
        "text_to_image_recall@10": "text_to_image_recall@10 needs at least 10 images to choose from; there are 6"
    }
    assert (result.samples, result.details["captions"]) == (6, 12)
    assert result.predictions.keys == names
    assert result.predictions.image_of_text.tolist() == [i for i in range(6) for _ in range(2)]


def test_values_of_the_pictures_have_the_figures_as_their_means() -> None:
    samples = [sample(a, a, *[f"a {b} wall" for b in [*COLOURS][: i + 1]]) for i, a in enumerate(COLOURS)]
    result = evaluate_retrieval(ColourModel(), processor(), samples)
    figures = result.values
    assert result.per_sample.keys() == figures.keys() and "text_to_image_recall@10" not in figures
    for name, found in result.per_sample.items():
        assert len(found.values) == 6
        assert sum(found.values) / 6 == pytest.approx(figures[name], abs=1e-12)
    # of one to six captions the one that names the image's colour hits; an image counts by its captions
    assert result.per_sample["text_to_image_recall@1"].values == pytest.approx([6 / 21] * 6)
    assert figures["text_to_image_recall@1"] == pytest.approx(6 / 21)


def test_batch_size_does_not_change_the_figures() -> None:
    samples = [sample(f"{a}-{b}", a, f"a {b} wall") for a, b in combinations(COLOURS, 2)]
    figures = [evaluate_retrieval(ColourModel(), processor(), samples, batch_size=n).figures for n in (1, 4, 64)]
    assert figures[0] == figures[1] == figures[2]


def test_errors_name_the_sample_or_the_shards(tmp_path) -> None:
    write_shard(tmp_path / "0.tar", [])
    with pytest.raises(ValueError, match=f"no samples to evaluate on in {tmp_path}"):
        evaluate_retrieval(ColourModel(), processor(), tmp_path)
    good, silent = sample("good", "red", "a red wall"), sample("silent", "red")
    with pytest.raises(ValueError, match=r"sample silent of shard\.tar has no caption"):
        evaluate_retrieval(ColourModel(), processor(), [good, silent])
    object.__setattr__(silent, "captions", ("a wall",))
    object.__setattr__(silent, "image", b"no picture")
    with pytest.raises(ValueError, match=r"sample silent of shard\.tar: "):
        evaluate_retrieval(ColourModel(), processor(), [good, silent])
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate_retrieval(ColourModel(), processor(), [good], batch_size=0)
