"""Weights of 8 bits for what a caption's every step reads."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from contracap.model.coca import CoCa


def int8(model: CoCa) -> None:
    """Round the weights that each decoding step reads to 8 bits, with a scale for each output: the linear layers of the
    text blocks, of the decoder's, and the vocabulary matrix.

    In place; the model can no longer be trained or saved. What is computed once for a picture stays exact: the vision
    tower, the pooler, and the keys and values of cross-attention. A picture's embedding does not change, a text's does.
    The weights take a quarter of the memory; on a CPU no less time, since torchao makes floats of them at each use.

    Raises:
        ImportError: if torchao is not installed.
        ValueError: if the model has no text decoder.

    Source: torchao, `Int8WeightOnlyConfig`.
    """
    decoder = model.require_decoder()
    try:
        with _silence():
            from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ImportError("int8 weights need torchao: pip install 'contracap[int8]'") from error
    for part in (model.text.blocks, decoder):
        quantize_(part, Int8WeightOnlyConfig(), filter_fn=_is_read_at_each_step)


@contextmanager
def _silence() -> Iterator[None]:
    """No log lines below errors: as torchao is imported it tells of GPU kernels that are not there, though none is
    needed, and torch of how torchao calls it."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


def _is_read_at_each_step(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.rpartition(".")[2] != "key_value"
