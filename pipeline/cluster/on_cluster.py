"""Run a verb on a cluster's head: what `ray submit` starts.

    ray submit pipeline/cluster/cluster.yaml pipeline/cluster/on_cluster.py -- VERB ...

`ray submit` copies this one file and runs it by its path, from any folder. The packages are those of SEMMAE_HOME, else
of the checkout around this file, else of ~/semmae (where cluster.yaml puts them), else the installed ones; Ray's
workers on every node look in the same folder. Until they are found, only Python's own library is needed.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent


def packages() -> Path | None:
    """The folder that holds the packages; None where there is none."""
    named = os.environ.get("SEMMAE_HOME")
    places = [Path(named).expanduser()] if named else [HERE.parent.parent, Path.home() / "semmae"]
    installed = None if named else find_spec("pipeline")
    if installed and installed.origin:
        places.append(Path(installed.origin).parents[1])
    return next((place.resolve() for place in places if (place / "pipeline" / "cli.py").is_file()), None)


def main() -> int:
    """Exit status of the command line; 2 where the packages, or what they need, are missing."""
    # Python puts the folder of a script first; in the checkout that is the inside of a package.
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != HERE]
    home = packages()
    if home is None:
        where = os.environ.get("SEMMAE_HOME") or f"{HERE.parent.parent} or {Path.home() / 'semmae'}"
        print(
            f"on_cluster: semmae is neither in {where} nor installed for {sys.executable}; "
            "set SEMMAE_HOME to the folder of the checkout on this node",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(home))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(home), os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("RAY_ADDRESS", "auto")  # join the cluster that runs here; never start a Ray of one's own
    sys.argv[0] = str(home / "semmae")  # Ray gives the workers of a running cluster the folder of argv[0]
    try:
        from pipeline.cli import main as cli
    except ModuleNotFoundError as error:
        print(
            f"on_cluster: semmae in {home} needs {error.name}, which {sys.executable} does not have; "
            "install requirements.lock there, or put the right Python first on PATH",
            file=sys.stderr,
        )
        return 2
    return cli()


if __name__ == "__main__":
    sys.exit(main())
