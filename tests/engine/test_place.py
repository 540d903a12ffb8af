"""Who has started this process, and which of the workers it is."""

from argparse import Namespace

import pytest

from focal_plugin.engine.place import Place, find_place, first_host

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
KUBEFLOW = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of a machine, not of a worker
SRUN = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


def args(**kwargs):
    return Namespace(**{"num_gpus": 1, "num_machines": 1, "machine_rank": 0, "resume": False, **kwargs})


@pytest.mark.parametrize("env, launcher", [(TORCHRUN, "torchrun"), (SRUN, "srun")])
def test_workers_that_were_started_for_us(env, launcher):
    place = find_place(env)
    assert (place.launcher, place.rank, place.world_size, place.local_rank) == (launcher, 5, 8, 1)
    assert not place.is_first
    given = args()
    place.adapt(given)
    assert (given.num_gpus, given.num_machines, given.machine_rank, given.resume) == (4, 2, 1, False)


def test_where_they_meet():
    assert find_place(TORCHRUN).dist_url == "env://"
    assert find_place({**TORCHRUN, "GROUP_WORLD_SIZE": "1"}).dist_url == "attempt://"
    assert find_place(SRUN).dist_url == "tcp://gpu007:24242"
    assert find_place({**SRUN, "MASTER_ADDR": "a", "MASTER_PORT": "1"}).dist_url == "tcp://a:1"


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"RANK": "3"},
        {k: v for k, v in TORCHRUN.items() if k in KUBEFLOW},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_PROCID": "0"},
    ],
)
def test_by_hand(env):
    """In a batch script without srun, and in an srun of one task, the workers are ours to start."""
    given = args(num_gpus=2)
    find_place(env).adapt(given)
    assert (find_place(env).launcher, given.num_gpus, given.resume) == ("", 2, False)


@pytest.mark.parametrize(
    "env",
    [
        {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"},
        {**SRUN, "SLURM_RESTART_COUNT": "1"},
        {"SLURM_RESTART_COUNT": "1"},
    ],
)
def test_what_was_started_before_is_resumed(env):
    given = args()
    find_place(env).adapt(given)
    assert given.resume


def test_a_command_line_that_says_otherwise():
    with pytest.raises(ValueError, match="--num-gpus 8, but torchrun has started 4: leave the flag out"):
        find_place(TORCHRUN).adapt(args(num_gpus=8))
    find_place(TORCHRUN).adapt(args(num_gpus=4, num_machines=2))
    with pytest.raises(ValueError, match="all machines need the same number"):
        Place("torchrun", world_size=7, local_world_size=4).adapt(args())


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("value", ["", "x", "-1"])
def test_a_variable_that_is_no_number(name, value):
    with pytest.raises(ValueError, match=f"torchrun has left {name}="):
        find_place({**TORCHRUN, name: value})


@pytest.mark.parametrize(
    "nodelist, host",
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[007-010,12],login", "gpu007"),
        ("gpu[3]", "gpu3"),
        ("rack1-node[5,7]-ib", "rack1-node5-ib"),
        ("a-b-c,d[1-2]", "a-b-c"),
    ],
)
def test_first_host(nodelist, host):
    assert first_host(nodelist) == host


def test_no_host():
    with pytest.raises(ValueError, match="names no machine"):
        first_host("")


def test_srun_trains(zygote, command, unused_port, tmp_path):
    """Two tasks with srun's environment; started again by SLURM they go on without --resume."""

    def tasks(*opts, **more):
        env = {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_ADDR": "127.0.0.1"}
        env.update(more, MASTER_PORT=str(unused_port()))
        argv = command(tmp_path / "run", *opts, flags=())
        pids = [
            zygote.start(argv, tmp_path / f"{rank}.txt", {**env, "SLURM_PROCID": rank, "SLURM_LOCALID": rank})
            for rank in "01"
        ]
        return [zygote.wait(pid) for pid in pids]

    assert tasks("SOLVER.MAX_ITER", "2") == [0, 0], (tmp_path / "0.txt").read_text()
    assert tasks("SOLVER.MAX_ITER", "4", SLURM_RESTART_COUNT="1") == [0, 0]
    text = (tmp_path / "0.txt").read_text()
    assert "workers           2 on cpu" in text and "RESUMING after step 2" in text
    assert "RESUMING" not in (tmp_path / "1.txt").read_text(), "said once"
