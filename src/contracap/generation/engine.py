"""The loop of decoding: a model gives logits, a search goes on by them."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from threading import Lock

import torch
from jaxtyping import Float
from torch import Tensor

from contracap.generation.strategy import Hypothesis, Prompts, Search, SearchStrategy
from contracap.model.cache import DecodingCache
from contracap.model.coca import CoCa
from contracap.model.compiling import require_compiler
from contracap.model.onednn import OneDNNLinear, PackedWeights
from contracap.tokenizer import Tokenizer

LEAVING = 0.25  # share of a batch that leaves it together; for fewer, moving the others costs more than it saves
MOST_SHAPES = 64  # that steps are compiled for; beyond its limit torch runs them as they are and says nothing
LOOK_EVERY = {"cuda": 4}  # steps from one look at what is finished to the next: each waits for the device


class Engine:
    """Writes texts about pictures with a model.

    What all prompts have tokens for is read in one pass, once a picture. From there each step adds one token to every
    text, and pictures whose result cannot change any more leave the batch.

    Args:
        compiled: whether steps run through `torch.compile`, on a GPU as CUDA graphs. All steps then have the same
            shapes: attention reads the room for all tokens from the first on, and no picture leaves. What each number
            of pictures and texts and each longest length needs is compiled when it first comes, in up to minutes.
    """

    def __init__(self, model: CoCa, *, compiled: bool = False):
        self.model, self.compiled = model, compiled
        self._packed = PackedWeights([] if compiled else _read_at_each_step(model))
        self._score: Callable[..., Tensor] = model.score
        self._kept: tuple[tuple[object, ...], DecodingCache] | None = None  # graphs write where they first did
        self._alone = Lock() if compiled else nullcontext()  # calls share what is kept
        if compiled:
            require_compiler()
            mode = "reduce-overhead" if model.device.type == "cuda" else None
            self._score = torch.compile(model.score, dynamic=False, mode=mode)
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)

    @torch.inference_mode()
    def write(
        self,
        caption_tokens: Float[Tensor, "images memory embed"],
        strategy: SearchStrategy,
        prompts: Prompts,
        tokenizer: Tokenizer,
        go_on: Callable[[], object] = lambda: None,
    ) -> list[list[Hypothesis]]:
        """The texts that the strategy finds for each picture, best first.

        Args:
            go_on: called before each step; what it raises ends the work.

        Raises: ValueError: if a prompt leaves no room, or the strategy cannot follow what was asked.
        """
        search = strategy.begin(prompts, tokenizer)
        with self._packed.used(), self._alone:
            return self._searched(search, caption_tokens, strategy, prompts, go_on)

    def _searched(
        self,
        search: Search,
        caption_tokens: Float[Tensor, "images memory embed"],
        strategy: SearchStrategy,
        prompts: Prompts,
        go_on: Callable[[], object],
    ) -> list[list[Hypothesis]]:
        cache = self._open(caption_tokens, strategy, prompts)
        look_every = LOOK_EVERY.get(caption_tokens.device.type, 1)
        found: list[list[Hypothesis]] = [[] for _ in caption_tokens]
        pictures = list(range(len(found)))  # those in the batch
        logits = self.model.decode(prompts.ids[:, : prompts.shared], cache)
        while True:
            go_on()
            continued = search.advance(logits)
            if cache.length + 1 == strategy.max_tokens or cache.length % look_every == 0:
                finished = search.finished.tolist()
                if all(finished) or (not self.compiled and sum(finished) >= LEAVING * len(finished)):
                    for picture, leaves, texts in zip(pictures, finished, search.hypotheses(), strict=True):
                        if leaves:
                            found[picture] = texts
                    if all(finished):
                        return found
                    staying = [place for place, leaves in enumerate(finished) if not leaves]
                    pictures = [pictures[place] for place in staying]
                    kept = torch.tensor(staying, device=caption_tokens.device)
                    search.keep(kept)
                    cache.keep(kept)
                    continued = None if continued is None else continued[kept]
            if continued is not None:
                cache.follow(continued)
            newest = search.last
            logits = self._score(newest, cache.memory, cache.step(newest.shape[1]))

    def _open(
        self, caption_tokens: Float[Tensor, "images memory embed"], strategy: SearchStrategy, prompts: Prompts
    ) -> DecodingCache:
        memory = self.model.require_decoder().project(caption_tokens)
        shape = (len(caption_tokens), prompts.shared, strategy.rows, strategy.max_tokens)
        kind = (*shape, memory[0].key.dtype, memory[0].key.device)
        if self._kept is not None and self._kept[0] == kind:
            self._kept[1].restart(memory)
            return self._kept[1]
        cache = self.model.start_decoding(
            memory,
            prompt=prompts.shared,
            texts=strategy.rows,
            max_tokens=strategy.max_tokens,
            whole=self.compiled,
        )
        if self.compiled:
            if caption_tokens.device.type == "cuda":
                cache.stay_in_place()
            self._kept = (kind, cache)
        return cache


def _read_at_each_step(model: CoCa) -> Iterator[OneDNNLinear]:
    """The linear layers of the text side, but for those that make keys and values of the caption tokens."""
    for part in (model.text.blocks, model.require_decoder()):
        for name, layer in part.named_modules():
            if isinstance(layer, OneDNNLinear) and name.rpartition(".")[2] != "key_value":
                yield layer
