"""`python -m lalm_patch`."""

from lalm_patch.cli import main

main()
