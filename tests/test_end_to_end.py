"""Eight photographs' way through every verb, in processes of their own, as a user types them."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import warm
from PIL import Image

from pipeline.cli import VERBS, main


def semmae(*arguments: object, folder: Path, new: bool = False) -> subprocess.CompletedProcess:
    """In a Python that has imported torch, or in a new one."""
    call = ["-m", "pipeline", *map(str, arguments)]
    env = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    if not new:
        return warm.python(*call, cwd=folder, env=env).finished()
    return subprocess.run(
        [sys.executable, *call], cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False
    )


def draw(folder: Path, *, classes: int, each: int) -> None:
    """Small JPEGs in class folders: a bright square somewhere on coloured noise."""
    random = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(each):
            pixels = random.integers(0, 100, (40, 56, 3)) + 30 * label
            x, y = random.integers(0, 20, 2)
            pixels[y : y + 16, x : x + 16] = 255
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"class{label}" / f"{number}.jpg")


ENCODER = [
    "--size",
    "32",
    "--local-size",
    "16",
    "--local-crops",
    "2",
    "--patch",
    "8",
    "--embed-dim",
    "32",
    "--depth",
    "2",
    "--heads",
    "2",
    "--prototypes",
    "32",
    "--epochs",
    "1",
    "--batch-size",
    "4",
    "--warmup-epochs",
    "0",
]
LEARN = ["--grid", "4", "--num-parts", "3", "--crops", "2", "--steps", "3", "--batch-size", "4", "--encoder-block", "1"]
PRETRAIN = [
    "--patch",
    "8",
    "--embed-dim",
    "32",
    "--depth",
    "2",
    "--heads",
    "2",
    "--decoder-dim",
    "16",
    "--decoder-depth",
    "1",
    "--decoder-heads",
    "2",
    "--epochs",
    "2",
    "--warmup-epochs",
    "0",
    "--batch-size",
    "4",
]


def test_eight_jpegs_go_through_every_verb(tmp_path):
    draw(tmp_path / "photos", classes=2, each=4)
    commands = [
        ("encoder", "--images", "photos", "--out", "runs/encoder", *ENCODER),
        ("learn-parts", "--images", "photos", "--encoder", "run:runs/encoder", "--out", "runs/parts", *LEARN),
        ("extract", "--images", "photos", "--parts", "runs/parts", "--out", "runs/shards", "--size", 32,
         "--samples-per-shard", 3, "--backend", "local"),
        ("verify", "--data", "runs/shards", "--level", "deep"),
        ("pretrain", "--data", "runs/shards", "--masking", "semmae", "--out", "runs/semmae", *PRETRAIN),
        ("knn", "--checkpoint", "runs/semmae", "--data", "runs/shards", "--json", "knn.json"),
        ("probe", "--checkpoint", "runs/semmae", "--images", "photos", "--val-images", "photos",
         "--json", "probe.json"),
    ]  # fmt: skip

    for command in commands:
        done = semmae(*command, folder=tmp_path, new=command[0] == "learn-parts")  # of all, it imports the most
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Warning" not in done.stderr, done.stderr
    with Image.open(tmp_path / "runs/parts/parts.png") as sheet:
        assert sheet.width > 3 * 112

    info = json.loads((tmp_path / "runs/shards/dataset.json").read_text())
    assert (info["samples"], info["rejected"], info["groups"], len(info["shards"])) == (8, 0, 4, 3)
    for name in ("encoder", "parts", "semmae"):
        run = tmp_path / "runs" / name
        assert (run / "DONE.json").is_file()
        assert (run / "config.json").is_file()
        assert (run / "metrics.jsonl").read_text().count("\n") >= 1
    knn, probe = (json.loads((tmp_path / f"{protocol}.json").read_text())[0] for protocol in ("knn", "probe"))
    assert (knn["protocol"], knn["preparation"]) == ("knn", "stored squares")
    assert (probe["protocol"], probe["preparation"]) == ("probe", "short side x 8/7, centre crop")
    assert (knn["data_fingerprint"], knn["settings"]["size"]) == (info["fingerprint"], 32)
    assert knn["value"] in (0, 50, 100)  # of two held-out images
    assert probe["value"] in [100 * right / 8 for right in range(9)]

    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs/shards").rglob("*.tar")}
    again = semmae(*commands[2], folder=tmp_path)
    assert again.returncode == 0
    assert shards
    assert {path: path.stat().st_mtime_ns for path in shards} == shards


@pytest.mark.parametrize(
    ("command", "status", "sentence"),
    [
        (["extract", "--images", "nowhere", "--parts", "p", "--out", "o"], 2, "nowhere"),
        (["learn-parts", "--images", "empty", "--encoder", "random:vit_tiny_patch16_224", "--out", "o"], 2, "empty"),
        (["verify", "--data", "empty"], 1, "dataset.json"),
        (["pretrain", "--data", "empty", "--out", "o"], 1, "dataset.json"),
        (["pretrain", "--data", "empty", "--out", "o", "--mask-ratio", "1.5"], 2, "mask_ratio"),
        (["pretrain", "--no-such-flag"], 2, "no-such-flag"),
        (["learn-parts", "--images", "empty", "--encoder", "x", "--out", "o", "--num-parts", "1"], 2, "parts must lie"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_one_clear_sentence(command, status, sentence, tmp_path):
    (tmp_path / "empty").mkdir()

    done = semmae(*command, folder=tmp_path)

    assert done.returncode == status, done.stderr
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interruption_before_any_checkpoint_does_not_promise_one(tmp_path):
    draw(tmp_path / "photos", classes=1, each=4)
    options = "--images photos --out run --batch-size 2 --epochs 99999 --device cpu"
    process = warm.python("-m", "pipeline", "encoder", *options.split(), cwd=tmp_path)
    while process.poll() is None and not (tmp_path / "run/config.json").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    done = process.finished(timeout=60)

    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("goes on from the last checkpoint or shard, if one was written\n")
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_has_an_example(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])

    assert f"\n  semmae {verb} " in capsys.readouterr().out.replace("semmae demo\n", "semmae demo \n")


def test_help_names_every_verb_and_imports_nothing_heavy(tmp_path):
    code = (
        "import sys\nfrom pipeline.cli import main\n"
        "try: main(['pretrain', '--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'timm', 'ray', 'numpy', 'webdataset') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
    )
    top = semmae("--help", folder=tmp_path, new=True)

    assert done.stdout.strip().endswith("[]"), done.stdout[-300:] + done.stderr
    assert "torchrun --nproc" in done.stdout
    for verb in ("encoder", "learn-parts", "extract", "verify", "pretrain", "knn", "probe", "demo"):
        assert verb in top.stdout
