"""Ranking finished captions by how well their text embedding matches the image embedding."""

from dataclasses import dataclass

from contracap.generation.beam import BeamSearch
from contracap.generation.sampling import Sampling
from contracap.generation.strategy import DecodingState, Prompts
from contracap.tokenizer import Tokenizer


@dataclass(frozen=True)
class ContrastiveReranking:
    """Write several texts with the strategy `of`, then rank them by the cosine of text and image embedding.

    The captioner embeds the texts that the search returns. Their score becomes the cosine, from -1 to 1. A contrastive
    captioner has both embeddings, so this needs no other model.
    """

    of: Sampling | BeamSearch = Sampling(samples=8)
    """The strategy that writes the texts."""

    @property
    def max_tokens(self) -> int:
        """Longest sequence, start and end token included."""
        return self.of.max_tokens

    @property
    def num_texts(self) -> int:
        """Maximum number of texts per image."""
        return self.of.num_texts

    def begin(self, prompts: Prompts, tokenizer: Tokenizer) -> DecodingState:
        """Return the state before the first step of the strategy that writes the texts."""
        return self.of.begin(prompts, tokenizer)
