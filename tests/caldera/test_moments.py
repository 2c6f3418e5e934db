"""Blocks, shared inputs and second moments, seen on models of many families without knowing their names."""

import copy

import pytest
import torch
from torch import nn

from caldera.blocks import InputGroup, Stream, decoder_blocks, input_groups
from caldera.errors import NumericalError, UserError
from caldera.matrices import matrices
from caldera.moments import Accumulator, add_product, collect, pooled, products_of
from tests.caldera import tiny_models
from tests.caldera.oracles import gaussian

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
ATTENTION = [QKV, ("self_attn.o_proj",)]
LLAMA = [*ATTENTION, ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
EXPERTS = [(f"mlp.experts.{kind}.{i}",) for kind in ("gate_up_proj", "down_proj") for i in range(4)]
SHARED = [tuple(f"mlp.shared_expert{k}" for k in (".gate_proj", ".up_proj", "_gate")), ("mlp.shared_expert.down_proj",)]
GROUPS = {
    "phi3": [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)],
    "opt": [QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)],
    "gpt2": [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
    "neox": [("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)],
    "mixtral": ATTENTION + EXPERTS,
    "qwen2_moe": ATTENTION + SHARED + EXPERTS,
    "qwen3_moe": ATTENTION + EXPERTS,
    "gpt_oss": ATTENTION + EXPERTS,
}
BLOCKS = {"neox": "gpt_neox.layers", "gpt2": "transformer.h", "opt": "model.decoder.layers"}


@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def family(request):
    return request.param, tiny_models.FAMILIES[request.param]()


@pytest.fixture
def llama():
    return tiny_models.llama()


def block_outputs(model, rows) -> list[torch.Tensor]:
    """What every block returns in plain forward passes of the whole model."""
    outputs, (_, blocks) = [], decoder_blocks(model)

    def keep(_module, _args, out):
        outputs.append(out[0] if isinstance(out, tuple) else out)

    handles = [block.register_forward_hook(keep) for block in blocks]
    with torch.inference_mode():
        model(rows, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs


# --------------------------------------------------------------------------------------------------------------- blocks
def test_blocks_are_found_whatever_their_name(family):
    name, blocks = decoder_blocks(family[1])
    assert name == BLOCKS.get(family[0], "model.layers")
    assert len(blocks) == tiny_models.LAYERS
    assert set(matrices(blocks[0])) == {member for group in GROUPS.get(family[0], LLAMA) for member in group}


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="Embedding has no list of decoder blocks with matrices"):
        decoder_blocks(nn.Embedding(3, 4))


def test_the_longest_outermost_list_is_the_decoder():
    experts = [nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(9))}) for _ in range(3)]
    vision = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    assert decoder_blocks(nn.ModuleDict({"vision": vision, "text": nn.ModuleList(experts)}))[0] == "text"


# --------------------------------------------------------------------------------------------------------------- stream
def test_stream_advances_as_the_model_does(family):
    model, rows = family[1], tiny_models.token_rows()
    expected, (_, blocks) = block_outputs(model, rows), decoder_blocks(model)
    stream = Stream.open(model, rows)
    assert [tuple(h.shape) for h in stream.hidden] == [(1, 20, tiny_models.WIDTH)] * 3
    for index, block in enumerate(blocks):
        stream.advance(block, index)
        torch.testing.assert_close(torch.cat(stream.hidden), expected[index], rtol=1e-4, atol=1e-4)


def test_stream_ends_in_the_models_hidden_states(llama):
    rows = tiny_models.token_rows()
    with torch.inference_mode():
        states = llama(rows, output_hidden_states=True, use_cache=False).hidden_states
    stream = Stream.open(llama, rows)
    torch.testing.assert_close(torch.cat(stream.hidden), states[0])
    for index, block in enumerate(llama.model.layers):
        stream.advance(block, index)
    torch.testing.assert_close(llama.model.norm(torch.cat(stream.hidden)), states[-1], rtol=1e-4, atol=1e-4)


def test_stream_reports_every_row_and_leaves_no_hook(llama):
    done = []
    stream = Stream.open(llama, tiny_models.token_rows(4))
    stream.advance(llama.model.layers[0], 0, done.append)
    groups = input_groups(llama.model.layers[1], stream, 1)
    collect(llama.model.layers[1], stream, 1, groups, "model.layers.1", done.append)
    assert done == [1] * 8
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in llama.modules())
    assert not torch.overrides._get_current_function_mode_stack()


def test_no_hook_stays_when_a_block_fails(llama):
    stream = Stream.open(llama, tiny_models.token_rows(1))
    groups = input_groups(llama.model.layers[0], stream, 0)
    stream.hidden[0] = torch.zeros(1, 20, 7)  # a width that no layer takes
    with pytest.raises(RuntimeError):
        collect(llama.model.layers[0], stream, 0, groups, "x")
    assert not any(m._forward_pre_hooks for m in llama.modules())


# --------------------------------------------------------------------------------------------------------------- groups
def test_shared_inputs_are_seen_without_names(family):
    name, model = family
    stream, (_, blocks) = Stream.open(model, tiny_models.token_rows()), decoder_blocks(model)
    for index, block in enumerate(blocks):
        groups = input_groups(block, stream, index)
        found = matrices(block)
        assert [g.members for g in groups] == GROUPS.get(name, LLAMA)  # in the order in which they run
        assert all(g.name == g.members[0] and g.width == found[g.name].shape[1] for g in groups)
        assert [g.expert for g in groups] == [".experts." in g.name for g in groups]
        stages = [g.name.rpartition(".")[0] if g.expert else g.name for g in groups]
        assert [g.stage for g in groups] == stages
        stream.advance(block, index)


def test_looking_for_groups_does_not_advance_the_stream(llama):
    stream = Stream.open(llama, tiny_models.token_rows())
    before = [h.clone() for h in stream.hidden]
    input_groups(llama.model.layers[0], stream, 0)
    assert all(torch.equal(a, b) for a, b in zip(stream.hidden, before))


class Mixture(nn.Module):
    """Experts with gate and up apart, of which row i reaches number i only, through layers of their own too."""

    def __init__(self, experts: int = 3):
        super().__init__()
        self.num_experts = experts
        self.gate_proj, self.up_proj = (nn.Parameter(gaussian(experts, 6, 8)) for _ in range(2))
        self.down_proj = nn.Parameter(gaussian(experts, 8, 6))
        self.own = nn.ModuleList(nn.Linear(8, 8) for _ in range(experts))

    def forward(self, x):
        out = x.clone()
        for i in range(self.num_experts):
            token = x[:, x[0, :, 0] == i]  # none of the others' tokens: an empty input
            gate, up = (nn.functional.linear(token, p[i]) for p in (self.gate_proj, self.up_proj))
            out = out + nn.functional.linear(gate * up, self.down_proj[i]).sum(1, keepdim=True)
            if token.numel():
                out = out + self.own[i](token).sum(1, keepdim=True)
        return out


def mixture_stream(rows: int) -> Stream:
    hidden = [gaussian(1, 5, 8, seed=i) for i in range(rows)]
    for i, x in enumerate(hidden):
        x[..., 0] = i
    return Stream(hidden, [((), {})])


def test_experts_without_a_token_are_grouped_as_their_fellows():
    groups = input_groups(Mixture(), mixture_stream(1), 0)
    pairs, downs = [(f"gate_proj.{i}", f"up_proj.{i}") for i in range(3)], [(f"down_proj.{i}",) for i in range(3)]
    assert [g.members for g in groups] == [(*pairs[0], "own.0"), *pairs[1:], *downs]
    assert {g.stage for g in groups} == {"gate_proj", "down_proj"}


def test_layers_that_only_a_later_row_reaches_are_found():
    groups = input_groups(Mixture(), mixture_stream(2), 0)
    members = [g.members for g in groups]
    assert ("gate_proj.0", "up_proj.0", "own.0") in members and ("gate_proj.1", "up_proj.1", "own.1") in members
    assert ("gate_proj.2", "up_proj.2") in members and not any("own.2" in names for names in members)


class Branches(nn.Module):
    """Layers on one tensor, on equal copies of it, on a part of it, and one that is never reached."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.unreached = (nn.Linear(8, 8) for _ in range(5))
        self.part = nn.Linear(4, 4)

    def forward(self, x):
        self.part(x[..., :4])
        return self.a(x) + self.b(x.clone()) + self.c(x) + self.d(x.clone())


def test_equal_tensors_are_not_one_tensor():
    stream = Stream([gaussian(1, 5, 8)], [((), {})])
    groups = input_groups(Branches(), stream, 0)
    assert [g.members for g in groups] == [("part",), ("a", "c"), ("b",), ("d",)]


# -------------------------------------------------------------------------------------------------------------- moments
def test_collected_moments_are_the_mean_of_x_xt(family):
    """In float64, from inputs captured in plain forward passes: rank-one sums in the definition's order."""
    model, rows = family[1], tiny_models.token_rows(5, 24)
    prefix, blocks = decoder_blocks(model)
    inputs, stream = tiny_models.plain_inputs(model, rows), Stream.open(model, rows)
    for index, block in enumerate(blocks):
        groups = input_groups(block, stream, index)
        found = collect(block, stream, index, groups, f"{prefix}.{index}")
        assert set(found) == {g.name for g in groups}
        for group in groups:
            for member in group.members:
                x = inputs[f"{prefix}.{index}.{member}"].double()
                expected = torch.einsum("ti,tj->ij", x, x) / max(len(x), 1)
                accumulated, size = found[group.name], float(expected.abs().max()) or 1.0
                assert accumulated.tokens == len(x) and (group.expert or len(x) == 5 * 24)
                torch.testing.assert_close(accumulated.mean().double() / size, expected / size, rtol=0, atol=1e-5)


def test_collecting_advances_the_stream(llama):
    rows = tiny_models.token_rows()
    one, two = Stream.open(llama, rows), Stream.open(llama, rows)
    block = llama.model.layers[0]
    one.advance(block, 0)
    collect(block, two, 0, input_groups(block, two, 0), "x")
    assert all(torch.equal(a, b) for a, b in zip(one.hidden, two.hidden))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 37, 64])
def test_accumulator_at_every_width(n):
    """H is computed in strips of its lower triangle; widths need not be multiples of their number."""
    accumulator = Accumulator.zeros(n, torch.device("cpu"))
    x = gaussian(50, n)
    accumulator.add(x[:20].reshape(2, 10, n))
    accumulator.add(x[20:])
    mean = accumulator.mean()
    assert accumulator.tokens == 50 and torch.equal(mean, mean.T)
    torch.testing.assert_close(mean, x.T @ x / 50)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_accumulator_sums_in_float32(dtype):
    accumulator = Accumulator.zeros(8, torch.device("cpu"))
    x = (100 * gaussian(400, 8)).to(dtype)  # sums of squares beyond float16
    before = x.clone()
    accumulator.add(x)
    assert accumulator.total.dtype == torch.float32 and torch.equal(x, before)
    torch.testing.assert_close(accumulator.mean().double(), x.double().T @ x.double() / 400, rtol=1e-4, atol=1.0)


def test_products_of_bfloat16_numbers_are_as_exact_as_float32_and_leave_no_setting_behind():
    """Of a width at which the CPU's own instructions are chosen."""
    x, before = gaussian(2048, 256).bfloat16(), torch.backends.mkldnn.matmul.fp32_precision
    accumulator = Accumulator.zeros(256, torch.device("cpu"))
    for rows in x.split(1024):
        accumulator.add(rows)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    expected = x.double().T @ x.double() / 2048
    assert relative(accumulator.mean(), expected) < 3e-7
    with pytest.raises(KeyError), products_of(x):
        raise KeyError
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with products_of(x, x.float()):
        assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_product_of_two_is_added_in_float32(dtypes):
    x, y = (gaussian(700, n, seed=n).to(dtype) for n, dtype in zip((96, 256), dtypes))
    total = torch.ones(96, 256)
    add_product(total, x, y)
    assert relative(total, 1 + x.double().T @ y.double()) < 3e-7


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_an_accumulator_without_tokens_is_zero():
    assert torch.equal(Accumulator.zeros(4, torch.device("cpu")).mean(), torch.zeros(4, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_activation_that_is_not_finite_names_block_and_layer(llama, bad):
    model = copy.deepcopy(llama)
    model.model.layers[1].self_attn.v_proj.bias[3] = bad  # so that o_proj is the first to see it
    stream = Stream.open(model, tiny_models.token_rows())
    block = model.model.layers[0]
    collect(block, stream, 0, input_groups(block, stream, 0), "model.layers.0")
    block = model.model.layers[1]
    groups = input_groups(block, stream, 1)
    with pytest.raises(NumericalError, match=r"^model\.layers\.1\.self_attn\.o_proj: its input .* NaN or infinity"):
        collect(block, stream, 1, groups, "model.layers.1")


# -------------------------------------------------------------------------------------------------------------- experts
def test_experts_with_few_tokens_are_filled_up_with_their_fellows():
    """Up to n tokens with what the stage's experts see on average; layers and experts with enough stay as they are."""
    n, counts = 6, {"a": 40, "b": 4, "c": 0, "other": 9, "layer": 3}
    tokens = {name: gaussian(count, n, seed=count) for name, count in counts.items()}
    stages = {"a": "down", "b": "down", "c": "down", "other": "up", "layer": "layer"}
    groups = [InputGroup(name, (name,), n, stage, name != "layer") for name, stage in stages.items()]
    found = {name: Accumulator.zeros(n, torch.device("cpu")) for name in counts}
    for name, accumulator in found.items():
        accumulator.add(tokens[name])
    moments, few = pooled(groups, found)
    assert few == ["b", "c"]
    everything = torch.cat([tokens[name] for name in "abc"]).double()
    average = everything.T @ everything / 44
    for name, x in tokens.items():
        expected = x.double().T @ x.double()
        expected = (expected + (n - len(x)) * average) / n if name in few else expected / len(x)
        torch.testing.assert_close(moments[name].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.linalg.matrix_rank(moments["b"]) == n == torch.linalg.matrix_rank(moments["c"])


def test_without_any_token_there_is_nothing_to_fill_up_with():
    group = InputGroup("a", ("a",), 4, "down", True)
    moments, few = pooled([group], {"a": Accumulator.zeros(4, torch.device("cpu"))})
    assert few == ["a"] and not moments["a"].any()
