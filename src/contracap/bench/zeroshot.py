"""How fast a classifier is made of prompts: beside open_clip's, with the same weights and prompts."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from contracap.bench.caption_pair import Setting
from contracap.bench.steps import released
from contracap.bench.timing import (
    LEAST_ROUNDS,
    Benchmark,
    Row,
    UnequalError,
    Work,
    compare,
    peer_module,
    this_machine,
)
from contracap.evaluation.published import IMAGENET, published
from contracap.evaluation.zeroshot import PROMPTS, classifier, mean_per_class
from contracap.model.coca import CoCa
from contracap.pretrained import random_model
from contracap.pretrained.names import to_open_clip

Device = Literal["cpu", "cuda"]

B_32 = "coca_ViT-B-32"
CLASSES = 100
PEER_CLASSES = 10  # at a time: open_clip's default
TOLERANCE = 1e-5  # of a class's unit vector, in each place


def bench_zeroshot(
    *,
    rounds: int = LEAST_ROUNDS,
    device: Device = "cpu",
    rows: Sequence[str] = (),
    seed: int = 0,
    report: Callable[[Row], object] = lambda row: None,
) -> Benchmark:
    """Speed of building a classifier of ImageNet's first classes in its 80 templates, in fp32.

    Args:
        rounds: of each comparison.
        device: of all rows.
        rows: which to measure, by their names in `ROWS`; none means all.
        report: is told of each row when it is done.

    Raises:
        UnequalError: if the classifiers differ.
        ValueError: for a row that there is not, too few rounds, or `cuda` where torch finds none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', but torch finds no CUDA device; say cpu")
    if unknown := [name for name in rows if name not in ROWS]:
        raise ValueError(f"no row {unknown[0]!r} in this benchmark; the rows are {', '.join(ROWS)}")
    setting = Setting(device=torch.device(device), rounds=rounds, seed=seed)
    machine = this_machine() | {"device": device}
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(setting.device)
    measured = []
    for name in rows or ROWS:
        measured.append(ROWS[name](setting))
        report(measured[-1])
    return Benchmark(rows=measured, samples=CLASSES, seed=seed, machine=machine)


class Side:
    """Our classifier of a size with random weights."""

    def __init__(self, size: str, setting: Setting, *, classes: int):
        ours, self.processor = random_model(released(size), seed=setting.seed)
        self.model: CoCa = ours.to(setting.device).eval()
        self.size, self.device = size, setting.device
        self.names = published(IMAGENET).classes[:classes]
        self.templates = published(IMAGENET).templates

    @property
    def prompts(self) -> list[str]:
        """In the order in which we encode them."""
        return [template.replace("{}", name) for template in self.templates for name in self.names]

    def build(self) -> Float[Tensor, "class embed"]:
        """As everyone is given it."""
        return classifier(self.model, self.processor, self.names, self.templates)

    @torch.inference_mode()
    def build_without_sharing(self) -> Float[Tensor, "class embed"]:
        """The same prompts in the same batches, packed, each with its whole beginning."""
        text, embeddings, prompts = self.model.text, [], self.prompts
        for first in range(0, len(prompts), PROMPTS):
            ids = self.processor.texts(prompts[first : first + PROMPTS]).to(self.device)
            embeddings.append(text.contrastive(ids))
        return mean_per_class(torch.cat(embeddings), classes=len(self.names))

    def rows_a_prompt(self, *, shares: bool) -> float:
        """Rows that the text encoder computes."""
        prompts, rows = self.prompts, 0
        for first in range(0, len(prompts), PROMPTS):
            ids = self.processor.texts(prompts[first : first + PROMPTS])
            text = self.model.text
            rows += len(text.layout(ids, text.checked_lengths(ids, None), sharing=shares).cells)
        return rows / len(prompts)


class Peer:
    """open_clip's model with the same weights, and its own way to a classifier.

    Raises:
        NoPeerError: if open_clip is not installed.
    """

    def __init__(self, ours: Side):
        open_clip = peer_module("open_clip")
        self.model = open_clip.create_model(ours.size, load_weights=False)
        self.model.load_state_dict(to_open_clip(ours.model.state_dict(), ours.model.config))
        self.model.to(ours.device).eval()
        self._build = partial(
            open_clip.build_zero_shot_classifier,
            self.model,
            tokenizer=open_clip.get_tokenizer(ours.size),
            templates=ours.templates,
            num_classes_per_batch=PEER_CLASSES,
            device=ours.device,
        )

    def build(self, names: Sequence[str]) -> Float[Tensor, "class embed"]:
        """By its `build_zero_shot_classifier`."""
        return self._build(classnames=names).T


def classifier_row(setting: Setting, *, size: str = B_32, classes: int = CLASSES) -> Row:
    """Ours beside open_clip's. It encodes ten classes at a time, each prompt filled up to the context, so that each
    ten are the same work: it is timed on the first ten, and all its classes are compared to ours before.

    Raises:
        UnequalError: if they differ; nothing is timed then.
    """
    ours = Side(size, setting, classes=classes)
    part = ours.names[:PEER_CLASSES]

    def checked_peer() -> tuple[Work, str]:
        peer = Peer(ours)
        note = require_equal_rows(ours.build(), peer.build(ours.names))
        note = f"{note}; both in fp32; open_clip timed on {len(part)} of the classes, which it encodes at a time"
        return partial(peer.build, part), note

    return compare(
        f"{size}, classifier of {classes} classes x {len(ours.templates)} prompts",
        ours=ours.build,
        checked_peer=checked_peer,
        items=classes * len(ours.templates),
        unit="prompts/s",
        rounds=setting.rounds,
        clock=setting.clock,
        share=len(part) / classes,
    )


def sharing_row(setting: Setting, *, size: str = B_32, classes: int = CLASSES) -> Row:
    """Ours beside the same without shared beginnings."""
    ours = Side(size, setting, classes=classes)

    def checked_peer() -> tuple[Work, str]:
        note = require_equal_rows(ours.build(), ours.build_without_sharing())
        shared, whole = (ours.rows_a_prompt(shares=shares) for shares in (True, False))
        context = len(ours.model.text.position)
        return ours.build_without_sharing, (
            f"{note}; {shared:.1f} rows a prompt, {whole:.1f} without sharing, {context} without packing"
        )

    return compare(
        f"{size}, the same beside ours without shared beginnings",
        ours=ours.build,
        checked_peer=checked_peer,
        items=classes * len(ours.templates),
        unit="prompts/s",
        rounds=setting.rounds,
        clock=setting.clock,
    )


def require_equal_rows(ours: Float[Tensor, "class embed"], peer: Float[Tensor, "class embed"]) -> str:
    """Says how far two classifiers agree.

    Raises:
        UnequalError: if one place of a class's vector is further off than `TOLERANCE`, or not a number.
    """
    difference = float((ours - peer).abs().max())
    if not difference <= TOLERANCE:
        raise UnequalError(f"the classifiers are {difference:.1e} apart, allowed is {TOLERANCE:.0e}")
    apart = float((ours[:, None] - ours).abs().amax(dim=2).fill_diagonal_(torch.inf).min())
    return (
        f"weights differ by {difference:.1e} at most (allowed: {TOLERANCE:.0e}), "
        f"those of two classes by {apart:.1e} at least"
    )


ROWS: dict[str, Callable[[Setting], Row]] = {"classifier": classifier_row, "sharing": sharing_row}
