"""Files that visitors upload, good and bad."""

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><circle cx="4" cy="4" r="4" fill="red"/></svg>'


def picture(path: Path, *, seed: int = 0) -> Path:
    """An image of coarse coloured noise."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC).save(path)
    return path


def large_png(path: Path, side: int) -> Path:
    """A valid black image of `side` x `side` pixels, in a file of some hundred kilobytes, made row by row."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b""))
    return path


def bad_uploads(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that are no images to use, each with a part of what is to be said of it."""
    whole = io.BytesIO()
    Image.open(picture(folder / "whole.png")).save(whole, "jpeg")
    contents = {
        "truncated.jpg": (whole.getvalue()[: len(whole.getvalue()) // 2], "truncated.jpg: broken or cut off"),
        "drawing.svg": (SVG.encode(), "drawing.svg: not an image"),
        "letter.png": (b"Dear reader, this is no picture.", "letter.png: not an image"),
        "empty.png": (b"", "empty.png: the file is empty"),
    }
    files = {}
    for name, (content, said) in contents.items():
        (folder / name).write_bytes(content)
        files[name] = (folder / name, said)
    with zipfile.ZipFile(folder / "bomb.png", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(4):
            archive.writestr(f"{number}.png", bytes(16 * 2**20))
    files["bomb.png"] = (folder / "bomb.png", "bomb.png: not an image")
    files["wall.png"] = (large_png(folder / "wall.png", 30_000), "wall.png: more than the 89478485 pixels allowed")
    return files


def huge_file(path: Path, megabytes: int) -> Path:
    """A file that begins as a JPEG and is as long as that."""
    with path.open("wb") as file:
        file.write(b"\xff\xd8\xff\xe0")
        file.truncate(megabytes * 2**20)
    return path
