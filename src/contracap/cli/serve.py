"""The command that serves over HTTP."""

import ipaddress
import logging
import math
import os
import sys
from dataclasses import replace
from typing import Annotated

from contracap.apps.serve.batching import BatchingConfig
from contracap.apps.serve.config import AccessConfig, LimitsConfig
from contracap.cli.flags import Flags, arg
from contracap.cli.options import Model, ModelFlags, Settings, StrategyName, WeightsName, keep_few_kernels
from contracap.extras import require_extra

API_KEY = "CONTRACAP_API_KEY"
logger = logging.getLogger(__name__)
PACKAGES = ("fastapi", "fastapi_offline", "h11", "prometheus_client", "python_multipart", "starlette", "uvicorn")


def serve(
    weights: WeightsName,
    /,
    *,
    host: Annotated[
        str, arg(help="Address to listen at; 0.0.0.0 makes the server reachable from other machines.")
    ] = "127.0.0.1",
    port: Annotated[int, arg(help="Port; 0 takes any that is free.")] = 8000,
    strategy: StrategyName = "beam",
    settings: Settings = (),
    batching: Annotated[BatchingConfig, Flags] = BatchingConfig(),
    limits: Annotated[LimitsConfig, Flags] = LimitsConfig(),
    access: Annotated[AccessConfig, Flags] = AccessConfig(),
    model_flags: Model = ModelFlags(),
) -> None:
    """Serve captions, embeddings and labels over HTTP. Concurrent requests are batched."""
    keep_few_kernels()
    require_extra("serve", *PACKAGES)
    from contracap.apps.serve.app import build_app
    from contracap.apps.serve.service import DefaultStrategy
    from contracap.apps.web import HEADER_SECONDS, bind, format_url, run_server

    default = DefaultStrategy(strategy, settings)
    default.strategy({})  # what is wrong is said before the weights are read
    if access.api_key is None:
        access = replace(access, api_key=os.environ.get(API_KEY))
    with bind(host, port) as listener:
        if access.api_key is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            url = format_url(listener)
            logger.warning(f"no API key: anyone who can reach {url} can use this server; set --api-key or {API_KEY}")
        model = model_flags.load(weights)
        app = build_app(*model, default=default, batching=batching, limits=limits, access=access)
        longest = 2 * limits.timeout_s + HEADER_SECONDS
        greeting = f"serving {weights} at {format_url(listener)} (docs at {format_url(listener)}/docs); Ctrl-C ends it"
        run_server(app, listener, greeting=greeting, patience=math.ceil(limits.timeout_s), request_seconds=longest)
    sys.stdout.flush()
    sys.stderr.flush()
    # End the process here: at a normal exit, Python would wait for threads, such as one that decodes an image for a
    # client that has left.
    os._exit(0)
