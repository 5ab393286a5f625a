"""Images from the web, fetched politely: few attempts, pauses between them, limits on time and size."""

import string
import time
from http.client import HTTPException, HTTPResponse, InvalidURL
from typing import cast
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

from contracap import __version__

PAUSES = (1.0, 4.0)  # seconds before the second and the third attempt
SILENCE = 10.0  # seconds for a connection, and for each further piece of the answer
LONGEST = 60.0  # seconds for a whole image, all attempts together
LARGEST = 100 * 2**20  # bytes
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that may change within seconds


class DownloadError(ValueError):
    """An image that could not be fetched. The message names its URL; `kind` is its category in counts."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


def download(url: str) -> bytes:
    """Return the content of an http or https URL. After `LONGEST` seconds there is no further attempt.

    Raises: DownloadError: if it is another URL, if all attempts fail (the kind is such as "http_404", or "no_answer"),
        or if the answer is larger than `LARGEST`.
    """
    url, end = url.strip(), time.monotonic() + LONGEST
    if not url.lower().startswith(("http://", "https://")):
        raise DownloadError(f"{url}: only http and https are fetched", "bad_url")
    for pause in (*PAUSES, None):
        try:
            return _attempt(url, end)
        except DownloadError:
            raise
        except HTTPError as error:
            error.close()
            failure = DownloadError(f"{url}: HTTP status {error.code}", f"http_{error.code}")
            if error.code not in TRANSIENT:
                break
        except (InvalidURL, ValueError) as error:  # such as a port that is not a number
            raise DownloadError(f"{url}: {error}", "bad_url") from error
        except (OSError, HTTPException) as error:
            failure = DownloadError(f"{url}: {getattr(error, 'reason', None) or error}", "no_answer")
        if pause is None or time.monotonic() + pause > end:
            break
        time.sleep(pause)
    raise failure


def _attempt(url: str, end: float) -> bytes:
    # Spaces and foreign letters are common in tables; escapes stay as they are
    request = Request(quote(url, safe=string.punctuation), headers={"User-Agent": f"contracap/{__version__}"})
    content = bytearray()
    with cast(HTTPResponse, urlopen(request, timeout=max(0.001, min(SILENCE, end - time.monotonic())))) as response:
        while piece := response.read1(2**16):
            content += piece
            if len(content) > LARGEST:
                raise DownloadError(f"{url}: larger than {LARGEST} bytes", "too_large")
            if time.monotonic() > end:
                raise TimeoutError(f"not complete after {LONGEST:.0f} s")
        announced = response.headers["Content-Length"]
    if announced is not None and len(content) < int(announced):
        raise ConnectionError(f"cut off after {len(content)} of {announced} bytes")
    return bytes(content)
