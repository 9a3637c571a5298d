"""What recipes say of losses: layer maps, schedules, names; wrong ones are refused."""

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from distill.errors import DistillError
from distill.losses.module import LossSpec, Schedule
from distill.losses.taps import layer_pairs


def test_layer_maps():
    assert layer_pairs("all", 3, 3) == ((0, 0), (1, 1), (2, 2))
    assert layer_pairs("uniform", 4, 12) == ((0, 2), (1, 5), (2, 8), (3, 11))
    assert layer_pairs("uniform", 2, 3) == ((0, 1), (1, 2))
    assert layer_pairs("uniform", 3, 2) == ((0, 0), (1, 1), (2, 1))
    assert layer_pairs("every-2", 3, 7) == ((0, 1), (1, 3), (2, 5))
    assert layer_pairs("last", 2, 9) == ((1, 8),)
    assert layer_pairs("copied", 3, 6, copied=[0, 2, 4]) == ((0, 0), (1, 2), (2, 4))
    assert layer_pairs([[0, -1]], 2, 9) == ((0, 8),)
    for wrong in ("every-4", "every-0", "every-x", "half", [], [[0]], [[2, 0]], [[0.5, 0]], 3):
        with pytest.raises(DistillError, match="layers must be 'all'"):
            layer_pairs(wrong, 2, 7)
    with pytest.raises(DistillError, match="layers must be 'all'"):
        layer_pairs("all", 2, 7)
    for copied in (None, [0], [0, 7]):  # none, of another student, of another teacher
        with pytest.raises(DistillError, match=r"layers must be .*'copied' \(of a student of"):
            layer_pairs("copied", 2, 7, copied=copied)


def test_schedules():
    def values(**options):
        spec = LossSpec("ce", weight=options)
        return [round(spec.weight_at(step, 11), 3) for step in (0, 5, 10, 50)]

    assert values(start=0.3) == [0.3] * 4
    assert values(kind="linear", start=1, end=0) == [1, 0.5, 0, 0]
    assert values(kind="linear", start=0, end=1, begin=5, until=15) == [0, 0, 0.5, 1]
    assert values(kind="cosine", start=1, end=0.5) == [1, 0.75, 0.5, 0.5]
    assert values(kind="steps", start=2, points=[[5, 1], [50, 0]]) == [2, 1, 1, 0]
    assert LossSpec("ce", weight=0.5).weight_at(3, 10) == 0.5
    assert Schedule.of(Schedule("linear")) == Schedule("linear")


def test_wrong_names_say_the_nearest():
    with pytest.raises(
        DistillError, match=r"loss: name must be one of .* 'kll', did you mean 'kl'"
    ):
        LossSpec("kll")
    with pytest.raises(DistillError, match=r"loss kl: args must be .* did you mean 'temperature'"):
        LossSpec("kl", args={"temprature": 2})
    with pytest.raises(DistillError, match=r"schedule: kind .* did you mean 'cosine'"):
        LossSpec("kl", weight={"kind": "cosin"})
    with pytest.raises(DistillError, match=r"schedule: options .* did you mean 'start'"):
        LossSpec("kl", weight={"star": 1})
    with pytest.raises(DistillError, match="schedule: must be a number"):
        LossSpec("kl", weight="1e-3x")
    for points in ([[5, 1.0], [2, 1.0]], [5, 1.0], [["a", "b"]], 3):
        with pytest.raises(DistillError, match=r"points must be pairs .* in the order"):
            Schedule("steps", points=points)
