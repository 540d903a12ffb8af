"""Where this process stands among the workers of a run: started by hand, by torchrun, or as a task of srun."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

from detectron2.engine import launch
from detectron2.engine.launch import _distributed_worker
from torch.distributed import PrefixStore
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous


@dataclass(frozen=True)
class Place:
    """Of one process.

    Attributes:
        launcher: what has started the workers: "torchrun", "srun"; "" if that is for this process to do.
        rank, world_size: among all workers.
        local_rank, local_world_size: among those of this machine.
        dist_url: where they meet.
        restarts: how often the run was started before.
    """

    launcher: str = ""
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    dist_url: str = ""
    restarts: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process to say things once."""
        return self.rank == 0

    def adapt(self, args: Namespace) -> None:
        """Makes a command line say what the launcher has decided; a run that was started before is resumed.

        Raises:
            ValueError: the command line says otherwise.
        """
        args.resume = args.resume or self.restarts > 0
        if not self.launcher:
            return
        machines, rest = divmod(self.world_size, self.local_world_size)
        if rest:
            raise ValueError(
                f"{self.launcher} has started {self.world_size} workers, {self.local_world_size} of them here: "
                "all machines need the same number"
            )
        for flag, default, here in (("num_gpus", 1, self.local_world_size), ("num_machines", 1, machines)):
            if getattr(args, flag) not in (default, here):
                raise ValueError(
                    f"--{flag.replace('_', '-')} {getattr(args, flag)}, but {self.launcher} has started {here}: "
                    "leave the flag out, the launcher decides"
                )
            setattr(args, flag, here)
        args.machine_rank = self.rank // self.local_world_size

    def launch(self, worker: Callable[[Namespace], None], args: Namespace) -> None:
        """Runs ``worker(args)`` as the one worker that this process is, or in as many processes as ``args`` says.

        Raises:
            torch.multiprocessing.ProcessExitedException, ProcessRaisedException: a worker that was started here failed.
        """
        if self.launcher and self.world_size > 1:
            _distributed_worker(
                self.local_rank,
                worker,
                self.world_size,
                self.local_world_size,
                args.machine_rank,
                self.dist_url,
                (args,),
            )
        elif self.launcher:
            worker(args)
        else:
            launch(
                worker,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args,),
            )


def find_place(env: Mapping[str, str] = os.environ) -> Place:
    """This process's, from what torchrun and srun leave in the environment.

    Raises:
        ValueError: a variable is missing or no number.
    """
    # Without a LOCAL_RANK they are of something that starts machines, as Kubeflow does, and not workers.
    of_a_worker = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    if "TORCHELASTIC_RUN_ID" in env or of_a_worker <= env.keys():
        number = _reader(env, "torchrun")
        return Place(
            "torchrun",
            number("RANK"),
            number("WORLD_SIZE"),
            number("LOCAL_RANK"),
            number("LOCAL_WORLD_SIZE", env["WORLD_SIZE"]),
            # Of several machines the counts of restarts differ: see tools/launch/torchrun.sh.
            "attempt://" if env.get("GROUP_WORLD_SIZE") == "1" else "env://",
            number("TORCHELASTIC_RESTART_COUNT", "0"),
        )
    # Of a job step: a batch script that calls us without srun, or for one task, starts the workers itself.
    if "SLURM_STEP_ID" in env and env.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        number = _reader(env, "srun")
        tasks = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", ""))  # such as 8(x4)
        if tasks is None:
            raise ValueError("srun has left no SLURM_STEP_TASKS_PER_NODE: how many workers are on this machine?")
        return Place(
            "srun",
            number("SLURM_PROCID"),
            number("SLURM_STEP_NUM_TASKS"),
            number("SLURM_LOCALID"),
            int(tasks[0]),
            _slurm_url(env),
            number("SLURM_RESTART_COUNT", "0"),
        )
    return Place(restarts=int(env.get("SLURM_RESTART_COUNT", "0") or 0))


def _reader(env: Mapping[str, str], launcher: str) -> Callable[..., int]:
    def number(name: str, default: str = "") -> int:
        text = env.get(name, default)
        if not text.isdigit():
            raise ValueError(f"{launcher} has left {name}={text!r} in the environment, which is no number")
        return int(text)

    return number


def _slurm_url(env: Mapping[str, str]) -> str:
    """All tasks of a step meet on its first machine, at a port that two jobs there hardly share."""
    address = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", ""))
    port = env.get("MASTER_PORT") or str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000)
    return f"tcp://{address}:{port}"


def first_host(nodelist: str) -> str:
    """The first machine of a list as SLURM writes it: "gpu[007-010,12],login" -> "gpu007".

    Raises:
        ValueError: there is none.
    """
    match = re.match(r"([^\[,\s]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodelist)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST {nodelist!r} names no machine: give the first one as MASTER_ADDR")
    prefix, number, suffix = match.groups(default="")
    return prefix + number + suffix


def _meet_in_this_attempt(url: str, timeout: timedelta = default_pg_timeout, **kwargs):
    """As env://, but apart from the attempts before: torchrun keeps the store, in which the addresses of dead workers
    are (pytorch/pytorch#135712), and a run that is started again would wait for those."""
    for store, rank, world_size in rendezvous("env://", timeout=timeout, **kwargs):
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        yield PrefixStore(f"attempt {attempt}", store), rank, world_size


register_rendezvous_handler("attempt", _meet_in_this_attempt)
