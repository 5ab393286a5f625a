"""The verb that answers over HTTP."""

import math
from typing import Annotated

from tyro.conf import arg

from contracap.cli.options import Settings, Size, StrategyName, WeightsName, load_model


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
    size: Size = None,
) -> None:
    """Answer over HTTP: captions, embeddings, labels, in batches of what arrives together."""
    try:
        from contracap.serve.app import DefaultStrategy, build_app
        from contracap.web import bound, run, url
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "starlette", "uvicorn"):
            raise
        raise ImportError(f"serve needs the package {error.name}: pip install 'contracap[serve]'") from None
    from contracap.serve.batching import BatchingConfig
    from contracap.serve.limits import LimitsConfig

    default = DefaultStrategy(strategy, settings)
    default.strategy({})  # what is wrong is said before the weights are read
    batching = BatchingConfig(max_batch=max_batch, max_wait_ms=max_wait_ms)
    limits = LimitsConfig(max_body_mib=max_body_mib, timeout_s=timeout_s, max_requests=max_requests)
    with bound(host, port) as listener:
        app = build_app(*load_model(weights, size), default=default, batching=batching, limits=limits)
        run(app, listener, greeting=url(listener), patience=math.ceil(timeout_s))
