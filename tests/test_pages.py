"""Pages stay true: the tests that docs/faults.md names exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_promise_of_the_faults_page_names_a_test_that_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", (ROOT / "docs/faults.md").read_text())
    tests = {
        path: {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}
        for path in {path for path, _ in named}
    }

    assert len(named) > 40
    assert [f"{path}::{name}" for path, name in named if name not in tests[path]] == []
