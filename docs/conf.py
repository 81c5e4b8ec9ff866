"""How the site is built: `make docs` writes docs/_build/html."""

from __future__ import annotations

import ast
import html
import importlib
import inspect
import re
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_origin

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]

import reference  # noqa: E402
import run_notebooks  # noqa: E402
from docutils.nodes import SkipNode  # noqa: E402
from docutils.utils.math import MathError  # noqa: E402
from docutils.utils.math.latex2mathml import tex2mathml  # noqa: E402
from sphinx.addnodes import desc_signature  # noqa: E402
from sphinx.domains.python import PyObject  # noqa: E402
from sphinx.ext.napoleon.docstring import GoogleDocstring  # noqa: E402
from sphinx.util import logging  # noqa: E402
from sphinx.util.docutils import SphinxDirective  # noqa: E402
from sphinx.util.inspect import stringify_signature  # noqa: E402

import pyro_vmem  # noqa: E402
from pyro_vmem._utils import checks  # noqa: E402

project = "pyro_vmem"
author = "The pyro_vmem authors"
copyright = "the pyro_vmem authors"
version = release = pyro_vmem.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!pyro_vmem).*"),  # names of other projects, and type variables
    ("py:class", r"pyro_vmem\.\w+\.\w+\.\w+"),  # classes that no folder exports
    ("py:class", r"pyro_vmem\..*\.(AnyFigure|Collection)"),  # a type variable, and a class that users do not make
    ("py:mod", r"pyro_vmem\..*"),  # modules without a page of their own
]

# Text

myst_enable_extensions = ["dollarmath", "colon_fence", "html_image"]
myst_heading_anchors = 3
# The tables of pages are made as the site is built. Notebooks have the outputs of the last `make notebooks`.
nb_execution_mode = "cache"
nb_execution_excludepatterns = ["notebooks/*"]
nb_execution_cache_path = str(DOCS / "_build" / "cells")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_render_markdown_format = "myst"  # for tables

# Docstrings

default_role = "code"  # what stands between single backticks
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
maximum_signature_line_length = 90
python_use_unqualified_type_names = True

# Pages

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"pyro_vmem {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False


def copy_notebooks() -> None:
    """Copies the notebooks, with the outputs of their last full run, to where Sphinx looks for pages."""
    names = [path.stem for path in (ROOT / "notebooks").glob("*.ipynb")]
    reference.write_all(DOCS / "notebooks", {f"{name}.ipynb": run_notebooks.with_outputs(name) for name in names})


def find_public(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Links `pyro_vmem.memory.Memory`, as signatures have it, and `Memory` to `pyro_vmem.Memory`, where its text is."""
    target, names = node.get("reftarget", ""), app.public_names
    head, _, tail = target.rpartition(".")
    full = names.get(target) or (f"{names[head]}.{tail}" if head in names else None)
    if node.get("refdomain") != "py" or full is None or full == target:
        return None
    domain = env.domains.python_domain
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", full, node, contnode)


class Ladder(SphinxDirective):
    """The order of modules that the tests hold, with what each is for."""

    def run(self) -> list[Any]:
        """The list."""
        source = ast.parse((ROOT / "tests" / "project" / "test_layering.py").read_text())
        order = next(
            [item.value for item in node.value.elts]
            for node in source.body
            if isinstance(node, ast.Assign) and node.targets[0].id == "ORDER"
        )
        lines = []
        for name in order:
            doc = inspect.getdoc(importlib.import_module(f"pyro_vmem.{name}")) or ""
            lines.append(f"1. `{name}`: {doc.splitlines()[0] if doc else 'the version.'}")
        nodes: list[Any] = self.parse_text_to_nodes("\n".join(lines))
        return nodes


# Between a function's name and an argument without brackets.
APPLIED = re.compile(r"<mo>&ApplyFunction;</mo>(?=\s*<m(?!row|o\b))")


def formula(translator: Any, node: Any, block: bool) -> None:
    """Writes a formula that browsers draw themselves: no script, and nothing to fetch."""
    try:
        text = APPLIED.sub('<mspace width="0.17em"></mspace>', tex2mathml(node.astext(), as_block=block))
    except MathError as error:
        logging.getLogger(__name__).warning("formula %r: %s", node.astext(), error, location=node)
        text = html.escape(node.astext())
    translator.body.append(f'<div class="formula">{text}</div>' if block else text)
    raise SkipNode


def repository_links(app: Any, docname: str, source: list[str]) -> None:
    """Names files of the repository that are not on the site, in place of a link."""
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", source[0])


def defined_names(app: Any, doctree: Any) -> None:
    """Lets a name also be found by the module that defines it, as pages of source code link to it."""
    defined = {full: name for name, full in app.public_names.items() if name.startswith("pyro_vmem.")}
    for node in doctree.findall(desc_signature):
        for full in list(node["ids"]):
            head, _, tail = full.rpartition(".")
            alias = defined.get(full) or (f"{defined[head]}.{tail}" if head in defined else full)
            if alias != full:
                node["ids"].append(alias)


RANGE = re.compile(r"~?(?:typing\.)?Annotated\[\w+, _Within\(.*?words='(.*?)'\)\]")
RANGES = {hint.__metadata__[0].words: name for name, hint in vars(checks).items() if get_origin(hint) is Annotated}


def own_signature(app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returned: str) -> Any:
    """Shows the arguments of a part's `__init__`, as `Part.__new__` takes any, and ranges by their names."""
    if what != "class" or not issubclass(obj, pyro_vmem.Part) or "__init__" not in vars(obj):
        return signature and (RANGE.sub(lambda found: RANGES[found[1]], signature), returned)
    taken = inspect.signature(obj.__init__)
    shown = taken.replace(parameters=list(taken.parameters.values())[1:], return_annotation=taken.empty)
    return stringify_signature(shown), returned


def setup(app: Any) -> None:
    """What Sphinx calls first."""
    app.connect("source-read", repository_links)
    app.connect("autodoc-process-signature", own_signature)
    app.connect("doctree-read", defined_names)
    inline, displayed = (partial(formula, block=block) for block in (False, True))
    app.add_html_math_renderer("mathml", (inline, None), (displayed, None))
    # "The bias: how far ..." on a property is text, not a type before a colon.
    GoogleDocstring._consume_inline_attribute = lambda self: (
        "",
        self.__class__(self._consume_to_end(), self._config).lines(),
    )
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.add_directive("ladder", Ladder)
    copy_notebooks()
    reference.write_all(DOCS / "api", reference.pages())
    app.public_names = reference.canonical_names()
    app.connect("missing-reference", find_public)
