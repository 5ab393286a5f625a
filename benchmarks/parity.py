"""Agreement in fp32: features and logits with open_clip's, and on a GPU captions with those on the CPU."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from benchmarks.captioners import random_captioner, require_equal_ids
from benchmarks.harness import Benchmark, Row, Run, UnequalError
from benchmarks.open_clip_models import open_clip_model
from benchmarks.train_steps import make_batch, open_clip_pixels
from contracap.generation import BeamSearch, Captioner

SIZES = {"b-32": "coca_ViT-B-32", "l-14": "coca_ViT-L-14"}
TOLERANCE = 1e-5  # of the difference's norm, relative to the norm
SAMPLES, CAPTIONED = 16, 4


def parity_row(run: Run, *, size: str) -> Row:
    """The largest difference from open_clip with the same random weights.

    Raises:
        MissingPeerError: if open_clip is not installed.
        UnequalError: if a difference is above the tolerance, or a caption differs from that on the CPU.
    """
    size = run.size(size)
    with float32_products():
        captioner, pixels = random_captioner(size, run, images=CAPTIONED)
        differences = compare_outputs(captioner, size, run)
        captions = compare_captions(captioner, pixels)
    for name, difference in differences.items():
        if not difference <= TOLERANCE:
            raise UnequalError(f"{size}: {name} are {difference:.1e} from open_clip's, allowed is {TOLERANCE:.0e}")
    listed = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
    return Row(
        work=f"{size}, largest difference from open_clip in fp32",
        unit="1e-6 of the norm",
        ours=1e6 * max(differences.values()),
        note=f"{listed} (allowed: {TOLERANCE:.0e}), {SAMPLES} images and captions; {captions}",
        reason="a difference has no peer",
    )


@contextmanager
def float32_products() -> Iterator[None]:
    """Multiply in float32 in the block: by default, convolutions on a GPU round their inputs to TF32."""
    products, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions


@torch.inference_mode()
def compare_outputs(captioner: Captioner, size: str, run: Run) -> dict[str, float]:
    """Return the relative difference of each output of the model from open_clip's."""
    model = captioner.model.eval()
    peer = open_clip_model(size, model, output_dict=True).to(run.device).eval()
    batch = make_batch(size, run, samples=SAMPLES)
    pixels = open_clip_pixels(batch)
    ours, theirs = model(pixels, batch.ids), peer(pixels, batch.ids)

    def labelled(logits: Tensor) -> Tensor:  # open_clip also has logits after the end of a text
        return torch.cat([row[: length - 1] for row, length in zip(logits, batch.lengths, strict=True)])

    return {
        "image features": relative(ours.image_features, theirs["image_features"]),
        "text features": relative(ours.text_features, theirs["text_features"]),
        "logits": relative(labelled(ours.logits), labelled(theirs["logits"])),
    }


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference by the norm."""
    return float((ours - theirs).norm() / theirs.norm())


def compare_captions(captioner: Captioner, pixels: Tensor) -> str:
    """Compare captions with those of the same model on the CPU.

    Raises:
        UnequalError: if a caption has other ids.
    """
    on_cpu = Captioner(copy.deepcopy(captioner.model).cpu(), captioner.processor)
    strategy = BeamSearch(max_tokens=20)
    ours, expected = (
        [[caption.token_ids] for caption in each.generate(pixels, strategy)] for each in (captioner, on_cpu)
    )
    require_equal_ids("captions on the device and on the CPU", ours, expected)
    return f"{len(ours)} captions by beam search have the ids of those on the CPU"


BENCHMARK = Benchmark(
    rows={name: partial(parity_row, size=size) for name, size in SIZES.items()}, samples=lambda: SAMPLES, cuda=True
)
