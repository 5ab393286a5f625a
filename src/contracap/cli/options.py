"""Arguments that several commands take, and the checks of their values."""

import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import FlagCreatePairsOff

from contracap.cli.flags import Flags, PathText, arg
from contracap.cli.messages import message
from contracap.config import require_count
from contracap.files import try_place
from contracap.precision import Precision

if TYPE_CHECKING:
    from contracap.model.coca import CoCa
    from contracap.processor import Processor

MAX_BATCH = 2**16
MAX_WORKERS = 1024

WeightsName = Annotated[
    PathText,
    arg(
        metavar="WEIGHTS",
        help="A run or its checkpoint, a file, a folder, an hf-hub: name, or a release such as coca_ViT-L-14/mscoco.",
    ),
]
AllowCommands = Annotated[
    FlagCreatePairsOff[bool], arg(help="Run the commands of sources that begin with pipe:, with all your permissions.")
]
Size = Annotated[str | None, arg(metavar="NAME", help="The model's size, if the weights do not tell.")]
ResultFile = Annotated[Path | None, arg(metavar="OUT", help="File for the result.")]
StrategyName = Annotated[
    str, arg(metavar="NAME", help="Decoding strategy for captions: greedy, beam, sample, legacy or rerank.")
]
Settings = Annotated[
    tuple[str, ...],
    arg(
        name="set",
        metavar="[KEY=VALUE ...]",
        help="Settings of the strategy, such as width=3 length_penalty=0; `WEIGHTS --set help` lists them.",
    ),
]
Workers = Annotated[int | None, arg(metavar="N", help="Processes; the default is one for each core.")]


def worker_count(wanted: int | None) -> int:
    """Return the number of processes, by default one for each core.

    Raises: ValueError: if there are too many.
    """
    if wanted is None:
        return os.cpu_count() or 1
    require_count("--workers", wanted, 0, "processes", most=MAX_WORKERS)
    return wanted


def check_batch_size(wanted: int) -> None:
    """Raises: ValueError: if it is below 1, or too large for any memory."""
    require_count("--batch-size", wanted, 1, "images at a time", most=MAX_BATCH)


def check_outputs(inputs: Iterable[str | Path | None], **outputs: Path | None) -> None:
    """Check the paths of output files, which may be written hours later; their keywords are the names of the options.

    Neither may an output replace an image, a shard or weights: an input may be their folder, or a pattern.

    Args:
        inputs: paths, or names such as those of weights.

    Raises: ValueError: naming the option, if its file would replace one of these, an input or another output, or cannot
        be written.
    """
    taken = {os.path.realpath(path) for path in inputs if path is not None}
    for option, path in outputs.items():
        if path is None:
            continue
        try:
            if os.path.realpath(path) in taken or _holds_data(path):
                raise ValueError(f"--{option} {path} would take the place of another file: name one of its own")
            try_place(path)
        except OSError as error:
            raise ValueError(f"--{option} {path} cannot be written: {message(error)}") from None
        taken.add(os.path.realpath(path))


def _holds_data(path: Path) -> bool:
    """Return True if there is an image, a tar shard or weights at `path`, by its name or its first bytes."""
    from contracap.data.image_finder import is_image
    from contracap.data.tar import SHARD_SUFFIXES, is_tar
    from contracap.pretrained.find import ENDINGS, OPEN_CLIP_CONFIG

    if not path.is_file():
        return False
    name = os.path.basename(os.path.realpath(path))
    return name.endswith((*SHARD_SUFFIXES, *ENDINGS, OPEN_CLIP_CONFIG)) or is_image(path) or is_tar(str(path))


def keep_few_kernels() -> None:
    """Limit oneDNN's cache of kernels; call it before torch is imported.

    For a server, whose batches have all sizes, the default of 1024 kernels takes hundreds of megabytes.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def command_line() -> str:
    """Return the command line as it was typed."""
    return shlex.join(["contracap", *sys.argv[1:]])


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """How a command loads its model."""

    device: Annotated[str, "NAME"] = "auto"
    """Where the model computes: cpu, cuda or cuda:1; auto is the GPU if there is one."""
    precision: Precision = "auto"
    """Number format that the model computes in; auto is bf16 or fp16 on a GPU, fp32 on a CPU."""
    size: Annotated[str | None, "NAME"] = None
    """The model's size, if the weights do not tell."""

    def load(self, weights: str) -> "tuple[CoCa, Processor]":
        """Load a model.

        Raises: WeightsError, ValueError: as `contracap.load` does.
        """
        from contracap.pretrained import load

        return load(weights, size=self.size, device=self.device, precision=self.precision)


Model = Annotated[ModelFlags, Flags]
