"""No verb opens a connection beyond this machine unless it is asked for one, as the system's calls show."""

import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from contracap.data.shards import write_shard

pytestmark = pytest.mark.slow
SECONDS = 300  # for a verb to come to its end, on a busy machine
ADDRESS = re.compile(r'sa_family=AF_INET6?, [^}]*?inet_(?:addr|pton)\((?:AF_INET6, )?"([^"]+)"')
CLI = "import sys; from contracap.cli import main; sys.exit(main())"
CLI_TWICE = """
import sys, contracap.cli
from huggingface_hub import constants
second = sys.argv.index("then")
assert constants.HF_HUB_DISABLE_TELEMETRY
sys.exit(contracap.cli.main(sys.argv[1:second]) or contracap.cli.main(sys.argv[second + 1:]))
"""
QUICKSTART = """
import sys, pathlib
from contracap.apps.quickstart import quickstart
quickstart(pathlib.Path(sys.argv[1]), sys.argv[2:])
"""
TELLERS = {"GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "RAY_USAGE_STATS_ENABLED"}


def reached(trace: str) -> set[str]:
    """The addresses beyond this machine that the calls in a trace name."""
    found = {ipaddress.ip_address(address) for address in ADDRESS.findall(trace)}
    plain = {getattr(address, "ipv4_mapped", None) or address for address in found}
    return {str(address) for address in plain if not address.is_loopback and not address.is_unspecified}


def test_a_trace_tells_what_is_beyond_this_machine() -> None:
    trace = """
        7 connect(3, {sa_family=AF_UNIX, sun_path="/run/a"}, 110) = 0
        7 connect(3, {sa_family=AF_INET, sin_port=htons(80), sin_addr=inet_addr("127.0.0.1")}, 16) = 0
        7 sendto(3, "q", 1, 0, {sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr("8.8.8.8")}, 16) = 1
        7 connect(3, {sa_family=AF_INET6, sin6_port=htons(80), sin6_flowinfo=htonl(0), inet_pton(AF_INET6, "::1", &sin6_addr), sin6_scope_id=0}, 28) = 0
        7 connect(3, {sa_family=AF_INET6, sin6_port=htons(80), sin6_flowinfo=htonl(0), inet_pton(AF_INET6, "2001:db8::1", &sin6_addr), sin6_scope_id=0}, 28) = 0
    """  # noqa: E501
    assert reached(trace) == {"8.8.8.8", "2001:db8::1"}


@pytest.fixture
def traced(tmp_path: Path) -> Callable[..., set[str]]:
    """Runs a verb, with what `meanwhile` does at the address that it prints; returns the addresses it reached."""
    if shutil.which("strace") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no strace on the path: apt-get install strace")
    trace, log = tmp_path / "trace", tmp_path / "log"

    def run(*arguments: object, meanwhile: Callable[[str], None] | None = None, program: str = CLI) -> set[str]:
        tracer = ["strace", "-D", "-f", "--seccomp-bpf", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o", trace]
        command = [*map(str, tracer), sys.executable, "-c", program, *map(str, arguments)]
        environment = {name: value for name, value in os.environ.items() if name not in TELLERS}
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            if meanwhile is not None:
                deadline = time.monotonic() + SECONDS
                while not (url := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
                    assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                    time.sleep(0.2)
                meanwhile(url[0])
                process.send_signal(signal.SIGTERM)
            assert process.wait(SECONDS) == 0, log.read_text()
        finally:
            process.kill()
        ended, deadline = re.compile(rf"^{process.pid} +\+\+\+ exited", re.MULTILINE), time.monotonic() + SECONDS
        while not ended.search(trace.read_text()):  # strace pads short numbers of processes
            assert time.monotonic() < deadline, "strace does not end"
            time.sleep(0.1)
        return reached(trace.read_text())

    return run


def pictures(folder: Path) -> Path:
    """Four images with captions, as a shard and as files."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    folder.mkdir()
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{number}.png")
    caption = json.dumps({"captions": ["noise"]}).encode()
    members = [(path.stem, {"png": path.read_bytes(), "json": caption}) for path in sorted(folder.iterdir())]
    write_shard(folder / "shards" / "000.tar", members)
    return folder


def test_captioning_files_and_shards_stays_on_this_machine_and_tells_the_hub_nothing(traced, weights, tmp_path) -> None:
    files = pictures(tmp_path / "pictures")
    bulk = ("bulk", "caption", weights, files / "shards", "--out", tmp_path / "out", "--workers", 1)
    assert not traced("caption", weights, files, "then", *bulk, program=CLI_TWICE)


def test_the_quickstart_trains_and_evaluates_on_this_machine(traced, tmp_path) -> None:
    settings = ("steps=2", "data.batch_size=8", "data.shuffle_buffer=8", "data.workers=1", "optimizer.warmup_steps=1")
    assert not traced(tmp_path / "out", *settings, program=QUICKSTART)  # the verb, made short


def test_serving_stays_on_this_machine(traced, weights, tmp_path) -> None:
    picture = (pictures(tmp_path / "pictures") / "0.png").read_bytes()

    def ask(url: str) -> None:
        assert httpx.post(f"{url}/v1/caption", content=picture, timeout=SECONDS).status_code == 200

    assert not traced("serve", weights, "--port", "0", meanwhile=ask)


def test_the_page_stays_on_this_machine(traced, weights, tmp_path) -> None:
    picture = (pictures(tmp_path / "pictures") / "0.png").read_bytes()

    def ask(url: str) -> None:
        assert httpx.get(url, timeout=SECONDS).status_code == 200
        files = httpx.post(f"{url}/gradio_api/upload", files={"files": ("a.png", picture)}, timeout=SECONDS)
        value = {"path": files.json()[0], "meta": {"_type": "gradio.FileData"}}
        values = [value, "red\ngreen", "a {}"]
        answer = httpx.post(f"{url}/gradio_api/run/classify", json={"data": values}, timeout=SECONDS)
        assert answer.status_code == 200, answer.text

    assert not traced("demo", weights, "--pictures", tmp_path / "pictures", "--port", "0", meanwhile=ask)
