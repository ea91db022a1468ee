"""The launchers and the sweeper of `conf/hydra`, in the namespace package where Hydra looks for plugins.

There is no `__init__.py` beside this file, and must not be: the namespace belongs to all plugins.
"""

from lalm_patch.sweep.launchers import JoblibSweep, LocalSweep
from lalm_patch.sweep.slurm import SlurmSweep
from lalm_patch.sweep.sweeper import CheckedSweeper


class LocalLauncher(LocalSweep):
    """`hydra/launcher=lalm_patch_local`, the default."""


class JoblibLauncher(JoblibSweep):
    """`hydra/launcher=lalm_patch_joblib`."""


class SlurmLauncher(SlurmSweep):
    """`hydra/launcher=lalm_patch_slurm`."""


class Sweeper(CheckedSweeper):
    """`hydra/sweeper=lalm_patch`, the default."""
