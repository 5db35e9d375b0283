"""Frames that no honest peer sends: rubbish, damaged messages, numbers that promise what does not follow.

    sample of every message ─▶ damaged ─▶ frames, each with whether its receiver must reject it

Whoever can write to the sockets may also give orders (they lie in a folder of mode 0700), and orders are obeyed. So a damaged order that is
still a valid one is left out: here is tested what happens to what is *not* an order.
"""

import random
import socket
import struct
from pathlib import Path
from typing import get_args

import msgspec

from headrace.engine.messages import frontend, lifecycle, steps, tokens
from headrace.engine.messages.sampling import Sampling
from headrace.engine.messages.wire import BadFrame, Codec, Message, encode

SOCKETS: dict[str, object] = {
    "supervisor": lifecycle.FromChild,
    "scheduler": tokens.ToScheduler | steps.FromWorker | lifecycle.ToChild,
    "tokenizer-0": tokens.FromScheduler | lifecycle.ToChild,
    "tokenizer-0.desk": frontend.ToTokenizer,
    "worker-0": steps.ToWorker | lifecycle.ToChild,
    "server-0": lifecycle.ToServer | lifecycle.ToChild,
}
"""Every socket that is bound in a run directory, and what it takes."""

ORDERS = (
    lifecycle.Started,
    lifecycle.Fatal,
    lifecycle.Restart,
    lifecycle.Snapshot,
    lifecycle.Drain,
    lifecycle.Resume,
    lifecycle.Drained,
    lifecycle.Ask,
    lifecycle.PeerDied,
    lifecycle.EngineState,
    lifecycle.NewModel,
    lifecycle.Status,
    steps.WorkerUp,
    steps.Hello,
    steps.Begin,
    steps.Plan,
)
"""Messages that change what a process does by themselves, without belonging to a request."""

FAR = 1 << 60
"""An id that no request and no call has."""


def samples() -> list[Message]:
    """One of each message, with something in every column."""
    sampling = Sampling(max_tokens=3, logit_bias=((5, 1.0),), stop_token_ids=(7,))
    times = steps.StepTimes(1, 2, 3, 4)
    logprobs = tokens.TokenLogprobs(FAR, 0, -1.0, (1,), (-1.0,))
    scored = tokens.PromptLogprobs(FAR, 1, [-1.0], [(1,)], [(-1.0,)])
    generate = frontend.Generate((FAR,), (1,), frontend.TextPrompt("hello"), sampling, ("stop",), tenant="t", deadline=1e9)
    chat = frontend.ChatPrompt(b'[{"role":"user","content":"hi"}]')
    return [
        lifecycle.Started("worker-0", 1, "detail"),
        lifecycle.Fatal("worker-0", "message"),
        lifecycle.Restart(("worker-0",), "why"),
        lifecycle.Probe(FAR),
        lifecycle.Snapshot("worker-0", FAR, [lifecycle.Series("a", "counter", "b", (("c", "d"),), 1.0)]),
        lifecycle.Drain(),
        lifecycle.Drained("scheduler"),
        lifecycle.PeerDied("worker-0", 1, True),
        lifecycle.Resume(),
        lifecycle.Ask(FAR, "server-0", "reload", "/nowhere"),
        lifecycle.Answered(FAR, 200, "ready"),
        lifecycle.NewModel(),
        lifecycle.GetStatus(FAR, "server-0"),
        lifecycle.GetStatus(FAR, "../../tmp/nowhere"),
        lifecycle.Snapshot("nobody", -1, []),
        lifecycle.Started("nobody", 1),
        lifecycle.Status(FAR, "ready", [], [], None),
        lifecycle.EngineState("ready"),
        steps.WorkerUp(0, 1, 64, 16),
        steps.Hello(1),
        steps.Begin(FAR, 64, 16, (2,)),
        steps.Plan(FAR, 1, 2, [], [], [steps.Admit(FAR, [1, 2], [], sampling, 1)], [FAR], [2]),
        steps.StepResult(FAR, 1, 0, 2, [FAR], [1], [5], [logprobs], [scored], times),
        tokens.Submit(FAR, "tokenizer-0", [1, 2, 3], sampling, 1, [4], "t", 0, 1e9, "answer"),
        tokens.Submit(FAR + 1, "nobody", [1, 2, 3], sampling, 1),
        tokens.Cancel((FAR,), "abort"),
        tokens.Tokens(FAR, 1, [FAR], [0], [5], [logprobs], [scored], [tokens.TokenEnd(FAR, "stop", None, 0, 0.0, 0)]),
        tokens.Refused(FAR, 429, "code", "message", 1.0),
        tokens.Moved(FAR, 3),
        tokens.SchedulerUp(1),
        generate,
        msgspec.structs.replace(generate, prompt=frontend.TokenPrompt((1, 2, 3)), emitted=((4,),)),
        msgspec.structs.replace(generate, prompt=chat, requests=(FAR, FAR)),
        msgspec.structs.replace(generate, sampling=Sampling(temperature=float("nan"), max_tokens=-3), deadline=float("inf")),
        frontend.Abort((FAR,)),
        frontend.Recall(FAR, "answer", "t"),
        frontend.Tokenize(FAR, chat),
        frontend.Detokenize(FAR, (1, 1 << 40)),
        frontend.Describe(FAR),
        frontend.ListDesks(FAR),
        frontend.Dismissed(),
        frontend.Text([FAR], ["x"], [1], [], [], [5]),
    ]


LIARS = [b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xcf" + b"\xff" * 8]
"""Heads of MessagePack values that announce four billion elements or bytes, and the largest number."""


def rubbish(draw: random.Random) -> bytes:
    """A frame that is no message at all."""
    kind = draw.randrange(6)
    if kind == 0:
        return b""
    if kind == 1:
        return draw.randbytes(draw.choice((1, 7, 300, 70_000)))
    if kind == 2:
        return draw.choice(LIARS) + draw.randbytes(draw.randrange(20))
    if kind == 3:
        return b"\x91" * draw.choice((10, 1000, 100_000))
    if kind == 4:
        return bytes(draw.choice((1, 1000, 200_000)))
    return b"\x93\xa8Generate" + draw.choice(LIARS)


def damaged(draw: random.Random, frame: bytes) -> bytes:
    """A message that was cut, or has a few bytes changed, put in or left out."""
    content = bytearray(frame)
    if draw.random() < 0.3:
        return bytes(content[: draw.randrange(len(content))])
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content) + 1)
        change = draw.choice(
            [*LIARS, b"", b"", bytes([draw.randrange(256)]), b"\xc0", b"\xcb\x7f\xf8" + bytes(6), b"\xd3" + b"\x80" + bytes(7)]
        )
        content[at : at + draw.choice((0, 1, len(change)))] = change
    return bytes(content)


def is_order(message: Message) -> bool:
    """Whether a process obeys it: what says that it is from a process which there is not, is no order."""
    return isinstance(message, ORDERS) and getattr(message, "child", "worker-0") in SOCKETS


class Frames:
    """An endless row of hostile messages for one socket; `rejected` counts those that it can only drop."""

    def __init__(self, name: str, seed: int, union: object = None) -> None:
        """`union`: what the socket takes, if that is not what SOCKETS says."""
        self.rejected = 0
        self._draw = random.Random(f"{name} {seed}")
        self._codec = Codec(union or SOCKETS[name])
        self._samples = [encode(message) for message in samples()]
        self._desk = name.endswith(".desk")

    def next(self) -> list[bytes]:
        """The frames of one message."""
        draw = self._draw
        while True:
            kind = draw.randrange(4)
            frame = rubbish(draw) if kind == 0 else draw.choice(self._samples)
            if kind > 1:
                frame = damaged(draw, frame)
            if kind == 0 and draw.random() < 0.2:
                self.rejected += 1
                return [frame, b"", draw.choice(self._samples)] if draw.random() < 0.5 else [b""] * 1000
            try:
                if is_order(self._codec.decode(frame)):
                    continue
            except BadFrame:
                self.rejected += 1
            return [frame]


def takes(name: str) -> set[type]:
    """The messages that a socket takes."""
    return set(get_args(SOCKETS[name]))


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16 + 1 + 31)
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x04PUSH"
"""ZMTP 3.0: a greeting, and the command with which a PUSH socket introduces itself (rfc.zeromq.org/spec/23)."""

BEFORE_ZMTP = {
    "rubbish": b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)) * 8,
    "a greeting of another security": GREETING.replace(b"NULL", b"EVIL"),
    "a command too long": GREETING + b"\x06" + struct.pack(">Q", 1 << 62),
    "a message of 4 EiB": GREETING + b"\x04" + bytes([len(READY)]) + READY + b"\x02" + struct.pack(">Q", 1 << 62),
}


def hung_up_on(path: Path, content: bytes) -> bool:
    """Write raw bytes to a socket; whether its owner ends the connection."""
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(10)
        raw.connect(str(path))
        try:
            raw.sendall(content)
            while raw.recv(65536):
                pass
        except (ConnectionError, BrokenPipeError):
            pass
        return True
