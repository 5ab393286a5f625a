"""open_clip's captions. They need a transformers that needs tokenizers and a hub client older than ours: a process of
their own makes them, with a folder of packages before those of the environment.

What runs there imports nothing of ours that imports tokenizers.
"""

import importlib
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float32
from torch import Tensor

from contracap.bench.timing import NoPeerError, peer_module

PACKAGES = Path(sys.prefix, "peers", "transformers-4.49")
VERSIONED = ("open_clip", "transformers", "tokenizers")
BEAMS, GROUPS = 6, 3  # open_clip's defaults

Way = Literal["groups", "top_k", "transformers"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be captioned, and how.

    Attributes:
        way: `groups`: open_clip's default, 6 beams in 3 groups. `top_k`: its sampling with the default top_k, 1, which
            is greedy. `transformers`: the beam search of transformers, 6 beams, on the logits of open_clip's model.
        images: pictures; their pixels follow from the seed.
        side: of a picture, in pixels.
        max_tokens: longest sequence, start and end token included.
        min_tokens: the end token is forbidden while the sequence is shorter than this.
        end: id of the end token; the start token's is one lower.
    """

    way: Way
    images: int
    side: int
    seed: int
    max_tokens: int
    min_tokens: int
    end: int


class PeerCaptions:
    """A process with open_clip's model, which waits while it is not asked.

    Args:
        weights: a folder in open_clip's layout.
        threads: of torch in that process.
        packages: folder of the older packages.

    Attributes:
        versions: of what makes the captions.

    Raises:
        NoPeerError: if the packages, or open_clip, are not installed.
    """

    def __init__(self, weights: Path, *, device: torch.device, threads: int, packages: Path = PACKAGES):
        if not packages.is_dir():
            raise NoPeerError(f"open_clip captions with transformers 4.49, and there is none at {packages}: make setup")
        self._model = (weights, device)
        self._process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        try:
            self.versions: dict[str, str] = self._process.submit(_prepare, packages, threads).result()
            self._process.submit(_load, *self._model).result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        self._process.shutdown()

    def __call__(self, request: Request) -> list[list[list[int]]]:
        """For each picture its captions, best first: one, or of `transformers` as many as beams. All ids, the start
        token first."""
        return self._process.submit(_captions, *self._model, request).result()


@cache
def random_pixels(images: int, side: int, seed: int, device: torch.device) -> Float32[Tensor, "images 3 side side"]:
    """Pixels as a processor gives them, the same in every process."""
    return torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(seed)).to(device)


def _prepare(packages: Path, threads: int) -> dict[str, str]:
    """Of this process: where it finds packages, and how many threads it takes; returns versions."""
    sys.path.insert(0, str(packages))
    torch.set_num_threads(threads)
    return {name: peer_module(name).__version__ for name in VERSIONED}


def _load(weights: Path, device: torch.device) -> None:
    _model(weights, device)


@cache
def _model(weights: Path, device: torch.device) -> Any:
    return peer_module("open_clip").create_model(f"local-dir:{weights}", device=device).eval()


@torch.inference_mode()
def _captions(weights: Path, device: torch.device, request: Request) -> list[list[list[int]]]:
    model = _model(weights, device)
    pixels = random_pixels(request.images, request.side, request.seed, device)
    start = request.end - 1
    if request.way == "transformers":
        return _of_transformers(model, pixels, request)
    found = model.generate(
        pixels,
        seq_len=request.max_tokens,
        min_seq_len=request.min_tokens,
        sot_token_id=start,
        eos_token_id=request.end,
        generation_type="beam_search" if request.way == "groups" else "top_k",
        num_beams=BEAMS,
        num_beam_groups=GROUPS,
    )
    return [[ids] for ids in found.tolist()]


def _of_transformers(
    model: Any, pixels: Float32[Tensor, "images 3 side side"], request: Request
) -> list[list[list[int]]]:
    """`GenerationMixin.generate` with `early_stopping="never"`, fed by open_clip's text side: see `BeamSearch`."""
    start = request.end - 1
    _, image_tokens = model._encode_image(pixels)
    found = _scorer(model).generate(
        torch.full((len(pixels), 1), start, device=pixels.device),
        attention_mask=torch.ones(len(pixels), 1, device=pixels.device),  # said, or it is guessed from the fill
        image_tokens=image_tokens,
        num_beams=BEAMS,
        num_return_sequences=BEAMS,
        do_sample=False,
        early_stopping="never",
        length_penalty=1.0,
        max_length=request.max_tokens,
        min_length=request.min_tokens,
        suppress_tokens=[start],
        eos_token_id=request.end,
        pad_token_id=request.end,
        use_cache=False,
    )
    return found.unflatten(0, (len(pixels), BEAMS)).tolist()


def _scorer(model: Any) -> Any:
    """open_clip's model as transformers wants one to be."""
    transformers = peer_module("transformers")
    output = importlib.import_module("transformers.modeling_outputs").CausalLMOutput

    class Scorer(transformers.PreTrainedModel, transformers.GenerationMixin):
        def __init__(self):
            super().__init__(transformers.PretrainedConfig())
            self.scored = model

        def prepare_inputs_for_generation(
            self, input_ids: Tensor, image_tokens: Tensor, attention_mask: Tensor, **_: object
        ) -> dict[str, Any]:
            return {"input_ids": input_ids, "image_tokens": image_tokens}

        def forward(self, input_ids: Tensor, image_tokens: Tensor, **_: object) -> Any:
            logits = self.scored(
                None, input_ids, image_latent=image_tokens, image_embs=image_tokens, output_labels=False
            )["logits"]
            return output(logits=logits)

    return Scorer().eval()
