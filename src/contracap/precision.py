"""Names of number formats. Imports no torch, because the command line makes flags of these."""

from typing import Literal

Precision = Literal["auto", "fp32", "bf16", "fp16"]
"""Number format that a model computes in; `auto` depends on the device."""

EmbeddingDType = Literal["float32", "float16"]
"""Number format of stored embeddings."""
