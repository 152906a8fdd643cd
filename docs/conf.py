"""Sphinx: ``make docs`` builds the pages into out/docs, and fails at a warning."""

import importlib
import re
from types import FunctionType

from sphinx.application import Sphinx
from sphinx.util import logging

from pyflowkern import __version__
from pyflowkern.core.structure import HasPermutations
from pyflowkern.interop._patches import PATCHES

project = "pyflowkern"
author = "the pyflowkern authors"
project_copyright = author
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # formulas without a network
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
pygments_dark_style = "github-dark"  # furo's own underlines names of modules, like links
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


def is_ours(cls: type) -> bool:
    """Whether a class is of this package."""
    return cls.__module__.partition(".")[0] == "pyflowkern"


#: The public classes and their full names.
PUBLIC = {
    cls: f"pyflowkern{package}.{name}"
    for package in REFERENCE
    for name in importlib.import_module(f"pyflowkern{package}").__all__
    if isinstance(cls := getattr(importlib.import_module(f"pyflowkern{package}"), name), type)
    and is_ours(cls)
}
#: Classes whose members are told there, or nowhere: public ones, those of others, and how layers hold their structure.
TOLD = {base for cls in PUBLIC for base in cls.__mro__ if base in PUBLIC or not is_ours(base)}
TOLD.add(HasPermutations)
# of a private base class a public one has the members
autodoc_default_options = {
    "inherited-members": ",".join(sorted(cls.__name__ for cls in TOLD)),
    "show-inheritance": True,
}


def inherited_from(cls: type) -> list[type]:
    """Return a class and the private ones of its bases whose members are told with it."""
    mro = cls.__mro__[1:]
    end = next(i for i, base in enumerate(mro) if base in TOLD)
    return [cls, *mro[:end]]


def members_of(cls: type) -> set[str]:
    """Return the names of the public methods and properties that are told with a class."""
    return {
        name
        for base in inherited_from(cls)
        for name, value in vars(base).items()
        if not name.startswith("_") and isinstance(value, FunctionType | property | classmethod)
    }


def show_public_bases(
    app: Sphinx, name: str, cls: type, options: object, bases: list[type]
) -> None:
    """In place of private bases show what these are derived from."""
    shown = [  # NamedTuple is a function
        next(b for b in base.__mro__ if b in TOLD) if isinstance(base, type) else base
        for base in bases
    ]
    bases[:] = [base for base in dict.fromkeys(shown) if base is not object]


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
    wanted |= {f"{full}.{name}" for cls, full in PUBLIC.items() for name in members_of(cls)}
    for name in () if error else sorted(wanted - found.keys()):
        logging.getLogger(__name__).warning("%s is not in the reference", name)


def setup(app: Sphinx) -> None:
    """Connect all: Sphinx calls this."""
    app.connect("source-read", name_files)
    app.connect("autodoc-process-bases", show_public_bases)
    app.connect("build-finished", find_undocumented)
