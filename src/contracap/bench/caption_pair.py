"""Our captioner and open_clip's with the same weights, on the same pictures: what is compared, then timed."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from contracap.bench.peer_captions import BEAMS, PACKAGES, PeerCaptions, Request, Way, random_pixels
from contracap.bench.steps import released
from contracap.bench.timing import UnequalError, device_clock
from contracap.generation import BeamSearch, Caption, Captioner, Greedy, LegacyBeamSearch
from contracap.pretrained import random_model, save_open_clip

TOKENS = 21  # of the longest sequence: the start token, and 20 that are written
MIN_TOKENS = 5  # where outputs are compared, which may end before


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all rows share.

    Attributes:
        packages: folder of what open_clip's captions need.
    """

    device: torch.device
    rounds: int
    seed: int
    packages: Path = PACKAGES

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds, read when the device has done all it was given."""
        return partial(device_clock, self.device)


class Pair:
    """Our captioner of a size with random weights, and open_clip's with the same, on the same pictures of random
    pixels.

    So that captions tell pictures apart, and end, the text decoder hears more of the picture, and the end token is as
    likely as some words are. Two tokens are never written, since the sides treat them differently: the start token,
    which we forbid, and id 0, after which open_clip hides the text.
    """

    def __init__(self, size: str, setting: Setting, *, images: int):
        self.size, self.setting, self.images = size, setting, images
        model, processor = random_model(released(size), seed=setting.seed)
        model.to(setting.device)
        self.side, self.end = model.config.vision.image_size, processor.tokenizer.end
        self.pixels = random_pixels(images, self.side, setting.seed, setting.device)
        self.captioner = Captioner(model, processor)
        self._tell()

    @torch.no_grad()
    def _tell(self) -> None:
        decoder = self.captioner.model.require_decoder()
        for block in decoder.cross_blocks:
            block.attention.out.weight *= 20
        self.captioner.model.text.position.mul_(30)
        vocabulary = decoder.vocabulary.weight
        vocabulary *= 2
        vocabulary[[0, self.end - 1, self.end]] = 0
        middle = {caption.token_ids[-1] for caption in self.captioner.generate(self.pixels, Greedy(TOKENS // 2, 0))}
        vocabulary[self.end] = vocabulary[sorted(middle)].sum(dim=0) * 0.45  # more, and most captions end at once

    def open_peer(self, stack: ExitStack) -> PeerCaptions:
        """open_clip's side, for as long as the stack is.

        Raises:
            NoPeerError: if it is not installed.
        """
        model, processor = self.captioner.model, self.captioner.processor
        folder = Path(stack.enter_context(TemporaryDirectory()))
        save_open_clip(folder, model=model.config, image=processor.image_config, state=model.state_dict())
        setting = self.setting
        peer = PeerCaptions(folder, device=setting.device, threads=torch.get_num_threads(), packages=setting.packages)
        stack.callback(peer.close)
        return peer

    def request(self, way: Way, *, min_tokens: int) -> Request:
        """To the peer, for a caption of each of the pictures."""
        return Request(
            way=way,
            images=self.images,
            side=self.side,
            seed=self.setting.seed,
            max_tokens=TOKENS,
            min_tokens=min_tokens,
            end=self.end,
        )

    def require_equal_beams(self, peer: PeerCaptions) -> str:
        """Compares `legacy` to open_clip's default, and beam search to that of transformers on open_clip's logits.

        Raises:
            UnequalError: if a caption, or one of the n best, has other ids.
        """
        legacy = self.captioner.generate(
            self.pixels, LegacyBeamSearch(year=2024, max_tokens=TOKENS, min_tokens=MIN_TOKENS)
        )
        groups = self._inner(peer(self.request("groups", min_tokens=MIN_TOKENS)))
        _require_same("legacy", [[caption.token_ids] for caption in legacy], groups)
        standard = self.captioner.generate(self.pixels, BeamSearch(BEAMS, TOKENS, MIN_TOKENS))
        n_best = [[text.token_ids for text in caption.alternatives] for caption in standard]
        _require_same("beam search", n_best, self._inner(peer(self.request("transformers", min_tokens=MIN_TOKENS))))
        return (
            f"legacy has the ids of open_clip's 6 beams in 3 groups, our beam search the {BEAMS} best of transformers' "
            f"own on open_clip's logits, both free to end ({_describe(standard)})"
        )

    def require_equal_greedy(self, peer: PeerCaptions) -> str:
        """Compares greedy decoding to open_clip's top_k of 1, which puts an end token in the last place.

        Raises:
            UnequalError: if a caption has other ids.
        """
        greedy = self.captioner.generate(self.pixels, Greedy(TOKENS, MIN_TOKENS))
        ours = [[caption.token_ids[: TOKENS - 2]] for caption in greedy]
        _require_same("greedy", ours, self._inner(peer(self.request("top_k", min_tokens=MIN_TOKENS))))
        return f"greedy has the ids of open_clip's top_k of 1, its default, free to end ({_describe(greedy)})"

    def _inner(self, found: list[list[list[int]]]) -> list[list[tuple[int, ...]]]:
        """The ids between the start and the first end token."""
        return [[tuple([*ids, self.end][1 : [*ids, self.end].index(self.end)]) for ids in best] for best in found]


def _require_same(name: str, ours: Sequence[list[tuple[int, ...]]], peer: Sequence[list[tuple[int, ...]]]) -> None:
    if (counts := [len(found) for found in ours]) != (others := [len(found) for found in peer]):
        raise UnequalError(f"{name}: {counts} captions of each picture, the peer's {others}")
    for picture, (found, expected) in enumerate(zip(ours, peer, strict=True)):
        for place, (ids, others) in enumerate(zip(found, expected, strict=True)):
            if ids != others:
                raise UnequalError(f"{name}: picture {picture}, caption {place}: {ids}, the peer's {others}")


def _describe(captions: Sequence[Caption]) -> str:
    lengths = [len(caption.token_ids) for caption in captions]
    return (
        f"{len(captions)} pictures, {len({caption.token_ids for caption in captions})} different captions of "
        f"{sum(lengths) / len(lengths):.1f} tokens on average, {min(lengths)} to {max(lengths)}"
    )
