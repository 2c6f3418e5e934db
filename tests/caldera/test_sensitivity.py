"""What errors cost a model, against gradients of the whole model and against the divergence of perturbed ones."""

import pytest
import torch
from torch import Tensor

from caldera.basis import prepare
from caldera.blocks import named_matrices
from caldera.problem import Problem
from caldera.rows import Spill
from caldera.sensitivity import divergence, gradient_moments
from sweeps.models import open_model
from tests.caldera.tiny_models import FAMILIES, LAYERS, llama, plain_inputs, token_rows


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def opened(model, folder):
    """The model as it is read from its checkpoint."""
    model.save_pretrained(folder)
    return open_model(folder, "float32")


def by_the_whole_model(model, rows: Tensor) -> dict[str, Tensor]:
    """The sums of g^T g, from a backward pass of the whole model for each row."""
    drawn, sums = generator(), {}
    model.requires_grad_()
    for row in rows:
        model.zero_grad()
        logs = model(row[None], use_cache=False).logits[0].log_softmax(-1)
        logs.gather(-1, torch.multinomial(logs.detach().exp(), 1, generator=drawn)).sum().backward()
        for name, matrix in named_matrices(model).items():
            key, g = name if matrix.expert is None else name.rpartition(".")[0], matrix.part(matrix.whole.grad)
            sums[key] = sums.get(key, 0) + g.T @ g
    return sums


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_gradients_are_those_of_the_whole_model(family, tmp_path):
    model, rows = FAMILIES[family](), token_rows()
    names, found = list(named_matrices(model)), {}
    spill = Spill(tmp_path, limit=1)  # everything
    for index, sums in gradient_moments(opened(model, tmp_path), rows, names, generator(), spill):
        assert index == LAYERS - 1 - len({name.split(".layers.")[-1][0] for name in found})
        found |= sums
    expected = by_the_whole_model(model, rows)
    assert found.keys() == expected.keys()
    for name, sums in expected.items():
        torch.testing.assert_close(found[name], sums, rtol=1e-3, atol=1e-4 * float(sums.abs().max()))


def test_only_what_is_chosen_has_gradients_and_every_row_is_heard_of_twice(tmp_path):
    model, heard = llama(), []
    chosen = [name for name in named_matrices(model) if "layers.1.mlp.down_proj" in name]
    found = gradient_moments(opened(model, tmp_path), token_rows(), chosen, generator(), progress=heard.append)
    assert [(index, list(sums)) for index, sums in found] == [(1, chosen), (0, [])]
    assert len(heard) == 2 * LAYERS * len(token_rows())


# --------------------------------------------------------------------------------------------------------- divergences
def predictions(model, rows: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(row[None], use_cache=False).logits[0].double().log_softmax(-1) for row in rows])


def errors_of(problem: Problem, size: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """An error (m, n) such as LDLQ makes, in the coordinates of W, and its squared relative error."""
    chol = problem.basis.chol
    noise = size * torch.randn(problem.weight.shape, generator=generator)
    error = torch.linalg.solve_triangular(chol / chol.diagonal(), noise, upper=False, left=False)
    return error * problem.unit, float(((error @ chol).square()).sum() / problem.energy)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_the_divergence_of_small_errors_is_the_predicted_one(name, tmp_path):
    model, rows, full = llama(), token_rows(24, 20), f"model.layers.0.{name}"
    inputs = torch.cat([plain_inputs(model, row[None])[full] for row in rows])
    basis = prepare(inputs.T @ inputs / len(inputs), name="x", sigma=1e-3, transformed=False)
    weight = model.get_submodule(full).weight
    problem = Problem.of(weight.detach().clone(), basis, full)
    draws = [dict(gradient_moments(opened(model, tmp_path), rows, [full], generator(seed)))[0] for seed in range(4)]
    cost = divergence(sum(sums[full] for sums in draws), basis, problem, len(draws) * rows.numel())
    before, ratios, noise = predictions(model, rows), [], torch.Generator().manual_seed(1)
    for _ in range(12):
        error, squared = errors_of(problem, 3e-3, noise)
        weight.data += error
        after = predictions(model, rows)
        weight.data -= error
        ratios.append(float((before.exp() * (before - after)).sum(-1).mean()) / (cost * squared))
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.15)


def test_the_cost_does_not_depend_on_units_or_on_the_transform():
    m, n = 24, 40
    weight, g, x = (torch.randn(*shape, generator=generator()) for shape in ((m, n), (90, n), (200, n)))
    gradients, moments = g.T @ g, x.T @ x / 200
    found = []
    for unit, transformed in ((1.0, False), (64.0, False), (1.0, True)):
        basis = prepare(unit * moments, name="x", transformed=transformed)
        found.append(divergence(gradients, basis, Problem.of(weight, basis, "w"), 100))
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0] == pytest.approx(found[2], rel=0.1)  # LDLQ's errors are other ones in other coordinates
