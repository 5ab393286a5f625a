"""Images to pixels: decoding of any image file, then sizes, crops and normalisation as the released weights saw."""

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import ExifTags, Image
from torch import Tensor
from torch.nn.functional import interpolate

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
# One image takes at most so much memory while it is decoded. What the pixels of a format take at their peak, the
# RGB that is returned included, lowers its limit of pixels; 9 bytes are those of a progressive JPEG.
MAX_DECODING_BYTES = 9 * PIXEL_LIMIT
DECODING_BYTES = {"WEBP": 18, "AVIF": 18, "JPEG2000": 36, "HEIF": 18}
MAX_SCANS = 100  # of a progressive JPEG; encoders make 10
MAX_SCANNED_PIXELS = 24 * PIXEL_LIMIT  # pixels times scans
STRIP_PIXELS = 2**20  # that are converted to RGB at a time
# An image longer than this many times its shorter side loses its far ends, outside every centre crop, before resizing.
LONGEST_RATIO = 1000


class ImageError(ValueError):
    """An image that cannot be used; the message names it, `kind` is what it is counted under."""

    kind = "broken_picture"


class ImageSizeError(ImageError):
    """An image of too many pixels, or of too few."""

    kind = "picture_size"


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """How an image becomes the square of pixels that the model reads."""

    size: int = 224
    """Height and width in pixels."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Subtracted from pixels scaled to 0..1; red, green, blue."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Divides what is left; red, green, blue."""
    resize: Literal["shortest", "squash"] = "shortest"
    """`shortest` resizes the shorter side to `size` and crops the centre; `squash` ignores the aspect ratio."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"image size is {self.size}; it must be at least 1 pixel")
        if min(self.std) <= 0:
            raise ValueError(f"image std is {self.std}; each must be above 0")


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Random crops and mirror images for training."""

    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest share of the image's area that a crop keeps."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest ratio of a crop's width to its height."""
    flip: float = 0.0
    """Probability of a mirror image."""

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"augmentation crop_scale is {self.crop_scale}; it must be low, high with 0 < low <= high <= 1"
            )
        if not 0 < self.crop_ratio[0] <= self.crop_ratio[1]:
            raise ValueError(f"augmentation crop_ratio is {self.crop_ratio}; it must be low, high with 0 < low <= high")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"augmentation flip is {self.flip}; a probability is 0 to 1")


def decode(source: str | Path | bytes | Image.Image, name: str | None = None) -> UInt8[Tensor, "3 height width"]:
    """RGB pixels of an image file (a path or its bytes) or a Pillow image, turned upright by its EXIF orientation.

    Transparent parts become white, 16 bits are scaled to 8, of an animation the first frame counts. `name` stands for
    the image in errors; without it that is the path.

    Raises: FileNotFoundError: if the path does not exist. ImageError: if the file is broken, cut, empty, of another
    format than `FORMATS`, or of more than `PIXEL_LIMIT` pixels.
    """
    if isinstance(source, Image.Image):
        return _to_tensor(_pillow_pixels(source, name or getattr(source, "filename", "") or "image"))
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
    return _to_tensor(pixels)


def pixel_count(data: bytes) -> int:
    """The pixels that a file says it has, before anything is decoded; 0 where it cannot tell."""
    with _silent_pillow():
        try:
            return math.prod(open_image(data).size)
        except Exception:  # as above: what is wrong is said by `decode`
            return 0


def resize_and_crop(
    picture: UInt8[Tensor, "3 height width"], config: ImageConfig
) -> UInt8[Tensor, "3 {config.size} {config.size}"]:
    """The image as evaluation sees it: resized by `config.resize`, then its centre.

    Source: sizes and offsets are those of torchvision's Resize and CenterCrop, as in open_clip's evaluation transform.
    """
    size = config.size
    if config.resize == "squash":
        return _resize_exactly(picture, size, size)
    height, width = picture.shape[1:]
    longest = LONGEST_RATIO * min(height, width)
    picture = _centre(picture, min(height, longest), min(width, longest))
    height, width = picture.shape[1:]
    if width <= height:
        picture = _resize_exactly(picture, int(size * height / width), size)
    else:
        picture = _resize_exactly(picture, size, int(size * width / height))
    return _centre(picture, size, size).contiguous()


def augment(
    picture: UInt8[Tensor, "3 height width"],
    config: ImageConfig,
    augmentation: AugmentationConfig,
    generator: np.random.Generator,
) -> UInt8[Tensor, "3 {config.size} {config.size}"]:
    """A random crop of the image, resized, perhaps mirrored; a function of the generator's state.

    Source: torchvision's RandomResizedCrop, whose rule this is: area uniform, logarithm of the aspect ratio uniform.
    """
    top, left, height, width = _random_crop(picture.shape[1], picture.shape[2], augmentation, generator)
    picture = _resize(picture[:, top : top + height, left : left + width], config.size, config.size)
    return picture.flip(2) if generator.random() < augmentation.flip else picture


def normalise(
    pixels: UInt8[Tensor, "batch 3 height width"], config: ImageConfig
) -> Float32[Tensor, "batch 3 height width"]:
    """(pixels / 255 - mean) / std, on the device of the pixels."""
    scale, shift = _scale_and_shift(config.mean, config.std, pixels.device)
    return pixels.float().mul_(scale).add_(shift)  # in place: on CPUs fresh memory costs more than the arithmetic


@lru_cache(maxsize=16)
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # the cached tensors also serve callers outside of inference mode
        scale = [1 / (255 * deviation) for deviation in std]
        shift = [-centre / deviation for centre, deviation in zip(mean, std, strict=True)]
        values = torch.tensor([scale, shift], dtype=torch.float32, device=device)
    return values[0].reshape(3, 1, 1), values[1].reshape(3, 1, 1)


def _jpeg_pixels(data: bytes, name: str) -> np.ndarray | None:
    """Upright RGB of a grey or colour JPEG; None where Pillow has to say: other formats, CMYK, damaged files."""
    if simplejpeg is None or not data.startswith(b"\xff\xd8\xff"):
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
            pixels = np.ascontiguousarray(_turned(pixels, _orientation(data)))
    return pixels


def _pillow_pixels(source: bytes | Image.Image, name: str) -> np.ndarray:
    """Upright RGB of any image, by Pillow."""
    # Damaged files make Pillow raise almost anything; whatever it is, the file cannot be used.
    with _silent_pillow():
        try:
            picture = source if isinstance(source, Image.Image) else open_image(source)
            _check_size(picture.height, picture.width, name, _decoding_bytes(picture))
            if isinstance(source, bytes):
                _check_scans(source, picture.height * picture.width, name)
            picture.load()
            if picture.mode == "F":
                raise ImageError(f"{name}: pixels are floats, which have no agreed white: store 8 or 16 bits")
            return _upright_rgb(picture)
        except ImageError:
            raise
        except (ImportError, CostlyError) as error:
            raise ImageError(f"{name}: {error}") from error
        except Image.DecompressionBombError as error:
            raise ImageSizeError(f"{name}: more than the {PIXEL_LIMIT} pixels allowed; scale it down first") from error
        except Exception as error:
            if isinstance(source, bytes) and len(bare := bare_png(source)) < len(source):
                return _pillow_pixels(bare, name)  # its metadata may be what is too large, or damaged
            if isinstance(error, Image.UnidentifiedImageError):
                raise ImageError(f"{name}: {_unidentified(source)}") from error
            says_more = not re.search("truncated|broken data stream", str(error), re.IGNORECASE)
            raise ImageError(f"{name}: broken or cut off{f': {error}' if says_more else ''}") from error


def _unidentified(source: bytes | Image.Image) -> str:
    """What a file is that no decoder takes."""
    head = source[:HEAD_BYTES] if isinstance(source, bytes) else b""
    format = image_format(head)
    if format == "TIFF" and isinstance(source, bytes) and (bits := tiff_float_bits(source)):
        return f"pixels are {bits}-bit floats, which have no agreed white: store 8 or 16 bits"
    return (
        f"a {format} file, broken, cut off, or of a kind that Pillow does not read"
        if format
        else f"not an image: {not_an_image(head)}"
    )


def _decoding_bytes(picture: Image.Image) -> int:
    """Bytes a pixel that Pillow takes at its peak, the RGB that is returned included."""
    if picture.mode == "CMYK":  # of a progressive JPEG: 8 of coefficients and 4 of pixels
        return 13
    return DECODING_BYTES.get(picture.format or picture.mode, 10 if "progressive" in picture.info else 8)


def _check_size(height: int, width: int, name: str, bytes_per_pixel: int = 9) -> None:
    limit = min(PIXEL_LIMIT, MAX_DECODING_BYTES // bytes_per_pixel)
    if height * width > limit:
        raise ImageSizeError(
            f"{name}: {width} x {height} pixels are more than the {limit} allowed; scale it down first"
        )
    if height * width == 0:
        raise ImageSizeError(f"{name}: {width} x {height}: an image without pixels")


def _check_scans(data: bytes, pixels: int, name: str) -> None:
    """Refuse a JPEG that decodes its pixels over and over, which a file of a few hundred kB does for minutes."""
    most = min(MAX_SCANS, MAX_SCANNED_PIXELS // pixels)
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > most and (scans := jpeg_scans(data)) > most:
        raise ImageSizeError(f"{name}: {scans} scans are more than the {most} allowed for its size; save it again")


def _upright_rgb(picture: Image.Image) -> np.ndarray:
    """8-bit RGB of a loaded image, strip by strip: conversions of the whole would take several times its memory."""
    orientation = _orientation(picture)
    width, height = picture.size
    pixels = np.empty((width, height, 3) if orientation in (5, 6, 7, 8) else (height, width, 3), np.uint8)
    stored = _turned(pixels, {6: 8, 8: 6}.get(orientation, orientation))  # a view; the turns of 6 and 8 undo each other
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = picture if rows >= height else picture.crop((0, top, width, min(top + rows, height)))
        stored[top : top + rows] = _rgb(strip)
    return pixels


def _rgb(picture: Image.Image) -> np.ndarray:
    """8-bit RGB of a loaded image of any mode."""
    if picture.mode == "I" or picture.mode.startswith("I;16"):  # Pillow keeps 16-bit grey in both; its convert() clips
        values = np.asarray(picture).astype(np.int64).clip(0, 65535)
        grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return np.asarray(picture.convert("RGB"))


def _orientation(source: bytes | Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where it is missing or damaged."""
    try:
        picture = source if isinstance(source, Image.Image) else open_image(source)
        raw = picture.info.get("Raw profile type exif")  # as ImageMagick writes it
        tags = picture.info.get("exif") or (bytes.fromhex("".join(raw.split("\n")[3:])) if raw else b"")
        if unfolds(tags.removeprefix(b"Exif\0\0")):
            return 1
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data makes Pillow raise almost anything, and the pixels are good without it
        return 1


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Upright view [height, width, 3] of an image stored in this EXIF orientation; unknown ones change nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _to_tensor(pixels: np.ndarray) -> UInt8[Tensor, "3 height width"]:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _resize(
    picture: UInt8[Tensor, "3 from_height from_width"], height: int, width: int
) -> UInt8[Tensor, "3 {height} {width}"]:
    """Bicubic, antialiased, in uint8 as Pillow computes it: the float path does not round between its two passes."""
    if picture.shape[1:] == (height, width):
        return picture.contiguous()
    resized = interpolate(picture[None], size=(height, width), mode="bicubic", antialias=True)
    return resized[0].contiguous()


def _resize_exactly(
    picture: UInt8[Tensor, "3 from_height from_width"], height: int, width: int
) -> UInt8[Tensor, "3 {height} {width}"]:
    """Resize as `_resize` does, but by Pillow where a side grows or shrinks to more than 5/8: torch's 16-bit weights
    would leave one value in a million off by 2 there. Such images are small, so the time hardly counts."""
    sides = ((picture.shape[1], height), (picture.shape[2], width))
    if all(before == after or before >= 1.6 * after for before, after in sides):
        return _resize(picture, height, width)
    pixels = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BICUBIC)
    return _to_tensor(np.array(pixels))


def _centre(
    picture: UInt8[Tensor, "3 from_height from_width"], height: int, width: int
) -> UInt8[Tensor, "3 {height} {width}"]:
    top = round((picture.shape[1] - height) / 2)  # to the even number at one half, as torchvision does
    left = round((picture.shape[2] - width) / 2)
    return picture[:, top : top + height, left : left + width]


def _random_crop(
    height: int, width: int, augmentation: AugmentationConfig, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height, width of a random crop; after 10 that do not fit, the largest allowed one in the centre."""
    low, high = augmentation.crop_ratio
    for _ in range(10):
        area = height * width * generator.uniform(*augmentation.crop_scale)
        ratio = math.exp(generator.uniform(math.log(low), math.log(high)))
        crop_width = round(math.sqrt(area * ratio))
        crop_height = round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(generator.integers(height - crop_height + 1))
            left = int(generator.integers(width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_height, crop_width = height, width
    if width / height < low:
        crop_height = min(height, max(1, round(width / low)))
    elif width / height > high:
        crop_width = min(width, max(1, round(height * high)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


@contextmanager
def _silent_pillow() -> Iterator[None]:
    """No warnings from Pillow: sizes are checked here, and a damaged file either gives its pixels or an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
