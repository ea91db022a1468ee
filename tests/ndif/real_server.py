"""Runs against the real NDIF server on loopback; see README.md beside this file.

    python tests/ndif/real_server.py --server-python /path/to/server/bin/python [--sandbox]

Compares a run on the server with one here, then the same after each of: the queue and the API started again with the
object store kept, the model's process killed, a runner killed (with --sandbox). Exits with 1 at the first difference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from conftest import GENDER, write_sakura  # noqa: E402
from ndif_runs import PROBABILITIES, assert_same_numbers, result  # noqa: E402
from stack import Stack, leave_the_network  # noqa: E402
from tiny_models import save_tiny_qwen2_audio  # noqa: E402

from lalm_patch.storage.jobs import JOBS  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--server-python", type=Path, required=True)
    parser.add_argument("--sandbox", action="store_true", help="run every block in a runner process")
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--only", nargs="*", default=None, help="names of what goes wrong, as they are printed")
    parser.add_argument("--folder", type=Path, default=None, help="keeps logs and results; by default a temporary one")
    arguments = parser.parse_args()
    leave_the_network()
    root = arguments.folder or Path(tempfile.mkdtemp(prefix="ndif-"))
    root.mkdir(parents=True, exist_ok=True)
    model = save_tiny_qwen2_audio(root / "model")
    data = write_sakura(root / "data", GENDER, clips=arguments.clips)
    what = ("model=qwen2_audio", f"model.id={model}", "model.dtype=float32", "attr=gender", f"data.root={data}")
    here = result(*what, f"outputs={root / 'here'}")[PROBABILITIES]
    stack = Stack(arguments.server_python.absolute(), root)
    key = {"repo_id": str(model.resolve()), "revision": None, "task": "any-to-any"}
    key_text = f"nnsight.modeling.transformers.TransformersModel:{json.dumps(key)}"
    faults: dict[str, Callable[[], object]] = {
        "comparison": lambda: None,
        "queue and API started again": lambda: (stack.stop_queue(), time.sleep(3), stack.start_queue()),
        "model's process killed": lambda: kill(stack, "Cpu"),
    }
    if arguments.sandbox:
        faults["runner killed"] = lambda: kill(stack, "ndif.services.ray.sandbox.runner")
    try:
        stack.start()
        stack.deploy(model, key_text, "CpuSandboxActor" if arguments.sandbox else "CpuModelActor")
        for name, fault in faults.items():
            if arguments.only and name not in arguments.only:
                continue
            started = time.monotonic()
            outputs = root / name.replace(" ", "_").replace("'", "")
            command = [*what, f"outputs={outputs}", "backend=ndif", f"backend.host={stack.url}", *PATIENCE]
            process = start(command)
            if name != "comparison":
                wait_for_jobs(outputs, process)
                fault()
            output = process.communicate(timeout=600)[0]
            if process.returncode:
                sys.exit(f"{name}: the command failed\n{output}")
            there = result(*command)[PROBABILITIES]  # all is stored: nothing is sent
            assert there["sample"].values.tolist() == here["sample"].values.tolist()
            assert_same_numbers(here, there)
            again = output.count("sent again")
            largest = max(float(abs(here[one] - there[one]).max()) for one in PROBABILITIES)
            print(
                f"{name}: {arguments.clips} clips, each once, largest difference {largest:.2g}, {again} times "
                f"something was sent again, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    finally:
        stack.stop()


PATIENCE = (
    *("backend.max_jobs=6", "backend.poll_seconds=0.1", "backend.pause_seconds=2", "backend.retries=20"),
    *("backend.forget_seconds=15", "backend.stale_seconds=40"),
)


def kill(stack: Stack, what: str) -> None:
    if not stack.kill_one(what):
        raise RuntimeError(f"no process of {what} to kill")


def start(overrides: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "lalm_patch", *overrides],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_jobs(outputs: Path, process: subprocess.Popen[str]) -> None:
    """Until jobs are in flight."""
    while process.poll() is None:
        for book in outputs.rglob(JOBS):
            try:
                if len(json.loads(book.read_bytes())) >= 4:
                    return
            except FileNotFoundError:
                continue  # it was replaced just now
        time.sleep(0.02)
    sys.exit(f"the command ended before anything went wrong\n{process.communicate()[0]}")


if __name__ == "__main__":
    main()
