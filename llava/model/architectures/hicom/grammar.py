"""What ``mm_projector_type`` of HICom says: "local43_adaptkv_global32_guidecoarse" and the like.

``local`` is followed by one digit for the temporal kernel and one or two for the spatial one, ``global`` by the number
of queries. After ``adapt`` come the letters of what is adapted (q, k, v, g), after ``guide`` how the instruction is
injected; a branch without that word has the config's ``use_guide``.
"""

from __future__ import annotations

import dataclasses
import re

from llava.model.checkpoint import CheckpointError

MODES = ("off", "direct", "coarse", "fine")


@dataclasses.dataclass(frozen=True)
class Local:
    """The local branch: blocks of ``temporal`` x ``spatial`` x ``spatial`` patches; ``adapt``: letters of "qkvg"."""

    temporal: int
    spatial: int
    adapt: str
    mode: str


@dataclasses.dataclass(frozen=True)
class Global:
    """The global branch: ``queries`` tokens; ``adapt_guide``: whether the instruction is adapted."""

    queries: int
    adapt_guide: bool
    mode: str


def is_compressor(kind: object) -> bool:
    """Whether a projector type names one of the two branches."""
    return re.search(r"(local|global)\d", str(kind)) is not None


def branches(kind: str, use_guide: str | None) -> tuple[Local | None, Global | None]:
    """The two branches of a projector type, None for one that it does not name.

    Raises:
        CheckpointError: numbers or modes that nothing is known of.
    """
    return _local(kind, use_guide), _global(kind, use_guide)


def with_mode(kind: str, branch: str, mode: str) -> str:
    """The projector type that says ``mode`` for a branch ("local" or "global") in so many words."""
    start = kind.index(branch)
    end = re.search(r"_?(local|global)\d", kind[start + 1 :])
    at = len(kind) if end is None else start + 1 + end.start()
    return f"{kind[:at]}_guide{mode}{kind[at:]}"


def mode_of(word: object) -> str:
    """One of :data:`MODES`.

    Raises:
        CheckpointError: another word.
    """
    mode = "off" if word in (None, "", False) else str(word)
    if mode not in MODES:
        raise CheckpointError(f"HICom injects the instruction in one of the ways {', '.join(MODES)}, got {mode!r}.")
    return mode


def _phase(kind: str, own: str, other: str) -> str:
    return kind.rpartition(own)[2].partition(other)[0]


def _mode(phase: str, use_guide: str | None) -> str:
    return mode_of(phase.rpartition("guide")[2].partition("_")[0] if "guide" in phase else use_guide)


def _local(kind: str, use_guide: str | None) -> Local | None:
    if "local" not in kind:
        return None
    phase = _phase(kind, "local", "global")
    digits = re.match(r"(\d)(\d{1,2})(?!\d)", phase)
    if digits is None or "0" in (digits[1], digits[2]):
        raise CheckpointError(
            f"mm_projector_type {kind!r}: behind 'local' come one digit for time and one or two for height and width."
        )
    letters = re.match(r"[qkvg]*", phase.rpartition("adapt")[2])[0] if "adapt" in phase else ""
    return Local(int(digits[1]), int(digits[2]), letters, _mode(phase, use_guide))


def _global(kind: str, use_guide: str | None) -> Global | None:
    if "global" not in kind:
        return None
    phase = _phase(kind, "global", "local")
    digits = re.match(r"[1-9]\d*", phase)
    if digits is None:
        raise CheckpointError(f"mm_projector_type {kind!r}: behind 'global' comes the number of queries.")
    return Global(int(digits[0]), "adaptg" in phase, _mode(phase, use_guide))
