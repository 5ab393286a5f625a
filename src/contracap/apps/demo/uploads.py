"""The files of the page: what visitors upload and what they are shown. Beyond their folder nothing is read or sent."""

import asyncio
import mimetypes
import os
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from anyio import to_thread
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Message

from contracap.apps.web import MIB, BodyTooLargeError, limit_body

MAX_IMAGE_MIB = 20
MAX_UPLOAD_MIB = 100  # all images that are uploaded together
MAX_COMING_MIB = 400  # all uploads that are under way
MAX_KEPT_MIB = 1024  # in the folder, beyond which the oldest files are deleted
KEPT_FOR = 3600  # seconds after which a file is deleted in any case
UPLOAD_SECONDS = 300  # that an upload may take to come
TIDY_SECONDS = 10  # from one look at the folder to the next
FILE_COST = 4096  # bytes that a file takes beyond its content
MAX_NAME_LENGTH = 100  # characters kept of the name that a visitor's file has


class Uploads:
    """A folder, gradio's own (`GRADIO_TEMP_DIR`), with a folder for uploads in it.

    An upload's path holds a random number that only its visitor is told: who can name an upload, made it.
    """

    def __init__(self, folder: Path):
        self.folder, self.uploaded, self.examples = folder, folder / "uploads", folder / "examples"
        self._coming = 0  # bytes of uploads under way

    @property
    def routes(self) -> list[BaseRoute]:
        """Routes that stand before gradio's own of the same names."""
        return [
            Route("/gradio_api/upload", self.receive, methods=["POST"]),
            Route("/gradio_api/upload_progress", lambda _: Response(status_code=204)),  # the browser is not told
            Route("/gradio_api/file={path:path}", self.send),
        ]

    def find(self, path: Any) -> Path | None:
        """The upload, or the example, that has this path; None if there is none."""
        if not isinstance(path, str):
            return None
        found = Path(path)
        named = found.parent.parent in (self.uploaded, self.examples) and re.fullmatch(
            "[0-9a-f]{32}", found.parent.name
        )
        return found if named and is_regular(found) else None

    async def send(self, request: Request) -> Response:
        """Answer with a file of the folder; only images are shown in the browser."""
        path = Path(request.path_params["path"])
        if ".." in path.parts or not path.is_relative_to(self.folder) or not is_regular(path):
            return PlainTextResponse("this page has no such file", 403)
        kind = mimetypes.guess_type(path.name)[0] or ""
        shown = kind.startswith("image/") and "svg" not in kind
        return FileResponse(
            path,
            media_type=kind if shown else "application/octet-stream",
            filename=path.name,
            content_disposition_type="inline" if shown else "attachment",
            headers={"X-Content-Type-Options": "nosniff"},
        )

    async def receive(self, request: Request) -> Response:
        """Keep the files of a form's field `files`; answers their paths as JSON. Of what is refused nothing stays."""
        within, come = limit_body(request.scope, request.receive, MAX_UPLOAD_MIB * MIB), 0

        async def counted() -> Message:
            nonlocal come
            message = await within()
            size = len(message.get("body", b""))
            come += size
            self._coming += size
            if self._coming > MAX_COMING_MIB * MIB:
                raise BlockingIOError
            return message

        try:
            if not request.headers.get("content-type", "").startswith("multipart/form-data"):
                raise HTTPException(400)
            form = Request(request.scope, counted).form(max_fields=0)
            async with asyncio.timeout(UPLOAD_SECONDS), form as parts:
                files = [file for file in parts.getlist("files") if isinstance(file, UploadFile)]
                if any((file.size or 0) > MAX_IMAGE_MIB * MIB for file in files):
                    return PlainTextResponse(f"an image may have {MAX_IMAGE_MIB} MiB, the maximum here", 413)
                return JSONResponse(await to_thread.run_sync(self._keep, files))
        except HTTPException:
            return PlainTextResponse("only files can be uploaded, in a form's field `files`", 400)
        except BodyTooLargeError:
            error = f"images that are uploaded together may have {MAX_UPLOAD_MIB} MiB, the maximum here"
            return PlainTextResponse(error, 413)
        except (TimeoutError, ClientDisconnect):
            return PlainTextResponse(f"the upload did not come within {UPLOAD_SECONDS} seconds", 408)
        except OSError:
            return PlainTextResponse("there is no room for more uploads now: try again later", 503)
        finally:
            self._coming -= come

    def _keep(self, files: Sequence[UploadFile]) -> list[str]:
        kept = []
        for file in files:
            path = self.new_path(self.uploaded, file.filename or "")
            with path.open("xb") as copy:
                shutil.copyfileobj(file.file, copy)
            kept.append(str(path))
        self.tidy()
        return kept

    def new_path(self, folder: Path, name: str) -> Path:
        """A path for a file in `uploaded` or `examples`, with as much of its name as is harmless."""
        name = re.sub(r"[^\w .,-]", "", Path(name).name).strip(". ")[-MAX_NAME_LENGTH:]
        path = folder / secrets.token_hex(16) / (name or "picture")
        path.parent.mkdir(parents=True)
        return path

    def tidy(self) -> None:
        """Delete what is too old, then the oldest of what is too much. Examples stay."""
        files = []
        for path in self.folder.rglob("*"):
            if is_regular(path) and not path.is_relative_to(self.examples):
                status = path.lstat()
                files.append((status.st_mtime, status.st_size + FILE_COST, path))
        room, now = MAX_KEPT_MIB * MIB, time.time()
        for changed, size, path in sorted(files, reverse=True):
            room -= size
            if room < 0 or now - changed > KEPT_FOR:
                path.unlink(missing_ok=True)
                if not any(path.parent.iterdir()):
                    path.parent.rmdir()

    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:
        """Keep the folder within its bounds while `app` is served."""

        async def repeat() -> None:
            while True:
                await asyncio.sleep(TIDY_SECONDS)
                await to_thread.run_sync(self.tidy)

        task = asyncio.create_task(repeat())
        yield
        task.cancel()


def is_regular(path: Path) -> bool:
    """Return whether this is a file: not a folder, link, pipe or device."""
    return os.path.isfile(path) and not os.path.islink(path)
