"""Reads from a checkpoint's metadata: each value is checked as it is read, and what is missing or wrong is named to the user."""

from collections.abc import Mapping
from typing import Any

from headrace.engine.errors import UserError


class Lookup:
    """Typed reads from a checkpoint's metadata, each key prefixed with `prefix` (a GGUF file's architecture)."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str = "") -> None:
        self.metadata = metadata
        self.prefix = prefix

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands; `default` where the key is missing or null."""
        value = self.metadata.get(self.prefix + key)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive integer. A list (GGUF writes one value a layer where they may differ) must hold the same value throughout."""
        value = self._present(key, default)
        if isinstance(value, list | tuple):
            if len(set(value)) != 1:
                raise self.refused(key, value, "layers of different sizes are not supported")
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refused(key, value, "it must be a positive integer")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._present(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.refused(key, value, "it must be a positive number")
        return float(value)

    def refuse_if_set(self, *keys: str) -> None:
        """Raise for any of `keys` that is there and neither null nor false: it asks for something that is not built."""
        for key in keys:
            if value := self.get(key):
                raise self.refused(key, value, "this is not supported")

    def refused(self, key: str, value: Any, why: str) -> UserError:
        shown = repr(value)
        return UserError(f"the model's metadata has {self.prefix}{key}={shown if len(shown) <= 60 else shown[:57] + '...'}: {why}")

    def _present(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            raise UserError(f"the model's metadata lacks {self.prefix}{key}: the file is incomplete, get it anew")
        return value
