"""The way to a run before anything of it starts: what a command, its ``--dry-run`` and `flowalign check` all go."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flowalign.config.alignment import AlignConfig
from flowalign.config.run import RunConfig
from flowalign.config.section import ConfigError
from flowalign.config.sections import RewardConfig
from flowalign.config.training import PretrainConfig
from flowalign.intake.file import Loaded, load_run
from flowalign.intake.run_directory import accepted_of, check_run
from flowalign.models.checked import check_weights, teacher_model
from flowalign.models.directory import is_pipeline, open_directory
from flowalign.record.installed import is_installed
from flowalign.record.lock import refuse_held
from flowalign.run.made import Accepted

if TYPE_CHECKING:
    from flowalign.run.prepared import Prepared

CONNECT_S = 1.0
_OF = "pip install 'flowalign[train]'"

Say = Callable[[str], object]


@dataclass(frozen=True)
class Ready:
    """A run that nothing known stands against: its configuration, its directory, and what may have changed there."""

    loaded: Loaded[AlignConfig] | Loaded[PretrainConfig]
    command: str
    run_dir: Path
    accepted: Accepted

    @property
    def config(self) -> RunConfig:
        return self.loaded.config


def ready(
    command: str | None,
    path: Path,
    overrides: Sequence[str] = (),
    accepted: Collection[str] = (),
    *,
    take_over: bool = False,
    first: bool = True,
    say: Say = lambda text: None,
) -> Ready:
    """Read a run and check it, its directory, the disk, and what is there to run it; nothing is written or started.

    A ``command`` of None is that which the configuration is for. Of several processes the ``first`` checks for all; the
    others read the configuration alone. ``say`` is told what differs from the file, what hardly was meant, and what may
    be missing later.

    Raises:
        ConfigError: the configuration, or what it asks of this machine, is wrong. RunDirectoryError: its directory
            cannot be taken. PlacementError, ClusterError: its actors have no place.
    """
    loaded = load_run(path, overrides, command, require_files=True)
    config = loaded.config
    own = Ready(loaded, command or config.command, Path(config.runs_dir) / config.name, accepted_of(config, accepted))
    if not first:
        return own
    for line in _said_of(loaded):
        say(line)
    run_dir = check_run(config, accepted)
    from flowalign.run.room import check_room  # a configuration that is wrong is refused without these imports

    if (note := check_room(config, run_dir)) is not None:
        say(note)
    refuse_held(run_dir, take_over=take_over)
    _check_installed(config)
    if config.cluster.backend == "ray":
        from flowalign.cluster.places import check_places

        check_places(config)
    if isinstance(config, AlignConfig):
        from flowalign.intake.check_teachers import check_runs_that_teach

        check_runs_that_teach(config)
    _check_weights(config)
    for line in _silent_servers(config):
        say(line)
    return own


def looked_at(
    command: str | None,
    path: Path,
    overrides: Sequence[str] = (),
    accepted: Collection[str] = (),
    *,
    take_over: bool = False,
    say: Say = lambda text: None,
) -> tuple[Ready, Prepared | None]:
    """Return a run as far as it goes before it starts: `ready`, and then `prepare`, as `flowalign.run.drive` does; the
    second is None of a run that is finished.

    Raises:
        CheckpointError, ConfigError: what it would go on from is damaged, another run's, or was stopped by an alarm;
            else as `ready`.
    """
    own = ready(command, path, overrides, accepted, take_over=take_over, say=say)
    from flowalign.run.prepared import prepare
    from flowalign.safety.collapse import stopped_by_alarm

    prepared = prepare(own.config, own.loaded.base_dir, say, accepted=own.accepted)
    if prepared is not None:
        prepared.close()
    elif (stopped := stopped_by_alarm(own.run_dir, own.config.limits)) is not None:
        raise ConfigError(
            "safety.stop",
            f"{own.run_dir} was stopped after iteration {stopped.iteration} by alarm/{stopped.cause}, and the same "
            "command ends at once; safety.stop=false goes on all the same",
        )
    return own, prepared


def _said_of(loaded: Loaded[AlignConfig] | Loaded[PretrainConfig]) -> Iterator[str]:
    """Yield lines on what differs from the file, what the run has chosen, and what the user hardly meant."""
    if loaded.overridden:
        yield f"overrides: {'; '.join(loaded.overridden)}"
    yield from loaded.chosen
    yield from (f"warning: {note}" for note in loaded.notes)


def _check_installed(config: RunConfig) -> None:
    """Check that the packages are there that a run of this backend and this engine imports."""
    asked = {
        "cluster.backend": ("ray", config.cluster.backend == "ray", "local"),
        "learner.engine": ("deepspeed", config.learner.engine == "deepspeed", "torch"),
    }
    for key, (package, wanted, otherwise) in asked.items():
        if wanted and not is_installed(package):
            raise ConfigError(key, f"{package} is not installed; {_OF}, or write {key}={otherwise}")


def _check_weights(config: RunConfig) -> None:
    """Check that the weights that the run loads are there and whole: of the network, and where images are made of the
    autoencoder and of the text encoders that workers hold."""
    from flowalign.run.teachers import teachers_of

    family, images = open_directory(config.model).family, config.makes_images
    texts = [part for part in family.text if part.startswith("text_encoder")]
    parts = [] if config.model.transformer is not None else ["transformer"]
    parts += ["vae"] if images else []
    parts += texts if images and config.rollout.keeps_text_encoders else []
    check_weights("model.path", config.model, parts)
    if isinstance(config, PretrainConfig) and config.teacher is not None and config.teacher.transformer is None:
        check_weights("teacher.path", config.teacher, ["transformer"])
    for name, teacher in teachers_of(config).items():
        if is_pipeline(Path(teacher.path)):
            check_weights(f"algorithm.teachers.{name}.path", teacher_model(teacher, config.model), ["transformer"])


def _silent_servers(config: RunConfig) -> Iterator[str]:
    """Yield a line for each reward server that does not answer from here: it may start later, or be reached by workers
    alone."""
    named = {f"rewards.{i}": reward for i, reward in enumerate(config.trained_rewards)}
    if config.evaluation.every and config.evaluation.scorer is not None:
        named["evaluation.scorer"] = config.evaluation.scorer
    named |= {f"evaluation.gold.{i}": reward for i, reward in enumerate(config.evaluation.gold)}
    for key, reward in named.items():
        for address in _addresses(reward):
            if (reason := _unreached(address)) is not None:
                yield f"warning: {key}: nothing answers at {address} ({reason}); a run waits for it, and not for ever"


def _addresses(reward: RewardConfig) -> list[str]:
    if not reward.spec.startswith("url:"):
        return []
    replicas = reward.options.get("replicas", ())
    further = [replicas] if isinstance(replicas, str) else replicas
    given = [reward.spec.removeprefix("url:"), *further]
    return [address.strip() for text in given for address in str(text).split(",")]


def _unreached(address: str) -> str | None:
    """Return why nothing listens at an address; None where something does."""
    parts = urlsplit(address)
    try:
        port = parts.port or {"https": 443}.get(parts.scheme, 80)
        socket.create_connection((parts.hostname or "", port), timeout=CONNECT_S).close()
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error) or type(error).__name__
    return None
