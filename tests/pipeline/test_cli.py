"""What the command line hands on, and how it answers: homes, outputs, versions, and memory that ran out."""

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import photographs

from pipeline import cli
from pipeline.cli import main
from pipeline.help import fields_of

PATHS = {
    "encoder": "--images ~/a --teacher run:~/t --out ~/o",
    "learn-parts": "--images ~/list.txt --encoder timm:vit=~/w.pth --out ~/o",
    "extract": "--images ~/a --parts ~/parts --encoder ibot:~/w.pth --out ~/o",
    "verify": "--data ~/a --json ~/o.json",
    "pretrain": "--data ~/a --labels ~/l --cache ~/c --out ~/o",
    "knn": "--checkpoint ~/a --images ~/b --val-images ~/c --out ~/o --json ~/o.json",
    "probe": "--encoder run:~/a --data ~/b --val-data ~/c --out ~/o --json ~/o.json",
    "bench": "gpu --photographs ~/a ~/b --data ~/c --encoder dino:~/w.pth --out ~/o --json ~/o.json",
    "submit": "--working-dir ~/a --runtime-env ~/b.yaml",
    "score-parts": "--images ~/a ~/b --parts heads ~/c --encoder run:~/d --json ~/o.json --sheet ~/o.png",
    "demo": "--images ~/a --out ~/o",
}
WRITES = ("encoder", "learn-parts", "extract", "pretrain", "bench", "demo")


def told(fields: dict[str, Any]) -> str:
    """All that a config holds, and what it is nested in."""
    return " ".join(
        told({field.name: getattr(one, field.name) for field in dataclasses.fields(one)})
        if dataclasses.is_dataclass(one)
        else str(one)
        for one in fields.values()
    )


def given_by(call: list[str], monkeypatch) -> dict[str, Any]:
    """The fields of the config that a call makes, which ends there."""
    seen: list[dict[str, Any]] = []

    def end(given: Any) -> None:
        seen.append(fields_of(given))
        raise ValueError("far enough")

    for name in ("made", "fields_of"):
        monkeypatch.setattr(cli, name, end)
    main(call)
    return seen[0]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_path_of_every_verb_may_begin_at_home(verb, monkeypatch):
    """As after `--out=~/x`, which no shell expands."""
    monkeypatch.setenv("HOME", "/home/me")

    config = told(given_by([verb, *PATHS[verb].split()], monkeypatch))

    assert "~" not in config
    assert config.count("/home/me/") == PATHS[verb].count("~")


def test_a_home_in_the_flags_of_a_job_is_left_to_the_machine_that_runs_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")

    config = given_by(["submit", "--", "extract", "--images", "~/a", "--out=~/o"], monkeypatch)

    assert config["job"] == ("extract", "--images", "~/a", "--out=~/o")


@pytest.mark.parametrize("verb", WRITES)
def test_an_output_in_a_bucket_is_refused_before_any_work(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "no-home"))

    code = main([verb, *PATHS[verb].replace("--out ~/o", "--out s3://bucket/x").split()])

    assert code == 2
    assert "is a URL, and results are written to local folders" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", [["--out", "s3://bucket/x"], ["--out=gs://bucket/x"], ["--json", "https://host/x"]])
def test_a_job_that_would_write_to_a_bucket_is_not_sent(out, capsys):
    assert main(["submit", "--working-dir", str(Path(__file__).parents[2]), "--", "demo", *out]) == 2
    assert "is a URL" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"semmae {importlib.metadata.version('semmae')}\n"


def test_help_is_a_word_too(capsys):
    assert main(["help"]) == 0
    assert capsys.readouterr().out.startswith("usage: semmae VERB")
    with pytest.raises(SystemExit) as ended:
        main(["help", "verify"])
    assert ended.value.code == 0
    assert "--level" in capsys.readouterr().out


@pytest.mark.parametrize("call", [lambda: np.empty(1 << 60, np.uint8), lambda: torch.empty(1 << 60, dtype=torch.uint8)])
def test_memory_that_runs_out_is_one_sentence_whatever_the_verb(call, monkeypatch, capsys):
    monkeypatch.setitem(cli.VERBS, "verify", lambda: call())

    assert main(["verify"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("semmae: out of memory (")
    assert "--debug" not in said
    assert said.count("\n") == 1


def test_a_number_of_parts_beside_parts_that_were_learned_is_refused(tmp_path, capsys):
    photos = photographs(tmp_path / "photos", 1)

    code = main(
        ["extract", "--backend", "local", "--images", str(photos), "--num-parts", "3", "--out", f"{tmp_path}/out"]
    )

    assert code == 2
    assert "--num-parts 3 was asked for, but builtin has 6 parts" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
