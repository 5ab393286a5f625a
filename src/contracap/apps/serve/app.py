"""The application: routes, middleware and error handlers around one served model."""

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.routing import Route

import contracap
from contracap.apps.serve import routes, status
from contracap.apps.serve.batching import BatchingConfig
from contracap.apps.serve.config import AccessConfig, LimitsConfig
from contracap.apps.serve.error_responses import HANDLERS
from contracap.apps.serve.middleware import add_middleware
from contracap.apps.serve.model import ServedModel
from contracap.apps.serve.schemas import Problem
from contracap.apps.serve.service import DefaultStrategy, Service
from contracap.model.coca import CoCa
from contracap.processor import Processor


def build_app(
    model: CoCa,
    processor: Processor,
    *,
    default: DefaultStrategy,
    batching: BatchingConfig,
    limits: LimitsConfig,
    access: AccessConfig = AccessConfig(),
) -> FastAPI:
    """Build the application, for any ASGI server.

    Raises: ValueError: if the default strategy is wrong, or the model cannot follow it.
    """
    service = Service(ServedModel(model, processor), default=default, batching=batching, limits=limits)
    app = FastAPIOffline(  # the docs of FastAPI itself load their scripts from elsewhere
        redoc_url=None,
        title="contracap",
        version=contracap.__version__,
        lifespan=service.lifespan,
        responses={"default": {"model": Problem, "description": "what went wrong"}},
        exception_handlers=HANDLERS,
    )
    app.state.service = service
    # RequireKey checks the key; this only describes it in /openapi.json
    key = [] if access.api_key is None else [Security(HTTPBearer(auto_error=False))]
    app.include_router(routes.router, dependencies=key)
    app.include_router(status.router)
    known = (*app.routes, *routes.router.routes, *status.router.routes)
    paths = frozenset(route.path for route in known if isinstance(route, Route))
    add_middleware(app, service, access, image_paths=routes.IMAGE_PATHS, paths=paths)
    return app
