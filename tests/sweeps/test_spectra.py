import pytest
import torch

from analysis.layers import spectra_figure
from analysis.records import RecordError, load_records, load_spectra, tidy
from caldera.errors import UserError
from sweeps.pipeline import run_point
from sweeps.progress import Reporter
from sweeps.spectra import main, singular_values, write_spectra


def test_singular_values_are_those_of_the_product():
    generator = torch.Generator().manual_seed(0)
    for m, n in ((5, 8), (8, 5)):
        x, c = torch.randn(m, n, generator=generator), torch.randn(n, n, generator=generator)
        expected = torch.linalg.svdvals((x @ c).double())
        torch.testing.assert_close(singular_values(x, c @ c.T), expected, rtol=1e-4, atol=1e-4)


def test_a_points_spectra_are_written_once_and_drawn(point, tmp_path, capsys):
    one = point("method=fast", "rank.k=4", "evaluation=perplexity", "evaluation.rows=1", "evaluation.length=64")
    record = run_point(one, Reporter(one.name))
    assert main([str(one.results), "--blocks", "1"]) == 0
    path = one.folder / "spectra.json"
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    spectra = load_spectra(one.results)
    assert set(spectra["matrix"]) == {m["name"] for m in record["matrices"] if ".layers.1." in m["name"]}
    for matrix in record["matrices"]:
        own = spectra[spectra["matrix"] == matrix["name"]]
        if len(own):
            assert len(own) == min(matrix["shape"])
            error = ((own["missing"] ** 2).sum() / (own["before"] ** 2).sum()) ** 0.5
            assert error == pytest.approx(matrix["relative_error"], rel=1e-2)

    written = path.stat().st_mtime_ns
    assert write_spectra(one.results, [1]) == [path] and path.stat().st_mtime_ns == written
    figure = spectra_figure(tidy(load_records(one.results)), spectra)
    lines = {line.get_gid(): line for axes in figure.axes for line in axes.lines}
    for name, own in spectra.groupby("matrix"):
        assert list(lines[f"before:{name}"].get_ydata()) == list(own["before"])

    path.write_text(path.read_text()[:100])
    with pytest.raises(RecordError, match="spectra.json is damaged .* run caldera-spectra again"):
        load_spectra(one.results)
    write_spectra(one.results, [1])
    assert len(load_spectra(one.results)) == len(spectra)

    with pytest.raises(UserError, match="--points other has no checkpoint"):
        write_spectra(one.results, [1], ["other"])
    assert main([str(one.results), "--blocks", "7"]) == 1
    assert "--blocks 7 is not in the model: choose from 0 to 1" in capsys.readouterr().err
    assert main([str(one.results), "--blocks", "-1"]) == 1
    assert "write numbers from 0" in capsys.readouterr().err
