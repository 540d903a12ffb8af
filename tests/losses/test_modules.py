"""The module forms call the functions."""

import pytest
import torch

from focal_plugin import losses
from focal_plugin.losses import SigmoidFocalLoss, SoftmaxFocalLoss


@pytest.mark.parametrize("name", ["sigmoid_focal_loss", "sigmoid_focal_loss_star", "softmax_focal_loss"])
@pytest.mark.parametrize("alpha", [-1.0, 0.3, [0.1, 0.5, 0.9], torch.tensor([0.1, 0.5, 0.9])], ids=str)
def test_equals_its_function(name, alpha):
    function, module = getattr(losses, name), getattr(losses, name.title().replace("_", ""))
    x, labels = torch.randn(2, 3, 5), torch.randint(-1, 3, (2, 5))
    for reduction in ("none", "sum", "mean"):
        criterion = module(alpha, 1.5, reduction, class_dim=1)
        assert torch.equal(criterion(x, labels), function(x, labels, alpha, 1.5, reduction, class_dim=1))
    assert not list(criterion.parameters()) and not criterion.state_dict()
    assert "gamma=1.5" in repr(criterion)


def test_alpha_moves_with_the_module_and_keeps_its_digits():
    assert SigmoidFocalLoss([0.5, 0.5]).to("meta").class_alpha.is_meta
    module = SigmoidFocalLoss(alpha := torch.tensor([0.1, 0.999])).bfloat16()
    alpha.fill_(0)
    assert torch.equal(module.class_alpha, torch.tensor([0.1, 0.999]))


@pytest.mark.parametrize(
    "kwargs", [{"alpha": 3.0}, {"alpha": [0.5, 2.0]}, {"alpha": None}, {"gamma": -1.0}, {"reduction": "avg"}]
)
def test_bad_values_are_refused_when_it_is_made(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        SoftmaxFocalLoss(**kwargs)
