"""What the tokenizers are to be told once the mailbox is empty: a message of columns for each of them.

rows of a step, already committed ─▶ requests │ index │ tokens ─▶ one `Tokens` a tokenizer
"""

from collections.abc import Iterable

from headrace.engine.ledger.ledger import Row
from headrace.engine.messages.steps import StepResult
from headrace.engine.messages.tokens import Tokens
from headrace.engine.process import Process


class Outgoing:
    def __init__(self, process: Process) -> None:
        self._process = process
        self._messages: dict[str, Tokens] = {}
        self.epoch = self.step = 0
        """What the next messages are said to be of."""

    def to(self, tokenizer: str) -> Tokens:
        """What that tokenizer will be told, to be added to."""
        message = self._messages.get(tokenizer)
        if message is None:
            message = self._messages[tokenizer] = Tokens(self.epoch, self.step, [], [], [], [], [], [])
        return message

    def add(self, tokenizer: str, request: int, first: int, tokens: list[int]) -> None:
        """Tokens of one request, `first` being the place of the first in its output."""
        message = self.to(tokenizer)
        message.requests.extend([request] * len(tokens))
        message.index.extend(range(first, first + len(tokens)))
        message.tokens.extend(tokens)

    def add_step(self, tokenizer: str, result: StepResult, rows: Iterable[Row]) -> None:
        """A result as it is: each of `rows` emitted one token, and all are of that tokenizer's requests."""
        message = self.to(tokenizer)
        message.requests.extend(result.requests)
        message.index.extend([row.start + row.length - row.sequence.prompt for row in rows])
        message.tokens.extend(result.tokens)

    def send(self, tokenizer: str) -> None:
        """Tell that tokenizer now, for what it is told next must come after."""
        if message := self._messages.pop(tokenizer, None):
            self._process.send(tokenizer, message)

    def send_all(self) -> None:
        for tokenizer, message in self._messages.items():
            self._process.send(tokenizer, message)
        self._messages.clear()
