"""The fit of one matrix, and of one block's matrices from what `sweeps.inputs` gives."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from caldera import Basis, Decomposition, Method, decompose, predict_error
from caldera.devices import full_precision, release
from caldera.matrices import Matrix
from caldera.problem import Problem
from sweeps.budget import CHOSEN, Table, method_of_matrix
from sweeps.inputs import CorrectedPrefix, Given, Original
from sweeps.parallel import Workers
from sweeps.shared import SharedBlock

Inputs = Original | CorrectedPrefix


@dataclass(frozen=True)
class Fit:
    """What matrices are compressed with: the method, which ones (full names), where to compute.

    `table` has the ranks and quantizers of matrices that differ from the method's.
    """

    method: Method
    names: frozenset[str]
    device: torch.device
    table: Table = field(default_factory=dict)

    def method_of(self, name: str) -> Method:
        """How the matrix of that full name is decomposed."""
        return method_of_matrix(name, self.method, self.table)

    @property
    def facts(self) -> dict:
        """The method's settings; where matrices differ, without those that are each one's own."""
        return vars(self.method) | (dict.fromkeys(CHOSEN) if self.table else {})

    def on(self, device: torch.device) -> "Fit":
        return replace(self, device=device)


@dataclass
class MatrixJob:
    """A matrix `weight` (m, n) to fit to `moments` (n, n); `problem` if it is at hand."""

    name: str
    weight: Tensor
    moments: Tensor
    basis: Basis
    method: Method
    problem: Problem | None = None


@dataclass(frozen=True)
class Fitted:
    found: Decomposition
    predicted: float | None
    seconds: float


@full_precision()
def fit_matrix(job: MatrixJob, device: torch.device) -> Fitted:
    """The decomposition, and what theory expected of it."""
    with blamed(job.name):
        start = time.perf_counter()
        weight, moments, basis = (x.to(device) for x in (job.weight, job.moments, job.basis))
        shared = {"name": job.name, "basis": basis, "problem": job.problem or Problem.of(weight, basis, job.name)}
        found = decompose(weight, moments, job.method, **shared)
        seconds = time.perf_counter() - start
        # theory speaks of the moments that were fitted to, and for H = I these are not the measured ones
        predicted = None if basis.identity else predict_error(weight, moments, job.method, **shared)
        return Fitted(found, predicted, seconds)


@contextmanager
def blamed(name: str) -> Iterator[None]:
    """An exception from inside the block says which matrix was worked on, in its attribute `matrix`."""
    try:
        yield
    except Exception as error:
        error.matrix = getattr(error, "matrix", name)
        raise


def fit_block(
    layers: dict[str, Matrix], block: str, inputs: Inputs, index: int, fit: Fit, known: SharedBlock, workers: Workers
) -> dict[str, tuple[Decomposition, dict]]:
    """Decompositions of a block's matrices by full name, and what else a record says of each.

    Matrices of one stage are independent: they are what workers share out. A group shares one basis.
    """
    done = {}
    for stage in inputs.stages(index):
        members = {f"{block}.{name}": (given, name) for given in stage for name in given.group.members}
        makers = {full: _Maker(full, *members[full], layers[full], fit, known) for full in members if full in layers}
        one_by_one = workers.count == 1 or len(makers) == 1
        jobs = workers.map(fit_matrix, makers, lambda full: makers[full].job(one_by_one))  # noqa: B023
        results = {full: makers[full].finish(fitted, inputs) for full, fitted in jobs}
        done |= {full: results[full] for full in makers}
    return done


@dataclass(frozen=True)
class _Maker:
    """What is done for a matrix before and after its fit, in the process that knows the inputs."""

    full: str
    given: Given
    name: str  # in the block
    matrix: Matrix
    fit: Fit
    known: SharedBlock

    def job(self, one_by_one: bool) -> MatrixJob:
        """`one_by_one`: the fit is done in this process, which may know the problem already."""
        group = self.full.removesuffix(self.name) + self.given.group.name
        with blamed(group):
            basis = self.known.basis(self.given.moments.to(self.fit.device), group, self.fit.method.basis_options)
        with blamed(self.full):
            wanted, method = self.given.target(self.name, self._weight()), self.fit.method_of(self.full)
            problem = self.known.problem(wanted, basis, self.full, method.rank) if one_by_one else None
            return MatrixJob(self.full, wanted, self.given.moments, basis, method, problem)

    def finish(self, fitted: Fitted, inputs: Inputs) -> tuple[Decomposition, dict]:
        """Let the inputs know of W^, and say how far its outputs are off."""
        approximation = fitted.found.dequantize().to(self.fit.device)
        error = self.given.output_error(self._weight(), approximation)
        inputs.install(self.name, approximation)
        release()
        tokens = {"tokens": self.given.tokens, "few_tokens": self.given.few, "seconds": fitted.seconds}
        error = fitted.found.relative_error if error is None else error
        return fitted.found, tokens | {"predicted_error": fitted.predicted, "output_error": error}

    def _weight(self) -> Tensor:
        return self.matrix.read().to(self.fit.device, torch.float32)
