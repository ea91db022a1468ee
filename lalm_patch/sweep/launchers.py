"""Sweeps: which runs are submitted, where, and how their end is noticed.

Hydra finds launchers in the namespace `hydra_plugins` only; the classes there are those below under a name it accepts.
A launcher here plans the sweep, leaves out what is finished, hands the rest to Hydra's own launcher of that kind and
takes the outcome from the run folders: what a scheduler says about a job is not what became of the run.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from lalm_patch.config import register, to_settings
from lalm_patch.config.words import nearest
from lalm_patch.errors import ConfigError, LalmPatchError
from lalm_patch.storage.places import not_writable, unwritable
from lalm_patch.storage.run_store import is_finished
from lalm_patch.storage.shards import run_folder_of
from lalm_patch.sweep.runs import DONE, LAST_FIGURE_FILE, State, SweepRun, status

log = logging.getLogger(__name__)

NEEDS = "hydra/launcher: this launcher needs another package: pip install 'lalm_patch[{}]'"
METRIC_KEYS = ("metric", "metric.name")

sweep: list[SweepRun] = []
"""The runs of this process's sweep so far, for the summary at its end: Hydra hands launchers nothing to report to."""


class SweepLauncher(Launcher):  # type: ignore[misc]
    """What all launchers share: plan, leave out, launch, report.

    Args:
        parameters: settings of the launcher that does the work.
    """

    def __init__(self, **parameters: Any) -> None:
        self.parameters = parameters
        self._plans: dict[tuple[tuple[str, ...], ...], list[SweepRun]] = {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `launch`."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        self.check_parameters()

    def check_parameters(self) -> None:
        """Raises ConfigError for a key of `hydra.launcher` that this launcher lacks, or a value it cannot use."""
        known = self.known_parameters()
        for key in self.parameters:
            if key not in known:
                there = f"the nearest is hydra.launcher.{nearest(key, known)}" if known else "it has none at all"
                raise ConfigError(f"hydra.launcher.{key}: this launcher has no such setting; {there}")

    def known_parameters(self) -> frozenset[str]:
        """The keys of `hydra.launcher` that do something."""
        return frozenset()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Launch the runs that are not finished; called by Hydra once per batch.

        What failed is in the run's folder and in the summary: an error in what is returned here would make Hydra stop.
        """
        plan = self.plan(job_overrides, initial_job_idx)
        first_of = {run.folder: i for i, run in reversed(list(enumerate(plan)))}
        sweep.extend(plan[i] for i in sorted(first_of.values()))
        todo = [i for i in sorted(first_of.values()) if not plan[i].before]
        log.info("%d of %d runs to do; %d finished before", len(todo), len(first_of), len(first_of) - len(todo))
        Path(str(self.config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        if todo:
            self.submit([plan[i] for i in todo], [list(job_overrides[i]) for i in todo], initial_job_idx)
        return [_nothing_to_raise(overrides) for overrides in job_overrides]

    def plan(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[SweepRun]:
        """The runs of a batch, all of them checked; nothing is written. What was planned once is known.

        Raises:
            ConfigError: of the first run that cannot run.
            StoreError: the first run's folder that cannot be written.
        """
        key = tuple(map(tuple, job_overrides))
        if key not in self._plans:
            plan = [self._planned(overrides, first + i) for i, overrides in enumerate(job_overrides)]
            _check_metrics(plan)
            for run in plan:
                if not run.before and (why := unwritable(run.folder)) is not None:
                    raise not_writable(why)
            self._plans[key] = plan
        return self._plans[key]

    def submit(self, runs: list[SweepRun], overrides: list[list[str]], first: int) -> None:
        """Carry out `runs` and return when they ended, well or not."""
        raise NotImplementedError

    def _planned(self, overrides: Sequence[str], number: int) -> SweepRun:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.num, config.hydra.job.id = number, str(number)
        to_settings(config)  # what is wrong with one run is said before any of them is started
        folder = Path(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir)).absolute()
        run = SweepRun(tuple(filter_overrides(overrides)), folder)
        return replace(run, before=_finished_before(config, folder))


def _check_metrics(plan: Sequence[SweepRun]) -> None:
    """Raises ConfigError where one run is planned with several metrics: only the first one would be drawn."""
    asked: dict[Path, set[str]] = {}
    for run in plan:
        named = [override.partition("=")[2] for override in run.overrides if override.split("=")[0] in METRIC_KEYS]
        asked.setdefault(run.folder, set()).update(named)
    if several := next((names for names in asked.values() if len(names) > 1), None):
        raise ConfigError(
            f"metrics {', '.join(sorted(several))} are all read from one run: leave them out of the sweep and use "
            "metric=all, or python -m lalm_patch.report --metric NAME"
        )


def _nothing_to_raise(overrides: Sequence[str]) -> JobReturn:
    done = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
    done.return_value = None
    return done


def _finished_before(config: DictConfig, folder: Path) -> bool:
    """Whether the very run is finished: same settings, clips, weights and versions, its figure drawn."""
    run = run_folder_of(folder)
    if status(run).state is not State.FINISHED or not (run / LAST_FIGURE_FILE).exists():
        return False
    from lalm_patch.run import run_identity

    try:
        return is_finished(run, run_identity(to_settings(config)))
    except LalmPatchError as error:
        log.info("%s: to be looked at again, because %s", run.name, error)
        return False


class LocalSweep(SweepLauncher):
    """One run after another in this process; right for one GPU."""

    def submit(self, runs: list[SweepRun], overrides: list[list[str]], first: int) -> None:
        """See `SweepLauncher`."""
        from hydra._internal.core_plugins.basic_launcher import BasicLauncher

        self._hand_over(BasicLauncher(), overrides, first)

    def _hand_over(self, launcher: Launcher, overrides: list[list[str]], first: int) -> None:
        launcher.setup(hydra_context=self.hydra_context, task_function=self.task_function, config=self.config)
        launcher.launch(overrides, first)


class JoblibSweep(LocalSweep):
    """Several processes on this machine; right for a few CPU cores.

    A killed worker (out of memory) breaks joblib's pool and with it every other run. Those are started again as
    long as every round stores more samples; the runs that always die are left for the summary.
    """

    def known_parameters(self) -> frozenset[str]:
        """See `SweepLauncher`."""
        try:
            from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf
        except ImportError:
            raise ConfigError(NEEDS.format("joblib")) from None
        return frozenset(JobLibLauncherConf.__dataclass_fields__) - {"_target_"}

    def check_parameters(self) -> None:
        """See `SweepLauncher`."""
        super().check_parameters()
        jobs = self.parameters.get("n_jobs", 1)
        if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs == 0:
            raise ConfigError(f"hydra.launcher.n_jobs={jobs}: expected a number of processes, or -1 for all cores")

    def submit(self, runs: list[SweepRun], overrides: list[list[str]], first: int) -> None:
        """See `SweepLauncher`."""
        from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
        from joblib.externals.loky.process_executor import BrokenProcessPool

        remaining = list(zip(runs, overrides, strict=True))
        while remaining:
            before = _stored(remaining)
            try:
                self._hand_over(JoblibLauncher(**self.parameters), [given for _, given in remaining], first)
                return
            except BrokenProcessPool as error:
                log.warning("a worker process was killed, and the pool with it: %s", " ".join(str(error).split()))
            undone = [(run, given) for run, given in remaining if status(run.folder).state not in (*DONE, State.FAILED)]
            if len(undone) == len(remaining) and _stored(remaining) <= before:
                log.error("no run got any further in this round; %d are left as they are", len(undone))
                return
            log.info("%d runs are started again", len(undone))
            remaining = undone


def _stored(runs: list[tuple[SweepRun, list[str]]]) -> int:
    """Samples that runs have in store."""
    return sum(status(run.folder).samples for run, _ in runs)


class SlurmJob:
    """What a Slurm job carries out: one run, by the launcher plugin's own code.

    Args:
        launcher: hydra-submitit-launcher's, set up.
    """

    def __init__(self, launcher: Any) -> None:
        self.launcher = launcher

    def __call__(self, folder: str, *arguments: Any) -> None:
        """Exits with 1 if the run is not done afterwards, so that Slurm calls the job failed and not completed."""
        register()
        self.launcher(*arguments)
        if status(Path(folder)).state not in DONE:
            sys.exit(1)

    def checkpoint(self, *arguments: Any) -> Any:
        """Called before a requeue (preemption, time limit): the same again, the run goes on from what it stored."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)
