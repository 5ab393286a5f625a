"""Metrics of the server for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The metrics of one application, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("contracap_requests", "Requests answered.", ("route", "status"), registry=registry)
        self.seconds = Histogram(
            "contracap_request_seconds",
            "Seconds from the request headers to the end of the response.",
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
        self.in_flight = Gauge(
            "contracap_requests_under_way",
            "Requests with a body that are being read or answered.",
            registry=registry,
        )
