"""Captions ranked by how well the model's own text embedding fits the picture's."""

from dataclasses import dataclass, replace
from typing import TypeVar

from contracap.generation.beam import BeamSearch
from contracap.generation.sampling import Sampling
from contracap.generation.strategy import Prompts, Search, Strategy
from contracap.tokenizer import Tokenizer


@dataclass(frozen=True)
class ContrastiveReranking:
    """Write several texts as `of` says, then rank them by the cosine between text and picture embedding.

    The search gives the texts with their own scores; the captioner embeds them, and their score becomes the cosine,
    from -1 to 1. A contrastive captioner has both embeddings, so this needs no other model.

    Attributes:
        of: what writes the texts.
    """

    of: Sampling | BeamSearch = Sampling(samples=8)

    def __post_init__(self) -> None:
        if not isinstance(self.of, Sampling | BeamSearch):
            raise ValueError(f"of must be Sampling(...) or BeamSearch(...), which write several texts, not {self.of!r}")

    @property
    def max_tokens(self) -> int:
        """Longest sequence, start and end token included."""
        return self.of.max_tokens

    @property
    def rows(self) -> int:
        """Rows a picture takes at most."""
        return self.of.rows

    def begin(self, prompts: Prompts, tokenizer: Tokenizer) -> Search:
        """The state before the first step."""
        return self.of.begin(prompts, tokenizer)


Settings = TypeVar("Settings", bound=Strategy)


def shortened(strategy: Settings, most: int) -> Settings:
    """The same strategy with `max_tokens` cut to `most`.

    Raises: ValueError: if `most` is below its `min_tokens`.
    """
    if isinstance(strategy, ContrastiveReranking):
        return replace(strategy, of=shortened(strategy.of, most))
    return replace(strategy, max_tokens=min(strategy.max_tokens, most))
