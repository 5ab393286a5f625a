"""The command that scores captions which were written before, by this package or any other."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from contracap.cli.flags import Flags, PathText, arg
from contracap.cli.messages import say, try_write
from contracap.cli.options import Model, ModelFlags, ResultFile, check_outputs, command_line
from contracap.evaluation.metrics.scores import ONE_IMAGE
from contracap.evaluation.metrics.spice import MEMORY
from contracap.evaluation.metrics.tokens import TokenizerName

if TYPE_CHECKING:
    from contracap.evaluation.metrics.scores import Scores
    from contracap.evaluation.predictions import Prediction


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """References and metrics of `contracap score`."""

    references: Annotated[Path | None, "FILE"] = None
    """For results in the format of COCO: the annotations with the captions that people wrote."""
    metrics: Annotated[tuple[str, ...], "NAME"] = ()
    """Some of bleu, rouge_l, cider, meteor, spice, cider_plain. The default is all that can run, except cider_plain."""
    tokenizer: TokenizerName | None = None
    """`java` is the tokenizer of published figures, and the default where it can run."""
    corenlp_dir: Annotated[Path | None, "DIR"] = None
    """For SPICE: folder with the jars of CoreNLP 3.6.0. The default is $CONTRACAP_CORENLP_DIR."""
    spice_memory: Annotated[str, "SIZE"] = MEMORY
    """For SPICE: the most memory that Java may use, such as 4g."""
    clipscore: Annotated[PathText | None, "WEIGHTS"] = None
    """Weights that compute CLIPScore and RefCLIPScore."""
    images: Annotated[Path | None, "DIR"] = None
    """For --clipscore: folder of the images, whose names are under `image_name`, or COCO's `file_name`."""


def score(
    file: Annotated[
        Path,
        arg(
            metavar="FILE.json",
            help='A list of {"captions": [...], "prediction": "..."}, or results in the format of COCO.',
        ),
    ],
    /,
    *,
    config: Annotated[ScoreConfig, Flags] = ScoreConfig(),
    model_flags: Model = ModelFlags(),
    json: ResultFile = None,
) -> int:
    """Score captions against those that people wrote: BLEU, ROUGE_L, CIDEr, METEOR and SPICE."""
    from contracap.evaluation.metrics.scores import CaptionScorer
    from contracap.evaluation.result import Result

    if config.clipscore is None and (config.images is not None or model_flags != ModelFlags()):
        raise ValueError(
            "--images, --size, --device and --precision belong to the model of --clipscore: name it, or leave them out"
        )
    check_outputs([file, config.references, config.clipscore], json=json)
    scorer = CaptionScorer(
        metrics=config.metrics,
        tokenizer=config.tokenizer,
        corenlp=config.corenlp_dir,
        spice_memory=config.spice_memory,
    )
    entries = _read_entries(file, config.references)
    captions, predictions = [entry.captions for entry in entries], [entry.prediction for entry in entries]
    clipscores = _clipscores(entries, config, model_flags)  # first: an image may be damaged
    scores = scorer.score(captions, predictions, domains=[entry.domain for entry in entries])
    if clipscores is not None:
        scores.add_clipscore(*clipscores, model=str(config.clipscore))
    result = Result.of_samples(
        [entry.key for entry in entries],
        scores.figures,
        per_sample=scores.per_sample,
        reasons=scores.reasons,
        details=scores.details,
    )
    kept = json is None or try_write(replace(result, command=command_line()).write, json)
    _print(scores, insist=bool(config.metrics))
    return 1 if not kept or (config.metrics and set(scores.reasons.values()) - {ONE_IMAGE}) else 0


def _read_entries(file: Path, references: Path | None) -> "list[Prediction]":
    from contracap.evaluation.predictions import read_predictions, read_references

    known = None if references is None else read_references(references)
    entries = read_predictions(file, known)
    if known is not None and len(entries) < len(known):
        say(
            f"contracap: {len(known) - len(entries):,} of {len(known):,} images of {references} are not in {file}: "
            f"they do not count",
            to_stderr=True,
        )
    return entries


def _clipscores(
    entries: "Sequence[Prediction]", config: ScoreConfig, model_flags: ModelFlags
) -> tuple[list[float], list[float]] | None:
    """Return CLIPScore and RefCLIPScore of each entry; None if nobody asked for them."""
    if config.clipscore is None:
        return None
    from contracap.evaluation.metrics.clipscore import ClipScorer

    images = _image_paths(entries, config.images)
    judge = ClipScorer(*model_flags.load(config.clipscore), name=config.clipscore)
    return judge.score(images, [entry.prediction for entry in entries], [entry.captions for entry in entries])


def _image_paths(entries: "Sequence[Prediction]", folder: Path | None) -> list[Path]:
    """Return the image of each entry.

    Raises: ValueError, FileNotFoundError: naming the first that has none.
    """
    if folder is None:
        raise ValueError("--clipscore looks at the images: name their folder with --images DIR")
    paths = []
    for number, entry in enumerate(entries):
        if entry.image_name is None:
            raise ValueError(
                f"entry {number} (counted from 0) does not tell its image, under `image_name` or COCO's `file_name`"
            )
        try:
            paths.append(_find_image(folder / entry.image_name))
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"entry {number} (counted from 0): {error}") from None
    return paths


def _find_image(path: Path) -> Path:
    """Return the file at a path, or the only image there with a suffix: names of a shard's samples have none."""
    from contracap.data.samples import IMAGE_SUFFIXES

    if path.is_file():
        return path
    suffixes = [f".{written}" for suffix in IMAGE_SUFFIXES for written in (suffix, suffix.upper())]
    found = [image for suffix in suffixes if (image := path.with_name(path.name + suffix)).is_file()]
    if not found:
        raise FileNotFoundError(f"no image at {path}, with or without a suffix such as .jpg")
    if len(found) > 1:
        raise ValueError(
            f"several images could be {path}: {', '.join(image.name for image in found)}; move all but one"
        )
    return found[0]


def _print(scores: "Scores", *, insist: bool) -> None:
    """Print the figures, and on stderr what is missing; with `insist` also if --quiet was given."""
    for name, value in scores.figures.items():
        print(f"{name:24}{value:.4f}")
    if reason := scores.details.get("tokenizer_reason"):
        say(f"contracap: the Python tokenizer made the tokens: {' '.join(reason.split())}", to_stderr=True)
    for name, reason in scores.reasons.items():
        line = f"contracap: {name} left out: {' '.join(reason.split())}"
        print(line, file=sys.stderr) if insist else say(line, to_stderr=True)
