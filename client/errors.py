"""What can go wrong between a client and a server, as types a program can tell apart.

ClientError
├── Unreachable      nothing listens there; no request was sent
├── Timeout          the server was silent for too long
├── Disconnected     the connection broke, or a stream ended without its end mark
└── APIError         the server answered with an error
    ├── BadRequest 400, 413, 422 · Unauthorized 401, 403 · NotFound 404
    └── RateLimited 429 · Unavailable 503 · ServerError other 5xx
"""

import msgspec


class ClientError(Exception):
    """Anything this library raises on purpose."""


class Unreachable(ClientError):
    """No connection could be made; nothing was sent."""


class Timeout(ClientError):
    """The server sent nothing for the client's `timeout`. It may still be working on the request."""


class Disconnected(ClientError):
    """The connection ended before the answer did. What a stream gave until then is real, but not all."""


class APIError(ClientError):
    """The server answered with an error. `str()` is its message."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        """The HTTP status; of an error within a stream, what its code amounts to."""
        self.message = message
        self.code = code
        """The server's word for the error, such as "context_length_exceeded"."""
        self.param = param
        """The request's field that is at fault."""
        self.retry_after = retry_after
        """Seconds after which the server suggests to try again."""


class BadRequest(APIError):
    """The request is wrong; sending it again will not help."""


class Unauthorized(APIError):
    """The key is missing or wrong."""


class NotFound(APIError):
    """No such model or path."""


class RateLimited(APIError):
    """The server has more work than it takes."""


class Unavailable(APIError):
    """The server is starting, recovering or shutting down."""


class ServerError(APIError):
    """The server failed."""


_BY_STATUS: dict[int, type[APIError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Unauthorized,
    404: NotFound,
    413: BadRequest,
    422: BadRequest,
    429: RateLimited,
    503: Unavailable,
}


def error_from(status: int, body: bytes, retry_after: str | None = None) -> APIError:
    """The error that a response of `status` with this body is; a body in OpenAI's form fills the fields.

    `retry_after` is the header's value; only its form in seconds is understood, a date counts as none.
    """
    message, code, param = _fields(body)
    kind = _BY_STATUS.get(status) or (ServerError if status >= 500 else APIError)
    return kind(status, message or f"the server answered with status {status}", code, param, _seconds(retry_after))


def error_from_event(data: bytes) -> APIError | None:
    """The error that a stream's event is, or None when it is none. A stream has sent its status long before, so the code tells."""
    if not data.startswith(b'{"error"') and b'"error"' not in data[:64]:
        return None
    try:
        error = msgspec.json.decode(data).get("error")
    except (msgspec.DecodeError, AttributeError):
        return None
    if not error:
        return None
    code = error.get("code") if isinstance(error, dict) else None
    status = code if isinstance(code, int) else error.get("status") if isinstance(error, dict) else None
    return error_from(status if isinstance(status, int) and 400 <= status < 600 else 500, data)


def _fields(body: bytes) -> tuple[str, str | None, str | None]:
    try:
        parsed = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return " ".join(body[:300].decode("utf-8", "replace").split()), None, None
    error = parsed.get("error", parsed) if isinstance(parsed, dict) else parsed
    if not isinstance(error, dict):
        return str(error), None, None
    code = error.get("code")
    param = error.get("param")
    message = error.get("message") or (f"the server is {error['status']}" if "status" in error else "")
    return str(message), None if code is None else str(code), None if param is None else str(param)


def _seconds(text: str | None) -> float | None:
    try:
        value = float(text) if text else None
    except ValueError:
        return None
    return value if value is not None and 0 <= value < float("inf") else None
