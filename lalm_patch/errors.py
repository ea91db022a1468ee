"""Every error a user can cause, in one tree.

    LalmPatchError              one sentence: what was expected, what came, what to do
    ├── ConfigError             a setting, or a combination of settings, that cannot run
    ├── DataError               a data set: folder, table, labels, an empty selection
    │   └── AudioError          one clip: names the file and the reason
    ├── ModelError              a checkpoint that cannot be found, opened or traced
    ├── HostError               a remote host that cannot be reached, refuses, or fails to run what it was sent
    ├── CheckError              a run's own check failed: its numbers would not mean what they say
    └── StoreError              a run folder that is damaged, or belongs to other settings
        └── BusyError           another process has the run folder

The command line prints these without a traceback and exits with status 1. Anything else that is raised
is a defect of the package and keeps its traceback.
"""

from __future__ import annotations


class LalmPatchError(Exception):
    """Base class: `str(error)` is a message a stranger can act on."""


class ConfigError(LalmPatchError):
    """A setting, or a combination of settings, that cannot run."""


class DataError(LalmPatchError):
    """A data set that cannot be used: missing folder, malformed table, empty selection."""


class AudioError(DataError):
    """A clip that must not be used. The message starts with the clip's name.

    Attributes:
        kind: what is wrong in a word or two, for counts: `truncated`, `too long`.
    """

    def __init__(self, message: str, kind: str = "unusable") -> None:
        super().__init__(message)
        self.kind = kind


class ModelError(LalmPatchError):
    """A checkpoint that cannot be found, opened, or traced with this method."""


class HostError(LalmPatchError):
    """A remote host that cannot be reached, refuses a request, or fails to run it. Finished samples are kept."""


class CheckError(LalmPatchError):
    """A self-check of the run failed."""


class StoreError(LalmPatchError):
    """A run folder that is in use by another process, damaged, or made with other settings."""


class BusyError(StoreError):
    """A run folder that another process has; nothing is wrong with the run."""
