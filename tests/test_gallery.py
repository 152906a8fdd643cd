"""The gallery shows every example, and only what is committed."""

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # bench is not part of the installed package
from bench._gallery import MOST_BYTES, NUMBERS, flatten, page, write
from bench._gallery_entries import ENTRIES

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/gallery.md").read_text()
SCRIPTS = sorted(p.stem for p in (ROOT / "examples").glob("*.py") if p.stem != "common")


def test_the_page_is_that_of_the_committed_numbers():
    assert page() == PAGE


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_example_has_its_picture_and_its_command(name):
    (section,) = (part for part in PAGE.split("\n## ") if f"(../examples/{name}.py)" in part)
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", section)
    assert 5000 < (ROOT / "docs" / picture).stat().st_size < MOST_BYTES
    assert f"`python examples/{name}.py" in section
    assert re.search(r"\*\*-?[\d.]+", section), "no number"


def test_numbers_come_from_full_runs():
    commands = {entry.script: entry.command for entry in ENTRIES}
    for name, kept in json.loads(NUMBERS.read_text()).items():
        assert kept["command"] == commands[name]
        assert "--quick" not in kept["command"]
        assert kept["minutes"] > 0
        assert kept["seed"] == 0


def test_results_of_scripts_are_flattened():
    assert flatten(2.0) == {"result": 2.0}
    found = {"a": (1.0, 0.123456), 3.0: {"b": [2.0]}}
    assert flatten(found) == {"a: 0": 1.0, "a: 1": 0.1235, "3.0: b: 0": 2.0}


def test_only_examples_of_the_gallery_are_run():
    with pytest.raises(ValueError, match="no such script"):
        write(["digits_bridge"])
