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
