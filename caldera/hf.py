"""Packed checkpoints in transformers: after `import caldera`, `from_pretrained` takes them like any other.

`quantization_config` in config.json names the method; what each matrix is, its shard says (see `caldera/shards.py`).
Nothing is unpickled and no code comes with a checkpoint.
"""

import re
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from caldera.checkpoint import VERSION, read_matrices, verified_specs
from caldera.errors import CheckpointError, UserError
from caldera.layers import Packed, PackedStack, materialize, pack, place
from caldera.shards import METHOD, metadata, read_specs, tensor_names


@register_quantization_config(METHOD)
class CalderaConfig(QuantizationConfigMixin):
    """How to hold a packed checkpoint: as it is stored, or, with `materialize`, as dense weights in the model's type.

    A materialized model is an ordinary one: it runs fastest and is saved dense.
    """

    def __init__(self, materialize: bool = False, version: int = VERSION, quant_method: str = METHOD):
        if version > VERSION:
            raise CheckpointError(f"quantization_config: version {version} is not known here: update caldera-sweeps")
        self.quant_method, self.version, self.materialize = quant_method, version, materialize

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a config that is given to `from_pretrained` decides, whatever config.json says."""
        return {"materialize": self.materialize}

    @property
    def dequantize(self) -> bool:
        """transformers' word for it: the loaded model keeps no trace of the quantizer."""
        return self.materialize


auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (CalderaConfig,)  # there is no function for that


@register_quantizer(METHOD)
class CalderaQuantizer(HfQuantizer):
    """Replaces matrices by packed ones before transformers loads the shards, whose tensors have the modules' names."""

    requires_calibration = True
    is_trainable = False

    def __init__(self, quantization_config: CalderaConfig, **kwargs):
        if not kwargs.get("pre_quantized", True):
            raise UserError("quantization_config is CalderaConfig, but this model is not packed: run caldera-run on it")
        super().__init__(quantization_config, **kwargs)

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs) -> None:
        if not checkpoint_files:
            raise UserError("a packed model is loaded from its folder, not from a state_dict")
        self.shards = [Path(file) for file in checkpoint_files]
        self.dense = pack(model, verified_specs(self.shards))
        if self.dense:  # read afterwards, not by transformers, which would warn of what it has no module for
            known = model._keys_to_ignore_on_load_unexpected or ()
            model._keys_to_ignore_on_load_unexpected = {*known, *map(re.escape, self.dense)}
        _require_all(model, self.shards)
        if any(isinstance(m, PackedStack) for m in model.modules()) and not self.quantization_config.materialize:
            model.set_experts_implementation("eager")  # one product an expert: fused kernels want dense weights

    def _process_model_after_weight_loading(self, model, **kwargs) -> None:
        dtype = model.dtype
        if self.quantization_config.materialize:
            materialize(model, dtype)
        for shard in (s for s in self.shards if self.dense.keys() & read_specs([s]).keys()):
            place(self.dense, (m for m in read_matrices(shard.parent, shard.name) if m.spec.name in self.dense), dtype)
        self.dense.clear()
        if self.quantization_config.materialize:
            model.requires_grad_(True)

    def _dequantize(self, model, dtype: torch.dtype):
        materialize(model, dtype)
        return model

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model) -> tuple[None, dict[str, str]]:
        """What `save_pretrained` writes into every shard, besides the tensors."""
        specs = [m.spec for m in model.modules() if isinstance(m, Packed)]
        return None, metadata(specs, model.state_dict())


def _require_all(model, shards: list[Path]) -> None:
    """Raises CheckpointError for a tensor that no shard has: transformers would draw it at random."""
    stored, tied = tensor_names(shards), model.all_tied_weights_keys
    same = tied | {source: target for target, source in tied.items()}
    missing = [name for name in model.state_dict() if name not in stored and same.get(name) not in stored]
    if missing:
        raise CheckpointError(f"{shards[0].parent} holds no value for {', '.join(missing[:3])}")
