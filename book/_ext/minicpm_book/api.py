"""``{api} PART``: the reference of every public module of one part, found by walking the package.

A new module appears by itself. A section links to the chapter that teaches the module, where there is one.
"""

import pkgutil
from importlib import import_module

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from .tables import parse

PACKAGE = "minicpm_lite"


def public_modules(name: str) -> list[str]:
    """A module, or a package's public modules (itself first where it documents anything), sorted.

    >>> public_modules("json")
    ['json', 'json.decoder', 'json.encoder', 'json.scanner', 'json.tool']
    """
    module = import_module(name)
    inside = [
        found
        for info in pkgutil.iter_modules(getattr(module, "__path__", []), name + ".")
        if not info.name.rpartition(".")[2].startswith("_")
        for found in public_modules(info.name)
    ]
    return [name, *inside] if module.__doc__ else inside


class Api(SphinxDirective):
    """``{api} language``: one section for each module of ``minicpm_lite.language``."""

    required_arguments = 1

    def run(self):
        self.env.note_reread()
        return [self.section(name) for name in public_modules(f"{PACKAGE}.{self.arguments[0]}")]

    def section(self, name: str) -> nodes.section:
        section = nodes.section(ids=[nodes.make_id("module " + name)], names=[name])
        section += nodes.title("", "", nodes.literal(text=name.removeprefix(PACKAGE + ".")))
        chapter = "notebooks/" + "/".join(name.split(".")[1:])
        if chapter in self.env.app.config.external_site_map:
            section += parse(self, f"Taught in: {{doc}}`/{chapter}`.")
        options = "   :members:\n   :member-order: bysource\n   :ignore-module-all:\n"
        section += parse(self, f"```{{eval-rst}}\n.. automodule:: {name}\n{options}```")
        return section


def disarm_property(app, what, name, obj, options, lines):
    """Keep napoleon from reading "The scale: 1 or less." as a property of the type "The scale"."""
    if what == "property":
        lines[:0] = ["..", ""]  # it looks at the first line only; this one is an empty comment


def indented_is_code(app, what, name, obj, options, lines):
    """In a module's docstring an indented block after a paragraph is code, as in Markdown."""
    if what != "module":
        return
    for number in range(len(lines) - 1, 0, -1):
        if lines[number].startswith("    ") and not lines[number - 1].strip():
            paragraph = next((line for line in reversed(lines[:number]) if line.strip()), "")
            if paragraph and not paragraph.startswith((" ", "-", "*", "..")) and not paragraph.endswith("::"):
                lines[number:number] = ["::", ""]


def only_exported(app, what, name, obj, skip, options):
    """Show what the module's ``__all__`` names; autodoc would sort those by name, not as the source reads."""
    module = import_module(app.env.temp_data.get("autodoc:module") or PACKAGE)
    exported = getattr(module, "__all__", None)
    return True if what == "module" and exported is not None and name not in exported else None


def setup(app):
    app.connect("autodoc-process-docstring", disarm_property, priority=100)
    app.connect("autodoc-process-docstring", indented_is_code, priority=100)
    app.connect("autodoc-skip-member", only_exported)
    app.add_directive("api", Api)
