"""The tiny model and the application on it, as the tests of sweeps have them."""

from tests.sweeps.conftest import application, saved, settings, tiny_llama_dir

__all__ = ["application", "saved", "settings", "tiny_llama_dir"]
