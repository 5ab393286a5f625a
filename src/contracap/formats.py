"""What a file is, by its first bytes: a format of images, or what often lies in an image's place."""

import re

# Formats that Pillow reads by itself; EPS, for one, would start a foreign program on the file.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000", "ICO")
PLUGINS = {"HEIF": "pillow_heif", "JXL": "pillow_jxl"}  # formats of the extra `formats`, and who reads them
HEAD_BYTES = 512  # that `image_format` and `not_an_image` look at

_HEADS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "GIF": rb"GIF8[79]a",
    "WEBP": rb"RIFF....WEBP",
    "AVIF": rb"....ftypavi[fs]",
    "HEIF": rb"....ftyp(?:hei[cxms]|hev[cxms]|mif1|msf1)",
    "JPEG2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    "JXL": rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a",
    "BMP": rb"BM.{4}\0{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
}
_NOT_IMAGES = {
    "a Git LFS pointer, not the image itself: run git lfs pull": rb"version https://git-lfs",
    "an SVG drawing: convert it to PNG": rb"\s*<(?=.*svg)[?!s]",
    "a web page (HTML), not an image: download the image itself": rb"\s*<(!doctype html|html|head|body|!--)",
    "XML, such as a server's error message, not an image: download the image itself": rb"\s*<(\?xml|error)",
    "JSON, such as a server's error message, not an image: download the image itself": rb"\s*[\[{]\s*[\"{\[\]}]",
    "a PDF: convert its pages to images": rb"%PDF-",
    "a PostScript file: convert it to PNG": rb"%!PS",
    "a Photoshop file: convert it to PNG": rb"8BPS",
    "a video": rb"....ftyp|\x1a\x45\xdf\xa3|RIFF....AVI ",
    "an archive: unpack it": rb"PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf",
}
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
        return f"a text, not an image: it begins {start!r}"
    return f"not an image, or none of {', '.join(FORMATS)}"
