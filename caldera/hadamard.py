"""Fast orthonormal transforms of every width, and portable random signs.

Incoherence processing (QuIP#, arXiv 2402.04396, section 3) replaces a weight `W (m, n)` by
`T_m diag(sign_out) W diag(sign_in) T_n^T`, which spreads outliers evenly over rows and columns.

`T_n` is a Kronecker product of small orthonormal factors, and `factors(n)` lists their orders:

* Hadamard matrices, entries `+-1/sqrt(order)`, from Sylvester's doubling and Paley's two
  constructions (Paley 1933, J. Math. Phys. 12): every `n = p 2^j` that has them uses nothing else;
* else a fixed pseudo-random orthogonal factor for the odd part of `n`, next to Sylvester factors;
* else, for an odd part above `LARGEST`, the discrete Hartley transform, by FFT.

`T_n` depends on `n` alone, and signs on (n, seed, name) alone, so a checkpoint stores neither; whoever
changes a plan or a factor here breaks the checkpoints that exist. Matrices are built on first use.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

LARGEST = 2048  # no dense factor is larger than this
STAGE = 96  # what a factor's pass over memory costs, in multiply-adds per entry; see `_cheapest`

Element = tuple[int, ...]  # of GF(p^k): the k coefficients of a polynomial in x, constant term first


def signs(
    n: int, seed: int, name: str, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:  # (n,)
    """Random +-1 from SHAKE-256 of "seed/name": the same on every platform and in every version."""
    digest = hashlib.shake_256(f"{seed}/{name}".encode()).digest((n + 7) // 8)
    bits = np.unpackbits(np.frombuffer(digest, np.uint8), count=n, bitorder="little")
    out = torch.empty(n, dtype=dtype, device=device)
    # A fake tensor holds no values, and copying to a GPU that this machine lacks fails even for a fake one.
    return out if isinstance(out, FakeTensor) else out.copy_(torch.from_numpy(1.0 - 2.0 * bits))


def transform(x: Tensor) -> Tensor:  # (..., n) -> (..., n)
    """`x @ T_n^T`: the orthonormal transform of the last dimension, in a new tensor."""
    return _apply(x, inverse=False)


def inverse(x: Tensor) -> Tensor:  # (..., n) -> (..., n)
    """`x @ T_n`: undoes `transform`."""
    return _apply(x, inverse=True)


@cache
def factors(n: int) -> tuple[int, ...]:
    """Orders of the Kronecker factors of `T_n`, first factor first; their product is `n`."""
    if n < 1:
        raise ValueError(f"a transform needs a width of at least 1, got {n}")
    power = n & -n
    plan = _cheapest(n)
    if plan is None:
        plan = (n // power, *_cheapest(power))
    return plan or (1,)


def operations(n: int) -> int:
    """Multiply-adds of `transform` per row of width `n`; nominal, `5 n log2(n)`, for a Hartley factor."""
    return n * sum(f if f <= LARGEST else round(5 * math.log2(f)) for f in factors(n))


def _apply(x: Tensor, inverse: bool) -> Tensor:
    if not x.is_floating_point():
        raise TypeError(f"a transform needs a floating-point tensor, got {x.dtype}")
    n = x.shape[-1]
    # Half precision is computed in float32 and rounded once, not once per stage.
    y = x if x.dtype == torch.float64 else x.float()
    inner = n
    for order in factors(n):
        inner //= order
        y = _stage(y.reshape(x.numel() // (order * inner), order, inner), inverse)
    return y.reshape(x.shape).to(x.dtype)


def _stage(y: Tensor, inverse: bool) -> Tensor:  # (batch, order, inner) -> the same
    """Multiply dimension 1 by its factor: one GEMM, or one FFT."""
    batch, order, inner = y.shape
    if order > LARGEST:
        return _hartley(y)
    matrix = _matrix(order, y)
    if inverse:
        matrix = matrix.mT
    if inner == 1:  # a tall GEMM; as a batch of matrix-vector products it would crawl
        return y.reshape(batch, order) @ matrix.mT
    return matrix @ y


def _hartley(y: Tensor) -> Tensor:  # (batch, order, inner) -> the same
    """Orthonormal, symmetric, its own inverse, and no entry exceeds `sqrt(2/order)`."""
    spectrum = torch.fft.fft(y, dim=1, norm="ortho")
    return spectrum.real - spectrum.imag


def _matrix(order: int, like: Tensor) -> Tensor:  # (order, order)
    # A fake tensor must meet a fake factor, and only real ones may enter the cache.
    if isinstance(like, FakeTensor):
        return like.new_empty(order, order)
    return _cached_matrix(order, like.dtype, like.device)


@cache
def _cached_matrix(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Whatever mode the first caller is in, later callers may be in another: an inference tensor breaks training.
    with unset_fake_temporarily(), torch.inference_mode(False):
        return torch.tensor(_orthonormal(order), dtype=dtype, device=device)


@cache
def _orthonormal(order: int) -> np.ndarray:  # (order, order), float64
    return hadamard(order) / math.sqrt(order) if is_hadamard(order) else _random_orthogonal(order)


def _random_orthogonal(order: int) -> np.ndarray:  # (order, order)
    """Haar-distributed. NumPy has frozen RandomState's stream; torch promises none across versions."""
    digest = hashlib.sha256(f"orthogonal/{order}".encode()).digest()
    gaussian = np.random.RandomState(list(digest)).standard_normal((order, order))
    q, r = torch.linalg.qr(torch.from_numpy(gaussian))
    return (q * r.diagonal().sign()).numpy()  # QR is unique up to these signs


@cache
def _cheapest(n: int, largest: int = LARGEST) -> tuple[int, ...] | None:
    """Cheapest ascending Hadamard orders up to `largest` with product `n`; None where there are none.

    A factor costs its order in multiply-adds per entry, plus STAGE: powers of two are then split
    into at most 64 each, and 4096 into 64 x 64 (on a CPU faster than 16 x 16 x 16, half the time of
    32 x 32 x 4, far below twelve butterflies). Ascending, since a small last GEMM is slow.
    """
    if n == 1:
        return ()
    plans = []
    for order in range(2, min(n, largest) + 1):
        if n % order == 0 and is_hadamard(order):
            rest = _cheapest(n // order, order)
            plans += [] if rest is None else [(*rest, order)]
    return min(plans, key=lambda plan: sum(plan) + STAGE * len(plan), default=None)


@cache
def is_hadamard(order: int) -> bool:
    """Whether `hadamard(order)` can construct a matrix."""
    if order <= 2:
        return order >= 1
    return order % 4 == 0 and (_paley(order) is not None or is_hadamard(order // 2))


def hadamard(order: int) -> np.ndarray:  # (order, order) of +-1, float64
    """Sylvester's matrix for a power of two, else Paley's, else a doubled smaller one."""
    assert is_hadamard(order), order
    if order == 1:
        return np.ones((1, 1))
    q = _paley(order)
    if q is None or order & (order - 1) == 0:
        return np.kron([[1, 1], [1, -1]], hadamard(order // 2))
    conference = _conference(q)
    identity = np.eye(q + 1)
    if order == q + 1:
        return conference + identity
    return np.kron(conference, [[1, 1], [1, -1]]) + np.kron(identity, [[1, -1], [-1, -1]])


def _paley(order: int) -> int | None:
    """The field size q of Paley I (order q + 1, q = 3 mod 4) or II (order 2 q + 2, q = 1 mod 4)."""
    if order % 4 == 0 and _prime_power(order - 1):
        return order - 1
    q = order // 2 - 1
    return q if order % 4 == 0 and q % 4 == 1 and _prime_power(q) else None


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    k = round(math.log(q, p))
    return (p, k) if p**k == q else None


def _conference(q: int) -> np.ndarray:  # (q + 1, q + 1)
    """Zero diagonal, +-1 elsewhere, orthogonal rows; symmetric for q = 1 mod 4, else skew."""
    core = np.ones((q + 1, q + 1))
    core[0, 0] = 0
    core[1:, 0] = 1 if q % 4 == 1 else -1
    core[1:, 1:] = _jacobsthal(q)
    return core


def _jacobsthal(q: int) -> np.ndarray:  # (q, q)
    """chi(a - b) over all a, b of GF(q): 0 at 0, 1 at squares, -1 elsewhere."""
    p, k = _prime_power(q)
    place = p ** np.arange(k)
    elements = np.arange(q)[:, None] // place % p  # (q, k)
    chi = np.zeros(q)
    powers = np.array(_nonzero_elements(p, k)) @ place
    chi[powers[0::2]], chi[powers[1::2]] = 1, -1  # squares are the even powers of a generator
    return chi[(elements[:, None] - elements) % p @ place]


def _nonzero_elements(p: int, k: int) -> list[Element]:
    """All of GF(p^k) but 0, as successive powers of a generator.

    If the powers of x modulo a monic polynomial reach all p^k - 1 non-zero elements, every one of
    them is invertible: the polynomial is irreducible and x generates the field.
    """
    for tail in itertools.product(range(p), repeat=k):
        if tail[-1]:
            powers = list(_powers_of_x(p, tail[::-1]))
            if len(powers) == p**k - 1:
                return powers
    raise AssertionError(f"{p} is not prime")


def _powers_of_x(p: int, tail: Element) -> Iterator[Element]:
    """1, x, x^2, ... until 1 recurs, where x^k = tail (with a constant term, so x is invertible)."""
    one = element = (1,) + (0,) * (len(tail) - 1)
    while True:
        yield element
        shifted = (0, *element[:-1])
        element = tuple((s + element[-1] * t) % p for s, t in zip(shifted, tail, strict=True))
        if element == one:
            return
