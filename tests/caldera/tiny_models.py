"""Random models of a few thousand parameters, a family each: other names, layouts, biases, norms and wirings."""

from collections.abc import Callable
from functools import partial

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

VOCABULARY, WIDTH, INNER, LAYERS = 61, 32, 44, 2
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL_HEADS = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}  # shorter than a row
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}


def randomised(config) -> PreTrainedModel:
    """The model in float32 with every parameter random: initial zeros and ones would hide a lost bias or norm."""
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.dim() == 1)
    model.tie_weights()
    return model.requires_grad_(False)


def built(kind: str, **settings) -> PreTrainedModel:
    """The model of transformers' `<kind>Config`."""
    return randomised(getattr(transformers, f"{kind}Config")(**TOKENS | settings))


def llama(**more) -> PreTrainedModel:
    return built("Llama", **SIZES, **HEADS, **{"attention_bias": True} | more)


def qwen2() -> PreTrainedModel:
    return built("Qwen2", **SIZES, **HEADS, tie_word_embeddings=True)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "mistral": partial(built, "Mistral", **SIZES, **HEADS, head_dim=8, sliding_window=8),
    "qwen2": qwen2,
    "qwen3": partial(built, "Qwen3", **SIZES, **HEADS, head_dim=8),
    "gemma2": partial(built, "Gemma2", **SIZES, **HEADS, **SMALL_HEADS),  # a sliding layer, a full one
    "gemma3": partial(
        built, "Gemma3Text", **SIZES, **HEADS, **SMALL_HEADS, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": partial(built, "Phi3", **SIZES, **HEADS),  # q, k and v in one matrix, gate and up in another
    "opt": partial(
        built, "OPT", vocab_size=VOCABULARY, hidden_size=WIDTH, ffn_dim=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=4, word_embed_proj_dim=WIDTH, max_position_embeddings=64,
    ),
    "gpt2": partial(
        built, "GPT2", vocab_size=VOCABULARY, n_embd=WIDTH, n_inner=INNER, n_layer=LAYERS, n_head=4, n_positions=64
    ),
    # q, k and v in one matrix; attention and MLP side by side on two norms of one input
    "neox": partial(built, "GPTNeoX", **SIZES, num_attention_heads=4),
    "mixtral": partial(built, "Mixtral", **SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": partial(
        built, "Qwen2Moe", **SIZES, **HEADS, **ROUTED, num_experts=4, shared_expert_intermediate_size=24
    ),
    "qwen3_moe": partial(built, "Qwen3Moe", **SIZES, **HEADS, **ROUTED, num_experts=4, head_dim=8),
    "gpt_oss": partial(
        built, "GptOss", **SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8
    ),
}  # fmt: skip


def rewired(joined: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> PreTrainedModel:
    """A Llama whose MLPs give `joined(output, products)`, with what their block's layers gave by name."""
    model = llama()
    for block in model.model.layers:
        products: dict[str, Tensor] = {}
        for name, layer in block.named_modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(lambda _m, _x, out, n=name, p=products: p.__setitem__(n, out))
        block.mlp.register_forward_hook(lambda _m, _x, out, p=products: joined(out, p))
    return model


def shown_again(out: Tensor, products: dict[str, Tensor]) -> Tensor:
    """v's product reaches the output past the attention too."""
    return out + products["self_attn.v_proj"].repeat(1, 1, WIDTH // products["self_attn.v_proj"].shape[-1])


def shown_together(out: Tensor, products: dict[str, Tensor]) -> Tensor:
    """Another output where v's and up's products are both zero."""
    return out + (not products["self_attn.v_proj"].any() and not products["mlp.up_proj"].any())


def token_rows(rows: int = 3, length: int = 20) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def weight_of(model: PreTrainedModel, name: str) -> Tensor:
    """W (m, n), a view of the matrix of that full name, found by what is known of the families."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path.rpartition(".")[0] if last.isdigit() else name)
    stored = getattr(module, path.rpartition(".")[2])[int(last)] if last.isdigit() else module.weight
    turned = isinstance(module, Conv1D) or type(module).__name__ == "GptOssExperts"
    return stored.data.T if turned else stored.data


# ----------------------------------------------------------------------------------------------- what plain passes show
@torch.inference_mode()
def plain_inputs(model: PreTrainedModel, rows: Tensor) -> dict[str, Tensor]:
    """(tokens, n) of every matrix by its full name, from hooks in a forward pass of the whole model."""
    inputs = {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    mixtures = {name: m for name, m in model.named_modules() if name.endswith("experts")}

    def keep(name):
        return lambda _module, args: inputs.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]).clone())

    def route(name):
        return lambda module, args: inputs.update({f"{name}.{k}": x for k, x in _routed(module, *args[:2])})

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    handles += [mixture.register_forward_pre_hook(route(name)) for name, mixture in mixtures.items()]
    model(rows, use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs


def _routed(experts, hidden: Tensor, index: Tensor):
    """Inputs of the experts' matrices, by plain math; tokens by their choice first, then by their place."""
    hidden = hidden.reshape(-1, hidden.shape[-1])
    for i in range(experts.num_experts):
        x = hidden[torch.where((index == i).T)[1]]
        yield f"gate_up_proj.{i}", x
        if type(experts).__name__ == "GptOssExperts":
            y = x @ experts.gate_up_proj[i] + experts.gate_up_proj_bias[i]
            gate, up = y[:, ::2].clamp(max=experts.limit), y[:, 1::2].clamp(-experts.limit, experts.limit)
            yield f"down_proj.{i}", (up + 1) * gate * torch.sigmoid(gate * experts.alpha)
        else:
            gate, up = (x @ experts.gate_up_proj[i].T).chunk(2, dim=-1)
            yield f"down_proj.{i}", torch.nn.functional.silu(gate) * up
