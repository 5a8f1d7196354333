"""The recipe for each kind of start, and the schedule."""

from __future__ import annotations

import numpy as np
import pytest

from pomona.backbone.weights import Weights
from pomona.finetune.recipe import Plan, Recipe, adapt, learning_rate_factor


@pytest.mark.parametrize("teacher, blend", [("start", 0.8), ("none", 0.8), ("another", 1.0)])
def test_what_is_matched_to_another_network_goes_all_the_way(teacher: str, blend: float) -> None:
    start, another = Weights("a.pth", "1"), Weights("b.pth", "2")
    named = {"start": start, "none": None, "another": another}[teacher]
    assert adapt(Recipe(), start, named).blend == blend


def test_a_plan_of_seconds_ends_at_its_end_at_any_speed() -> None:
    for speeds in ([0.5], [0.2] * 50 + [0.9] * 500, [1.0] * 20 + [0.1] * 5000):
        plan, clock, n = Plan(seconds=60.0), 0.0, 0
        while plan.share < 1:
            took = speeds[min(n, len(speeds) - 1)]
            plan.advance(took)
            clock, n = clock + took, n + 1
        assert 55 < clock < 65


def test_a_pause_is_not_time_spent() -> None:
    plan = Plan(seconds=100.0)
    for _ in range(10):
        plan.advance(1.0)
    plan.advance(3600.0)  # the machine slept
    assert plan.share < 0.3


def test_a_pause_in_the_first_step_is_not_the_machine_s_speed() -> None:
    plan = Plan(seconds=600.0)
    for took in (900.0, 0.5, 0.5, 0.5):
        plan.advance(took)
    assert plan.share < 0.05 and plan.spent <= 62 and plan.typical == 0.5


def test_steps_and_seconds_whichever_comes_first() -> None:
    plan = Plan(steps=10, seconds=1000.0)
    for _ in range(10):
        plan.advance(1.0)
    assert plan.share == 1


def test_rates_rise_then_fall() -> None:
    rates = [learning_rate_factor(share, 0.1) for share in np.linspace(0, 1, 101)]
    assert rates[0] < 0.02 and max(rates) == pytest.approx(1) and rates[-1] == pytest.approx(0)
    assert int(np.argmax(rates)) == 10
