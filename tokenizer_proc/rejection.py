"""A request that cannot be served, with what its client is told."""


class Rejection(Exception):
    """Becomes a `Failed` or a `CallFailed`. `status` is the HTTP status, `param` the parameter to blame."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value", status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status
