"""The served model with its queues and threads: everything the routes call."""

import asyncio
import ctypes
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from jaxtyping import Float32
from torch import Tensor

from contracap.apps.serve.batching import Batcher, BatchingConfig, PriorityLock
from contracap.apps.serve.config import LimitsConfig
from contracap.apps.serve.in_flight import RequestLimiter
from contracap.apps.serve.metrics import Metrics
from contracap.apps.serve.model import Image, ServedModel
from contracap.config import ConfigError
from contracap.generation.captioner import Caption
from contracap.generation.registry import build_strategy
from contracap.generation.strategy import Strategy
from contracap.image_files import pixel_count

MAX_BEAMS = 32  # rows that one image may take in a batch
DECODERS = min(4, os.cpu_count() or 1)
LARGE = 16_000_000  # pixels of images that are decoded one at a time: several would take gigabytes
TRIM_SECONDS = 2


@dataclass(frozen=True)
class DefaultStrategy:
    """Decoding strategy for requests that name none.

    Attributes:
        settings: `key=value` each.
    """

    name: str = "beam"
    settings: tuple[str, ...] = ()

    def strategy(self, query: dict[str, str]) -> Strategy:
        """Return the strategy that a request asks for. Without a name its settings change those of the default.

        Raises: ConfigError: for an unknown name or setting, a wrong value, or more rows than an image may take.
        """
        asked = dict(query)
        name = asked.pop("strategy", None)
        settings = [f"{key}={value}" for key, value in asked.items()]
        strategy = build_strategy(name or self.name, settings if name else [*self.settings, *settings])
        if strategy.num_texts > MAX_BEAMS:
            raise ConfigError(
                f"{strategy.num_texts} beams or samples of an image are more than the {MAX_BEAMS} allowed"
            )
        return strategy


class Service:
    """Queues requests and runs the model on one batch at a time.

    Raises: ValueError: if the default strategy is wrong, or the model cannot follow it.
    """

    def __init__(
        self, model: ServedModel, *, default: DefaultStrategy, batching: BatchingConfig, limits: LimitsConfig
    ) -> None:
        usual = default.strategy({})
        if model.captioner is not None:
            model.captioner.check(usual)
        self.model, self.default = model, default
        self.metrics, self.in_flight = Metrics(), RequestLimiter(limits)
        self._usual_batch_cost = batching.max_batch * _cost(usual)
        lock, observe = PriorityLock(), self.metrics.batch_sizes.observe
        self._light = Batcher(batching, lock=lock, observe=observe)
        self._heavy = Batcher(batching, lock=lock, heavy=True, observe=observe)
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
        self._large_decoder = ThreadPoolExecutor(1, thread_name_prefix="decode-large")
        self.metrics.queue_length.set_function(lambda: self._light.waiting + self._heavy.waiting)
        self.metrics.in_flight.set_function(lambda: len(self.in_flight.bodies))

    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:
        """Run the queues while the application is served."""
        async with self._light, self._heavy:
            trimming = asyncio.create_task(_trim(self._large_decoder))
            yield
            trimming.cancel()
        for pool in (self._decoders, self._large_decoder):
            pool.shutdown(wait=False, cancel_futures=True)

    async def read_image(self, data: bytes) -> Image:
        """Decode an image, in a thread.

        Raises: ImageError: if it cannot be used.
        """
        loop = asyncio.get_running_loop()
        pixels = await loop.run_in_executor(self._decoders, pixel_count, data)
        pool = self._large_decoder if pixels > LARGE else self._decoders
        return await loop.run_in_executor(pool, self.model.read_image, data)

    async def choose_strategy(self, query: dict[str, str], prompt: str) -> Strategy:
        """Return the strategy that a request asks for.

        Raises: ValueError: if it is wrong, or the model cannot follow it.
        """
        strategy = self.default.strategy(query)
        assert self.model.captioner is not None
        check = self.model.captioner.check
        await asyncio.get_running_loop().run_in_executor(self._decoders, check, strategy, prompt)
        return strategy

    async def caption(self, image: Image, strategy: Strategy, prompt: str) -> Caption:
        """Write a caption. A strategy that costs more than the default has smaller batches and lets others go first."""
        share = self._usual_batch_cost / _cost(strategy)  # images that cost as much as a batch of the default's
        queue = self._light if share >= self._light.config.max_batch else self._heavy
        return await queue.submit(self.model.captions, strategy, (image, prompt), max_items=max(1, int(share)))

    async def classify(
        self, image: Image, labels: tuple[str, ...], templates: tuple[str, ...]
    ) -> tuple[Float32[Tensor, "label"], Float32[Tensor, "label"]]:
        """Return the cosine of an image and each label, and each label's probability."""
        return await self._light.submit(self.model.similarities, (labels, templates), image)

    async def embed_image(self, image: Image) -> Float32[Tensor, "embed"]:
        """Embed an image."""
        return await self._light.submit(self.model.image_embeddings, None, image)

    async def embed_text(self, text: str) -> Float32[Tensor, "embed"]:
        """Embed a text."""
        return await self._light.submit(self.model.text_embeddings, None, text)


def _cost(strategy: Strategy) -> int:
    """Tokens that a strategy may write for an image."""
    return strategy.num_texts * strategy.max_tokens


async def _trim(pool: ThreadPoolExecutor) -> None:
    """Hand memory that is free back to the system every few seconds: glibc keeps what the threads have freed."""
    trim = getattr(ctypes.CDLL(None) if os.name == "posix" else None, "malloc_trim", None)
    while trim is not None:
        await asyncio.sleep(TRIM_SECONDS)
        await asyncio.get_running_loop().run_in_executor(pool, trim, 0)
