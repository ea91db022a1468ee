"""How the demo model and its corpus were made. Needs the extra `train` (espeak-ng is GPL; clips it makes are not)."""
