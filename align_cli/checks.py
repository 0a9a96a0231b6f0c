"""Checks of settings: each raises `UserError` with one line that says what is allowed. Costs no torch."""

from __future__ import annotations

from align_cli.errors import UserError


def require(ok: bool, message: str) -> None:
    """Raise `UserError(message)` unless `ok`."""
    if not ok:
        raise UserError(message)


def one_of(key: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise `UserError` unless `value` is one of `allowed`."""
    require(value in allowed, f"{key} must be one of {', '.join(allowed)}, got {value!r}")


def require_multiple(key: str, side: int, factor: int, model: str) -> None:
    """Raise `UserError` unless `side` (pixels) is a multiple of `factor`, as `model` needs."""
    near = max(1, round(side / factor)) * factor
    require(
        side % factor == 0,
        f"{key} must be a multiple of {factor} pixels for {model}, got {side}; try {near}",
    )


def require_shares(batch_size: int, processes: int) -> None:
    """Raise `UserError` unless every process gets an equal share of a global batch."""
    require(
        batch_size % processes == 0,
        f"train.batch_size {batch_size} cannot be split over {processes} processes; take a multiple of "
        f"{processes} (it counts the pairs of all processes together)",
    )
