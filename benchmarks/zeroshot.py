"""Speed of making a zero-shot classifier from prompts, next to open_clip with the same weights and prompts."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.harness import Benchmark, Row, Run, UnequalError, Work, compare
from benchmarks.open_clip_models import legacy_config, open_clip_model
from benchmarks.peers import peer_module
from contracap.evaluation.class_names import IMAGENET, published_set
from contracap.evaluation.zeroshot import PROMPTS, build_classifier, mean_per_class
from contracap.pretrained import random_model

SIZE = "coca_ViT-B-32"
CLASSES = 100
PEER_CLASSES = 10  # at a time: open_clip's default
TOLERANCE = 1e-5  # of each number in a class's unit vector


class Classifier:
    """Our classifier of ImageNet's first classes in its 80 templates, by a model with random weights, in fp32."""

    def __init__(self, run: Run):
        self.size, self.device = run.size(SIZE), run.device
        self.model, self.processor = random_model(legacy_config(self.size), seed=run.seed)
        self.model.to(run.device).eval()
        classes, self.templates = published_set(IMAGENET).classes, published_set(IMAGENET).templates
        self.names = classes[: run.count(CLASSES, small=PEER_CLASSES)]

    def build(self) -> Float[Tensor, "class embed"]:
        """The classifier as every user gets it."""
        return build_classifier(self.model, self.processor, self.names, self.templates)

    @torch.inference_mode()
    def build_without_sharing(self) -> Float[Tensor, "class embed"]:
        """The same prompts in the same batches, but the beginnings that prompts share are computed for each of them."""
        text, embeddings = self.model.text, []
        prompts = [template.replace("{}", name) for template in self.templates for name in self.names]
        for first in range(0, len(prompts), PROMPTS):
            ids = self.processor.texts(prompts[first : first + PROMPTS]).to(self.device)
            embeddings.append(text.contrastive(ids))
        return mean_per_class(torch.cat(embeddings), classes=len(self.names))


def open_clip_builder(ours: Classifier) -> Callable[[Sequence[str]], Float[Tensor, "class embed"]]:
    """open_clip's classifier of some classes, with the same weights and templates.

    Raises:
        MissingPeerError: if open_clip is not installed.
    """
    open_clip = peer_module("open_clip")
    build = partial(
        open_clip.build_zero_shot_classifier,
        open_clip_model(ours.size, ours.model).to(ours.device).eval(),
        tokenizer=open_clip.get_tokenizer(SIZE) if ours.size == SIZE else ours.processor.texts,
        templates=ours.templates,
        num_classes_per_batch=PEER_CLASSES,
        device=ours.device,
    )
    return lambda names: build(classnames=names).T


def classifier_row(run: Run) -> Row:
    """Ours next to open_clip's, which encodes ten classes at a time, each prompt padded to the context, so that every
    ten are the same work: it is timed on the first ten. All of its classes are compared with ours."""
    ours = Classifier(run)
    part = ours.names[:PEER_CLASSES]

    def checked_peer() -> tuple[Work, str]:
        build = open_clip_builder(ours)
        note = require_equal_weights(ours.build(), build(ours.names))
        note = f"{note}; both in fp32; open_clip timed on {len(part)} of the classes, which it encodes at a time"
        return partial(build, part), note

    return compare(
        f"{ours.size}, classifier of {len(ours.names)} classes x {len(ours.templates)} prompts",
        run=run,
        ours=ours.build,
        checked_peer=checked_peer,
        items=len(ours.names) * len(ours.templates),
        unit="prompts/s",
        share=len(part) / len(ours.names),
    )


def sharing_row(run: Run) -> Row:
    """Ours next to the same without shared beginnings."""
    ours = Classifier(run)

    def checked_peer() -> tuple[Work, str]:
        return ours.build_without_sharing, require_equal_weights(ours.build(), ours.build_without_sharing())

    return compare(
        f"{ours.size}, the same, next to ours without shared beginnings",
        run=run,
        ours=ours.build,
        checked_peer=checked_peer,
        items=len(ours.names) * len(ours.templates),
        unit="prompts/s",
    )


def require_equal_weights(ours: Float[Tensor, "class embed"], peer: Float[Tensor, "class embed"]) -> str:
    """Say how far two classifiers agree.

    Raises:
        UnequalError: if a number is further off than the tolerance, or NaN.
    """
    difference = float((ours - peer).abs().max())
    if not difference <= TOLERANCE:
        raise UnequalError(f"the classifiers are {difference:.1e} apart, allowed is {TOLERANCE:.0e}")
    apart = float((ours[:, None] - ours).abs().amax(dim=2).fill_diagonal_(torch.inf).min())
    return (
        f"weights differ by {difference:.1e} at most (allowed: {TOLERANCE:.0e}), "
        f"those of two classes by {apart:.1e} at least"
    )


BENCHMARK = Benchmark(rows={"classifier": classifier_row, "sharing": sharing_row}, samples=lambda: CLASSES, cuda=True)
