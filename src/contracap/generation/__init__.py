"""Captioning: decoding strategies, and the captioner that runs them."""

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
