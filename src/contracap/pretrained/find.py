"""Names of weights to files: a file, a folder, a run, a repository of the hub, or a release."""

import difflib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from contracap.model.sizes import SIZES
from contracap.pretrained.errors import WeightsError

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
WEIGHT_FILES = (
    OPEN_CLIP_WEIGHTS,
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "mobileclip2_coca.pt",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pth.tar")
# Newest first, in the folder of a run, in its checkpoints, or in the quickstart's folder: our runs, and open_clip's.
CHECKPOINTS = ("last", "step-*", "epoch_latest.pt", "epoch_*.pt")
COMPLETE = r"last|step-\d+|epoch_(latest|\d+)\.pt"
RUN_FOLDERS = (".", "checkpoints", "run/checkpoints")
HUB = "hf-hub:"
RELEASED = {
    "coca_ViT-B-32/laion2b": "laion/CoCa-ViT-B-32-laion2B-s13B-b90k",
    "coca_ViT-B-32/mscoco": "laion/mscoco_finetuned_CoCa-ViT-B-32-laion2B-s13B-b90k",
    "coca_ViT-L-14/laion2b": "laion/CoCa-ViT-L-14-laion2B-s13B-b90k",
    "coca_ViT-L-14/mscoco": "laion/mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k",
    "coca_ViT-L-14/mobileclip2": "apple/mobileclip2_coca_dfn2b_s13b_context77",
    "coca_ViT-L-14/mobileclip2_mscoco": "apple/mobileclip2_coca_dfn2b_s13b_mscoco38k_s12m_context77",
    "mammut_ViT-L-14/datacomp": "laion/openMaMMUT-ViT-L-14-DataComp-1.4B-s12.8B-b180K",
    "ViT-B-32/openai": "timm/vit_base_patch32_clip_224.openai",
    "ViT-B-16/openai": "timm/vit_base_patch16_clip_224.openai",
    "ViT-L-14/openai": "timm/vit_large_patch14_clip_224.openai",
    "ViT-L-14-336/openai": "timm/vit_large_patch14_clip_336.openai",
    "ViT-B-32/laion2b": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "ViT-B-16/laion2b": "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
    "ViT-L-14/laion2b": "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
    "ViT-H-14/laion2b": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "ViT-g-14/laion2b": "laion/CLIP-ViT-g-14-laion2B-s34B-b88K",
    "ViT-bigG-14/laion2b": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "ViT-B-32/datacomp": "laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
    "ViT-B-16/datacomp": "laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K",
    "ViT-L-14/datacomp": "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K",
}
# open_clip's own tags of the same weights.
TAGS = {
    "coca_ViT-B-32/laion2b_s13b_b90k": "coca_ViT-B-32/laion2b",
    "coca_ViT-B-32/mscoco_finetuned_laion2b_s13b_b90k": "coca_ViT-B-32/mscoco",
    "coca_ViT-L-14/laion2b_s13b_b90k": "coca_ViT-L-14/laion2b",
    "coca_ViT-L-14/mscoco_finetuned_laion2b_s13b_b90k": "coca_ViT-L-14/mscoco",
    "ViT-B-32/laion2b_s34b_b79k": "ViT-B-32/laion2b",
    "ViT-B-16/laion2b_s34b_b88k": "ViT-B-16/laion2b",
    "ViT-L-14/laion2b_s32b_b82k": "ViT-L-14/laion2b",
    "ViT-H-14/laion2b_s32b_b79k": "ViT-H-14/laion2b",
    "ViT-g-14/laion2b_s34b_b88k": "ViT-g-14/laion2b",
    "ViT-bigG-14/laion2b_s39b_b160k": "ViT-bigG-14/laion2b",
    "ViT-B-32/datacomp_xl_s13b_b90k": "ViT-B-32/datacomp",
    "ViT-B-16/datacomp_xl_s13b_b90k": "ViT-B-16/datacomp",
    "ViT-L-14/datacomp_xl_s13b_b90k": "ViT-L-14/datacomp",
}

logger = logging.getLogger(__name__)


def find_weights(name: str | Path) -> Path:
    """Return the weights file that a name means. A file or folder of that name comes before a release.

    Raises: WeightsError: if there is none.
    """
    path = Path(name)
    if str(name).startswith(HUB):
        return _from_hub(str(name).removeprefix(HUB))
    if path.is_file() and str(name):
        return path
    if path.is_dir() and str(name):
        return _in_folder(path)
    if repository := RELEASED.get(TAGS.get(str(name), str(name))):
        return _from_hub(repository)
    if str(name) in SIZES:
        raise WeightsError(size_is_not_weights(str(name)))
    near = difflib.get_close_matches(str(name), RELEASED, n=1)
    raise WeightsError(
        f"no weights at {str(name)!r}: neither a file, a folder, '{HUB}organisation/name' nor a release; "
        + (f"did you mean {near[0]!r}?" if near else "`contracap weights list` shows the releases")
    )


def size_of_release(release: str) -> str:
    """Return the size of released weights: OpenAI's have another activation, and their grid may differ."""
    size, _, source = release.partition("/")
    return f"{size.removesuffix('-336')}-quickgelu" if source == "openai" else size


def size_is_not_weights(size: str) -> str:
    """Return the message for a size in the place of weights, with the releases of that size."""
    releases = [release for release in RELEASED if size_of_release(release) == size]
    choices = [*releases, "a file", "a folder", f"'{HUB}organisation/name'"]
    return f"{size} is a size, not weights: give {', '.join(choices[:-1])} or {choices[-1]}"


def is_of_hub(name: str) -> bool:
    """Return True if a name means weights of the hub."""
    return name.startswith(HUB) or (TAGS.get(name, name) in RELEASED and not Path(name).exists())


def _in_folder(folder: Path) -> Path:
    for candidate in WEIGHT_FILES:
        if (folder / candidate).is_file():
            return folder / candidate
    if checkpoint := _newest_checkpoint(folder):
        _tell(folder, checkpoint)
        return checkpoint if checkpoint.is_file() else _in_folder(checkpoint)
    others = sorted(path for path in folder.iterdir() if path.name.endswith(ENDINGS) and path.is_file())
    if len(others) == 1:
        return others[0]
    if others:
        raise WeightsError(
            f"{folder} holds {len(others)} files that may be meant: name one, such as {others[0]} or {others[1]}"
        )
    raise WeightsError(f"{folder} holds no weights; looked for {', '.join(WEIGHT_FILES)}, and the checkpoints of a run")


@cache
def _tell(folder: Path, checkpoint: Path) -> None:
    """Log the checkpoint once: the same name is looked up before a run and at its start."""
    logger.warning("%s is the folder of a run: its last checkpoint is %s", folder, checkpoint)


def _newest_checkpoint(folder: Path) -> Path | None:
    """Return the last checkpoint of a run folder, if it is one."""
    for place in RUN_FOLDERS:
        for pattern in CHECKPOINTS:
            found = [path for path in (folder / place).glob(pattern) if re.fullmatch(COMPLETE, path.name)]
            if found:
                return max(found, key=lambda path: int("0" + re.sub(r"\D", "", path.name)))
    return None


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """A context in which the hub's library logs errors only, not its attempts."""
    from huggingface_hub.utils import logging as hub_logging

    before = hub_logging.get_verbosity()  # the library sets its level when it is first used, which this call is
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)


def _from_hub(repository: str) -> Path:
    """Return the weights of a hub repository in the hub's own cache, with its configuration next to them.

    Without a connection, the cache is used as it is.
    """
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = repository.partition("@")
    name, online, unknown = f"{HUB}{repository}", True, False

    def find(file: str) -> Path | None:
        """Return the file; None if the repository does not have it, or offline nothing is known of it."""
        nonlocal online, unknown
        if online:
            try:
                with _quiet_hub():
                    return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision or None))
            except errors.LocalEntryNotFoundError:  # no connection, and not in the cache
                online = False
            except errors.EntryNotFoundError:
                return None
            except errors.HFValidationError:
                raise WeightsError(f"{name} is not the name of a repository: write {HUB}organisation/name") from None
            except errors.GatedRepoError:
                raise WeightsError(f"{name} is gated: ask for access on its page, then run `hf auth login`") from None
            except errors.RepositoryNotFoundError:
                raise WeightsError(f"{name}: no such repository; if it is private, run `hf auth login`") from None
            except errors.RevisionNotFoundError:
                raise WeightsError(f"{name} has no revision {revision!r}") from None
            except Exception as error:  # of the hub's library, of its network library, of the disk
                raise WeightsError(f"{name}: cannot fetch {file}: {' '.join(str(error).split())}") from None
        cached = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision or None)
        unknown |= cached is None
        return Path(cached) if isinstance(cached, str) else None

    find(OPEN_CLIP_CONFIG)  # next to the weights; our own files carry their configuration inside
    for candidate in WEIGHT_FILES:
        if path := find(candidate):
            return path
    if unknown:
        raise WeightsError(f"{name} is not in the cache, and the hub does not answer")
    raise WeightsError(f"{name} holds no weights; looked for {', '.join(WEIGHT_FILES)}")
