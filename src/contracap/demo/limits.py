"""What a visitor's request may be, beyond what gradio itself looks at."""

import re

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.formparsers import MultiPartException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from contracap.web import MIB, BodyTooLargeError, limited

LARGEST_PICTURE = 20  # MiB
LARGEST_UPLOAD = 100  # MiB, all pictures that are uploaded together
LARGEST_QUESTION = 1  # MiB, whatever else is asked: texts and numbers
UPLOAD = re.compile(r"/upload/?$")
ELSEWHERE = re.compile(r"/(file[=/]https?:|proxy=)", re.IGNORECASE)  # routes at which gradio asks other servers


class LimitVisitors:
    """Middleware that refuses what is too large, uploads that are no files, and to ask other servers, in one line."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif ELSEWHERE.search(scope["path"]):
            await PlainTextResponse("this page fetches nothing", 403)(scope, receive, send)
        else:
            await self._limited(scope, receive, send)

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        uploads = UPLOAD.search(scope["path"]) is not None
        most = LARGEST_UPLOAD if uploads else LARGEST_QUESTION
        counted = limited(scope, receive, most * MIB)
        files = FilesOnly(dict(scope["headers"]).get(b"content-type", b"")) if uploads else None
        refusal = None

        async def checked() -> Message:
            nonlocal refusal
            try:
                message = await counted()
                if files is not None:
                    files.look_at(message.get("body", b""))
            except BodyTooLargeError:
                what = "pictures that are uploaded together" if uploads else "a request"
                refusal = PlainTextResponse(f"{what} may have {most} MiB, the maximum here", 413)
            except NotAFileError:
                refusal = PlainTextResponse("only files can be uploaded, in a form's field `files`", 400)
            else:
                return message
            raise MultiPartException("refused")  # for which gradio deletes what it has read

        async def written(message: Message) -> None:
            if refusal is None:
                await send(message)

        try:
            await self.app(scope, checked, written)
        except Exception:
            if refusal is None:
                raise
        if refusal is not None:
            await refusal(scope, receive, send)


class NotAFileError(Exception):
    """A part of a form is a plain field, which gradio would hold in memory, and fail on."""


class FilesOnly:
    """Looks at a form as it comes; a form that is broken is left to gradio, which says so."""

    def __init__(self, content_type: bytes):
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        callbacks = {
            "on_part_begin": self._part_begins,
            "on_header_begin": self._header_begins,
            "on_header_field": self._name_goes_on,
            "on_header_value": self._value_goes_on,
            "on_header_end": self._header_ends,
            "on_headers_finished": self._headers_end,
        }
        self.parser = MultipartParser(boundary, callbacks) if boundary else None

    def look_at(self, data: bytes) -> None:
        """The next bytes of the form.

        Raises: NotAFileError: if a part of it is no file.
        """
        if self.parser is not None:
            try:
                self.parser.write(data)
            except MultipartParseError:
                self.parser = None

    def _part_begins(self) -> None:
        self.is_file = False

    def _header_begins(self) -> None:
        self.name, self.value = b"", b""

    def _name_goes_on(self, data: bytes, start: int, end: int) -> None:
        self.name += data[start:end]

    def _value_goes_on(self, data: bytes, start: int, end: int) -> None:
        self.value += data[start:end]

    def _header_ends(self) -> None:
        if self.name.lower() == b"content-disposition":
            self.is_file = b"filename" in parse_options_header(self.value)[1]

    def _headers_end(self) -> None:
        if not self.is_file:
            raise NotAFileError
