"""How a matrix is decomposed: every choice of the algorithm, checked before any work."""

from dataclasses import dataclass

from caldera.errors import UserError
from caldera.packed import MatrixSpec
from caldera.quantizers import get_quantizer

CHOICES = {
    "order": ("lr_first", "q_first"),
    "moments": ("measured", "identity"),
    "init": ("zero", "svd", "whitened", "odlri"),
}
FLAGS = ("warm_start", "rotate", "transform", "downdate")


@dataclass(frozen=True)
class Method:
    """How a matrix is decomposed. `q`, `l`, `r` are quantizer names; `q="none"` leaves the backbone out.

    Each of `outer_iterations` rounds updates L, R (by `inner_iterations` alternations) and Q, in the given order; the
    best iterate is kept. With `warm_start` the factors continue from the last round instead of a fresh regression.
    `tune_passes` of coordinate descent follow each LDLQ. `sigma` damps the moments (of unit mean diagonal).
    After `patience` rounds without an improvement of `tolerance` (relative) the loop stops.

    `moments="identity"` fits with H = I (no feedback, plain SVDs); the error is measured with H all the same.
    `init` gives factors before the first step: a truncated SVD of W (`svd`), the regression against H (`whitened`), or
    against H of the `init_channels` largest inputs alone (`odlri`, arXiv 2506.02077). They take `init_rank` dimensions
    at most: None for all of the rank, "auto" for the split that SRR's criterion chooses (arXiv 2602.02001).
    `downdate` rounds Q against what of H a later fit of L cannot absorb.
    """

    rank: int = 64
    q: str = "e8p_2bit"
    l: str = "e8p_4bit"
    r: str = "e8p_4bit"
    outer_iterations: int = 15
    inner_iterations: int = 10
    order: str = "lr_first"
    warm_start: bool = True
    rotate: bool = True
    transform: bool = True
    tune_passes: int = 0
    sigma: float = 3e-3
    tolerance: float = 1e-4
    patience: int = 3
    seed: int = 0
    moments: str = "measured"
    init: str = "zero"
    init_rank: int | str | None = None
    init_channels: int = 16
    downdate: bool = False

    def __post_init__(self) -> None:
        """Raises UserError naming the field, its value and the remedy."""
        counts = {"rank": 0, "outer_iterations": 1, "inner_iterations": 1, "tune_passes": 0, "patience": 1}
        for name, least in (counts | {"init_channels": 1}).items():
            if not _is_count(getattr(self, name), least):
                raise UserError(f"{name}={getattr(self, name)!r} must be a whole number of at least {least}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)!r} must be one of {', '.join(choices)}")
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name}={getattr(self, name)!r} must be true or false")
        if not 0 < self.sigma <= 1:
            raise UserError(f"sigma={self.sigma!r} must be above 0 and at most 1 (the mean diagonal of H)")
        self._check_init()
        self._check_parts()

    def _check_init(self) -> None:
        if self.init_rank not in (None, "auto") and not _is_count(self.init_rank, 1):
            raise UserError(f"init_rank={self.init_rank!r} must be a whole number of at least 1, auto, or null for all")
        if self.init == "odlri" and self.moments == "identity":
            raise UserError("init='odlri' looks for the inputs of largest moments: set moments=measured")

    def _check_parts(self) -> None:
        for name in (self.q, self.l, self.r):
            name == "none" or get_quantizer(name)
        if self.rank and "none" in (self.l, self.r):
            raise UserError(f"rank={self.rank} needs both factors: give l and r a quantizer, or set rank=0")
        if not self.rank and self.q == "none":
            raise UserError("q='none' with rank=0 leaves nothing of the matrix: give q a quantizer or set a rank")

    @property
    def basis_options(self) -> dict:
        """What `prepare` needs to know of the method."""
        identity = self.moments == "identity"
        return {"seed": self.seed, "sigma": self.sigma, "transformed": self.transform, "identity": identity}

    @property
    def factor_quantizers(self) -> tuple:
        return get_quantizer(self.l), get_quantizer(self.r)

    @property
    def alternations(self) -> int:
        """Inner iterations that serve: between two 16-bit factors nothing is left to compensate for."""
        return 1 if all(q.bits == 16 for q in self.factor_quantizers) else self.inner_iterations

    def spec(self, shape: tuple[int, int], name: str = "matrix", input_name: str = "input") -> MatrixSpec:
        """What a matrix of that shape becomes. Raises UserError when the rank exceeds its smaller side."""
        if self.rank > min(shape):
            m, n = shape
            raise UserError(
                f"rank={self.rank} exceeds the smaller side of {name} ({m} x {n}); use at most {min(shape)}"
            )
        factors = (self.l, self.r) if self.rank else ("none", "none")
        return MatrixSpec(name, input_name, tuple(shape), self.rank, self.q, *factors, self.seed, self.transform)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
