"""Phases name what fails inside them, and ranges of a profile."""

import pytest
import torch

from sft.phases import phase, phases_of


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError, KeyboardInterrupt])
def test_an_error_knows_the_phases_that_it_leaves_from_the_innermost_on(kind: type[BaseException]):
    def fail() -> None:
        with phase("warm-up"):
            with phase("forward"):
                pass
            with phase("backward"):
                raise kind("no")

    with pytest.raises(kind) as caught:
        fail()
    assert phases_of(caught.value) == ["backward", "warm-up"]
    assert phases_of(ValueError()) == []


def test_a_profile_shows_the_phases():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, phase("forward"):
        torch.ones(3).sum()
    assert "forward" in {event.key for event in profile.key_averages()}
