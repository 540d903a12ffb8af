"""The fixtures of mutants.py, which is a module of its own because its classes are pickled by their module's name."""

from mutants import fuzz, guard, mutate  # noqa: F401
