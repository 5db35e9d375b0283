"""What is timed beside Triton's interpreter still runs."""

import pytest

pytest.importorskip("triton", reason="the extra headrace[triton] is not installed")


@pytest.mark.slow
def test_every_launch_that_is_timed_gives_numbers():
    import torch
    import triton_cpu

    if torch.cuda.is_available():
        pytest.skip("with a GPU, kernels run there")
    for name, launch in triton_cpu.launches().items():
        assert launch().isfinite().all(), name
