"""CALDERA: a weight matrix as a low-precision backbone plus low-rank, low-precision factors, W ~ Q + L R.

Glossary, used throughout:
    W (m, n)    weight, out x in as `nn.Linear` has it       H (n, n)   second moments E[x x^T] of the inputs
    Q (m, n)    backbone                                     L (m, k), R (k, n)   factors; k is the rank
    sigma       damping added to H of unit mean diagonal     chol       lower Cholesky factor of the damped H
    feedback    strictly lower block factor of LDLQ          sign_in, sign_out    random signs of the transform
    basis       the coordinates and factorisations that all matrices with the same inputs share
    code        integer that a codebook turns into values    granule    values that share one scale
"""

from typing import Any

import wrapt

from caldera.basis import Basis, prepare
from caldera.decompose import Decomposition, decompose, relative_error
from caldera.errors import CalderaError, CheckpointError, NumericalError, UserError
from caldera.method import Method
from caldera.packed import MatrixSpec, PackedMatrix
from caldera.quantizers import get_quantizer, quantizer_names
from caldera.theory import predict_error

__all__ = [
    "Basis", "CalderaConfig", "CalderaError", "CheckpointError", "Decomposition", "MatrixSpec", "Method",
    "NumericalError", "PackedMatrix", "UserError", "decompose", "get_quantizer", "predict_error", "prepare",
    "quantizer_names",
    "relative_error",
]  # fmt: skip


@wrapt.when_imported("transformers.quantizers.auto")
def _register(_) -> None:
    """Make packed checkpoints known to transformers, as soon as it looks at any: it is not imported for that."""
    import caldera.hf  # noqa: F401


def __getattr__(name: str) -> Any:
    if name == "CalderaConfig":
        from caldera.hf import CalderaConfig

        return CalderaConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
