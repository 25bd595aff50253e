"""Every measured-looking number in README, docs and benchmarks/README has a source, from which it is recomputed.

docs/number_sources.py has the sources and says how to add one; `python tests/test_numbers.py` lists numbers without.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import number_sources  # noqa: E402
from number_sources import SOURCES, setting, stated, traced, value  # noqa: E402

NO_CLAIMS = {
    "docs/objectives.md",  # written by docs/generate.py from docstrings, and compared with them by tests/test_docs.py
    "benchmarks/overshoot/PREREGISTRATION.md",  # fixed before anything was measured
}

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "benchmarks").rglob("*.md"),
    )
    if path.relative_to(ROOT).as_posix() not in NO_CLAIMS and "_build" not in path.parts
)

# What a generator writes is compared with its sources by tests of its own; code is run, or is not a claim.
LEFT_OUT = (
    r"^<!-- (?P<block>[\w ]+?)(?: table)?(?::.*?)? ?-->.*?^<!-- end of (?P=block).*?-->",
    r"<!--.*?-->",
    r"^ *(?P<fence>```+|~~~+)(?!\{(?:note|tip|warning|admonition|important)).*?^ *(?P=fence) *$",
    r"`[^`]*`",
    r"(?<=\])\([^)]*\)",
    r"https?://\S+",
    r"arXiv:? ?\d{4}\.\d{4,5}(?:, \d{4}\.\d{4,5})*",
    r"\$\$.+?\$\$|\$[^$\n]+\$",
    r"(?:>=|<=|==|<|>|version|Python|torch|CUDA|Triton) ?\d+(?:\.\d+)*\b",
    r"\d+(?:\.\d+){2,}",
)
UNITS = (
    r"%|[KMGT]i?B(?:/s)?|B|bytes?|[mun]?s|seconds?|minutes?|min|hours?|h|MHz|GHz|W"
    r"|times|x(?! ?\d)|fold|tests?|points?|instructions?|registers?|steps? a second|tokens? a second"
)
NUMBER = r"(?<![\w.,/^=-])[-+]?\d(?:[\d,]*\d)?"
WORD = r"\b(?:two|three|four|five|six|seven|eight|nine|ten|hundred)\b"
MEASURED = re.compile(
    rf"{NUMBER}(?:\.\d+(?:e[-+]?\d+)?|e[-+]?\d+)(?![\w.]*\d)|{NUMBER}(?: |-)?(?:{UNITS})(?![\w/^])"
    rf"|{WORD} (?:times (?:as|the|faster|slower|longer|more|less)"
    r"|seconds|minutes|hours|percent)\b"
    r"|\b(?:twice|half|a third|a quarter) (?:as (?:fast|long|much|many|slow)|of the (?:time|memory))\b"
)


def read(document: str) -> str:
    """The document without the signs of quotations, which stand in the middle of sentences."""
    return re.sub(r"^ *>", "", (ROOT / document).read_text(), flags=re.MULTILINE)


def words_of(document: str) -> str:
    """The document on one line, as an entry's text is compared with it."""
    return re.sub(r"\s+", " ", read(document))


def prose_of(document: str) -> str:
    """`words_of` with what is not prose blanked out, character by character."""
    text = read(document)
    for pattern in LEFT_OUT:
        text = re.sub(pattern, lambda found: re.sub(r"\S", "_", found[0]), text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\s+", " ", text)


def undeclared(document: str, declared: list[str]) -> list[tuple[str, str]]:
    """(number, words around it) of every measured-looking number that no declared text covers."""
    words, prose = words_of(document), prose_of(document)
    assert len(words) == len(prose)
    covered = [(found.start(), found.end()) for text in declared for found in re.finditer(re.escape(text), words)]
    missing = []
    for found in MEASURED.finditer(prose):
        if not any(start <= found.start() and found.end() <= end for start, end in covered):
            start, end = max(0, found.start() - 40), min(len(words), found.end() + 30)
            missing.append((found[0], words[words.find(" ", start) + 1 : words.rfind(" ", 0, end)]))
    return missing


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_number_has_a_source(document):
    declared = [source.expected() for source in SOURCES.get(document, [])]
    lines = [f'    traced("{around}", ...),  # {number}' for number, around in undeclared(document, declared)]
    assert not lines, (
        f'{len(lines)} numbers in {document} without a source. Add to SOURCES["{document}"] of docs/number_sources.py, '
        "whose head shows the kinds (traced, stated, quoted, setting):\n" + "\n".join(lines)
    )


@pytest.mark.parametrize(
    ("document", "source"),
    [(document, source) for document, sources in SOURCES.items() for source in sources],
    ids=lambda item: item if isinstance(item, str) else item.text[:40],
)
def test_the_document_says_what_its_source_says(document, source):
    expected, words = source.expected(), words_of(document)
    if expected in words:
        return
    pattern = ".{1,20}?".join(re.escape(part) for part in re.split(r"\{[^}]*\}", source.text))
    said = re.search(pattern, words) if source.values else None
    where = f"{document} says {said[0]!r}" if said else f"{document} has nothing like it any more: drop the entry"
    pytest.fail(f"the source gives {expected!r}; {where}")


@pytest.mark.parametrize(
    "source", [s for sources in SOURCES.values() for s in sources if s.kind == "stated"], ids=lambda s: s.text[:40]
)
def test_stated_numbers_stand_in_the_file(source):
    assert source.fragment in (ROOT / source.file).read_text(), f"{source.file} does not contain {source.fragment!r}"
    assert re.search(rf"\d|{WORD}", source.fragment), "the fragment has no number"


def test_sources_are_of_documents_and_say_what_they_are():
    assert set(SOURCES) <= set(DOCUMENTS)
    for source in (source for sources in SOURCES.values() for source in sources):
        assert (source.kind == "traced" and source.values) or source.kind != "traced", source.text
        assert source.kind != "quoted" or source.whose.strip(), source.text


def test_numbers_are_seen_and_what_is_no_claim_is_not(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "page.md").write_text(
        "It is 1.43 times the `2.5` of [that](a/3.5%.md), 12% of 5\nms, 1e9 elements, 250 tests; torch >= 2.10,\n"
        "arXiv 2601.05002, version 0.9.1, three times as long, Qwen2-0.5B, in 3 steps, $x = 0.5$, ten seconds.\n"
        "```python\nx = 7.5  # 8%\n```\n<!-- results: x -->\n9.5%\n<!-- end of results -->\n> Quoted 30 us.\n"
    )
    seen = [number for number, _ in undeclared("page.md", [])]
    assert seen == ["1.43", "12%", "5 ms", "1e9", "250 tests", "three times as", "ten seconds", "30 us"]
    assert [number for number, _ in undeclared("page.md", ["is 1.43 times", "12% of 5 ms"])] == seen[3:]


def test_a_source_that_disagrees_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "page.md").write_text("The copy moved 4.29\nTB/s here.\n")
    (tmp_path / "test_x.py").write_text("assert peak < 0.55\n")
    test_the_document_says_what_its_source_says("page.md", traced("moved {:.2f} TB/s", value(4.2855)))
    with pytest.raises(pytest.fail.Exception, match=r"gives 'moved 4\.30 TB/s'; page\.md says 'moved 4\.29 TB/s'"):
        test_the_document_says_what_its_source_says("page.md", traced("moved {:.2f} TB/s", value(4.301)))
    with pytest.raises(pytest.fail.Exception, match="drop the entry"):
        test_the_document_says_what_its_source_says("page.md", setting("5 GB")[0])
    test_stated_numbers_stand_in_the_file(stated("below 0.55", "test_x.py", "< 0.55"))
    with pytest.raises(AssertionError, match="does not contain"):
        test_stated_numbers_stand_in_the_file(stated("below 0.5", "test_x.py", "< 0.5\n"))


def test_results_are_read_by_pointer():
    assert number_sources.result("gpu-nvidia-h200/step-one-tensor", "tensors")() == 1
    assert number_sources.result("gpu-nvidia-h200/step-one-tensor", "targets/0/at_least", 100)() == 92


def main() -> None:
    for document in DOCUMENTS:
        missing = undeclared(document, [source.expected() for source in SOURCES.get(document, [])])
        for number, around in missing:
            print(f'{document}:  traced("{around}", ...),  # {number}')


if __name__ == "__main__":
    main()
