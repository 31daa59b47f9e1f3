"""Verbs to functions, exceptions to exit codes, and nothing else. Nothing heavy is imported to print help."""

import dataclasses
import os
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from encoders.distill.config import EncoderConfig
from evaluate.config import KnnConfig, ProbeConfig
from partlearn.config import IN_PYTHON, ExtractConfig, LearnConfig
from pipeline.config import BenchConfig, DemoConfig, ScorePartsConfig, SubmitConfig, VerifyConfig
from pipeline.help import fields_of, made, options, overview
from pretrain.config import FREE, METHOD, UNSET, PretrainConfig
from training.memory import asking_for_less
from training.sentence import sentence, status

Backend = Annotated[Literal["local", "ray"], tyro.conf.arg(help="local: this process, or torchrun's; ray: a cluster.")]
Workers = Annotated[int, tyro.conf.arg(help="Ray Train workers, one GPU each where there are any (--backend ray).")]


def encoder(config: Annotated[Any, options(EncoderConfig)]) -> None:
    """Train a small ViT on a folder of images: by self-distillation (DINO + iBOT), or from a larger encoder.

    For domains without a ready or a fast encoder. For example:
      semmae encoder --images photos/ --out runs/encoder --size 96 --local-size 48 --patch 8 --embed-dim 192 --depth 6 --heads 3
      semmae encoder --images photos/ --teacher timm:vit_small_patch14_dinov2=FILE --out runs/small --embed-dim 192 --heads 3
    """
    from encoders.distill.train import distill

    config = made(config)
    with asking_for_less("--batch-size", config.batch_size):
        _say(distill(config))


def learn_parts(
    config: Annotated[Any, options(LearnConfig, hidden=(*IN_PYTHON, "checkpoint_minutes"))],
    backend: Backend = "local",
    num_workers: Workers = 1,
) -> None:
    """Learn part maps from a frozen encoder's tokens.

    For example:
      semmae learn-parts --images photos/ --encoder builtin --out runs/parts
      semmae learn-parts --images photos/ --encoder timm:vit_small_patch14_dinov2.lvd142m --out runs/parts-dino
    """
    from partlearn.train import learn

    config = made(config)
    with asking_for_less("--batch-size", config.batch_size):
        _train(learn, config, backend, num_workers)
    if _is_main():
        from pipeline.figures.parts_sheet import show_parts

        show_parts(config)


def extract(config: Annotated[Any, options(ExtractConfig)]) -> None:
    """Write part labels and foreground ranks beside every image, into WebDataset shards.

    Runs on Ray (a cluster, or started here) or with --backend local; a killed build goes on. For example:
      semmae extract --images photos/ --out runs/shards --backend local
      semmae extract --images photos/ --parts runs/parts --out runs/shards-own --backend local
      semmae submit --address http://HEAD:8265 -- extract --images /data/imagenet/train --parts /runs/parts --out /data/shards
    """
    from pipeline.extract import extract as build

    config = made(config)
    with asking_for_less("--batch-size", config.batch_size):
        build(config)


def verify(config: Annotated[Any, options(VerifyConfig)]) -> None:
    """Check a shard set: sizes (fast), digests (hash), or every byte, label and image (deep).

    For example:
      semmae verify --data runs/shards --level deep
    """
    from pipeline.verify import verify as check

    check(made(config))


def pretrain(
    config: Annotated[Any, options(PretrainConfig, open_=METHOD + FREE, usual=UNSET)],
    backend: Backend = "local",
    num_workers: Workers = 1,
) -> None:
    """Pretrain a masked autoencoder on a shard set.

    While it runs it shows alpha (a share of every part is masked at 0, whole parts at 1), purity (share of the parts
    that are masked whole or not at all), effective_rank (directions that the features of whole images fill; near 1 they
    have collapsed), feature_std (how far they lie apart), knn (with --knn) and waiting (share of the time spent waiting
    for data). A finished run goes on when its --epochs are raised. For example:
      semmae pretrain --data runs/shards --masking semmae --out runs/semmae
      torchrun --nproc-per-node 8 -m pipeline pretrain --preset semmae-b16 --data /data/shards --out /runs/semmae
      semmae pretrain --data /data/shards --out /runs/semmae --backend ray --num-workers 16
    """
    from pretrain.presets import settled
    from pretrain.train import pretrain as train
    from training.device import pick_device

    asked_for = fields_of(config)
    run = asked_for.pop("run")
    if backend == "ray":
        from pipeline.cluster.connect import has_gpus, refuse_paths_of_the_upload

        refuse_paths_of_the_upload(run.out)
        cuda = run.device in ("auto", "cuda") and has_gpus()
    else:
        cuda = pick_device(run.device).type == "cuda"
    config = settled(asked_for, run, cuda=cuda, main=_is_main())
    _train(train, config, backend, num_workers)


def knn(config: Annotated[Any, options(KnnConfig)]) -> None:
    """Classify by the nearest neighbours of frozen features (DINO's weighted k-NN).

    For example:
      semmae knn --checkpoint runs/semmae --data runs/train --val-data runs/val
    """
    from evaluate.knn import knn as evaluate

    _rows(evaluate, made(config))


def probe(config: Annotated[Any, options(ProbeConfig)]) -> None:
    """Train a linear classifier on frozen features (MAE's linear probe).

    For example:
      semmae probe --encoder timm:vit_small_patch16_224.dino --images train/ --val-images val/
    """
    from evaluate.linear import probe as evaluate

    _rows(evaluate, made(config))


def bench(config: Annotated[Any, options(BenchConfig)]) -> None:
    """Measure this machine: `loader`, `masking`, `extract`, `learn`, `step` or `gpu`, medians and quartiles.

    Blocks of time that other processes disturbed are not counted. For example:
      semmae bench loader --images photos/
      semmae bench extract --images photos/ --parts runs/parts --json extract.json
      semmae bench gpu --photographs people/val cars/val --out runs/gpu
    """
    from pipeline.bench import bench as measure

    measure(made(config))


def submit(config: Annotated[Any, options(SubmitConfig)]) -> None:
    """Run a verb on a Ray cluster: weigh this checkout, send it as a job, follow its log; 0 when the job succeeded.

    With token authentication, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH names the token. For example:
      semmae submit --address http://head:8265 -- extract --images /data/imagenet/train --parts /runs/parts --out /data/shards
    """
    from pipeline.cluster.submit import submit as send

    send(made(config))


def score_parts(config: Annotated[Any, options(ScorePartsConfig)]) -> None:
    """Score part labels on images whose parts are known, beside baselines and shortcuts.

    For example:
      semmae score-parts --images cars/val people/val --parts runs/parts heads kmeans-image grid --encoder dino:dino.pth --sheet parts.png
    """
    from pipeline.score_parts import score_parts as score

    score(made(config))


def demo(config: Annotated[Any, options(DemoConfig)]) -> None:
    """The whole job, small: encoder, parts, shards, two pretrainings, evaluation, a table and an image sheet.

    For example:
      semmae demo
      semmae demo --images photos/
    """
    from pipeline.demo import demo as run

    run(made(config))


VERBS = {
    "encoder": encoder,
    "learn-parts": learn_parts,
    "extract": extract,
    "verify": verify,
    "pretrain": pretrain,
    "knn": knn,
    "probe": probe,
    "score-parts": score_parts,
    "bench": bench,
    "submit": submit,
    "demo": demo,
}


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done; 1 the work failed or a check does not hold; 2 the call was wrong; 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Waiting threads sleep instead of spinning: on a shared machine spinning made a run twenty times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    wants_help = not {"--help", "-h"}.isdisjoint(arguments)
    try:
        try:
            if arguments in (["--help"], ["-h"]):
                print(overview(VERBS))
                return 0
            if arguments in (["--version"], ["-V"]):
                print(f"semmae {version('semmae')}")
                return 0
            tyro.extras.subcommand_cli_from_dict(
                VERBS,
                args=arguments,
                prog="semmae",
                description="Semantic-guided masking for masked autoencoders, from images to numbers.",
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
            )
        finally:
            if wants_help:
                sys.stdout.flush()  # here, and not as Python ends, where a reader who left would be an error
    except KeyboardInterrupt:
        print(
            "interrupted; the same command goes on from the last checkpoint or shard, if one was written",
            file=sys.stderr,
        )
        return 130
    except Exception as error:
        if wants_help and isinstance(error, BrokenPipeError):  # as in `semmae --help | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if "--debug" in arguments:
            traceback.print_exc()
        print(f"semmae: {sentence(error)}", file=sys.stderr)
        return status(error)
    return 0


def _train(function: Any, config: Any, backend: str, num_workers: int) -> None:
    if backend == "local":
        _say(function(config))
        return
    from pipeline.cluster.connect import train_on_ray
    from shards.atomic import read_json

    train_on_ray(function, config, num_workers=num_workers)
    _say(read_json(Path(config.run.out) / "DONE.json"))


def _say(report: dict[str, Any]) -> None:
    """The figures of a run on one line, by the main rank."""
    if _is_main():
        numbers = {
            name: value
            for name, value in report.items()
            if isinstance(value, (int, float)) and not name.startswith("area_")
        }
        print("  ".join(f"{name} {value:.4g}" for name, value in numbers.items()))


def _is_main() -> bool:
    """Once the group of ranks has been left."""
    return os.environ.get("RANK", "0") == "0"


def _rows(evaluate: Any, config: Any) -> None:
    """Compute rows and print them, also where they cannot be kept, which is then an error."""
    from evaluate.result import RowsNotKept

    try:
        with asking_for_less("--batch-size", config.batch_size):
            rows = evaluate(config)
    except RowsNotKept as error:
        _show(error.rows)
        raise
    _show(rows)


def _show(rows: Any) -> None:
    """A table of results."""
    from rich.console import Console
    from rich.table import Table

    table = Table("protocol", "metric", "value", "checkpoint")
    for row in rows:
        shown = row if isinstance(row, dict) else dataclasses.asdict(row)
        table.add_row(shown["protocol"], shown["metric"], f"{shown['value']:.4f}", str(shown["checkpoint"]))
    Console().print(table)
