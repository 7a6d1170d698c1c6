"""Where a run's time goes: seconds by phase, each second in one phase only."""

import contextlib
import time

import torch


class Stopwatch:
    """Adds up seconds by phase. A phase that begins inside another interrupts it."""

    def __init__(self, device):
        self.device = device
        self.seconds = {}
        self._running = []  # phases that have begun, innermost last
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name):
        self._book()
        self._running.append(name)
        try:
            yield
        finally:
            self._book()
            self._running.pop()

    def take(self):
        """Seconds by phase since the last `take`."""
        self._book()
        taken, self.seconds = self.seconds, {}
        return taken

    def add(self, seconds):
        """Count seconds by phase that another watch has taken."""
        for name, more in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + more

    def _book(self):
        """Count the time since the last call in the phase that has run meanwhile."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # else work is counted where its result is waited for
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] = self.seconds.get(self._running[-1], 0.0) + now - self._since
        self._since = now

    def table(self):
        """Lines: phase, seconds, share; longest first."""
        total = sum(self.seconds.values())
        for name, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            yield f"{name:<12}{seconds:>10.1f} s{seconds / total:>8.1%}"
        yield f"{'all':<12}{total:>10.1f} s"
