"""Limits of a request, and access to the server. Imports no web server: the command makes its flags from this."""

from dataclasses import dataclass

MAX_REQUESTS = 1000  # in flight at once


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """Limits of a request."""

    max_body_mib: float = 20.0
    """Largest request body, in MiB."""
    timeout_s: float = 60.0
    """Longest time in seconds to read a body, and again to answer it."""
    max_requests: int = 128
    """Requests in progress at once, uploads included. Others are answered with status 503."""

    def __post_init__(self) -> None:
        if not 0 < self.max_body_mib <= 4096:
            raise ValueError(f"max_body_mib must be above 0 and at most 4096 MiB, not {self.max_body_mib}")
        if not 0 < self.timeout_s <= 86400:
            raise ValueError(f"timeout_s must be above 0 and at most 86400 seconds, not {self.timeout_s}")
        if not 1 <= self.max_requests <= MAX_REQUESTS:
            raise ValueError(
                f"max_requests must be at least 1 request and at most {MAX_REQUESTS}, not {self.max_requests}"
            )


@dataclass(frozen=True, kw_only=True)
class AccessConfig:
    """Access to the server."""

    api_key: str | None = None
    """Key that requests must bring as Authorization: Bearer KEY. It can also be given as $CONTRACAP_API_KEY."""
    cors_origins: tuple[str, ...] = ()
    """Allowed CORS origins, such as https://example.org, or * for all."""

    def __post_init__(self) -> None:
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ValueError("api_key must be at least one visible ASCII character")
