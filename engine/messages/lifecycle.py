"""Between the supervisor and its children: birth, readiness, health, metrics, drain, another model, death.

supervisor ── Bear, Learn ──▶ fork server ── fork ──▶ child ── Born ──▶ supervisor

supervisor ── Drain, Resume, Probe, PeerDied ──▶ child         ── EngineState, NewModel, Status, Answered ──▶ server
supervisor ◀─ Started, Snapshot, Drained, Fatal ── child       ◀─ GetStatus, Ask ── server
"""

from typing import Literal

from headrace.engine.messages.wire import Message


class Bear(Message):
    """Fork a child, which runs the `ROLE` of `module`."""

    module: str
    run_dir: str
    name: str
    incarnation: int


class Learn(Message):
    """Import these modules, which children will run with these kernels (the setting)."""

    modules: list[str]
    kernels: str


class Born(Message):
    """The child of a `Bear` is there."""

    incarnation: int
    pid: int


class Started(Message):
    """The child has done its set-up and takes messages. `detail` says in a few words what it set up."""

    child: str
    incarnation: int
    detail: str = ""


class Fatal(Message):
    """The child cannot start for a reason that a user can mend; `message` is the one line to print."""

    child: str
    message: str


class Restart(Message):
    """A child asks for the restart of others, because what they say cannot be right."""

    names: tuple[str, ...]
    why: str


class Probe(Message):
    """Ask a child for its `Snapshot`."""

    call: int


class Histogram(Message):
    """Cumulative by exposition, plain counts here: `counts[i]` observations fell at or under `bounds[i]`, the last over all."""

    bounds: tuple[float, ...]
    counts: list[int]
    sum: float


class Series(Message):
    """One metric of one process. `labels` are pairs; `value` a number or a histogram."""

    name: str
    kind: str
    """"counter", "gauge" or "histogram"."""
    help: str
    labels: tuple[tuple[str, str], ...]
    value: float | Histogram


class Progress(Message):
    """The scheduler's pulse: is there work, and when did the last step end?"""

    running: int
    waiting: int
    workers_ready: bool
    last_step_age_s: float | None
    """Seconds since the last step ended; None before the first."""
    step: int
    owed_s: float | None = None
    """Seconds for which a rank has owed the result of a step; None while none does."""


class Snapshot(Message):
    child: str
    call: int
    series: list[Series]
    progress: Progress | None = None


class Drain(Message):
    """Refuse what is new, finish what runs."""


class Resume(Message):
    """Take again what is new."""


class Drained(Message):
    """Nothing is running and nothing waits. A server also says so when nothing runs while it holds back what is new."""

    child: str


class Ask(Message):
    """An operator's wish, handed on by a server; answered by `Answered` to `reply_to`."""

    call: int
    reply_to: str
    what: Literal["drain", "resume", "reload"]
    model: str | None = None
    """To reload: as the setting `model`, or None for the present one, read anew."""
    revision: str | None = None


class Answered(Message):
    """What became of an `Ask`: an HTTP status, the engine's state, and why where it was not done."""

    call: int
    status: int
    state: str
    message: str = ""
    model: str = ""
    """The name of the model that is served."""


class NewModel(Message):
    """Told to every server: the birth file names another model, which is served from now on."""


class PeerDied(Message):
    """A sibling process has died; its successor comes by itself. Told to every child at once, but read in no order with what others say:
    who has heard of the successor before knows by `incarnation` that this is not about it."""

    name: str
    incarnation: int
    """Of the one that died; its successors' are greater."""
    by_itself: bool = False
    """It crashed; not so if it was killed from outside, or together with another."""


class GetStatus(Message):
    """A frontend asks the supervisor for the state of the whole engine; answered by `Status` to `reply_to`."""

    call: int
    reply_to: str


class ChildStatus(Message):
    name: str
    state: str
    """"starting", "ready", "restarting" or "stopped"."""
    pid: int
    restarts: int
    uptime_s: float


class Status(Message):
    call: int
    state: str
    """"starting", "ready", "recovering", "reloading", "draining" or "drained"."""
    children: list[ChildStatus]
    series: list[Series]
    progress: Progress | None


class EngineState(Message):
    """Told to every server when it changes: may new requests be taken?"""

    state: str


FromChild = Started | Fatal | Restart | Snapshot | Drained | GetStatus | Ask
ToChild = Probe | Drain | Resume | PeerDied
ToServer = Status | EngineState | Answered | NewModel
"""Beside `ToChild`, which every child takes."""
