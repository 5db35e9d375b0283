"""Chaos: streams of all kinds run while processes of the engine are killed and stopped at random; each must end as if nothing had happened.

    pool of requests ─▶ each once, undisturbed: what is right
    64 slots, a request of the pool after the other ──▶ engine ◀── SIGKILL or SIGSTOP to a random process every few seconds
    every stream = the undisturbed one, token for token; at the end nothing is left, no page, no table entry, no memory

The worker is the paced one, whose every token follows from all before it; `--real` takes the real model. `scripts/chaos` runs this.
"""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.client import AsyncClient
from tests.serving import REAL, Served

PACED = "tests.e2e.paced"
FORK_SERVER = "fork-server"
HELLO = [{"role": "user", "content": "hello"}]

PATIENCE = 120.0
"""Seconds that the streams may take to end after the last blow."""

SLOW_READ_S = 0.05
"""What a slow reader pauses after each piece."""

MOST_GROWTH = 0.1
"""Share by which the memory of the processes that lived all along may have grown, beside 16 MiB."""


@dataclass
class Answer:
    """A stream's outcome."""

    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None
    tokens: int | None = None
    error: str | None = None
    left: bool = False
    """The reader went away on purpose."""

    def wrong(self, right: "Answer") -> str | None:
        """How it differs from the undisturbed one; None when it does not."""
        if self.error:
            return self.error
        if self.left:
            return None if right.text.startswith(self.text) else "what came before the reader left is not what it should be"
        if self.text != right.text:
            same = next((at for at, (a, b) in enumerate(zip(self.text, right.text, strict=False)) if a != b), len(self.text))
            return f"{len(self.text)} characters instead of {len(right.text)}, equal up to {same}"
        if (self.finish, self.tokens, self.logprobs) != (right.finish, right.tokens, right.logprobs):
            return f"ended {self.finish} after {self.tokens} tokens instead of {right.finish} after {right.tokens}, or other logprobs"
        return None


@dataclass
class Request:
    """One of the pool: the body, and how its reader behaves."""

    body: dict[str, Any]
    slow: bool = False
    leaves_after: int | None = None
    """Pieces after which the reader goes away."""


@dataclass
class Blow:
    what: str
    name: str
    at: float
    recovered: float | None = None


def pool(count: int, tokens: int, draw: random.Random) -> list[Request]:
    """Distinct requests of many kinds: greedy and seeded, long and short, with logprobs, with readers that are slow or leave."""
    requests = []
    for place in range(count):
        body: dict[str, Any] = {"max_tokens": draw.choice([8, tokens // 4, tokens, 3 * tokens])}
        body |= {"temperature": 0.0} if draw.random() < 0.4 else {"temperature": 0.8}
        # The paced worker's tokens follow from the seed even where they are greedy.
        body["seed"] = place
        if draw.random() < 0.5:
            body["messages"] = [*HELLO, {"role": "assistant", "content": "word " * draw.randrange(1, 200)}, *HELLO]
            if draw.random() < 0.3:
                body["logprobs"] = True
        else:
            body["prompt"] = f"Number {place}: " + "once upon a time " * draw.randrange(1, 60)
        requests.append(
            Request(body, slow=draw.random() < 0.1, leaves_after=draw.randrange(1, max(2, tokens // 2)) if draw.random() < 0.15 else None)
        )
    return requests


async def ask(client: AsyncClient, request: Request, whole: bool = False) -> Answer:
    """One stream to its end, or `whole`: read at once, whatever its reader would do."""
    answer, body = Answer(), dict(request.body)
    body["stream_options"] = {"include_usage": True}
    chat, pieces = "messages" in body, 0
    try:
        stream = await (client.chat_stream(body.pop("messages"), **body) if chat else client.complete_stream(body.pop("prompt"), **body))
        async with stream:
            async for chunk in stream:
                if chunk.usage:
                    answer.tokens = chunk.usage.completion_tokens
                for choice in chunk.choices:
                    answer.finish = choice.finish_reason or answer.finish
                    text = choice.delta.content if chat else choice.text
                    answer.text += text or ""
                    pieces += bool(text)
                    if choice.logprobs:
                        answer.logprobs += [one.logprob for one in choice.logprobs.content]
                if whole:
                    continue
                if request.leaves_after is not None and pieces >= request.leaves_after:
                    answer.left = True
                    return answer
                if request.slow:
                    await asyncio.sleep(SLOW_READ_S)
    except Exception as error:  # whatever ended it, it was lost
        answer.error = f"lost after {len(answer.text)} characters: {error!r}"
    return answer


async def with_stop_strings(client: AsyncClient, requests: list[Request], draw: random.Random) -> None:
    """Give some of the requests a stop string that occurs in what they generate."""
    for request in requests:
        if draw.random() < 0.25 and "logprobs" not in request.body:
            text = (await ask(client, request, whole=True)).text
            if len(text) > 20:
                middle = draw.randrange(len(text) // 2, len(text) - 8)
                request.body["stop"] = [text[middle : middle + 6]]


class Chaos:
    """One run. `servers` has the HTTP server killed too: its streams go on by themselves, as `headrace.client` resumes them."""

    def __init__(self, served: Served, options: argparse.Namespace) -> None:
        self.served = served
        self.options = options
        self.draw = random.Random(options.seed)
        self.requests = pool(options.pool, options.tokens, self.draw)
        self.right: list[Answer] = []
        self.blows: list[Blow] = []
        self.wrong: list[str] = []
        self.done: Counter[str] = Counter()
        self._over = asyncio.Event()
        self._seen = 0

    async def run(self) -> None:
        """Learn what is right, then disturb."""
        async with AsyncClient(self.served.url, retries=20) as client:
            await with_stop_strings(client, self.requests, self.draw)
            self.right = list(await asyncio.gather(*(ask(client, request, whole=True) for request in self.requests)))
            if lost := [one.error for one in self.right if one.error]:
                raise RuntimeError(f"an undisturbed stream failed: {lost[0]}")
            slots = [asyncio.create_task(self._slot(client, place)) for place in range(self.options.streams)]
            before = await asyncio.to_thread(self._memory)
            try:
                await self._disturb()
            finally:
                self._over.set()
            await asyncio.wait_for(asyncio.gather(*slots), PATIENCE)
        self.served.until_state("ready", 30)
        self.served.until_empty(30)
        self._check_memory(before)

    async def _slot(self, client: AsyncClient, place: int) -> None:
        """One request after the other until the disturbance is over."""
        draw = random.Random(place)
        while not self._over.is_set():
            which = draw.randrange(len(self.requests))
            request = self.requests[which]
            answer = await ask(client, request)
            self.done["left early" if answer.left else "ended"] += 1
            if wrong := answer.wrong(self.right[which]):
                self.wrong.append(f"request {which} {request.body}: {wrong}")

    async def _disturb(self) -> None:
        options = self.options
        while len(self.blows) < options.kills:
            await asyncio.sleep(self.draw.uniform(options.every[0], options.every[1]))
            names = [name for name in await asyncio.to_thread(self._children) if options.servers or not name.startswith("server")]
            name = self.draw.choice(names)
            stop = self.draw.random() < options.stops
            blow = Blow("stopped" if stop else "killed", name, time.monotonic())
            self._seen = len(self.served.lines)
            pid = (await asyncio.to_thread(self._children))[name]
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP if stop else signal.SIGKILL)
            self.blows.append(blow)
            await asyncio.to_thread(self._until_recovered, blow)
            if options.verbose:
                print(f"{len(self.blows):4} {blow.what} {blow.name}: {blow.recovered} s", file=sys.stderr, flush=True)

    def _children(self) -> dict[str, int]:
        """Process ids by name, from the process table: a server that is being started cannot be asked."""
        parent = self.served.process.pid
        found = {}
        for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ").split()
                if words[:1] == ["headrace"]:
                    found[words[1]] = int(pid)
        return found

    def _until_recovered(self, blow: Blow) -> None:
        """Wait until the process is back and the engine moves again."""
        served = self.served
        served.until_line("there is another one" if blow.name == FORK_SERVER else f"{blow.name} is back", self._seen, 60)
        served.until_state("ready", 60)
        step = self._step()
        deadline = time.monotonic() + 60
        while self._step() <= step:
            assert time.monotonic() < deadline, "no step after a recovery"
        blow.recovered = time.monotonic() - blow.at

    def _step(self) -> float:
        with contextlib.suppress(OSError, AssertionError):
            return self.served.metric("headrace_step_seconds_count")
        return -1.0

    def _memory(self) -> int:
        """Resident bytes of the processes that are not killed."""
        pids = [self.served.process.pid]
        pids += [pid for name, pid in self._children().items() if name.startswith("server") and not self.options.servers]
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") for pid in pids)

    def _check_memory(self, before: int) -> None:
        after = self._memory()
        self.done["MiB more"] = (after - before) >> 20
        if after - before > MOST_GROWTH * before + (16 << 20):
            self.wrong.append(f"memory grew from {before >> 20} to {after >> 20} MiB")

    def table(self) -> str:
        """What was done, and what it cost."""
        lines = ["| blow | process | times | recovery p50, s | p99, s |", "|---|---|---|---|---|"]
        kinds = sorted({(blow.what, blow.name) for blow in self.blows})
        for what, name in [*kinds, ("all", "")]:
            times = sorted(blow.recovered or 0.0 for blow in self.blows if what == "all" or (blow.what, blow.name) == (what, name))
            if times:
                lines.append(f"| {what} | {name} | {len(times)} | {times[len(times) // 2]:.2f} | {times[int(len(times) * 0.99)]:.2f} |")
        streams = ", ".join(f"{count} {what}" for what, count in sorted(self.done.items()))
        return "\n".join([*lines, "", f"streams: {streams}; wrong: {len(self.wrong)}"])


def parser() -> argparse.ArgumentParser:
    about = argparse.ArgumentParser(prog="scripts/chaos", description="Kill processes of a serving engine; every stream must end right.")
    about.add_argument("--kills", type=int, default=200, metavar="N", help="blows in all (default: 200)")
    about.add_argument("--every", type=float, nargs=2, default=(2.0, 5.0), metavar="S", help="pause between two, from … to (default: 2 5)")
    about.add_argument("--stops", type=float, default=0.25, metavar="SHARE", help="share of SIGSTOP among them (default: 0.25)")
    about.add_argument("--streams", type=int, default=64, metavar="N", help="streams at once (default: 64)")
    about.add_argument("--pool", type=int, default=96, metavar="N", help="distinct requests (default: 96)")
    about.add_argument("--tokens", type=int, default=120, metavar="N", help="length of a middling answer (default: 120)")
    about.add_argument("--hang-timeout", type=float, default=1.5, metavar="S", help="the engine's own (default: 1.5)")
    about.add_argument("--servers", action="store_true", help="kill the HTTP server too; the client resumes its streams")
    about.add_argument("--draft", default="none", choices=["none", "ngram"], help="drafts (default: none)")
    about.add_argument("--real", action="store_true", help="the real model instead of the paced worker")
    about.add_argument("--seed", type=int, default=1, metavar="N", help="of every random choice (default: 1)")
    about.add_argument("--verbose", action="store_true", help="a line for each blow")
    return about


def main(arguments: list[str] | None = None) -> Chaos:
    """Run it; the outcome."""
    options = parser().parse_args(arguments)
    settings: dict[str, Any] = {"tokenizers": 2, "draft": options.draft, "hang_timeout": options.hang_timeout, "max_restarts": 10**6}
    with Served(REAL if options.real else PACED, **settings) as served:
        chaos = Chaos(served, options)
        asyncio.run(chaos.run())
        return chaos


if __name__ == "__main__":
    outcome = main()
    print(outcome.table())
    for line in outcome.wrong[:20]:
        print(line, file=sys.stderr)
    sys.exit(bool(outcome.wrong))
