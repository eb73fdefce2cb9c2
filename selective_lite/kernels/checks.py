"""Checks: of arguments that every floor has."""

from __future__ import annotations


def one_of(argument: str, value: object, allowed: tuple) -> None:
    """Raise a `ValueError` unless an argument's value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{argument}={value!r} is unknown; choose one of {allowed}")
