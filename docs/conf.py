"""Sphinx: ``make docs`` builds the pages into out/docs, and fails at a warning."""

import importlib
import re

from sphinx.application import Sphinx
from sphinx.util import logging

from pyflowkern import __version__
from pyflowkern.interop._patches import PATCHES

project = "pyflowkern"
author = "the pyflowkern authors"
project_copyright = author
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3  # links between pages name headings, as on the web view of the repository

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # as the source has them: functions have no text that can be read
python_use_unqualified_type_names = True
napoleon_use_ivar = True  # attributes of a named tuple are described once
napoleon_use_rtype = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css", "gallery.css"]
html_title = f"pyflowkern {version}"
copybutton_prompt_text = ">>> |... |$ "
copybutton_prompt_is_regexp = True

#: Packages whose public names are all in the reference.
REFERENCE = (
    "",
    ".data",
    ".estimation",
    ".flows",
    ".interop",
    ".interop.sbi",
    ".interop.torchdiffeq",
    ".nn",
    ".ode",
    ".ops",
    ".testing",
    ".train",
    ".transport",
)


def name_files(app: Sphinx, page: str, source: list[str]) -> None:
    """Write the paths of files outside the pages as text: links to them work in the repository alone."""
    up = r"\.\./" * (page.count("/") + 1)  # from the page's folder out of docs/
    source[0] = re.sub(rf"(?<!!)\[([^\]]+)\]\({up}([^)]+)\)", r"\1 (`\2`)", source[0])


def find_undocumented(app: Sphinx, error: Exception | None) -> None:
    """Warn of public names without an entry in the reference."""
    found = app.env.domaindata["py"]["objects"]
    wanted = {
        f"{module}.{name}"
        for module in map("pyflowkern{}".format, REFERENCE)
        for name in importlib.import_module(module).__all__
        if not name.startswith("__")
    }
    wanted |= {f"{patch.ours}.{name}" for patch in PATCHES for name in patch.names}
    for name in () if error else sorted(wanted - found.keys()):
        logging.getLogger(__name__).warning("%s is not in the reference", name)


def setup(app: Sphinx) -> None:
    """Connect both: Sphinx calls this."""
    app.connect("source-read", name_files)
    app.connect("build-finished", find_undocumented)
