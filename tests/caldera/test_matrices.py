"""Matrices wherever a model keeps them, the products that they take part in, and which of them write the stream."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from caldera.blocks import Stream, covered, decoder_blocks, input_groups, named_matrices, residual_writers
from caldera.matrices import Products, chosen, matrices, watch
from caldera.moments import collect
from tests.caldera import tiny_models
from tests.caldera.oracles import gaussian

ATTENTION = {f"self_attn.{k}_proj": (m, 32) for k, m in {"q": 32, "k": 16, "v": 16, "o": 32}.items()}
MLP = {"mlp.gate_proj": (44, 32), "mlp.up_proj": (44, 32), "mlp.down_proj": (32, 44)}
SHARED = {f"mlp.shared_expert.{k}": v for k, v in (("gate_proj", (24, 32)), ("up_proj", (24, 32)))} | {
    "mlp.shared_expert.down_proj": (32, 24), "mlp.shared_expert_gate": (1, 32),
}  # fmt: skip


def experts(inner: int) -> dict[str, tuple[int, int]]:
    shapes = {"gate_up_proj": (2 * inner, 32), "down_proj": (32, inner)}
    return {f"mlp.experts.{kind}.{i}": shape for kind, shape in shapes.items() for i in range(4)}


SHAPES = {
    "phi3": {
        "self_attn.qkv_proj": (64, 32), "self_attn.o_proj": (32, 32),
        "mlp.gate_up_proj": (88, 32), "mlp.down_proj": (32, 44),
    },
    "opt": {f"self_attn.{k}_proj": (32, 32) for k in ("q", "k", "v", "out")} | {"fc1": (44, 32), "fc2": (32, 44)},
    "gpt2": {
        "attn.c_attn": (96, 32), "attn.c_proj": (32, 32), "mlp.c_fc": (44, 32), "mlp.c_proj": (32, 44),
    },
    "neox": {
        "attention.query_key_value": (96, 32), "attention.dense": (32, 32),
        "mlp.dense_h_to_4h": (44, 32), "mlp.dense_4h_to_h": (32, 44),
    },
    "mixtral": ATTENTION | experts(44),
    "qwen2_moe": ATTENTION | experts(20) | SHARED,
    "qwen3_moe": ATTENTION | experts(20),
    "gpt_oss": ATTENTION | experts(44),
}  # fmt: skip
MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
WRITERS = {
    "gemma2": [], "gemma3": [],  # a norm stands behind each
    "opt": ["self_attn.out_proj", "fc2"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "neox": ["attention.dense", "mlp.dense_4h_to_h"],
} | {key: ["self_attn.o_proj"] for key in MOE}  # fmt: skip


@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def family(request):
    return request.param, tiny_models.FAMILIES[request.param]()


def the_blocks(model) -> nn.ModuleList:
    return decoder_blocks(model)[1]


# ------------------------------------------------------------------------------------------------------ where they are
def test_every_matrix_is_listed_with_its_shape(family):
    name, model = family
    for block in the_blocks(model):
        assert {key: m.shape for key, m in matrices(block).items()} == SHAPES.get(name, ATTENTION | MLP)


def test_what_is_read_is_the_matrix_as_out_x_in(family):
    name, model = family
    found = named_matrices(model)
    assert len(found) == 2 * len(SHAPES.get(name, ATTENTION | MLP))
    for full, matrix in found.items():
        assert matrix.read().shape == matrix.shape
        assert torch.equal(matrix.read(), tiny_models.weight_of(model, full))
        assert matrix.transposed == (name == "gpt2" or (name == "gpt_oss" and matrix.expert is not None))
        assert (matrix.expert is not None) == (".experts." in full)
        assert matrix.parameter in dict(matrix_block(model, full).named_parameters())


def matrix_block(model, full: str) -> nn.Module:
    prefix, blocks = decoder_blocks(model)
    return blocks[int(full.removeprefix(f"{prefix}.").split(".")[0])]


def test_what_is_written_is_read_and_nothing_else_changes(family):
    model = copy.deepcopy(family[1])
    before = {name: p.clone() for name, p in model.named_parameters()}
    written = {name: gaussian(*m.shape, seed=i) for i, (name, m) in enumerate(named_matrices(model).items())}
    for name, matrix in named_matrices(model).items():
        matrix.write(written[name].double())
    for name, matrix in named_matrices(model).items():
        assert torch.equal(matrix.read(), written[name]) and matrix.read().dtype == torch.float32
    inside = covered(model, written)
    assert inside < set(before)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in inside)


def test_a_place_without_data_is_given_some(family):
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(family[1].config)
    for name, matrix in named_matrices(family[1]).items():
        named_matrices(model)[name].write(matrix.read().bfloat16())
    for name, matrix in named_matrices(model).items():
        assert torch.equal(matrix.read(), named_matrices(family[1])[name].read().bfloat16())
        assert matrix.whole.dtype == torch.bfloat16


class Tied(nn.Module):
    """Two modules, one parameter."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.own = (nn.Linear(8, 8) for _ in range(3))
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(self.one(x)) + self.own(x)


def test_a_parameter_that_two_modules_share_is_one_matrix():
    block = Tied()
    assert list(matrices(block)) == ["one", "own"]
    stream = Stream([gaussian(1, 5, 8)], [((), {})])
    x = stream.hidden[0][0]
    both = torch.cat([x, block.one(x)]).detach()
    found = collect(block, stream, 0, input_groups(block, stream, 0), "x")
    assert found["one"].tokens == 10  # what either module receives
    torch.testing.assert_close(found["one"].mean(), both.T @ both / 10)


def test_a_parameter_that_two_blocks_share_has_the_first_ones_name():
    model = nn.ModuleDict({"layers": nn.ModuleList(Tied() for _ in range(2))})
    model["layers"][1].own.weight = model["layers"][0].own.weight
    assert list(named_matrices(model)) == ["layers.0.one", "layers.0.own", "layers.1.one"]
    assert covered(model, {"layers.0.own"}) == {"layers.0.own.weight", "layers.1.own.weight"}
    assert covered(model, {"layers.1.one"}) == {"layers.1.one.weight", "layers.1.two.weight"}


def test_a_stack_of_experts_is_covered_once_all_of_them_are():
    model = tiny_models.FAMILIES["mixtral"]()
    names = [name for name in named_matrices(model) if "layers.1.mlp.experts.down_proj" in name]
    assert covered(model, names[:3]) == set()
    assert covered(model, names) == {"model.layers.1.mlp.experts.down_proj"}


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*"], [], True),
        (["*"], ["*.q_proj"], False),
        (["*_proj"], ["*.o_proj"], True),
        (["model.layers.[01].*"], [], True),
        (["model.layers.?.self_attn.*"], [], True),
        (["q_proj"], [], False),  # the whole name has to fit
        (["*.Q_proj"], [], False),
        ([], [], False),
        (["*.mlp.*", "*.q_*"], [], True),
    ],
)
def test_patterns_choose_by_the_full_name(include, exclude, expected):
    assert chosen("model.layers.1.self_attn.q_proj", include, exclude) == expected


# ------------------------------------------------------------------------------------------------------------- products
def test_inputs_are_those_of_plain_passes(family):
    """Of every matrix, experts among them, in the order of the tokens."""
    model, rows = family[1], tiny_models.token_rows(1)
    expected, seen, (prefix, blocks) = tiny_models.plain_inputs(model, rows), {}, decoder_blocks(model)
    stream = Stream.open(model, rows)
    for index, block in enumerate(blocks):
        with watch(matrices(block).values(), lambda name, x, i=index: seen.setdefault(f"{prefix}.{i}.{name}", x)):
            stream.advance(block, index)
    for name in named_matrices(model):
        if name in seen or len(expected[name]):
            x = seen[name].reshape(-1, seen[name].shape[-1])
            torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=1e-4)


PLAIN = {
    "linear": lambda x, w, b: nn.functional.linear(x, w, b),
    "linear by keyword": lambda x, w, b: nn.functional.linear(input=x, weight=w, bias=b),
    "matmul": lambda x, w, b: torch.matmul(x, w.T) + b,
    "operator": lambda x, w, b: x @ w.T + b,
    "method": lambda x, w, b: x.matmul(w.T) + b,
    "mm": lambda x, w, b: torch.mm(x, w.T) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x, w.T),
}


@pytest.mark.parametrize("product", PLAIN)
def test_a_product_is_seen_however_it_is_written(product):
    layer, x, seen = nn.Linear(8, 6), gaussian(5, 8), []
    expected = layer(x)
    with watch(matrices(nn.ModuleDict({"a": layer})).values(), lambda name, x: seen.append((name, x))):
        y = PLAIN[product](x, layer.weight, layer.bias)
    assert [name for name, _ in seen] == ["a"] and seen[0][1] is x
    torch.testing.assert_close(y, expected)


def test_only_watched_matrices_are_seen():
    block, seen = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), Conv1D(6, 8)), []
    found = matrices(block)
    with watch([found["0"], found["2"]], lambda name, x: seen.append(name)):
        block(gaussian(5, 8))
        gaussian(5, 8) @ gaussian(8, 8)
    assert seen == ["0", "2"]


def test_a_product_with_all_experts_is_none_with_the_first():
    """The whole stack begins at the first expert's address."""
    module, seen = nn.Module(), []
    module.num_experts, module.down_proj = 3, nn.Parameter(gaussian(3, 8, 8))
    with watch(matrices(module).values(), lambda name, x: seen.append(name)):
        torch.matmul(gaussian(3, 5, 8), module.down_proj)
        nn.functional.linear(gaussian(5, 8), module.down_proj[0])
    assert seen == ["down_proj.0"]


def test_an_output_is_replaced_when_asked():
    block, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6)), gaussian(5, 8)
    plain, computed = block(x), []

    def double(name, x, y):
        computed.append(name)
        return 2 * y() if name == "1" else None

    with Products(matrices(block).values(), double):
        assert torch.equal(block(x), 2 * plain)
    assert computed == ["0", "1"] and torch.equal(block(x), plain)


@pytest.mark.parametrize("product", PLAIN)
def test_an_output_may_be_computed_from_another_input(product):
    layer, x, other = nn.Linear(8, 6), gaussian(5, 8), gaussian(5, 8, seed=1)
    with Products(matrices(nn.ModuleDict({"a": layer})).values(), lambda _name, _x, y: y(other)):
        y = PLAIN[product](x, layer.weight, layer.bias)
    torch.testing.assert_close(y, PLAIN[product](other, layer.weight, layer.bias))


def test_an_output_that_is_replaced_is_not_computed():
    block = nn.Linear(8, 6)
    with Products(matrices(nn.ModuleDict({"a": block})).values(), lambda *_: torch.zeros(2)):
        assert block(gaussian(5, 7)).shape == (2,)  # a width that the layer does not take


def test_nothing_stays_after_an_exception():
    block, seen = nn.Linear(8, 6), []

    def fail(name, x):
        seen.append(name)
        raise KeyError(name)

    with pytest.raises(KeyError), watch(matrices(nn.ModuleDict({"a": block})).values(), fail):
        block(gaussian(5, 8))
    assert block(gaussian(5, 8)).shape == (5, 6) and seen == ["a"]
    assert not torch.overrides._get_current_function_mode_stack()


# ---------------------------------------------------------------------------------------------------- residual writers
def test_residual_writers_are_found_without_names(family):
    name, model = family
    stream = Stream.open(model, tiny_models.token_rows())
    for index, block in enumerate(the_blocks(model)):
        assert residual_writers(block, stream, index) == WRITERS.get(name, ["self_attn.o_proj", "mlp.down_proj"])
        stream.advance(block, index)


class Wired(nn.Module):
    """Layers as wide as the stream: some write into it, others only look as if they did."""

    def __init__(self):
        super().__init__()
        names = ["plain", "scaled", "gated", "gate", "normed", "inner", "outer", "some"]
        self.layers = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        y = self.layers
        some = torch.cat([y["some"](x[:, :3]), torch.zeros_like(x[:, 3:])], 1)  # as a layer of one expert
        x = x + y["plain"](x) + 0.5 * y["scaled"](x) + torch.sigmoid(y["gate"](x)) * y["gated"](x) + some
        return x + self.norm(y["normed"](x)) + y["outer"](torch.tanh(y["inner"](x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e2])
def test_only_what_is_added_as_it_is_writes(dtype, size):
    block = Wired().to(dtype)
    stream = Stream([(size * gaussian(1, 5, 8)).to(dtype)], [((), {})])
    before = stream.hidden[0].clone()
    assert residual_writers(block, stream, 0) == ["layers.plain", "layers.outer"]
    assert torch.equal(stream.hidden[0], before)
