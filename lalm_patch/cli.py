"""The command line: compose the settings, run, show. Started by `python -m lalm_patch` and by `lalm-patch`."""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lalm_patch.config import config_folder, register, to_settings
from lalm_patch.errors import LalmPatchError

log = logging.getLogger(__name__)

_failures: list[str] = []
"""What went wrong in this process, by run; a failed run of a sweep must not stop the others."""


def run_one(config: DictConfig) -> None:
    """One run of the command line; errors a user can put right are logged in one sentence."""
    try:
        from lalm_patch.run import dry_run, run

        _quiet_libraries()

        settings = to_settings(config)
        if settings.dry_run:
            print(dry_run(settings))
            return
        folder = Path(HydraConfig.get().runtime.output_dir)
        overrides = HydraConfig.get().overrides.task
        print(run(settings, folder, shlex.join(["python", "-m", "lalm_patch", *overrides])).summary)
    except LalmPatchError as error:
        log.error("error: %s", error)
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
    register()
    application = hydra.main(config_path=str(config_folder()), config_name="config", version_base="1.3")(run_one)
    try:
        application()
    except KeyboardInterrupt:
        print("\ninterrupted: finished samples are kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    if _failures:
        sys.exit(1)
