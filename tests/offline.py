"""Imported before anything that may look things up: no test reaches for a network, whatever it loads."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
