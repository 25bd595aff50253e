"""Docstrings as they are written here, made into reStructuredText.

Sections ("Args:", "Raises:", "State:", ...) become lists, one entry a line that begins at the section's indentation. An
entry may hold several arguments, "every: in steps. theta: of the clip."; each gets a line of its own. What would be
markup in an equation (*, |, a_) is text. A name in single backticks leads to its entry in the reference, if it has one.
"""

import ast
import inspect
import itertools
import re
import textwrap

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

import fused_clip_adam as fca

HEADER = re.compile(r"^(?P<title>[A-Z].*):$")
LEAD = re.compile(r"^(?P<title>State|Source|Raises|Returns|Args)(?P<rest>, [^:]+)?: ")
ENTRY = re.compile(r"^(?P<names>`[^`]*`|\*{0,2}[\w.]+(?:, (?:\*{0,2}[\w.]+))*): (?P<text>.*)$")
KEPT = re.compile(r"(`[^`]*`|(?<![\w*])\*\w+\*(?![\w*]))")
FIELDS = ("Args", "Keyword Args", "Attributes", "Raises", "Returns", "State", "Note", "Metrics")


def escaped(line: str) -> str:
    """The line with nothing special in it but backticks and *stressed* words."""
    parts = KEPT.split(line)
    return "".join(part if KEPT.fullmatch(part) else re.sub(r"[*|]|(?<=\w)_(?!\w)", r"\\\g<0>", part) for part in parts)


def entries(block: list[str], parameters: set[str]) -> list[tuple[str, list[str]]]:
    """(names, text) of each entry of a section; names are "" for what is only text."""
    found: list[tuple[str, list[str]]] = []
    for line in block:
        match = None if line.startswith(" ") else ENTRY.match(line)
        if match:
            found.append((match["names"].strip("`"), [match["text"]]))
        elif found and (line.startswith(" ") or not line.strip() or not found[-1][1][-1].endswith(".")):
            found[-1][1].append(line.strip())
        elif line.strip():
            found.append(("", [line.strip()]))
    split: list[tuple[str, list[str]]] = []
    for names, text in found:
        pieces = re.split(r"(?<=[.;]) (?=\w+(?:, \w+)*: )", "\n".join(text))
        split.append((names, pieces[0].split("\n")))
        for piece in pieces[1:]:
            more, rest = piece.split(": ", 1)
            if set(more.split(", ")) <= parameters:
                split.append((more, rest.split("\n")))
            else:
                split[-1][1][-1] += " " + piece.split("\n")[0]
                split[-1][1].extend(piece.split("\n")[1:])
    return split


def is_code(lines: list[str]) -> bool:
    """Whether an indented block begins here that is neither a list nor a chain of stages."""
    block = list(itertools.takewhile(lambda line: line.startswith("    ") or not line.strip(), lines))
    text = "\n".join(block).strip()
    return bool(text) and lines[0].startswith("    ") and not text.startswith(("- ", "* ")) and " -> " not in text


def language_of(block: list[str]) -> str:
    try:
        ast.parse(textwrap.dedent("\n".join(block)))
    except SyntaxError:
        return "text"
    return "python"


def rewritten(lines: list[str], parameters: set[str]) -> list[str]:
    out: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        header = HEADER.match(line)
        block: list[str] = []
        end = at + 1
        while header and end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
            block.append(lines[end][4:])
            end += 1
        if header and any(text.strip() for text in block) and block[0].strip():
            title = header["title"]
            in_field = title in FIELDS
            out += ["", f":{title}:"] if in_field else ["", f"{escaped(title)}:", ""]
            indent = "    " if in_field else ""
            for names, text in entries(block, parameters):
                name = f"**{escaped(names)}**: " if names else ""
                out.append(f"{indent}* {name}{escaped(text[0])}")
                out += [f"{indent}  {escaped(each)}" if each else "" for each in text[1:]]
            out.append("")
            at = end
            continue
        if not line.strip() and is_code(lines[at + 1 :]):
            end = at + 1
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            out += ["", f".. code-block:: {language_of(lines[at + 1 : end])}", "", *lines[at + 1 : end], ""]
            at = end
            continue
        if lead := LEAD.match(line):
            out.append(f"**{lead['title']}{lead['rest'] or ''}.** {escaped(line[lead.end() :])}")
        elif line.strip().startswith("->"):  # a chain goes on
            out.append(escaped(line.strip()))
        else:
            out.append(escaped(line))
        at += 1
    return out


def on_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    try:
        parameters = set(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        parameters = set()
    lines[:] = rewritten(lines, parameters)


def reference_name(text: str) -> str | None:
    """The full name of what the text names, if the reference has it."""
    head = text.removeprefix("fca.").removesuffix("()")
    root, *rest = head.split(".")
    if root not in fca.__all__ or not re.fullmatch(r"[\w.]+", head):
        return None
    found = fca
    for part in (root, *rest):
        found = getattr(found, part, None)
        if found is None:
            return None
    return f"fused_clip_adam.{head}"


def name_role(role, rawtext, text, lineno, inliner, options=None, content=()):
    literal = nodes.literal(text, text)
    target = reference_name(text)
    if target is None:
        return [literal], []
    xref = addnodes.pending_xref(
        "", literal, refdomain="py", reftype="obj", reftarget=target, refexplicit=True, refwarn=False
    )
    return [xref], []


def setup(app: Sphinx) -> dict:
    app.add_role("name", name_role)
    app.connect("autodoc-process-docstring", on_docstring)
    return {"parallel_read_safe": True}
