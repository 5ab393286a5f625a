"""The members of a sample in a new shard: the image, and the `.json` with its captions and fields."""

import base64
import io
import json
import math
import warnings
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

from PIL import Image

from contracap.data.annotations import Entry, SkippedEntry
from contracap.data.samples import MAX_TEXT_BYTES
from contracap.image_files import ImageError, decode, require_trainable_size

JPEG_QUALITY = 95  # of images that are made smaller
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}  # of formats with another name


def sample_members(entry: Entry, image: bytes, shorter_side: int | None) -> dict[str, bytes] | SkippedEntry:
    """Return the members of a sample by suffix, or why it has none.

    Args:
        shorter_side: pixels to which a larger image is scaled down, as JPEG.
    """
    try:
        pixels = decode(image, name=entry.name)
        require_trainable_size(pixels.shape[1], pixels.shape[2], entry.name)
    except ImageError as error:
        return SkippedEntry(source=entry.name, kind=error.kind, message=str(error))
    height, width = pixels.shape[1:]
    if shorter_side is not None and min(height, width) > shorter_side:
        scale = shorter_side / min(height, width)
        size = round(width * scale), round(height * scale)
        smaller = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        smaller.save(file, "JPEG", quality=JPEG_QUALITY)
        image = file.getvalue()
    captions: dict[str, Any] = {"captions": entry.captions} if entry.captions else {}
    if captions and "captions" in entry.fields:
        captions["other_captions"] = entry.fields["captions"]
    name = "source" if "source" not in entry.fields else "image_name"  # a table may have a column `source`
    fields = {**entry.fields, **captions, name: entry.name}
    written = json.dumps(plain_json(fields), allow_nan=False).encode()
    if len(written) > MAX_TEXT_BYTES:
        message = f"captions and fields have {len(written):,} bytes, more than the {MAX_TEXT_BYTES:,} that are read"
        return SkippedEntry(source=entry.name, kind="too_large", message=message)
    return {_suffix(image): image, "json": written}


def plain_json(value: Any) -> Any:
    """Return a value as strict JSON has it: no NaN, no infinity, and text for unknown types."""
    match value:
        case dict():
            return {plain_json(str(key)): plain_json(inner) for key, inner in value.items()}
        case list() | tuple():
            return [plain_json(inner) for inner in value]
        case str():
            return value.encode(errors="backslashreplace").decode()  # of a name with bytes that are not text
        case float():
            return value if math.isfinite(value) else None
        case bytes():
            return base64.b64encode(value).decode()
        case datetime() | date() | time():
            return value.isoformat()
        case Decimal():
            return plain_json(float(value))
        case None | bool() | int():
            return value
    return str(value)


def _suffix(image: bytes) -> str:
    """Return the usual suffix of an image's format, which Pillow knows: the image was decoded before."""
    if image.startswith(b"\xff\xd8\xff"):
        return "jpg"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd but harmless metadata
        with Image.open(io.BytesIO(image)) as content:
            name = str(content.format)
    return SUFFIXES.get(name, name.lower())
