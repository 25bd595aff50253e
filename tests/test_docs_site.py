"""The documentation site: it builds without a warning, loads nothing from elsewhere, and its reference is complete."""

import ast
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("sphinx", reason="Sphinx is not installed: make venv")
pytest.importorskip("myst_parser", reason="MyST is not installed: make venv")

import fused_clip_adam as fca

pytestmark = pytest.mark.xdist_group("docs site")  # one worker builds it

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Adapters that a reader calls; what only they share (clipping, metrics, surrogate) is not public.
INTEGRATIONS = (
    "handover",
    "lightning",
    "rsl_rl",
    "stable_baselines3",
    "torchrl",
    "transformers",
    "trl",
    "verl",
)
SHARED_BY_INTEGRATIONS = {"clipping", "metrics", "surrogate"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built where no connection can be made: the proxies lead nowhere."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = ["--builder", "html", "--fail-on-warning", "--keep-going", "--quiet", "--doctree-dir", f"{folder}/trees"]
    ran = subprocess.run(
        [sys.executable, "-m", "sphinx", *command, str(DOCS), f"{folder}/html"],
        env={**os.environ, **nowhere},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-5000:]
    return folder / "html"


class Loads(HTMLParser):
    """What a browser fetches to show a page, where its links lead, and the anchors it has."""

    ATTRIBUTES = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "object": "data"}

    def __init__(self):
        super().__init__()
        self.loaded, self.links, self.ids = [], [], set()

    def handle_starttag(self, tag, attributes):
        own = dict(attributes)
        if "id" in own:
            self.ids.add(own["id"])
        if tag == "link" and own.get("rel") not in ("canonical", "author", "copyright"):
            self.loaded.append(own.get("href") or "")
        elif tag in self.ATTRIBUTES and own.get(self.ATTRIBUTES[tag]):
            self.loaded.append(own[self.ATTRIBUTES[tag]])
        elif tag == "a" and own.get("href"):
            self.links.append(own["href"])


def read(path: Path) -> Loads:
    parser = Loads()
    parser.feed(path.read_text())
    return parser


def test_no_page_loads_anything_from_another_host(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        for address in read(page).loaded:
            parts = urlsplit(address)
            assert not parts.netloc and parts.scheme in ("", "data"), f"{page.relative_to(site)} loads {address}"
            if parts.path and parts.scheme != "data":
                assert (page.parent / unquote(parts.path)).exists(), f"{page.relative_to(site)} lacks {address}"
    for style in site.rglob("*.css"):
        for address in re.findall(r"@import[^;]*|url\(([^)]*)\)", style.read_text()):
            assert not re.match(r"['\"]?(?:https?:)?//", address), f"{style.name} loads {address}"
    for script in site.rglob("*.js"):
        found = re.findall(r"(?:import|fetch|importScripts)\s*\(\s*['\"](?:https?:)?//[^'\"]+", script.read_text())
        assert not found, f"{script.name} loads {found}"


def test_links_lead_to_pages_and_anchors(site):
    pages = {page.resolve(): read(page) for page in site.rglob("*.html") if "_modules" not in page.parts}
    checked = 0
    for page, own in pages.items():
        for address in own.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.exists(), f"{page.relative_to(site.resolve())} links to {address}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{page.relative_to(site.resolve())}: {address}"
                checked += 1
    assert checked > 500


def test_mathematics_is_drawn_by_the_browser_alone(site):
    page = (site / "mathematics.html").read_text()
    assert page.count("<math") > 50 and "MathJax" not in page and "katex" not in page
    assert not re.search(r"\\(?:frac|sqrt|text|beta)\b", re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL))


def documented(site) -> list[str]:
    """The ids of all entries of the reference, one for each time that one is written."""
    pages = [page.read_text() for page in sorted((site / "api").glob("*.html"))]
    return [name for page in pages for name in re.findall(r'<dt class="sig[^>]*id="([^"]+)"', page)]


def test_every_public_name_is_in_the_reference_once(site):
    names = documented(site)
    modules = {"presets": fca.presets.__all__, "theory": functions_of(fca.theory)}
    public = {name for name in fca.__all__ if name not in modules}
    public |= {f"{module}.{name}" for module, own in modules.items() for name in own}
    for name in public:
        assert names.count(f"fused_clip_adam.{name}") == 1, name
    top = {name.removeprefix("fused_clip_adam.") for name in names if name.count(".") == 1}
    assert top <= public, "the reference has what is not public"


def functions_of(module) -> list[str]:
    tree = ast.parse(Path(module.__file__).read_text())
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


def public_names(module: str) -> set[str]:
    """What an integration defines for its reader, without importing its trainer."""
    tree = ast.parse((ROOT / "fused_clip_adam" / "integrations" / f"{module}.py").read_text())
    defined = {
        node.name
        for node in tree.body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
    }
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value)) - {"OBJECTIVES"}  # a table, in the module's own text
    return defined


def test_every_public_name_of_the_integrations_is_in_the_reference_once(site):
    files = {path.stem for path in (ROOT / "fused_clip_adam" / "integrations").glob("*.py")} - {"__init__"}
    assert files == set(INTEGRATIONS) | SHARED_BY_INTEGRATIONS
    names = [name for name in documented(site) if name.startswith("fused_clip_adam.integrations.")]
    wanted = [
        f"fused_clip_adam.integrations.{module}.{name}" for module in INTEGRATIONS for name in public_names(module)
    ]
    assert sorted(names) == sorted(wanted)


def test_sections_of_docstrings_are_lists(site):
    """What the sections' extension makes of a docstring: no section is left as a run of words."""
    for page in (site / "api").glob("*.html"):
        text = page.read_text()
        assert not re.search(r"<p>(?:Args|Raises|Keyword Args|Returns):", text), page.name
    rules = (site / "api" / "rules.html").read_text()
    entry = rules.split('id="fused_clip_adam.Periodic"')[1].split('<dt class="sig')[0]
    for name in ("every", "warmup", "moments", "counters", "late"):  # `every` and `warmup` share a line in the source
        assert f"<strong>{name}</strong>" in entry, name
    assert "<strong>ValueError, TypeError</strong>" in entry and "<strong>Source.</strong>" in entry


def test_every_example_is_on_the_examples_page():
    page = (DOCS / "examples.md").read_text()
    for script in (ROOT / "examples").glob("*.py"):
        assert f"(../examples/{script.name})" in page, script.name


def test_figures_are_shown_and_exist():
    pages = {path: path.read_text() for path in (*DOCS.rglob("*.md"), ROOT / "README.md")}
    shown = {
        (path.parent / target).resolve()
        for path, text in pages.items()
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    }
    assert all(figure.exists() for figure in shown)
    assert {figure.resolve() for figure in (DOCS / "figures").glob("*.png")} <= shown, "a figure that no page shows"


def test_outputs_of_pages_are_those_of_their_blocks(monkeypatch):
    """Text that a page shows as printed is what its block prints, but for the numbers, which may differ by machine."""
    monkeypatch.syspath_prepend(str(DOCS))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    pytest.importorskip("matplotlib")
    import figures

    for page, (name, drawn) in figures.PAGES.items():
        text, files = figures.made(page)
        committed = (DOCS / "figures" / name).read_text()
        assert without_numbers(text) == without_numbers(committed), f"run python docs/figures.py ({page})"
        assert set(files) == set(drawn.values()) and all(len(content) > 10_000 for content in files.values())


def without_numbers(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"-?\d+(?:\.\d+)?(?:e-?\d+)?%?|(?<= )-(?= |$)", "#", text))
