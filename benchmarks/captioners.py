"""Our captioner and open_clip's with the same weights: both must write the same captions of the same images."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jaxtyping import Float32
from torch import Tensor

from benchmarks.harness import Run, UnequalError
from benchmarks.open_clip_captions import BEAMS, OpenClipCaptions
from benchmarks.open_clip_models import legacy_config
from contracap.generation import BeamSearch, Caption, Captioner, Greedy, LegacyBeamSearch
from contracap.pretrained import random_model, save_open_clip

MAX_TOKENS = 21  # of a sequence: the start token and 20 more
MIN_TOKENS = 5  # of captions that are compared, which may end before


@lru_cache(1)  # neighbouring rows share it
def random_captioner(size: str, run: Run, *, images: int) -> tuple[Captioner, Float32[Tensor, "images 3 side side"]]:
    """Our captioner with random weights, and images of random pixels.

    So that captions differ between images and some end early, the text decoder attends more to the image, and the end
    token is about as likely as some words. Two tokens are never written, because the sides treat them differently:
    the start token, which we forbid, and id 0, after which open_clip hides the text.
    """
    model, processor = random_model(legacy_config(size), seed=run.seed)
    captioner, side = Captioner(model.to(run.device), processor), model.config.vision.image_size
    pixels = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(run.seed)).to(run.device)
    decoder, end = model.require_decoder(), processor.tokenizer.end
    with torch.no_grad():
        for block in decoder.cross_blocks:
            block.attention.out.weight *= 20
        model.text.position.mul_(30)
        vocabulary = decoder.vocabulary.weight
        vocabulary *= 2
        vocabulary[[0, end - 1, end]] = 0
        middle = {caption.token_ids[-1] for caption in captioner.generate(pixels, Greedy(MAX_TOKENS // 2, 0))}
        vocabulary[end] = vocabulary[sorted(middle)].sum(dim=0) * 0.45  # above this most captions end at once
    return captioner, pixels


def open_clip_captions(captioner: Captioner, pixels: Tensor, stack: ExitStack) -> OpenClipCaptions:
    """open_clip's captioner with the same weights on the same images, until the stack is closed.

    Raises:
        MissingPeerError: if it is not installed.
    """
    model, processor = captioner.model, captioner.processor
    folder = Path(stack.enter_context(TemporaryDirectory()))
    save_open_clip(folder, model=model.config, image=processor.image_config, state=model.state_dict())
    peer = OpenClipCaptions(folder, pixels, processor.tokenizer.end)
    stack.callback(peer.close)
    return peer


def require_equal_beams(captioner: Captioner, pixels: Tensor, peer: OpenClipCaptions) -> str:
    """Compare `legacy` with open_clip's default, and beam search with that of transformers on open_clip's logits.

    Raises:
        UnequalError: if a caption, or one of the n best, has other ids.
    """
    legacy = captioner.generate(pixels, LegacyBeamSearch(year=2024, max_tokens=MAX_TOKENS, min_tokens=MIN_TOKENS))
    end = captioner.processor.tokenizer.end
    groups = inner_ids(peer("groups", MAX_TOKENS, MIN_TOKENS), end)
    require_equal_ids("legacy", [[caption.token_ids] for caption in legacy], groups)
    beams = captioner.generate(pixels, BeamSearch(BEAMS, MAX_TOKENS, MIN_TOKENS))
    n_best = [[text.token_ids for text in caption.alternatives] for caption in beams]
    require_equal_ids("beam search", n_best, inner_ids(peer("transformers", MAX_TOKENS, MIN_TOKENS), end))
    return (
        f"legacy has the ids of open_clip's 6 beams in 3 groups, our beam search the {BEAMS} best of transformers' own "
        f"on open_clip's logits, both free to end ({describe(beams)})"
    )


def require_equal_greedy(captioner: Captioner, pixels: Tensor, peer: OpenClipCaptions) -> str:
    """Compare greedy decoding with open_clip's top_k of 1, which puts an end token in the last place.

    Raises:
        UnequalError: if a caption has other ids.
    """
    greedy = captioner.generate(pixels, Greedy(MAX_TOKENS, MIN_TOKENS))
    ours = [[caption.token_ids[: MAX_TOKENS - 2]] for caption in greedy]
    theirs = inner_ids(peer("top_k", MAX_TOKENS, MIN_TOKENS), captioner.processor.tokenizer.end)
    require_equal_ids("greedy", ours, theirs)
    return f"greedy has the ids of open_clip's top_k of 1, its default, free to end ({describe(greedy)})"


def inner_ids(captions: list[list[list[int]]], end: int) -> list[list[tuple[int, ...]]]:
    """The ids between the start and the first end token."""
    return [[tuple([*ids, end][1 : [*ids, end].index(end)]) for ids in best] for best in captions]


def require_equal_ids(name: str, ours: Sequence[list[tuple[int, ...]]], peer: Sequence[list[tuple[int, ...]]]) -> None:
    """Raises: UnequalError: naming the first image whose captions differ."""
    for image, (found, expected) in enumerate(zip(ours, peer, strict=True)):
        if found != expected:
            raise UnequalError(f"{name}: image {image}: {found}, the peer's {expected}")


def describe(captions: Sequence[Caption]) -> str:
    """Describe how many captions differ, and their lengths."""
    lengths = [len(caption.token_ids) for caption in captions]
    return (
        f"{len(captions)} images, {len({caption.token_ids for caption in captions})} different captions of "
        f"{sum(lengths) / len(lengths):.1f} tokens on average, {min(lengths)} to {max(lengths)}"
    )
