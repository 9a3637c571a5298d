"""Our rows beside the peers' rows of the same run and case: the lines of tables and plots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .rows import Row


@dataclass(frozen=True)
class Entry:
    """One of our measured variants of a case, and the peers measured in turn with it, by family."""

    ours: Row
    peers: dict[str, Row]

    @property
    def label(self) -> str:
        name = f"{self.ours.op} {self.ours.direction}"
        place = self.ours.backend.removeprefix("cpu").strip()
        plain = self.ours.dtype == "f32" and self.ours.op not in ("kl_div", "topk_kl_div")
        dtype = "" if plain else f" {self.ours.dtype}"
        return f"{name}{dtype}{', ' if place else ''}{place}\n{self.ours.shape}"

    def speed_up(self, peer: str) -> float:
        """How many times faster than the peer; below 1 is slower."""
        return self.peers[peer].time_us / self.ours.time_us


def family(backend: str) -> str:
    """A peer's name without its setting: "eager, chunks of 64" is one of several "eager"."""
    return backend.partition(",")[0]


def entries(rows: Iterable[Row]) -> list[Entry]:
    """In the order of the rows. Only rows of one date and case are compared; of a family of peers
    the fastest counts."""
    measured = [row for row in rows if row.measured]
    found = []
    for row in measured:
        if row.ours:
            same = [r for r in measured if (r.date, r.case) == (row.date, row.case) and not r.ours]
            peers: dict[str, Row] = {}
            for peer in same:
                name = family(peer.backend)
                peers[name] = min(peer, peers.get(name, peer), key=lambda r: r.time_us)
            found.append(Entry(row, peers))
    return found
