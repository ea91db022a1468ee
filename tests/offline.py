"""Imported before anything that may look things up: no test reaches for a network, whatever it loads.

And before the libraries that count the cores: as many workers as there are cores are at it already.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
