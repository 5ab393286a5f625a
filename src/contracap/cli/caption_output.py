"""The flags of `contracap caption` that say where the captions go."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import FlagCreatePairsOff

if TYPE_CHECKING:
    from contracap.apps.bulk.outputs import Existing, Output

METADATA_FILE = "metadata.jsonl"  # Hugging Face's name for it
FORMATS: "dict[str, Format]" = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}

Format = Literal["sidecar", "jsonl", "csv", "parquet", "metadata"]


@dataclass(frozen=True, kw_only=True)
class CaptionOutput:
    """The output of captions, and the treatment of existing ones."""

    format: Format | None = None
    """`sidecar`: a text file next to each image. `jsonl`, `csv` and `parquet`: all captions in the file --out.
    `metadata`: the metadata.jsonl of Hugging Face's image folders. The default is the ending of --out; without --out,
    lines on stdout: path, tab, text."""
    out: Annotated[Path | None, "FILE|DIR"] = None
    """One file for all captions, or the folder for side-cars."""
    ext: Literal[".txt", ".caption"] | None = None
    """Ending of side-cars, .txt by default."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Start again and replace the captions that are there, instead of skipping their images."""
    append: FlagCreatePairsOff[bool] = False
    """Add one more caption for each image, on its own line or row."""
    embed: FlagCreatePairsOff[bool] = False
    """Write the contrastive embeddings too: a column of lists; for csv the file FILE.npy next to it, for side-cars a
    .npy file for each image."""

    @property
    def existing(self) -> "Existing":
        """The treatment of existing captions.

        Raises: ValueError: if the flags contradict each other.
        """
        if self.overwrite and self.append:
            raise ValueError("--overwrite and --append exclude each other: give one of them")
        return "overwrite" if self.overwrite else "append" if self.append else "skip"

    def open(self, paths: Sequence[str]) -> "Output":
        """Return the output for the images at these paths.

        Raises: ValueError: if the flags do not fit together. OSError: if nothing can be written there.
        """
        from contracap.apps.bulk.inputs import folders_of
        from contracap.apps.bulk.outputs import Lines
        from contracap.apps.bulk.side_cars import SideCars
        from contracap.apps.bulk.table_output import Table

        existing, format, out = self.existing, self.format, self.out
        if format is None and out is not None:
            format = "metadata" if out.name == METADATA_FILE else FORMATS.get(out.suffix.lower())
            if format is None:
                raise ValueError(
                    f"cannot tell the format of {out} by its name: give --format jsonl, csv, parquet or metadata"
                )
        if out is not None and format in FORMATS.values() and FORMATS.get(out.suffix.lower(), format) != format:
            raise ValueError(f"--format {format} does not go with --out {out}, which ends in {out.suffix}: change one")
        if self.ext is not None and format != "sidecar":
            raise ValueError("--ext is for --format sidecar")
        if format is None:
            if self.embed or existing != "skip":
                option = "--embed" if self.embed else f"--{existing}"
                raise ValueError(f"{option} is for captions in files: give --format sidecar, or --out FILE")
            return Lines()
        if format == "sidecar":
            if out is not None and out.suffix.lower() in FORMATS:
                raise ValueError(
                    f"--out {out} is one file for all captions, but side-cars need a folder: give one of them"
                )
            roots = folders_of(paths)
            return SideCars(self.ext or ".txt", existing, embed=self.embed, roots=roots, inputs=paths, folder=out)
        if out is None and format == "metadata" and len(paths) == 1 and Path(paths[0]).is_dir():
            out = Path(paths[0]) / METADATA_FILE
        if out is None:
            raise ValueError(f"--format {format} is one file for all captions: name it with --out FILE")
        return Table(out, format, existing, embed=self.embed)
