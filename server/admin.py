"""Routes for operators: close the engine's doors, open them again, and exchange the model while connections stay.

    POST /admin/drain                  take nothing new; `/health/ready` says "drained" once all that ran has ended
    POST /admin/resume                 take new requests again
    POST /admin/reload {"model": …}    what is new waits, what runs ends, then another model answers; without `model` the same, read anew

They want the key of the setting `admin_key`; `app.py` sees to that. The supervisor does what is asked for.
"""

from typing import Any

import msgspec
from aiohttp import web

from headrace.engine.messages.lifecycle import Answered
from headrace.server.openai.errors import Refusal, decode
from headrace.server.state import EngineView

_CODES = {400: "model_unusable", 409: "wrong_state", 422: "model_unusable", 504: "timeout"}


class ReloadBody(msgspec.Struct, forbid_unknown_fields=True):
    """What to serve: as the settings of the same names."""

    model: str | None = None
    revision: str | None = None


_reload = msgspec.json.Decoder(ReloadBody)


class AdminRoutes:
    """The handlers."""

    def __init__(self, view: EngineView) -> None:
        self._view = view

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post("/admin/drain", self.drain),
            web.post("/admin/resume", self.resume),
            web.post("/admin/reload", self.reload),
        ]

    async def drain(self, request: web.Request) -> web.Response:
        return _response(await self._view.administer("drain"))

    async def resume(self, request: web.Request) -> web.Response:
        return _response(await self._view.administer("resume"))

    async def reload(self, request: web.Request) -> web.Response:
        body = decode(_reload, await request.read() or b"{}")
        if body.revision is not None and body.model is None:
            raise Refusal("revision goes with model: name the model that it is one of", "revision")
        return _response(await self._view.administer("reload", body.model, body.revision))


def _response(answer: Answered) -> web.Response:
    if answer.status >= 400:
        raise Refusal(answer.message, "model" if answer.status in (400, 422) else None, answer.status, _CODES.get(answer.status))
    said: dict[str, Any] = {"status": answer.state, "model": answer.model}
    return web.json_response(said, status=answer.status)
