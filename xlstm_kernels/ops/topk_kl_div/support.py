"""What a teacher of few words says of all the others."""

from __future__ import annotations

# In the order of csrc/launch.h's enum.
SUPPORTS = ("tail", "renormalized", "both", "truncated", "sampled")
# Those that need to know the teacher's mass outside.
WITH_TAIL = ("tail", "truncated")
# Those where the student has mass that the teacher says nothing of: KL(q|p) is infinite.
OPEN = ("renormalized", "sampled")
