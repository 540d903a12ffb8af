"""Mutants of real files, and a loop that runs each case under guard: no hang, no command run, no connection made."""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import random
import signal
import sys
from collections import Counter
from contextlib import contextmanager

import pytest

SCALE = float(os.environ.get("FOCAL_FUZZ_CASES", "1"))  # times as many cases
SECONDS = 10  # that a case may take; one that is in order takes milliseconds
JUNK = [None, float("nan"), float("-inf"), 1e308, 0, -1, 2**31, 2**70, 1.5, True, "", "\0", "../../x", "é\u202e"]
JUNK += [[], {}, json.loads("[" * 90 + "]" * 90), "x" * 20_000]
# What a case must not do, by the names under which Python reports it.
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "pty.spawn")


class Hang(BaseException):
    """Not an Exception: what is under test catches all of those."""


class Executed(BaseException):
    """A case has run a command or opened a connection."""


_guarding = False


@sys.addaudithook
def _forbid(event, args):
    if _guarding and event.startswith(_FORBIDDEN):
        raise Executed(f"{event} {args}")


@contextmanager
def guarded(seconds: float = SECONDS):
    """Fail the block with :class:`Hang` or :class:`Executed`; a hang inside of C ends the process with a traceback."""
    global _guarding

    def stop(*_):
        raise Hang(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(6 * seconds, exit=True)
    _guarding = True
    try:
        yield
    finally:
        _guarding = False
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Fuzz:
    """Run the cases of one module and count them: ``outcomes[property][True or False]``, True being accepted."""

    def __init__(self):
        self.outcomes: dict[str, Counter] = {}

    def run(self, name: str, num_cases: int, case) -> None:
        """Run ``case(rng)``, which says whether the mutant was accepted, with fixed seeds.

        Both outcomes must occur: mutants that are all refused, or all accepted, test nothing.
        """
        outcomes = self.outcomes[name] = Counter()
        for seed in range(max(1, int(num_cases * SCALE))):
            try:
                with guarded():
                    outcomes[bool(case(random.Random(f"{name} {seed}")))] += 1
            except BaseException:
                print(f"case {seed} of {name}")
                raise
        assert outcomes[True] and outcomes[False], outcomes

    def assert_ran(self, names: set[str], num_cases: int) -> None:
        """At the end of a module: all its properties had their cases. Needs the whole module to run."""
        assert self.outcomes.keys() == names
        assert sum(sum(outcomes.values()) for outcomes in self.outcomes.values()) >= int(num_cases * SCALE)


@pytest.fixture(scope="module")
def fuzz():
    return Fuzz()


@pytest.fixture(scope="session")
def guard():
    """guard(): a block that must neither hang nor run a command."""
    return guarded


@pytest.fixture(scope="session")
def mutate():
    """mutate.bytes(rng, data, words), mutate.tree(rng, tree, junk), mutate.junk(rng, more)."""
    return Mutate


class Twin(str):
    """A key that json.dumps writes like its like, and that a dict holds beside it."""

    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


class Mutate:
    @staticmethod
    def bytes(rng: random.Random, data: bytes, words=(b"\n",)) -> bytes:
        """Change one to three places of a file: bits, bytes, runs of them, and words that mean something."""
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            start, other = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
            end, last = (place + rng.choice((1, 1, 2, 4, 16, 200)) for place in (start, other))
            odd = rng.choice((rng.randbytes(1), rng.randbytes(4), b"\0", b"\xff\xfe", b"9" * 30))
            flipped = bytes(byte ^ (1 << rng.randrange(8)) for byte in data[start : start + 1])
            changes = [(start + 1, flipped)] * 2 + [(start, odd), (start, rng.choice(words))]
            # A run is deleted, doubled, or overwritten by another; the end is cut off.
            changes += [(end, b""), (start, data[start:end] * rng.choice((1, 50))), (end, data[other:last])]
            kept, new = rng.choice([*changes, (len(data), b"")])
            data = data[:start] + new + data[kept:]
        return data

    @staticmethod
    def tree(rng: random.Random, tree, junk=()):
        """Return a copy of lists and dicts with one to three places changed."""
        tree = copy.deepcopy(tree)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            if places := list(_places(tree)):
                _change(rng, *rng.choice(places), junk)
        return tree

    @staticmethod
    def junk(rng: random.Random, more=()):
        return copy.deepcopy(rng.choice([*JUNK, *more]))


def _places(tree):
    """(container, key) of all that is in a tree."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


def _change(rng, container, key, junk) -> None:
    kind, is_dict = rng.randrange(6), isinstance(container, dict)
    if kind == 0:
        del container[key]
    elif kind == 1 and is_dict:
        container[rng.choice([str(key).swapcase() or "x", f"{key}x", "", "\0", "__class__"])] = container.pop(key)
    elif kind == 2 and is_dict:
        container[Twin(key)] = copy.deepcopy(container[key])
    elif kind == 2:
        container.insert(rng.randrange(len(container) + 1), copy.deepcopy(container[key]))
    elif kind == 3:
        other, place = rng.choice(list(_places(container)))
        container[key] = copy.deepcopy(other[place])
    else:
        container[key] = Mutate.junk(rng, junk)
