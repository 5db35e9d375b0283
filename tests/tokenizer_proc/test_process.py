"""The tokenizer as a process of its own, started as the supervisor starts it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from headrace.engine.actor import Mailbox
from headrace.engine.checkpoint.card import ModelFiles
from headrace.engine.config import Config
from headrace.engine.messages.frontend import Text
from headrace.engine.messages.lifecycle import Fatal, FromChild, Probe, Snapshot, Started
from headrace.engine.messages.tokens import Submit, TokenEnd, Tokens, ToScheduler
from headrace.engine.process import BIRTH_FILE, EXIT_FATAL, EngineSpec, Process
from tests.tokenizer_proc import samples
from tests.tokenizer_proc.stage import Frontend, Recorder

RUN = """
import sys
from pathlib import Path
from headrace.tokenizer_proc.tokenizer import ROLE
sys.exit(ROLE.run(Path(sys.argv[1]), "tokenizer-0", int(sys.argv[2]), int(sys.argv[3])))
"""


class Engine:
    """A run directory with a supervisor's and a scheduler's mailbox, both played by the test, and one real child."""

    def __init__(self, run_dir: Path, model: ModelFiles) -> None:
        spec = EngineSpec(Config(), model)
        (run_dir / BIRTH_FILE).write_bytes(msgspec.msgpack.encode(spec))
        self.run_dir = run_dir
        self.process = Process(run_dir, "tokenizer-0", 0, spec)
        self.supervisor, self.scheduler = Recorder(), Recorder()
        self.boxes = [Mailbox(self.process.context, self.process.address(name), union) for name, union in _MAILBOXES]
        for box, recorder in zip(self.boxes, (self.supervisor, self.scheduler), strict=True):
            box.open(recorder)
        self.frontend = Frontend(self.process, b"server-0")
        self.death, self.birth = -1, -1
        self.child: subprocess.Popen | None = None

    def start(self, incarnation: int) -> None:
        self.death, self.birth = os.pipe()
        words = [sys.executable, "-c", RUN, str(self.run_dir), str(incarnation), str(self.death)]
        self.child = subprocess.Popen(words, pass_fds=[self.death])
        os.close(self.death)

    def wait(self) -> int:
        """Its exit status."""
        assert self.child is not None
        return self.child.wait(10)

    async def close(self) -> None:
        if self.child is not None:
            os.close(self.birth)
            self.wait()
        for box in self.boxes:
            box.close()
        self.frontend.visit.close()
        self.process.context.destroy(linger=0)


_MAILBOXES = (("supervisor", FromChild), ("scheduler", ToScheduler))


@pytest.fixture
async def engine(tmp_path):
    engines = []

    def start(model: ModelFiles) -> Engine:
        engines.append(Engine(tmp_path, model))
        engines[-1].start(1)
        return engines[-1]

    yield start
    for engine in engines:
        await engine.close()


async def test_a_killed_tokenizer_is_followed_by_one_that_goes_on_with_its_requests(engine):
    engine = engine(samples.default_model())
    (started,) = await engine.supervisor.next(Started)
    assert (started.child, started.incarnation, started.detail) == ("tokenizer-0", 1, "49152 tokens")
    engine.frontend.generate(1)
    await engine.scheduler.next(Submit)
    tell = engine.process.send
    tell("tokenizer-0", _tokens(1, [19556, 905], 0))
    await engine.frontend.next(Text)
    assert engine.frontend.texts == {1: "Hello world"}

    engine.child.send_signal(signal.SIGKILL)
    engine.wait()
    os.close(engine.birth)
    engine.process.post.forget("tokenizer-0")
    engine.start(2)
    await engine.supervisor.next(Started, 2)
    engine.frontend.generate(1, emitted=(tuple(engine.frontend.tokens[1]),))
    _, again = await engine.scheduler.next(Submit, 2)
    assert again.emitted == [19556, 905]
    tell("tokenizer-0", _tokens(1, [28], 2, "length"))
    (end,) = await engine.frontend.ended(1)
    assert engine.frontend.texts == {1: "Hello world,"}
    assert end.completion_tokens == 3

    tell("tokenizer-0", Probe(7))
    (snapshot,) = await engine.supervisor.next(Snapshot)
    assert "headrace_tokenizer_output_tokens_total" in {series.name for series in snapshot.series}
    engine.child.terminate()
    assert engine.wait() == 0


async def test_a_model_without_a_usable_tokenizer_is_a_fatal_line(engine, tmp_path):
    model = msgspec.structs.replace(samples.default_model(), format="huggingface", path=str(tmp_path))
    engine = engine(model)
    (fatal,) = await engine.supervisor.next(Fatal)
    assert "tokenizer.json" in fatal.message and "\n" not in fatal.message
    assert engine.wait() == EXIT_FATAL


def _tokens(request: int, tokens: list[int], first: int, end: str | None = None):
    ends = [] if end is None else [TokenEnd(request, end, None, 0, 0.0, 0)]
    return Tokens(1, 1, [request] * len(tokens), list(range(first, first + len(tokens))), tokens, ends=ends)
