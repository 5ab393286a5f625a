"""How fast captions are written: beside open_clip's `generate`, with the same weights, pictures and number of steps."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from contracap.apps.bulk.caption import caption_pictures
from contracap.apps.bulk.inputs import items
from contracap.apps.bulk.outputs import SideCars, one_line
from contracap.apps.bulk.rows import caption_rows
from contracap.bench.caption_pair import TOKENS, Pair, Setting
from contracap.bench.peer_captions import BEAMS, Way
from contracap.bench.timing import (
    LEAST_ROUNDS,
    Benchmark,
    Row,
    UnequalError,
    Work,
    compare,
    in_turns,
    this_machine,
    timed_row,
)
from contracap.generation import BeamSearch, Caption, Captioner, Greedy, LegacyBeamSearch
from contracap.generation.strategy import Strategy
from contracap.model.quantised import int8
from contracap.pretrained import load

Device = Literal["cpu", "cuda"]

B_32, L_14, SMALL = "coca_ViT-B-32", "coca_ViT-L-14", "flickr8k"
# Each with an end token in the last place alone, so that all sides take the same number of steps.
BEAM = BeamSearch(width=BEAMS, max_tokens=TOKENS, min_tokens=TOKENS - 1)
LEGACY = LegacyBeamSearch(year=2024, max_tokens=TOKENS, min_tokens=TOKENS - 1)
GREEDY = Greedy(max_tokens=TOKENS, min_tokens=TOKENS - 1)
PICTURES, SIDES, QUALITY = 500, (500, 375), 90
BATCH, WORKERS = 16, 8  # pictures at a time and threads that decode, of a folder
INT8_PICTURES = 8


def bench_generate(
    *,
    rounds: int = LEAST_ROUNDS,
    device: Device = "cpu",
    rows: Sequence[str] = (),
    seed: int = 0,
    report: Callable[[Row], object] = lambda row: None,
) -> Benchmark:
    """Speed of captioning beside open_clip's, of whole folders, and of int8 weights.

    Args:
        rounds: of each comparison.
        device: of all rows; `cuda` adds those of `CUDA_ROWS`.
        rows: which to measure, by their names in `ROWS`; none means all.
        report: is told of each row when it is done.

    Raises:
        UnequalError: if captions have other ids than open_clip's, or than those of transformers.
        ValueError: for a row that there is not, too few rounds, or `cuda` where torch finds none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no CUDA device; say cpu")
    named = ROWS | (CUDA_ROWS if device == "cuda" else {})
    if unknown := [name for name in rows if name not in named]:
        raise ValueError(f"no row {unknown[0]!r} in this benchmark; the rows are {', '.join(named)}")
    setting = Setting(device=torch.device(device), rounds=rounds, seed=seed)
    machine = this_machine() | {"device": device}
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(setting.device)
    measured = []
    for name in rows or named:
        measured.append(named[name](setting))
        report(measured[-1])
    return Benchmark(rows=measured, samples=PICTURES, seed=seed, machine=machine)


def caption_row(setting: Setting, *, size: str, name: str, images: int, ours: Strategy, peer: Way = "groups") -> Row:
    """Captions of so many pictures at a time, beside open_clip's.

    Raises:
        UnequalError: if captions that are free to end have other ids; nothing is timed then.
    """
    pair = Pair(size, setting, images=images)
    with ExitStack() as stack:

        def checked_peer() -> tuple[Work, str]:
            captions = pair.open_peer(stack)
            note = (pair.require_equal_greedy if peer == "top_k" else pair.require_equal_beams)(captions)
            request = pair.request(peer, min_tokens=ours.max_tokens - 1)
            lengths = {len(ids) for best in captions(request) for ids in best}
            if lengths != {ours.max_tokens}:
                raise UnequalError(f"open_clip's captions have {sorted(lengths)} ids, not {ours.max_tokens} each")
            versions = ", ".join(f"{package} {version}" for package, version in captions.versions.items())
            return partial(captions, request), f"{note}; both write {ours.max_tokens - 1} tokens a caption; {versions}"

        return compare(
            f"{size}, {name}, {images} picture{'s' if images > 1 else ''}",
            ours=partial(pair.captioner.generate, pair.pixels, ours),
            checked_peer=checked_peer,
            items=images,
            unit="captions/s",
            rounds=setting.rounds,
            clock=setting.clock,
        )


def large_batch_row(setting: Setting, *, size: str, images: int) -> Row:
    """Our captions in bf16 of as many pictures at a time as fill a GPU; open_clip is not asked for so many."""
    pair = Pair(size, setting, images=images)
    pair.captioner.model.bfloat16()
    work = partial(pair.captioner.generate, pair.pixels, BEAM)
    (seconds,) = in_turns(work, rounds=setting.rounds, clock=setting.clock)
    return timed_row(
        f"{size}, beam {BEAMS}, {images} pictures, bf16",
        seconds,
        items=images,
        unit="captions/s",
        reason="ours alone",
    )


def int8_row(setting: Setting, *, size: str, images: int) -> Row:
    """Captions by weights of 8 bits, beside those by weights of 32."""
    exact, quantised = (Pair(size, setting, images=images) for _ in range(2))
    int8(quantised.captioner.model)
    row = compare(
        f"{size}, beam {BEAMS}, {images} pictures, int8 weights beside ours in fp32",
        ours=partial(quantised.captioner.generate, quantised.pixels, BEAM),
        checked_peer=lambda: (partial(exact.captioner.generate, exact.pixels, BEAM), ""),
        items=images,
        unit="captions/s",
        rounds=setting.rounds,
        clock=setting.clock,
    )
    return replace(row, note=f"{describe_change(exact.captioner, quantised.captioner, exact.pixels)}; random weights")


def describe_change(exact: Captioner, quantised: Captioner, pixels: Tensor) -> str:
    """How far a captioner differs from one with exact weights: in its captions, and in what it thinks of the other's.

    Source: log-probabilities as `Caption.log_probability`, of the same tokens, in one pass over them.
    """
    captions, others = (each.generate(pixels, BeamSearch()) for each in (exact, quantised))
    changed = sum(one.token_ids != other.token_ids for one, other in zip(captions, others, strict=True))
    tokenizer = exact.processor.tokenizer
    differences = []
    for row, caption in enumerate(captions):
        ids = torch.tensor([[tokenizer.start, *caption.token_ids, tokenizer.end]], device=pixels.device)
        ids = ids[:, : exact.model.config.text.context]
        values = [_log_probabilities(each, pixels[row : row + 1], ids) for each in (exact, quantised)]
        differences.append((values[1] - values[0]).abs())
    mean = float(torch.cat(differences).mean())
    return f"{changed} of {len(captions)} captions change, a token's log-probability by {mean:.1e} nats on average"


@torch.inference_mode()
def _log_probabilities(captioner: Captioner, pixels: Tensor, ids: Tensor) -> Tensor:
    output = captioner.model(pixels, ids)
    assert output.logits is not None  # a captioner's model has a decoder
    scores = output.logits[0, : ids.shape[1] - 1].log_softmax(dim=-1)
    return scores.gather(1, ids[0, 1:, None]).squeeze(1)


def folder_row(setting: Setting) -> Row:
    """A folder of JPEG pictures captioned into side-cars, beside the same pictures captioned as tensors in memory: the
    ratio is the share of the engine's rate that reading, decoding and writing leave."""
    captioner = Captioner(*load(SMALL, weights="random", seed=setting.seed))
    captioner.model.to(setting.device)
    with TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder), seed=setting.seed)
        tensors = captioner.processor.images(paths)
        row = compare(
            f"{SMALL}, folder of {len(paths)} pictures of {SIDES[0]}x{SIDES[1]} beside tensors in memory",
            ours=partial(caption_folder, captioner, Path(folder)),
            checked_peer=lambda: (partial(caption_tensors, captioner, tensors), ""),
            items=len(paths),
            unit="captions/s",
            rounds=setting.rounds,
            clock=setting.clock,
        )
        require_same_captions(captioner, Path(folder), tensors)
    assert row.ratio is not None  # the other side is ours, too
    return replace(row, note=f"{row.ratio:.0%} of the rate on tensors, which are ours too; the same captions")


def write_pictures(folder: Path, *, seed: int) -> list[Path]:
    """JPEG files of smooth random colours with some grain, in order."""
    generator, paths = np.random.default_rng(seed), []
    for number in range(PICTURES):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(SIDES, Image.Resampling.BICUBIC), dtype=np.int16)
        grain = generator.integers(-8, 9, smooth.shape, dtype=np.int16)
        paths.append(folder / f"{number:04}.jpg")
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(paths[-1], quality=QUALITY)
    return paths


def caption_folder(captioner: Captioner, folder: Path) -> None:
    """The pictures of a folder, each into a text file beside it."""
    with SideCars(".txt", "overwrite", embed=False) as output:
        caption_pictures(
            items([str(folder)]),
            partial(caption_rows, captioner, strategy=BeamSearch()),
            output,
            image=captioner.processor.image_config,
            batch_size=BATCH,
            workers=WORKERS,
            progress=False,
        )


def caption_tensors(captioner: Captioner, pixels: Tensor) -> list[Caption]:
    """Prepared pictures, a batch after the other."""
    return [caption for batch in pixels.split(BATCH) for caption in captioner.generate(batch, BeamSearch())]


def require_same_captions(captioner: Captioner, folder: Path, pixels: Tensor) -> None:
    """Raises: UnequalError: if a side-car in the folder does not hold the caption of its picture's pixels."""
    for path, caption in zip(sorted(folder.glob("*.txt")), caption_tensors(captioner, pixels), strict=True):
        if path.read_text() != (expected := f"{one_line(caption.text)}\n"):
            raise UnequalError(f"{path.name} holds {path.read_text()!r}, not {expected!r}")


ROWS: dict[str, Callable[[Setting], Row]] = {
    "beam-1": partial(caption_row, size=B_32, images=1, name=f"beam {BEAMS}", ours=BEAM),
    "beam-8": partial(caption_row, size=B_32, images=8, name=f"beam {BEAMS}", ours=BEAM),
    "legacy-1": partial(caption_row, size=B_32, images=1, name="legacy", ours=LEGACY),
    "top-k-1": partial(caption_row, size=B_32, images=1, name="top-k", ours=GREEDY, peer="top_k"),
    "top-k-8": partial(caption_row, size=B_32, images=8, name="top-k", ours=GREEDY, peer="top_k"),
    "l-14-beam-1": partial(caption_row, size=L_14, images=1, name=f"beam {BEAMS}", ours=BEAM),
    "int8": partial(int8_row, size=B_32, images=INT8_PICTURES),
    "folder": folder_row,
}
CUDA_ROWS: dict[str, Callable[[Setting], Row]] = {
    "l-14-beam-256": partial(large_batch_row, size=L_14, images=256),
}
