"""The paced worker, which will not serve models of some names."""

import os

from headrace.engine.errors import UserError
from headrace.engine.messages.steps import ToWorker
from headrace.engine.process import Process, Role
from headrace.workers.worker import Worker
from tests.e2e import paced


async def build(process: Process) -> Worker:
    if process.model.name == "refused":
        raise UserError("the model refused is not to my taste")
    if process.model.name == "crashing":
        os._exit(7)
    return await paced.build(process)


ROLE = Role(ToWorker, build)
