"""The verbs of the command line. Whatever needs torch is imported inside them, so that `--help` answers at once."""

import logging
import os
import shlex
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

try:
    from tyro.conf import DisallowNone, arg
    from tyro.extras import SubcommandApp
except ModuleNotFoundError:
    sys.exit("contracap: error: the command line needs the package tyro: pip install tyro")

if TYPE_CHECKING:
    from contracap.evaluation.result import Evaluator
    from contracap.generation.beam import BeamSearch
    from contracap.generation.captioner import Caption, Captioner
    from contracap.model.coca import CoCa, CoCaConfig
    from contracap.processor import Processor

WeightsName = Annotated[
    str, arg(metavar="WEIGHTS", help="a run's checkpoint, a weights file, a folder or an hf-hub: name")
]
Size = Annotated[str | None, arg(metavar="NAME", help="the model's size, if the weights do not tell")]
ResultFile = Annotated[Path | None, arg(metavar="OUT", help="file for the result")]
Beams = Annotated[int, arg(help="for captions: how many are searched side by side for a picture; 1 is greedy decoding")]
LengthPenalty = Annotated[
    float,
    arg(help="for captions: ranked by log-probability / length to this power; 0 ranks by the sum, for shorter ones"),
]
Workers = Annotated[int | None, arg(metavar="N", help="processes; by default one for each core")]
BATCH = 16  # pictures at a time


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status: 0, 1 for wrong input, or 75 where the same call can go on. A call that
    cannot be parsed exits with 2."""
    weights = SubcommandApp()
    weights.command(inspect)
    weights.command(convert)
    shards = SubcommandApp()
    for verb in (make, index, show):
        shards.command(verb)
    app = SubcommandApp()
    for verb in (quickstart, train, evaluate, caption, plan, bench):
        app.command(verb)
    app.command(shards, name="shards", help="Make tar shards of any source, index them, and look at them.")
    app.command(
        weights, name="weights", help="Look into weights files, and convert them to and from open_clip's layout."
    )
    try:
        status = app.cli(
            prog="contracap",
            description="Contrastive captioners: train, caption, classify, retrieve, evaluate.",
            args=arguments,
            config=(DisallowNone,),
        )
    except KeyboardInterrupt:
        return _fail("interrupted", status=130)
    except Exception as error:
        if not _is_for_the_user(error):
            raise
        return _fail(_message(error), status=getattr(error, "exit_status", 1))
    return status or 0


def quickstart(
    *, out: Annotated[Path, arg(metavar="DIR", help="folder for results.json, report.html and the run")]
) -> None:
    """Train a small model on pictures it draws itself, then caption, classify and retrieve; no download."""
    from contracap.quickstart import quickstart as run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run(out)


def train(
    recipe: Annotated[Path, arg(metavar="RECIPE.toml", help="what to train, on what, how long, and where it goes")],
    overrides: Annotated[
        tuple[str, ...],
        arg(
            metavar="[KEY.PATH=VALUE ...]", help="changes to it, such as out=runs/first data.batch_size=64 resume=true"
        ),
    ] = (),
    /,
) -> None:
    """Train as a recipe says; its key `out` is the run folder."""
    from contracap.recipe import load_recipe
    from contracap.trainer import train as run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(run(load_recipe(recipe, overrides)))


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
    model, processor = _load(weights, size)
    result = measure(_evaluator(task, data, processor, classes, templates, strategy), model, command=_command())
    for name, value in result.figures.items():
        print(f"{name:24}{f'{value:.4f}' if value is not None else f'none: {result.reasons[name]}'}")
    if json is not None:
        result.write(json)


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
    captioner = Captioner(*_load(weights, size))
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
        Result(command=_command(), seed=None, samples=len(rows), figures=figures, details={"captions": rows}).write(
            json
        )
    for error in unreadable:
        _fail(_message(error))
    return 1 if unreadable else 0


def make(
    source: Annotated[Path, arg(metavar="SOURCE", help="a folder, a table, JSON or a token file: docs/data.md")],
    /,
    *,
    out: Annotated[Path, arg(metavar="DIR", help="folder for the shards, index.json and skipped.jsonl")],
    kind: Annotated[
        Literal["auto", "folder", "table", "coco", "karpathy", "flickr", "vqa", "imagefolder"],
        arg(help="what the source is; auto finds out"),
    ] = "auto",
    pictures: Annotated[
        Path | None, arg(metavar="DIR", help="where the names of pictures start, if not beside the source")
    ] = None,
    split: Annotated[tuple[str, ...], arg(help="of Karpathy's JSON, those to take; by default all")] = (),
    image_column: Annotated[str | None, arg(metavar="NAME", help="of a table, if it is not called as usual")] = None,
    caption_column: Annotated[str | None, arg(metavar="NAME", help="likewise")] = None,
    shorter_side: Annotated[
        int | None, arg(metavar="PIXELS", help="make larger pictures smaller, as JPEG; by default all stay as they are")
    ] = None,
    samples_per_shard: Annotated[int, arg(help="pictures for each shard")] = 1000,
    workers: Workers = None,
) -> None:
    """Make tar shards of a source. The same command goes on where it was interrupted."""
    from contracap.data.making import SKIPPED_FILE, make_shards

    made = make_shards(
        source,
        out,
        kind=kind,
        pictures=pictures,
        splits=split,
        image_column=image_column,
        caption_column=caption_column,
        shorter_side=shorter_side,
        samples_per_shard=samples_per_shard,
        workers=_workers(workers),
    )
    print(f"{made.samples} samples in {made.shards} shards: {out}")
    for reason, number in made.skipped.items():
        print(f"skipped {number}: {reason}")
    if made.skipped:
        print(f"each is named in {out / SKIPPED_FILE}")


def index(
    folder: Annotated[str, arg(metavar="DIR", help="a folder of tar shards, or its URL")],
    /,
    *,
    out: Annotated[Path | None, arg(metavar="DIR", help="another folder for index.json, as a remote DIR needs")] = None,
    workers: Workers = None,
) -> None:
    """Write index.json beside shards: what each holds. Training then need not count their samples."""
    from contracap.data.index import INDEX_FILE, index_folder

    entries = index_folder(folder, workers=_workers(workers), out=out)
    samples, captions = (sum(getattr(entry, name) for entry in entries) for name in ("samples", "captions"))
    print(f"{samples} samples with {captions} captions in {len(entries)} shards: {(out or Path(folder)) / INDEX_FILE}")


def show(
    paths: Annotated[tuple[str, ...], arg(metavar="PATH [PATH ...]", help="a folder of tar shards, or shards")],
    /,
    *,
    out: Annotated[Path, arg(metavar="FILE.html", help="the page")] = Path("shards.html"),
    recipe: Annotated[Path | None, arg(metavar="RECIPE.toml", help="crop the samples as this run would")] = None,
    limit: Annotated[int | None, arg(help="samples to read, the first ones; by default all")] = None,
    samples: Annotated[int, arg(help="samples on the page")] = 48,
    seed: Annotated[int, arg(help="of the samples and their crops")] = 0,
) -> None:
    """Count what is in shards, and show some of their samples on a page as the trainer will see them."""
    from contracap.data.show import survey_lines, write_page
    from contracap.data.survey import survey
    from contracap.image import AugmentationConfig, ImageConfig
    from contracap.recipe import load_recipe

    image, augmentation = ImageConfig(), AugmentationConfig()
    if recipe is not None:
        run = load_recipe(recipe)
        image, augmentation = ImageConfig(size=run.model_config.vision.image_size), run.data.augmentation
    found = survey(paths, limit=limit, sample_count=samples, seed=seed, image=image, augmentation=augmentation)
    write_page(found, out)
    print(*survey_lines(found), f"the page: {out}", sep="\n")


def plan(
    recipe: Annotated[Path, arg(metavar="RECIPE.toml", help="the run")],
    overrides: Annotated[tuple[str, ...], arg(metavar="[KEY.PATH=VALUE ...]", help="changes to it")] = (),
    /,
    *,
    gpus: Annotated[int, arg(metavar="N", help="how many share each batch")],
    gpu: Annotated[str, arg(metavar="NAME", help="a100-40g, a100-80g, h100-80g, h200-141g, l40s or rtx-4090")],
    gpus_per_machine: Annotated[int, arg(help="they reach each other faster; under hsdp they share a model")] = 8,
    efficiency: Annotated[float, arg(help="share of the GPU's dense peak that forward and backward pass reach")] = 0.5,
    text_tokens: Annotated[
        float | None, arg(help="mean length of the captions; by default that of index.json, else the whole context")
    ] = None,
    hours_between_failures: Annotated[float, arg(help="of one GPU")] = 50_000.0,
    json: ResultFile = None,
) -> None:
    """Say what a run costs before it is paid for: memory, time and traffic, on paper."""
    from contracap.plan.run import plan_run
    from contracap.recipe import load_recipe

    made = plan_run(
        load_recipe(recipe, overrides),
        gpus=gpus,
        gpu=gpu,
        gpus_per_machine=gpus_per_machine,
        efficiency=efficiency,
        text_tokens=text_tokens,
        hours_between_failures=hours_between_failures,
    )
    print(made.table())
    if json is not None:
        made.result(_command()).write(json)


def bench(
    name: Annotated[Literal["data", "train"], arg(metavar="NAME", help="what to measure: data or train")],
    /,
    *,
    rounds: Annotated[int, arg(help="timed runs of each side, 7 at least")] = 7,
    device: Annotated[Literal["cpu", "cuda"], arg(help="for train")] = "cpu",
    rows: Annotated[tuple[str, ...], arg(metavar="NAME", help="for train, which rows; all if none")] = (),
    json: ResultFile = None,
) -> None:
    """Measure speed and memory, beside open_clip in the same run where it is installed."""
    from contracap.bench.data import bench_data
    from contracap.bench.train import bench_train

    training = partial(bench_train, device=device, rows=rows)
    benchmark = {"data": bench_data, "train": training}[name](rounds=rounds)
    print(benchmark.table())
    if json is not None:
        benchmark.result(_command()).write(json)


def inspect(
    file: WeightsName, /, *, size: Annotated[str | None, arg(metavar="NAME", help="a size to compare with")] = None
) -> None:
    """Print what a weights file holds, and how it differs from a size."""
    from contracap.model.sizes import SIZES, find_size
    from contracap.model.weights import key_differences, meta_state, shapes_of, to_open_clip
    from contracap.pretrained import METADATA_KEY, find_weights, read_tensors

    path = find_weights(file)
    tensors, metadata = read_tensors(path)
    ours = METADATA_KEY in metadata

    def differences(config: "CoCaConfig") -> list[str]:
        expected = meta_state(config)
        return key_differences(shapes_of(tensors), shapes_of(expected if ours else to_open_clip(expected, config)))

    if size is None:
        size = next((name for name, config in SIZES.items() if not differences(config)), None)
    if size is None:
        fit = f"none fits exactly; --size NAME compares with one of {', '.join(SIZES)}"
    else:
        fit = f"{size}: {'; '.join(differences(find_size(size))) or 'every name and shape fits'}"
    parts: Counter[str] = Counter()
    for name, tensor in tensors.items():
        parts[name.split(".")[0]] += tensor.numel()
    print(f"file           {path}")
    print(f"layout         {'contracap' if ours else 'open_clip'}")
    print(f"tensors        {len(tensors)}, {', '.join(sorted({str(tensor.dtype) for tensor in tensors.values()}))}")
    print(f"parameters     {parts.total() / 1e6:.2f} million")
    for part, count in parts.most_common():
        print(f"  {part:12} {count / 1e6:.2f}")
    if ours:
        print(f"configuration  {metadata[METADATA_KEY]}")
    print(f"size           {fit}")


def convert(
    file: WeightsName,
    out: Annotated[Path, arg(metavar="OUT", help="a folder for open_clip, a .safetensors file for contracap")],
    /,
    *,
    to: Annotated[
        Literal["open_clip", "contracap"] | None,
        arg(help="the layout to write; by default the one the file does not have"),
    ] = None,
    size: Size = None,
) -> None:
    """Write weights in the other layout, bit-equal."""
    from contracap.model.weights import not_for_open_clip
    from contracap.pretrained import PICKLES, read_weights, save, save_open_clip

    found = read_weights(file, size=size)
    to = to or ("open_clip" if found.layout == "contracap" else "contracap")
    if to == "contracap":
        if out.suffix != ".safetensors":
            raise ValueError(f"{out} does not end in .safetensors, as a weights file of contracap must")
        save(out, model=found.model, image=found.image, state=found.state)
    else:
        if out.suffix in (".safetensors", *PICKLES) or out.is_file():
            raise ValueError(f"open_clip's layout is a folder of two files, and {out} names a file: give a folder")
        save_open_clip(out, model=found.model, image=found.image, state=found.state)
        for problem in not_for_open_clip(found.model):
            print(f"contracap: warning: open_clip 3.3.0 cannot follow this model: {problem}", file=sys.stderr)
    print(f"{found.path} ({found.layout}) -> {out} ({to})")


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


def _workers(wanted: int | None) -> int:
    return (os.cpu_count() or 1) if wanted is None else wanted


def _command() -> str:
    """As it was typed."""
    return shlex.join(["contracap", *sys.argv[1:]])


def _load(weights: str, size: str | None) -> "tuple[CoCa, Processor]":
    import torch

    from contracap.pretrained import load

    model, processor = load(weights, size=size)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor


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


def _fail(message: str, *, status: int = 1) -> int:
    print(f"contracap: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _is_for_the_user(error: Exception) -> bool:
    """Whether an error tells a user what was wrong: one that this package raised, or the system's word on a file.

    Anything else is a mistake of ours, and is shown with its traceback.
    """
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    raised_by_us = raised_in.is_relative_to(Path(__file__).parent) and isinstance(error, ValueError | ImportError)
    return raised_by_us or isinstance(error, OSError) or type(error).__module__.startswith("contracap.")


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return str(error) or type(error).__name__
