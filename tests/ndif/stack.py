"""A whole NDIF on loopback, from the package index: Redis, object store (moto), Ray, controller, API with its queue."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import httpx

RAY_HOST = "127.0.0.2"  # Ray would replace 127.0.0.1 by another address of the machine
ALONE = "ONLY_LOOPBACK"
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1
HERE = Path(__file__).resolve().parent


def leave_the_network() -> None:
    """Start this process again where there is no network but loopback.

    Ray runs whatever it is sent and listens on every interface, whatever it is told.
    """
    if ALONE not in os.environ:
        os.environ[ALONE] = "yes"
        os.execvp("unshare", ["unshare", "--map-root-user", "--net", sys.executable, *sys.argv])
    if others := {name for _, name in socket.if_nameindex()} - {"lo", "tunl0", "sit0", "ip6tnl0"}:
        raise RuntimeError(f"expected to be alone on loopback, and there is {', '.join(sorted(others))}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as interfaces:
        request = struct.pack("16sh14x", b"lo", IFF_UP)
        fcntl.ioctl(interfaces, SIOCSIFFLAGS, request)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Stack:
    """The server's processes, each in a session of its own.

    Args:
        python: of the environment that has ndif.
        folder: for logs and Ray's files; its path has to be short, because sockets are in it.
    """

    def __init__(self, python: Path, folder: Path) -> None:
        self.bin, self.folder = python.parent, folder
        self.ports = {name: free_port() for name in ("redis", "store", "ray", "client", "dashboard", "api")}
        self.url = f"http://127.0.0.1:{self.ports['api']}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ,
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PYTHONPATH": str(HERE),
            "NDIF_REDIS_URL": f"redis://127.0.0.1:{self.ports['redis']}",
            "NDIF_OBJECT_STORE_URL": f"http://127.0.0.1:{self.ports['store']}",
            "NDIF_RAY_ADDRESS": f"ray://{RAY_HOST}:{self.ports['client']}",
            "NDIF_API_PORT": str(self.ports["api"]),
            "NDIF_SANDBOX_POOL_SIZE": "2",
            "GUNICORN_CMD_ARGS": f"--bind 127.0.0.1:{self.ports['api']}",  # its own configuration binds all interfaces
            "GRPC_ENABLE_FORK_SUPPORT": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        self._redis()
        self._run("store", [self.bin / "moto_server", "-H", "127.0.0.1", "-p", str(self.ports["store"])])
        resources = '{"head": 10, "cuda_memory_bytes": 8000000000, "cpu_memory_bytes": 8000000000}'
        ray = ["--head", f"--node-ip-address={RAY_HOST}", f"--port={self.ports['ray']}", "--num-gpus=1", "--num-cpus=8"]
        ray += [f"--ray-client-server-port={self.ports['client']}", "--block"]
        ray += ["--include-dashboard=true", "--dashboard-host=127.0.0.1"]  # where the controller asks for the nodes
        ray += [f"--dashboard-port={self.ports['dashboard']}"]
        ray += [f"--resources={resources}", f"--temp-dir={self.folder / 'ray'}", "--object-store-memory=200000000"]
        self._run("ray", [self.bin / "ray", "start", *ray])
        self._wait_for_port("client", RAY_HOST)
        self._wait_for_port("dashboard")
        controller = [self.bin / "python", "-m", "ndif.services.ray.deployments.controller.controller"]
        self._run("controller", controller, RAY_ADDRESS=f"{RAY_HOST}:{self.ports['ray']}")
        if code := self.processes.pop("controller").wait(180):
            raise RuntimeError(f"the controller did not start ({code}); see {self.folder / 'controller.log'}")
        self._api()

    def deploy(self, model: Path, key: str, actor: str) -> None:
        arguments = [str(self.bin / "python"), str(HERE / "deploy.py"), str(model), key, f"cpu_actors.{actor}"]
        subprocess.run(arguments, env=self.environment, check=True, timeout=300)

    def stop_queue(self) -> None:
        """API, dispatcher and Redis: the queue is lost, and the object store is not."""
        self._stop("api")
        self._stop("redis")

    def start_queue(self) -> None:
        self._redis()
        self._api()

    def kill_one(self, what: str) -> bool:
        """Kill -9 a process of this cluster whose title or command line has `what` in it."""
        ours = os.readlink("/proc/self/ns/net")  # a runner inherits nothing else of this cluster
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if what.encode() in (entry / "cmdline").read_bytes() and os.readlink(entry / "ns/net") == ours:
                    os.kill(int(entry.name), signal.SIGKILL)
                    return True
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it ended meanwhile, or is not ours
        return False

    def stop(self) -> None:
        for name in reversed(list(self.processes)):
            self._stop(name)
        shutil.rmtree(self.folder / "ray", ignore_errors=True)

    def _redis(self) -> None:
        self._run("redis", ["redis-server", "--bind", "127.0.0.1", "--port", str(self.ports["redis"]), "--save", ""])
        self._wait_for_port("redis")

    def _api(self) -> None:
        self._run("api", ["bash", self._service("api")])
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/connected", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass  # not up yet: what this loop waits for
            time.sleep(0.5)
        raise RuntimeError(f"the API did not connect to Ray; see {self.folder / 'api.log'}")

    def _service(self, name: str) -> str:
        (found,) = self.bin.parent.glob(f"lib/python3*/site-packages/ndif/services/{name}/start.sh")
        return str(found)

    def _run(self, name: str, command: list[str | Path], **environment: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(part) for part in command],
                env={**self.environment, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder,
            )

    def _stop(self, name: str) -> None:
        process = self.processes.pop(name)
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, sign)
                process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue  # gone, or it needs the harder signal

    def _wait_for_port(self, name: str, host: str = "127.0.0.1") -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex((host, self.ports[name])) == 0:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"{name} does not listen; see {self.folder}")
