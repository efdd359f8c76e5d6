"""The processes of a run, as torchrun or SLURM describes them in the environment."""

import os
import socket
from dataclasses import dataclass

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment


@dataclass(frozen=True)
class World:
    """Hold the rank of this process and the number of processes, as torchrun or SLURM's srun set them."""

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    by_torchrun: bool = False
    by_slurm: bool = False
    simulate: int | None = None  # number of ranks that this one process simulates

    @classmethod
    def from_env(cls, simulate: int | None = None) -> "World":
        """Read torchrun's variables, else those of several tasks of srun; without them this is the only process.

        Args:
            simulate: Number of ranks that a single process simulates.

        Raises:
            ValueError: the nodes have different numbers of processes; several processes with `simulate`.
        """
        if simulate is not None and (isinstance(simulate, bool) or not isinstance(simulate, int) or simulate < 1):
            raise ValueError(f"expected simulate to be a number of ranks, at least 1, got {simulate!r}")
        by_torchrun, by_slurm = "TORCHELASTIC_RUN_ID" in os.environ, False
        if by_torchrun:
            rank, size, local = _numbers("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
            uneven, remedy = size % local, "give every node's torchrun the same --nproc-per-node"
        elif by_slurm := _is_one_of_several_by_srun():
            rank, size, local = _numbers("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")
            uneven = size - local * int(os.environ["SLURM_NNODES"])
            remedy = "give sbatch or srun --nodes and --ntasks-per-node, and no --ntasks"
        else:
            return cls(simulate=simulate)
        if simulate is not None and size > 1:
            raise ValueError(
                f"simulate={simulate} is one process that stands for {simulate} ranks, "
                f"{'srun' if by_slurm else 'torchrun'} started {size}: start one, or drop simulate"
            )
        if uneven:
            raise ValueError(
                f"expected as many processes on every node, got {local or '?'} here and {size} in all: {remedy}"
            )
        return cls(rank, size, local, by_torchrun, by_slurm, simulate)

    @property
    def num_nodes(self) -> int:
        """Count the nodes."""
        return self.world_size // self.local_world_size

    @property
    def num_ranks(self) -> int:
        """Count the ranks of the experiment, real or simulated."""
        return self.simulate or self.world_size


def _numbers(*names: str) -> list[int]:
    return [int(os.environ.get(name, 0)) for name in names]


def _is_one_of_several_by_srun() -> bool:
    """Distinguish a task of srun from batch scripts and interactive shells, whose step ids begin at 2**32 - 16."""
    step, num_tasks = _numbers("SLURM_STEP_ID", "SLURM_NTASKS")
    return "SLURM_STEP_ID" in os.environ and step < 2**32 - 16 and num_tasks > 1


def make_environment(world: World) -> ClusterEnvironment:
    """Tell Lightning which launcher started the processes; launch/slurm requeues SLURM jobs, not Lightning."""
    if world.by_torchrun:
        return TorchElasticEnvironment()
    return SLURMEnvironment(auto_requeue=False) if world.by_slurm else LightningEnvironment()


def listen_on_loopback(world: World) -> None:
    """Let gloo listen on the loopback if one machine has all ranks; by default it takes the host name's address."""
    if world.num_nodes == 1 < world.world_size:
        for _, name in socket.if_nameindex():
            if name in ("lo", "lo0"):  # Linux, macOS
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
