"""Two gloo processes against one: see two_processes.py for how they are launched."""

import pytest
from two_processes import checks, outcomes


@pytest.mark.parametrize("check", checks("sharded_checks"))
def test_sharded_parameters(check):
    result = outcomes("sharded_checks")[check]
    assert result == "ok", result
