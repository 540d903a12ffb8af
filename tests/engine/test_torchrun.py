"""Who has started this process, and which of the workers it is."""

from argparse import Namespace

import pytest

from focal_plugin.engine.torchrun import Workers

TORCHRUN = {
    "TORCHELASTIC_RESTART_COUNT": "2",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


def find(env, **typed):
    args = {"num_gpus": 1, "num_machines": 1, "machine_rank": 0, "dist_url": "auto", **typed}
    return Workers.find(Namespace(**args), env)


def test_workers_that_torchrun_has_started():
    for workers in (find(TORCHRUN), find(TORCHRUN, num_gpus=4, num_machines=2)):
        assert workers == Workers(per_machine=4, num_machines=2, local_rank=1, restarts=2) and workers.count == 8


KUBEFLOW = {key: TORCHRUN[key] for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}  # of a machine
STALE = {key: TORCHRUN[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}  # and nothing to meet at


@pytest.mark.parametrize(
    "env",
    [{}, {"RANK": "3"}, KUBEFLOW, STALE, {"SLURM_STEP_NUM_TASKS": ""}],
)
def test_by_hand(env):
    assert find(env, num_gpus=2) == Workers(per_machine=2)
    assert find({**env, "SLURM_RESTART_COUNT": "2"}) == Workers(restarts=2)


@pytest.mark.parametrize(
    "env, typed, message",
    [
        (TORCHRUN, {"num_gpus": 8}, "torchrun has started 8 workers, 4 of them here: leave out --num-gpus"),
        (TORCHRUN, {"num_machines": 3}, "leave out --num-gpus and --num-machines"),
        ({**TORCHRUN, "WORLD_SIZE": "7"}, {}, "has to start as many on each machine"),
        ({}, {"num_gpus": 0}, "--num-gpus 0 --num-machines 1 .*at least 1 of each"),
        ({}, {"num_machines": 2, "machine_rank": 2, "dist_url": "tcp://a:1"}, "--machine-rank 2: .* start at 0"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, {}, "srun has started 8 tasks .* torchrun once a node"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, {}, "WORLD_SIZE='0', which is no number of workers"),
        ({"SLURM_RESTART_COUNT": "x"}, {}, "SLURM_RESTART_COUNT='x', which is no number"),
        ({}, {"num_machines": 2}, "--dist-url auto is for one machine"),
    ],
)
def test_a_command_line_that_cannot_be(env, typed, message):
    with pytest.raises(ValueError, match=message):
        find(env, **typed)
