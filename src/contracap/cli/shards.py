"""The commands of shards."""

from pathlib import Path
from typing import Annotated, Literal

from contracap.cli.flags import PathText, arg
from contracap.cli.messages import interruption, say
from contracap.cli.options import Workers, check_outputs, worker_count
from contracap.wording import counted


def make(
    source: Annotated[Path, arg(metavar="SOURCE", help="A folder, a table, JSON or a token file: docs/data.md.")],
    /,
    *,
    out: Annotated[Path, arg(metavar="DIR", help="Folder for the shards, index.json and skipped.jsonl.")],
    kind: Annotated[
        Literal["auto", "folder", "table", "coco", "karpathy", "flickr", "vqa", "imagefolder", "bulk"],
        arg(help="Kind of the source; auto detects it."),
    ] = "auto",
    pictures: Annotated[
        Path | None, arg(metavar="DIR", help="Folder of the images, if it is not that of the source.")
    ] = None,
    split: Annotated[
        tuple[str, ...],
        arg(
            help="Splits of Karpathy's JSON, a table with such a column, or a folder of Parquet files; all by default."
        ),
    ] = (),
    image_column: Annotated[
        str | None, arg(metavar="NAME", help="Column of images in a table, if it does not have a usual name.")
    ] = None,
    caption_column: Annotated[
        tuple[str, ...],
        arg(metavar="NAME [NAME ...]", help="Columns of captions in a table, if they do not have a usual name."),
    ] = (),
    caption_lines: Annotated[
        bool, arg(help="Read each line of a .txt as a caption, instead of the whole file as one.")
    ] = True,
    shorter_side: Annotated[
        int | None,
        arg(
            metavar="PIXELS", help="Scale larger images down to this, as JPEG; by default all images stay as they are."
        ),
    ] = None,
    samples_per_shard: Annotated[int, arg(help="Samples in a shard.")] = 1000,
    workers: Workers = None,
) -> None:
    """Make tar shards of a source. If interrupted, run the same command again to continue."""
    from contracap.data.shard_maker import SKIPPED_FILE, make_shards

    made = make_shards(
        source,
        out,
        kind=kind,
        images=pictures,
        splits=split,
        image_column=image_column,
        caption_columns=caption_column,
        caption_lines=caption_lines,
        shorter_side=shorter_side,
        samples_per_shard=samples_per_shard,
        workers=worker_count(workers),
    )
    captions = f" with {counted(made.captions, 'caption(s)')}" if made.captions else ""  # questions: none
    say(f"{counted(made.samples, 'sample(s)')}{captions} in {counted(made.shards, 'shard(s)')}: {out}")
    if repeated := made.repeated_captions:
        say(f"{counted(repeated, 'repeated caption(s)')}, kept: the image has the same text already")
    for reason, number in made.skipped.items():
        say(f"skipped {number:,}: {reason}")
    if made.skipped:
        say(f"each is named in {out / SKIPPED_FILE}; to try again after a change, delete {out} first")


def index(
    folder: Annotated[PathText, arg(metavar="DIR", help="A folder of tar shards, or its URL.")],
    /,
    *,
    out: Annotated[
        Path | None, arg(metavar="DIR", help="Another folder for index.json; needed if DIR is a URL.")
    ] = None,
    workers: Workers = None,
) -> None:
    """Write the numbers of samples and captions of shards to index.json, so that training need not count them."""
    from contracap.data.index import INDEX_FILE
    from contracap.data.indexing import index_folder

    entries = index_folder(folder, workers=worker_count(workers), out=out)
    samples, captions = (sum(getattr(entry, name) for entry in entries) for name in ("samples", "captions"))
    held = f"{counted(samples, 'sample(s)')} with {counted(captions, 'caption(s)')}"
    say(f"{held} in {counted(len(entries), 'shard(s)')}: {(out or Path(folder)) / INDEX_FILE}")


@interruption()
def show(
    paths: Annotated[tuple[PathText, ...], arg(metavar="PATH [PATH ...]", help="Folders of tar shards, or shards.")],
    /,
    *,
    out: Annotated[Path, arg(metavar="FILE.html", help="File for the page.")] = Path("shards.html"),
    recipe: Annotated[
        Path | None, arg(metavar="RECIPE.toml", help="Read and crop the samples as this run would.")
    ] = None,
    limit: Annotated[int | None, arg(metavar="N", help="Read only the first N samples.")] = None,
    samples: Annotated[int, arg(help="Samples on the page.")] = 48,
    seed: Annotated[int, arg(help="Seed of the samples that are shown, and of their crops.")] = 0,
) -> None:
    """Count what is in shards, and show some samples on a page as the trainer will see them."""
    from contracap.apps.show import survey_lines, write_page
    from contracap.data.shards import ShardError
    from contracap.data.survey import survey
    from contracap.images import AugmentationConfig, ImageConfig
    from contracap.tokenizer import Tokenizer
    from contracap.training.recipe import load_recipe

    check_outputs([*paths, recipe], out=out)
    image, augmentation, tokenizer, lines = ImageConfig(), AugmentationConfig(), Tokenizer(), True
    if recipe is not None:
        run = load_recipe(recipe)
        model, captions = run.model_config, run.data.captions
        image, augmentation, lines = ImageConfig(size=model.vision.image_size), run.data.augmentation, captions.lines
        context = min(model.text.context, captions.max_tokens or model.text.context)
        tokenizer = Tokenizer(context, model.text.vocab_size)
    found = survey(
        paths,
        limit=limit,
        sample_count=samples,
        seed=seed,
        image=image,
        augmentation=augmentation,
        tokenizer=tokenizer,
        lines=lines,
    )
    if not found.images:
        why = next((each.examples[0] for each in found.skipped.values()), "the shards are empty")
        raise ShardError(f"no sample can be used, of {found.samples:,} that were read: {why}")
    write_page(found, out)
    for line in (*survey_lines(found), f"the page: {out}"):
        say(line)
