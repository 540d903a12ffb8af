"""The picture of VIS_PERIOD, images that cannot be read, and the hooks' states."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.engine import HookBase, TrainerBase
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from focal_plugin.data.loader import SKIPPED
from focal_plugin.engine import FocalTrainer
from focal_plugin.engine.hooks import BadImages, TrainingPicture


def build(cfg):
    torch.manual_seed(0)
    return build_model(cfg).train()


def step(model, batch, iteration, *hooks):
    """The gradients of a step and the pictures that the hooks have drawn of it."""
    model.zero_grad()
    with EventStorage(iteration) as storage:
        sum(model(batch).values()).backward()
        for hook in hooks:
            hook.trainer = trainer_of(model, batch, storage)
            hook.after_step()
        return [p.grad.clone() for p in model.parameters()], [picture for _, picture, _ in storage._vis_data]


def trainer_of(model, batch, storage):
    return SimpleNamespace(model=model, iter=storage.iter, storage=storage, guard=SimpleNamespace(batch=batch))


@pytest.mark.parametrize("head, gamma", [("FocalHead", "2.0"), ("OHEMHead", "0.0"), ("SSDHead", "0.0")])
@pytest.mark.parametrize("input_format", ["BGR", "RGB"])
def test_vis_period_draws_truth_over_predictions(tiny_config, make_batch, head, gamma, input_format):
    """The picture of the writers: the image as it is, twice, apart from the boxes; nothing else is changed by it."""
    opts = ("MODEL.FOCAL.HEAD", head, "MODEL.RETINANET.FOCAL_LOSS_GAMMA", gamma, "INPUT.FORMAT", input_format)
    opts += ("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0")
    batch = make_batch([2, 1])
    batch[0]["instances"].gt_boxes.tensor[:, :2].clamp_(min=4)
    plain, drawn = build(tiny_config(*opts)), build(tiny_config(*opts))
    before, pictures = np.random.get_state()[1].copy(), []
    for iteration in range(3):
        without, nothing = step(plain, batch, iteration)
        gradients, found = step(drawn, batch, iteration, TrainingPicture(2))
        pictures.append(found)
        assert not nothing and all(torch.equal(a, b) for a, b in zip(without, gradients))
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), drawn.state_dict().values()))
    assert (np.random.get_state()[1] == before).all() and drawn.training

    assert [len(p) for p in pictures] == [1, 0, 1]
    (picture,) = pictures[0]
    assert picture.shape == (3, 2 * 96, 128)
    image = batch[0]["image"].flip(0) if input_format == "BGR" else batch[0]["image"]
    truth, predicted = (abs(x - image.numpy()).max(axis=0) for x in picture.reshape(3, 2, 96, 128).swapaxes(0, 1))
    assert truth[:3, :3].max() <= 1  # the corner is outside of all boxes
    assert (truth > 8).any() and (predicted > 8).any() and not (truth == predicted).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_a_broken_model_is_not_drawn(tiny_config, make_batch, bad):
    """Detectron2's boxes raise for it, and the guard of the loss is there to say which images it broke on."""
    model = build(tiny_config("MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"))
    torch.nn.init.constant_(model.head.bbox_pred.bias, bad)
    assert step(model, make_batch([2]), 0, TrainingPicture(1))[1] == []
    assert model.training


def test_bad_images_of_each_forward_pass_are_named_at_once(caplog):
    """A step may run the model several times, and need not end well."""
    hook, model = BadImages(2), torch.nn.Identity()
    hook.after_train()  # as Detectron2 calls it when another hook's before_train has raised
    with EventStorage() as storage:
        hook.trainer = trainer_of(model, [], storage)

        def forward(*images):
            hook.trainer.guard.batch = [{SKIPPED: [(name, "torn") for name in images]}, {}]
            model(hook.trainer.guard.batch)

        hook.before_train()
        forward("a.png")
        forward("a.png")
        assert [record.getMessage().split(";")[0] for record in caplog.records] == ["a.png cannot be read (torn)"]
        forward("b.png")
        forward()
        hook.after_step()
        assert storage.latest()["bad_images"][0] == 2
        with pytest.raises(ValueError, match=r"(?s)3 image\(s\) .* allows 2.*a\.png: torn.*b\.png: torn.*c\.png: torn"):
            forward("c.png")
        model.eval()
        forward("c.png")  # of an evaluation, with the batch of the last step
        hook.after_train()
        model.train()
        forward("c.png")


def test_two_hooks_of_one_class_keep_their_states():
    """Trap: upstream keys the states by class, and drops all but the first."""

    class Counting(HookBase):
        def __init__(self, count):
            self.state_dict, self.load_state_dict = lambda: {"count": count}, self.__dict__.update

    class Bare(FocalTrainer):
        def __init__(self, *counts):
            TrainerBase.__init__(self)
            self._trainer = TrainerBase()
            self._trainer.data_loader, self._hooks = None, list(map(Counting, counts))

    second = Bare(3, 4)
    second.load_state_dict(Bare(1, 2).state_dict())
    assert [hook.count for hook in second._hooks] == [1, 2]
