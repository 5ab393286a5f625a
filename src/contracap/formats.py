"""Files of images before they are decoded: what each is, and what reading it may cost."""

import io
import re
import struct
import zlib
from functools import lru_cache
from itertools import islice

from PIL import Image

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
    "TIFF": rb"II[*+]\0|MM\0[*+]",
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
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # not a byte of data, a restart, or padding
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
MAX_METADATA_BYTES = 2**20  # of directories, beyond twice what the file holds
MAX_METADATA_STARTS = 16  # of four bytes that chance gives once in two thousand million places
_FLAGS = re.DOTALL | re.IGNORECASE


def image_format(head: bytes) -> str | None:
    """Pillow's name of the format that a file's first bytes announce, if they do."""
    return next((name for name, pattern in _HEADS.items() if re.match(pattern, head, re.DOTALL)), None)


def not_an_image(head: bytes) -> str:
    """What a file is whose first bytes no decoder of images knows, and what to do about it."""
    for what, pattern in _NOT_IMAGES.items():
        if re.match(pattern, head, _FLAGS):
            return what
    if not head.strip(b"\0"):
        return "nothing but zero bytes, as an interrupted download leaves"
    start = head[:40].decode("utf-8", errors="ignore")
    if start.replace("\n", "").replace("\t", "").replace("\r", "").isprintable() and len(start) >= len(head[:40]) // 2:
        return f"a text that begins {start!r}"
    return f"none of {', '.join(FORMATS)}"


def open_image(data: bytes) -> Image.Image:
    """Pillow's picture of a file, not decoded yet.

    Raises: Exception: almost any, as Pillow does; ImportError where the format needs the extra `heic`.
    """
    format = image_format(data[:HEAD_BYTES])
    if format in ("AVIF", "HEIF"):  # somewhere inside; Pillow reads it as it opens the file
        places = list(islice(re.finditer(rb"II\*\0|MM\0\*", data), MAX_METADATA_STARTS + 1))
        if len(places) > MAX_METADATA_STARTS:
            raise ValueError("bytes that look like metadata begin in too many places")
        tags = [data[found.start() :] for found in places]
    else:
        tags = [data] if format == "TIFF" else [b"".join(_jpeg_exif(data))] if format == "JPEG" else []
    if any(directory_bytes(part) > 2 * len(part) + MAX_METADATA_BYTES for part in tags):
        raise ValueError("its metadata unfold to more than the file holds")
    if format == "HEIF":
        _register_heif()
    return Image.open(io.BytesIO(data), formats=_formats())


def jpeg_scans(data: bytes) -> int:
    """The scans of a JPEG; each of a progressive one decodes all pixels once more."""
    scans, place = 0, 2
    while (found := _JPEG_MARKER.search(data, place)) and data[found.end() - 1] != 0xD9:  # its end
        place, marker = found.end(), data[found.end() - 1]
        scans += marker == 0xDA
        if marker not in (0x01, 0xD8):  # the two without a length
            place += int.from_bytes(data[place : place + 2])
    return scans


def bare_png(data: bytes) -> bytes:
    """A PNG with its pixels and EXIF alone: other chunks may be too large, or damaged. Other files stay as they are."""
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


def directory_bytes(tiff: bytes) -> int:
    """Bytes of values that a reader of a TIFF's or EXIF's first directory, and of those inside it, takes up. Values may
    overlap in the file, so that a small one unfolds to any size."""
    order, large = ("<" if tiff[:2] == b"II" else ">"), 43 in tiff[2:4]
    entry = struct.Struct(order + ("HHQQ" if large else "HHLL"))
    total, seen = 0, set[int]()
    try:
        waiting = list(struct.unpack_from(order + ("Q" if large else "L"), tiff, 8 if large else 4))
        while waiting:
            place = waiting.pop()
            if place in seen:
                continue
            seen.add(place)
            (count,) = struct.unpack_from(order + ("Q" if large else "H"), tiff, place)
            place += 8 if large else 2
            count = min(count, (len(tiff) - place) // entry.size)
            for tag, kind, values, value in entry.iter_unpack(tiff[place : place + count * entry.size]):
                total += values * _TAG_BYTES.get(kind, 0)
                if tag in (34665, 34853, 40965):  # EXIF, GPS, interoperability
                    waiting.append(value)
    except struct.error:  # damaged: whoever reads it says so
        pass
    return total


def _jpeg_exif(data: bytes) -> list[bytes]:
    """The parts of a JPEG's EXIF, which readers put together."""
    return [
        data[found.end() : found.start() + 2 + int.from_bytes(found[1])]
        for found in re.finditer(rb"\xff\xe1(..)Exif\0\0", data, re.DOTALL)
    ]


def _register_heif() -> None:
    try:
        import pillow_heif
    except ImportError:
        raise ImportError('a HEIC image, which needs pip install "contracap[heic]"') from None
    if "HEIF" not in Image.OPEN:
        pillow_heif.register_heif_opener()
        _formats.cache_clear()


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Those of our formats that this build of Pillow has."""
    Image.init()
    return tuple(name for name in (*FORMATS, "HEIF") if name in Image.OPEN)
