"""What is said of a release: CITATION.cff, and docs/releasing.md, whose commands have to exist."""

import re
import shutil
from pathlib import Path

import pytest

import fused_clip_adam as fca

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: make venv")
ROOT = Path(__file__).parents[1]


def citation() -> dict:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_citation_is_of_this_version_and_complete():
    cited = citation()
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert str(cited["version"]) == fca.__version__
    assert cited["title"] == "fused_clip_adam" and cited["message"].strip() and cited["abstract"].strip()
    assert all(set(author) == {"name"} or {"given-names", "family-names"} <= set(author) for author in cited["authors"])
    project = (ROOT / "pyproject.toml").read_text()
    assert f'license = "{cited["license"]}"' in project
    assert all(f'"{word}"' in project for word in cited["keywords"])
    known = {"message", "cff-version", "type", "title", "abstract", "authors", "version", "license", "keywords"}
    assert set(cited) == known | {"references"}


def test_cited_work_is_the_one_the_code_names():
    (work,) = citation()["references"]
    assert {"type", "title", "authors", "year", "identifiers"} == set(work)
    (identifier,) = work["identifiers"]
    assert identifier["type"] == "other"
    assert identifier["value"].replace(":", " ") in (ROOT / "fused_clip_adam" / "theory.py").read_text()


def test_changelog_begins_with_this_version():
    latest = re.search(
        r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert latest and latest[1] == fca.__version__


def test_every_command_of_the_checklist_exists():
    page = (ROOT / "docs" / "releasing.md").read_text()
    commands = [text for text in re.findall(r"`([^`]+)`", page) if " " in text and not text.startswith("PYTHONS=")]
    targets = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    makes = [command.split()[1] for command in commands if command.startswith("make ")]
    assert {"lint", "test", "asan", "gpu-checks", "trainers", "docs", "bench-full", "gpu", "wheels"} <= set(makes)
    assert set(makes) <= targets
    for command in commands:
        program = command.split()[0]
        assert program in ("make", "git", "python") and (shutil.which(program) or program == "python"), command
    listed = [line for line in page.splitlines() if line.startswith("- ")]
    assert len(listed) > 10 and all(line.startswith("- [ ] ") for line in listed)


def test_files_of_a_release_are_named_by_this_version():
    named = [
        (path.name, version)
        for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
        for version in re.findall(r"fused_clip_adam-(\d[\w.]*\d)", path.read_text())
    ]
    assert named and {version for _, version in named} == {fca.__version__}
