"""Image files of all formats to RGB pixels. A damaged or hostile file is an `ImageError`."""

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image
from torch import Tensor

from contracap.files import read_regular
from contracap.formats import (
    HEAD_BYTES,
    CostlyError,
    bare_png,
    image_format,
    jpeg_scans,
    not_an_image,
    open_image,
    tiff_float_bits,
    unfolds,
)

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# Images of more pixels are refused before they are decoded: 2^30 / 12, the number above which Pillow warns.
PIXEL_LIMIT = 89_478_485
MIN_SIDE = 8  # pixels of the shorter side; training skips smaller images, such as the 1 x 1 of a web page
# One image takes at most so much memory while it is decoded. What the pixels of a format take at their peak, the
# RGB that is returned included, lowers its limit of pixels; 9 bytes are those of a progressive JPEG.
MAX_DECODING_BYTES = 9 * PIXEL_LIMIT
DECODING_BYTES = {"WEBP": 18, "AVIF": 18, "JPEG2000": 36, "HEIF": 18}
MAX_SCANS = 100  # of a progressive JPEG; encoders make 10
MAX_SCANNED_PIXELS = 24 * PIXEL_LIMIT  # pixels times scans
JPEG_HEAD = b"\xff\xd8\xff"
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
STRIP_PIXELS = 2**20  # that are converted to RGB at a time


class ImageError(ValueError):
    """An image that cannot be used. The message names it; `kind` is its category in counts."""

    kind = "broken_picture"


class ImageSizeError(ImageError):
    """An image of too many pixels, or of too few."""

    kind = "picture_size"


def decode(source: str | Path | bytes | Image.Image, name: str | None = None) -> UInt8[Tensor, "3 height width"]:
    """Return the RGB pixels of an image file or a Pillow image, turned upright by its EXIF orientation.

    Transparent parts become white, 16 bits are scaled to 8, and an animation gives its first frame.

    Args:
        source: a path, the bytes of a file, or a Pillow image.
        name: the image's name in errors; by default the path.

    Raises: FileNotFoundError: if the path does not exist. ImageError: if the file is broken, cut, empty, of another
        format than `FORMATS`, or of more than `PIXEL_LIMIT` pixels.
    """
    if isinstance(source, Image.Image):
        return to_tensor(_pillow_pixels(source, name or getattr(source, "filename", "") or "image"))
    if isinstance(source, str | Path):
        name = name or str(source)
        try:
            data = read_regular(source)
        except FileNotFoundError:
            raise FileNotFoundError(f"{name}: no such image file") from None
        except (OSError, ValueError) as error:  # ValueError: a path with a null character
            raise ImageError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    elif isinstance(source, bytes):
        name, data = name or "image", source
    else:
        raise TypeError(f"an image is a path, bytes or a Pillow image, not {type(source).__name__}")
    if not data:
        raise ImageError(f"{name}: the file is empty")
    pixels = _jpeg_pixels(data, name)
    if pixels is None:
        pixels = _pillow_pixels(data, name)
    return to_tensor(pixels)


def require_trainable_size(height: int, width: int, name: str) -> None:
    """Raises: ImageSizeError: if an image is too small to be trained on."""
    if min(height, width) < MIN_SIDE:
        raise ImageSizeError(f"{name}: {width} x {height} pixels; the shorter side must have at least {MIN_SIDE}")


def to_tensor(pixels: np.ndarray) -> UInt8[Tensor, "3 height width"]:
    """Return pixels [height, width, 3] as a tensor of the same memory."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def measure(data: bytes, name: str) -> tuple[int, int, str]:
    """Return width and height of the upright image, in pixels, and its format, from the header of a file alone.

    Raises: ImageError: as `decode` does, apart from damage after the header.
    """
    if not data:
        raise ImageError(f"{name}: the file is empty")
    with _silent_pillow():
        try:
            image = open_image(data)
            width, height = image.size
            by_simplejpeg = data.startswith(JPEG_HEAD) and image.mode != "CMYK"
            _check_size(height, width, name, 9 if by_simplejpeg else _decoding_bytes(image))
            _check_scans(data, height * width, name)
        except ImageError:
            raise
        except Exception as error:
            if (bare := _without_metadata(data, error)) is not None:
                return measure(bare, name)
            raise _image_error(error, data, name) from error
        if image.format != "TIFF" and _orientation(image) in SIDEWAYS:  # Pillow turns a TIFF as it opens it
            width, height = height, width
        return width, height, image.format or "unknown"


def make_thumbnail(pixels: UInt8[Tensor, "3 height width"], side: int) -> Image.Image:
    """Return the whole image, at most `side` pixels wide and high."""
    image = to_pillow(pixels)
    image.thumbnail((side, side))
    return image


def to_pillow(pixels: UInt8[Tensor, "3 height width"]) -> Image.Image:
    """Return pixels as a Pillow image."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def encode_jpeg(image: Image.Image) -> bytes:
    """Return the bytes of a JPEG file for a page."""
    image.save(file := io.BytesIO(), "JPEG", quality=80)
    return file.getvalue()


def pixel_count(data: bytes) -> int:
    """Return the number of pixels that the header of a file declares; 0 if it cannot be read."""
    with _silent_pillow():
        try:
            return math.prod(open_image(data).size)
        except Exception:  # `decode` says what is wrong
            return 0


def _jpeg_pixels(data: bytes, name: str) -> np.ndarray | None:
    """Return upright RGB of a grey or colour JPEG; None if it is left to Pillow: other formats, CMYK, damaged files."""
    if simplejpeg is None or not data.startswith(JPEG_HEAD):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        height, width = int(height), int(width)
        _check_size(height, width, name)
        if colours not in ("YCbCr", "Gray", "RGB"):
            return None
        _check_scans(data, height * width, name)
        pixels = simplejpeg.decode_jpeg(data, "RGB")
    except ImageError:
        raise
    except ValueError:
        return None
    header = data[: data.find(b"\xff\xda")]  # what comes before the first scan, be it that of a thumbnail inside EXIF
    if b"Exif\0" in header or b"tiff:Orientation" in header:  # else nothing to parse, which takes as long as decoding
        with _silent_pillow():
            pixels = np.ascontiguousarray(_turn(pixels, _orientation(data)))
    return pixels


def _pillow_pixels(source: bytes | Image.Image, name: str) -> np.ndarray:
    """Return upright RGB of any image that Pillow reads."""
    with _silent_pillow():
        try:
            image = source if isinstance(source, Image.Image) else open_image(source)
            _check_size(image.height, image.width, name, _decoding_bytes(image))
            if isinstance(source, bytes):
                _check_scans(source, image.height * image.width, name)
            image.load()
            if image.mode == "F":
                raise ImageError(f"{name}: pixels are floats, which have no agreed white: store 8 or 16 bits")
            return _upright_rgb(image)
        except ImageError:
            raise
        except Exception as error:
            if (bare := _without_metadata(source, error)) is not None:
                return _pillow_pixels(bare, name)
            raise _image_error(error, source, name) from error


def _without_metadata(source: bytes | Image.Image, error: Exception) -> bytes | None:
    """Return a PNG without the metadata that may be what is too large, or damaged; None if that is not the reason."""
    if isinstance(error, ImportError | CostlyError | Image.DecompressionBombError):
        return None
    return bare if isinstance(source, bytes) and len(bare := bare_png(source)) < len(source) else None


def _image_error(error: Exception, source: bytes | Image.Image, name: str) -> ImageError:
    """Return what is to be raised for an error of Pillow, which raises almost any for a damaged file."""
    if isinstance(error, ImportError | CostlyError):
        return ImageError(f"{name}: {error}")
    if isinstance(error, Image.DecompressionBombError):
        return ImageSizeError(f"{name}: more than the {PIXEL_LIMIT} pixels allowed; scale it down first")
    if isinstance(error, Image.UnidentifiedImageError):
        return ImageError(f"{name}: {_describe_unidentified(source)}")
    says_more = not re.search("truncated|broken data stream", str(error), re.IGNORECASE)
    return ImageError(f"{name}: broken or cut off{f': {error}' if says_more else ''}")


def _describe_unidentified(source: bytes | Image.Image) -> str:
    """Describe a file that no decoder takes."""
    head = source[:HEAD_BYTES] if isinstance(source, bytes) else b""
    format = image_format(head)
    if format == "TIFF" and isinstance(source, bytes) and (bits := tiff_float_bits(source)):
        return f"pixels are {bits}-bit floats, which have no agreed white: store 8 or 16 bits"
    return (
        f"a {format} file, broken, cut off, or of a kind that Pillow does not read"
        if format
        else f"not an image: {not_an_image(head)}"
    )


def _decoding_bytes(image: Image.Image) -> int:
    """Return the peak memory of Pillow in bytes per pixel, including the RGB that is returned."""
    if image.mode == "CMYK":  # of a progressive JPEG: 8 of coefficients and 4 of pixels
        return 13
    return DECODING_BYTES.get(image.format or image.mode, 10 if "progressive" in image.info else 8)


def _check_size(height: int, width: int, name: str, bytes_per_pixel: int = 9) -> None:
    limit = min(PIXEL_LIMIT, MAX_DECODING_BYTES // bytes_per_pixel)
    if height * width > limit:
        raise ImageSizeError(
            f"{name}: {width} x {height} pixels are more than the {limit} allowed; scale it down first"
        )
    if height * width == 0:
        raise ImageSizeError(f"{name}: {width} x {height}: an image without pixels")


def _check_scans(data: bytes, pixels: int, name: str) -> None:
    """Refuse a JPEG with so many scans that a few hundred kB take minutes to decode."""
    most = min(MAX_SCANS, MAX_SCANNED_PIXELS // pixels)
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > most and (scans := jpeg_scans(data)) > most:
        raise ImageSizeError(f"{name}: {scans} scans are more than the {most} allowed for its size; save it again")


def _upright_rgb(image: Image.Image) -> np.ndarray:
    """Return 8-bit RGB of a loaded image, strip by strip: converting it whole takes several times its memory."""
    orientation = _orientation(image)
    width, height = image.size
    pixels = np.empty((width, height, 3) if orientation in SIDEWAYS else (height, width, 3), np.uint8)
    stored = _turn(pixels, {6: 8, 8: 6}.get(orientation, orientation))  # a view; the turns of 6 and 8 undo each other
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = image if rows >= height else image.crop((0, top, width, min(top + rows, height)))
        stored[top : top + rows] = _rgb(strip)
    return pixels


def _rgb(image: Image.Image) -> np.ndarray:
    """Return 8-bit RGB of a loaded image of any mode."""
    if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow keeps 16-bit grey in both; its convert() clips
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def _orientation(source: bytes | Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if it is missing or damaged."""
    try:
        image = source if isinstance(source, Image.Image) else open_image(source)
        raw = image.info.get("Raw profile type exif")  # as ImageMagick writes it
        tags = image.info.get("exif") or (bytes.fromhex("".join(raw.split("\n")[3:])) if raw else b"")
        if unfolds(tags.removeprefix(b"Exif\0\0")):
            return 1
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data makes Pillow raise almost anything, and the pixels are good without it
        return 1


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return an upright view [height, width, 3] of an image stored in this EXIF orientation, if it is known."""
    if orientation in SIDEWAYS:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


@contextmanager
def _silent_pillow() -> Iterator[None]:
    """A context without Pillow's warnings: sizes are checked here, and a damaged file gives its pixels or an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
