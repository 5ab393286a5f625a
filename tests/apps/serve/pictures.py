"""Image files, good and bad."""

import io
import struct
import zipfile
import zlib

from PIL import Image

COLOURS = ("red", "green", "blue", "white", "black", "gray", "orange", "purple", "brown", "pink")


def picture(colour: str, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 50), colour).save(file, form)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(side: int, *, rows: bytes = b"") -> bytes:
    """A square PNG of one bit a pixel."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def zip_file() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("picture.png", bytes(10**7))
    return file.getvalue()


BAD = {
    "nothing": b"",
    "text named .png": b"this is no picture\n" * 100,
    "truncated JPEG": picture("red", "JPEG")[:-200],
    "truncated PNG": picture("red")[:60],
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>',
    "PNG of 30,000 pixels square": png(30_000),
    "PNG of no pixels": png(0),
    "zip bomb": zip_file(),
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
}
