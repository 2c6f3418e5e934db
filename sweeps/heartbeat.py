"""A sign of life while a process works on a point: a small file that says what it does, gone when the point has ended.

A process that was killed leaves its file behind: who finds one asks whether that process is still there.
"""

import hashlib
import json
import os
import platform
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from sweeps.point import Point

PROGRESS = "progress.json"  # in the folder of a point
RUNNING = "running"  # the folder of the cache that tells who works with it
EVERY = 2.0  # seconds between two signs
SILENCE = 120.0  # seconds without one after which a process of another machine counts as gone


@dataclass
class Heartbeat:
    """What is under way, in every file of `paths`: times are seconds since 1970. Without paths it says nothing."""

    paths: tuple[Path, ...] = ()
    facts: dict = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, stage: str) -> None:
        """A stage begins: this is written at once."""
        self.facts |= {"stage": stage, "done": None, "total": None, "stage_started": time.time()}
        self.write()

    def reached(self, done: int, total: int) -> None:
        """How far the stage is: written with the next sign."""
        self.facts |= {"done": done, "total": total}

    def write(self) -> None:
        """Replace the files. One that cannot be written is left as it is: a full disk costs no point for this."""
        with self._lock:
            text = json.dumps(self.facts | {"updated": time.time()})
            for path in self.paths:
                part = path.with_name(f".{path.name}.part")  # who writes holds the point's lock: what a kill left goes
                with suppress(OSError):
                    part.write_text(text)
                    part.replace(path)

    def remove(self) -> None:
        for path in self.paths:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def working_on(point: "Point") -> AbstractContextManager[Heartbeat]:
    """Signs of life in a point's folder, and in the cache that it works with, where `uses` names what it needs."""
    facts = {"name": point.name, "sweep": point.config["sweep"], "device": point.device}
    facts |= {"uncompressed": point.method is None, "uses": [point.source.name, *point.keys.values()]}
    place = hashlib.sha256(str(point.folder.absolute()).encode()).hexdigest()[:8]
    return beating([point.folder / PROGRESS, point.cache / RUNNING / f"{point.name}-{place}.json"], facts)


@contextmanager
def beating(paths: Iterable[Path], facts: dict) -> Iterator[Heartbeat]:
    """Signs of life until the block ends. An interruption (no `Exception`) leaves the last one, as a kill would."""
    start = {"started": time.time(), "pid": os.getpid(), "host": platform.node()}
    beat, over = Heartbeat(tuple(paths), facts | start), threading.Event()
    for path in beat.paths:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
    beat.begin("start")

    def keep_on() -> None:
        while not over.wait(EVERY):
            beat.write()

    thread = threading.Thread(target=keep_on, name="heartbeat", daemon=True)
    thread.start()
    try:
        try:
            yield beat
        finally:
            over.set()
            thread.join()
    except Exception:
        beat.remove()
        raise
    beat.remove()


def read_heartbeat(path: Path) -> dict | None:
    """The last sign in a file; None where there is none, or none that can be read."""
    try:
        beat = json.loads(path.read_bytes())
        return beat if {"pid", "host", "started", "updated", "stage"} <= set(beat) else None
    except (OSError, ValueError, TypeError):
        return None


def is_alive(beat: dict) -> bool:
    """Whether the process that gave the sign is there: the same one, not a later one of that number."""
    if beat["host"] != platform.node():
        return time.time() - beat["updated"] < SILENCE
    try:
        process = psutil.Process(beat["pid"])
        begun_before = process.create_time() < beat["started"] + 60  # the system's idea of that is seconds off
        return begun_before and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
