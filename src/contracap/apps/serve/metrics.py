"""What the server has done so far, as Prometheus reads it.

Source: Prometheus' text exposition format 0.0.4.
"""

import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from time import perf_counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
CLIENT_GONE = 499  # nginx's word for a request that nobody waited for
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Histogram:
    """How many observed values are at most each of some bounds."""

    def __init__(self, bounds: Sequence[float | int]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last: above all bounds
        self.total = 0.0

    def observe(self, value: float | int) -> None:
        """Count one value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str, labels: str = "") -> Iterator[str]:
        """Its cumulative counts, its sum and its count; `labels` such as `route="/v1/caption"`."""
        before, inside = (f"{labels},", f"{{{labels}}}") if labels else ("", "")
        cumulative = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            cumulative += count
            yield f'{name}_bucket{{{before}le="{bound}"}} {cumulative}'
        yield f"{name}_sum{inside} {self.total}"
        yield f"{name}_count{inside} {cumulative}"


class Metrics:
    """Requests by route and status, their seconds by route, and the sizes of batches."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.seconds: dict[str, Histogram] = {}
        self.batch_sizes = Histogram(BATCH_SIZES)

    def count(self, route: str, status: int, seconds: float) -> None:
        """One answered request."""
        self.requests[route, status] += 1
        self.seconds.setdefault(route, Histogram(SECONDS)).observe(seconds)

    def exposition(self, *, waiting: int, under_way: int) -> str:
        """All of it as text, with what is the case now: items in the queue, and requests under way."""
        lines = ["# HELP contracap_requests_total Requests answered.", "# TYPE contracap_requests_total counter"]
        for (route, status), count in sorted(self.requests.items()):
            lines.append(f'contracap_requests_total{{route="{route}",status="{status}"}} {count}')
        lines += [
            "# HELP contracap_request_seconds From a request's head to the end of its answer.",
            "# TYPE contracap_request_seconds histogram",
        ]
        for route, histogram in sorted(self.seconds.items()):
            lines += histogram.lines("contracap_request_seconds", f'route="{route}"')
        lines += [
            "# HELP contracap_batch_size Pictures or texts that went through the model together.",
            "# TYPE contracap_batch_size histogram",
            *self.batch_sizes.lines("contracap_batch_size"),
            "# HELP contracap_queue_length Pictures and texts that no batch has taken yet.",
            "# TYPE contracap_queue_length gauge",
            f"contracap_queue_length {waiting}",
            "# HELP contracap_requests_under_way Requests with a body that are being read or answered.",
            "# TYPE contracap_requests_under_way gauge",
            f"contracap_requests_under_way {under_way}",
        ]
        return "\n".join(lines) + "\n"


class CountRequests:
    """Middleware that counts every request; those to no known route together, for anybody can make up paths."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, routes: frozenset[str]):
        self.app, self.metrics, self.routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = perf_counter(), CLIENT_GONE

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except Exception:
            status = 500  # what is sent for it, further out
            raise
        finally:
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.metrics.count(route, status, perf_counter() - start)
