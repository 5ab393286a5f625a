"""The decoding loop: a model gives logits, the state of a strategy continues texts with them."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from threading import Lock

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from contracap.generation.strategy import DecodingState, FinishedText, Prompts, Strategy
from contracap.model.cache import DecodingCache
from contracap.model.coca import CoCa
from contracap.model.compiling import allow_recompilations, require_compiler
from contracap.model.onednn import OneDNNLinear, PackedWeights
from contracap.tokenizer import Tokenizer

MIN_LEAVING = 0.25  # share of a batch that leaves it at once; for fewer, moving the others costs more than it saves
MAX_SHAPES = 64  # shapes that steps are compiled for
CHECK_EVERY = {"cuda": 4}  # steps between checks for finished images, each of which waits for the device


class DecodingLoop:
    """Writes texts about images with a model.

    Prefill reads the shortest prompt of the batch, once per image. From then on each step decodes one token of every
    text. Images leave the batch once their result is final.

    Args:
        compiled: run steps through `torch.compile`, on a GPU as CUDA graphs. All steps then have the same shapes:
            attention reads all slots of the cache from the first step on, and no image leaves the batch. Each new
            batch size, number of texts and maximum length is compiled at its first use, which can take minutes.
    """

    def __init__(self, model: CoCa, *, compiled: bool = False):
        self.model, self.compiled = model, compiled
        self._packed = PackedWeights([] if compiled else _layers_of_a_step(model))
        self._next_logits: Callable[..., Tensor] = model.next_logits
        self._reused: tuple[tuple[object, ...], DecodingCache] | None = None  # CUDA graphs write to fixed addresses
        self._lock = Lock() if compiled else nullcontext()  # calls share the cache
        if compiled:
            require_compiler()
            mode = "reduce-overhead" if model.device.type == "cuda" else None
            self._next_logits = torch.compile(model.next_logits, dynamic=False, mode=mode)
            allow_recompilations(MAX_SHAPES)

    @torch.inference_mode()
    def run(
        self,
        caption_tokens: Float[Tensor, "batch caption_token width"],
        strategy: Strategy,
        prompts: Prompts,
        tokenizer: Tokenizer,
        before_step: Callable[[], object] = lambda: None,
    ) -> list[list[FinishedText]]:
        """Return the texts that the strategy finds for each image, best first.

        Args:
            before_step: called before each step; an exception that it raises ends decoding.

        Raises: ValueError: if a prompt leaves no room, or the strategy does not support a prompt or rule.
        """
        state = strategy.begin(prompts, tokenizer)
        with self._packed.used(), self._lock:
            cache = self._new_cache(caption_tokens, strategy, prompts)
            logits = self.model.prefill(prompts.ids[:, : prompts.shortest], cache)
            return self._run_steps(state, cache, logits, strategy.max_tokens, before_step)

    def _run_steps(
        self,
        state: DecodingState,
        cache: DecodingCache,
        logits: Float[Tensor, "batch text vocab"],
        max_tokens: int,
        before_step: Callable[[], object],
    ) -> list[list[FinishedText]]:
        check_every = CHECK_EVERY.get(logits.device.type, 1)
        results: list[list[FinishedText]] = [[] for _ in logits]
        images = list(range(len(results)))  # those still in the batch
        while True:
            before_step()
            parents = state.advance(logits)
            if cache.length + 1 == max_tokens or cache.length % check_every == 0:
                finished = state.finished.tolist()
                if all(finished) or (not self.compiled and sum(finished) >= MIN_LEAVING * len(finished)):
                    for image, is_finished, texts in zip(images, finished, state.list_texts(), strict=True):
                        if is_finished:
                            results[image] = texts
                    if all(finished):
                        return results
                    positions = [position for position, is_finished in enumerate(finished) if not is_finished]
                    images = [images[position] for position in positions]
                    remaining = torch.tensor(positions, device=logits.device)
                    state.select(remaining)
                    cache.select(remaining)
                    parents = None if parents is None else parents[remaining]
            if parents is not None:
                cache.reorder(parents)
            logits = self._decode(state.last, cache)

    def _decode(self, ids: Int64[Tensor, "batch text"], cache: DecodingCache) -> Float[Tensor, "batch text vocab"]:
        """Do what `CoCa.decode` does, compiled where that is asked for."""
        return self._next_logits(ids, cache.projected, cache.add_tokens(ids.shape[1]))

    def _new_cache(
        self, caption_tokens: Float[Tensor, "batch caption_token width"], strategy: Strategy, prompts: Prompts
    ) -> DecodingCache:
        """Return an empty cache; compiled steps get the same one again if its shapes fit."""
        projected = self.model.require_decoder().project(caption_tokens)
        shape = (len(caption_tokens), prompts.shortest, strategy.num_texts, strategy.max_tokens)
        key = (*shape, projected[0].key.dtype, projected[0].key.device)
        if self._reused is not None and self._reused[0] == key:
            self._reused[1].restart(projected)
            return self._reused[1]
        cache = self.model.new_cache(
            projected,
            prompt=prompts.shortest,
            num_texts=strategy.num_texts,
            max_tokens=strategy.max_tokens,
            fixed_shapes=self.compiled,
        )
        if self.compiled:
            if caption_tokens.device.type == "cuda":
                cache.mark_static()
            self._reused = (key, cache)
        return cache


def _layers_of_a_step(model: CoCa) -> Iterator[OneDNNLinear]:
    """Yield the linear layers that a step reads: those of the text side, except the projections of caption tokens."""
    for part in (model.text.blocks, model.require_decoder()):
        for name, layer in part.named_modules():
            if type(layer) is OneDNNLinear and name.rpartition(".")[2] != "key_value":
                yield layer
