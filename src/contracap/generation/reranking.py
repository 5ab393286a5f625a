"""Captions ranked by how well the model's own text embedding fits the image's, once they are written."""

from dataclasses import dataclass

from contracap.generation.beam import BeamSearch
from contracap.generation.sampling import Sampling
from contracap.generation.strategy import SearchStrategy, Strategy


@dataclass(frozen=True)
class ContrastiveReranking:
    """Write several texts as `of` says, then rank them by the cosine between text and image embedding.

    The search gives the texts with their own scores; the captioner embeds them, and their score becomes the cosine,
    from -1 to 1. A contrastive captioner has both embeddings, so this needs no other model.
    """

    of: Sampling | BeamSearch = Sampling(samples=8)
    """The strategy that writes the texts."""

    @property
    def max_tokens(self) -> int:
        """Longest sequence, start and end token included."""
        return self.of.max_tokens

    @property
    def rows(self) -> int:
        """Rows an image takes at most."""
        return self.of.rows


def split(strategy: Strategy) -> tuple[SearchStrategy, bool]:
    """Return what writes the texts, and whether they are ranked again once they are written."""
    if isinstance(strategy, ContrastiveReranking):
        return strategy.of, True
    assert isinstance(strategy, SearchStrategy)  # there is no other kind
    return strategy, False
