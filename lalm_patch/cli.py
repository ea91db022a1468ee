"""The command line: compose the settings, run, show. Started by `python -m lalm_patch` and by `lalm-patch`."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lalm_patch.config import config_folder, register, to_settings
from lalm_patch.errors import LalmPatchError
from lalm_patch.storage.shards import run_folder_of
from lalm_patch.sweep.launchers import sweep
from lalm_patch.sweep.runs import failure_recorded, sweep_summary
from lalm_patch.terminal import command_line

log = logging.getLogger(__name__)

_failures: list[str] = []
"""What went wrong in this process, by run; a failed run of a sweep must not stop the others."""

register()  # also in the processes of a sweep: they unpickle `run_one` and never come by `main`


def run_one(config: DictConfig) -> None:
    """One run of the command line; errors a user can put right are logged in one sentence.

    In a sweep nothing is raised: the traceback is in the run's folder, and its siblings go on.
    """
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    try:
        from lalm_patch.run import dry_run, run

        command = command_line(hydra_config.overrides.task)
        with failure_recorded(folder, command):
            _quiet_libraries()
            settings = to_settings(config)
            if settings.dry_run:
                print(dry_run(settings))
            else:
                print(run(settings, run_folder_of(folder), command).summary)
    except LalmPatchError as error:
        log.error("error: %s", error)
        _failures.append(str(error))
    except Exception as error:
        if hydra_config.mode != RunMode.MULTIRUN:
            raise
        log.exception("this run failed")
        _failures.append(str(error))


def _quiet_libraries() -> None:
    """Leave out what other libraries tell their developers; a bar of weights is of use on a terminal only."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", module="transformers")
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def main() -> None:
    """Entry point. Exits with 1 if a run failed, with 130 if it was interrupted."""
    application = hydra.main(config_path=str(config_folder()), config_name="config", version_base="1.3")(run_one)
    try:
        application()
    except KeyboardInterrupt:
        _show_sweep()
        print("\ninterrupted: finished samples are kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    if not _show_sweep() or _failures:
        sys.exit(1)


def _show_sweep() -> bool:
    """Print how the runs of a sweep ended; whether all are done."""
    if not sweep:
        return True
    text, all_done = sweep_summary(sweep)
    print(text, flush=True)
    return all_done
