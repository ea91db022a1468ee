"""A real Slurm on this machine for the time of a test: one host, virtual nodes, loopback only, no systemd, no cgroups.

Needs Debian's packages slurm-wlm, slurm-client and munge. Everything it writes lies in one folder, and every daemon
is ended by the process id it noted there.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

CONFIGURATION = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=5
SlurmdParameters=config_overrides
DefMemPerCPU=1000
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
ReturnToService=2
KillWait=2
MinJobAge=36000
NodeName=node[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 RealMemory=8000
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
"""


class SlurmHere:
    """A running Slurm. Use as a context manager; `environment` is what its commands need.

    Args:
        root: an empty folder for everything it writes; short, since it holds a socket.
        nodes: virtual nodes, of two CPUs each.
    """

    def __init__(self, root: Path, nodes: int = 2) -> None:
        self.root, self.nodes = root, nodes
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}

    def __enter__(self) -> SlurmHere:
        for name in ("state", "spool", *(f"spool/node{i + 1}" for i in range(self.nodes))):
            (self.root / name).mkdir(parents=True)
        self._start_munge()
        first = _free_ports(self.nodes + 1)
        text = CONFIGURATION.format(
            root=self.root,
            host=socket.gethostname(),
            user=_user(),
            nodes=self.nodes,
            port=first,
            first=first + 1,
            last=first + self.nodes,
        )
        (self.root / "slurm.conf").write_text(text)
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        configured = ["-f", str(self.root / "slurm.conf")]
        try:
            self._daemon(["slurmctld", *configured])
            for number in range(self.nodes):
                self._daemon(["slurmd", "-N", f"node{number + 1}", *configured])
            self._wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end_jobs()
        pids = [int(path.read_text()) for path in self.root.glob("*.pid") if path.read_text().strip()]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                continue
        deadline = time.monotonic() + 20
        while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.1)

    def run(self, *command: str) -> str:
        """Output of one of Slurm's commands."""
        return subprocess.run(command, env=self.environment, check=True, capture_output=True, text=True).stdout

    def job_states(self) -> dict[str, str]:
        """State of every job there was, by id; of an array `array_task`."""
        states = {}
        for line in self.run("scontrol", "--oneliner", "show", "job").splitlines():
            fields = dict(field.split("=", 1) for field in line.split() if "=" in field)
            if "JobId" not in fields:
                continue  # "No jobs in the system"
            task = fields.get("ArrayTaskId")
            states[f"{fields['ArrayJobId']}_{task}" if task else fields["JobId"]] = fields["JobState"]
        return states

    def _end_jobs(self) -> None:
        """No job outlives the test; a controller that never came up has none."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            done = subprocess.run(["squeue", "-h"], env=self.environment, capture_output=True, text=True)
            if done.returncode or not done.stdout.strip():
                return
            for signal_name in ([], ["--signal=KILL"]):
                subprocess.run(["scancel", *signal_name, "--user", _user()], env=self.environment, check=False)
            time.sleep(0.5)

    def _start_munge(self) -> None:
        folder = self.root / "munge"
        folder.mkdir(mode=0o700)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = {"key-file": key, "log-file": folder / "munged.log", "seed-file": folder / "munged.seed"}
        places = [f"--{name}={path}" for name, path in files.items()]
        # Forced: it minds that everybody may write into /tmp, where tests keep their folders.
        self._daemon(
            ["munged", "--force", f"--socket={self.root}/munge.socket", f"--pid-file={self.root}/munged.pid", *places]
        )

    def _daemon(self, command: list[str]) -> None:
        done = subprocess.run(
            command,
            env={**self.environment, "PATH": f"{os.environ['PATH']}:/usr/sbin"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command[0]}: {done.stdout}"

    def _wait_for_nodes(self) -> None:
        deadline = time.monotonic() + 60
        wanted = {f"node{i + 1}" for i in range(self.nodes)}
        while True:
            done = subprocess.run(
                ["sinfo", "-N", "-h", "-t", "idle", "-o", "%N"], env=self.environment, capture_output=True, text=True
            )
            if set(done.stdout.split()) == wanted:
                return
            assert time.monotonic() < deadline, done.stdout + done.stderr
            time.sleep(0.2)


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on."""
    for first in range(16820, 32000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise OSError("no free ports")
