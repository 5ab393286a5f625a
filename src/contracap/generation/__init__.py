"""Captions: strategies of decoding, and the captioner that runs them."""

from contracap.generation.beam import BeamSearch
from contracap.generation.captioner import Caption, Captioner
from contracap.generation.sampling import Greedy

__all__ = ["BeamSearch", "Caption", "Captioner", "Greedy"]
