"""What the scheduler measures, and how fast things go."""

import math

from headrace.engine.ledger.ledger import Ledger
from headrace.engine.messages.steps import StepResult
from headrace.engine.metrics import REFUSED, REFUSED_HELP, SECONDS, Metrics


class Rate:
    """Events a second over about the last ten seconds, older ones fading."""

    MEMORY = 10.0

    def __init__(self) -> None:
        self._weight = 0.0
        self._at = 0.0

    def add(self, events: int, now: float) -> None:
        self._weight = self.per_second(now) * self.MEMORY + events
        self._at = now

    def per_second(self, now: float) -> float:
        return self._weight * math.exp((self._at - now) / self.MEMORY) / self.MEMORY


class Meters:
    """What the scheduler measures."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.queue_time = metrics.histogram("headrace_queue_seconds", "From arrival at the scheduler to the first step.")
        self.preemptions = metrics.counter("headrace_preemptions_total", "Requests that gave up their pages and waited again.")
        self.divergences = metrics.counter("headrace_divergences_total", "Steps in which a rank's ledger differed from the scheduler's.")
        self.quarantines = metrics.counter(
            "headrace_quarantines_total", "Requests that are not run again because workers died while they ran them."
        )
        self.prompt_tokens = metrics.counter("headrace_prompt_tokens_total", "Prompt tokens of requests that were started.")
        self.cached_tokens = metrics.counter("headrace_prefix_hit_tokens_total", "Prompt tokens that the prefix cache gave.")
        self.emitted_tokens = metrics.counter("headrace_generated_tokens_total", "Tokens emitted.")
        self._drafted = metrics.counter("headrace_draft_tokens_total", "Tokens that were drafted and verified.")
        self._accepted = metrics.counter("headrace_accepted_draft_tokens_total", "Drafted tokens that proved right.")
        self._acceptance = metrics.histogram(
            "headrace_acceptance_length",
            "Tokens that a request emitted in a step in which drafts were verified.",
            (1, 2, 3, 4, 5, 6, 7, 8, 9),
        )
        self.step_tokens = metrics.histogram(
            "headrace_step_tokens", "Tokens computed in a step.", (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
        )
        self._step_time = metrics.histogram("headrace_step_seconds", "A step on the worker, from plan to result.", SECONDS)
        self._forward_time = metrics.histogram("headrace_forward_seconds", "The model's part of a step.", SECONDS)
        self._running = metrics.gauge("headrace_requests_running", "Requests that have pages.")
        self._waiting = metrics.gauge("headrace_requests_waiting", "Requests that wait for pages.")
        self._pages = {
            state: metrics.gauge("headrace_kv_pages", "KV pages by state.", (("state", state),)) for state in ("used", "cached", "free")
        }

    def step(self, result: StepResult) -> None:
        self._step_time.observe(result.times.total * 1e-9)
        self._forward_time.observe(result.times.forward * 1e-9)

    def drafts(self, drafted: int, accepted: int) -> None:
        if drafted:
            self._drafted.add(drafted)
            self._accepted.add(accepted)
            self._acceptance.observe(accepted + 1)

    def ended(self, reason: str) -> None:
        self._metrics.counter("headrace_requests_ended_total", "Requests that ended, by reason.", labels=(("reason", reason),)).add()

    def refused(self, code: str) -> None:
        self._metrics.counter(REFUSED, REFUSED_HELP, labels=(("cause", code),)).add()

    def show(self, ledger: Ledger | None, running: int, waiting: int) -> None:
        self._running.set(running)
        self._waiting.set(waiting)
        if ledger:
            self._pages["free"].set(len(ledger.pool))
            self._pages["cached"].set(ledger.tree.idle)
            self._pages["used"].set(ledger.pool.total - ledger.available)
