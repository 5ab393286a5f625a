"""The verb that scores captions which were written before, by this package or any other."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from contracap.cli.errors import say, written
from contracap.cli.options import PathText, ResultFile, Size, arg, check_outputs, command_line, load_model
from contracap.evaluation.metrics.scores import METRICS, ONE_IMAGE, metric_names
from contracap.evaluation.metrics.spice import MEMORY
from contracap.evaluation.metrics.tokens import TokenizerName

if TYPE_CHECKING:
    from contracap.evaluation.predictions import Prediction


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
    references: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            help="For results in the format of COCO: the annotations with the captions that people wrote.",
        ),
    ] = None,
    metrics: Annotated[
        tuple[str, ...],
        arg(
            metavar="NAME", help=f"Some of {', '.join(METRICS)}. The default is all that can run, except {METRICS[-1]}."
        ),
    ] = (),
    tokenizer: Annotated[
        TokenizerName | None,
        arg(help="`java` is the tokenizer of published figures, and the default where it can run."),
    ] = None,
    corenlp_dir: Annotated[
        Path | None,
        arg(
            metavar="DIR",
            help="For SPICE: folder with the jars of CoreNLP 3.6.0. The default is $CONTRACAP_CORENLP_DIR.",
        ),
    ] = None,
    spice_memory: Annotated[
        str, arg(metavar="SIZE", help="For SPICE: the most memory that Java may use, such as 4g.")
    ] = MEMORY,
    clipscore: Annotated[
        PathText | None, arg(metavar="WEIGHTS", help="Weights that compute CLIPScore and RefCLIPScore.")
    ] = None,
    images: Annotated[
        Path | None,
        arg(
            metavar="DIR",
            help="For --clipscore: folder of the images, whose names are under `image_name`, or COCO's `file_name`.",
        ),
    ] = None,
    size: Size = None,
    json: ResultFile = None,
) -> int:
    """Score captions against those that people wrote: BLEU, ROUGE_L, CIDEr, METEOR and SPICE."""
    from contracap.evaluation.metrics.scores import CaptionScorer
    from contracap.evaluation.predictions import read_predictions, read_references
    from contracap.evaluation.result import Result

    if clipscore is None and (images is not None or size is not None):
        raise ValueError("--images and --size belong to the model of --clipscore: name it, or leave them out")
    check_outputs([file, references, clipscore], json=json)
    scorer = CaptionScorer(
        metrics=metric_names(metrics), tokenizer=tokenizer, corenlp=corenlp_dir, spice_memory=spice_memory
    )
    known = None if references is None else read_references(references)
    entries = read_predictions(file, known)
    if known is not None and len(entries) < len(known):
        say(
            f"contracap: {len(known) - len(entries):,} of {len(known):,} images of {references} are not in {file}: "
            f"they do not count",
            to_stderr=True,
        )
    judge, pictures = None, list[Path]()
    if clipscore is not None:
        from contracap.evaluation.metrics.clipscore import ClipScorer

        pictures = _pictures(entries, images)
        judge = ClipScorer(*load_model(clipscore, size), name=clipscore)
    captions, predictions = [entry.captions for entry in entries], [entry.prediction for entry in entries]
    suits = None if judge is None else judge.score(pictures, predictions, captions)  # first: an image may be damaged
    scores = scorer.score(captions, predictions, domains=[entry.domain for entry in entries])
    if judge is not None and suits is not None:
        scores.add_clipscore(*suits, model=judge.name)
    result = Result.of_samples(
        [entry.key for entry in entries],
        scores.figures,
        per_sample=scores.per_sample,
        reasons=scores.reasons,
        details=scores.details,
    )
    kept = json is None or written(replace(result, command=command_line()).write, json)
    for name, value in scores.figures.items():
        print(f"{name:24}{value:.4f}")
    if reason := scores.details.get("tokenizer_reason"):
        say(f"contracap: the Python tokenizer made the tokens: {' '.join(reason.split())}", to_stderr=True)
    for name, reason in scores.reasons.items():
        line = f"contracap: {name} left out: {' '.join(reason.split())}"
        print(line, file=sys.stderr) if metrics else say(line, to_stderr=True)
    return 1 if not kept or (metrics and set(scores.reasons.values()) - {ONE_IMAGE}) else 0


def _pictures(entries: "list[Prediction]", folder: Path | None) -> list[Path]:
    """The image of each entry.

    Raises: ValueError, FileNotFoundError: naming the first that has none.
    """
    if folder is None:
        raise ValueError("--clipscore looks at the images: name their folder with --images DIR")
    paths = []
    for number, entry in enumerate(entries):
        if entry.picture is None:
            raise ValueError(
                f"entry {number} (counted from 0) does not tell its image, under `image_name` or COCO's `file_name`"
            )
        paths.append(folder / entry.picture)
        if not paths[-1].is_file():
            raise FileNotFoundError(f"no image of entry {number} (counted from 0) at {paths[-1]}")
    return paths
