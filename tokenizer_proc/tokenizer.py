"""The tokenizer process: between frontends, which speak text, and the scheduler, which speaks token ids.

    frontend ── Generate ──▶ desk ─▶ encode ─▶ Submit ──▶ scheduler
    frontend ◀── one Text a burst ◀── stop strings ◀── characters ◀── Tokens

Every request id gets exactly one last word: an `End` or a `Failed`. A request is here from its submission to that word and leaves
nothing behind. Its tokens are numbered, so what comes twice after a restart is dropped, and a new scheduler gets every live request
with the tokens it has.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from headrace.engine.actor import Desk
from headrace.engine.curve import Guest
from headrace.engine.messages.frontend import (
    Abort,
    Accepted,
    CallFailed,
    Describe,
    Detokenize,
    Detokenized,
    End,
    Failed,
    Generate,
    ModelCard,
    Prompt,
    Recall,
    Recalled,
    Text,
    Tokenize,
    Tokenized,
    ToTokenizer,
)
from headrace.engine.messages.lifecycle import PeerDied
from headrace.engine.messages.tokens import Cancel, FromScheduler, Moved, Refused, SchedulerUp, Tokens
from headrace.engine.messages.wire import Message
from headrace.engine.names import SCHEDULER, desk_name
from headrace.engine.process import Process, Role
from headrace.tokenizer_proc.chat import ChatTemplates
from headrace.tokenizer_proc.guests import Guests, receive_guests
from headrace.tokenizer_proc.live import Frontend, Live, collect
from headrace.tokenizer_proc.prompts import encode, fit, param_of, size_of
from headrace.tokenizer_proc.rejection import Rejection
from headrace.tokenizer_proc.renderer import Renderer
from headrace.tokenizer_proc.shelf import Shelf
from headrace.tokenizer_proc.vocabulary import Tokenizer, load_parts

log = logging.getLogger(__name__)

STRANGER_GRACE = 5.0
"""Seconds that a frontend has to claim a request which the scheduler still runs for a tokenizer that died."""

MOST_STRANGERS = 100_000
"""Such requests that are remembered; of more, the oldest are forgotten."""

LONG = 50_000
"""Prompts of more characters are encoded on a thread, so that others need not wait."""


class Job:
    """A `Generate` whose prompt is being encoded. `wanted` shrinks when its requests are aborted or asked for again."""

    __slots__ = ("frontend", "generate", "wanted")

    def __init__(self, frontend: Frontend, generate: Generate) -> None:
        self.frontend = frontend
        self.generate = generate
        self.wanted = set(generate.requests)


class TokenizerActor:
    """The actor. Frontends reach it by its desk, those on other machines as `guests`, everyone else by its mailbox."""

    def __init__(self, process: Process, tokenizer: Tokenizer, templates: ChatTemplates | Renderer, guests: Guests | None = None) -> None:
        self._process = process
        self._tokenizer = tokenizer
        self._templates = templates
        self._spelling = tokenizer.spelling
        self._scheduler = -1
        """The latest incarnation of the scheduler that said it is up."""
        self._live: dict[int, Live] = {}
        self._jobs: dict[int, Job] = {}
        """Requests whose prompt is on a thread."""
        self._strangers: dict[int, float] = {}
        """Requests whose tokens come though nobody here asked for them, and since when (monotonic seconds)."""
        self._touched: list[Live] = []
        """Requests with something for the next `Text`."""
        self._orphans: list[tuple[Frontend, End]] = []
        """Last words on requests that were never submitted."""
        self._shelf = Shelf(process.run_dir)
        self._threads = ThreadPoolExecutor(2, "encode")
        self._loop = asyncio.get_running_loop()
        self._meters = Meters(process)
        self._desk = Desk(process.context, process.address(desk_name(process.name)), ToTokenizer, process.rejected_frames)
        self._desk.open(self._receive_frontend, self.settle)
        self._guests = guests
        if guests:
            guests.open(self._receive_frontend, self.settle)

    async def close(self) -> None:
        self._desk.close()
        if self._guests:
            self._guests.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def receive(self, message: Message) -> None:
        match message:
            case Tokens():
                self._take_tokens(message)
            case Refused():
                if live := self._live.pop(message.request, None):
                    failed = Failed(
                        message.request, message.status, message.code, message.message, None, message.retry_after, message.hold_s
                    )
                    self._tell(live.frontend, failed)
            case Moved(request=request, attempt=attempt):
                live = self._live.get(request)
                if live is not None and live.generate.attempt < attempt:
                    self._forget(request)
            case SchedulerUp():
                self._scheduler = max(self._scheduler, message.incarnation)
                self._submit_again()
            case PeerDied(name=name, incarnation=incarnation) if name == SCHEDULER and incarnation >= self._scheduler:
                self._process.post.forget(SCHEDULER)

    def _receive_frontend(self, frontend: Frontend, message: Message) -> None:
        match message:
            case Generate():
                self._generate(frontend, message)
            case Abort():
                self._abort(frontend, message.requests)
            case Recall():
                self._recall(frontend, message)
            case Tokenize():
                self._tokenize(frontend, message)
            case Detokenize():
                self._detokenize(frontend, message)
            case Describe():
                self._tell(frontend, self._card(message.call))

    def settle(self) -> None:
        """Send each frontend what the burst gave its requests."""
        if self._touched or self._orphans:
            texts: dict[Frontend, Text] = {}
            for live in self._touched:
                text = texts.get(live.frontend)
                if text is None:
                    text = texts[live.frontend] = Text([], [], [], [], [], [])
                collect(live, text)
            for frontend, end in self._orphans:
                texts.setdefault(frontend, Text([], [], [], [], [], [])).ends.append(end)
            self._touched, self._orphans = [], []
            for frontend, text in texts.items():
                self._tell(frontend, text)
        self._meters.live.set(len(self._live))

    # Requests come

    def _generate(self, frontend: Frontend, generate: Generate) -> None:
        job = Job(frontend, generate)
        for request in set(generate.requests):
            known = self._live.get(request) or self._jobs.get(request)
            if known is not None and known.generate.attempt > generate.attempt:
                # It was sent over a connection that broke, and comes behind what was sent over the next.
                job.wanted.discard(request)
            elif known is not None and known.generate.tenant != generate.tenant:
                job.wanted.discard(request)
                self._tell(frontend, Failed(request, 409, "id_in_use", "the request's id is another's: draw ids at random"))
            else:
                self._forget(request)
        self._jobs.update(dict.fromkeys(job.wanted, job))

        def work() -> tuple[list[int], str | None]:
            return encode(self._tokenizer, self._templates, generate.prompt)

        self._run(generate.prompt, work, lambda outcome: self._encoded(job, outcome))

    def _run(self, prompt: Prompt, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Call `done` with what `work` returns or with a Rejection; on a thread when the prompt is long."""
        if size_of(prompt) <= LONG:
            done(self._attempt(work))
            return

        def back(future: Future) -> None:
            if not future.cancelled():
                self._loop.call_soon_threadsafe(finish, future.result())

        def finish(outcome: Any) -> None:
            done(outcome)
            self.settle()

        self._threads.submit(self._attempt, work).add_done_callback(back)

    def _attempt(self, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        try:
            return work()
        except Rejection as rejection:
            return rejection
        except Exception as error:  # one request's trouble is not the others'
            log.exception("encoding failed")
            return Rejection(f"the prompt could not be encoded ({type(error).__name__}): see the server's log", None, "internal_error", 500)
        finally:
            self._meters.encode_seconds.observe(time.perf_counter() - began)

    def _encoded(self, job: Job, outcome: tuple[list[int], str | None] | Rejection) -> None:
        generate = job.generate
        for request in job.wanted:
            del self._jobs[request]
        if not job.wanted:
            return
        try:
            if isinstance(outcome, Rejection):
                raise outcome
            prompt, text = outcome
            sampling = fit(self._tokenizer, generate, len(prompt))
            lives = [
                Live(job.frontend, generate, place, prompt, sampling, self._tokenizer, self._process.name)
                for place, request in enumerate(generate.requests)
                if request in job.wanted
            ]
        except Rejection as rejection:
            param = rejection.param or param_of(generate.prompt)
            for request in job.wanted:
                self._tell(job.frontend, Failed(request, rejection.status, rejection.code, rejection.message, param))
            return
        self._meters.prompt_tokens.add(len(prompt))
        if generate.want_prompt and text is None:
            text = self._tokenizer.decode(prompt)
        for live in lives:
            shown = (text, prompt) if generate.want_prompt else (None, None)
            if not self._tell(job.frontend, Accepted(live.request, len(prompt), *shown)):
                return
            self._live[live.request] = live
            self._strangers.pop(live.request, None)
            self._tell_prompt_scores(live)
            self._submit(live)

    def _submit(self, live: Live) -> None:
        """Hand a request to the scheduler, or say its last word when nothing is left to do."""
        if live.closed:  # a stop string stands in what was delivered before a restart
            self._process.send(SCHEDULER, Cancel((live.request,), "stop"))
            live.finish_alone()
            self._retire(live)
        elif not self._process.send(SCHEDULER, live.submit):
            self._fail(live, 503, "overloaded", "the scheduler does not answer: try again in a moment")

    def _submit_again(self) -> None:
        """A scheduler has started and knows nothing."""
        for live in list(self._live.values()):
            if live.closed:
                live.finish_alone()
                self._retire(live)
            else:
                self._submit(live)

    # Tokens come

    def _take_tokens(self, message: Tokens) -> None:
        lives, touched = self._live, self._touched
        silent = self._last_places(message) if message.ends else ()
        matched: list[int] = []
        strangers: list[int] = []
        taken = 0
        for place, (request, index, token) in enumerate(zip(message.requests, message.index, message.tokens, strict=True)):
            live = lives.get(request)
            if live is None:
                strangers.append(request)
                continue
            tokens = live.tokens
            count = len(tokens)
            if index != count:
                # A gap: what lies between went to a tokenizer that died. The scheduler tells it again once it has our submission.
                live.expected = max(live.expected, index + 1)
                continue
            tokens.append(token)
            if live.closed:
                continue
            taken += 1
            live.fresh += 1
            if not live.touched:
                live.touched = True
                touched.append(live)
            if place in silent:
                continue
            if live.stops is None:
                live.text += live.stream.add(token)
            else:
                live.read(token, count + 1)
                if live.closed:
                    matched.append(request)
        self._meters.output_tokens.add(taken)
        for scores in message.logprobs:
            live = lives.get(scores.request)
            if live is not None and live.score(scores, self._spelling):
                self._touch(live)
        for chunk in message.prompt_logprobs:
            live = lives.get(chunk.request)
            if live is not None and live.prompt_scores is not None:
                live.prompt_scores.add(chunk, live.submit.prompt, self._spelling)
                self._tell_prompt_scores(live)
        if strangers:
            self._meet(strangers)
        for end in message.ends:
            live = lives.get(end.request)
            if live is None:
                self._strangers.pop(end.request, None)
                continue
            if live.expected > len(live.tokens) and not live.closed:
                # It ended before the scheduler knew what we lack, and is forgotten there: from what we have, it ends the same way again.
                live.expected = len(live.tokens)
                self._submit(live)
                continue
            live.finish(end)
            self._retire(live)
        if running := tuple(request for request in matched if request in lives):
            self._process.send(SCHEDULER, Cancel(running, "stop"))

    def _meet(self, strangers: list[int]) -> None:
        """Tokens came for requests that are not known here: a predecessor's, whose frontend claims them in a moment or is dead too."""
        now = time.monotonic()
        unclaimed = []
        for request in strangers:
            if now - self._strangers.setdefault(request, now) > STRANGER_GRACE:
                self._strangers[request] = float("inf")
                unclaimed.append(request)
        while len(self._strangers) > MOST_STRANGERS:
            del self._strangers[next(iter(self._strangers))]
        if unclaimed:
            self._process.send(SCHEDULER, Cancel(tuple(unclaimed), "abort"))

    def _last_places(self, message: Tokens) -> set[int]:
        """Places in the columns of the tokens that ended their request: they are counted, and are no text."""
        stopped = {end.request for end in message.ends if end.reason == "stop"}
        return set({request: place for place, request in enumerate(message.requests) if request in stopped}.values())

    def _touch(self, live: Live) -> None:
        if not live.touched:
            live.touched = True
            self._touched.append(live)

    def _retire(self, live: Live) -> None:
        """Its last word is known: it leaves with the next `Text`."""
        del self._live[live.request]
        self._shelf.put(live)
        self._touch(live)

    def _tell_prompt_scores(self, live: Live) -> None:
        if live.prompt_scores is not None and live.prompt_scores.complete():
            message, live.prompt_scores = live.prompt_scores.message(live.request), None
            self._tell(live.frontend, message)

    # Requests go

    def _abort(self, frontend: Frontend, requests: tuple[int, ...]) -> None:
        cancelled = []
        for request in requests:
            job = self._jobs.get(request)
            live = self._live.get(request)
            if job is not None and job.frontend == frontend:
                self._leave_job(request, job)
                self._orphans.append((frontend, End(request, "abort", None, 0, 0, 0, 0.0)))
            elif live is not None and live.frontend == frontend and not live.closed:
                self._shelf.put(live)
                live.closed = live.aborted = True
                live.counted = len(live.tokens)
                cancelled.append(request)
        if cancelled:
            self._process.send(SCHEDULER, Cancel(tuple(cancelled), "abort"))

    def _fail(self, live: Live, status: int, code: str, message: str) -> None:
        self._forget(live.request)
        self._process.send(SCHEDULER, Cancel((live.request,), "abort"))
        self._tell(live.frontend, Failed(live.request, status, code, message))

    def _forget(self, request: int) -> None:
        """Drop a request without a word: it failed, or it was asked for again and starts anew."""
        if job := self._jobs.get(request):
            self._leave_job(request, job)
        live = self._live.pop(request, None)
        if live is not None and live.touched:
            self._touched.remove(live)

    def _leave_job(self, request: int, job: Job) -> None:
        job.wanted.discard(request)
        del self._jobs[request]

    def _lose(self, frontend: Frontend) -> None:
        """A frontend is gone: nobody waits for its requests. Its successor may ask for them."""
        for live in self._live.values():
            if live.frontend == frontend:
                self._shelf.put(live)
        gone = [live.request for live in self._live.values() if live.frontend == frontend]
        for request in gone + [request for request, job in self._jobs.items() if job.frontend == frontend]:
            self._forget(request)
        # A client on another machine may have lost no more than its connection: it has as long as one whose tokenizer died to claim them.
        if gone and not isinstance(frontend, Guest):
            self._process.send(SCHEDULER, Cancel(tuple(gone), "abort"))

    def _recall(self, frontend: Frontend, recall: Recall) -> None:
        """Give what is known of an answer. What still runs of it ends: its reader is gone, and who asks will start it anew from there."""
        tenant, answer = recall.tenant, recall.answer
        running = [live for live in self._live.values() if live.generate.answer == answer and live.generate.tenant == tenant]
        for live in running:
            self._shelf.put(live)
        kept = self._shelf.find(tenant, answer)
        for live in running:
            if kept and live.request in self._live:
                self._fail(live, 409, "taken_over", "the answer was asked for again by its id, and goes on there")
        self._tell(frontend, Recalled(recall.call, kept))

    def _tell(self, frontend: Frontend, message: Message) -> bool:
        if isinstance(frontend, Guest):
            sent = self._guests is not None and self._guests.send(frontend, message)
        else:
            sent = self._desk.send(frontend, message)
        if sent:
            return True
        self._lose(frontend)
        return False

    # Calls

    def _tokenize(self, frontend: Frontend, call: Tokenize) -> None:
        def work() -> Message:
            ids, _ = encode(self._tokenizer, self._templates, call.prompt, call.add_special_tokens)
            return Tokenized(call.call, ids, self._tokenizer.pieces(ids) if call.return_token_strs else None, self._tokenizer.context)

        self._run(call.prompt, work, lambda outcome: self._answer(frontend, call.call, outcome))

    def _detokenize(self, frontend: Frontend, call: Detokenize) -> None:
        def work() -> Message:
            self._tokenizer.check(call.ids, "tokens")
            return Detokenized(call.call, self._tokenizer.decode(call.ids))

        self._answer(frontend, call.call, self._attempt(work))

    def _answer(self, frontend: Frontend, call: int, outcome: Message | Rejection) -> None:
        if isinstance(outcome, Rejection):
            outcome = CallFailed(call, outcome.status, outcome.code, outcome.message, outcome.param)
        self._tell(frontend, outcome)

    def _card(self, call: int) -> ModelCard:
        model = self._process.model
        created = int(Path(model.path).stat().st_mtime)
        return ModelCard(call, model.name, model.context, model.vocab_size, self._templates.usable, created)


class Meters:
    """What the tokenizer measures."""

    def __init__(self, process: Process) -> None:
        metrics = process.metrics
        self.prompt_tokens = metrics.counter("headrace_tokenizer_prompt_tokens_total", "Tokens that prompts were encoded to.")
        self.output_tokens = metrics.counter("headrace_tokenizer_output_tokens_total", "Emitted tokens that were turned into text.")
        self.encode_seconds = metrics.histogram("headrace_tokenizer_encode_seconds", "Rendering and encoding one prompt.")
        self.live = metrics.gauge("headrace_tokenizer_live_requests", "Requests that the tokenizer holds.")


async def build(process: Process) -> TokenizerActor:
    """Load the model's tokenizer. UserError when it cannot be used."""
    # One text at a time is encoded: a thread pool of the library's own would only take cores from the workers.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    model = process.model
    # It starts while the vocabulary is read.
    templates = Renderer()
    parts = load_parts(model)
    tokenizer = Tokenizer(parts, model.vocab_size, model.context)
    templates.load(parts.templates, parts.names)
    if templates.fault is not None:
        log.warning("%s", templates.fault)
    process.detail = f"{tokenizer.backend.get_vocab_size()} tokens"
    return TokenizerActor(process, tokenizer, templates, await receive_guests(process))


ROLE = Role(FromScheduler, build)
