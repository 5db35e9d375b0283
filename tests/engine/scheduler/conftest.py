"""What every test of the scheduler stands on."""

import pytest

from tests.engine.scheduler.stage import Stage


@pytest.fixture
async def stage(tmp_path, request):
    stage = Stage(tmp_path, **getattr(request, "param", {}))
    yield stage
    stage.close()
