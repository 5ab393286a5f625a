"""Tar files in which damage is an error, and each sample has limited size."""

import gzip
import io
import re
import tarfile
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import IO, cast

from contracap.data.remote import WEB, open_file
from contracap.formats import HEAD_BYTES, image_format, other_format

GZIP_SUFFIXES = (".tar.gz", ".tgz")
SHARD_SUFFIXES = (".tar", *GZIP_SUFFIXES)
# Limits of one sample. A gzipped shard, or one with holes, can claim any size in a few bytes.
MAX_HEADER_BYTES = 4 * 2**20  # about 8,000 members
MAX_UNFOLDED_BYTES = 2**30  # of all members, in a gzipped shard, which has to be decompressed to get past them


def file_part(url: str) -> str:
    """Return a URL without what may follow the name of its file on a web server, such as a signature."""
    return re.split(r"[?#]", url, maxsplit=1)[0] if url.startswith(WEB) else url


class Metered:
    """The bytes of a tar file, and the number of them that a sample may still take."""

    def __init__(self, stream: io.BufferedIOBase, *, seeking: bool, gzipped: bool) -> None:
        self._stream, self._seeking, self._gzipped = stream, seeking, gzipped
        self.seek, self.tell = stream.seek, stream.tell
        self.head = b""
        self.begin_sample()

    def begin_sample(self) -> None:
        self._left, self._unfolded = MAX_HEADER_BYTES, 0

    def read(self, size: int) -> bytes:
        """Read for `tarfile`."""
        self._left -= size
        if self._left < 0:
            reason = f"the headers of one sample take more than {MAX_HEADER_BYTES:,} bytes"
            raise tarfile.ReadError(f"{reason} (a key ends at the first dot of a name)")
        content = self._stream.read(size)
        self.head = self.head or content[:HEAD_BYTES]
        return content

    def charge(self, member: tarfile.TarInfo, *, wanted: bool) -> None:
        """Count the content of a member, which will be read or skipped."""
        self._unfolded += member.size
        if self._gzipped and self._unfolded > MAX_UNFOLDED_BYTES:
            raise tarfile.ReadError(f"one sample unfolds to more than {MAX_UNFOLDED_BYTES:,} bytes")
        if wanted or not self._seeking:  # in a stream, what is skipped is read, too
            self._left += member.size


@contextmanager
def open_tar(shard: str) -> Generator[tuple[tarfile.TarFile, Metered], None, None]:
    """Yield a tar file to iterate over, and the meter of its samples. Damage raises an error."""
    gzipped = file_part(shard).endswith(GZIP_SUFFIXES) and not shard.startswith("pipe:")
    with open_file(shard) as file, gzip.GzipFile(fileobj=file) if gzipped else nullcontext(file) as stream:
        seeking = file.seekable() and not gzipped  # skips members without reading them, and reads faster
        metered = Metered(cast(io.BufferedIOBase, stream), seeking=seeking, gzipped=gzipped)
        mode = "r:" if seeking else "r|"
        with ExitStack() as stack:
            try:
                archive = stack.enter_context(
                    tarfile.open(fileobj=cast(IO[bytes], metered), mode=mode, tarinfo=_StrictHeader)
                )
            except tarfile.ReadError as error:
                raise tarfile.ReadError(_kind_of_file(metered.head) or str(error)) from error
            yield archive, metered


def _kind_of_file(head: bytes) -> str:
    """Return what a file is that is not a tar file, by its first bytes; "" if they do not say."""
    if not head:
        return "it is empty"
    kind = image_format(head) or other_format(head)
    return f"it is {'an image, ' if image_format(head) else ''}{kind.partition(':')[0]}" if kind else ""


def is_tar(file: str) -> bool:
    """Return whether a local file is a tar file, as far as its first header tells."""
    try:
        with open_tar(file):
            return True
    except OSError:
        raise
    except Exception:  # damaged bytes make tarfile raise nearly anything
        return False


class _StrictHeader(tarfile.TarInfo):
    """A header that must be sound: `tarfile` takes a broken or missing one for the end of the file."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:  # pyrefly: ignore
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # pyrefly: ignore[missing-attribute]
            if any(cast(IO[bytes], archive.fileobj).read(tarfile.BLOCKSIZE)):  # the mark is two blocks of zeros
                raise tarfile.ReadError(f"a block of zeros at byte {archive.offset}, and more after it") from None
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from error
        except (ValueError, LookupError, TypeError) as error:  # of sparse members, of which tarfile checks little
            raise tarfile.ReadError(f"a header of a kind that no shard has at byte {archive.offset}") from error
