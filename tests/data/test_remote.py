import io
import logging
import multiprocessing
import random
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle, repeat
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import braceexpand
import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from contracap.data import remote
from contracap.data.patterns import expand
from contracap.data.remote import RemoteError, open_file
from contracap.data.shards import ShardError, list_shards, read_records, write_shard
from tests.data.test_shards import webdataset_records

T = TypeVar("T")
NAMES = [f"{'n' * 120}/{'é' * 90}.jpg", f"{'n' * 120}/{'é' * 90}.json", "b.jpg", "dir.with.dot/c.jpg", "d.txt"]


class Fault(NamedTuple):
    """What goes wrong with one request."""

    status: int | None = None  # an error instead of the file
    after: int = 0  # bytes of the body that are sent
    stalls: bool = False  # silent from there on, instead of closing the connection


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10
    server: "Server"

    def do_GET(self) -> None:
        path, range_header = self.path.partition("?")[0], self.headers.get("Range")
        self.server.requests.append((path, range_header))
        fault = next(self.server.faults, None)
        content = self.server.files.get(path)
        status = fault.status if fault and fault.status else 200 if content is not None else 404
        if status != 200 or content is None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(range_header.removeprefix("bytes=").partition("-")[0]) if range_header and self.server.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        if fault and not fault.after and not fault.stalls:
            self.close_connection = True  # not even the headers are sent
            return
        self.end_headers()
        self.wfile.write(content[start:] if fault is None else content[start : start + fault.after])
        if fault and fault.stalls:
            self.server.released.wait(10)
        self.close_connection = fault is not None

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """A web server with a list of faults, one for each request to come; without HEAD, as signed URLs are."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.faults: Iterator[Fault | None] = iter(())
        self.ranges = True
        self.released = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that went away


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.02, 0.02, 0.02))
    monkeypatch.setattr(remote, "CONNECT_SECONDS", 5.0)
    monkeypatch.setattr(remote, "READ_SECONDS", 0.5)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def within(seconds: float, action: Callable[[], T]) -> T:
    """The result of an action; a failure of the test, not a test without end, if the action hangs."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append((action(), None))
        except BaseException as error:
            results.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, f"no end after {seconds} seconds"
    result, error = results[0]
    if error is not None:
        raise error
    return result


def content_of(url: str) -> bytes:
    def read() -> bytes:
        with open_file(url) as stream:
            return b"".join(iter(lambda: stream.read(50_000), b""))

    return within(20, read)


def records_of(shard: str) -> list[tuple[str, dict[str, bytes]]]:
    return within(20, lambda: [(record.key, record.members) for record in read_records(shard)])


def random_bytes(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


def shard_bytes(folder: Path, samples: int = 40, size: int = 10_000) -> bytes:
    made = ((f"{number:04d}", {"jpg": random_bytes(size, number), "txt": b"text"}) for number in range(samples))
    write_shard(folder / "made.tar", made)
    return (folder / "made.tar").read_bytes()


literals = st.text("abz/.-_é:$ ", max_size=6)
numbers = st.tuples(st.integers(0, 400), st.integers(0, 5)).map(lambda drawn: str(drawn[0]).zfill(drawn[1]))
ranges = st.tuples(numbers, numbers).filter(lambda ends: abs(int(ends[0]) - int(ends[1])) < 20).map("{%s..%s}".__mod__)
lists = st.lists(st.text("abz019.", max_size=4).filter(lambda item: ".." not in item), min_size=2, max_size=4)
groups = st.one_of(literals, ranges, lists.map(lambda items: f"{{{','.join(items)}}}"))


@settings(max_examples=50, deadline=None)
@given(st.lists(groups, max_size=4).map("".join).filter(lambda pattern: "::" not in pattern))
def test_braces_expand_as_in_braceexpand(pattern: str) -> None:
    assert expand(pattern) == list(braceexpand.braceexpand(pattern))


@pytest.mark.parametrize(
    "pattern", ["{0..3", "0..3}.tar", "{0..}.tar", "{}.tar", "{{0..3},5}.tar", "{0..3,7}.tar", "{a..c}", "a.tar::b.tar"]
)
def test_malformed_patterns_are_named(pattern: str) -> None:
    with pytest.raises(ValueError) as caught:
        expand(pattern)
    assert repr(pattern) in str(caught.value)


@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tgz", "w:gz")])
def test_shards_of_a_web_server_are_read_as_webdataset_reads_local_ones(
    server: Server, tmp_path: Path, suffix: str, mode: Any
) -> None:
    shard = tmp_path / f"shard.{suffix}"
    with tarfile.open(shard, mode) as archive:
        for number, name in enumerate(NAMES):
            member = tarfile.TarInfo(name)
            member.size = 7_000 * number
            archive.addfile(member, io.BytesIO(random_bytes(member.size, number)))
    server.files[f"/shard.{suffix}"] = shard.read_bytes()
    assert (
        records_of(f"{server.url}/shard.{suffix}?signed=yes")
        == records_of(str(shard))
        == webdataset_records(str(shard))
    )


def test_a_file_is_one_request(server: Server) -> None:
    server.files["/file"] = random_bytes(3_000_000)
    assert content_of(f"{server.url}/file") == server.files["/file"]
    assert server.requests == [("/file", None)]


@pytest.mark.parametrize(("ranges", "seed"), [(True, 0), (False, 1)])
def test_a_shard_of_a_failing_server_is_whole(server: Server, tmp_path: Path, seed: int, ranges: bool) -> None:
    content, draw = shard_bytes(tmp_path, samples=100), random.Random(seed)
    statuses = [Fault(status=status) for status in (500, 503, 429, 408)]
    cuts = [Fault(after=draw.randrange(len(content)), stalls=stalls) for stalls in (False, False, True)]
    faults = draw.sample([*statuses, *cuts, Fault()], k=4)  # no more in a row than there are pauses
    server.files["/s.tar"], server.faults, server.ranges = content, iter(faults), ranges
    assert records_of(f"{server.url}/s.tar") == records_of(str(tmp_path / "made.tar"))
    assert len(server.requests) > 1


def test_reading_goes_on_where_it_broke(server: Server) -> None:
    server.files["/file"] = random_bytes(3_000_000)
    server.faults = iter([Fault(after=2_000_000)])
    assert content_of(f"{server.url}/file") == server.files["/file"]
    (_, first), (_, second) = server.requests
    assert first is None
    assert second is not None and 0 < int(second.removeprefix("bytes=").removesuffix("-")) <= 2_000_000


def test_attempts_are_counted_anew_after_progress(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.01, 0.01))
    server.files["/file"] = random_bytes(3_000_000)
    server.faults = cycle([Fault(status=503), Fault(after=1_000_000)])
    assert content_of(f"{server.url}/file") == server.files["/file"]
    assert len(server.requests) > 1 + len(remote.PAUSES)


@pytest.mark.parametrize(
    ("fault", "position", "reason"),
    [
        (Fault(status=503), "0", "503"),
        (Fault(), "0", "disconnected"),
        (Fault(after=30_000), "[0-9,]+", "not completed|ended before"),
        (Fault(after=30_000, stalls=True), "[0-9,]+", "[Tt]imeout"),
        (Fault(stalls=True), "0", "[Tt]imeout"),
    ],
)
def test_a_server_that_never_recovers_is_reported(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, position: str, reason: str
) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.01,))
    monkeypatch.setattr(remote, "READ_SECONDS", 0.2)
    server.files["/s.tar"] = shard_bytes(tmp_path)
    server.ranges = False  # so that no attempt gets farther than the one before
    server.faults = repeat(fault)
    where = rf"{server.url}/s\.tar"
    beyond = r"( beyond its first \d samples?)?"
    message = rf"cannot read shard {where}{beyond}: {where}: failed at byte {position} after 2 attempts"
    with pytest.raises(ShardError, match=f"{message}: .*({reason})") as caught:
        records_of(f"{server.url}/s.tar")
    assert isinstance(caught.value.__cause__, RemoteError)


def test_a_server_that_is_gone_is_reported(server: Server) -> None:
    server.server_close()
    with pytest.raises(RemoteError, match=r"/file: failed at byte 0 after 5 attempts: .*[Cc]onnect"):
        content_of(f"{server.url}/file")


def test_every_new_attempt_is_told(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.files["/file"], server.faults = b"content", iter([Fault(status=503)])
    with caplog.at_level(logging.WARNING):
        content_of(f"{server.url}/file")
    (message,) = caplog.messages
    assert message.startswith(f"{server.url}/file: failed at byte 0 (503") and "another attempt in 0.0 s" in message


def test_a_refusal_is_final(server: Server) -> None:
    server.faults = repeat(Fault(status=403))
    with pytest.raises(RemoteError, match="/file: failed at byte 0 after 1 attempt: 403"):
        content_of(f"{server.url}/file")
    assert len(server.requests) == 1


def test_a_missing_file_is_asked_for_once(server: Server) -> None:
    with pytest.raises(FileNotFoundError, match=f"{server.url}/none.tar"):
        content_of(f"{server.url}/none.tar")
    with pytest.raises(ShardError, match=r"/none\.tar: no such file"):
        records_of(f"{server.url}/none.tar")
    assert len(server.requests) == 2


def test_a_shard_that_is_cut_on_the_server_is_an_error(server: Server, tmp_path: Path) -> None:
    server.files["/s.tar"] = shard_bytes(tmp_path)[:-20_000]
    with pytest.raises(ShardError, match=r"/s\.tar beyond its first \d+ samples?: unexpected end of data"):
        records_of(f"{server.url}/s.tar")


def test_a_missing_package_and_an_unknown_protocol_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(RemoteError, match=r"http://host/file: .*aiohttp.*pip install 'contracap\[data\]'"):
        content_of("http://host/file")
    with pytest.raises(RemoteError, match=r"nowhere://host/file: .*nowhere"):
        content_of("nowhere://host/file")


class Shards(IterableDataset[str]):
    def __init__(self, url: str) -> None:
        self.url = url

    def __iter__(self) -> Iterator[str]:
        yield from (record.key for record in read_records(self.url))


@pytest.fixture(scope="module")
def bucket(s3: None) -> str:
    """A bucket of a local S3 server, with three shards in a folder and more than shards around them."""
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    system.mkdir("bucket")
    for number in (1, 0, 2):
        system.pipe(f"bucket/folder/{number:05d}.tar", random_bytes(100_000, number))
    for name in ("folder/deeper/00009.tar", "folder/index.txt", "elsewhere/00003.tar"):
        system.pipe(f"bucket/{name}", b"")
    return "s3://bucket"


@pytest.fixture
def s3_system() -> Iterator[Any]:
    """s3fs without the connections that it made before."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    yield S3FileSystem
    S3FileSystem.clear_instance_cache()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("protocol", ["http", "s3"])
def test_forked_workers_read_after_the_parent_did(server: Server, bucket: str, tmp_path: Path, protocol: str) -> None:
    server.files["/forked.tar"] = shard_bytes(tmp_path)
    fsspec.filesystem("s3").pipe("bucket/forked.tar", server.files["/forked.tar"])
    url = f"{server.url if protocol == 'http' else bucket}/forked.tar"
    keys = [key for key, _ in records_of(url)]
    loader = DataLoader(Shards(url), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=10)
    assert sorted(within(20, lambda: list(loader))) == sorted(2 * keys)
    assert [key for key, _ in records_of(url)] == keys  # the children left the parent's connections alone


def test_shards_of_an_s3_folder_are_listed(bucket: str) -> None:
    for folder in ("folder", "folder/"):
        assert list_shards(f"{bucket}/{folder}") == [f"{bucket}/folder/{number:05d}.tar" for number in range(3)]


def test_s3_reading_goes_on_where_it_broke(bucket: str, s3_system: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs.core import S3File

    asked: list[int] = []
    fetch_range = S3File._fetch_range

    def failing(file: Any, start: int, end: int) -> bytes:
        asked.append(start)
        if len(asked) % 2:
            raise ConnectionResetError("cut")
        return fetch_range(file, start, end)

    monkeypatch.setattr(S3File, "_fetch_range", failing)
    monkeypatch.setattr(remote, "BUFFER_BYTES", 40_000)
    monkeypatch.setattr(remote, "PAUSES", (0.01,))
    assert content_of(f"{bucket}/folder/00001.tar") == random_bytes(100_000, 1)
    assert asked == [0, 0, 40_000, 40_000, 80_000, 80_000]


def test_a_missing_s3_object_or_bucket_is_an_error(bucket: str) -> None:
    for url in (f"{bucket}/none.tar", "s3://no-such-bucket/none.tar"):
        with pytest.raises(FileNotFoundError, match=url):
            content_of(url)
    with pytest.raises(FileNotFoundError, match=f"{bucket}/none"):
        list_shards(f"{bucket}/none")


def test_s3_without_credentials_is_an_error_at_once(bucket: str, s3_system: Any, monkeypatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(RemoteError, match=r"after 1 attempt: .*credentials"):
        content_of(f"{bucket}/folder/00001.tar")


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(stalls=True)])
def test_an_s3_server_that_never_recovers_is_reported(
    server: Server, s3_system: Any, bucket: str, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setattr(remote, "PAUSES", (0.01,))
    monkeypatch.setattr(remote, "READ_SECONDS", 0.2)
    server.files["/bucket"] = b"<?xml"
    server.faults = repeat(fault)
    for action, failure in ((content_of, "failed at byte 0"), (list_shards, "cannot list it")):
        url = f"{bucket}/folder/s.tar" if action is content_of else f"{bucket}/folder"
        with pytest.raises(RemoteError, match=f"{url}: {failure} after 2 attempts"):
            within(10, lambda action=action, url=url: action(url))


def test_the_index_of_a_web_folder_tells_its_shards(server: Server) -> None:
    entry = '{"name": "%s", "samples": 1, "bytes": 1, "sha256": "", "captions": 1, "caption_lengths": {}}'
    server.files["/set/index.json"] = f'{{"shards": [{entry % "0.tar"}, {entry % "1.tar"}]}}'.encode()
    assert list_shards(f"{server.url}/set/") == [f"{server.url}/set/0.tar", f"{server.url}/set/1.tar"]
    with pytest.raises(FileNotFoundError, match=rf"{server.url}/other has no index\.json.*other/\{{00000\.\.00331\}}"):
        list_shards(f"{server.url}/other")


def test_patterns_are_listed_where_they_are_no_names(tmp_path: Path) -> None:
    for name in ("00.tar", "01.tar", "{a}.tar"):
        (tmp_path / name).touch()
    assert list_shards(str(tmp_path / "{00..01}.tar")) == [str(tmp_path / "00.tar"), str(tmp_path / "01.tar")]
    assert list_shards(tmp_path / "{a}.tar") == [str(tmp_path / "{a}.tar")]
    assert list_shards("s3://b/{train,val}/{8..10}.tar.gz")[3:5] == ["s3://b/val/8.tar.gz", "s3://b/val/9.tar.gz"]
    assert list_shards("pipe:cat {0..1}.tar") == ["pipe:cat 0.tar", "pipe:cat 1.tar"]
    with pytest.raises(FileNotFoundError, match=r"02\.tar"):
        list_shards(str(tmp_path / "{01..02}.tar"))


def test_the_output_of_a_command_is_a_shard(tmp_path: Path) -> None:
    shard_bytes(tmp_path)
    local = records_of(str(tmp_path / "made.tar"))
    assert records_of(f"pipe:cat {tmp_path}/made.tar") == local
    assert records_of(f"pipe:gzip -c {tmp_path}/made.tar | gunzip -c") == local
    assert (
        next(read_records(f"pipe:cat {tmp_path}/made.tar; sleep 20")).key == "0000"
    )  # left early, its end is not awaited


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("cat {shard}; echo one >&2; echo the reason >&2; exit 3", "exit status 3: the reason"),
        ("head -c 30000 {shard}; exit 4", "exit status 4: no word on stderr"),
        ("head -c 30000 {shard}; kill -9 $$", "ended by SIGKILL"),
        ("head -c 30000 {shard}", "unexpected end of data"),
        ("cat {shard}; exec >&-; sleep 20", "still running 2 seconds after its output"),
        ("head -c 30000 {shard}; sleep 20", "no output for 2 seconds"),
    ],
)
def test_a_command_that_fails_is_an_error(tmp_path: Path, monkeypatch, command: str, reason: str) -> None:
    monkeypatch.setattr(remote, "COMMAND_SECONDS", 2)  # long enough for a busy machine to write something
    shard_bytes(tmp_path)
    with pytest.raises(ShardError, match=f"cannot read shard pipe:.*{reason}"):
        records_of(f"pipe:{command.format(shard=tmp_path / 'made.tar')}")
