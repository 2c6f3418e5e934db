"""How much work each part of a point is: operations, bytes and kernels, counted from shapes. Nothing is measured here.

An operation is a multiplication or an addition: a product of (m, n) with (n, p) has 2 m n p. What is not counted is
small beside what is: norms and activations, random numbers, sums, packing of codes.
"""

from collections import Counter
from dataclasses import dataclass, field, fields

from caldera import hadamard
from caldera.ldlq import PANEL
from caldera.lowrank import OVERSAMPLING, POWER_ITERATIONS
from caldera.method import Method
from caldera.moments import STRIPS
from caldera.problem import LEAST
from caldera.quantizers import HALVES, get_quantizer
from caldera.quantizers.scalar import COARSE, FINE, ScalarCodebook
from caldera.quantizers.trellis import RUN, WARM
from caldera.theory import PROBES, ROUNDS
from sweeps.outline import Outline

TRIANGLE = (STRIPS + 1) / (2 * STRIPS)  # of x x^T, the part that is computed
ALTERNATIONS = 2.5  # after which LPLR gains nothing: 2 to 2.9 at ranks 32 and 64 of 576 columns, 2 and 4 bits
PASSES = 3  # times that each product's input and output go through memory in a block: the product, norms, activations
SEARCH_KERNELS, VITERBI_KERNELS = 40, 10  # as tensor code: for a group of columns; for each value of a sequence
IMPATIENT = 0.83  # of its rounds, those that a method of patience 1 took on SmolLM2 (rank 32 of 576)


@dataclass(frozen=True)
class Work:
    """Operations by what limits them. Adding and scaling are meant literally."""

    model: float = 0.0  # products in the model's type
    mixed: float = 0.0  # products of the model's type summed in float32: moments
    single: float = 0.0  # float32 products
    solves: float = 0.0  # float32 triangular systems
    alone: float = 0.0  # float32 factorisations, which take one thread
    search: Counter = field(default_factory=Counter)  # weights rounded to codewords, by quantizer
    moved: float = 0.0  # bytes through memory outside of products
    disk: float = 0.0  # bytes written to or read from disk
    kernels: float = 0.0  # small ones that wait for each other, where the column loops are not compiled
    steps: float = 0.0  # fixed work of Python, in matrices or rows

    def __add__(self, other: "Work") -> "Work":
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)})

    def __mul__(self, times: float) -> "Work":
        search = Counter({name: times * count for name, count in self.search.items()})
        return Work(
            **{f.name: times * getattr(self, f.name) for f in fields(Work) if f.name != "search"}, search=search
        )

    @property
    def operations(self) -> float:
        """Floating-point operations of all products, solves and factorisations."""
        return self.model + self.mixed + self.single + self.solves + self.alone


def total(parts) -> Work:
    return sum(parts, Work())


# --------------------------------------------------------------------------------------------------------------- passes
def forward(model: Outline, tokens: float, length: float, itemsize: int, head: bool = False) -> Work:
    """`tokens` in rows of `length` through all blocks, and through the head.

    2 operations a parameter that a token meets, and 4 `length` x attention width a block for Q K^T and its product
    with V (all of it: how much of the causal half is left out depends on the kernel).
    """
    products = 2 * model.active + 4 * model.blocks * length * model.attention + 2 * model.head * head
    sides = sum((m + n) * model.share_of(name) for name, (m, n) in model.matrices.items())
    logits = 2 * model.vocabulary * 4 * head  # float32, written and read
    kind = "single" if itemsize == 4 else "model"
    return Work(**{kind: products * tokens}, moved=tokens * (PASSES * sides * itemsize + logits), steps=tokens / length)


def second_moments(n: int, tokens: float) -> Work:
    """H = E[x x^T] (n, n): the lower triangle of strips."""
    return Work(mixed=2 * TRIANGLE * n**2 * tokens)


def corrected_moments(n: int, width: int, tokens: float, writes: bool) -> Work:
    """H^, C = E[x x^^T] (n, n) and, for what writes into the stream, D (width, n)."""
    return second_moments(n, tokens) + Work(mixed=(2 * n**2 + 2 * width * n * writes) * tokens)


# ------------------------------------------------------------------------------------------------------- decompositions
def transforms(m: int, n: int) -> Work:
    """A matrix (m, n) into the incoherent coordinates, or out of them."""
    stages = len(hadamard.factors(m)) + len(hadamard.factors(n)) + 2
    return Work(single=2.0 * (m * hadamard.operations(n) + n * hadamard.operations(m)), moved=8.0 * m * n * stages)


def basis(n: int, method: Method) -> Work:
    """Moments transformed and damped, their Cholesky factor, LDLQ's feedback."""
    group = 1 if method.q == "none" else get_quantizer(method.q).group
    turned = transforms(n, n) if method.transform and method.moments == "measured" else Work()
    return turned + Work(alone=n**3 / 3, solves=n**2 * group, moved=60.0 * n**2)


def rounding(name: str, rows: int, columns: int) -> Work:
    """A matrix rounded without feedback."""
    return Work(search=_searched(name, rows * columns), moved=24.0 * rows * columns)


def _searched(name: str, weights: float) -> Counter:
    """Under the name without a scale's width; 16-bit numbers need no search.

    Scales of rows or groups of scalars are found by rounding with each candidate.
    """
    if name in HALVES:
        return Counter()
    found = get_quantizer(name)
    tries = len(COARSE) + len(FINE) if found.granularity and isinstance(found.codebook, ScalarCodebook) else 0
    return Counter({name.partition("bit")[0] + "bit": (1 + tries) * weights})


def ldlq(m: int, n: int, quantizer: str) -> Work:
    """The errors fed back, m n^2: products between panels, and inside of them loops, whose time is the search's."""
    inside = m * n * min(n, PANEL)
    between = Work(single=max(0.0, m * n**2 - inside), search=_searched(quantizer, m * n), moved=32.0 * m * n)
    return between + Work(kernels=_kernels(m, n, quantizer))


def _kernels(m: int, n: int, quantizer: str) -> float:
    """How many small kernels wait for each other where the column loops are tensor code."""
    found = get_quantizer(quantizer)
    codebook = getattr(found, "codebook", None)
    if codebook is None:
        return 0.0  # 16-bit numbers
    if codebook.sequential:
        return VITERBI_KERNELS * n * (min(m, RUN) + 2 * WARM)
    return SEARCH_KERNELS * n / codebook.group


def tuning(m: int, n: int, quantizer: str, passes: int) -> Work:
    """Coordinate descent: a gradient, 2 m n^2, and what each pass changes in it, m n^2."""
    return (ldlq(m, n, quantizer) + Work(single=2.0 * m * n**2)) * passes


def subspace(m: int, n: int, k: int) -> Work:
    """The image W C, and the sketch of its k leading singular vectors, or all of them where that is cheaper."""
    image, wide = Work(single=2.0 * m * n**2), k + OVERSAMPLING
    if 2 * wide >= min(m, n):
        small, large = sorted((m, n))
        return image + Work(alone=4.0 * large * small**2 + 22.0 * small**3)  # Golub & Van Loan, R-SVD
    products = 2.0 * m * n * wide * (2 + 2 * POWER_ITERATIONS) + 2.0 * m * wide**2
    turns = 4.0 * wide**2 * (m + POWER_ITERATIONS * (m + n))  # QR with Q
    return image + Work(single=products, alone=turns + 4.0 * n * wide**2 + 22.0 * wide**3)


def regression(m: int, n: int, k: int) -> Work:
    """The first right factor, from a known subspace."""
    return Work(solves=1.0 * k * n**2, single=2.0 * k**2 * (m + n), alone=4.0 * k**3)


def lplr(m: int, n: int, method: Method, first: bool) -> Work:
    """A H; for every R the products R H, R H R^T and A H R^T; for every pair two solves, L^T A and two losses."""
    k, inner = method.rank, min(method.alternations, ALTERNATIONS)
    of_right = 2.0 * k * n**2 + 2.0 * k**2 * n + 2.0 * m * n * k
    of_pair = 2.0 * m * n * k + 2.0 * k**2 * m + 2 * 2.0 * k**2 * m
    solves = 2.0 * k**2 * (m + n)
    products = Work(single=2.0 * m * n**2 + (inner + 1) * of_right + inner * of_pair, solves=inner * solves)
    rounds = rounding(method.l, k, m) * inner + rounding(method.r, k, n) * (inner + first)
    return products + rounds + Work(alone=2 * inner * k**3 / 3, moved=16.0 * m * n)


def rounds(method: Method) -> float:
    """Outer iterations: all of them, unless an impatient method ends before."""
    if not method.rank or method.q == "none":
        return 1
    impatient = method.patience == 1 and method.outer_iterations > 2
    return method.outer_iterations * IMPATIENT if impatient else method.outer_iterations


def decomposition(m: int, n: int, method: Method) -> Work:
    """One matrix, given its basis and, for a rank, its leading subspace."""
    k, times, product = method.rank, rounds(method), 2.0 * m * n * method.rank
    work = (transforms(m, n) if method.transform else Work()) + Work(single=2.0 * m * n**2, moved=40.0 * m * n, steps=1)
    if method.init != "zero" and k:
        work += subspace(m, n, k) + regression(m, n, k) + lplr(m, n, method, True)
    if k:
        fresh = 0 if method.warm_start else times - 1
        work += lplr(m, n, method, True) * times + Work(single=product) * times + regression(m, n, k)
        work += (subspace(m, n, k) + regression(m, n, k)) * fresh
    if method.q != "none":
        work += ldlq(m, n, method.q) * times + tuning(m, n, method.q, method.tune_passes) * times
        work += Work(single=2.0 * m * n**2) * (times * bool(method.tune_passes or method.downdate))
    if method.downdate and k:
        work += (basis(n, method) + Work(single=4.0 * k * n**2)) * times
    return work


def measurement(m: int, n: int, method: Method) -> Work:
    """What was packed is decoded twice, and the energy of its error taken."""
    decoded = (transforms(m, n) if method.transform else Work()) + Work(single=2.0 * m * n * method.rank)
    return decoded * 2 + Work(single=2.0 * m * n**2, moved=100.0 * m * n)


def prediction(m: int, n: int, method: Method) -> Work:
    """What theory expects: triangular solves with sketches of the rows."""
    if method.moments == "identity":
        return Work()
    backbone = Work(single=4.0 * PROBES * n**2 + 2.0 * PROBES * m * n, solves=ROUNDS * 2.0 * PROBES * n**2)
    k = dimensions(method.rank, m, n) if method.rank else 0
    return backbone * (2 if k else 1) + Work(single=2.0 * k * n**2 + 2.0 * k * m * n, moved=40.0 * n**2)


def dimensions(rank: int, m: int, n: int) -> int:
    """Of the leading subspace that serves a rank: see `caldera.problem`."""
    return min(max(LEAST, 1 << (rank - 1).bit_length()), m, n)


# ----------------------------------------------------------------------------------------------------------- correction
def correction(n: int, width: int, writes: bool) -> Work:
    """A group's rule for its targets: a factorisation, and solves for C and D."""
    return Work(alone=n**3 / 3, solves=2.0 * n**3 + 2.0 * width * n**2 * writes, moved=40.0 * n**2)


def corrected_target(m: int, n: int) -> Work:
    """W P with two energies, then the output's error with three products."""
    return Work(single=6 * 2.0 * m * n**2, moved=60.0 * m * n)
