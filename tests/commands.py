"""Commands as processes of their own: real exit codes, signals and streams.

`fresh` starts a new interpreter, as a user's shell does: of every kind of command one test does that. `start` and `run`
fork from a server that has imported what runs import, which takes longer than most runs of the tests, and its pictures
are coarse (`pictures.py`); everything else is as with a new interpreter.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import pictures

from lalm_patch.figures import style

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
}
_OF_SERVER = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join((ENVIRONMENT["PYTHONPATH"], str(Path(__file__).parent)))}
LALM_PATCH = ("-m", "lalm_patch")
PATIENCE = 240
"""Seconds after which a command hangs."""

_children = multiprocessing.get_context("forkserver")
_children.set_forkserver_preload(
    [
        "lalm_patch.cli",
        "lalm_patch.collect",
        "lalm_patch.run",
        "lalm_patch.models.lalm",
        "lalm_patch.tracing.tracer",
        "h5netcdf",
        "pytest",
        "requests",
        "seaborn",
        "transformers.models.qwen2_audio.modeling_qwen2_audio",
        "transformers.tokenization_mistral_common",
        "warmed_up",
    ]
)


def fork(target: Callable[..., None], *arguments: object) -> BaseProcess:
    """A child of the server that calls `target`; it does not outlive this process."""
    with mock.patch.dict(os.environ, _OF_SERVER):  # else the server might import an installed package, not this one
        forkserver.ensure_running()
    child = _children.Process(target=target, args=arguments, daemon=True)
    child.start()
    return child


class Forked:
    """A command forked from the server; methods and attributes are those of `subprocess.Popen`."""

    def __init__(
        self,
        folder: Path,
        arguments: tuple[str, ...],
        environment: Mapping[str, str],
        begin: Callable[[], object] | None = None,
    ) -> None:
        self.args = arguments
        self._streams = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115 (closed by communicate)
        names = [stream.name for stream in self._streams]
        self._child = fork(_carry_out, folder, arguments, {**ENVIRONMENT, **environment}, names, begin)

    @property
    def pid(self) -> int:
        assert self._child.pid is not None
        return self._child.pid

    @property
    def returncode(self) -> int | None:
        return self._child.exitcode

    def poll(self) -> int | None:
        return self._child.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def first_line(self, timeout: float = PATIENCE) -> str:
        """The first line that the command prints; it goes on running."""
        until = time.monotonic() + timeout
        while "\n" not in (said := Path(self._streams[0].name).read_text()):
            assert self.poll() is None, self.communicate()
            assert time.monotonic() < until
            time.sleep(0.005)
        return said.partition("\n")[0]

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        with ExitStack() as stack:
            out, err = (stack.enter_context(stream) for stream in self._streams)
            self._child.join(timeout)
            if self.poll() is None:
                self._child.kill()
                raise subprocess.TimeoutExpired(self.args, timeout)
            return out.read().decode(), err.read().decode()


def obey_permissions() -> None:
    """Let permissions hold for root, too: this process, and what it starts, cannot override them any more."""
    if sys.platform == "linux" and os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(24, 1)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: what it starts
        # A process that only forks keeps what it has: taken from its effective and permitted capabilities, too.
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        data = (ctypes.c_uint32 * 6)()
        assert libc.capget(header, data) == 0
        data[0] &= ~(1 << 1)
        data[1] &= ~(1 << 1)
        assert libc.capset(header, data) == 0


def _carry_out(
    folder: Path,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    streams: list[str],
    begin: Callable[[], object] | None,
) -> None:
    """In the child: what `python ARGUMENTS` does, in a folder and an environment."""
    for number, name in enumerate(streams, start=1):
        descriptor = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    # A shell that starts the tests in the background lets them ignore Ctrl-C; a user's terminal does not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if begin is not None:
        begin()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    warnings.filterwarnings("error", category=UserWarning, module=r"lalm_patch\Z")
    style.rendered = pictures.coarse
    if arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        sys.path.insert(0, str(folder))
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, str((folder / arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


def start(folder: Path, *arguments: str, as_user: bool = False, **environment: str) -> Forked:
    """Start `python ARGUMENTS` in a folder, forked from the server; `as_user` as one whom permissions stop."""
    return Forked(folder, arguments, environment, obey_permissions if as_user else None)


def start_fresh(
    folder: Path, *arguments: str, begin: Callable[[], object] | None = None, **environment: str
) -> subprocess.Popen[str]:
    """Start `python ARGUMENTS` in a folder and a new interpreter; it calls `begin` first."""

    def before() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in `_carry_out`
        if begin is not None:
            begin()

    process = subprocess.Popen(
        [sys.executable, "-W", "error::UserWarning:lalm_patch", *arguments],
        cwd=folder,
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
    )
    atexit.register(process.kill)  # of a test that failed in between
    return process


def run(
    folder: Path,
    *arguments: str,
    fresh: bool = False,
    begin: Callable[[], object] | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Carry out `python ARGUMENTS` in a folder; in a new interpreter or forked from the server. It calls `begin` first,
    which can be pickled."""
    if fresh:
        process: Forked | subprocess.Popen[str] = start_fresh(folder, *arguments, begin=begin, **environment)
    else:
        process = Forked(folder, arguments, environment, begin)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode is not None
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)
