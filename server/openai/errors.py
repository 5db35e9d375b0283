"""Errors as OpenAI's clients expect them: a status, and a body that names the parameter and the way out."""

import re
from typing import TypeVar

import msgspec
from aiohttp import web

from headrace.engine.messages.frontend import CallFailed, Failed
from headrace.engine.messages.openai.responses import Error, ErrorBody

Body = TypeVar("Body")

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    431: "invalid_request_error",
    429: "rate_limit_error",
}


class Refusal(Exception):
    """A request that is answered with an error instead of a result."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        retry_after: float | None = None,
        hold_s: float = 0.0,
    ) -> None:
        """`hold_s` as in `Refused`."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code
        self.retry_after = retry_after
        self.hold_s = hold_s

    @classmethod
    def of(cls, failure: Failed | CallFailed) -> "Refusal":
        """What the engine answered."""
        retry_after, hold_s = (failure.retry_after, failure.hold_s) if isinstance(failure, Failed) else (None, 0.0)
        return cls(failure.message, failure.param, failure.status, failure.code, retry_after, hold_s)

    def body(self) -> bytes:
        """The error object, as JSON."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return msgspec.json.encode(ErrorBody(Error(self.message, kind, self.param, self.code)))

    def response(self) -> web.Response:
        headers = {}
        if self.retry_after is not None:
            # Whole seconds, never too early.
            headers["Retry-After"] = str(int(-(-self.retry_after // 1)))
        elif self.status in (429, 503):
            headers["Retry-After"] = "1"
        response = web.Response(body=self.body(), status=self.status, content_type="application/json", headers=headers)
        if self.status == 408:
            # What is left of the request will never come, and nothing else can come before it.
            response.force_close()
        return response


_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`")
_MISSING = re.compile(r"Object missing required field `(.*?)`")
_PLACE = re.compile(r" - at `(?:key in )?\$\.?(.*?)`$")


def decode(decoder: msgspec.json.Decoder[Body], body: bytes) -> Body:
    """A body as its type. Raises `Refusal` in a user's words."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        text = str(error)
        place = _PLACE.search(text)
        where = place[1] if place else ""
        what = _PLACE.sub("", text)
        if unknown := _UNKNOWN.match(what):
            name = f"{where}.{unknown[1]}" if where else unknown[1]
            raise Refusal(f"{name} is not a known parameter: leave it out", name, code="unknown_parameter") from None
        if missing := _MISSING.match(what):
            name = f"{where}.{missing[1]}" if where else missing[1]
            raise Refusal(f"{name} is missing", name, code="missing_required_parameter") from None
        if not where:
            raise Refusal(f"the body must be a JSON object: {what[0].lower()}{what[1:]}") from None
        raise Refusal(f"{where}: {what[0].lower()}{what[1:]}", where.split("[")[0].split(".")[0], code="invalid_type") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(f"the body is not valid JSON in UTF-8: {error}", code="malformed_json") from None
