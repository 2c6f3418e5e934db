import subprocess
from pathlib import Path

import psutil
import pytest

from analysis import article
from analysis.article import SCRIPTS, CellError, main, write_articles

jupytext = pytest.importorskip("jupytext")
ROOT = Path(__file__).parents[2]
NAMES = ("frontier", "layers", "methods")
READS = 'results = os.environ.get("CALDERA_RESULTS", "results/demo")'


def cells(name: str) -> list[str]:
    """The code of a script's cells."""
    return [cell.source for cell in jupytext.read(SCRIPTS / f"{name}.py").cells if cell.cell_type == "code"]


@pytest.fixture
def script(tmp_path, monkeypatch):
    """script(code): makes this the only notebook."""

    def _script(code: str):
        folder = tmp_path / "scripts"
        folder.mkdir()
        (folder / "short.py").write_text(f"# %% [markdown]\n# # Short\n\n# %%\nx = 1\n\n# %%\n{code}\n")
        monkeypatch.setattr(article, "SCRIPTS", folder)

    return _script


def test_scripts_are_the_halves_without_outputs():
    assert sorted(path.name for path in SCRIPTS.iterdir() if path.suffix) == [f"{name}.py" for name in NAMES]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    assert not [line for line in listed.stdout.splitlines() if line.endswith(".ipynb")]


@pytest.mark.parametrize("name", NAMES)
def test_a_script_is_an_article_on_the_folder_that_it_is_given(name):
    notebook = jupytext.read(SCRIPTS / f"{name}.py")
    assert notebook.metadata["jupytext"]["formats"] == "ipynb,py:percent"
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    assert notebook.cells[0].source.startswith("# ") and READS in cells(name)[0]
    for before, cell in zip(notebook.cells, notebook.cells[1:]):
        if cell.cell_type == "code" and "show(" in cell.source and '"models"' not in cell.source:
            assert before.cell_type == "markdown" and len(before.source) > 200
        assert cell.cell_type == "markdown" or len(cell.source.splitlines()) <= 10


FOLDERS = {
    "a whole sweep": lambda make, records, fitted: [fitted(records[0], [0.1, 0.2, 0.05, 0.4]), *records[1:]],
    "without matrices": lambda make, records, fitted: records,
    "uncompressed": lambda make, records, fitted: [make.baseline()],
    "one point": lambda make, records, fitted: records[:1],
    "one point that failed": lambda make, records, fitted: [records[0], make.failed()],
}


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("name", NAMES)
def test_an_article_runs_on_any_folder(name, folder, make, records, fitted, write, monkeypatch, capsys):
    """In this process, where nothing is displayed: a kernel is slow to start."""
    monkeypatch.setenv("CALDERA_RESULTS", str(write(FOLDERS[folder](make, records, fitted))))
    exec(compile("\n".join(cells(name)), name, "exec"), {})
    out = capsys.readouterr().out
    assert out.count("IPython.core.display.HTML") > 0
    assert ("Image" in out) == (folder == "a whole sweep" if name == "layers" else folder != "uncompressed")
    assert ("Nothing to show here: no record has the metric kl: evaluate with it" in out) == (name != "layers")


def test_a_kernel_knows_the_folder_and_leaves_nothing(script, records, write, tmp_path, monkeypatch, capfd):
    results, home, here = write(records), tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    for name in ("HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "matplotlib"))  # of this process
    monkeypatch.chdir(here)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    script("import os, sys; print(os.environ['CALDERA_RESULTS'], os.getcwd(), sys.executable)")
    assert main([str(results)]) == 0
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    assert not [*home.iterdir(), *here.iterdir()]
    assert [path.name for path in (results / "notebooks").iterdir()] == ["short.ipynb"]
    found = jupytext.read(results / "notebooks" / "short.ipynb").cells[-1]
    assert found.outputs[0].text.split() == [str(results), str(here), article.sys.executable]
    first = (results / "notebooks" / "short.ipynb").read_bytes()
    assert main([str(results), str(tmp_path / "other")]) == 0
    assert (tmp_path / "other" / "short.ipynb").read_bytes() == first
    assert capfd.readouterr().err == ""


def test_a_failing_cell_is_named(script, records, write, capsys):
    results = write(records)
    script("print('before')\n{}['nothing']")
    assert main([str(results)]) == 1
    assert capsys.readouterr().err.endswith("short: code cell 2 (`{}['nothing']`) raised KeyError: 'nothing'\n")
    assert not [*(results / "notebooks").iterdir()]


def test_a_kernel_that_dies_is_named(script, records, write):
    script("import os; os._exit(3)")
    with pytest.raises(CellError, match=r"^short: code cell 2 \(`import os; os._exit\(3\)`\) failed: Kernel died"):
        write_articles(write(records))


def test_a_cell_that_takes_too_long_is_named(script, records, write, monkeypatch):
    monkeypatch.setattr(article, "SECONDS", 1)
    script("import time; time.sleep(60)")
    with pytest.raises(CellError, match=r"^short: code cell 2 \(.*\) failed: A cell timed out"):
        write_articles(write(records))


def test_a_folder_without_records_is_one_sentence(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    sentence = f"{tmp_path} holds no points/*/record.json: give the output folder of a sweep."
    assert capsys.readouterr().err == f"analysis.article: {sentence}\n"
    assert not [*tmp_path.iterdir()]
