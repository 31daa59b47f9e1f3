"""The verb `submit`: this checkout as a Ray job, weighed before it is sent, its log followed to the end."""

import asyncio
import logging
import os
import shlex
import time
from pathlib import Path
from typing import Any

import yaml

from pipeline.cluster.upload import MIB, RAY_LEAVES_OUT, check_size, packed
from pipeline.config import SubmitConfig
from shards.places import refuse_url

SHIPPED = Path(__file__).with_name("runtime_env.yaml")


class JobError(Exception):
    """A job was refused, lost or did not succeed."""


def submit(config: SubmitConfig) -> None:
    """Run `python -m pipeline VERB ...` on the cluster and return when it has succeeded.

    Raises:
        ValueError: No verb, an output at a URL, or an upload above Ray's limit; nothing has been sent.
        FileNotFoundError: `config.working_dir` is no checkout.
        ConnectionError: No cluster answers.
        JobError: The cluster refused the token, or the job failed.
    """
    folder = config.working_dir.absolute()
    if not config.job:
        raise ValueError("submit needs a verb after --, as in `semmae submit -- extract --images /data/photos ...`")
    if not (folder / "pipeline" / "__main__.py").is_file():
        raise FileNotFoundError(
            f"{folder} has no pipeline/__main__.py to send; run this in the checkout, or name it with --working-dir"
        )
    for word, after in zip(config.job, (*config.job[1:], ""), strict=True):
        flag, _, value = word.partition("=")
        if flag in ("--out", "--json", "--sheet"):
            refuse_url(value or after, flag=flag)
    runtime_env = yaml.safe_load((config.runtime_env or SHIPPED).read_text()) or {}
    runtime_env["excludes"] = [*RAY_LEAVES_OUT, *runtime_env.get("excludes", [])]
    files = dict(packed(folder, runtime_env["excludes"]))
    check_size(folder, files)
    client = _client(config.address)
    print(f"sending {len(files)} files, {sum(files.values()) / MIB:.1f} MiB, from {folder}", flush=True)
    entrypoint = shlex.join(["python", "-m", "pipeline", *config.job])
    job = client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env | {"working_dir": str(folder)})
    print(f"{job} on {client.get_address()}: {entrypoint}", flush=True)
    follow(client, job)


def _client(address: str | None) -> Any:
    """Ray's client, with the token of the environment; --address goes before Ray's own variables."""
    if address:
        os.environ["RAY_API_SERVER_ADDRESS"] = address
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if named or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # before Ray is imported: it reads this once
    os.environ["RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES"] = ""  # they are among ours; Ray would warn of each
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.WARNING)  # else three lines for every .gitignore
    try:
        return JobSubmissionClient()
    except AuthenticationError:
        raise JobError(
            "the cluster refused the token, or got none; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's "
            "token or RAY_AUTH_TOKEN_PATH to a file that holds it (default: ~/.ray/auth_token)"
        ) from None
    except ConnectionError as error:
        reason = str(error).rstrip(".")
        raise ConnectionError(f"no Ray cluster answers ({reason}); give its --address, http://HEAD:8265") from None


def follow(client: Any, job: str) -> None:
    """Print the job's log as it grows, until the job has ended.

    Raises:
        JobError: It did not succeed, or the cluster is gone.
    """
    import aiohttp

    async def show() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    try:
        try:
            asyncio.run(show())
        except (RuntimeError, OSError, aiohttp.ClientError):
            print(f"the log broke off; `ray job logs {job} --follow` shows it", flush=True)
        while not (info := client.get_job_info(job)).status.is_terminal():
            time.sleep(2)
    except KeyboardInterrupt:
        print(f"\nthe job goes on without you; `ray job stop {job}` ends it", flush=True)
        raise
    except OSError as error:
        raise JobError(
            f"the cluster answers no more; once it does, `ray job status {job}` tells how it went"
        ) from error
    if info.status != "SUCCEEDED":
        reason = " ".join((info.message or "").partition(", last available logs")[0].split())[:300]
        raise JobError(f"{job} ended as {info.status}: {reason}")
