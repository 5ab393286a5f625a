import io
import os
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.Image import Transpose

from contracap.image_files import PIXEL_LIMIT, ImageError, decode, measure, pixel_count

from .image_samples import encode, largest_difference, rows, scene

DECODERS = ["simplejpeg", "Pillow"]
UPRIGHT = {  # EXIF orientation to the turn that undoes it
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test once with simplejpeg and once as if it were not installed."""
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr("contracap.image_files.simplejpeg", None)
    return request.param


def png_header(width: int, height: int) -> bytes:
    """A PNG file whose header promises this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_of_size(width: int, height: int) -> bytes:
    """A small JPEG file whose header promises this size."""
    data = bytearray(encode(scene(16, 16), "JPEG"))
    place = data.index(b"\xff\xc0") + 5  # after the marker, the segment's length and the precision
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


# --- decoding


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_pixels_equal_pillow(decoder: str, mode: str, options: dict) -> None:
    for size in ((61, 43), (1, 1), (1, 9)):
        data = encode(scene(*size, mode), "JPEG", **options)
        assert torch.equal(decode(data), rows(Image.open(io.BytesIO(data))))


def test_cmyk_jpeg_equals_pillow(decoder: str) -> None:
    data = encode(scene(mode="CMYK"), "JPEG", quality=95)
    assert torch.equal(decode(data), rows(Image.open(io.BytesIO(data))))
    assert largest_difference(decode(data), rows(scene())) < 120  # not inverted


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_turns_the_image_upright(decoder: str, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = scene()
    data = encode(stored, kind, exif=exif)
    with Image.open(io.BytesIO(data)) as opened:
        assert torch.equal(decode(data), rows(ImageOps.exif_transpose(opened)))
        assert torch.equal(decode(Image.open(io.BytesIO(data))), decode(data))
    assert measure(data, "image") == (*decode(data).shape[:0:-1], kind)
    if kind in ("PNG", "TIFF"):  # without loss
        turned = stored.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else stored
        assert torch.equal(decode(data), rows(turned))


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1"])
def test_damaged_exif_leaves_the_image_as_stored(decoder: str, exif: bytes) -> None:
    assert torch.equal(decode(encode(scene(), "JPEG", exif=exif)), decode(encode(scene(), "JPEG")))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_every_opaque_mode_becomes_rgb_as_in_pillow(mode: str) -> None:
    image = scene(mode=mode)
    assert torch.equal(decode(image), rows(image))
    if mode in ("1", "L", "P", "RGB"):
        assert torch.equal(decode(encode(image, "PNG")), rows(image))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparent_parts_become_white(mode: str) -> None:
    image = scene(mode="L" if mode == "LA" else "RGB").convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 30, axis=1).repeat(40, axis=0)))
    opaque = rows(image)[:, :, 30:]
    if mode == "P":
        image = image.quantize(256)
        opaque = rows(image)[:, :, 30:]
    elif mode != "PA":
        image = image.convert(mode)
    pixels = decode(encode(image, "PNG"))
    assert (pixels[:, :, :30] == 255).all()
    assert torch.equal(pixels[:, :, 30:], opaque)


def test_half_transparent_parts_are_mixed_with_white() -> None:
    pixels = decode(Image.new("RGBA", (2, 2), (100, 0, 255, 128)))
    assert largest_difference(pixels[:, 0, 0], torch.tensor([177, 127, 255])) <= 1


def test_a_transparent_colour_of_a_png_becomes_white() -> None:
    image = Image.new("RGB", (2, 1), (10, 20, 30))
    image.putpixel((1, 0), (1, 2, 3))
    assert decode(encode(image, "PNG", transparency=(1, 2, 3)))[:, 0].T.tolist() == [[10, 20, 30], [255] * 3]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 1, 2, 3])
    palette.putpixel((1, 0), 1)
    assert decode(encode(palette, "PNG", transparency=1))[:, 0].T.tolist() == [[10, 20, 30], [255] * 3]
    assert decode(encode(palette, "PNG", transparency=b"\xff\0"))[:, 0].T.tolist() == [[10, 20, 30], [255] * 3]


@pytest.mark.parametrize(("kind", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PPM", "<u2")])
def test_sixteen_bits_are_scaled_not_clipped(kind: str, dtype: str) -> None:
    values = np.array([[0, 128, 129, 257, 300], [32767, 32768, 65000, 65406, 65535]], dtype=dtype)
    pixels = decode(encode(Image.fromarray(values), kind))
    expected = np.round(values.astype(np.float64) / 257).astype(np.uint8)
    assert (pixels.numpy() == expected).all()
    wide = decode(Image.fromarray(values.astype(np.int32)))  # how older versions of Pillow hold a 16-bit PNG
    assert torch.equal(wide, pixels)


def test_float_pixels_are_refused_with_the_reason() -> None:
    image = Image.fromarray(np.zeros((2, 2), np.float32))
    for source in (image, encode(image, "TIFF")):
        with pytest.raises(ImageError, match="pixels are floats") as caught:
            decode(source)
        assert "broken" not in str(caught.value)
    tags = {256: 2, 257: 2, 258: 64, 259: 1, 262: 1, 273: 8, 277: 1, 278: 2, 279: 32, 339: 3}  # Pillow writes no such
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<I", 40) + bytes(32) + struct.pack("<H", len(tags)) + entries + bytes(4)
    with pytest.raises(ImageError, match=r"^image: pixels are 64-bit floats, which have no agreed white"):
        decode(data)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **lossless)
    assert decode(data)[:, 3, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "PPM", "WEBP", "ICO", "JPEG2000"])
def test_other_formats_are_read(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    image = scene(32, 32)
    pixels = decode(encode(image, kind, **options))
    assert largest_difference(pixels, rows(image)) <= 1


def test_a_path_a_string_and_bytes_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "ünï cödé.jpg"
    path.write_bytes(encode(scene(), "JPEG"))
    assert torch.equal(decode(path), decode(str(path)))
    assert torch.equal(decode(path), decode(path.read_bytes()))


# --- files that cannot be used


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"a text, no image", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\0\0\0\0WEBPVP8 "),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
    ids=lambda data: repr(data[:8]),
)
def test_a_file_that_is_not_an_image_raises_an_error_with_its_name(decoder: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "no image.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"no image\.jpg: "):
        decode(path)
    with pytest.raises(ImageError, match="sample 7: "):
        decode(data, name="sample 7")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.05, 0.9])
def test_a_cut_file_raises_an_error_with_its_name(decoder: str, kind: str, share: float) -> None:
    data = encode(scene(200, 150), kind)
    with pytest.raises(ImageError, match="cut: "):
        decode(data[: int(share * len(data))], name="cut")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "JPEG2000"])
def test_a_damaged_file_gives_pixels_or_an_error_with_its_name(kind: str) -> None:
    whole = encode(scene(64, 48), kind)
    random = np.random.default_rng(0)
    for _ in range(40):
        data = bytearray(whole)
        for place in random.integers(0, min(len(data), 400), 3):
            data[place] = random.integers(256)
        try:
            assert decode(bytes(data), name="damaged").shape[0] == 3
        except ImageError as error:
            assert str(error).startswith("damaged: ")


@pytest.mark.parametrize("size", [(10_000, 10_000), (65_000, 65_000)])  # Pillow warns of the one, refuses the other
@pytest.mark.parametrize("make", [jpeg_of_size, png_header], ids=["JPEG", "PNG"])
def test_decompression_bombs_raise_an_error_with_their_name(decoder: str, make, size: tuple[int, int]) -> None:
    assert size[0] * size[1] > PIXEL_LIMIT
    with pytest.raises(ImageError, match=rf"^bomb: .*{PIXEL_LIMIT}\D*; scale it down first$"):
        decode(make(*size), name="bomb")


def scanned(scans: int, width: int = 64) -> bytes:
    """A progressive JPEG whose last scan is there so many times."""
    data = encode(scene(width, 48), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scans * last + data[-2:]


def test_a_jpeg_that_repeats_its_scans_is_refused_before_it_is_decoded(decoder: str) -> None:
    assert decode(scanned(50)).shape == (3, 48, 64)
    with pytest.raises(ImageError, match=r"repeated: 51\d scans .* 100 allowed"):
        decode(scanned(500), name="repeated")
    large = bytearray(scanned(50))
    place = large.index(b"\xff\xc2") + 5
    large[place : place + 4] = struct.pack(">HH", 8900, 8900)  # fewer scans for more pixels
    with pytest.raises(ImageError, match="27 allowed for its size"):
        decode(bytes(large))


def test_bytes_that_look_like_scans_after_the_end_of_a_jpeg_do_not_count(decoder: str) -> None:
    data = encode(scene(), "JPEG")
    assert torch.equal(decode(data + b"\xff\xda" * 1000), decode(data))


def test_scans_behind_a_marker_that_decoders_drop_count(decoder: str) -> None:
    data = encode(scene(), "JPEG", progressive=True, restart_marker_blocks=1)
    last = data[data.rindex(b"\xff\xda") : -2]
    dropped = last.replace(b"\xff\xd0", b"\xff\x02\xff\xff\xff\xd0", 1)
    with pytest.raises(ImageError, match="100 allowed"):
        decode(data[:-2] + dropped + last * 200 + data[-2:])


def overlapping(entries: int, size: int) -> bytes:
    """EXIF whose entries all mean the same bytes, so that reading them takes entries times size."""
    head = b"II*\0" + struct.pack("<LH", 8, entries)
    return head + b"".join(struct.pack("<HHLL", 40000 + i, 7, size, 0) for i in range(entries)) + bytes(4) + bytes(size)


@contextmanager
def memory_below(limit: float) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_that_unfolds_to_more_than_the_file_is_not_read(kind: str) -> None:
    data = encode(scene(), kind, exif=overlapping(20_000, 500_000))
    with memory_below(30e6):
        assert decode(data).shape == (3, 40, 60)


@pytest.mark.parametrize("kind", ["TIFF", "TIFF of odd order", "AVIF", "AVIF behind others"])
def test_a_file_whose_directory_unfolds_is_refused(kind: str) -> None:
    bomb = overlapping(20_000, 500_000)
    if kind == "TIFF of odd order":
        bomb = b"II\0*" + bomb[4:]
    elif kind != "TIFF":
        harmless = b"II*\0" + struct.pack("<LH", 8, 0) + b"?" * (len(bomb) - 10)  # Pillow reads what it writes
        bomb = encode(scene(), "AVIF", exif=harmless).replace(harmless, bomb)
        bomb += b"II*\0" * 100 if kind == "AVIF behind others" else b""
    with memory_below(30e6), pytest.raises(ImageError, match="metadata"):
        decode(bomb)


def test_exif_headers_inside_one_another_are_read_once(decoder: str) -> None:
    data = encode(scene(), "JPEG")
    headers = b"\xff\xe1\xff\xffExif\0\0" * 2000 + bytes(65535 - 20_000)
    with memory_below(10e6):
        assert torch.equal(decode(data[:2] + headers + data[2:]), decode(data))


def test_a_jpeg_with_much_ordinary_metadata_is_turned_upright(decoder: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    plain = decode(encode(scene(), "JPEG", exif=exif))
    assert torch.equal(decode(encode(scene(), "JPEG", exif=exif, icc_profile=bytes(4_000_000))), plain)


def repeated_in_a_gif(part: bytes, times: int) -> bytes:
    return b"GIF89a\1\0\1\0\0\0\0!\xfe" + part * times + b"\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;"


@pytest.mark.parametrize(
    "make",
    [
        lambda: b"II*\0" + struct.pack("<LH", 8, 4000) + b"".join(
            struct.pack("<HHLL", 34665, 4, 1, 10 + 12 * i) for i in range(4000)
        ),
        lambda: repeated_in_a_gif(b"\xff" + bytes(255), 16_000),
        lambda: b"P6 1000 400 254\n" + bytes(1_200_000),
        lambda: b"P3 1000 700 255\n" + b"1 " * 2_100_000,
        lambda: b"P2 1000 1000 255\n" + b"#\n" * 200_000,
        lambda: jpeg_of_size(16, 16)[:-2].replace(b"\xff\xdb", b"\xff\xfe\0\2" * 2_000_000 + b"\xff\xdb", 1),
        lambda: b"".join([png_header(9, 9)[:33], with_chunk(b"", b"teSt", b"") * 400_000, png_header(9, 9)[33:]]),
    ],
    ids=["TIFF directories", "GIF comment", "PPM of odd depth", "PPM in words", "PPM comments", "JPEG", "PNG"],
)  # fmt: skip
def test_a_file_of_many_small_parts_is_refused_in_time(make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("contracap.image_files.simplejpeg", None)
    data, before = make(), time.process_time()
    with pytest.raises(ImageError):
        decode(data)
    assert time.process_time() - before < 1


def icon(inner: bytes) -> bytes:
    """An icon that announces 64 x 64 pixels."""
    return struct.pack("<HHHBBBBHHLL", 0, 1, 1, 64, 64, 0, 0, 1, 32, len(inner), 22) + inner


def test_the_size_of_an_icon_is_that_of_the_image_inside() -> None:
    assert pixel_count(icon(png_header(13_000, 13_000))) == 13_000**2
    with pytest.raises(ImageError, match="13000 x 13000"):
        decode(icon(png_header(13_000, 13_000)))
    with pytest.raises(ImageError, match="13000 x 13000"):
        decode(icon(struct.pack("<LLLHHLLLLLL", 40, 13_000, 26_000, 1, 32, 0, 0, 0, 0, 0, 0)))


@pytest.mark.parametrize("kind", ["png", "bmp"])
def test_an_icon_is_read(kind: str) -> None:
    image = scene(64, 64, "RGBA")
    assert torch.equal(decode(encode(image, "ICO", bitmap_format=kind, sizes=[(64, 64), (16, 16)])), rows(image))


def test_one_image_takes_no_more_memory_than_stated(tmp_path: Path) -> None:
    program = (
        "import sys, torch; from contracap.image_files import decode; from PIL import Image; Image.init()\n"
        "def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
        "before = peak()\n"
        "assert all(decode(path).shape == (3, 3000, 3000) for path in sys.argv[1:])\n"
        "print((peak() - before) * 1024)"
    )
    for mode in ("RGBA", "I;16"):
        Image.new(mode, (3000, 3000)).save(tmp_path / f"{mode}.png", compress_level=1)
    done = subprocess.run([sys.executable, "-c", program, *tmp_path.iterdir()], capture_output=True, check=True)
    assert int(done.stdout) < 9 * 3000 * 3000 + 30e6


@pytest.mark.parametrize(("mode", "most"), [("CMYK", "61946643"), ("RGB", "80530636")])
def test_a_progressive_jpeg_that_pillow_decodes_has_a_lower_limit(monkeypatch, mode: str, most: str) -> None:
    monkeypatch.setattr("contracap.image_files.simplejpeg", None)
    image = bytearray(encode(scene(mode=mode), "JPEG", progressive=True))
    place = image.index(b"\xff\xc2") + 5
    image[place : place + 4] = struct.pack(">HH", 9000, 9000)
    with pytest.raises(ImageError, match=f"9000 x 9000 pixels are more than the {most} allowed"):
        decode(bytes(image))


def test_formats_that_take_more_memory_have_a_lower_limit() -> None:
    image = bytearray(encode(scene(), "JPEG2000"))
    place = image.index(b"ihdr") + 4
    image[place : place + 8] = struct.pack(">LL", 5000, 5000)
    with pytest.raises(ImageError, match="5000 x 5000 pixels are more than"):
        decode(bytes(image))


def with_chunk(data: bytes, kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    """A PNG with one more chunk after its header."""
    crc = zlib.crc32(kind + content) if crc is None else crc
    return data[:33] + struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc) + data[33:]


@pytest.mark.parametrize(
    ("kind", "content", "crc"),
    [
        (b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000)), None),
        (b"iCCP", b"a\0\0" + zlib.compress(bytes(3_000_000)), None),
        (b"tEXt", b"a\0b", 7),
        (b"eXIf", b"II*\0", 7),
        (b"acTL", b"", None),
    ],
)
def test_a_png_is_read_whatever_its_metadata(kind: bytes, content: bytes, crc: int | None) -> None:
    image = scene()
    exif = Image.Exif()
    exif[0x0112] = 3
    data = with_chunk(encode(image, "PNG", exif=exif), kind, content, crc)
    assert torch.equal(decode(data), rows(image.transpose(Transpose.ROTATE_180)))


def test_a_pipe_and_a_device_are_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for path, word in ((tmp_path / "pipe.jpg", "named pipe"), ("/dev/zero", "device")):
        with pytest.raises(ImageError, match=word):
            decode(path)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
        (b"<?xml version='1.0'?>\n<!-- x --><svg></svg>", "SVG"),
        (b'{"error": "not found"}', "JSON"),
        (b"\0\0\0 ftypisom", "video"),
        (bytes(100), "zero"),
        (b"404: Not Found", "404: Not Found"),
        (b"\x1b[31mred\x1b[0m", r"none of JPEG|text"),
    ],
)
def test_what_lies_in_an_image_s_place_is_said(data: bytes, word: str) -> None:
    with pytest.raises(ImageError, match=word) as caught:
        decode(data)
    assert "\x1b" not in str(caught.value)


def test_heic_is_read_with_its_extra_and_named_without(monkeypatch: pytest.MonkeyPatch) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), "red")).save(file, format="HEIF")
    assert decode(file.getvalue()).shape == (3, 48, 64)
    assert measure(file.getvalue(), "image") == (64, 48, "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=r"HEIC.*contracap\[heic\]"):
        decode(file.getvalue())


def test_a_large_pillow_image_is_refused_before_it_is_loaded() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(png_header(10_000, 10_000)))
    with pytest.raises(ImageError, match="10000 x 10000 pixels are more than"):
        decode(image)


def test_a_missing_file_a_folder_and_an_image_without_pixels_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="without pixels"):
        decode(Image.new("RGB", (0, 5)))
    with pytest.raises(FileNotFoundError, match=r"missing\.jpg: no such image file"):
        decode(tmp_path / "missing.jpg")
    with pytest.raises(ImageError, match=f"{tmp_path.name}: cannot be read: Is a directory"):
        decode(tmp_path)
