"""`caldera-run retry=SWEEP`: the points of a sweep that failed, were interrupted or never ran, as they were planned."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from caldera.errors import UserError
from sweeps.ending import honour
from sweeps.job import conclude, work
from sweeps.live import end_live, show_live
from sweeps.manifest import manifest_of, manifests, remember, results_below
from sweeps.overview import TO_RETRY, Results
from sweeps.plan import resolve
from sweeps.point import Point
from sweeps.progress import SWEEP, complain
from sweeps.schema import Config
from sweeps.store import read_sealed
from sweeps.wording import sentence


def retry(cfg: DictConfig, overrides: list[str]) -> None:
    """Run them one after the other in this process; a failure does not stop the rest.

    `overrides` are those that were typed. Raises UserError before any work, SystemExit at the end if anything failed.
    """
    typed = _typed(overrides)
    results, sweeps = _found(cfg.retry, Path(cfg.results))
    planned = {p["name"]: p for s in sweeps for p in (read_sealed(manifest_of(results, s)) or {}).get("points", ())}
    states = {status.name: status.state for s in sweeps for status in Results(results, s).look().points}
    todo = [name for name in planned if states.get(name) in TO_RETRY]
    for name in planned:
        if states.get(name) == "running":
            print(f"{name} is running: it is left alone")
    print(f"{len(planned)} points of {', '.join(sweeps)} in {results}, {len(todo)} of them to do again", flush=True)
    SWEEP.total = len(todo)
    show_live(Results(results, names=frozenset(todo)))
    for name in todo:
        _try(name, planned[name]["config"], cfg, typed, results)
    end_live()
    conclude(results, todo)


def _try(name: str, recorded: dict, cfg: DictConfig, typed: list[str], results: Path) -> None:
    """Run a point; a failure is said."""
    try:
        point = resolve(_configuration(recorded, cfg, typed, results))
        _check_same(point, name)
        remember([point])
        work(point, check=True)
    except Exception as error:  # whatever it is, the other points go on
        honour()
        complain(f"  failed: {name}: {sentence(error)}")


def _typed(overrides: list[str]) -> list[str]:
    """The settings that were typed beside `retry`. Raises UserError for one that would change points."""
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    for key in keys:
        if key not in ("retry", "results", "cache", "tracker") and key.partition(".")[0] not in ("compute", "tracker"):
            raise UserError(
                f"{key} beside retry would change the points: leave it out; only results, cache, compute.* and"
                " tracker.* can be chosen anew"
            )
    return [key for key in keys if key not in ("retry", "results")]


def _found(name: str, root: Path) -> tuple[Path, list[str]]:
    """The results folder and the sweeps that are meant. Raises UserError listing those there are."""
    known = [(folder, file.stem) for folder in results_below(root) for file in manifests(folder)]
    folders = [folder for folder, sweep in known if sweep == name]
    if len(folders) > 1:
        where = " and ".join(map(str, folders))
        raise UserError(f"retry={name} is a sweep of {where}: choose one by results=...")
    if folders:
        return folders[0], [name]
    if sweeps := [file.stem for file in manifests(Path(name))]:
        return Path(name), sweeps
    names = ", ".join(dict.fromkeys(sweep for _, sweep in known)) or "none"
    raise UserError(f"retry={name} is no sweep below results={root}, whose sweeps are: {names}")


def _configuration(recorded: dict, cfg: DictConfig, typed: list[str], results: Path) -> DictConfig:
    """What was planned, with what was typed now, and with results where they were found."""
    config = OmegaConf.merge(OmegaConf.structured(Config), recorded)
    config.results = str(results)
    for key in typed:
        OmegaConf.update(config, key, OmegaConf.select(cfg, key), merge=False)
    return config


def _check_same(point: Point, name: str) -> None:
    """Raises UserError if the planned settings make another point by now."""
    if point.name != name:
        raise UserError(f"its model, its texts or this version have changed, so it is {point.name} now: run the sweep")
