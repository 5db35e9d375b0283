"""Who stands around the scheduler and its ranks: a supervisor, tokenizers and a frontend, each as simple as its part of the protocol.

    Frontend ── Generate, Abort ──▶ Tokenizer ── Submit, Cancel ──▶ scheduler
    Frontend ◀── Text, Failed ───── Tokenizer ◀─ Tokens, Refused ── scheduler

They know tokens and no text. What the real ones do about a death they do as well: who loses a peer sends again what it has. One thing is
taken for granted: a frontend hears of a tokenizer's death before its successor is there to read what was meant for the dead one.
"""

from headrace.engine.messages.frontend import Abort, End, Failed, Generate, Text, TokenPrompt
from headrace.engine.messages.lifecycle import PeerDied, Restart, Started
from headrace.engine.messages.tokens import Cancel, Refused, SchedulerUp, Submit, TokenEnd, Tokens
from headrace.engine.messages.wire import Message
from headrace.engine.names import SCHEDULER
from tests.engine.protocol.network import Died, Network, Surroundings
from tests.engine.protocol.oracle import Ask

FRONTEND = "server-0"


class Supervisor:
    """Starts again who died, tells the others, and takes the ranks for one."""

    def __init__(self, network: Network, ranks: list[str]) -> None:
        self.restarts: list[Restart] = []
        """What the scheduler asked for."""
        self._network = network
        self._ranks = ranks
        self._up: set[str] = set()
        """Who has said so since it was last started."""
        self._doomed: set[str] = set()

    def receive(self, message: Message) -> None:
        network = self._network
        match message:
            case Started():
                self._up.add(message.child)
            case Died():
                name = message.name
                self._up.discard(name)
                network.processes["supervisor"].forget(name)
                doomed = name in self._doomed
                self._doomed.discard(name)
                death = PeerDied(name, message.incarnation, message.by_itself and not doomed)
                for other in sorted(self._up - {FRONTEND}):
                    network.processes["supervisor"].send(other, death)
                if network.alive(FRONTEND):
                    network.processes[FRONTEND].actor.receive(death)
                if name in self._ranks and not doomed:
                    self._doom(name)
                network.start(name)
            case Restart():
                self.restarts.append(message)
                for name in message.names:
                    if network.alive(name):
                        network.kill(name, by_itself=False)

    def settle(self) -> None:
        """Nothing waits for the end of a burst."""

    def _doom(self, dead: str) -> None:
        for name in self._ranks:
            if name != dead and self._network.alive(name):
                self._doomed.add(name)
                self._network.kill(name, by_itself=False)


class Held:
    """A request in a tokenizer."""

    def __init__(self, submit: Submit) -> None:
        self.submit = submit
        self.tokens = list(submit.emitted)
        self.expected = len(self.tokens)
        self.closed = False


def incarnation_of(request: int) -> int:
    """Which of the frontends that followed each other a request is of."""
    return request >> 32


class Tokenizer:
    """Finds out about a frontend's death when it has something to tell it."""

    def __init__(self, process: Surroundings, network: Network) -> None:
        self.held: dict[int, Held] = {}
        self._scheduler = -1
        self._process = process
        self._network = network

    def receive(self, message: Message) -> None:
        match message:
            case Generate():
                self._generate(message)
            case Abort():
                self._abort(message.requests)
            case Tokens():
                self._take(message)
            case Refused():
                if self.held.pop(message.request, None):
                    self._tell(message.request, Failed(message.request, message.status, message.code, message.message))
            case SchedulerUp():
                self._scheduler = max(self._scheduler, message.incarnation)
                for held in list(self.held.values()):
                    if held.closed:
                        self._end(held, TokenEnd(held.submit.request, "abort", None, 0, 0.0, 0))
                    else:
                        self._submit(held)
            case PeerDied(name=name, incarnation=incarnation) if name == SCHEDULER and incarnation >= self._scheduler:
                self._process.post.forget(SCHEDULER)

    def settle(self) -> None:
        """Everything was said at once."""

    def _generate(self, generate: Generate) -> None:
        assert isinstance(generate.prompt, TokenPrompt)
        (request,), (seed,) = generate.requests, generate.seeds
        emitted = list(generate.emitted[0]) if generate.emitted else []
        submit = Submit(
            request,
            self._process.name,
            list(generate.prompt.ids),
            generate.sampling,
            seed,
            emitted,
            generate.tenant,
            generate.priority,
            generate.deadline,
            attempt=generate.attempt,
        )
        held = self.held[request] = Held(submit)
        self._submit(held)

    def _submit(self, held: Held) -> None:
        submit = held.submit
        fields = {name: getattr(submit, name) for name in submit.__struct_fields__} | {"emitted": held.tokens}
        self._process.send(SCHEDULER, Submit(**fields))

    def _abort(self, requests: tuple[int, ...]) -> None:
        for request in requests:
            if held := self.held.get(request):
                held.closed = True
        self._process.send(SCHEDULER, Cancel(tuple(requests), "abort"))

    def _take(self, message: Tokens) -> None:
        for request, index, token in zip(message.requests, message.index, message.tokens, strict=True):
            held = self.held.get(request)
            if held is None:
                continue
            if index != len(held.tokens):
                held.expected = max(held.expected, index + 1)
                continue
            held.tokens.append(token)
            if not held.closed:
                self._tell(request, Text([request], [""], [1], tokens=[token]))
        for end in message.ends:
            held = self.held.get(end.request)
            if held is None:
                continue
            if held.expected > len(held.tokens) and not held.closed:
                held.expected = len(held.tokens)
                self._submit(held)
                continue
            self._end(held, end)

    def _end(self, held: Held, end: TokenEnd) -> None:
        self.held.pop(end.request, None)
        self._tell(end.request, Text([], [], [], [End(end.request, end.reason, end.stop_token, 0, len(held.tokens), 0, 0.0)]))

    def _tell(self, request: int, message: Message) -> None:
        frontend = self._network.processes[FRONTEND]
        if frontend.actor is not None and frontend.incarnation == incarnation_of(request):
            self._process.send(FRONTEND, message)
            return
        gone = tuple(other for other in self.held if incarnation_of(other) == incarnation_of(request))
        for other in gone:
            del self.held[other]
        self._process.send(SCHEDULER, Cancel(gone, "abort"))


class Asked:
    """A request of the frontend's, from its submission to its one last word."""

    def __init__(self, ask: Ask, desk: str, deadline: float | None, tenant: str, priority: int, tokens: list[int]) -> None:
        self.ask = ask
        self.desk = desk
        self.deadline = deadline
        self.tenant = tenant
        self.priority = priority
        self.tokens = tokens
        self.attempt = 0


class Frontend:
    """Asks, and counts last words. `ended` has (the request, why it ended)."""

    def __init__(self, process: Surroundings, network: Network, ended: dict[int, tuple[Asked, str]]) -> None:
        self.live: dict[int, Asked] = {}
        self._ended = ended
        self._process = process
        self._network = network

    def generate(self, request: int, asked: Asked) -> None:
        self.live[request] = asked
        ask = asked.ask
        emitted = (tuple(asked.tokens),) if asked.tokens else ()
        self._process.send(
            asked.desk,
            Generate(
                (request,),
                (ask.seed,),
                TokenPrompt(ask.prompt),
                ask.sampling,
                tenant=asked.tenant,
                priority=asked.priority,
                deadline=asked.deadline,
                emitted=emitted,
                attempt=asked.attempt,
            ),
        )

    def abort(self, request: int) -> None:
        asked = self.live.pop(request)
        self._process.send(asked.desk, Abort((request,)))

    def receive(self, message: Message) -> None:
        match message:
            case Text():
                for request, token in zip(message.requests, message.tokens, strict=True):
                    if asked := self.live.get(request):
                        asked.tokens.append(token)
                for end in message.ends:
                    self._end(end.request, end.reason)
            case Failed():
                self._end(message.request, message.code)
            case PeerDied(name=name) if name.startswith("tokenizer"):
                self._network.hang_up(FRONTEND, name)
                for request, asked in list(self.live.items()):
                    if asked.desk == name:
                        asked.attempt += 1
                        asked.desk = "tokenizer-1" if name == "tokenizer-0" else "tokenizer-0"
                        self.generate(request, asked)

    def settle(self) -> None:
        """Nothing waits for the end of a burst."""

    def _end(self, request: int, why: str) -> None:
        assert request not in self._ended, f"request {request} ended as {self._ended[request][1]} and again as {why}"
        if asked := self.live.pop(request, None):
            self._ended[request] = asked, why
