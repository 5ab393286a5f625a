"""The verb that answers over HTTP."""

import math
import os
import sys
from typing import Annotated

from contracap.cli.options import Settings, Size, StrategyName, WeightsName, arg, keep_few_kernels, load_model

API_KEY = "CONTRACAP_API_KEY"
PACKAGES = ("fastapi", "fastapi_offline", "prometheus_client", "python_multipart", "starlette", "uvicorn")


def serve(
    weights: WeightsName,
    /,
    *,
    host: Annotated[str, arg(help="the address to listen at; 0.0.0.0 is all of them")] = "127.0.0.1",
    port: Annotated[int, arg(help="0 is any that is free")] = 8000,
    strategy: StrategyName = "beam",
    settings: Settings = (),
    max_batch: Annotated[int, arg(help="pictures or texts that go through the model together")] = 16,
    max_wait_ms: Annotated[
        float, arg(help="milliseconds that a request waits for others while the model is idle")
    ] = 5.0,
    max_body_mib: Annotated[float, arg(help="MiB of a request's body")] = 20.0,
    max_requests: Annotated[int, arg(help="under way at once, uploads included; more are told to come again")] = 128,
    timeout_s: Annotated[float, arg(help="seconds that an upload may take, and then its answer")] = 60.0,
    api_key: Annotated[
        str | None,
        arg(metavar="KEY", help=f"requests must bring it as Authorization: Bearer KEY; also by {API_KEY}"),
    ] = None,
    cors_origins: Annotated[
        tuple[str, ...],
        arg(metavar="[ORIGIN ...]", help="pages whose scripts may ask, such as https://example.org, or * for all"),
    ] = (),
    size: Size = None,
) -> None:
    """Answer over HTTP: captions, embeddings, labels, in batches of what arrives together."""
    keep_few_kernels()
    try:
        from contracap.apps.serve.app import AccessConfig, DefaultStrategy, build_app
        from contracap.apps.web import HEAD_SECONDS, bound, run, url
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        raise ImportError(f"serve needs the package {error.name}: pip install 'contracap[serve]'") from None
    from contracap.apps.serve.batching import BatchingConfig
    from contracap.apps.serve.limits import LimitsConfig

    default = DefaultStrategy(strategy, settings)
    default.strategy({})  # what is wrong is said before the weights are read
    batching = BatchingConfig(max_batch=max_batch, max_wait_ms=max_wait_ms)
    limits = LimitsConfig(max_body_mib=max_body_mib, timeout_s=timeout_s, max_requests=max_requests)
    access = AccessConfig(api_key=api_key or os.environ.get(API_KEY) or None, cors_origins=cors_origins)
    with bound(host, port) as listener:
        model = load_model(weights, size)
        app = build_app(*model, default=default, batching=batching, limits=limits, access=access)
        longest = 2 * timeout_s + HEAD_SECONDS
        run(app, listener, greeting=url(listener), patience=math.ceil(timeout_s), request_seconds=longest)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # Python would wait for threads, such as one that decodes a picture which nobody waits for
