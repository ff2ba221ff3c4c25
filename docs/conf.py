"""The site made of this folder: ``make docs``, or ``sphinx-build -W docs build/docs``.

Builds without network. What the API pages show is taken from the docstrings of the package that is
imported, so it has to be the one of this checkout.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import swa_fast  # noqa: E402

project = "swa_fast"
author = "The swa_fast authors"
copyright = author
version = release = swa_fast.__version__
repository = "https://github.com/swa-fast/swa_fast"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"swa_fast {version}"
html_theme_options = {
    "source_repository": repository,
    "source_branch": "main",
    "source_directory": "docs/",
}
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
# Integrations are documented where their libraries are not installed, too.
autodoc_mock_imports = [
    name
    for name in (
        "diffusers",
        "ema_pytorch",
        "lightning",
        "timm",
        "torch_ema",
        "torchvision",
        "transformers",
        "ultralytics",
    )
    if importlib.util.find_spec(name) is None
]
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def to_repository(app: Any, page: str, content: list[str]) -> None:
    """Links to files outside of this folder, as they work in a checkout, lead to the repository."""

    def link(match: re.Match[str]) -> str:
        path = (Path(app.srcdir) / Path(page).parent / match["path"]).resolve()
        if not path.exists():
            raise FileNotFoundError(f"docs/{page}: a link to {match['path']}, which is not there")
        kind = "tree" if path.is_dir() else "blob"
        return f"]({repository}/{kind}/main/{path.relative_to(ROOT)}{match['anchor'] or ''})"

    # A pattern in a table of contents is for pages that need not be there; Sphinx would complain.
    content[0] = re.sub(
        r"(?m)^[\w/]+\*\n",
        lambda found: found[0] if list(Path(app.srcdir).glob(found[0].strip() + ".md")) else "",
        content[0],
    )
    content[0] = re.sub(
        r"(?<!\])\]\((?P<path>(?:\.\./)+[^)#]+?)(?P<anchor>#[^)]*)?\)(?<!\.svg\))(?<!\.png\))",
        link,
        content[0],
    )


def setup(app: Any) -> None:
    app.connect("source-read", to_repository)
