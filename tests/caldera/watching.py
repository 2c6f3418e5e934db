"""What a computation asks of the host, counted: on tensors without data for any device, or on real ones here."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from caldera import devices

# A build of torch without CUDA cannot even index a fake CUDA tensor, for want of a device guard. To code that never
# asks for a kind of device, "lazy" is one like any other: not the host, and no host tensor may meet its tensors.
DEVICE = "cuda" if torch.backends.cuda.is_built() else "lazy"
# operations for whose result, or its size, the host waits; the last three are factorisations that check themselves
WAITS = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_dim",
    "bincount", "repeat_interleave", "_linalg_check_errors", "_linalg_svd", "_linalg_eigh",
}  # fmt: skip


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of the device, for use where tensors are fake."""
    return torch.empty(*shape, dtype=dtype, device=DEVICE)


class Watch(TorchDispatchMode):
    """While it is entered: `waits` of operations, by name; copies `to_host`, and `from_host` of more than a number."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.to_host: list[str] = []
        self.from_host: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **kwargs or {}), function.overloadpacket.__name__
        if name in WAITS or (name == "index" and _by_flags(args[1])):
            self.waits[name] += 1
        if name in ("copy_", "_to_copy"):
            self._copied(name, args[1] if name == "copy_" else args[0], out)
        return out

    def _copied(self, name: str, source: torch.Tensor, target: torch.Tensor) -> None:
        if source.device.type != "cpu" and target.device.type == "cpu":
            self.to_host.append(f"{name} {tuple(source.shape)}")
        if source.device.type == "cpu" and target.device.type != "cpu" and source.dim():
            self.from_host.append(f"{name} {tuple(source.shape)}")


def _by_flags(indices) -> bool:
    """Whether an index is a mask: the host has to know how many entries it picks."""
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


@contextmanager
def reads() -> Iterator[list[tuple[int, ...]]]:
    """Shapes of what is read through `caldera.devices`, as it is read; each is one wait."""
    found, real = [], devices._fetched
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "_fetched", lambda x: found.append(tuple(x.shape)) or real(x))
        yield found
