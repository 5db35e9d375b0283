"""The form every message takes between two processes.

A message is one ZeroMQ frame: the MessagePack of a tagged, array-like `msgspec.Struct`. The receiver names the union of messages it
understands and gets typed objects or a `BadFrame`; nothing on a wire is ever evaluated, imported or unpickled.

    Struct ── encode ──▶ [tag, field, field, …] as MessagePack ── one frame ──▶ decode(union) ──▶ Struct
"""

from typing import Annotated

import msgspec
from msgspec import Meta

Natural = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
LATEST = 1e12
Moment = Annotated[float, Meta(ge=0, le=LATEST)]
"""A point on the machine's monotonic clock, in seconds. Neither infinite nor "not a number", which no timer takes."""
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class Message(msgspec.Struct, tag=True, array_like=True, gc=False, frozen=True):
    """What all messages share: they are immutable, tagged by class name, and free of reference cycles."""


class BadFrame(ValueError):
    """A frame that is no message of the union its receiver understands. The receiver counts and drops it."""


_encoder = msgspec.msgpack.Encoder()


def check_columns(message: Message, first: str, *others: str) -> None:
    """Raise ValueError unless these fields of `message` are of one length; in a `__post_init__` that makes a frame a bad one."""
    length = len(getattr(message, first))
    for name in others:
        if len(getattr(message, name)) != length:
            raise ValueError(f"{type(message).__name__} has {length} {first}, but {len(getattr(message, name))} {name}")


def encode(message: Message) -> bytes:
    """One message as the bytes of one frame."""
    return _encoder.encode(message)


class Codec:
    """Decodes the frames of one inbox.

    `union` is the type of everything the inbox accepts, for example `Plan | Begin`.
    """

    def __init__(self, union: object) -> None:
        self._decoder = msgspec.msgpack.Decoder(union)

    def decode(self, frame: bytes) -> Message:
        """The message in `frame`; `BadFrame` when it is malformed, of another union or of a wrong type."""
        try:
            return self._decoder.decode(frame)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise BadFrame(str(error)) from None
