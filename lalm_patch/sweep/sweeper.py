"""Planning a sweep: every run of it is checked before the sweep's folder is made or a file in it is replaced."""

from __future__ import annotations

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from lalm_patch.sweep.launchers import SweepLauncher


class CheckedSweeper(BasicSweeper):  # type: ignore[misc]
    """Hydra's own, which writes `multirun.yaml` before it looks at the runs."""

    def sweep(self, arguments: list[str]) -> Any:
        """See `BasicSweeper`.

        Raises:
            ConfigError: of the first run that cannot run.
            StoreError: the first run's folder that cannot be written.
        """
        if isinstance(self.launcher, SweepLauncher):
            parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
            given = parser.parse_overrides([*self._parse_config(), *arguments])
            first = 0
            for batch in self.split_arguments(given, self.max_batch_size):
                self.launcher.plan(batch, first)
                first += len(batch)
        return super().sweep(arguments)
