"""How much of a teacher a student recovers, task by task, and where it does not.

C_alpha is the share of tasks on which the student has at least (1 - alpha) of the teacher's score,
alpha* the least alpha at which that is half of them (arXiv 2603.15590, appendix A). At alpha* the
other half may have failed badly, which is why the worst are listed beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distill.errors import DistillError


@dataclass(frozen=True)
class WinAndTie:
    """recovery: student's over teacher's score of each task, worst first.

    needed: the least alpha at which each task is won or tied, largest first.
    """

    recovery: dict[str, float]
    needed: dict[str, float]

    @property
    def alpha_star(self) -> float:
        """The least alpha with C_alpha >= 1/2."""
        rising = sorted(self.needed.values())
        return rising[(len(rising) + 1) // 2 - 1]

    def share(self, alpha: float) -> float:
        """C_alpha."""
        return sum(needed <= alpha for needed in self.needed.values()) / len(self.needed)

    def worst(self, count: int) -> list[str]:
        """Names of the tasks that recover least."""
        return list(self.recovery)[:count]


def win_and_tie(student: Mapping[str, float], teacher: Mapping[str, float]) -> WinAndTie:
    """Compare scores by task; more is better, and 0 the least.

    Raises:
        DistillError: the tasks differ, or there are none, or a score is negative.
    """
    if student.keys() != teacher.keys() or not student:
        differing = sorted(student.keys() ^ teacher.keys())
        raise DistillError(
            "win_and_tie: student and teacher must have scores of the same tasks, got"
            f" {', '.join(differing[:3]) if differing else 'none'}"
        )
    for name in student:
        if not (student[name] >= 0 and teacher[name] >= 0):
            raise DistillError(
                f"win_and_tie: scores must be at least 0, got {student[name]} and {teacher[name]}"
                f" for {name}"
            )
    # A teacher at 0 is equalled by anything.
    ratio = {name: student[name] / teacher[name] if teacher[name] else 1.0 for name in student}
    worst_first = sorted(ratio, key=lambda name: ratio[name])
    return WinAndTie(
        {name: ratio[name] for name in worst_first},
        {name: max(0.0, 1.0 - ratio[name]) for name in worst_first},
    )
