"""Speed of captioning, next to open_clip with the same weights, images and number of tokens."""

import copy
import operator
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from benchmarks.captioners import (
    MAX_TOKENS,
    open_clip_captions,
    random_captioner,
    require_equal_beams,
    require_equal_greedy,
)
from benchmarks.harness import Benchmark, Row, Run, UnequalError, Work, compare
from benchmarks.open_clip_captions import BEAMS, Way
from benchmarks.peers import MissingPeerError
from benchmarks.stand_in import IMAGE_SIZE, draw_images
from contracap.apps.bulk.caption_images import caption_images
from contracap.apps.bulk.inputs import find_items
from contracap.apps.bulk.outputs import one_line
from contracap.apps.bulk.rows import caption_rows
from contracap.apps.bulk.side_cars import SideCars
from contracap.generation import BeamSearch, Caption, Captioner, Greedy, LegacyBeamSearch
from contracap.generation.strategy import Strategy
from contracap.pretrained import load
from contracap.pretrained.devices import Precision, place

B_32, L_14, SMALL = "coca_ViT-B-32", "coca_ViT-L-14", "flickr8k"
# All with an end token only in the last place, so that both sides take the same number of steps.
BEAM = BeamSearch(width=BEAMS, max_tokens=MAX_TOKENS, min_tokens=MAX_TOKENS - 1)
LEGACY = LegacyBeamSearch(year=2024, max_tokens=MAX_TOKENS, min_tokens=MAX_TOKENS - 1)
GREEDY = Greedy(max_tokens=MAX_TOKENS, min_tokens=MAX_TOKENS - 1)
IMAGES = 500  # of the folder
SMALL_IMAGES = 4  # in a run that is small
BATCH, WORKERS = 16, 8  # images at a time, and threads that decode


def caption_row(
    run: Run,
    *,
    size: str,
    images: int,
    name: str,
    ours: Strategy,
    peer: Way | None = "groups",
    precision: Precision = "fp32",
) -> Row:
    """Captions of some images at a time, next to open_clip's in fp32. In fp32 both sides write the same captions.
    `peer`: None if only ours is timed."""
    size, images = run.size(size), run.count(images, small=min(images, SMALL_IMAGES))
    captioner, pixels = random_captioner(size, run, images=images)
    with ExitStack() as stack:

        def checked_peer() -> tuple[Work, str]:
            if peer is None:
                raise MissingPeerError("only ours is timed")
            theirs = open_clip_captions(captioner, pixels, stack)
            note = (require_equal_greedy if peer == "top_k" else require_equal_beams)(captioner, pixels, theirs)
            work = partial(theirs, peer, ours.max_tokens, ours.max_tokens - 1)
            if (lengths := {len(ids) for best in work() for ids in best}) != {ours.max_tokens}:
                raise UnequalError(f"open_clip's captions have {sorted(lengths)} ids, not {ours.max_tokens} each")
            versions = ", ".join(f"{package} {version}" for package, version in theirs.versions.items())
            tokens = f"both write {ours.max_tokens - 1} tokens a caption"
            return work, f"{note}{'' if precision == 'fp32' else ' in fp32'}; {tokens}; {versions}"

        copied = place(copy.deepcopy(captioner.model), device=run.device, precision=precision)
        return compare(
            f"{size}, {name}, {images} image{'s' if images > 1 else ''}",
            run=run,
            ours=partial(Captioner(copied, captioner.processor).generate, pixels, ours),
            checked_peer=checked_peer,
            items=images,
            unit="captions/s",
        )


def compiled_row(run: Run, *, size: str, images: int, name: str, ours: Strategy) -> Row:
    """Captions by compiled steps, on a GPU as CUDA graphs, next to ours by eager ones; on a GPU both in bf16.

    Raises:
        UnequalError: if less than half of the captions are equal. In bf16 some differ, because roundings do.
    """
    size, images = run.size(size), run.count(images, small=min(images, SMALL_IMAGES))
    captioner, pixels = random_captioner(size, run, images=images)
    precision: Precision = "bf16" if run.device.type == "cuda" else "fp32"
    model = place(copy.deepcopy(captioner.model), device=run.device, precision=precision)
    eager, compiled = (Captioner(model, captioner.processor, compiled=compiled) for compiled in (False, True))

    def checked_peer() -> tuple[Work, str]:
        both = [[caption.token_ids for caption in each.generate(pixels, ours)] for each in (eager, compiled)]
        equal = sum(map(operator.eq, *both))
        if equal < images / 2:
            raise UnequalError(f"only {equal} of {images} captions by compiled steps are those by eager ones")
        return partial(eager.generate, pixels, ours), f"the peer is ours, eager; {equal} of {images} captions are equal"

    return compare(
        f"{size}, {name}, {precision}, compiled, {images} image{'s' if images > 1 else ''}",
        run=run,
        ours=partial(compiled.generate, pixels, ours),
        checked_peer=checked_peer,
        items=images,
        unit="captions/s",
    )


def folder_row(run: Run) -> Row:
    """A folder of JPEG files captioned into side-cars, next to the same images captioned as tensors in memory. The
    ratio is the share of the speed that reading, decoding and writing leave."""
    captioner = Captioner(*load(SMALL, weights="random", seed=run.seed, device=str(run.device), precision="fp32"))
    with TemporaryDirectory() as name:
        folder = Path(name)
        tensors = captioner.processor.images(write_images(folder, seed=run.seed))

        def checked_peer() -> tuple[Work, str]:
            caption_folder(captioner, folder)
            require_same_captions(folder, caption_tensors(captioner, tensors))
            return partial(caption_tensors, captioner, tensors), "the peer is ours, too; the same captions"

        return compare(
            f"{SMALL}, folder of {IMAGES} images of {IMAGE_SIZE[0]}x{IMAGE_SIZE[1]} compared with tensors in memory",
            run=run,
            ours=partial(caption_folder, captioner, folder),
            checked_peer=checked_peer,
            items=IMAGES,
            unit="captions/s",
        )


def write_images(folder: Path, *, seed: int) -> list[Path]:
    """JPEG files of `draw_images`, in order."""
    paths = [folder / f"{number:04}.jpg" for number in range(IMAGES)]
    for path, jpeg in zip(paths, draw_images(IMAGES, seed=seed), strict=True):
        path.write_bytes(jpeg)
    return paths


def caption_folder(captioner: Captioner, folder: Path) -> None:
    """The images of a folder, each into a text file next to it."""
    with SideCars(".txt", "overwrite", embed=False) as output:
        caption_images(
            find_items([str(folder)]),
            partial(caption_rows, captioner, strategy=BeamSearch()),
            output,
            image=captioner.processor.image_config,
            batch_size=BATCH,
            workers=WORKERS,
            progress=False,
        )


def caption_tensors(captioner: Captioner, pixels: Tensor) -> list[Caption]:
    """Images that are tensors, batch by batch."""
    return [caption for batch in pixels.split(BATCH) for caption in captioner.generate(batch, BeamSearch())]


def require_same_captions(folder: Path, captions: Sequence[Caption]) -> None:
    """Raises: UnequalError: if a side-car in the folder does not hold the caption of its image."""
    for path, caption in zip(sorted(folder.glob("*.txt")), captions, strict=True):
        if path.read_text() != (expected := f"{one_line(caption.text)}\n"):
            raise UnequalError(f"{path.name} holds {path.read_text()!r}, not {expected!r}")


BENCHMARK = Benchmark(
    rows={
        "beam-1": partial(caption_row, size=B_32, images=1, name=f"beam {BEAMS}", ours=BEAM),
        "beam-8": partial(caption_row, size=B_32, images=8, name=f"beam {BEAMS}", ours=BEAM),
        "legacy-1": partial(caption_row, size=B_32, images=1, name="legacy", ours=LEGACY),
        "top-k-1": partial(caption_row, size=B_32, images=1, name="top-k", ours=GREEDY, peer="top_k"),
        "top-k-1-bf16": partial(
            caption_row, size=B_32, images=1, name="top-k, bf16", ours=GREEDY, peer="top_k", precision="bf16"
        ),
        "top-k-8": partial(caption_row, size=B_32, images=8, name="top-k", ours=GREEDY, peer="top_k"),
        "l-14-beam-1": partial(caption_row, size=L_14, images=1, name=f"beam {BEAMS}", ours=BEAM),
        "folder": folder_row,
    },
    cuda=True,
    cuda_rows={
        "l-14-beam-256-bf16": partial(
            caption_row, size=L_14, images=256, name=f"beam {BEAMS}, bf16", ours=BEAM, peer=None, precision="bf16"
        ),
        "l-14-beam-256-compiled": partial(compiled_row, size=L_14, images=256, name=f"beam {BEAMS}", ours=BEAM),
        "l-14-top-k-1-bf16": partial(
            caption_row, size=L_14, images=1, name="top-k, bf16", ours=GREEDY, peer="top_k", precision="bf16"
        ),
        "l-14-top-k-1-compiled": partial(compiled_row, size=L_14, images=1, name="top-k", ours=GREEDY),
    },
    samples=lambda: IMAGES,
)
