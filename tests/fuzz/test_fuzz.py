"""The first seeds of every target; ``make fuzz`` runs many more, each in a process that may crash."""

import pytest

from fuzz.cases import TARGETS, run_case


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.filterwarnings("ignore")  # of hostile numbers
def test_random_calls_obey_the_rules(target):
    for seed in range(24):
        run_case(target, seed)
