"""Metrics of the server for Prometheus."""

from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
CLIENT_GONE = 499  # nginx's status for a request whose client has left
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The metrics of one application, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("contracap_requests", "Requests answered.", ("route", "status"), registry=registry)
        self.seconds = Histogram(
            "contracap_request_seconds",
            "Seconds from a request's head to the end of its answer.",
            ("route",),
            buckets=SECONDS,
            registry=registry,
        )
        self.batch_sizes = Histogram(
            "contracap_batch_size",
            "Images or texts that went through the model together.",
            buckets=BATCH_SIZES,
            registry=registry,
        )
        self.queue_length = Gauge(
            "contracap_queue_length", "Images and texts that wait for a batch.", registry=registry
        )
        self.under_way = Gauge(
            "contracap_requests_under_way",
            "Requests with a body that are being read or answered.",
            registry=registry,
        )


class CountRequests:
    """Middleware that counts every request. Unknown routes are counted together, because anyone can make up paths."""

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
            status = 500  # which is sent further out
            raise
        finally:
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(perf_counter() - start)
