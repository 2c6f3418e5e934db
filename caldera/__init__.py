"""CALDERA: a weight matrix as a low-precision backbone plus low-rank, low-precision factors, W ~ Q + L R.

Glossary, used throughout:
    W (m, n)    weight, out x in as `nn.Linear` has it       H (n, n)   second moments E[x x^T] of the inputs
    Q (m, n)    backbone                                     L (m, k), R (k, n)   factors; k is the rank
    sigma       damping added to H of unit mean diagonal     chol       lower Cholesky factor of the damped H
    feedback    strictly lower block factor of LDLQ          sign_in, sign_out    random signs of the transform
    basis       the coordinates and factorisations that all matrices with the same inputs share
    code        integer that a codebook turns into values    granule    values that share one scale
"""

import importlib
from typing import Any

import wrapt

_HOMES = {
    "basis": ("Basis", "prepare"),
    "decomposition": ("Decomposition", "decompose", "relative_error"),
    "errors": ("CalderaError", "CheckpointError", "NumericalError", "UserError"),
    "hf": ("CalderaConfig",),
    "method": ("Method",),
    "packed": ("MatrixSpec", "PackedMatrix"),
    "quantizers": ("get_quantizer", "quantizer_names"),
    "theory": ("predict_error",),
}
_HOME = {name: f"caldera.{module}" for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


@wrapt.when_imported("transformers.quantizers.auto")
def _register(_) -> None:
    """Make packed checkpoints known to transformers, as soon as it looks at any: it is not imported for that."""
    import caldera.hf  # noqa: F401


def __getattr__(name: str) -> Any:
    """A public name, loaded on first use: who needs an error or a file only does not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(_HOME[name]), name)
    return found
