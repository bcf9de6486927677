"""A folder per submission, ``RUN/submit-N``, that holds all that its jobs read.

    config.yaml   the resolved configuration
    code/         our packages, as they were, without compiled libraries
    user/         the user's own files that the configuration names, and site.sh
    NAME.sbatch   one script per job
    logs/
    jobs.json     job ids, written after each submission

Editing the checkout or the configuration while a chain waits changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from configs.corrupt import report_corrupt
from configs.errors import ConfigError, DataError
from configs.load import copy_of_preset, dump_config
from configs.redaction import has_secret
from configs.runtime.hints import hint
from configs.runtime.publish import publish_bytes
from configs.schema import Config

PACKAGES = ("configs", "sharding", "encoders", "training", "eval", "slurm", "movienet_stream")

_JOBS = "jobs.json"

_TUPLES = ("after_ok", "after_any", "overrides")


@dataclass(frozen=True)
class Submitted:
    """One job of a chain; ``job_id`` is None until Slurm has accepted it."""

    name: str
    stage: str
    step: str
    tasks: int
    array: str | None
    offset: int
    after_ok: tuple[str, ...]
    after_any: tuple[str, ...]
    overrides: tuple[str, ...]
    data_set: str = ""
    job_id: int | None = None


@dataclass(frozen=True)
class Frozen:
    """A submission folder."""

    folder: Path
    label: str
    """Beginning of its job names."""

    jobs: tuple[Submitted, ...]

    def accepted(self, name: str, job_id: int) -> Frozen:
        """Record a job id at once, and return the folder as it is then."""
        jobs = tuple(replace(job, job_id=job_id) if job.name == name else job for job in self.jobs)
        return replace(self, jobs=jobs).record()

    def record(self) -> Frozen:
        """Write ``jobs.json``."""
        tree = {"label": self.label, "jobs": [asdict(job) for job in self.jobs]}
        publish_bytes(self.folder / _JOBS, f"{json.dumps(tree, indent=1)}\n".encode())
        return self


def next_folder(run_dir: Path) -> Path:
    """Make and return ``submit-N``, N one above the highest; another process takes another N."""
    run_dir.mkdir(parents=True, exist_ok=True)
    while True:
        folder = run_dir / f"submit-{_last(run_dir) + 1}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder.resolve()


def label_of(config: Config, folder: Path) -> str:
    """Return the beginning of job names, which no other submission of this user has."""
    place = hashlib.sha256(str(folder).encode()).hexdigest()[:6]
    return f"{config.training.run_name}.{folder.name.rpartition('-')[2]}.{place}"


def freeze(config: Config, folder: Path) -> Config:
    """Copy configuration, code and the user's files; return the configuration with their copies.

    Raises:
        ConfigError: a file that the configuration names is missing, or a URL contains a secret,
            which would be stored in ``config.yaml``.
    """
    _reject_secrets(config)
    user = folder / "user"
    user.mkdir()
    (folder / "logs").mkdir()
    frozen = _freeze_user_files(config, user)
    publish_bytes(folder / "config.yaml", dump_config(frozen).encode())
    for package in PACKAGES:
        copy_package(package, folder / "code")
    return frozen


def _reject_secrets(config: Config) -> None:
    for section, values in config.model_dump(mode="json", by_alias=True).items():
        for key, value in values.items() if isinstance(values, dict) else ():
            if has_secret(str(value)):
                raise ConfigError(
                    f"{section}.{key}: got a URL with a password or query, want one without, since "
                    "jobs read it from a file; put the password into ~/.netrc, or signed URLs "
                    "of a dump into a .txt file that only you can read"
                )


def open_submission(run_dir: Path, number: int | None = None) -> Frozen:
    """Read ``submit-N``; the newest by default.

    Raises:
        DataError: there is none, or its record is damaged.
    """
    number = number or _last(run_dir)
    path = run_dir / f"submit-{number}" / _JOBS
    if not path.is_file():
        raise DataError(f"{run_dir}: no submission; first run {hint('movienet-slurm submit')}")
    with report_corrupt(path, "delete its folder"):
        tree = json.loads(path.read_bytes())
        jobs = tuple(_submitted(job) for job in tree["jobs"])
        return Frozen(path.parent.resolve(), tree["label"], jobs)


def _submitted(tree: dict[str, Any]) -> Submitted:
    return Submitted(**tree | {name: tuple(tree[name]) for name in _TUPLES})


def _last(run_dir: Path) -> int:
    names = (path.name.removeprefix("submit-") for path in run_dir.glob("submit-*"))
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _freeze_user_files(config: Config, user: Path) -> Config:
    """Copy each file that a key names, and return a configuration that names the copies."""
    keys: Sequence[tuple[str, str, str | None]] = (
        ("model", "class_", config.model.class_),
        ("training", "loss", config.training.loss),
        ("encoder", "model", config.encoder.model),
        ("eval", "prompts", config.eval.prompts),
        ("slurm", "site", config.slurm.site),
    )
    for section, key, value in keys:
        is_file = key in ("prompts", "site")
        if value is None or not (is_file or ".py:" in value or value.endswith(".json")):
            continue
        path, colon, name = value.partition(".py:")
        source = Path(path + ".py" if colon else path)
        if not source.is_file():
            key = key.rstrip("_")
            raise ConfigError(f"{section}.{key}: no file {str(source)!r}{copy_of_preset(source)}")
        copy = user / source.name
        if copy.exists() and copy.read_bytes() != source.read_bytes():
            copy = user / f"{section}-{source.name}"
        shutil.copyfile(source, copy)
        update = {key: f"{copy}:{name}" if colon else str(copy)}
        changed = getattr(config, section).model_copy(update=update)
        config = config.model_copy(update={section: changed})
    return config


def copy_package(package: str, code: Path) -> None:
    """Copy an installed package into a folder, without the libraries compiled for this machine.

    Jobs use those of the installation on their node, which may have another processor.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"package {package}: not installed")
    ignored = shutil.ignore_patterns("__pycache__", ".*", "*.svg", "*.so")
    shutil.copytree(Path(spec.origin).parent, code / package, ignore=ignored)
