"""Submits a run to an existing Ray cluster as a job, and shows what it prints."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flowalign.cluster.errors import ClusterError
from flowalign.cluster.packed import check_hides_nothing
from flowalign.cluster.tokens import own_token
from flowalign.config.section import ConfigError
from flowalign.config.words import advice
from flowalign.record.textfiles import TextError, read_text
from rewards.errors import one_line
from rewards.missing import hint
from rewards.printable import printable, printable_lines

ALWAYS_EXCLUDED = (".git", ".venv", "runs", "wandb", "__pycache__", ".pytest_cache", ".ruff_cache")
RECONNECT_S = 1.0
_SAID = 300  # characters of what Ray says of an error
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
STOP_WAIT_S = 3600  # Ray's own 3 s between SIGTERM and SIGKILL are too short for an iteration and its checkpoint


class ClusterFile(BaseModel):
    """A cluster to launch on: a YAML file such as ``configs/cluster/example.yaml``, which explains each key."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    address: Annotated[str, Field(pattern=r"^https?://[^/\s]+$")]
    runs_dir: Annotated[str, Field(pattern=r"^/")]
    token_env: str | None = None
    python: str = "python"
    pip: list[str] = Field(default_factory=list)
    env_vars: dict[str, str] = Field(default_factory=dict)
    exclude: list[str] = Field(default_factory=list)


def read_cluster_file(path: Path) -> ClusterFile:
    """Parse a cluster file strictly.

    Raises:
        ClusterError: names the file, the key and what to do.
    """
    from flowalign.record.yamlfiles import parse_yaml, plain

    if not path.is_file():
        raise ClusterError(f"--cluster: {path} does not exist{hint(path)}; start from configs/cluster/example.yaml")
    try:
        content = plain(parse_yaml(read_text(path), str(path)))
    except (TextError, ConfigError) as error:
        raise ClusterError(f"--cluster: {error}") from None
    if not isinstance(content, dict):
        raise ClusterError(f"--cluster: {path} holds no keys; start from configs/cluster/example.yaml")
    try:
        return ClusterFile.model_validate(content)
    except ValidationError as error:
        raise ClusterError(f"--cluster: {path}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = get_close_matches(key, ClusterFile.model_fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(ClusterFile.model_fields)}"
        return f"unknown key {key!r}; {hint}"
    wanted = {
        "address": "the dashboard's http://host:port, 8265 by default",
        "runs_dir": "an absolute path that every node shares",
    }
    if first["type"] == "missing":
        said = "is missing"
    else:
        said = f"got {first['input']!r}"
        if first["type"] != "string_pattern_mismatch":
            said += f"; {advice(first, ClusterFile.model_fields.get(str(first['loc'][0])))}"
    return f"{key}: {said}" + (f"; give {wanted[key]}" if key in wanted else "")


def launch(
    config_path: Path,
    cluster_file: Path,
    overrides: Sequence[str] = (),
    *,
    working_dir: Path | None = None,
    write: Callable[[str], Any] = sys.stdout.write,
) -> int:
    """Run ``flowalign align config_path overrides…`` on the cluster; returns the job's exit code.

    ``working_dir`` (the current directory) travels with the job without ``.git``, ``.venv``, ``runs`` and what
    ``.gitignore`` names. Ctrl-C stops watching, not the job.

    Raises:
        ClusterError: a wrong cluster file, a missing token, no cluster at the address, or a file that would travel and
            hide a module.
    """
    cluster = read_cluster_file(cluster_file)
    home = (working_dir or Path.cwd()).resolve()
    command = entrypoint(cluster, config_path, overrides, home)
    check_hides_nothing(home, [*ALWAYS_EXCLUDED, *cluster.exclude])
    client = _connect(cluster)
    try:
        job = client.submit_job(entrypoint=command, runtime_env=runtime_env(cluster, home))
    except (RuntimeError, ValueError, OSError) as error:
        raise ClusterError(f"the cluster at {cluster.address} refused the job: {one_line(error, _SAID)}") from None
    write(f"job {job} submitted to {cluster.address}\n")
    try:
        return asyncio.run(_follow(client, job, write))
    except KeyboardInterrupt:
        write(
            "\nno longer watching; the job goes on.\n"
            f"watch it: ray job logs {job} --follow --address {cluster.address}\n"
            "stop it: flowalign stop RUN (on any machine that sees the run directory), or "
            f"ray job stop {job} --address {cluster.address}; both leave a checkpoint\n"
        )
        return 130


def entrypoint(cluster: ClusterFile, config_path: Path, overrides: Sequence[str], home: Path) -> str:
    """Return the shell command of the job; the user's overrides win over the cluster file's ``runs_dir``."""
    try:
        config = config_path.resolve().relative_to(home)
    except ValueError:
        raise ClusterError(
            f"{config_path} lies outside of {home}, which is what travels to the cluster; copy it in there"
        ) from None
    if not (home / config).is_file():
        raise ClusterError(f"{config_path} does not exist{hint(config_path)}")
    command = [cluster.python, "-m", "flowalign.cli", "align", str(config), f"runs_dir={cluster.runs_dir}"]
    return shlex.join([*command, *overrides, "cluster.backend=ray", "cluster.address=auto"])


def runtime_env(cluster: ClusterFile, home: Path) -> dict[str, Any]:
    environment: dict[str, Any] = {
        "working_dir": str(home),
        "excludes": [*ALWAYS_EXCLUDED, *cluster.exclude],
        "env_vars": {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **cluster.env_vars},
    }
    return {**environment, "pip": cluster.pip} if cluster.pip else environment


def _connect(cluster: ClusterFile) -> Any:
    token = None
    if cluster.token_env is not None:
        token = os.environ.get(cluster.token_env)
        if not token:
            raise ClusterError(f"token_env: {cluster.token_env} is not set in this environment; put the token there")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    last = token or own_token()
    for given in (last,) if last == token else (None, last):
        try:
            headers = None if given is None else {"Authorization": f"Bearer {given}"}
            return JobSubmissionClient(cluster.address, headers=headers)
        except AuthenticationError:
            continue
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"address: no Ray dashboard answers at {cluster.address} ({one_line(error, _SAID)})"
            ) from None
    way = "run `ray get-auth-token` on its head, put the answer into a variable and name that in token_env"
    said = "asks for a token, and there is none here" if last is None else "refused the token"
    raise ClusterError(
        f"the cluster at {cluster.address} {said}; {way}, or copy the head's ~/.ray/auth_token to the same place here"
    )


async def _follow(client: Any, job: str, write: Callable[[str], Any]) -> int:
    """Print the log until the job ends; after a lost connection go on where it broke."""
    shown = 0
    while True:
        seen = 0
        try:
            async for text in client.tail_job_logs(job):
                new = text[max(0, shown - seen) :]
                seen += len(text)
                shown = max(shown, seen)
                write(printable_lines(_COLOURS.sub("", new).replace("\r\n", "\n")))
        except (RuntimeError, OSError):
            time.sleep(RECONNECT_S)
        info = client.get_job_info(job)
        if info.status.is_terminal():
            return _exit_code(info, write)


def _exit_code(info: Any, write: Callable[[str], Any]) -> int:
    if info.status.value == "SUCCEEDED":
        return 0
    code = info.driver_exit_code
    if code is None:
        write(f"the job {info.status.value.lower()}: {printable(one_line(info.message, _SAID))}\n")
        return 1
    return 128 - code if code < 0 else code or 1  # as a shell says that a signal ended it
