"""The verbs that use a model, and measure it or its speed. The result is written before it is printed: a pipe that is
closed must not cost what took hours."""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from contracap.cli.errors import fail, message
from contracap.cli.options import Beams, LengthPenalty, ResultFile, Size, WeightsName, command_line, load_model

if TYPE_CHECKING:
    from contracap.bench.timing import Row
    from contracap.evaluation.result import Evaluator
    from contracap.generation.beam import BeamSearch
    from contracap.generation.captioner import Caption, Captioner
    from contracap.processor import Processor

BATCH = 16  # pictures at a time


def evaluate(
    weights: WeightsName,
    /,
    *,
    task: Annotated[Literal["retrieval", "captioning", "zeroshot"], arg(help="what to measure")],
    data: Annotated[tuple[str, ...], arg(metavar="PATH [PATH ...]", help="a folder of tar shards, or shards")],
    classes: Annotated[
        Path | None, arg(metavar="FILE", help="for zeroshot: a JSON list of names, or a JSON object with `classes`")
    ] = None,
    templates: Annotated[
        Path | None, arg(metavar="FILE", help="for zeroshot: a JSON list of prompts, {} where the name goes")
    ] = None,
    beams: Beams = 6,
    length_penalty: LengthPenalty = 1.0,
    size: Size = None,
    json: ResultFile = None,
) -> None:
    """Measure a model on tar shards."""
    from contracap.evaluation.result import measure
    from contracap.generation.beam import BeamSearch

    strategy = BeamSearch(width=beams, length_penalty=length_penalty)  # refused before the weights are read
    model, processor = load_model(weights, size)
    result = measure(_evaluator(task, data, processor, classes, templates, strategy), model, command=command_line())
    if json is not None:
        result.write(json)
    for name, value in result.figures.items():
        print(f"{name:24}{f'{value:.4f}' if value is not None else f'none: {result.reasons[name]}'}")


def caption(
    weights: WeightsName,
    paths: Annotated[tuple[str, ...], arg(metavar="PATH [PATH ...]", help="pictures, or folders of them")],
    /,
    *,
    beams: Beams = 6,
    length_penalty: LengthPenalty = 1.0,
    size: Size = None,
    json: ResultFile = None,
) -> int:
    """Write a caption for each picture: its path, a tab, the text. Unreadable pictures are listed at the end."""
    from contracap.evaluation.result import Result
    from contracap.generation.beam import BeamSearch
    from contracap.generation.captioner import Captioner

    strategy = BeamSearch(width=beams, length_penalty=length_penalty)
    pictures = list(_pictures(paths))
    captioner = Captioner(*load_model(weights, size))
    rows, unreadable = [], []
    for first in range(0, len(pictures), BATCH):
        for path, made in _captions(captioner, pictures[first : first + BATCH], strategy):
            if isinstance(made, ValueError):
                unreadable.append(made)
            else:
                print(f"{path}\t{_one_line(made.text)}", flush=True)
                rows.append({"path": str(path), "caption": made.text, "score": made.score})
    if json is not None:
        figures = {"unreadable": float(len(unreadable))}
        Result(command=command_line(), seed=None, samples=len(rows), figures=figures, details={"captions": rows}).write(
            json
        )
    for error in unreadable:
        fail(message(error))
    return 1 if unreadable else 0


def bench(
    name: Annotated[
        Literal["data", "train", "generate"], arg(metavar="NAME", help="what to measure: data, train or generate")
    ],
    /,
    *,
    rounds: Annotated[int, arg(help="timed runs of each side, 7 at least")] = 7,
    device: Annotated[Literal["cpu", "cuda"], arg(help="for train and generate")] = "cpu",
    rows: Annotated[tuple[str, ...], arg(metavar="NAME", help="for train and generate, which rows; all if none")] = (),
    json: ResultFile = None,
) -> None:
    """Measure speed and memory, beside open_clip in the same run where it is installed."""
    from contracap.bench.data import bench_data
    from contracap.bench.generate import bench_generate
    from contracap.bench.train import bench_train

    training = partial(bench_train, device=device, rows=rows)
    generating = partial(bench_generate, device=device, rows=rows, report=_report)
    benchmark = {"data": bench_data, "train": training, "generate": generating}[name](rounds=rounds)
    if json is not None:
        benchmark.result(command_line()).write(json)
    print(benchmark.table())


def _report(row: "Row") -> None:
    """A row as soon as it is done: a later one may fail, hours on."""
    from contracap.bench.timing import Benchmark

    print(Benchmark(rows=[row], samples=0, seed=0, machine={}).table(), file=sys.stderr, flush=True)


def _evaluator(
    task: str,
    data: tuple[str, ...],
    processor: "Processor",
    classes: Path | None,
    templates: Path | None,
    strategy: "BeamSearch",
) -> "Evaluator":
    from contracap.evaluation.captioning import Captioning
    from contracap.evaluation.retrieval import Retrieval
    from contracap.evaluation.zeroshot import TEMPLATES, ZeroShot, load_classes, load_templates

    if task == "retrieval":
        return Retrieval(data, processor)
    if task == "captioning":
        return Captioning(data, processor, strategy=strategy)
    if classes is None:
        raise ValueError(
            "zeroshot needs the names of the classes: --classes FILE, a JSON list in the order of the labels"
        )
    prompts = load_templates(templates) if templates else TEMPLATES
    return ZeroShot(data, processor, classes=load_classes(classes), templates=prompts)


def _pictures(paths: Sequence[str]) -> Iterator[Path]:
    """The files among `paths`, and the pictures in its folders by name."""
    from contracap.data.shards import PICTURE_SUFFIXES

    if not paths:
        raise ValueError("nothing to caption: give pictures, or folders of them")
    for path in map(Path, paths):
        if not path.is_dir():
            if not path.exists():
                raise FileNotFoundError(f"no such picture or folder: {path}")
            yield path
            continue
        found = sorted(file for file in path.iterdir() if file.suffix.lower().lstrip(".") in PICTURE_SUFFIXES)
        if not found:
            raise FileNotFoundError(f"no pictures in the folder {path}")
        yield from found


def _captions(
    captioner: "Captioner", pictures: Sequence[Path], strategy: "BeamSearch"
) -> "Iterator[tuple[Path, Caption | ValueError]]":
    """A caption for each picture, or why it cannot be read; then the others of its batch go one by one."""
    from contracap.image import ImageError

    try:
        yield from zip(pictures, captioner(pictures, strategy, batch_size=len(pictures)), strict=True)
    except ImageError as error:
        if len(pictures) == 1:
            yield pictures[0], error
        else:
            for picture in pictures:
                yield from _captions(captioner, [picture], strategy)


def _one_line(text: str) -> str:
    """The text without tabs and whatever else ends a line: a model may write any character."""
    return " ".join(text.split())
