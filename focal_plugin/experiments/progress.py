"""What a person sees while runs train: tqdm bars in a terminal, a plain line now and then in a log."""

from __future__ import annotations

import contextlib
import heapq
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from tqdm import tqdm


@dataclass(eq=False)
class RowState:
    """What is known about one row while it waits, trains, and after."""

    title: str
    status: str = "queued"  # queued, waiting (handed to an executor), running, done, diverged, failed
    step: int = 0
    total: int | None = None
    loss: float | None = None
    step_seconds: float | None = None  # None until the first measurement
    started: float = 0.0
    trained: float | None = None  # when the last step was seen; evaluation follows
    ended: float = 0.0
    ap: float = math.nan

    @property
    def left(self) -> bool:
        return self.status in ("queued", "waiting")

    @property
    def evaluating(self) -> bool:
        return self.trained is not None

    def describe(self) -> str:
        """One phrase, such as `OHEM 128/.5 120/400 loss 0.41`."""
        if not self.step:
            return f"{self.title} starting"
        if self.evaluating:
            return f"{self.title} evaluating"
        return f"{self.title} {self.step}/{self.total or '?'} loss {self.loss:.3g}"


def seconds_left(states: Sequence[RowState], parallel: int, now: float) -> float | None:
    """Time until the last row is done, or None while no row has measured a step.

    A row that has not measured anything is taken to be as long as the mean of those that have.
    """
    measured = [s for s in states if s.step_seconds and s.total and s.started and s.status in ("running", "done")]
    if not measured:
        return None
    evaluations = [s.ended - s.trained for s in measured if s.status == "done" and s.evaluating]
    evaluation = statistics.mean(evaluations) if evaluations else 0.0

    def left(state: RowState) -> float:
        return state.step_seconds * (state.total - state.step) + evaluation

    lengths = [(s.ended if s.status == "done" else now + left(s)) - s.started for s in measured]
    typical = statistics.mean(lengths)
    running = [
        left(s) if s in measured else max(typical - (now - s.started), 0.0) for s in states if s.status == "running"
    ]
    slots = running + [0.0] * (parallel - len(running))
    heapq.heapify(slots)
    for _ in range(sum(s.left for s in states)):
        heapq.heapreplace(slots, slots[0] + typical)
    return max(slots)


def summary(states: Sequence[RowState], left: float | None) -> str:
    """One line over all rows, such as `3 done, 1 diverged, 2 running, 6 left; last AP 47.6 (...); about 9 min left`."""
    counts = {
        "done": sum(s.status == "done" for s in states),
        "diverged": sum(s.status == "diverged" for s in states),
        "failed": sum(s.status == "failed" for s in states),
        "running": sum(s.status == "running" for s in states),
        "left": sum(s.left for s in states),
    }
    words = [", ".join(f"{count} {kind}" for kind, count in counts.items() if count or kind in ("done", "left"))]
    done = [s for s in states if s.status == "done" and not math.isnan(s.ap)]
    if done:
        last = max(done, key=lambda s: s.ended)
        words.append(f"last AP {last.ap:.1f} ({last.title})")
    return "; ".join([*words, format_left(left)])


def format_left(seconds: float | None) -> str:
    """A remaining time, as rough as it is known."""
    if seconds is None:
        return "estimating the time left..."
    if seconds < 5:
        return "almost done"
    if seconds < 90:
        return f"about {max(10, round(seconds, -1)):.0f} s left"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"about {minutes} min left"
    return f"about {minutes // 60} h {minutes % 60:02d} min left"


def format_duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def make_progress(states: Sequence[RowState], stream: TextIO) -> Bars | Lines:
    """Bars where they can be drawn, lines elsewhere."""
    # A terminal without a size (some containers have one) or too small for the bars shows nothing of them.
    drawable = stream.isatty() and os.get_terminal_size(stream.fileno()).lines > len(states) + 1
    return (Bars if drawable else Lines)(states, stream)


class Unbreakable:
    """Passes on to a display, and goes on without it when the terminal is gone: the runs are worth more."""

    def __init__(self, display: Bars | Lines):
        self._display = display

    def show(self, left: float | None) -> None:
        with contextlib.suppress(OSError):
            self._display.show(left)

    def event(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._display.event(text)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._display.close()


class Lines:
    """For logs: events at once, the state of the running rows every `period` seconds if it has changed."""

    def __init__(self, states: Sequence[RowState], stream: TextIO, period: float = 10.0):
        self._states, self._stream, self._period = states, stream, period
        self._begun = self._shown = time.monotonic()
        self._last = ""

    def show(self, left: float | None) -> None:
        now = time.monotonic()
        running = ", ".join(s.describe() for s in self._states if s.status == "running")
        if not running or running == self._last or now - self._shown < self._period:
            return
        self._last, self._shown = running, now
        self.event(f"{running}; {summary(self._states, left)}")

    def event(self, text: str) -> None:
        seconds = int(time.monotonic() - self._begun)
        print(f"[{seconds // 60:02d}:{seconds % 60:02d}] {text}", file=self._stream, flush=True)

    def close(self) -> None:
        pass


class Bars:
    """For terminals: one bar per running row under a line with the overall state."""

    def __init__(self, states: Sequence[RowState], stream: TextIO):
        self._states, self._stream = states, stream
        self._overall = tqdm(total=len(states), position=0, leave=False, file=stream, bar_format="{desc}")
        self._bars: dict[int, tqdm] = {}

    def show(self, left: float | None) -> None:
        for index, state in enumerate(self._states):
            if state.status == "running":
                self._draw(index, state)
            elif index in self._bars:
                self._bars.pop(index).close()
        self._overall.set_description_str(summary(self._states, left))

    def event(self, text: str) -> None:
        tqdm.write(text, file=self._stream)

    def close(self) -> None:
        for bar in [*self._bars.values(), self._overall]:
            bar.close()

    def _draw(self, index: int, state: RowState) -> None:
        if index not in self._bars:
            self._bars[index] = self._new_bar(state.title)
        bar = self._bars[index]
        bar.total, bar.n = state.total, state.step
        loss = f"loss {state.loss:.3g}" if state.loss is not None else "starting"
        bar.set_postfix_str("evaluating" if state.evaluating else loss)

    def _new_bar(self, title: str) -> tqdm:
        taken = {abs(bar.pos) for bar in self._bars.values()}
        return tqdm(
            position=next(p for p in range(1, len(taken) + 2) if p not in taken),
            leave=False,
            file=self._stream,
            desc=title.ljust(max(len(s.title) for s in self._states)),
            bar_format="{desc} |{bar:30}| {n_fmt}/{total_fmt}{postfix}",
            total=1,
        )
