"""The web application: routes, the key, limits, and errors in one shape."""

import hashlib
import hmac
import logging
import secrets

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from headrace.engine.config import Config
from headrace.server.admin import AdminRoutes
from headrace.server.exposition import render
from headrace.server.meters import RequestMeters
from headrace.server.openai.errors import Refusal
from headrace.server.openai.routes import TENANT, OpenAIRoutes, engine_version, request_id
from headrace.server.state import EngineView, health_of

log = logging.getLogger(__name__)

LARGEST_BODY = 8 << 20
"""Bytes of a request body; larger ones get 413."""

_GENERATING = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
_QUEUEING = frozenset({"/v1/chat/completions", "/v1/completions"})
_RESUMING = "/v1/streams/"
_ADMIN = "/admin/"
_UNKEYED = frozenset({"/", "/health", "/health/live", "/health/ready", "/metrics"})

_GREETING = """headrace {version}, serving {model}

  POST /v1/chat/completions   POST /v1/completions   GET /v1/models
  POST /tokenize              POST /detokenize          GET /v1/streams/{{id}}
  GET  /health                GET  /health/live      GET /health/ready      GET /metrics
  POST /admin/drain           POST /admin/resume     POST /admin/reload
"""


def make_app(openai: OpenAIRoutes, view: EngineView, meters: RequestMeters, config: Config) -> web.Application:
    """The application. With `api_key`, everything but the greeting, health and metrics needs one of the keys in it; what is for operators
    needs `admin_key`, and is closed without one."""
    keys = {key.strip(): _tenant(key.strip()) for key in (config.api_key or "").split(",")}
    keys.pop("", None)
    operators = {config.admin_key: "operator"} if config.admin_key else {}

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if request.path.startswith(_ADMIN):
                if not operators:
                    raise Refusal("the engine was started without --admin-key: nobody may ask for this", status=403, code="no_admin_key")
                _check_key(request, operators)
            elif keys and request.path not in _UNKEYED:
                request[TENANT] = _check_key(request, keys)
            if request.path in _QUEUEING and request.method == "POST" and (held := view.held()):
                meters.refused(held.code or "")
                raise held
            if request.path.startswith(_RESUMING) or (request.path in _GENERATING and request.method == "POST"):
                async with view.entered():
                    response = await handler(request)
            else:
                response = await handler(request)
        except Refusal as refusal:
            if refusal.hold_s:
                view.hold(refusal)
            response = refusal.response()
        except web.HTTPException as error:
            response = _of_http(error, request).response()
            if isinstance(error, web.HTTPMethodNotAllowed):
                response.headers["Allow"] = ", ".join(sorted(error.allowed_methods))
        except ConnectionResetError:
            # The client is gone, and with it whoever would read an answer.
            raise
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            response = Refusal("internal error: the server's log has the details", status=500, code="internal_error").response()
        route = request.match_info.route.resource
        meters.answered(route.canonical if route else "unknown", response.status)
        if not response.prepared:
            response.headers.setdefault("x-request-id", request_id(request) or f"req-{secrets.token_hex(8)}")
        return response

    async def live(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def ready(request: web.Request) -> web.Response:
        return web.json_response({"status": view.state}, status=200 if view.state == "ready" else 503)

    async def health(request: web.Request) -> web.Response:
        found = health_of(await view.status())
        return web.Response(body=msgspec.json.encode(found), content_type="application/json", status=200 if found.status == "ok" else 503)

    async def metrics(request: web.Request) -> web.Response:
        status = await view.status()
        if status is None:
            raise Refusal("the supervisor does not answer", status=503, code="unavailable")
        return web.Response(text=render(status.series), content_type="text/plain", charset="utf-8")

    async def greet(request: web.Request) -> web.Response:
        return web.Response(text=_GREETING.format(version=engine_version(), model=openai.served.name))

    app = web.Application(middlewares=[guard], client_max_size=LARGEST_BODY)
    app.add_routes(openai.routes())
    app.add_routes(AdminRoutes(view).routes())
    app.add_routes(
        [
            web.get("/", greet),
            web.get("/health", health),
            web.get("/health/live", live),
            web.get("/health/ready", ready),
            web.get("/metrics", metrics),
        ]
    )
    return app


def _tenant(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:12]


def _check_key(request: web.Request, keys: dict[str, str]) -> str:
    """Whose key the request has: the tenant, by which nobody can tell the key. Raises `Refusal` when it has none of `keys`."""
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not given:
        raise Refusal("an API key is needed: send it as 'Authorization: Bearer KEY'", status=401, code="missing_api_key")
    # Bytes of either that are no UTF-8 stand in the text as surrogates. Every key is looked at, however early one fits.
    sent = given.strip().encode(errors="surrogateescape")
    found = [tenant for key, tenant in keys.items() if hmac.compare_digest(sent, key.encode(errors="surrogateescape"))]
    if not found:
        raise Refusal("the API key is wrong", status=401, code="invalid_api_key")
    return found[0]


def _of_http(error: web.HTTPException, request: web.Request) -> Refusal:
    """aiohttp's own errors in OpenAI's shape."""
    match error.status:
        case 404:
            return Refusal(f"{request.method} {request.path[:200]} does not exist: GET / lists what does", status=404, code="not_found")
        case 405:
            return Refusal(f"{request.path} does not take {request.method}", status=405, code="method_not_allowed")
        case 413:
            return Refusal(f"the body is larger than {LARGEST_BODY} bytes", status=413, code="body_too_large")
    return Refusal(error.reason, status=error.status)
