"""Keep the built pages free of the network: MathJax comes from a Python package, thebe stays out."""

from importlib.metadata import files
from pathlib import Path
from shutil import copyfile

MATHJAX = "mathjax/tex-svg.js"


def copy_mathjax(app):
    """Copy one script of sphinx-mathjax-offline (2 MB); as an extension it would copy 24 MB."""
    source = next(file for file in files("sphinx-mathjax-offline") if str(file).endswith("static/" + MATHJAX))
    target = Path(app.outdir, "_static", MATHJAX)
    target.parent.mkdir(parents=True, exist_ok=True)
    copyfile(source.locate(), target)


def drop_thebe(app, pagename, templatename, context, doctree):
    """Leave out sphinx-thebe's scripts: they name a CDN, and declare a constant twice on every page."""
    kept, seen = [], set()
    for script in context.get("script_files", []):
        body = getattr(script, "attributes", {}).get("body") or ""
        key = (str(getattr(script, "filename", script)), body)
        if "thebe" in key[0] or "THEBE_JS_URL" in body or key in seen:
            continue
        seen.add(key)
        kept.append(script)
    context["script_files"] = kept


def setup(app):
    app.connect("builder-inited", copy_mathjax)
    app.connect("html-page-context", drop_thebe, priority=900)
