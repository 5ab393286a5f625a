"""Formats of image files, told from their bytes before they are decoded, and limits on the cost of reading them."""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from itertools import islice

from PIL import BmpImagePlugin, IcoImagePlugin, Image, TiffImagePlugin

# Formats that Pillow reads by itself; EPS, for one, would start a foreign program on the file.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO")
HEAD_BYTES = 512  # that `image_format` and `not_an_image` look at

_HEADS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "GIF": rb"GIF8[79]a",
    "WEBP": rb"RIFF....WEBP",
    "AVIF": rb"....ftypavi[fs]",
    "HEIF": rb"....ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)",
    "JPEG2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    "BMP": rb"BM.{4}\0{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    "TIFF": rb"II(?:[*+]\0|\0\*)|MM(?:\0[*+]|\*\0)",
}
_NOT_IMAGES = {
    "a Git LFS pointer, not the image itself: run git lfs pull": rb"version https://git-lfs",
    "an SVG drawing: convert it to PNG": rb"\s*<(?=.*svg)[?!s]",
    "a web page (HTML): download the image itself": rb"\s*<(!doctype html|html|head|body|!--)",
    "XML, such as a server's error message: download the image itself": rb"\s*<(\?xml|error)",
    "JSON, such as a server's error message: download the image itself": rb"\s*[\[{]\s*[\"{\[\]}]",
    "a JPEG XL image: convert it to PNG or JPEG": rb"\0\0\0\x0cJXL |\xff\x0a",
    "a PDF: convert its pages to images": rb"%PDF-",
    "a PostScript file: convert it to PNG": rb"%!PS",
    "a Photoshop file: convert it to PNG": rb"8BPS",
    "a video": rb"....ftyp|\x1a\x45\xdf\xa3|RIFF....AVI ",
    "an archive: unpack it": rb"PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf",
}
_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xc7\xc9-\xcf\xd9-\xef\xfe]")  # the end, and all that have a length
_EXIF, _MPF = b"Exif\0\0", b"MPF\0"
_TAG_BYTES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
}  # of TIFF's types
MAX_METADATA_BYTES = 2**20  # of a JPEG's EXIF; of directories, beyond twice what the file holds
MAX_METADATA_STARTS = 16  # of four bytes that chance gives once in two thousand million places
MAX_DIRECTORIES = 16  # of TIFF or EXIF, one inside another; files have up to 4
MAX_ENTRIES = 2**16  # in these directories
MAX_HEADER_SEGMENTS = 1000  # of a JPEG before its first scan; an ICC profile and previews take up to 300
MAX_SEGMENTS = 10_000  # of a JPEG
# Pillow parses files in Python, a read or more for each chunk, block or pixel: these take it up to half a second.
MAX_READS = 30_000  # and one for each KiB
MAX_GIF_READS = 8000  # where the parts of a comment are joined one by one
MAX_PLAIN_BYTES = 2**20  # of a PPM whose pixels are written as text
MAX_PLAIN_COMMENTS = 100
MAX_ICON_PIXELS = 2**20
_FLAGS = re.DOTALL | re.IGNORECASE


class CostlyError(ValueError):
    """A file that would take far more time or memory than its size suggests."""


class _Reader(io.BytesIO):
    """A file that is read a limited number of times."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.left = MAX_GIF_READS if image_format(data[:HEAD_BYTES]) == "GIF" else MAX_READS + len(data) // 1024

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise CostlyError("it is made of too many small parts; save it again, as PNG or JPEG")
        return super().read(size)


def image_format(head: bytes) -> str | None:
    """Return Pillow's name of the format that the first bytes of a file announce, if any."""
    return next((name for name, pattern in _HEADS.items() if re.match(pattern, head, re.DOTALL)), None)


def other_format(head: bytes) -> str | None:
    """Describe a file that is known not to be a readable image, and what to do about it; None for other files."""
    return next((what for what, pattern in _NOT_IMAGES.items() if re.match(pattern, head, _FLAGS)), None)


def not_an_image(head: bytes) -> str:
    """Describe a file whose first bytes are not those of an image, and what to do about it."""
    if kind := other_format(head):
        return kind
    if not head.strip(b"\0"):
        return "nothing but zero bytes, as an interrupted download leaves"
    start = head[:40].decode("utf-8", errors="ignore")
    if start.replace("\n", "").replace("\t", "").replace("\r", "").isprintable() and len(start) >= len(head[:40]) // 2:
        return f"a text that begins {start!r}"
    return f"none of {', '.join(FORMATS)}"


def tiff_float_bits(data: bytes) -> int:
    """Return the bits per value of a TIFF whose pixels are floats; 0 for any other file."""
    try:
        directory = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
        (file := _Reader(data)).seek(directory.next)
        directory.load(file)
        is_float = 3 in directory.get(TiffImagePlugin.SAMPLEFORMAT, ())
        return int(directory[TiffImagePlugin.BITSPERSAMPLE][0]) if is_float else 0
    except Exception:  # a damaged directory makes Pillow raise almost anything
        return 0


def open_image(data: bytes) -> Image.Image:
    """Return Pillow's image of a file, not decoded yet.

    Raises: CostlyError: if that could take seconds or gigabytes. Exception: almost any, as Pillow does; ImportError
        if the format needs the extra `heic`.
    """
    format = image_format(data[:HEAD_BYTES])
    if format in ("AVIF", "HEIF"):  # somewhere inside; Pillow reads it as it opens the file
        places = list(islice(re.finditer(_HEADS["TIFF"], data), MAX_METADATA_STARTS + 1))
        if len(places) > MAX_METADATA_STARTS:
            raise CostlyError("bytes that look like metadata begin in too many places")
        tags = [memoryview(data)[found.start() :] for found in places]
    else:
        tags = [data] if format == "TIFF" else _jpeg_metadata(data) if format == "JPEG" else []
    if any(map(unfolds, tags)):
        raise CostlyError("its metadata unfold to more than the file holds")
    if format == "HEIF":
        _register_heif()
    if data.startswith(b"\0\0\1\0"):
        inner = data[IcoImagePlugin.IcoFile(_Reader(data)).entry[0].offset :]
        if image_format(inner[:HEAD_BYTES]) == "PNG":
            return open_image(inner)  # the icon that Pillow would take, but not before its size is known
        width, height = BmpImagePlugin.DibImageFile(_Reader(inner)).size  # the height is that of colours and mask
        if width * height > 2 * MAX_ICON_PIXELS:
            raise CostlyError(f"an icon of {width} x {height // 2} pixels; scale it down first")
    image = Image.open(_Reader(data), formats=_formats())
    plain = image.format == "PPM" and data[1:2] in b"123"
    if plain and (len(data) > MAX_PLAIN_BYTES or data.count(b"#") > MAX_PLAIN_COMMENTS):
        raise CostlyError("a large PPM with its pixels as text; convert it to PNG")
    return image


def jpeg_scans(data: bytes) -> int:
    """Return the number of scans of a JPEG; each scan of a progressive one decodes all pixels again.

    Raises: CostlyError: if it has more than `MAX_SEGMENTS` segments.
    """
    markers = [marker for marker, _ in islice(_jpeg_segments(data), MAX_SEGMENTS)]
    if len(markers) == MAX_SEGMENTS:
        raise CostlyError(f"{MAX_SEGMENTS} segments or more; save it again")
    return markers.count(0xDA)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the marker and the content of each segment of a JPEG up to its end.

    The lengths are those by which Pillow and libjpeg skip segments; after a marker without a length, they go on there.
    """
    place, scanned = 2, False
    while found := _JPEG_MARKER.search(data, place):
        start, marker = found.end(), data[found.end() - 1]
        if marker == 0xD9:
            if scanned:
                return
            place = start  # Pillow passes over an end before the first scan
            continue
        scanned = scanned or marker == 0xDA
        place = start + max(2, int.from_bytes(data[start : start + 2]))
        yield marker, data[start + 2 : place]


def bare_png(data: bytes) -> bytes:
    """Return a PNG without chunks that may be too large or damaged: with its pixels and EXIF only. Keep other files."""
    if image_format(data[:8]) != "PNG":
        return data
    kept, place = [data[:8]], 8
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        chunk = data[place : place + 12 + length]
        whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:])
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND") or (kind == b"eXIf" and whole):
            kept.append(chunk)
        place += len(chunk)
    return b"".join(kept)


def unfolds(tiff: bytes | memoryview) -> bool:
    """Return True if the values of the directories of a TIFF or EXIF take a reader far more memory than the file.

    Values may overlap, so that a small file unfolds to any size.
    """
    order, large = ("<" if tiff[:2] == b"II" else ">"), tiff[2:3] == b"+"  # as Pillow decides
    entry = struct.Struct(order + ("HHQQ" if large else "HHLL"))
    limit, entries, seen = 2 * len(tiff) + MAX_METADATA_BYTES, 0, set[int]()
    try:
        waiting = set(struct.unpack_from(order + ("Q" if large else "L"), tiff, 8 if large else 4))
        while waiting:
            place = waiting.pop()
            seen.add(place)
            (count,) = struct.unpack_from(order + ("Q" if large else "H"), tiff, place)
            place += 8 if large else 2
            count = min(count, max(0, len(tiff) - place) // entry.size)
            entries += count
            if entries > MAX_ENTRIES:
                return True
            for tag, kind, values, value in entry.iter_unpack(tiff[place : place + count * entry.size]):
                limit -= values * _TAG_BYTES.get(kind, 0)
                if tag in (34665, 34853, 40965) and value not in seen:  # EXIF, GPS, interoperability
                    waiting.add(value)
            if limit < 0 or len(seen) + len(waiting) > MAX_DIRECTORIES:
                return True
    except struct.error:  # damaged: whoever reads it says so
        return limit < 0
    return False


def _jpeg_metadata(data: bytes) -> list[bytes]:
    """Return the EXIF of a JPEG, whose parts readers join, and its directories of several images."""
    exif, found = [], []
    for count, (marker, content) in enumerate(_jpeg_segments(data)):
        if marker == 0xDA:
            break
        if marker == 0xE1 and content.startswith(_EXIF):
            exif.append(content[len(_EXIF) :])
        elif marker == 0xE2 and content.startswith(_MPF):
            found.append(content[len(_MPF) :])
        if count > MAX_HEADER_SEGMENTS or sum(map(len, exif)) > MAX_METADATA_BYTES:
            raise CostlyError("too much metadata; save it again")
    return [b"".join(exif), *found]


def _register_heif() -> None:
    try:
        import pillow_heif
    except ImportError:
        raise ImportError('a HEIC image, which needs pip install "contracap[heic]"') from None
    if "HEIF" not in Image.OPEN:
        pillow_heif.register_heif_opener()


def _formats() -> tuple[str, ...]:
    """Return the names of our formats that this build of Pillow has."""
    Image.init()
    return tuple(name for name in (*FORMATS, "HEIF") if name in Image.OPEN)
