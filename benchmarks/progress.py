"""A progress bar on standard error: one rewritten line on a terminal, a line now and then elsewhere."""

import sys
import time

_WIDTH = 30
_LOG_EVERY_S = 10.0


class Progress:
    """Counts finished items out of a total."""

    def __init__(self, total: int, title: str):
        self._total, self._title, self._done = max(total, 1), title, 0
        self._begin = time.monotonic()
        self._logged = float("-inf")

    def step(self, text: str, count: int = 1) -> None:
        """Counts `count` finished items; `text` says what was last."""
        self._done += count
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if not terminal and self._done < self._total and now - self._logged < _LOG_EVERY_S:
            return
        self._logged = now
        filled = _WIDTH * self._done // self._total
        line = (
            f"{self._title} [{'#' * filled}{'.' * (_WIDTH - filled)}] {self._done}/{self._total} "
            f"{now - self._begin:.0f} s  {text}"
        )
        end = "" if terminal and self._done < self._total else "\n"
        print(f"\r\033[K{line}" if terminal else line, end=end, file=sys.stderr, flush=True)
