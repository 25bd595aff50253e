"""Links out of docs/ stay inside of the site: a file of the repository that a page links to becomes a page as well.

Pages are written for a reader of the repository: `[step.cpp](../csrc/cpu/step.cpp)`. Here such a link leads to
files/csrc/cpu/step.cpp.html, the file with its lines coloured and, where it is Python, an anchor at every definition;
a link to a folder leads to a list of its files. A page named in `repository_pages` has the text of another file, whose
links are taken from where that file is. `name?` in a toctree is left out as long as there is no such page.
"""

import os
import re
from html import escape
from pathlib import Path

from docutils import nodes
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent.parent
LINK = re.compile(r"(?P<image>!?)(?P<text>\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")
OPTIONAL = re.compile(r"^([\w/-]+)\?\n", re.MULTILINE)
FENCE = re.compile(r"^(```|~~~)", re.MULTILINE)


def relinked(text: str, base: Path, page: Path, links: dict[str, str]) -> str:
    """The text of a file in `base` as text of `page`."""

    def link(match: re.Match) -> str:
        target = Path(os.path.normpath(base / match["path"]))
        if not target.exists() or not target.is_relative_to(ROOT):
            return match[0]
        path, anchor = target.relative_to(ROOT).as_posix(), match["anchor"] or ""
        own = ROOT / "docs" / links[path] if path in links else target
        inside = own.is_relative_to(ROOT / "docs") and own.suffix == ".md"
        if inside or match["image"]:
            new = os.path.relpath(own, page.parent)
            return f"{match['image']}{match['text']}({new}{anchor})"
        return f"{match['text']}(repository:{path}{anchor})"

    parts, inside_code = [], False
    for line in text.splitlines(keepends=True):
        if FENCE.match(line):
            inside_code = not inside_code
        parts.append(line if inside_code else LINK.sub(link, line))
    return "".join(parts)


def on_source_read(app: Sphinx, docname: str, source: list[str]) -> None:
    page = Path(app.env.doc2path(docname))
    if page.suffix != ".md":
        return
    base = page.parent
    if docname in app.config.repository_pages:
        file = ROOT / app.config.repository_pages[docname]
        app.env.note_dependency(str(file))
        source[0], base = file.read_text(), file.parent
    source[0] = OPTIONAL.sub(lambda match: match[1] + "\n" if (base / f"{match[1]}.md").exists() else "", source[0])
    source[0] = relinked(source[0], base, page, app.config.repository_links)


def on_doctree_resolved(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    for node in doctree.findall(nodes.reference):
        uri = node.get("refuri", "")
        if uri.startswith("repository:"):
            path, _, anchor = uri.removeprefix("repository:").partition("#")
            path = path.rstrip("/")
            add(app.env.repository_files, path)
            relative = app.builder.get_relative_uri(docname, f"files/{path}")
            node["refuri"] = relative + (f"#{anchor}" if anchor else "")
            node["internal"] = True


def add(files: set[str], path: str) -> None:
    """A file; or a folder and the files in it."""
    if path not in files:
        files.add(path)
        if (ROOT / path).is_dir():
            for each in sorted((ROOT / path).iterdir()):
                if each.is_file() and not each.name.startswith("."):
                    files.add(each.relative_to(ROOT).as_posix())


def pages(app: Sphinx):
    for path in sorted(app.env.repository_files):
        name, file = f"files/{path}", ROOT / path
        if file.is_dir():
            inside = [f for f in sorted(app.env.repository_files) if Path(f).parent == Path(path)]
            items = "".join(
                f'<li><a href="{app.builder.get_relative_uri(name, f"files/{f}")}">{escape(Path(f).name)}</a></li>'
                for f in inside
            )
            body = f"<ul>{items}</ul>"
        else:
            body = coloured(app, file)
        yield name, {"title": path, "body": f"<h1><code>{escape(path)}</code></h1>\n{body}"}, "page.html"


def coloured(app: Sphinx, file: Path) -> str:
    try:
        text = file.read_text()
    except UnicodeDecodeError:
        return "<p>Not a text.</p>"
    try:
        language = "cpp" if file.suffix in (".h", ".cu") else get_lexer_for_filename(file.name).aliases[0]
    except (ClassNotFound, IndexError):
        language = "text"
    lines = app.builder.highlighter.highlight_block(text, language, opts={}, location=str(file)).split("\n")
    for number, line in enumerate(text.split("\n")):
        definition = re.match(r"\s*(?:async )?(?:def|class) (\w+)", line) if file.suffix == ".py" else None
        if definition and number < len(lines):
            lines[number] = re.sub(
                "^(.*<pre><span></span>)?", rf'\g<0><span id="{definition[1]}"></span>', lines[number]
            )
    return "\n".join(lines)


def on_builder_inited(app: Sphinx) -> None:
    app.env.repository_files = set()


def setup(app: Sphinx) -> dict:
    app.add_config_value("repository_pages", {}, "env")
    app.add_config_value("repository_links", {}, "env")
    app.connect("builder-inited", on_builder_inited)
    app.connect("source-read", on_source_read)
    app.connect("doctree-resolved", on_doctree_resolved)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": False}
