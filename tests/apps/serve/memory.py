"""What a server's memory grows by after one request of each kind: python memory.py ADDRESS PID [REQUESTS]."""

import io
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

MIB = 2**20
SETTLE_SECONDS = 5  # what is free goes back to the system


def resident(pid: int) -> float:
    """MiB that a process has in memory now; of Linux alone."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def picture(size: tuple[int, int], mode: str, form: str, chance: random.Random) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, tuple(chance.randrange(256) for _ in mode)).save(file, form)
    return file.getvalue()


class Requests:
    """Requests of all kinds, in an order that is the same each time: small and large images, broken ones, forms,
    labels and texts that are never the same, strategies, and bodies that are too large."""

    def __init__(self) -> None:
        self.chance = chance = random.Random(0)
        forms = ("JPEG", "PNG", "WEBP")
        self.small = [picture((60 + 7 * n, 90), "RGB", form, chance) for n in range(10) for form in forms]
        self.photographs = [picture((4000, 3000), "RGB", "JPEG", chance) for _ in range(3)]
        self.huge = picture((9459, 9459), "RGBA", "PNG", chance)

    def one_of_each(self) -> list[dict[str, Any]]:
        chance, file = self.chance, self.chance.choice(self.small)
        label = [str(chance.random()) for _ in range(chance.randrange(1, 100))]
        embed, caption = "/v1/embed/image", "/v1/caption"
        return [
            {"url": f"{caption}?width={chance.randrange(1, 9)}", "content": file},
            {"url": f"{caption}?strategy=sample&samples=32", "content": file},
            {"url": caption, "params": {"prompt": label[0][:4]}, "content": file[: len(file) // 2]},
            {"url": "/v1/classify", "params": {"label": label[:50]}, "content": file},
            {"url": "/v1/embed/text", "json": {"texts": label}},
            {"url": embed, "content": chance.choice(self.photographs)},
            {"url": embed, "files": [("image", chance.choice(self.small)) for _ in range(9)]},
            {"url": embed, "content": bytes(21 * MIB)},
            {"url": embed, "content": self.huge},
        ]

    def mixed(self, count: int) -> Iterator[dict[str, Any]]:
        for number in range(count):
            weights = (6, 1, 1, 4, 4, 1, 1, 1, 0)
            each = self.one_of_each()
            yield each[-1] if number % 400 == 50 else self.chance.choices(each, weights)[0]


def send(address: str, asks: Iterable[dict[str, Any]], at_once: int = 8) -> Counter[int]:
    """The statuses of the requests."""
    with ThreadPoolExecutor(at_once) as threads, httpx.Client(base_url=address, timeout=300) as client:
        return Counter(answer.status_code for answer in threads.map(lambda ask: client.post(**ask), asks))


if __name__ == "__main__":
    address, pid, count = sys.argv[1], int(sys.argv[2]), int(next(itertools.islice(sys.argv, 3, None), 2000))
    requests = Requests()
    print(f"{resident(pid):.0f} MiB at the start", flush=True)
    send(address, requests.one_of_each(), at_once=1)
    time.sleep(SETTLE_SECONDS)
    before = resident(pid)
    print(f"{before:.0f} MiB after one request of each kind", flush=True)
    statuses = send(address, requests.mixed(count))
    time.sleep(SETTLE_SECONDS)
    after = resident(pid)
    print(f"{after:.0f} MiB after {count} mixed requests, {after / before:.2f} times", dict(statuses))
