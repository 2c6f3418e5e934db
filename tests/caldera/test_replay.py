"""A block run from stage to stage, against plain runs of it."""

import copy
from collections import Counter

import pytest
import torch

from caldera.blocks import Stream, decoder_blocks, input_groups
from caldera.matrices import matrices, watch
from caldera.replay import ATTENTION, Plan, Replay
from caldera.wiring import replay_plan
from tests.caldera import tiny_models
from tests.caldera.oracles import gaussian
from tests.caldera.tiny_models import HEADS, SIZES, built

ROWS = tiny_models.token_rows(3, 12)
# matrices that run before the last member of the group ahead of theirs has run
LATE = {"phi": ["self_attn.dense"], "qwen2_moe": ["mlp.shared_expert.down_proj"]}


def eager():
    model = tiny_models.llama()
    model.set_attn_implementation("eager")
    return model


# Phi's fc1 receives what q, k and v do, but runs after the attention
MODELS = tiny_models.FAMILIES | {
    "eager": eager,
    "bfloat16": lambda: tiny_models.llama().bfloat16(),
    "phi": lambda: built("Phi", **SIZES, **HEADS),
}


def opened(model, index=0):
    """The block, a stream at its start and its groups but for experts'."""
    block, stream = decoder_blocks(model)[1][index], Stream.open(model, ROWS)
    for before in range(index):
        stream.advance(decoder_blocks(model)[1][before], before)
    return block, stream, [g for g in input_groups(block, stream, index) if not g.expert]


def plan_of(model, index=0, like=None) -> Plan:
    block, stream, groups = opened(model, index)
    return replay_plan(block, stream, index, groups, like)


def plain(block, stream, row, name=None) -> torch.Tensor:
    """What the matrix receives in a run of the block, or the block's output."""
    seen = {}
    with watch(matrices(block).values(), lambda name, x: seen.setdefault(name, x.reshape(-1, x.shape[-1]))):
        output = stream.run(block, 0, row)
    return output if name is None else seen[name]


def check_replay(block, stream, plan) -> Counter:
    """Replay while the matrices of each group change once it is over; how often each product was computed."""
    block, computed = copy.deepcopy(block), Counter()
    replay = Replay(block, stream, 0, plan)

    def rows(replayed) -> list[torch.Tensor]:
        with watch(replay.layers.values(), lambda name, _x: computed.update([name])):
            return list(replayed)

    for step, group in enumerate(plan.groups):
        for row, x in enumerate(rows(replay.inputs(step))):
            assert torch.equal(x, plain(block, stream, row, group.name))
        for name in group.members:
            replay.layers[name].write(gaussian(*replay.layers[name].shape, seed=step))
    for row, y in enumerate(rows(replay.outputs())):
        assert torch.equal(y, plain(block, stream, row))
    return computed


@pytest.mark.parametrize("name", MODELS)
def test_a_replay_shows_what_plain_runs_do_and_computes_a_product_once(name):
    block, stream, groups = opened(MODELS[name]())
    plan = replay_plan(block, stream, 0, groups, None)
    assert list(plan.groups) == groups and plan.needs is not None
    computed = check_replay(block, stream, plan)
    once = [name for g in groups for name in g.members]
    again = LATE.get(name, ())  # is computed again while the late one is waited for
    assert {name: computed[name] for name in once} == {name: len(ROWS) * (1 + (name in again)) for name in once}


def test_what_is_needed_is_found_without_names():
    q, o, up, down = [g.name for g in plan_of(tiny_models.llama()).groups]
    assert plan_of(tiny_models.llama()).needs == tuple(map(frozenset, [[], [ATTENTION, q], [o], [up], [o, down]]))
    q, o, up, down = [g.name for g in plan_of(MODELS["neox"]()).groups]  # attention and MLP side by side
    assert plan_of(MODELS["neox"]()).needs == tuple(map(frozenset, [[], [ATTENTION, q], [], [up], [o, down]]))


def test_a_plan_is_kept_for_blocks_that_it_fits():
    model = tiny_models.llama()
    plan = plan_of(model)
    assert plan_of(model, 1, like=plan) is plan
    other = plan_of(model, 1, like=Plan(plan.groups, (frozenset(),) * len(plan.needs)))
    assert other == plan and plan_of(MODELS["neox"](), like=plan).needs != plan.needs


# ----------------------------------------------------------------------------------------------- blocks wired otherwise
def test_a_product_that_reaches_the_output_another_way_too_is_needed_there():
    model = tiny_models.rewired(tiny_models.shown_again)
    block, stream, groups = opened(model)
    q, o, up, down = [g.name for g in groups]
    plan = replay_plan(block, stream, 0, groups, None)
    assert plan.needs == tuple(map(frozenset, [[], [ATTENTION, q], [o], [up], [o, q, down]]))
    check_replay(block, stream, plan)


def test_where_a_replay_would_show_something_else_plain_runs_take_its_place():
    """The products matter together alone: no experiment with one of them shows it, the trial does."""
    block, stream, groups = opened(tiny_models.rewired(tiny_models.shown_together))
    plan = replay_plan(block, stream, 0, groups, None)
    assert plan.needs is None and list(plan.groups) == groups
    computed = check_replay(block, stream, plan)
    assert computed[groups[0].name] == 4 * len(ROWS) and computed[groups[-1].name] == len(ROWS)


def test_weights_that_are_zero_hide_nothing():
    """Blocks that were added to a model begin so; the matrices that take their place need not be zero."""
    model = tiny_models.llama()
    for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        layer = model.model.layers[0].get_submodule(name)
        for parameter in layer.parameters():
            parameter.zero_()
    block, stream, groups = opened(model)
    plan = replay_plan(block, stream, 0, groups, None)
    assert plan.needs == plan_of(tiny_models.llama()).needs
    check_replay(block, stream, plan)


def test_a_product_changed_in_place_is_given_as_it_was():
    def changed(out, products):
        return products["self_attn.o_proj"].mul_(2) + out

    block, stream, groups = opened(tiny_models.rewired(changed))
    check_replay(block, stream, replay_plan(block, stream, 0, groups, None))


def test_a_matrix_that_runs_twice_has_no_stage():
    model = tiny_models.llama()
    up = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.register_forward_hook(lambda _m, x, out: out + up(x[0])[..., :1])
    assert [g.name for g in plan_of(model).groups] == ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]


@pytest.mark.parametrize("replayed", [True, False])
def test_what_a_matrix_gave_is_kept_where_asked(replayed):
    block, stream, groups = opened(tiny_models.llama())
    plan = replay_plan(block, stream, 0, groups, None) if replayed else Plan(tuple(groups), None)
    replay = Replay(block, stream, 0, plan, ["self_attn.v_proj"])
    expected = [block.self_attn.v_proj(x) for x in replay.inputs(0)]
    assert not replay.products
    for step in (1, 2, 3):
        list(replay.inputs(step))
    for found, output in zip(replay.products["self_attn.v_proj"], expected, strict=True):
        torch.testing.assert_close(found.reshape(output.shape), output)
    assert set(replay.products) == {"self_attn.v_proj"} | ({"self_attn.o_proj"} if replayed else set())
