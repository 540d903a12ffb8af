"""Types of command-line arguments that several tools take."""

from __future__ import annotations


def positive_number(text: str) -> int:
    """For argparse, which turns the ValueError into its own message."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value
