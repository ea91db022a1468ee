"""The command line: compose the settings, run, show. Started by `python -m lalm_patch` and by `lalm-patch`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from argparse import Namespace
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lalm_patch.config import at_home, chain, config_folder, explained, load, register, to_settings, told_by_libraries
from lalm_patch.errors import ConfigError, LalmPatchError, StoreError
from lalm_patch.imports import in_command, uncollected
from lalm_patch.settings import RunSettings
from lalm_patch.storage.journal import disk_is_full, storage_error
from lalm_patch.storage.places import not_writable, unwritable
from lalm_patch.storage.run_store import read_receipt
from lalm_patch.storage.shards import run_folder_of
from lalm_patch.sweep.launchers import sweep
from lalm_patch.sweep.runs import failure_recorded, sweep_summary
from lalm_patch.terminal import command_line

log = logging.getLogger(__name__)

_failures: list[str] = []
"""What went wrong in this process, by run; a failed run of a sweep must not stop the others."""

_places: list[Path] = []
"""Where this process's command writes: the run's folder, or the one of all runs of a sweep."""

_begun: list[Path] = []
"""Folders of the runs that began in this process."""

register()  # also in the processes of a sweep: they unpickle `run_one` and never come by `main`


def run_one(config: DictConfig) -> None:
    """One run of the command line; errors a user can put right are logged in one sentence.

    In a sweep nothing is raised: the traceback is in the run's folder, and its siblings go on.
    """
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    _begun.append(folder)
    try:
        command = command_line(hydra_config.overrides.task)
        with failure_recorded(folder, command):
            _carry_out(to_settings(config), folder, command)
    except LalmPatchError as error:
        log.error("error: %s", error)
        _failures.append(str(error))
    except Exception as error:
        if (full := _full(error, folder)) is not None:
            log.error("error: %s", full)
        elif hydra_config.mode != RunMode.MULTIRUN:
            raise
        else:
            log.exception("this run failed")
        _failures.append(str(full or error))


def _carry_out(settings: RunSettings, folder: Path, command: str) -> None:
    with uncollected():
        from lalm_patch.run import dry_run, run

        _quiet_libraries()
    if settings.dry_run:
        print(dry_run(settings))
    else:
        print(run(settings, run_folder_of(folder), command).summary)


def _quiet_libraries() -> None:
    """Leave out what other libraries tell their developers; a bar of weights is of use on a terminal only."""
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", module="transformers")
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def main() -> None:
    """Entry point. Exits with 1 if a run failed or was refused, with 130 if it was interrupted."""
    application = hydra.main(config_path=str(config_folder()), config_name="config", version_base="1.3")(run_one)
    everything = os.environ.get(_RAISE) == "1"
    in_command()
    try:
        if _looked_at(get_args_parser().parse_args()):
            os.environ[_RAISE] = "1"
            application()
    except KeyboardInterrupt:
        _show_sweep()
        print("\ninterrupted: finished samples are kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        told = _told(error)
        if everything or told is None:
            raise
        if _begun:
            _show_sweep()
        print(f"error: {told}", file=sys.stderr)
        sys.exit(1)
    if not _show_sweep() or _failures:
        sys.exit(1)


def _told(error: Exception) -> LalmPatchError | None:
    """What to say of an error that no run is to blame for; None for a defect, which keeps its traceback."""
    if told_by_libraries(error):
        return explained(error, in_shell=True)
    # Hydra makes a run's folder, and files in it, before the run begins, and a sweep's before the first of its runs.
    if _places and (full := _full(error, _places[-1])) is not None:
        return full
    disk = next((link for link in chain(error) if isinstance(link, OSError)), None)
    if _begun or disk is None:
        return None
    return not_writable(f"{disk.strerror or disk}" + (f" ({disk.filename})" if disk.filename else ""))


_SOMEWHERE = "writing there, to a temporary folder, or what this command prints"


def _full(error: Exception, folder: Path) -> StoreError | None:
    """The error of a disk without room, wherever it came up; a write that failed does not tell the name of its file."""
    found = next((link for link in chain(error) if disk_is_full(link)), None)
    if not isinstance(found, OSError):
        return None
    where = Path(os.fsdecode(found.filename)) if isinstance(found.filename, (str, bytes)) else None
    return storage_error(found, where or folder, "writing" if where else _SOMEWHERE)


_RAISE = "HYDRA_FULL_ERROR"
"""Tells Hydra to raise what it would print: what is wrong with settings is said here, in a sentence."""


def _looked_at(arguments: Namespace) -> bool:
    """Check a command's settings before Hydra makes a folder for its run; whether there is something left to do.

    Raises:
        ConfigError: settings that cannot run. Those of a sweep's runs are checked when it is planned.
        StoreError: the run is not finished, and its folder cannot be written.
    """
    if arguments.help or arguments.hydra_help or arguments.info or arguments.shell_completion:
        return True
    if arguments.experimental_rerun is not None:
        return True
    if arguments.config_dir is not None and not Path(arguments.config_dir).is_dir():
        raise ConfigError(f"--config-dir={arguments.config_dir}: expected a folder with YAML files, there is none")
    sys.argv[1:] = [at_home(argument) for argument in sys.argv[1:]]
    config, is_sweep = _composed(arguments)
    if is_sweep:
        _places.append(Path(str(config.hydra.sweep.dir)))
        return True
    settings = to_settings(config)
    folder = Path(str(config.hydra.run.dir))
    _places.append(folder)
    if arguments.cfg or (why := unwritable(folder)) is None:
        return True
    if not settings.dry_run and read_receipt(run_folder_of(folder)) is None:
        raise not_writable(why)
    # Hydra would write its own folder and a log file; there is nothing to note where nothing is computed.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    _carry_out(settings, folder, command_line(arguments.overrides))
    return False


def _composed(arguments: Namespace) -> tuple[DictConfig, bool]:
    """The configuration of a command, and whether it is a sweep."""

    def compose(several: bool) -> DictConfig:
        folder, name, extra = arguments.config_path, arguments.config_name, arguments.config_dir
        return load(arguments.overrides, folder=folder, name=name, extra=extra, several=several, in_shell=True)

    if arguments.multirun:
        return compose(several=True), True
    config, refused = None, None
    try:
        config = compose(several=False)
    except LalmPatchError as error:
        refused = error
    if config is None:
        # An experiment may say that it is a sweep, and then takes several values without -m.
        config = compose(several=True)
        if refused is not None and config.hydra.mode != RunMode.MULTIRUN:
            raise refused
    return config, config.hydra.mode == RunMode.MULTIRUN


def _show_sweep() -> bool:
    """Print how the runs of a sweep ended; whether all are done."""
    if not sweep:
        return True
    text, all_done = sweep_summary(sweep)
    print(text, flush=True)
    return all_done
