"""Imported by the server that commands are forked from: what every run does the first time takes time, once here.

Imports, YAML, regular expressions, fonts; nothing of it changes what a command does.
"""

import contextlib
import gc
import io

import click  # noqa: F401
import h5netcdf.legacyapi  # noqa: F401
import hydra._internal.logging_config  # noqa: F401
import rich.progress  # noqa: F401
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen2_audio.processing_qwen2_audio  # noqa: F401
import xarray.computation.nanops  # noqa: F401

import lalm_patch.tracing.remote  # noqa: F401
from lalm_patch.config import compose
from lalm_patch.models import LALM

with contextlib.redirect_stderr(io.StringIO()):  # a bar
    LALM.load(compose().model)
gc.collect()
gc.freeze()  # else a child's first collection looks at everything that is here, and copies the pages it is on
