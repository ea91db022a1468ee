"""The command `python -m lalm_patch.collect`; what it does is in `lalm_patch.sweep.collection`."""

from __future__ import annotations

from lalm_patch.sweep.collection import collect, main, read_runs

__all__ = ["collect", "main", "read_runs"]

if __name__ == "__main__":
    main()
