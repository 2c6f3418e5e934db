"""Random models of a few thousand parameters, of three families with other names, biases and wirings."""

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
)

VOCABULARY, WIDTH, INNER, LAYERS = 61, 32, 44, 2
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS}


def randomised(config) -> PreTrainedModel:
    """The model in float32 with every parameter random: initial zeros and ones would hide a lost bias or norm."""
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.dim() == 1)
    model.tie_weights()
    return model.requires_grad_(False)


def llama(**more) -> PreTrainedModel:
    return randomised(LlamaConfig(**SIZES, **HEADS, **{"attention_bias": True} | more))


def qwen2() -> PreTrainedModel:
    return randomised(Qwen2Config(**SIZES, **HEADS, tie_word_embeddings=True))


def neox() -> PreTrainedModel:
    """q, k and v in one matrix; attention and MLP side by side on two norms of one input."""
    return randomised(GPTNeoXConfig(**SIZES, num_attention_heads=4))


def gpt2() -> PreTrainedModel:
    """Weights stored transposed, biases everywhere, tied embeddings."""
    sizes = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_inner": INNER, "n_layer": LAYERS, "n_head": 4}
    return randomised(GPT2Config(**sizes, n_positions=64, bos_token_id=0, eos_token_id=0))


def mixtral() -> PreTrainedModel:
    """Four experts in one parameter."""
    return randomised(MixtralConfig(**SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2))


FAMILIES = {"llama": llama, "qwen2": qwen2, "neox": neox}


def token_rows(rows: int = 3, length: int = 20) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
