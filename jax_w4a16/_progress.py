"""A progress bar on standard error: one line that is rewritten, and nothing where that is no terminal."""

import sys
import time

_WIDTH = 30


class Progress:
    """Counts finished items out of a total; to be used in a `with` statement."""

    def __init__(self, total: int):
        self._total, self._done, self._begin = total, 0, time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.clear()

    def step(self, text: str) -> None:
        """Counts one item, named `text`."""
        self._done += 1
        if sys.stderr.isatty():
            bar = "#" * (_WIDTH * self._done // max(self._total, 1))
            seconds = time.monotonic() - self._begin
            line = f"[{bar:.<{_WIDTH}}] {self._done}/{self._total} {seconds:.0f} s  {text}"
            print(f"\r\033[K{line[:118]}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Takes the bar away, so that something else can be printed; the next step draws it again."""
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
