"""open_clip's captions, from a process of its own: they need a transformers whose tokenizers and hub client are older
than ours, so a folder of packages comes first there. Nothing that is imported here may import tokenizers."""

import importlib
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.peers import MissingPeerError, peer_module

PACKAGES = Path(os.environ.get("CONTRACAP_PEERS") or Path(sys.prefix, "peers", "transformers-4.49"))
VERSIONED = ("open_clip", "transformers", "tokenizers")
BEAMS, GROUPS = 6, 3  # open_clip's defaults

# groups: open_clip's default, 6 beams in 3 groups. top_k: its sampling with the default top_k of 1, which is greedy.
# transformers: the beam search of transformers with 6 beams, on the logits of open_clip's model.
Way = Literal["groups", "top_k", "transformers"]


class OpenClipCaptions:
    """A process with open_clip's model.

    Args:
        weights: a folder in open_clip's layout.
        pixels: of the images to caption.
        end: id of the end token; the start token's is one lower.

    Attributes:
        versions: of the packages that write the captions.

    Raises:
        MissingPeerError: if the packages or open_clip are not installed.
    """

    def __init__(self, weights: Path, pixels: Tensor, end: int):
        if not PACKAGES.is_dir():
            raise MissingPeerError(
                f"open_clip captions with transformers 4.49, and there is none at {PACKAGES}: make setup"
            )
        self._process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        try:
            load = self._process.submit(_load, PACKAGES, torch.get_num_threads(), weights, pixels, end)
            self.versions: dict[str, str] = load.result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        self._process.shutdown()

    def __call__(self, way: Way, max_tokens: int, min_tokens: int) -> list[list[list[int]]]:
        """The captions of each image, best first: one, or from `transformers` as many as beams. All ids, the start
        token first.

        Args:
            max_tokens: of the longest sequence, start and end token included.
            min_tokens: the end token is forbidden while the sequence is shorter than this.
        """
        return self._process.submit(_captions, way, max_tokens, min_tokens).result()


_loaded: dict[str, Any] = {}  # in the process


def _load(packages: Path, threads: int, weights: Path, pixels: Tensor, end: int) -> dict[str, str]:
    sys.path.insert(0, str(packages))
    torch.set_num_threads(threads)
    model = peer_module("open_clip").create_model(f"local-dir:{weights}", device=pixels.device).eval()
    _loaded.update(model=model, pixels=pixels, end=end)
    return {name: peer_module(name).__version__ for name in VERSIONED}


@torch.inference_mode()
def _captions(way: Way, max_tokens: int, min_tokens: int) -> list[list[list[int]]]:
    model, pixels, end = _loaded["model"], _loaded["pixels"], _loaded["end"]
    if way == "transformers":
        return _captions_by_transformers(model, pixels, end, max_tokens, min_tokens)
    found = model.generate(
        pixels,
        seq_len=max_tokens,
        min_seq_len=min_tokens,
        sot_token_id=end - 1,
        eos_token_id=end,
        generation_type="beam_search" if way == "groups" else "top_k",
        num_beams=BEAMS,
        num_beam_groups=GROUPS,
    )
    return [[ids] for ids in found.tolist()]


def _captions_by_transformers(
    model: Any, pixels: Tensor, end: int, max_tokens: int, min_tokens: int
) -> list[list[list[int]]]:
    """`GenerationMixin.generate` with `early_stopping="never"` on open_clip's text decoder: see `BeamSearch`."""
    _, image_tokens = model._encode_image(pixels)
    found = _for_transformers(model).generate(
        torch.full((len(pixels), 1), end - 1, device=pixels.device),
        attention_mask=torch.ones(len(pixels), 1, device=pixels.device),  # else it is guessed from the padding
        image_tokens=image_tokens,
        num_beams=BEAMS,
        num_return_sequences=BEAMS,
        do_sample=False,
        early_stopping="never",
        length_penalty=1.0,
        max_length=max_tokens,
        min_length=min_tokens,
        suppress_tokens=[end - 1],
        eos_token_id=end,
        pad_token_id=end,
        use_cache=False,
    )
    return found.unflatten(0, (len(pixels), BEAMS)).tolist()


def _for_transformers(model: Any) -> Any:
    """open_clip's model with the interface that transformers generates from."""
    transformers = peer_module("transformers")
    output = importlib.import_module("transformers.modeling_outputs").CausalLMOutput

    class Decoder(transformers.PreTrainedModel, transformers.GenerationMixin):
        def __init__(self):
            super().__init__(transformers.PretrainedConfig())
            self.model = model

        def prepare_inputs_for_generation(
            self, input_ids: Tensor, image_tokens: Tensor, attention_mask: Tensor, **_: object
        ) -> dict[str, Any]:
            return {"input_ids": input_ids, "image_tokens": image_tokens}

        def forward(self, input_ids: Tensor, image_tokens: Tensor, **_: object) -> Any:
            logits = self.model(
                None, input_ids, image_latent=image_tokens, image_embs=image_tokens, output_labels=False
            )["logits"]
            return output(logits=logits)

    return Decoder().eval()
