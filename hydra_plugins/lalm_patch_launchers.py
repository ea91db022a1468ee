"""The launchers of `conf/hydra/launcher`, in the namespace package where Hydra looks for plugins.

There is no `__init__.py` beside this file, and must not be: the namespace belongs to all plugins.
"""

from lalm_patch.sweep.launchers import JoblibSweep, LocalSweep
from lalm_patch.sweep.slurm import SlurmSweep


class LocalLauncher(LocalSweep):
    """`hydra/launcher=lalm_patch_local`, the default."""


class JoblibLauncher(JoblibSweep):
    """`hydra/launcher=lalm_patch_joblib`."""


class SlurmLauncher(SlurmSweep):
    """`hydra/launcher=lalm_patch_slurm`."""
