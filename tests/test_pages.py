"""Pages stay true: what they name exists, what they quote runs, and what two of them say is the same."""

import ast
import functools
import gc
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_set
from some_inputs import inputs_of

from pipeline import cli
from pretrain.masking.batch import masked_by

ROOT = Path(__file__).parents[1]


def test_every_promise_of_the_faults_page_names_a_test_that_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", (ROOT / "docs/faults.md").read_text())
    tests = {
        path: {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}
        for path in {path for path, _ in named}
    }

    assert len(named) > 40
    assert [f"{path}::{name}" for path, name in named if name not in tests[path]] == []


def test_every_guarantee_that_tests_cite_is_explained_on_the_faults_page():
    explained = re.findall(r"^\| ([GS]\d) \| \w.+ \|$", (ROOT / "docs/faults.md").read_text(), re.MULTILINE)
    cited = {
        name: f"{path.relative_to(ROOT)}: {node.name if isinstance(node, ast.FunctionDef) else 'module'}"
        for path in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
        for name in guarantees(node)
    }

    assert {"G1", "G9", "S1", "S9"} <= cited.keys()
    assert len(explained) == len(set(explained))
    assert {name: where for name, where in cited.items() if name not in explained} == {}


def guarantees(node: ast.Module | ast.FunctionDef | ast.ClassDef) -> set[str]:
    """Those named in a docstring ("S1-S5" names five) or a function's name (`test_s3_s4_...`)."""
    text = ast.get_docstring(node) or ""
    ranges = re.findall(r"\b([GS])([1-9])-[GS]?([1-9])\b", text)
    spanned = {f"{kind}{number}" for kind, first, last in ranges for number in range(int(first), int(last) + 1)}
    in_name = re.findall(r"_([gs][1-9])(?=_)", getattr(node, "name", ""))
    return spanned | set(re.findall(r"\b[GS][1-9]\b", text)) | {name.upper() for name in in_name}


def test_the_citation_has_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert citation["cff-version"] == "1.2.0"
    assert {name: str(citation[name]) for name in ("version", "license")} == {
        name: package[name] for name in ("version", "license")
    }
    assert [reference["year"] for reference in citation["references"]] == [2022]


def test_the_hook_before_a_commit_runs_make_fix_and_nothing_else():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]

    assert [repo["repo"] for repo in hooks] == ["local"]
    assert [hook["entry"] for repo in hooks for hook in repo["hooks"]] == ["make fix"]
    assert re.search(r"^fix:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.filterwarnings(r"ignore:unclosed file .*\.tar:ResourceWarning")  # webdataset leaves its tars open
@pytest.mark.parametrize(("number", "left"), [(1, "batch"), (2, "sample")])
def test_the_python_of_the_readme_runs(number, left, tmp_path, monkeypatch):
    write_set(tmp_path / "runs/shards")
    monkeypatch.chdir(tmp_path)
    code = blocks("README.md", "python")
    names: dict[str, Any] = {}

    exec(compile(code[number], "README.md", "exec"), names)

    assert len(code) == 3  # the first is a masking, below
    assert left in names
    names.clear()
    gc.collect()  # open tars go now, while that is expected


def test_the_readmes_masking_in_twenty_lines_masks_the_rim_first():
    (source,) = re.findall(
        r'```python\n("""pretrain/masking/border.py.*?)```', (ROOT / "README.md").read_text(), re.DOTALL
    )
    inputs, border = inputs_of("random", shape=(7, 7), mask_ratio=0.5), {}
    exec(source, border)

    masked = masked_by(border["scores"](inputs, 0.5), inputs)

    assert source.count("\n") <= 20
    assert masked.ids_masked.shape == (4, 25)
    rim = {row * 7 + col for row in range(7) for col in range(7) if {row, col} & {0, 6}}
    assert all(rim < set(row) for row in masked.ids_masked.tolist())


def test_the_commands_of_the_readme_are_parsed_by_the_command_line(monkeypatch, capsys):
    parsed: list[str] = []
    for verb, function in cli.VERBS.items():
        monkeypatch.setitem(cli.VERBS, verb, recorded(verb, function, parsed))
    lines = [line for block in blocks("README.md", "sh") for line in block.replace("\\\n", " ").splitlines()]
    calls = [call for line in lines for call in calls_in(shlex.split(line, comments=True))]

    statuses = [(call, status_of(call), capsys.readouterr()) for call in calls]

    assert [told for told in statuses if told[1] != 0] == []
    assert parsed == [call[0] for call in calls]
    assert {"extract", "verify", "pretrain", "probe", "learn-parts", "score-parts", "submit", "bench"} <= set(parsed)


@pytest.mark.parametrize("call", ["extract --image photos/", "bench loaders", "pretrain --data runs/shards", "train"])
def test_a_command_that_the_command_line_does_not_take_is_found(call, monkeypatch, capsys):
    for verb, function in cli.VERBS.items():
        monkeypatch.setitem(cli.VERBS, verb, recorded(verb, function, []))

    assert status_of(call.split()) == 2


def blocks(page: str, language: str) -> list[str]:
    """The code of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def calls_in(words: list[str]) -> list[list[str]]:
    """The calls of our command line in a line of shell, each from its verb on; a call of `submit` carries another."""
    ours = words[:1] == ["semmae"]
    start = 1 if ours else words.index("pipeline") + 1 if "-m pipeline" in " ".join(words) else None
    if start is None and any(word.endswith("on_cluster.py") for word in words):
        start = words.index("--") + 1
    if start is None:
        return []
    call = words[start:]
    return [call, call[call.index("--") + 1 :]] if ours and "--" in call else [call]


def recorded(verb: str, function: Callable[..., None], parsed: list[str]) -> Callable[..., None]:
    """Looks like the verb to the parser, and only notes that it was called."""

    @functools.wraps(function)
    def note(*arguments: Any, **options: Any) -> None:
        parsed.append(verb)

    return note


def status_of(call: list[str]) -> int | str | None:
    """What the command line exits with."""
    try:
        return cli.main(call)
    except SystemExit as end:
        return end.code
