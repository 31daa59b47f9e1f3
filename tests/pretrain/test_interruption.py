"""A pretraining that is told to stop by the system goes on where its last checkpoint was."""

import signal
import time
from pathlib import Path

import torch
import warm

from pretrain.config import PretrainConfig, StreamRun
from pretrain.train import pretrain
from training import checkpoint

SETTINGS = {
    "patch": 8, "embed_dim": 32, "depth": 1, "heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2,
    "epochs": 30, "warmup_epochs": 0, "batch_size": 12, "base_lr": 1e-2,
}  # fmt: skip


def config(data: Path, out: Path) -> PretrainConfig:
    run = StreamRun(out=out, device="cpu", precision="fp32")
    return PretrainConfig(data=str(data), run=run, **SETTINGS)


def test_a_terminated_run_resumes_to_the_same_weights(make_shards, tmp_path):
    data, killed = make_shards().path, tmp_path / "killed"
    script = tmp_path / "one.py"
    script.write_text(
        "from pathlib import Path\nfrom pretrain.config import PretrainConfig, StreamRun\n"
        "from pretrain.train import pretrain\n"
        f"run = StreamRun(out=Path({str(killed)!r}), device='cpu', precision='fp32', checkpoint_minutes=0)\n"
        f"pretrain(PretrainConfig(data={str(data)!r}, run=run, **{SETTINGS!r}))\n"
    )
    process = warm.python(script, threads=torch.get_num_threads())
    deadline = time.monotonic() + 120
    while checkpoint.newest(killed) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)

    stopped_at = checkpoint.newest(killed)
    assert stopped_at is not None
    assert not (killed / "DONE.json").is_file()
    pretrain(config(data, killed))
    pretrain(config(data, tmp_path / "straight"))

    one, other = (checkpoint.load_tensors(checkpoint.find(run))[0] for run in (killed, tmp_path / "straight"))
    assert all(torch.equal(one[name], other[name]) for name in one)
