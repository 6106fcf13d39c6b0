"""Processes find each other through the variables that SLURM and Open MPI set."""

import os
import random
import subprocess
import sys

import pytest

JOIN = """
import sys
from resjax.errors import UserError
from resjax.train.distributed import Cluster, join, is_main_process
try:
    join(Cluster())
except UserError as error:
    sys.exit(str(error))
import jax
print(jax.process_index(), jax.process_count(), is_main_process(), jax.device_count())
"""


def slurm(process, job):
    """What `srun --ntasks=2` sets on one node."""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process),
    }


def open_mpi(process, job):
    """What `mpirun -n 2` sets on one node (Open MPI 4)."""
    return {
        "OMPI_MCA_orte_hnp_uri": f"{job * 2**12}.0;tcp://127.0.0.1,10.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(process),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(process),
    }


def join(environment):
    return subprocess.Popen(
        [sys.executable, "-c", JOIN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment | {"JAX_NUM_CPU_DEVICES": "2"},
    )


@pytest.mark.parametrize("launcher", [slurm, open_mpi])
def test_two_processes_find_each_other_without_arguments(launcher):
    job = random.randrange(10**6)  # JAX derives the port from it
    processes = [join(launcher(process, job)) for process in (0, 1)]
    output = [process.communicate(timeout=100)[0].split() for process in processes]
    assert output == [["0", "2", "True", "4"], ["1", "2", "False", "4"]]


def test_a_process_that_finds_no_others_ends_with_one_line_that_says_how_to():
    process = join({})
    _, output = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.strip().startswith("the processes did not find each other: ")
    assert "--coordinator=HOST:PORT" in output
    assert len(output.strip().splitlines()) == 1
