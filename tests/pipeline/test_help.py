"""Help: short at the top, whole sentences below, and no word when nobody reads on."""

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.cli import VERBS, main

ROOT = Path(__file__).parents[2]


def help_of(verb: str, capsys, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_overview_is_a_line_a_verb(capsys):
    assert main(["--help"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    for verb in VERBS:
        assert sum(line.startswith(f"  {verb} ") for line in lines) == 1


@pytest.mark.parametrize("verb", VERBS)
def test_no_option_breaks_in_mid_sentence(verb, capsys, monkeypatch):
    shown = [line.strip("│| ") for line in help_of(verb, capsys, monkeypatch).partition("options")[2].splitlines()]

    broken = [
        line
        for line, after in pairwise(shown)
        if len(line) < 120 and " " in line and line[-1].isalpha() and not line.startswith("-") and after[:1].isalnum()
    ]
    assert len(shown) > 5
    assert broken == []


def test_learn_parts_names_few_options(capsys, monkeypatch):
    options = set(re.findall(r"^\W*(--[a-z][a-z-]*)", help_of("learn-parts", capsys, monkeypatch), flags=re.M))

    assert len(options) <= 22
    assert {"--images", "--encoder", "--num-parts", "--paper", "--out"} <= options


@pytest.mark.parametrize(
    ("option", "told"),
    [
        *[("gamma", "(default: 2.0)"), ("noise-color", "(default: green)"), ("weight-decay", "(default: 0.05)")],
        *[("patch", "(default: the preset's, or what fits)"), ("keep-share", "(default: the preset's, or what fits)")],
        *[("predicted", "Default: all."), ("alpha", "(optional)")],
    ],
)
def test_pretrain_shows_the_default_of_what_no_preset_sets(option, told, capsys, monkeypatch):
    shown = re.sub(r"[\s│]+", " ", help_of("pretrain", capsys, monkeypatch))

    about = re.search(rf" --{option} .*?(?= --[a-z]|$)", shown)
    assert told in about[0], about[0]


def test_a_setting_that_is_pythons_alone_has_no_option(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["learn-parts", "--images", "x", "--encoder", "builtin", "--out", "y", "--style", "nothing"])

    assert ended.value.code == 2
    assert "--style" in capsys.readouterr().err


def test_paper_beside_what_contradicts_it_is_refused(capsys, tmp_path):
    code = main(
        [
            "learn-parts",
            "--images",
            "x",
            "--encoder",
            "builtin",
            "--out",
            str(tmp_path / "y"),
            "--paper",
            "--whiten",
            "9",
        ]
    )

    assert code == 2
    assert "--paper means --whiten 0, and --whiten 9 was asked for beside it" in capsys.readouterr().err
    assert not (tmp_path / "y").exists()


def test_a_broken_pipe_of_the_work_itself_is_no_success(capsys, monkeypatch):
    def broken() -> None:
        """Lose a process."""
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setitem(cli.VERBS, "verify", broken)

    assert main(["verify"]) == 1
    assert "Broken pipe" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("verb", [[], ["pretrain"]])
def test_a_reader_who_stops_reading_hears_nothing(verb):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    call = [sys.executable, "-m", "pipeline", *verb, "--help"]
    line = f"{shlex.join(call)} | head -3"
    reading, writing = os.pipe()
    os.close(reading)

    three = subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=ROOT, env=env, capture_output=True, text=True)
    none = subprocess.run(call, cwd=ROOT, env=env, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)

    assert three.stdout.startswith("usage: semmae")
    assert three.stdout.count("\n") == 3
    assert [(one.returncode, one.stderr) for one in (three, none)] == [(0, ""), (0, "")]
