"""Mutants of real files, and a loop that runs each case under guard: no hang, no command run, no connection made."""

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
SECONDS = 10  # of CPU time that a case may take, six times that of waiting; one that is in order takes milliseconds
JUNK = [None, float("nan"), float("-inf"), 1e308, 0, -1, 2**31, 2**70, 1.5, True, "", "\0", "../../x", "é\u202e"]
JUNK += [[], {}, json.loads("[" * 90 + "]" * 90), "x" * 20_000]
# What a case must not do, by the names under which Python reports it.
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "pty.spawn")


_guarding = False


@sys.addaudithook
def _forbid(event, args):
    if _guarding and event.startswith(FORBIDDEN):
        pytest.fail(f"{event} {args}")  # no Exception, as what is under test catches all of those


@contextmanager
def guarded():
    """Fail a block that computes on, runs a command or connects; end the process, with a traceback, if it waits."""
    global _guarding
    signal.signal(signal.SIGPROF, lambda *_: pytest.fail(f"still running after {SECONDS} s of CPU time"))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    faulthandler.dump_traceback_later(6 * SECONDS, exit=True)
    _guarding = True
    try:
        yield
    finally:
        _guarding = False
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_PROF, 0)


def run_cases(name, num_cases, case):
    """Run ``case(rng)``, which says whether the mutant was accepted, with fixed seeds."""
    outcomes = Counter()
    for seed in range(max(1, int(num_cases * SCALE))):
        print(f"case {seed} of {name}")  # the last one is shown where it fails
        with guarded():
            outcomes[bool(case(random.Random(f"{name} {seed}")))] += 1
    assert outcomes[True] and outcomes[False], f"all refused, or all accepted, test nothing: {outcomes}"


def mutate_bytes(rng: random.Random, data: bytes, words=(b"\n",)) -> bytes:
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


def mutate_tree(rng: random.Random, tree, junk=()):
    """Return a copy of lists and dicts with one to three places deleted, renamed, doubled, or other than they were."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            break
        (container, key), (elsewhere, place) = rng.choice(places), rng.choice(places)
        kind = rng.choice(["delete", "rename", "double", "other", "other", "other"])
        if kind == "delete":
            del container[key]
        elif kind == "rename" and isinstance(container, dict):
            container[rng.choice([str(key).swapcase() or "x", f"{key}x", "", "\0", "__class__"])] = container.pop(key)
        elif kind == "double" and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        else:
            container[key] = copy.deepcopy(rng.choice([elsewhere[place], *[rng.choice([*JUNK, *junk])] * 2]))
    return tree


def _places(tree):
    """Yield (container, key) of all that is in a tree."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _places(value)
