"""Guarded factorisations: a failure is answered by more damping, which is recorded, then by a typed error."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from caldera.devices import read
from caldera.errors import NumericalError

GRAM_SIGMA = 1e-6  # float32's resolution of the largest eigenvalue's bound


def require_finite(x: Tensor, what: str) -> None:
    """Raise NumericalError with the count of NaN and infinite entries of x, named by `what`."""
    bad = read((~torch.isfinite(x)).sum())
    if bad > 0:
        raise NumericalError(f"{what}: {int(bad)} of {x.numel()} entries are NaN or infinite")


@contextmanager
def one_thread() -> Iterator[None]:
    """LAPACK's sums depend on the number of threads, those of matrix products do not: with this, results do not either.

    What the factorisations lose by it is small beside the products around them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def total(x: Tensor) -> Tensor:
    """Sum of x (m, ...) in float64, row by row first, so that it does not depend on the number of threads."""
    return x.sum(-1, dtype=torch.float64).sum()


@contextmanager
def named(what: str) -> Iterator[None]:
    """A QR or SVD that does not converge inside the block becomes a NumericalError that begins with `what`."""
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise NumericalError(f"{what}: {str(error).splitlines()[0]}") from error


def _damped(h: Tensor, sigma: float) -> Tensor:
    damped = h.clone()
    damped.diagonal().add_(sigma)
    return damped


def damped_cholesky(
    h: Tensor, sigma: float, limit: float, what: str, jitters: list | None = None
) -> tuple[Tensor, float]:
    """Lower Cholesky factor of h + sigma I, h (n, n) of unit scale, and the sigma that it took.

    A failure raises sigma tenfold (from 1e-8 when it was 0), at most to `limit`; then NumericalError. A sigma that had
    to rise is noted in `jitters`.
    """
    start = sigma
    while True:
        with one_thread():
            factor, info = torch.linalg.cholesky_ex(_damped(h, sigma))
        if not read(_failed(info, factor)) > 0:
            if sigma > start and jitters is not None:
                jitters.append({"what": what, "jitter": sigma})
            return factor.contiguous(), sigma  # as it comes back from a file
        if sigma >= limit:
            raise NumericalError(f"{what}: the Cholesky factorisation fails even with {sigma:g} added to the diagonal")
        sigma = min(max(sigma * 10, 1e-8), limit)


def _failed(info: Tensor, *results: Tensor) -> Tensor:
    """0-d, above 0 where a factorisation failed or a result of it is not finite."""
    return torch.stack([info.to(torch.int64), *((~torch.isfinite(x)).sum() for x in results)]).amax()


@dataclass
class Trust:
    """Solves that are expected to succeed without more damping: `failed` notes on the device whether all of them did.

    So nothing waits for the device between them; whoever trusts asks at the end, and solves again if it says so.
    """

    failed: Tensor | None = None

    def solve_gram(self, gram: Tensor, right: Tensor, what: str) -> Tensor:
        """What the function of that name gives if its first damping serves; `what` is for those who do not trust."""
        scale = _gram_scale(gram)
        with one_thread():
            factor, info = torch.linalg.cholesky_ex(_damped(gram / scale, GRAM_SIGMA))
        solution = torch.cholesky_solve(right / scale, factor)
        failed = _failed(info, factor, solution)
        self.failed = failed if self.failed is None else torch.maximum(self.failed, failed)
        return solution


def solve_gram(gram: Tensor, right: Tensor, what: str, jitters: list | None = None) -> Tensor:
    """X (k, p) with gram X = right, for a positive semidefinite gram (k, k); dependent directions are damped.

    The damping starts at `GRAM_SIGMA`, so that a rank-deficient gram (a zero target, a rank above the matrix's) gives
    the least-norm kind of answer instead of an explosion. Damping beyond that start is noted in `jitters`. Raises
    NumericalError when nothing helps.
    """
    scale = _gram_scale(gram)
    factor, _ = damped_cholesky(gram / scale, GRAM_SIGMA, 1e-1, what, jitters)
    solution = torch.cholesky_solve(right / scale, factor)
    require_finite(solution, what)
    return solution


def _gram_scale(gram: Tensor) -> Tensor:
    return gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)


def energy(x: Tensor, moments: Tensor) -> float:
    """tr(X H X^T) of X (m, n)."""
    return read(total((x @ moments) * x))


def relative(lost: float, all_of_it: float) -> float:
    """The relative error of two energies; infinite where there was nothing to lose."""
    return 0.0 if lost <= 0 else float("inf") if all_of_it <= 0 else (lost / all_of_it) ** 0.5


def power_of_4(x: Tensor) -> float:
    """The power of 4 nearest to the largest |x|, 1 for zeros: to divide by it or its square root costs no bit."""
    top = read(x.abs().max())
    return 4.0 ** max(-60, min(63, round(math.log(top, 4)))) if 0 < top < math.inf else 1.0


def block_feedback(chol: Tensor, group: int) -> Tensor:
    """M - I (n, n), strictly block-lower, where chol = M D^(1/2) with unit g x g blocks on M's diagonal.

    The block form of the LDL decomposition that LDLQ feeds back errors with (QuIP#, section 4.1): H = M D M^T.
    n must be a multiple of `group`.
    """
    n = chol.shape[0]
    strips = chol.reshape(n, n // group, group).transpose(0, 1)  # (n / g, n, g) block columns
    blocks = diagonal_blocks(chol, group)
    unit = torch.linalg.solve_triangular(blocks, strips, upper=False, left=False)
    m = unit.transpose(0, 1).reshape(n, n)
    return m.masked_fill(_block_diagonal(n, group, m.device), 0.0)


def diagonal_blocks(x: Tensor, group: int) -> Tensor:
    """(n / g, g, g) blocks on the diagonal of x (n, n)."""
    n = x.shape[0]
    return x.reshape(n // group, group, n // group, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _block_diagonal(n: int, group: int, device: torch.device) -> Tensor:
    index = torch.arange(n, device=device) // group
    return index[:, None] <= index[None, :]
