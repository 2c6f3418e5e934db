"""`caldera-spectra RESULTS_DIR`: singular values of W C, of W^ C and of what is missing, of kept checkpoints.

H = C C^T are the second moments of the original model's inputs, so that a squared singular value is a share of the
output's energy. They are written beside a point's record; `caldera-figures` draws them.
"""

import argparse
import sys
from pathlib import Path

from omegaconf import OmegaConf

from analysis.records import RecordError, load_records
from caldera.errors import CalderaError, UserError
from sweeps.plan import resolve
from sweeps.point import Point
from sweeps.schema import Config
from sweeps.store import read_sealed, write_sealed

FILE = "spectra.json"


def spectra_of(point: Point, blocks: list[int]) -> dict:
    """`matrices`: by full name, `before`, `after` and `missing` (min(m, n),) descending, of the blocks' matrices.

    Raises UserError: the checkpoint or the calibration is gone, or the model has no such block.
    """
    import torch

    from caldera.checkpoint import block_file, read_matrices
    from caldera.matrices import matrices
    from sweeps.calibration import Calibration, is_complete
    from sweeps.models import open_model

    folder = point.moments_folder
    if not is_complete(folder, hidden=False):
        raise UserError(f"{folder} holds no calibration of {point.name}: run the point again with force=true")
    model = open_model(point.source, None, "cpu", point.config["model"]["trust_remote_code"])
    if beyond := [block for block in blocks if block not in range(model.count)]:
        raise UserError(f"--blocks {beyond[0]} is not in the model: choose from 0 to {model.count - 1}")
    found, calibration = {}, Calibration(folder)
    for index in blocks:
        if not (point.checkpoint / block_file(index)).is_file():
            raise UserError(f"{point.checkpoint} is not kept: run the point again with checkpoint.keep=all")
        layers = matrices(model.block(index))
        packed = {matrix.spec.name: matrix for matrix in read_matrices(point.checkpoint, block_file(index))}
        moments = calibration.moments(index)
        for group in calibration.groups(index):
            for name in group.members:
                if (full := f"{model.name}.{index}.{name}") in packed:
                    weight, approximation = layers[name].read().to(torch.float32), packed[full].dequantize()
                    found[full] = _three(weight, approximation, moments[group.name])
    return {"matrices": found}


def _three(weight, approximation, moments) -> dict[str, list[float]]:
    parts = {"before": weight, "after": approximation, "missing": weight - approximation}
    return {key: singular_values(x, moments).tolist() for key, x in parts.items()}


def singular_values(x, moments):
    """Those of X C (m, n) for any C with C C^T = H (n, n), descending: the roots of the eigenvalues of X H X^T."""
    import torch

    x, moments = x.double(), moments.double()
    values = torch.linalg.eigvalsh(x @ moments @ x.T).clamp(min=0).sqrt().flip(0)
    return values[: min(x.shape)]


def main(arguments: list[str] | None = None) -> int:
    """The console script `caldera-spectra`; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="caldera-spectra", description=(__doc__ or "").partition(": ")[2].split("\n")[0]
    )
    parser.add_argument("results_dir", type=Path, help="a sweep's results folder, with its checkpoints")
    parser.add_argument("--blocks", default="0", help="decoder blocks, separated by commas (default: 0)")
    parser.add_argument("--points", nargs="*", help="names of points (default: all whose checkpoint is kept)")
    options = parser.parse_args(arguments)
    try:
        for path in write_spectra(options.results_dir, _numbers(options.blocks), options.points):
            print(path)
    except (CalderaError, RecordError, OSError) as error:
        print(f"caldera-spectra: {error}", file=sys.stderr)
        return 1
    return 0


def _numbers(text: str) -> list[int]:
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise UserError(f"--blocks {text} is no list of blocks: write numbers from 0, separated by commas")
    return sorted({int(part) for part in text.split(",")})


def write_spectra(results: Path, blocks: list[int], names: list[str] | None = None) -> list[Path]:
    """Writes what is not there yet and returns the files. Raises UserError for names that are no such points."""
    records = {record["name"]: record for record in load_records(results)}
    kept = [
        name
        for name, record in records.items()
        if record.get("checkpoint") and (results / record["checkpoint"]).is_dir()
    ]
    if missing := [name for name in names or () if name not in kept]:
        raise UserError(
            f"--points {missing[0]} has no checkpoint in {results}: choose from {', '.join(kept) or 'none'}"
        )
    if not kept:
        raise UserError(f"{results} keeps no checkpoint: run the sweep with checkpoint.keep=all")
    return [_written(results, records[name], blocks) for name in names or kept]


def _written(results: Path, record: dict, blocks: list[int]) -> Path:
    path = results / "points" / record["name"] / FILE
    if (read_sealed(path) or {}).get("blocks") != blocks:
        point = _point(record["config"], str(results))
        write_sealed(path, spectra_of(point, blocks) | {"name": record["name"], "blocks": blocks})
    return path


def _point(config: dict, results: str) -> Point:
    """The recorded point, with results where they are now."""
    return resolve(OmegaConf.merge(OmegaConf.structured(Config), config, {"results": results}))


if __name__ == "__main__":
    sys.exit(main())
