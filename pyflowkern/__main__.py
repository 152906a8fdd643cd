"""``python -m pyflowkern``."""

from pyflowkern.cli import main

main()
