"""Two "machines" of two workers each, over gloo on this one, give the gradients of one process with the joint batch.

Run as a script it is one of the workers.
"""

from __future__ import annotations

import os
import sys
from itertools import chain

import pytest
import torch
import zygote
from detectron2.engine.launch import _find_free_port as unused_port
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from focal_plugin import get_config
from focal_plugin.engine.torchrun import Workers

SYNC = ["MODEL.FOCAL.NORMALIZER_SYNC", "True"]
OHEM = ["MODEL.FOCAL.HEAD", "OHEMHead", "MODEL.RETINANET.FOCAL_LOSS_GAMMA", "0.0", "MODEL.OHEM.BATCH_SIZE", "16"]
OHEM += ["MODEL.OHEM.SCOPE", "image"]  # the joint batch keeps as many as its parts only if each image counts alone
ONE_TO_THREE = ["MODEL.OHEM.NEG_POS_RATIO", "3.0", "MODEL.OHEM.NORMALIZER", "positives"]
BATCH = ["MODEL.FOCAL.NORMALIZER", "batch"]
SYNCED = {
    "focal ema": SYNC,
    "focal batch": [*SYNC, *BATCH],
    "ohem selected": [*SYNC, *OHEM],
    "ohem 1:3 positives batch": [*SYNC, *OHEM, *ONE_TO_THREE, *BATCH],
}
ALONE = {"focal ema alone": [], "focal batch alone": BATCH, "ohem selected alone": OHEM}

# The images of each worker, as their numbers of objects; the third worker has none.
OBJECTS = [[3, 0], [1], [0, 0], [4, 2, 0]]
STEPS = 2  # so that the running mean of the positives is covered


def make_model(opts):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # Norms over the batch would differ between a part and the whole.
    fixed = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RETINANET.NUM_CLASSES", "3"]
    return build_model(get_config("digits/focal.yaml", [*fixed, *opts]))


def make_batch(seed):
    """A list of inputs for each worker."""
    g = torch.Generator().manual_seed(seed)
    return [[_image(num, g) for num in counts] for counts in OBJECTS]


def _image(num_objects, g):
    instances = Instances((64, 64))
    xy = 40 * torch.rand(num_objects, 2, generator=g)
    instances.gt_boxes = Boxes(torch.cat([xy, xy + 10 + 12 * torch.rand(num_objects, 2, generator=g)], dim=1))
    instances.gt_classes = torch.randint(0, 3, (num_objects,), generator=g)
    return {"image": 255 * torch.rand(3, 64, 64, generator=g), "instances": instances}


def gradients(model, inputs):
    model.zero_grad()
    sum(model(inputs).values()).backward()
    return {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def work(folder):
    """Save what this worker has computed, in all cases."""
    results = {}
    for case, opts in {**SYNCED, **ALONE}.items():
        model = DistributedDataParallel(make_model(opts))
        results[case] = [gradients(model, make_batch(seed)[comm.get_rank()]) for seed in range(STEPS)]
    place = [comm.get_world_size(), comm.get_local_size(), comm.get_local_rank()]
    # All gradients are the same after DistributedDataParallel: those of the last worker are the farthest from rank 0.
    torch.save({"place": place, "results": results}, f"{folder}/{comm.get_rank()}.pth")
    # As focal_plugin.engine does: at the end of the process its threads could abort it.
    comm.synchronize()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """What each of the four workers saved; one launch for all cases."""
    folder = tmp_path_factory.mktemp("parallel")
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port()), "WORLD_SIZE": "4"}
    started = []
    for rank in range(4):
        own = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank % 2)}
        started.append(zygote.start([folder], folder / f"{rank}.txt", own, script=__file__))
    codes = [zygote.wait(process, 300) for process in started]
    assert codes == [0] * 4, "\n".join((folder / f"{rank}.txt").read_text() for rank in range(4))
    saved = [torch.load(folder / f"{rank}.pth") for rank in range(4)]
    assert [worker["place"] for worker in saved] == [[4, 2, 0], [4, 2, 1]] * 2, "two machines"
    return saved


def differences(got, want):
    """The parameters whose gradients differ by more than rounding."""
    assert got.keys() == want.keys()
    # A bias before a norm has no gradient but noise.
    noise = 1e-6 * max(g.norm() for g in want.values())
    return [name for name in want if not (got[name] - want[name]).norm() <= 1e-4 * want[name].norm() + noise]


def joint_gradients(opts):
    model = make_model(opts)
    return [gradients(model, list(chain(*make_batch(seed)))) for seed in range(STEPS)]


@pytest.mark.parametrize("case", SYNCED)
def test_four_workers_with_sync_give_the_gradients_of_the_joint_batch(case, workers):
    for want, first, last in zip(
        joint_gradients(SYNCED[case]), workers[0]["results"][case], workers[3]["results"][case]
    ):
        assert any(g.norm() > 0 for g in want.values())
        assert differences(first, want) == []
        assert differences(last, want) == []


@pytest.mark.parametrize("case", ALONE)
def test_without_sync_they_do_not(case, workers):
    """What the sync is for, and the proof that the test above can fail."""
    for got, want in zip(workers[0]["results"][case], joint_gradients(ALONE[case])):
        assert differences(got, want)


if __name__ == "__main__":
    Workers(2, 2, local_rank=int(os.environ["LOCAL_RANK"])).launch(work, sys.argv[1], on_cpu=True)
