"""A tiny model with a real tokenizer, and the ways in which a test describes and runs points on it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module

from sweeps.plan import resolve
from sweeps.progress import SWEEP
from sweeps.run import main


@pytest.fixture(scope="session")
def saved(tmp_path_factory, smollm2_dir):
    """saved(config): the folder of a random model of that configuration that speaks SmolLM2's tokens."""
    from transformers import AutoModelForCausalLM

    def _saved(config) -> Path:
        folder = tmp_path_factory.mktemp("models") / "tiny"
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for file in (*smollm2_dir.glob("tokenizer*"), *smollm2_dir.glob("*.jinja")):
            shutil.copyfile(file, folder / file.name)
        return folder

    return _saved


@pytest.fixture(scope="session")
def tiny_llama_dir(saved) -> Path:
    """Two layers; the smallest matrix is 32 x 64."""
    from transformers import LlamaConfig

    sizes = {"vocab_size": 49152, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return saved(LlamaConfig(**sizes, **heads, initializer_range=0.2))


@pytest.fixture(scope="session")
def settings(tiny_llama_dir, tmp_path_factory) -> list[str]:
    """Overrides of the smallest real point: the tiny model, 1,024 tokens, one question in four choices."""
    cache = tmp_path_factory.mktemp("cache")
    groups = ["model=hf", "calibration=tiny", "evaluation=tiny", "tracker=none"]
    machine = ["compute.device=cpu", "compute.threads=1"]
    return [*groups, *machine, f"model.path={tiny_llama_dir}", f"cache={cache}"]


@pytest.fixture(scope="session")
def composed():
    """composed(*overrides): the configuration that the application would see."""

    def _composed(*overrides: str, **options):
        with initialize_config_module("conf", version_base="1.3"):
            return compose("config", list(overrides), **options)

    return _composed


@pytest.fixture
def point(composed, settings, tmp_path):
    """point(*overrides): the resolved point on the tiny model, with results below tmp_path."""
    return lambda *overrides: resolve(composed(*settings, f"results={tmp_path / 'results'}", *overrides))


@pytest.fixture(scope="session")
def console():
    """console(*arguments): the installed script in a process of its own."""
    script = Path(sys.executable).with_name("caldera-run")
    return lambda *arguments: subprocess.run([script, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def typed(monkeypatch, capsys):
    """typed(*arguments): the console script's main() in this process, as (exit code, stdout, stderr)."""

    def _typed(*arguments: str) -> tuple[int, str, str]:
        for name, value in {"total": 0, "begun": 0, "seconds": []}.items():
            monkeypatch.setattr(SWEEP, name, value)
        monkeypatch.setattr(sys, "argv", ["caldera-run", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return _typed


@pytest.fixture
def application(settings, tmp_path, typed):
    """application(*arguments): as `typed`, on the tiny model, with results below tmp_path."""

    def _application(*arguments: str) -> tuple[int, str, str]:
        flags = ["-m"] if "-m" in arguments else []
        rest = [argument for argument in arguments if argument != "-m"]
        return typed(*flags, *settings, f"results={tmp_path / 'results'}", *rest)

    return _application


@pytest.fixture
def altered(tiny_llama_dir, tmp_path):
    """altered(name, change): a copy of the tiny model whose tensors `change` has edited in place."""
    from safetensors.torch import load_file, save_file

    def _altered(name: str, change) -> Path:
        folder = shutil.copytree(tiny_llama_dir, tmp_path / name)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return _altered
