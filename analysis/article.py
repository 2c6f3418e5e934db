"""`python -m analysis.article RESULTS_DIR [OUTPUT]`: `analysis/notebooks`, executed on a sweep's records."""

import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from analysis.figures import Sweep
from analysis.records import RecordError

if TYPE_CHECKING:
    from nbformat import NotebookNode

SCRIPTS = Path(__file__).with_name("notebooks")
SECONDS = 600  # a cell may take


class CellError(RuntimeError):
    """A cell of a notebook failed; the message is one sentence that names both and what went wrong."""


def write_articles(
    results_dir: str | Path, output: str | Path | None = None, scripts: Path | None = None
) -> list[Path]:
    """Executes every script on the records of a folder; the notebooks with outputs, by default in its `notebooks`.

    Raises RecordError where there is nothing to show, CellError where a cell fails; what was executed before is kept.
    """
    import jupytext
    import nbformat

    from analysis.style import replacing

    Sweep.read(str(results_dir))
    folder = Path(output or Path(results_dir) / "notebooks")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for script in sorted((scripts or SCRIPTS).glob("*.py")):
        notebook = jupytext.read(script)
        execute(notebook, script.stem, {"CALDERA_RESULTS": str(results_dir)})
        written.append(folder / f"{script.stem}.ipynb")
        with replacing(written[-1]) as temporary:
            nbformat.write(notebook, temporary)
    return written


def execute(notebook: "NotebookNode", name: str, variables: dict[str, str], folder: Path | None = None) -> None:
    """Runs all cells in place, by the running interpreter in `folder` (default: here). Raises CellError.

    What a kernel leaves on disk goes to a temporary folder, where it does not find the user's own configuration either.
    """
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # else drawn at random: the same article gives the same file
    resources = {"metadata": {"path": str(folder or Path.cwd())}}
    at = ["its kernel"]
    client = NotebookClient(notebook, timeout=SECONDS, resources=resources, record_timing=False)
    client.on_cell_execute = lambda cell, cell_index: at.append(_place(notebook, cell_index))
    with TemporaryDirectory(prefix="caldera-kernel-") as private:
        kernel = client.create_kernel_manager()
        kernel.kernel_spec_manager = KernelSpecManager(kernel_dirs=[])  # no other python3 than this one
        kernel.transport, kernel.ip = "ipc", str(Path(private) / "socket")  # no port that others see
        kernel.connection_file = str(Path(private) / "kernel.json")
        try:
            client.execute(env=os.environ | {"IPYTHONDIR": private} | variables)
        except CellExecutionError as error:
            raise CellError(f"{name}: {at[-1]} raised {error.ename}: {_first_line(error.evalue)}") from error
        except (RuntimeError, TimeoutError) as error:  # the kernel died, or a cell takes too long
            raise CellError(f"{name}: {at[-1]} failed: {_first_line(str(error))}") from error


def _place(notebook: "NotebookNode", index: int) -> str:
    """The cell of that index: its number among the cells of code and its last line."""
    cells = [cell for cell in notebook.cells[: index + 1] if cell.cell_type == "code"]
    return f"code cell {len(cells)} (`{cells[-1].source.strip().splitlines()[-1].strip()}`)"


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[0]


def main(arguments: list[str] | None = None) -> int:
    """`python -m analysis.article`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="analysis.article", description="Notebooks, executed on a sweep's records.")
    parser.add_argument("results_dir", type=Path, help="a sweep's output folder, with points/*/record.json")
    parser.add_argument("output", type=Path, nargs="?", help="where they go (default: notebooks in the sweep's folder)")
    options = parser.parse_args(arguments)
    try:
        written = write_articles(options.results_dir, options.output)
    except (RecordError, CellError, OSError) as error:
        print(f"analysis.article: {error}", file=sys.stderr)
        return 1
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
