"""What a server's memory grows by: python tests/serve/memory.py ADDRESS PID [REQUESTS]."""

import io
import itertools
import random
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

MIB = 2**20


def resident(pid: int) -> float:
    """MiB that a process has in memory now; of Linux alone."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def picture(size: tuple[int, int], mode: str, form: str, chance: random.Random) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, tuple(chance.randrange(256) for _ in mode)).save(file, form)
    return file.getvalue()


def mixed(count: int) -> list[dict[str, Any]]:
    """Requests of all kinds, in an order that is the same each time: small and large pictures, broken ones, forms,
    labels and texts that are never the same, strategies, and bodies that are too large."""
    chance = random.Random(0)
    small = [picture((60 + 7 * n, 90), "RGB", form, chance) for n in range(10) for form in ("JPEG", "PNG", "WEBP")]
    photographs = [picture((4000, 3000), "RGB", "JPEG", chance) for _ in range(3)]
    huge = picture((9459, 9459), "RGBA", "PNG", chance)

    def one(number: int) -> dict[str, Any]:
        file = chance.choice(small)
        label = [f"{chance.random()} {number}" for _ in range(chance.randrange(1, 100))]
        kinds = [
            *[lambda: {"url": f"/v1/caption?width={chance.randrange(1, 9)}", "content": file}] * 4,
            lambda: {"url": "/v1/caption?strategy=sample&samples=32", "content": file},
            lambda: {"url": "/v1/caption", "params": {"prompt": label[0][:4]}, "content": file[: len(file) // 2]},
            *[lambda: {"url": "/v1/classify", "params": {"label": label[:50]}, "content": file}] * 3,
            *[lambda: {"url": "/v1/embed/text", "json": {"texts": label}}] * 3,
            *[lambda: {"url": "/v1/embed/image", "content": chance.choice(photographs)}] * 3,
            lambda: {"url": "/v1/embed/image", "files": [("image", chance.choice(small)) for _ in range(9)]},
            lambda: {"url": "/v1/embed/image", "content": bytes(21 * MIB)},
        ]
        return {"url": "/v1/embed/image", "content": huge} if number % 100 == 50 else chance.choice(kinds)()

    return [one(number) for number in range(count)]


def send(address: str, count: int) -> Counter[int]:
    """The statuses of so many requests, eight at a time."""
    asks = mixed(count)
    with ThreadPoolExecutor(8) as threads, httpx.Client(base_url=address, timeout=300) as client:
        return Counter(answer.status_code for answer in threads.map(lambda ask: client.post(**ask), asks))


if __name__ == "__main__":
    address, pid, requests = sys.argv[1], int(sys.argv[2]), int(next(itertools.islice(sys.argv, 3, None), 2000))
    before = resident(pid)
    statuses = send(address, requests)
    after = resident(pid)
    print(f"{before:.0f} MiB before, {after:.0f} MiB after {requests} requests: {after / before:.2f} times", statuses)
