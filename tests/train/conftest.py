"""What tests of runs share."""

import pytest


@pytest.fixture(autouse=True)
def _without_pictures_at_the_end(request, monkeypatch):
    """Leave out what is drawn when a run ends, half a second each time, but where that is tested."""
    if request.module.__name__.rpartition(".")[2] != "test_pictures":
        monkeypatch.setattr("pyflowkern.train.runner.draw_at_end", lambda module, out: None)
