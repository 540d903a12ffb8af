"""Who has started this process, and which of the workers it is."""

from argparse import Namespace

import pytest

from focal_plugin.engine.torchrun import Workers

TORCHRUN = {
    "TORCHELASTIC_RESTART_COUNT": "0",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
KUBEFLOW = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of a machine, not of a worker


def find(env, **typed):
    args = {"num_gpus": 1, "num_machines": 1, "machine_rank": 0, "dist_url": "auto", **typed}
    return Workers.find(Namespace(**args), env)


def test_workers_that_torchrun_has_started():
    workers = find(TORCHRUN)
    assert (workers.per_machine, workers.num_machines, workers.local_rank) == (4, 2, 1)
    assert workers.count == 8 and workers.restarts == 0


@pytest.mark.parametrize("env", [{}, {"RANK": "3"}, {k: v for k, v in TORCHRUN.items() if k in KUBEFLOW}])
def test_by_hand(env):
    workers = find(env, num_gpus=2)
    assert (workers.local_rank, workers.per_machine, workers.count, workers.restarts) == (None, 2, 2, 0)


@pytest.mark.parametrize(
    "env", [{**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"}, {"SLURM_RESTART_COUNT": "2"}], ids=["torchrun", "slurm"]
)
def test_restarts_are_counted(env):
    assert find(env).restarts == 2


@pytest.mark.parametrize(
    "env, typed, message",
    [
        (TORCHRUN, {"num_gpus": 8}, "torchrun has started 8 workers, 4 of them here: leave out --num-gpus"),
        (TORCHRUN, {"num_machines": 3}, "leave out --num-gpus and --num-machines"),
        ({**TORCHRUN, "WORLD_SIZE": "7"}, {}, "has to start as many on each machine"),
        ({}, {"num_gpus": 0}, "--num-gpus 0 --num-machines 1 .*at least 1 of each"),
        ({}, {"num_machines": 2, "machine_rank": 2, "dist_url": "tcp://a:1"}, "--machine-rank 2: .* start at 0"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, {}, "srun has started 8 tasks .* torchrun once a node"),
        ({}, {"num_machines": 2}, "--dist-url auto is for one machine"),
    ],
)
def test_a_command_line_that_cannot_be(env, typed, message):
    with pytest.raises(ValueError, match=message):
        find(env, **typed)


def test_flags_that_say_what_torchrun_says_are_taken():
    assert find(TORCHRUN, num_gpus=4, num_machines=2).count == 8
