"""Every fenced block of the README and of docs/ is executed, or checked as far as it can be, or says why not.

python: the blocks of a page run in order, in one namespace and an empty folder. bash: make targets, files, modules and
their options exist; what is quick runs. yaml, toml, json: parsed, and what they name of this package is looked up.
Comments of a page, which no reader sees:

    <!-- needs: trl, cuda -->         the page's python runs where these can be imported, and where there is a GPU
    <!-- setup: ... -->               python that the page does not show; ROOT is the repository's folder
    <!-- not run: why -->             the next block is only compiled or parsed
"""

import ast
import contextlib
import functools
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fused_clip_adam
from fused_clip_adam import __main__ as command_line

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
# Trainers that need GPUs and environments which nobody here has; everything else runs somewhere.
NOT_RUN = {
    "docs/howto/nemo_rl.md": 2,
    "docs/howto/slime.md": 2,
    "docs/howto/prime_rl.md": 2,
    "docs/howto/openrlhf.md": 1,
}
DIRECTIVES = ("eval-rst", "figure", "include", "literalinclude", "toctree")  # Sphinx runs them: tests/test_docs_site.py
COMMENT = re.compile(r"^<!-- (?P<kind>needs|setup|not run): *(?P<text>.*?) *-->", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^(?P<fence>`{3,})(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: str
    line: int  # of the first line of code, from 1
    language: str
    code: str
    reason: str = ""  # why it is not run

    def __str__(self):
        return f"{self.page}:{self.line}"


@functools.cache
def blocks_of(page: str) -> tuple[Block, ...]:
    """The blocks of a page, and its hidden setups as blocks of their own, in order."""
    text, found, reason = PAGES[page], [], ""
    marks = [(match.start(), match) for pattern in (COMMENT, FENCE) for match in pattern.finditer(text)]
    for start, match in sorted(marks, key=lambda mark: mark[0]):
        line = text.count("\n", 0, start) + 1
        kind = match.groupdict().get("kind")
        if kind == "not run":
            reason = match["text"]
            assert text[match.end() :].startswith("\n```"), f"{page}:{line}: `not run` is not right before a block"
        elif kind == "setup":
            found.append(Block(page, line + 1, "setup", match["text"] + "\n"))
        elif kind is None:
            found.append(Block(page, line + 1, match["language"].strip(), match["code"], reason))
            reason = ""
    return tuple(found)


def needs_of(page: str) -> list[str]:
    found = [match["text"] for match in COMMENT.finditer(PAGES[page]) if match["kind"] == "needs"]
    return [name for names in found for name in names.split(", ")]


def missing(page: str) -> list[str]:
    """What the page needs and this environment has not."""
    absent = []
    for name in needs_of(page):
        if name == "cuda":
            absent += [] if torch.cuda.is_available() else ["a GPU"]
        elif importlib.util.find_spec(name) is None:
            absent.append(name)
    return absent


def blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page) if block.language in languages]


def with_python() -> list[str]:
    return [page for page in PAGES if any(block.language == "python" and not block.reason for block in blocks_of(page))]


@pytest.mark.parametrize("page", with_python())
def test_python_of_a_page_runs(page, tmp_path, monkeypatch, one_thread):
    if absent := missing(page):
        pytest.skip(f"needs {', '.join(absent)}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict = {"__name__": "__main__", "ROOT": ROOT}
    for block in blocks_of(page):
        if block.language in ("python", "setup") and not block.reason:
            # Blank lines before the code, so that a traceback names the page's own line.
            code = compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec")
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")  # of trainers
                exec(code, names)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_compiles(block):
    tree = ast.parse(block.code, str(block))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fused_clip_adam":
            for alias in node.names:
                check_name(f"{node.module}.{alias.name}")
    for name in re.findall(r"\bfused_clip_adam(?:\.\w+)+", block.code):
        check_name(name)
    for name in re.findall(r"\bfca((?:\.\w+)+)", block.code):
        check_name(f"fused_clip_adam{name}")


def check_name(dotted: str) -> None:
    """The dotted name exists; of a module whose trainer is not installed, its file."""
    parts = re.split(r"[.:]", dotted)
    found, at = fused_clip_adam, 1
    while at < len(parts):
        if not hasattr(found, parts[at]):
            file = ROOT.joinpath(*parts[: at + 1]).with_suffix(".py")
            try:
                importlib.import_module(".".join(parts[: at + 1]))
            except ModuleNotFoundError as error:
                assert file.exists(), f"{dotted} does not exist"
                assert error.name.split(".")[0] != "fused_clip_adam", error
                rest = parts[at + 1 :]
                assert not rest or re.search(rf"^(?:class |def )?{rest[0]}\b", file.read_text(), re.MULTILINE), dotted
                return
        found = getattr(found, parts[at])
        at += 1


# ---------------------------------------------------------------- commands


def commands(code: str) -> list[list[str]]:
    """The words of each command, without comments and prompts."""
    joined = code.replace("\\\n", " ")
    lines = [line.removeprefix("$ ") for line in joined.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


MAKEFILE = (ROOT / "Makefile").read_text()


def options_in(arguments: list[str]) -> list[str]:
    return [argument.split("=")[0] for argument in arguments if argument.startswith("-") and len(argument) > 1]


@functools.cache
def help_of(*command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "PYTHONWARNINGS": "ignore"}
    ran = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, f"{' '.join(command)} --help: {ran.stderr[-2000:]}"
    return ran.stdout


def check_options(command: tuple[str, ...], arguments: list[str]) -> None:
    for option in options_in(arguments):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", help_of(*command)), f"{command} has no {option}"


def check_script(path: str, arguments: list[str]) -> None:
    assert (ROOT / path).is_file(), f"{path} does not exist"
    text = (ROOT / path).read_text()
    for option in options_in(arguments):  # not by --help: examples import trainers that are not here
        assert f'"{option}"' in text, f"{path} has no option {option}"


def check_command(words: list[str]) -> None:
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, arguments = words[0], words[1:]
    if program == "make":
        for target in (word for word in arguments if "=" not in word):
            assert re.search(rf"^{re.escape(target)}:", MAKEFILE, re.MULTILINE), f"make has no target {target}"
        for variable in (word.split("=")[0] for word in arguments if "=" in word):
            assert re.search(rf"^{variable} \?=|\$\({variable}\)", MAKEFILE, re.MULTILINE), f"make reads no {variable}"
    elif program in ("python", "python3") and arguments[0] == "-m":
        module, rest = arguments[1], arguments[2:]
        if module == "fused_clip_adam":  # takes a moment: it runs
            assert command_line.main(rest) == 0
        elif module.split(".")[0] in ("benchmarks", "pytest", "venv", "http"):
            check_options(("-m", module), rest)
        else:
            raise AssertionError(f"no check for python -m {module}")
    elif program in ("python", "python3"):
        check_script(arguments[0], arguments[1:])
    elif program == "torchrun":
        script = next(word for word in arguments if word.endswith(".py"))
        check_options(("-m", "torch.distributed.run"), arguments[: arguments.index(script)])
        check_script(script, arguments[arguments.index(script) + 1 :])
    elif program == "pip" and arguments[0] == "install":
        check_options(("-m", "pip", "install"), arguments[1:])
        for what in (word for word in arguments[1:] if not word.startswith("-")):
            assert what == "." or re.fullmatch(r"fused_clip_adam(\[[\w,-]+\])?|dist/\S+\.whl|\.\[[\w,-]+\]", what), what
            for extra in re.findall(r"[\w-]+", what.partition("[")[2]):
                assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), extra
    else:
        raise AssertionError(f"no check for the command {program}")


@pytest.mark.parametrize("block", [b for b in blocks("bash", "console") if not b.reason], ids=str)
def test_commands_exist(block):
    for words in commands(block.code):
        if words[:3] == ["python", "-m", "verl.trainer.main_ppo"]:
            check_verl_overrides(words[3:])
        else:
            check_command(words)


def check_verl_overrides(overrides: list[str]) -> None:
    """verl's own configuration takes the overrides, and makes its actor configuration of them."""
    pytest.importorskip("verl", reason="verl is not installed: make trainers")
    import verl
    from hydra import compose, initialize_config_dir
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import build_optimizer

    given = [override for override in overrides if override != "..."]
    folder = Path(verl.__file__).parent / "trainer" / "config"
    with initialize_config_dir(str(folder), version_base=None):
        config = compose("ppo_trainer", ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4", *given])
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    from fused_clip_adam.integrations import verl as plugin

    assert plugin.objective_of(actor.policy_loss.loss_mode, actor).clip_high == 0.28
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(3))], actor.optim)
    assert isinstance(optimizer, plugin.FusedClipAdamW)


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize("block", blocks("yaml", "toml", "json"), ids=str)
def test_configuration_parses(block):
    if block.language == "yaml":
        parsed = pytest.importorskip("yaml").safe_load(block.code)
    elif block.language == "toml":
        parsed = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli").loads(block.code)
    else:
        parsed = json.loads(block.code)
    assert parsed
    for name in re.findall(r"\bfused_clip_adam[.:][\w.:]+", block.code):
        check_name(name)


# ---------------------------------------------------------------- nothing is left over


def test_every_block_is_executed_or_says_why_not():
    checked = {"python", "setup", "bash", "console", "yaml", "toml", "json"}
    for page, text in PAGES.items():
        assert not re.search(r"^(?:[ \t]+```|[ \t]*~~~)", text, re.MULTILINE), f"{page}: a fence nobody finds"
        for block in blocks_of(page):
            directive = re.match(r"\{([\w-]+)\}", block.language)
            assert block.language in checked or (directive and directive[1] in DIRECTIVES), (
                f"{block}: a block of {block.language!r} that no test executes"
            )


def test_only_trainers_that_cannot_run_here_are_not_run():
    marked = {page: sum(bool(block.reason) for block in blocks_of(page)) for page in PAGES}
    assert {page: count for page, count in marked.items() if count} == NOT_RUN
    for page in NOT_RUN:
        assert all(len(block.reason) > 10 for block in blocks_of(page) if block.reason)


def test_what_pages_need_is_in_an_extra_that_a_make_target_installs():
    """So that no page is skipped everywhere: `make test` or `make trainers` has what it needs; `make gpu` has a GPU."""
    somewhere = {"trl", "transformers", "accelerate", "matplotlib"}  # make test: the extra `demo`
    somewhere |= {"stable_baselines3", "gymnasium", "torchrl", "tensordict", "rsl_rl", "lightning", "verl", "cuda"}
    assert {name for page in PAGES for name in needs_of(page)} <= somewhere
    targets = MAKEFILE.split("trainers: ")[1].split("\n\n")[0]
    assert targets.count("tests/test_docs_blocks.py") == 2, "make trainers must run these pages in both environments"
