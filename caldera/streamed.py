"""A causal LM one block at a time, from the shards of its checkpoint: it may be larger than memory.

`Streamed` holds what lies outside of the blocks and reads a block when it is asked for. `Whole` has the same
interface over a model in memory, for checkpoints whose tensors are not the model's parameters as they are.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from caldera.blocks import decoder_blocks

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"  # as transformers looks for them


class Whole:
    """A model in memory."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.name, self.blocks = decoder_blocks(model)
        self.count = len(self.blocks)

    def block(self, index: int, dtype: torch.dtype | None = None, device: torch.device | None = None) -> nn.Module:
        """A copy of a block."""
        return _copied(self.blocks[index]).to(device=device, dtype=dtype)

    @contextmanager
    def outside(self, head: bool = False) -> Iterator[nn.Module]:
        """The model with all that embeds rows and makes the blocks' arguments; with `head`, all that gives logits."""
        yield self.model

    def state(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return self.model.state_dict()

    def read(self, name: str) -> Tensor:
        """One of them."""
        return self.model.state_dict()[name]


@dataclass(frozen=True)
class Streamed:
    """A model on the meta device, but for its buffers. Without a dtype blocks are read as they are stored, for their
    weights and not for forward passes."""

    model: nn.Module
    names: dict[str, str]  # of every parameter, that of its tensor in the files
    files: dict[str, Path]  # the file of every tensor
    dtype: torch.dtype | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @contextmanager
    def outside(self, head: bool = False) -> Iterator[nn.Module]:
        """The model with data for what lies outside of the blocks; one for a head that is not tied if it is wanted."""
        without = {id(p) for p in decoder_blocks(self.model)[1].parameters()}
        without |= set() if head else _own_head(self.model)
        _fill(self.model, self._reader("", self.dtype, self.device), without, self.device)
        try:
            yield self.model
        finally:
            _empty(self.model)

    @property
    def name(self) -> str:
        return decoder_blocks(self.model)[0]

    @property
    def count(self) -> int:
        return len(decoder_blocks(self.model)[1])

    def block(self, index: int, dtype: torch.dtype | None = None, device: torch.device | None = None) -> nn.Module:
        """A block with its weights, read now and the caller's own."""
        name, blocks = decoder_blocks(self.model)
        block, device = _copied(blocks[index]), device or self.device
        _fill(block, self._reader(f"{name}.{index}.", dtype or self.dtype, device), set(), device)
        return block

    def state(self) -> dict[str, Tensor]:
        """All tensors by name, many without data; shared ones under their first name only."""
        first = {name for name, _ in self.model.named_parameters()}
        return {name: p for name, p in self.model.state_dict(keep_vars=True).items() if name in first}

    def read(self, name: str) -> Tensor:
        """One of them as it is stored, from its file."""
        return self._reader("", None, torch.device("cpu"))(name)

    def _reader(self, prefix: str, dtype: torch.dtype | None, device: torch.device) -> Callable[[str], Tensor]:
        def read(name: str) -> Tensor:
            stored = self.names[prefix + name]
            with safe_open(self.files[stored], "pt") as opened:
                tensor = opened.get_tensor(stored)
                # a copy: the library's own tensor is a view of the mapped file
                return tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True)

        return read


Source = Whole | Streamed


def streamed(
    directory: Path, dtype: torch.dtype | None, device: torch.device, trust_remote_code: bool = False
) -> Streamed | None:
    """The model in a folder, or None where transformers would make its parameters from other tensors."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    trusted = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(directory, local_files_only=True, **trusted)
    files = _files(Path(directory))
    if not files or getattr(config, "quantization_config", None):
        return None
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **trusted)
    model.tie_weights()
    names = _names(model, files, dtype)
    return names and Streamed(model.eval(), names, files, dtype, device)


def _files(directory: Path) -> dict[str, Path]:
    """The file of every tensor that transformers would find; empty where there is no such checkpoint."""
    if (file := directory / FILE).is_file():
        with safe_open(file, "pt") as opened:
            return dict.fromkeys(opened.keys(), file)
    if not (index := directory / INDEX).is_file():
        return {}
    found = {name: directory / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    return found if all(file.is_file() for file in set(found.values())) else {}


def _names(model: nn.Module, files: dict[str, Path], dtype: torch.dtype | None) -> dict[str, str] | None:
    """Of every parameter, the tensor that it is, or that one tied to it is; None if there is more to do than to cast
    it and to put it in its place."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    stored = _renamed(model, files)
    if stored is None or len(model.state_dict()) > len(parameters) or (dtype and model._get_dtype_plan(dtype)):
        return None  # tensors are made of others, there are buffers among them, or some stay in float32
    aliases: dict[int, list[str]] = {}
    for name, p in parameters:
        aliases.setdefault(id(p), []).append(name)
    shapes, found = {name: tuple(p.shape) for name, p in parameters}, {}
    for names in aliases.values():
        held = [stored[name] for name in names if name in stored]
        if not held or any(_shape(files[name], name) != shapes[names[0]] for name in held):
            return None
        if not all(_equal(files, held[0], other) for other in held[1:]):
            return None  # transformers does not tie these
        found |= dict.fromkeys(names, held[0])
    return found


def _renamed(model: nn.Module, files: dict[str, Path]) -> dict[str, str] | None:
    """The tensor in the files by the name that transformers gives it in the model; None if it makes one of several."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules, state = get_model_conversion_mapping(model), model.state_dict()
    renamings, converters = ([r for r in rules if isinstance(r, kind)] for kind in (WeightRenaming, WeightConverter))
    found: dict[str, str] = {}
    for stored in files:
        name, converter = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
        if name not in state and stored in state:
            name, converter = stored, None
        if name in state and (converter is not None or name in found):
            return None
        found[name] = stored
    return found


def _shape(file: Path, name: str) -> tuple[int, ...]:
    with safe_open(file, "pt") as opened:
        return tuple(opened.get_slice(name).get_shape())


def _equal(files: dict[str, Path], one: str, other: str) -> bool:
    with safe_open(files[one], "pt") as first, safe_open(files[other], "pt") as second:
        return torch.equal(first.get_tensor(one), second.get_tensor(other))


def _own_head(model: nn.Module) -> set[int]:
    """Parameters of the output layer that nothing else has: no hidden state depends on them."""
    head = model.get_output_embeddings()
    own = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    others = [m for m in model.modules() if m is not head]
    return own - {id(p) for m in others for p in m.parameters(recurse=False)}


def _copied(block: nn.Module) -> nn.Module:
    """A deep copy that shares its configuration with the model: settings of the model hold for it too."""
    configs = [getattr(module, "config", None) for module in block.modules()]
    return copy.deepcopy(block, {id(config): config for config in configs if config is not None})


def _fill(module: nn.Module, read: Callable[[str], Tensor], without: set[int], device: torch.device) -> None:
    """Give every parameter its data but those `without`, so that what is shared stays shared; move the buffers."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # the old one is kept, so that no id is used twice
    for path, child in module.named_modules():
        for key, p in child._parameters.items():
            if p is None or id(p) in without:
                continue
            if id(p) not in made:
                value = read(f"{path}.{key}" if path else key)
                made[id(p)] = (p, nn.Parameter(value, requires_grad=False))
            child._parameters[key] = made[id(p)][1]
        for key, buffer in child._buffers.items():
            child._buffers[key] = buffer if buffer is None else buffer.to(device)


def _empty(module: nn.Module) -> None:
    """Take the data of every parameter away, so that what is shared stays shared; buffers keep theirs."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for child in module.modules():
        for key, p in child._parameters.items():
            if p is not None and not p.is_meta:
                made.setdefault(id(p), (p, nn.Parameter(p.to("meta"), requires_grad=False)))
                child._parameters[key] = made[id(p)][1]
