"""Which workers a run has: those that torchrun has started, of which this process is one, or those to be started."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from detectron2.engine import launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch import distributed


@dataclass(frozen=True)
class Workers:
    """The workers of a run, and which of them this process is."""

    per_machine: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    dist_url: str = "auto"  # where the machines meet, for detectron2.engine.launch
    local_rank: int | None = None  # of this process on its machine; None: it is no worker, and starts them
    restarts: int = 0  # how often torchrun or SLURM has started the run before

    @classmethod
    def find(cls, args: Namespace, env: Mapping[str, str] = os.environ) -> Workers:
        """Return what torchrun has decided, in ``env``, or else the flags say; raise a ValueError if they disagree."""
        # Without a LOCAL_RANK they are of something that starts machines, as Kubeflow does, and not workers.
        if {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= env.keys():
            count = _number(env, "WORLD_SIZE", 1)
            here = _number(env, "LOCAL_WORLD_SIZE", count)
            if count % here or args.num_gpus not in (1, here) or args.num_machines not in (1, count // here):
                started = f"torchrun has started {count} workers, {here} of them here"
                way_out = "leave out --num-gpus and --num-machines; torchrun has to start as many on each machine"
                raise ValueError(f"{started}: {way_out}")
            restarts = _number(env, "TORCHELASTIC_RESTART_COUNT", 0)
            return cls(here, count // here, local_rank=_number(env, "LOCAL_RANK", 0), restarts=restarts)
        tasks = _number(env, "SLURM_STEP_NUM_TASKS", 1)
        if tasks > args.num_machines:
            way_out = "start torchrun once a node, as tools/launch/slurm.sbatch does"
            raise ValueError(f"srun has started {tasks} tasks of this, each of which would be a run: {way_out}")
        if args.num_gpus < 1 or not 0 <= args.machine_rank < args.num_machines:
            flags = f"--num-gpus {args.num_gpus} --num-machines {args.num_machines} --machine-rank {args.machine_rank}"
            need = "at least 1 of each is needed (on the CPU --num-gpus counts workers), and the ranks start at 0"
            raise ValueError(f"{flags}: {need}")
        if args.num_machines > 1 and args.dist_url == "auto":
            raise ValueError("--dist-url auto is for one machine: give all of them tcp://HOST_OF_RANK_0:PORT")
        restarts = _number(env, "SLURM_RESTART_COUNT", 0)
        return cls(args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, restarts=restarts)

    @property
    def count(self) -> int:
        """Return how many workers there are on all machines."""
        return self.per_machine * self.num_machines

    def launch(self, main: Callable, *args, on_cpu: bool) -> None:
        """Run ``main(*args)`` as the worker that this process is, or in as many processes as there shall be.

        If one of those fails: ``ProcessExitedException`` or ``ProcessRaisedException`` of ``torch.multiprocessing``.
        """
        if on_cpu:
            # Detectron2's launch goes by the machine, not by what the config says, and would give CPU workers NCCL.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if self.local_rank is None:
            launch(main, self.per_machine, self.num_machines, self.machine_rank, self.dist_url, args)
            return
        if self.count > 1:  # what a worker of Detectron2's launch does before it runs main
            store, rank, count = next(distributed.rendezvous("env://", timeout=DEFAULT_TIMEOUT))
            if os.environ.get("GROUP_WORLD_SIZE") == "1":
                # torchrun keeps the store, in which the addresses of dead workers are (pytorch/pytorch#135712): a run
                # that is started again would call those. On several machines the counts differ: see torchrun.sh.
                store = distributed.PrefixStore(f"attempt {self.restarts}", store)
            backend = "gloo" if on_cpu else "nccl"
            distributed.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=DEFAULT_TIMEOUT)
            comm.create_local_process_group(self.per_machine)
            if not on_cpu:
                torch.cuda.set_device(self.local_rank)
            comm.synchronize()
        main(*args)


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name) or str(default)
    if not text.isdigit() or int(text) < min(default, 1):
        raise ValueError(f"the environment has {name}={text!r}, which is no number of workers or restarts: unset it")
    return int(text)
