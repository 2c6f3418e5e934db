"""Second moments of a model's inputs, collected once and shared by every point of every later sweep."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from caldera.blocks import InputGroup, Stream, decoder_blocks, input_groups
from caldera.files import committed, write_json
from caldera.moments import collect
from sweeps.store import read_json

DONE = "manifest.json"


@dataclass(frozen=True)
class Moments:
    """A folder with one file of second moments a block, and a manifest of the groups that share them."""

    directory: Path

    @property
    def manifest(self) -> dict:
        return read_json(self.directory / DONE)

    def groups(self, block: int) -> list[InputGroup]:
        """The groups of linear layers that receive one tensor, named inside the block."""
        entries = self.manifest["blocks"][block]
        return [InputGroup(g["name"], tuple(g["members"]), g["width"]) for g in entries]

    def tokens(self, block: int) -> dict[str, int]:
        """Tokens that each group saw."""
        return {g["name"]: g["tokens"] for g in self.manifest["blocks"][block]}

    def load(self, block: int) -> dict[str, Tensor]:
        """H (n, n) float32 of each group of a block."""
        return load_file(self.directory / _file(block))


def _file(block: int) -> str:
    return f"block-{block:05d}.safetensors"


def ensure_moments(
    directory: Path, model: Callable[[], nn.Module], rows: Callable[[], Tensor], progress: Callable[[int, int], None]
) -> Moments:
    """The moments in `directory`, collected from `model()` over `rows()` (sequences, length) unless they are there.

    One process collects, others wait for it. Raises NumericalError naming block and layer for NaN or infinity.
    """
    if not (directory / DONE).is_file():
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{directory}.lock"):
            if not (directory / DONE).is_file():
                _collect_all(directory, model(), rows(), progress)
    return Moments(directory)


def _collect_all(directory: Path, model: nn.Module, rows: Tensor, progress: Callable[[int, int], None]) -> None:
    name, blocks = decoder_blocks(model)
    stream, done, listed = Stream.open(model, rows), 0, []

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress(done, len(blocks) * len(rows))

    for index, block in enumerate(blocks):
        groups = input_groups(block, stream, index)
        found = collect(block, stream, index, groups, f"{name}.{index}", step)
        with committed(directory / _file(index)) as part:
            save_file({key: a.mean().cpu().contiguous() for key, a in found.items()}, part)
        listed.append([g.__dict__ | {"tokens": found[g.name].tokens} for g in groups])
    write_json(directory / DONE, {"blocks_name": name, "blocks": listed, "tokens": rows.numel()})
