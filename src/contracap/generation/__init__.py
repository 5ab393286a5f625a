"""Captioning: decoding strategies, and the captioner that runs them.

A caption goes through the files in this order:

1. `captioner` encodes the images and the prompts.
2. `decoding` prefills a cache with the prompts, then decodes one token of every text at each step.
3. A strategy chooses the tokens: `sampling`, `beam` or `legacy`. `strategy` is the interface to them.
   `constraints` forbids tokens (lengths, prompts, repetition) and `phrases` those of banned and forced phrases.
   `texts` holds the texts while they grow, and the best of those that are finished.
4. `captioner` turns the token ids into captions, and ranks them again for `reranking`.

`registry` builds a strategy from its name and settings. `word_maps` shows where the model looked for each word.
"""

from contracap.generation.beam import BeamSearch
from contracap.generation.captioner import Caption, Captioner
from contracap.generation.constraints import Rules
from contracap.generation.legacy import LegacyBeamSearch
from contracap.generation.registry import build_strategy
from contracap.generation.reranking import ContrastiveReranking
from contracap.generation.sampling import Greedy, Sampling

__all__ = [
    "BeamSearch",
    "Caption",
    "Captioner",
    "ContrastiveReranking",
    "Greedy",
    "LegacyBeamSearch",
    "Rules",
    "Sampling",
    "build_strategy",
]
