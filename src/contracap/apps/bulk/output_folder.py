"""The folder that a run over many shards fills, on a disk or in an object store."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from contracap.apps.bulk.output_config import OutputConfig, describe_changes
from contracap.data.remote import GOOGLE, S3, list_files, open_file, upload
from contracap.files import replace_file

MANIFEST_FILE = "_bulk.json"  # readers of parquet folders leave out names that begin with an underscore
OLD_MANIFEST_FILE = "bulk.json"  # of runs before the underscore; what it says still counts


class FolderError(ValueError):
    """A folder that cannot take the output of a run; the message names it."""


class Folder:
    """Files that appear whole or not at all: on a disk by a rename, in an object store because a put is atomic there.

    Raises: FolderError: of a URL whose protocol has no such put.
    """

    def __init__(self, name: str) -> None:
        self.name = name.rstrip("/")
        self._remote = "://" in name
        if self._remote and not name.startswith((*S3, *GOOGLE)):
            raise FolderError(f"cannot write to {name}: give a local folder, or one of s3:// or gs://")

    def names(self) -> set[str]:
        """Return the names of the files; none if there is no such folder yet."""
        try:
            if self._remote:
                return {file.rpartition("/")[2] for file in list_files(self.name)}
            return {file.name for file in Path(self.name).iterdir()}
        except FileNotFoundError:
            return set()

    @contextmanager
    def writing(self, file: str) -> Iterator[Path]:
        """An empty local file to write to, which is in the folder at the end, or nowhere if there was an error.

        Raises: OSError: if it cannot be written; names it.
        """
        if not self._remote:
            with replace_file(Path(self.name, file)) as partial:
                yield partial
            return
        with TemporaryDirectory() as scratch:
            yield (path := Path(scratch, file))
            upload(path, f"{self.name}/{file}")

    def remove_partial(self) -> None:
        """Remove what killed writers have left; no other writer may be at work."""
        if not self._remote and Path(self.name).is_dir():
            for file in Path(self.name).glob(".*.partial"):
                file.unlink(missing_ok=True)

    def check(self, config: OutputConfig) -> None:
        """Raises: FolderError: if the folder belongs to runs with other settings, or its manifest cannot be read."""
        for manifest in {MANIFEST_FILE, OLD_MANIFEST_FILE} & self.names():
            try:
                with open_file(f"{self.name}/{manifest}") as file:
                    before = dict(json.loads(file.read())["settings"])
            except (ValueError, KeyError, TypeError) as error:
                raise FolderError(f"{self.name}/{manifest} is not a manifest of a run: {error}") from None
            if different := describe_changes(before, config):
                raise FolderError(f"{self.name} holds a run with other settings: {different}. Give another --out")

    def claim(self, config: OutputConfig, *, described: Mapping[str, Any]) -> None:
        """Make this the folder of runs with these settings, by a manifest, unless it is already.

        Args:
            config: what decides the content of the files, ready for JSON.
            described: information for readers, which does not have to match.

        Raises: FolderError: as `check`.
        """
        self.check(config)
        if MANIFEST_FILE not in self.names():
            with self.writing(MANIFEST_FILE) as path:
                path.write_text(json.dumps({**described, "settings": config}, indent=2) + "\n", encoding="utf-8")
        if not self._remote:
            Path(self.name, OLD_MANIFEST_FILE).unlink(missing_ok=True)
