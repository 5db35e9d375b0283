"""Processes and the sockets between them, without either: what may happen to a message is what ZeroMQ and a SIGKILL may do to it.

    process ── Channel, first in first out ──▶ process        any channel may deliver next: order holds within one and nowhere else

A process that dies takes along a part of what it has sent (the last of it) and what it had received and not read (the first of it). What a
peer has queued for it goes to its successor, unless that peer forgets the dead one first; and even then some may have got there. Dice,
seeded by the test, choose which part. The clock stands still but when the test moves it.
"""

import random
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from headrace.engine.messages.wire import Codec, Message, encode
from headrace.engine.metrics import Metrics
from headrace.engine.process import EngineSpec

KERNEL = "kernel"
"""Who starts processes and tells of their deaths."""


class Boot(Message):
    """A process has been started: the first thing that happens to it."""


class Died(Message):
    """Told to the supervisor, as a pidfd does."""

    name: str
    incarnation: int
    by_itself: bool


class Clock:
    """Stands in for the module `time`. A measured span is never empty, so that steps take time."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._ticks = 0

    def monotonic(self) -> float:
        return self.now

    def perf_counter_ns(self) -> int:
        self._ticks += 1_000_000
        return self._ticks


class Channel:
    """One socket's messages on their way."""

    __slots__ = ("frames", "name", "to")

    def __init__(self, name: str, to: str) -> None:
        self.name = name
        self.to = to
        self.frames: deque[bytes] = deque()


class Surroundings:
    """What a `Process` is to its actor, and its life in the network."""

    def __init__(self, network: "Network", name: str, spec: EngineSpec, union: object, build: Callable[["Surroundings"], Any]) -> None:
        self.name = name
        self.config = spec.config
        self.model = spec.model
        self.incarnation = 0
        self.metrics = Metrics()
        self.progress: Any = None
        self.post = self
        self.actor: Any = None
        """None from its death to its successor's boot."""
        self.exists = False
        """It can be sent to: it is alive, or about to boot."""
        self.outboxes: dict[str, Channel] = {}
        self.timers: list[tuple[float, Callable[[], None]]] = []
        self.codec = Codec(union | Boot)
        self._build = build
        self._network = network

    def send(self, to: str, message: Message) -> bool:
        channel = self.outboxes.get(to)
        if channel is None:
            channel = self.outboxes[to] = self._network.connect(self.name, to)
        channel.frames.append(encode(message))
        return True

    def forget(self, to: str) -> None:
        """Close the socket to `to`: what waits in it is lost, but for what a successor has already."""
        if channel := self.outboxes.pop(to, None):
            if self._network.processes[to].exists:
                self._network.cut(channel)
            else:
                channel.frames.clear()

    def later(self, seconds: float, act: Callable[[], None]) -> None:
        self.timers.append((self._network.clock.now + seconds, act))

    def boot(self) -> None:
        self.incarnation = self._network.next_incarnation()
        self.actor = self._build(self)

    def die(self) -> None:
        self.actor = None
        self.timers.clear()
        self.exists = False
        for channel in self.outboxes.values():
            self._network.cut(channel)
        self.outboxes.clear()


class Network:
    def __init__(self, seed: int) -> None:
        self.clock = Clock()
        self.dice = random.Random(seed)
        self.processes: dict[str, Surroundings] = {}
        self.channels: list[Channel] = []
        self.events = 0
        """Messages that were handled."""
        self._incarnations = 0
        self.deaths: Counter[str] = Counter()

    def next_incarnation(self) -> int:
        self._incarnations += 1
        return self._incarnations

    def add(self, process: Surroundings) -> Surroundings:
        self.processes[process.name] = process
        return process

    def connect(self, name: str, to: str) -> Channel:
        channel = Channel(name, to)
        self.channels.append(channel)
        return channel

    def cut(self, channel: Channel) -> None:
        """Nothing more is sent, and of what was the last part is lost: all, none, or anything between."""
        for _ in range(self._part(len(channel.frames))):
            channel.frames.pop()

    def start(self, name: str) -> None:
        """Start the process, which boots when its time comes. Until then messages to it wait."""
        self.processes[name].exists = True
        self.connect(KERNEL, name).frames.append(encode(Boot()))

    def kill(self, name: str, by_itself: bool) -> None:
        """End a process without a word."""
        process = self.processes[name]
        process.die()
        self.deaths[name] += 1
        open_now = {id(channel) for other in self.processes.values() for channel in other.outboxes.values()}
        for channel in self.channels:
            if channel.to == name:
                # Sockets whose sender is dead have nobody who still holds something back.
                lost = self._part(len(channel.frames)) if id(channel) in open_now else len(channel.frames)
                for _ in range(lost):
                    channel.frames.popleft()
        self.connect(KERNEL, "supervisor").frames.append(encode(Died(name, process.incarnation, by_itself)))

    def hang_up(self, name: str, other: str) -> None:
        """Lose all that is on its way between two that are joined by one socket."""
        for channel in self.channels:
            if {channel.name, channel.to} == {name, other}:
                channel.frames.clear()

    def alive(self, name: str) -> bool:
        return self.processes[name].actor is not None

    def ready(self) -> list[Channel]:
        """Channels that can deliver now."""
        open_now = {id(channel) for process in self.processes.values() for channel in process.outboxes.values()}
        self.channels = [channel for channel in self.channels if channel.frames or id(channel) in open_now]
        return [channel for channel in self.channels if channel.frames and (channel.name == KERNEL or self.alive(channel.to))]

    def deliver(self, channel: Channel, burst: int = 1) -> None:
        """Hand the receiver the next message, and up to `burst` of this channel before it comes to rest."""
        process = self.processes[channel.to]
        for _ in range(min(burst, len(channel.frames))):
            message = process.codec.decode(channel.frames.popleft())
            self.events += 1
            if isinstance(message, Boot):
                process.boot()
            else:
                process.actor.receive(message)
            if process.actor is None:
                return
        process.actor.settle()

    def pass_time(self, seconds: float) -> None:
        """Move the clock, and ring what is due."""
        self.clock.now += seconds
        for process in self.processes.values():
            due = [act for when, act in process.timers if when <= self.clock.now]
            process.timers = [(when, act) for when, act in process.timers if when > self.clock.now]
            for act in due:
                act()

    def _part(self, whole: int) -> int:
        return self.dice.choice((0, whole, self.dice.randint(0, whole)))
