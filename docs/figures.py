"""Makes the figures and printed outputs of pages from the pages: python docs/figures.py

Runs a page's first python block in an empty folder and keeps what it prints and draws, so that a page shows what its
code does. The figures of examples come from the commands on docs/examples.md.
"""

import contextlib
import io
import os
import re
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PAGES = {  # page -> name of what it prints, and of what it draws
    "tutorial/overshoot_report.md": ("overshoot_report.txt", {"overshoot.png": "overshoot_report.png"}),
    "performance.md": ("bytes_per_element.txt", {}),
}


def first_block(page: str) -> str:
    return re.search(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)[1]


def made(page: str) -> tuple[str, dict[str, bytes]]:
    """What the page's first block prints, and the files that it draws, by their names in docs/figures."""
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(printed):
        before = Path.cwd()
        os.chdir(folder)
        try:
            exec(compile(first_block(page), page, "exec"), {"__name__": "__main__"})
            return printed.getvalue(), {name: Path(own).read_bytes() for own, name in PAGES[page][1].items()}
        finally:
            os.chdir(before)


def main() -> None:
    os.environ.setdefault("MPLBACKEND", "Agg")
    for page, (name, _) in PAGES.items():
        text, drawn = made(page)
        (DOCS / "figures" / name).write_text(text)
        for figure, content in drawn.items():
            (DOCS / "figures" / figure).write_bytes(content)


if __name__ == "__main__":
    main()
