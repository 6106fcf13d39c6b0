"""Starts a private SLURM in a folder, for tests: `slurm_server.py FOLDER` as root.

Debian's packages slurm-wlm and munge are all it needs. It has its own key, socket, ports and
folders, so that it touches no SLURM of the machine. It prints `ready`, or one line that says why it
cannot start; clients find it by SLURM_CONF=FOLDER/slurm.conf. When its standard input closes, as it
does when the test process is killed, it ends the daemons and all that they have started.

There are two nodes on this machine, `localhost` and `other`, of four pretended cores each. Jobs of
the partition `urgent` preempt those of `main` by PreemptMode=CANCEL.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

PROGRAMS = "munged", "slurmctld", "slurmd", "sbatch", "srun"
START_SECONDS = 30.0
NODES = "other", "localhost"  # JAX looks up the name of the first

CONF = """
ClusterName=resjax
SlurmctldHost=localhost({host})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={controller}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=100000,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
MaxArraySize=3
InactiveLimit=0
KillWait=60
OverTimeLimit=0
JobRequeue=0
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=2
"""

NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4"

libc = ctypes.CDLL(None)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


class CannotStartError(Exception):
    """Why there is no SLURM, on one line."""


def free_ports(number: int) -> list[int]:
    """Returns ports on which no process listens; they are no longer reserved on return."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def start(folder: Path) -> None:
    """Starts munged, slurmctld and a slurmd for each node, and waits until the nodes are idle.

    Raises:
      CannotStartError: a program is missing, or a daemon does not start.
    """
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        raise CannotStartError(f"{missing[0]} is not installed (packages slurm-wlm and munge)")
    if os.geteuid():
        raise CannotStartError("its daemons need root")
    # Processes whose parent has ended become children of this one, which ends them.
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    folder.mkdir(parents=True)
    folder.chmod(0o755)  # as munged requires of its socket's folder
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname()
    controller, *ports = free_ports(1 + len(NODES))
    nodes = [
        NODE.format(name=name, host=host, port=port)
        for name, port in zip(NODES, ports, strict=True)
    ]
    conf = CONF.format(folder=folder, host=host, controller=controller, nodes="\n".join(nodes))
    (folder / "slurm.conf").write_text(conf)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    files = {name: f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")}
    socket_file = f"--socket={folder}/munge.socket"
    daemons = [_daemon(folder, "munged", "--foreground", "--force", socket_file, *files.values())]
    _wait_for((folder / "munge.socket").exists, daemons, folder)
    daemons.append(_daemon(folder, "slurmctld", "-D", "-c"))
    daemons += [_daemon(folder, "slurmd", "-D", "-N", node) for node in NODES]
    _wait_for(_all_idle, daemons, folder)


def _daemon(folder: Path, *command: str) -> subprocess.Popen[bytes]:
    def end_with_server() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    with open(folder / "output.log", "ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=end_with_server,
        )


def _all_idle() -> bool:
    command = ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%t"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode == 0 and done.stdout.split() == ["idle"] * len(NODES)


def _wait_for(condition, daemons: list[subprocess.Popen[bytes]], folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        ended = [each for each in daemons if each.poll() is not None]
        if ended or time.monotonic() > deadline:
            why = f"{ended[0].args[0]} ended" if ended else f"not ready in {START_SECONDS:g} s"
            log = (folder / "output.log").read_text(errors="replace").strip().splitlines()
            raise CannotStartError(": ".join([why, *log[-1:]]))
        time.sleep(0.1)


def descendants(process: int) -> list[int]:
    """Returns the processes that a process and its children have started."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(stat[1])
    found = [process]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found[1:]


def end_descendants() -> None:
    """Kills all processes that this one has started, also those that daemons left behind."""
    while left := descendants(os.getpid()):
        for each in left:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the end of the input counts
    try:
        start(Path(sys.argv[1]).absolute())
        print("ready", flush=True)
        sys.stdin.read()
    except CannotStartError as error:
        print(error, flush=True)
        return 1
    finally:
        end_descendants()
    return 0


if __name__ == "__main__":
    sys.exit(main())
