"""Sweeps on Slurm: hydra-submitit-launcher's jobs, watched through `squeue` alone.

submitit asks `sacct` whether a job ended, and waits for ever where the site has no accounting. `squeue` is everywhere;
what became of a run is read in its folder. The ids of submitted jobs are kept there too, so that the same command,
started again while jobs are queued or running, waits for those instead of submitting them twice.
"""

from __future__ import annotations

import getpass
import json
import logging
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from hydra.core.singleton import Singleton

from lalm_patch.errors import ConfigError
from lalm_patch.storage.journal import dump_json, replace_file
from lalm_patch.sweep.launchers import NEEDS, SlurmJob, SweepLauncher
from lalm_patch.sweep.runs import DONE, State, SweepRun, status

log = logging.getLogger(__name__)

JOB = "slurm_job.json"
_OWN = ("max_array_size", "poll_s", "result_wait_s")
_WAITS_FOR_ITS_TURN = {"None", "Priority", "Resources", "JobArrayTaskLimit", "BeginTime", "Dependency", ""}


class SlurmSweep(SweepLauncher):
    """One Slurm job per run, in arrays; only runs that are neither finished nor in the queue are submitted."""

    def known_parameters(self) -> frozenset[str]:
        """See `SweepLauncher`: this launcher's own, the plugin's, and what submitit writes into a job's script."""
        try:
            from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
            from submitit.slurm.slurm import SlurmExecutor
        except ImportError:
            raise ConfigError(NEEDS.format("slurm")) from None
        plugins = frozenset(SlurmQueueConf.__dataclass_fields__) - {"_target_"}
        return plugins | frozenset(SlurmExecutor._valid_parameters()) | frozenset(_OWN)

    def submit(self, runs: list[SweepRun], overrides: list[list[str]], first: int) -> None:
        """See `SweepLauncher`. Returns when no job of these runs is left in the queue."""
        recorded = {run.folder: job for run in runs if (job := recorded_job(run.folder)) is not None}
        queue = self._settled_queue(list(recorded.values()))
        jobs = {folder: job for folder, job in recorded.items() if job in queue}
        numbers = [i for i, run in enumerate(runs) if run.folder not in jobs]
        for job in jobs.values():
            log.info("in the queue already, not submitted again: job %s", job)
        log.info("%d of %d runs to submit", len(numbers), len(runs))
        size = int(self.parameters["max_array_size"])
        for start in range(0, len(numbers), size):
            part = numbers[start : start + size]
            jobs |= self._submit_array([(runs[i], overrides[i], first + i) for i in part])
        try:
            self._wait(jobs)
        except KeyboardInterrupt:
            arrays = sorted({job.partition("_")[0] for job in jobs.values()})
            log.warning(
                "the jobs go on without this command: `scancel %s` stops them; the same command waits for them again",
                " ".join(arrays),
            )
            raise

    def _submit_array(self, tasks: list[tuple[SweepRun, list[str], int]]) -> dict[Path, str]:
        import submitit
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
        from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

        own = (*_OWN, "submitit_folder", "max_num_timeout")
        launcher = SlurmLauncher(**{key: value for key, value in self.parameters.items() if key not in _OWN})
        launcher.setup(hydra_context=self.hydra_context, task_function=self.task_function, config=self.config)
        given = {key: value for key, value in launcher.params.items() if key not in own}
        shared = BaseQueueConf.__dataclass_fields__
        try:
            executor = submitit.AutoExecutor(
                launcher.params["submitit_folder"],
                cluster="slurm",
                slurm_max_num_timeout=launcher.params["max_num_timeout"],
            )
            executor.update_parameters(**{key if key in shared else f"slurm_{key}": given[key] for key in given})
            arguments = [
                (str(run.folder), given, "hydra.sweep.dir", number, str(number), Singleton.get_state())
                for run, given, number in tasks
            ]
            jobs = executor.map_array(SlurmJob(launcher), *zip(*arguments, strict=True))
        except (RuntimeError, submitit.core.utils.FailedJobError) as error:
            sys.exit(f"error: the jobs cannot be submitted: {error}")
        submitted = {run.folder: str(job.job_id) for (run, _, _), job in zip(tasks, jobs, strict=True)}
        for folder, job in submitted.items():
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(folder / JOB, dump_json({"job": job}))
        log.info("submitted: %d jobs, %s", len(jobs), jobs[0].job_id.partition("_")[0])
        return submitted

    def _settled_queue(self, jobs: list[str]) -> Mapping[str, tuple[str, str]]:
        """The queue, once none of these jobs is just being ended: such a one still holds its run's folder."""
        if not jobs:
            return {}
        while True:
            queue = read_queue()
            ending = [job for job in jobs if queue is None or queue.get(job, ("", ""))[0] == "COMPLETING"]
            if not ending and queue is not None:
                return queue
            log.info("waiting for jobs that are being ended: %s", ", ".join(ending))
            time.sleep(float(self.parameters["poll_s"]))

    def _wait(self, jobs: Mapping[Path, str]) -> None:
        """Until no job is queued or running, and the results of those that ended well can be seen here."""
        while True:
            self._wait_for_an_empty_queue(jobs)
            # The files of another machine may be seen late on a network file system; and a job that is being
            # requeued is for a moment in no queue.
            until = time.monotonic() + float(self.parameters["result_wait_s"])
            while not self._queued(jobs):
                if all(status(folder).state in (*DONE, State.FAILED) for folder in jobs) or time.monotonic() > until:
                    return
                time.sleep(min(1.0, float(self.parameters["poll_s"])))

    def _queued(self, jobs: Mapping[Path, str]) -> dict[str, tuple[str, str]] | None:
        """State and reason of those of these jobs that are in the queue; None if Slurm cannot say now."""
        queue = read_queue()
        return None if queue is None else {job: queue[job] for job in jobs.values() if job in queue}

    def _wait_for_an_empty_queue(self, jobs: Mapping[Path, str]) -> None:
        said: object = None
        while (left := self._queued(jobs)) is None or left:
            if left is not None:
                counts = Counter(state for state, _ in left.values())
                reasons = {reason for state, reason in left.values() if state == "PENDING"} - _WAITS_FOR_ITS_TURN
                if (counts, reasons) != said:
                    said = (counts, reasons)
                    states = [f"{count} {state.lower()}" for state, count in sorted(counts.items())]
                    ended = [f"{len(jobs) - len(left)} ended"] if len(left) < len(jobs) else []
                    log.info("jobs: %s", ", ".join(states + ended))
                    for reason in sorted(reasons):
                        log.warning("jobs wait for a reason that may not pass: %s", reason)
            time.sleep(float(self.parameters["poll_s"]))
        log.info("jobs: %d ended", len(jobs))


def recorded_job(folder: Path) -> str | None:
    """Id of the Slurm job that was last submitted for a run; None if none was."""
    try:
        return str(json.loads((folder / JOB).read_bytes())["job"])
    except FileNotFoundError:
        return None


def read_queue() -> dict[str, tuple[str, str]] | None:
    """State and reason of the user's jobs in the queue (also ending ones), by id; None if Slurm cannot say now."""
    command = ["squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i|%T|%r"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    except FileNotFoundError:
        sys.exit("error: squeue was not found: start the sweep on a machine of the cluster that can submit jobs")
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        log.warning("squeue does not answer, asked again later: %s", getattr(error, "stderr", None) or error)
        return None
    rows = (line.strip().split("|", 2) for line in done.stdout.splitlines() if line.strip())
    return {job: (state, reason) for job, state, reason in rows}
