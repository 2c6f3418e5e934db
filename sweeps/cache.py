"""`caldera-cache`: what the cache folder holds, and how to make room in it. All of it can be made again."""

import argparse
import os
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout
from rich import box
from rich.console import Console
from rich.table import Table

from analysis.frontier import PIPE_WIDTH
from caldera.errors import CalderaError, UserError
from sweeps.heartbeat import RUNNING, is_alive, read_heartbeat
from sweeps.manifest import results_below
from sweeps.paths import default_cache
from sweeps.store import read_sealed

KEPT = ("checkpoints",)  # converted models: pruned by name alone
NOTES = ("digests", "finite", "inventories", "machines", "outlines")  # kilobytes: pruned by age alone
YOUNG = 600.0  # seconds: what was used since then is left alone
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True)
class Artefact:
    """A file or a folder that was made at once, with its note if it has one; `used` is its newest file's time."""

    path: Path
    size: int
    used: float

    @property
    def kind(self) -> str:
        return self.path.parent.name

    @property
    def key(self) -> str:
        """The start of the key that it is stored under."""
        return self.path.name.removesuffix(".json")

    @classmethod
    def of(cls, path: Path) -> "Artefact | None":
        """None if it is gone by now."""
        inside = [file for file in path.rglob("*") if file.is_file()] or [path]
        note = _note(path)
        try:
            found = [file.stat() for file in (*inside, *([note] if note.is_file() else []))]
        except FileNotFoundError:
            return None
        return cls(path, sum(s.st_size for s in found), max(s.st_mtime for s in found))


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def artefacts(cache: Path) -> list[Artefact]:
    """All that is whole, by kind and name."""
    kinds = sorted(folder for folder in cache.iterdir() if folder.is_dir() and folder.name != RUNNING)
    entries = {path for kind in kinds for path in kind.iterdir() if path.suffix not in (".lock", ".part")}
    notes = {_note(path) for path in entries}
    return [found for path in sorted(entries - notes) if (found := Artefact.of(path))]


def leftovers(cache: Path) -> list[Path]:
    """Files and folders that a killed process had begun to write."""
    found = [path for path in cache.rglob("*.part") if not any(p.suffix == ".part" for p in path.parents)]
    return [path for path in found if _abandoned(path)]


def _abandoned(path: Path) -> bool:
    """Its name ends with the number of the process; where it has none, or that of another machine's, age has to do."""
    number = path.stem.rpartition(".")[2]
    found = Artefact.of(path)
    old = found is not None and time.time() - found.used > YOUNG
    return old and not (number.isdigit() and psutil.pid_exists(int(number)))


def in_use(cache: Path) -> set[str]:
    """What the points that are being computed need: keys, and names of converted models."""
    beats = (read_heartbeat(path) for path in (cache / RUNNING).glob("*.json"))
    return {name for beat in beats if beat and is_alive(beat) for name in beat["uses"]}


# ---------------------------------------------------------------------------------------------------------------- prune
def prune(
    cache: Path, max_size: int | None, older_than: float | None, kinds: Iterable[str] = (), dry_run: bool = False
) -> list[Artefact]:
    """Delete what was not used for `older_than` seconds, then the least recently used down to `max_size` bytes.

    Whole artefacts go, of `kinds` or of all kinds but KEPT, and none that a running job needs. Returns what went.
    """
    for path in leftovers(cache):
        dry_run or _delete(path)
    chosen = [a for a in artefacts(cache) if (a.kind in kinds if kinds else a.kind not in KEPT)]
    total, gone, held = sum(a.size for a in chosen), [], in_use(cache)
    for artefact in sorted(chosen, key=lambda a: a.used):
        age = time.time() - artefact.used
        too_old = older_than is not None and age > older_than
        too_much = max_size is not None and total > max_size and (kinds or artefact.kind not in NOTES)
        if not (too_old or too_much) or age < YOUNG or _needed(artefact, held):
            continue
        if dry_run or _removed(artefact):
            gone.append(artefact)
            total -= artefact.size
    return gone


def _needed(artefact: Artefact, names: Iterable[str]) -> bool:
    """Whether one of the names is that of the artefact, or a key that it is stored under."""
    return any(name == artefact.key or (len(artefact.key) >= 12 and name.startswith(artefact.key)) for name in names)


def _removed(artefact: Artefact) -> bool:
    """Delete an artefact, unless somebody makes or reads it at the moment."""
    lock = FileLock(f"{artefact.path}.lock")
    try:
        with lock.acquire(blocking=False):
            _note(artefact.path).unlink(missing_ok=True)
            _delete(artefact.path)
            Path(lock.lock_file).unlink(missing_ok=True)
    except (Timeout, OSError):  # held, or another user's
        return False
    return True


def _delete(path: Path) -> None:
    """A folder leaves under another name first, so that no half of one is ever found."""
    if path.is_dir():
        aside = path.with_name(f".{path.name}.{os.getpid()}.part") if path.suffix != ".part" else path
        shutil.rmtree(path.rename(aside))
    else:
        path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------- list
def listing(cache: Path, long: bool, results: list[Path]) -> Table:
    """A row a kind, or an artefact, with the results that were made with it."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in (
        ("kind", "artefact", "size", "last used", "used by") if long else ("kind", "count", "size", "last used")
    ):
        table.add_column(head, justify="right" if head in ("count", "size") else "left", overflow="fold")
    found, now = artefacts(cache), time.time()
    if long:
        users = _users(results)
        for a in found:
            by = [name for name, keys in users if _needed(a, keys)]
            table.add_row(a.kind, a.path.name, size_text(a.size), _ago(now - a.used), ", ".join(by))
        return table
    for kind, members in _by_kind(found).items():
        oldest, newest = (_ago(now - pick(a.used for a in members)) for pick in (min, max))
        span = newest if oldest == newest else f"{oldest} to {newest}"
        table.add_row(kind, str(len(members)), size_text(sum(a.size for a in members)), span)
    table.add_section()
    table.add_row("all", str(len(found)), size_text(sum(a.size for a in found)), "")
    return table


def _by_kind(found: list[Artefact]) -> dict[str, list[Artefact]]:
    kinds = defaultdict(list)
    for artefact in found:
        kinds[artefact.kind].append(artefact)
    return kinds


def _users(results: list[Path]) -> list[tuple[str, list[str]]]:
    """The keys of every point that has a record in these folders, by its name."""
    files = [
        file for root in results for folder in results_below(root) for file in sorted(folder.glob("points/*/*.json"))
    ]
    records = [record for file in files if file.name == "record.json" and (record := read_sealed(file))]
    return [(record["name"], [record["key"], *(record.get("keys") or {}).values()]) for record in records]


def size_text(size: float) -> str:
    """Bytes as a person says it: 1.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _ago(seconds: float) -> str:
    for unit in ("d", "h", "m"):
        if seconds >= SECONDS[unit]:
            return f"{seconds / SECONDS[unit]:.0f}{unit} ago"
    return "just now"


# --------------------------------------------------------------------------------------------------- the console script
def size_of(text: str) -> int:
    """Bytes in `20GB`. Raises UserError."""
    match = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", text)
    if not match or match[2].upper() not in UNITS or match[1].count(".") > 1:
        raise UserError(f"--max-size={text} is no size: write for example 20GB or 500MB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def age_of(text: str) -> float:
    """Seconds in `30d`. Raises UserError."""
    match = re.fullmatch(r"(\d+)([mhdw])", text)
    if not match:
        raise UserError(f"--older-than={text} is no age: write for example 30d, 12h or 90m")
    return int(match[1]) * SECONDS[match[2]]


def main(arguments: list[str] | None = None) -> int:
    """The console script `caldera-cache`; returns the exit code."""
    options = _parser().parse_args(arguments)
    cache = (options.cache or default_cache()).expanduser()
    try:
        if not cache.is_dir():
            raise UserError(f"--cache={cache} is no folder: give the one that your runs use")
        _list(cache, options) if options.command == "list" else _prune(cache, options)
    except (CalderaError, OSError) as error:
        print(f"caldera-cache: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="caldera-cache", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--cache", type=Path, help="the cache folder (default: $CALDERA_CACHE, or the user's own)")
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("list", help="what there is, by kind")
    shown.add_argument("--long", action="store_true", help="every artefact")
    shown.add_argument("--results", type=Path, nargs="+", default=[], help="folders whose points --long names as users")
    pruned = commands.add_parser("prune", help="delete what was not used for longest")
    pruned.add_argument("--max-size", help="how much may stay, for example 20GB")
    pruned.add_argument("--older-than", help="delete what was not used for this long, for example 30d")
    pruned.add_argument("--kind", action="append", default=[], help="only of this kind; all but checkpoints otherwise")
    pruned.add_argument("--dry-run", action="store_true", help="only say what would go")
    return parser


def _list(cache: Path, options: argparse.Namespace) -> None:
    console = Console(highlight=False) if sys.stdout.isatty() else Console(width=PIPE_WIDTH)
    console.print(str(cache), markup=False, soft_wrap=True)
    console.print(listing(cache, options.long, options.results))


def _prune(cache: Path, options: argparse.Namespace) -> None:
    if options.max_size is None and options.older_than is None:
        raise UserError("prune needs --max-size or --older-than: say for example --max-size 20GB")
    known = {folder.name for folder in cache.iterdir() if folder.is_dir()}
    if unknown := sorted(set(options.kind) - known):
        raise UserError(f"--kind={unknown[0]} is not in {cache}: there are {', '.join(sorted(known - {RUNNING}))}")
    limits = (options.max_size and size_of(options.max_size), options.older_than and age_of(options.older_than))
    gone = prune(cache, *limits, options.kind, options.dry_run)
    for artefact in gone:
        print(f"{artefact.kind}/{artefact.path.name}: {size_text(artefact.size)}")
    did = "would free" if options.dry_run else "freed"
    print(f"{did} {size_text(sum(a.size for a in gone))} in {len(gone)} of the artefacts of {cache}")


if __name__ == "__main__":
    sys.exit(main())
