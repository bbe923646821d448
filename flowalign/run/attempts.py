"""The loop of a run that outlives its learner's ranks: it goes back to the last checkpoint and on from there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from rich.console import Console

from flowalign.config.run import RunConfig
from flowalign.record.checkpoint import Checkpoint, CheckpointError, Say
from flowalign.record.lock import RunLock
from flowalign.record.progress import PLAIN, duration
from flowalign.record.stop import StopRequest
from flowalign.run.journal import RunJournal
from flowalign.run.loop import iterate
from flowalign.run.made import MadeOf
from flowalign.run.protocols import Backend, Journal, Run
from flowalign.run.ranks import SharedJournal
from flowalign.run.restarts import RankLost, Restarts
from flowalign.run.resume import leave_behind, resume_from


class Attempts:
    """Runs the loop; each attempt is what the same command, given again, would do, with a journal of its own.

    ``restore`` brings prompts and learner to a checkpoint's state; None is the run's beginning, where a learner is that
    was just made.
    Where this process is not ``alone`` in the run, others do the same loop.
    """

    def __init__(
        self,
        config: RunConfig,
        backend: Backend,
        restore: Callable[[Checkpoint | None], None],
        *,
        console: Console,
        made: MadeOf,
        lock: RunLock,
        stop: StopRequest,
        alone: bool = True,
    ) -> None:
        self._config, self._backend, self._restore = config, backend, restore
        self._lock, self._stop, self._alone = lock, stop, alone
        self._say: Say = partial(console.print, **PLAIN)
        self._open = partial(RunJournal, config, lock.run_dir, console, made=made, lock=lock, stop=stop)
        self._journal: RunJournal | None = None
        self._restarts, self._before = Restarts(config.cluster), 0
        self._start = 0
        self.stopped = False

    def run(self, run: Run, start: int, wall_s: float) -> int:
        """Work from iteration ``start`` on; return the last iteration.

        Raises:
            RankLost: a rank was lost once more than `Restarts` allows. EndedEarly: somebody asked for the end while the
            learner started again. What the loop raises.
        """
        self._start, lost, wait_s = start, "", 0.0
        self._journal = self._open(start=start, wall_s=wall_s)
        self._before = self._journal.restarts
        while True:
            try:
                if self._journal is None:
                    wall_s = self._go_back(lost, wait_s)
                    restarts = self._before + self._restarts.total
                    self._journal = self._open(start=self._start, wall_s=wall_s, restarts=restarts)
                done = iterate(run, self._backend, self._kept(self._journal), self._start)
                self.stopped = self._journal.stopped
                return done
            except RankLost as error:
                iteration = self._start + 1 if self._journal is None else self._journal.at
                wait_s, lost = self._restarts.wait_s(error, iteration), str(error)
            self.close()  # what the error held of the lost iteration is let go before it is done again

    def _kept(self, journal: RunJournal) -> Journal:
        return journal if self._alone else SharedJournal(self._config, journal, self._stop)

    def _go_back(self, lost: str, wait_s: float) -> float:
        """Make the learner again and bring it to the last checkpoint; return the run's seconds until then."""
        run_dir, resume = self._lock.run_dir, self._config.checkpoint.resume
        if self._stop.asked:
            self._say(lost)
        with self._stop.interruptible():
            try:
                saved = resume_from(run_dir, "auto", self._say)
            except CheckpointError as error:
                raise CheckpointError(f"{lost}; {error}") from error
            self._start = 0 if saved is None else saved.step
            self._stop.done = self._start
            at = "the beginning, since there is no checkpoint yet" if saved is None else str(saved.path)
            times = f"{self._restarts.count} of at most {self._restarts.most} times"
            self._say(f"restarted: {lost}; all its ranks begin again in {duration(wait_s)} from {at} ({times})")
            self._stop.wait(wait_s)
            self._backend.restart_learner()
            self._restore(saved)
            self._lock.check()
            if saved is not None:
                leave_behind(run_dir, "auto" if resume == "never" else resume, saved, self._say)
        return 0.0 if saved is None else float(saved.state.get("wall_s", 0.0))

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
        self._journal = None
