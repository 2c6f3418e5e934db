"""A program on a terminal of its own, and what its screen shows."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from pathlib import Path

import pyte


class Terminal:
    """Runs a command on a pseudo-terminal; `screen` is what a person would see."""

    def __init__(self, command: list[str | Path], columns: int = 120, lines: int = 50):
        self.screen = pyte.HistoryScreen(columns, lines, history=1000)
        self._stream = pyte.ByteStream(self.screen)
        self._end, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        environment = os.environ | {"TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=inner, stdout=inner, stderr=inner, env=environment, start_new_session=True
        )
        os.close(inner)

    @property
    def text(self) -> str:
        """The screen, with what has scrolled out above it."""
        above = ["".join(line[i].data for i in range(self.screen.columns)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display])

    def wait_for(self, *texts: str, seconds: float = 120) -> None:
        """Until all of them are on the screen at once."""
        until = time.monotonic() + seconds
        while not all(text in self.text for text in texts):
            assert time.monotonic() < until, f"no {texts} on the screen:\n{self.text}"
            if not self._feed():
                raise AssertionError(f"it ended without {texts}:\n{self.text}")

    def finish(self) -> int:
        """Its exit code, when it has ended and all is on the screen."""
        while self._feed():
            pass
        os.close(self._end)
        return self.process.wait()

    def _feed(self) -> bool:
        """Pass on what comes within a second; whether the program may say more."""
        if not select.select([self._end], [], [], 1.0)[0]:
            return True
        try:
            said = os.read(self._end, 65536)
        except OSError:  # the program has closed its end
            return False
        self._stream.feed(said)
        return bool(said)
