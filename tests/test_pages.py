"""Pages stay true: what they name exists, what they quote runs, and what two of them say is the same."""

import ast
import re
import tomllib
from pathlib import Path

import yaml

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
