"""What the laws need to know of every op, by family: ``tests/ops/test_laws.py`` holds them to the laws."""

import importlib
import pkgutil

CASES = [
    case
    for module in pkgutil.iter_modules(__path__)
    if module.name not in ("nn", "flows")  # cases of layers and flows have laws of their own
    for case in importlib.import_module(f"cases.{module.name}").CASES
]
