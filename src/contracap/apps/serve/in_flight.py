"""Requests in flight, and the most that a server takes at once."""

from dataclasses import dataclass, field

from contracap.apps.serve.config import LimitsConfig
from contracap.apps.web import MIB

BODIES = 16  # times `max_body_mib` that all bodies in flight may take together


@dataclass
class RequestLimiter:
    """Requests with a body that are being read or answered, and how many may be at most.

    Attributes:
        bodies: bytes of each that have come.
    """

    limits: LimitsConfig
    bodies: dict[object, int] = field(default_factory=dict)

    @property
    def full(self) -> bool:
        """True if another one is refused."""
        # Uvicorn's limit_concurrency counts idle connections and would refuse /health and /metrics too.
        return len(self.bodies) >= self.limits.max_requests or self.too_many_bytes

    @property
    def too_many_bytes(self) -> bool:
        """True if their bodies take more memory than they may."""
        return sum(self.bodies.values()) > BODIES * self.limits.max_body_mib * MIB

    @property
    def refusal(self) -> str:
        """Say why another one is refused."""
        if self.too_many_bytes:
            most = BODIES * self.limits.max_body_mib
            return f"the bodies of requests in progress take more than {most:g} MiB: try again later"
        return f"too many requests in progress ({len(self.bodies)}): try again later"
