"""Real runs on a tiny data set, forked from one process that has imported everything."""

import pytest
import zygote
from detectron2.engine.launch import _find_free_port as unused_port

from focal_plugin.data import make_digits


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder with 14 images to train on and 4 to evaluate, of 64 to 96 pixels."""
    return make_digits(tmp_path_factory.mktemp("scenes"), num_train=14, num_val=4, image_size=96)


@pytest.fixture(scope="session")
def command(scenes):
    """command(folder, KEY, VALUE, ...): the arguments of a run into ``folder``: 12 steps of 2 images, evaluated twice.

    With everything that draws random numbers, and whose state might get lost: sizes, flips, crops, batch norm, AdamW's
    moments, a running mean as normaliser.
    """

    def make(folder, *opts, flags=("--resume",)):
        argv = ["--config-file", "digits/focal.yaml", *flags]
        for split in ("train", "val"):
            argv += ["--register", f"t_{split}={make.scenes / split}.json:{make.scenes / split}"]
        argv += ["DATASETS.TRAIN", '("t_train",)', "DATASETS.TEST", '("t_val",)', "OUTPUT_DIR", folder]
        argv += ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "20", "SOLVER.CHECKPOINT_PERIOD", "2"]
        argv += ["TEST.EVAL_PERIOD", "4", "INPUT.MIN_SIZE_TRAIN", "(64, 80, 96)", "INPUT.RANDOM_FLIP", "horizontal"]
        argv += ["INPUT.MIN_SIZE_TEST", "64", "INPUT.CROP.ENABLED", "True", "SOLVER.WARMUP_ITERS", "3"]
        return [*map(str, argv), *map(str, opts)]

    make.scenes = scenes
    return make


@pytest.fixture
def run(command, tmp_path):
    """run(KEY, VALUE, ..., fault=...): one attempt in the test's folder, and its exit code; run.text(): all it said."""
    console = tmp_path / "console.txt"

    def attempt(*opts, flags=("--resume",), **kwargs):
        return zygote.run(command(tmp_path / "run", *opts, flags=flags), console, **kwargs)

    attempt.text = console.read_text
    return attempt


@pytest.fixture
def pair(command, tmp_path):
    """pair(...): the same of two workers, as torchrun starts them: both exit codes; pair.texts(): what each said."""
    consoles = [tmp_path / f"console{rank}.txt" for rank in (0, 1)]

    def attempt(*opts, flags=("--resume",), fault=None, delay=None, timeout=120):
        env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        env["MASTER_PORT"] = str(unused_port())
        argv, started = command(tmp_path / "run", *opts, flags=flags), []
        for rank, console in enumerate(consoles):
            started.append(zygote.start(argv, console, {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, fault))
            if delay and not rank:
                delay(started[0].pid)
        return [zygote.wait(process, timeout) for process in started]

    attempt.texts = lambda: [console.read_text() for console in consoles]
    return attempt
