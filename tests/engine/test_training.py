"""tools/train_net.py and the trainer on a real, tiny data set: train, evaluate, resume, two CPU workers, bad input."""

import copy as copy_module
import json
import re
import subprocess
import sys

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import AMPTrainer
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage
from zygote import ENV, ROOT

from focal_plugin import get_config
from focal_plugin.engine import FocalTrainer
from focal_plugin.engine.hooks import TrainingPicture
from focal_plugin.engine.trainer import DIVERGED

# Of a CPU, where torch's scaler warns.
pytestmark = pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning", "ignore:.*GradScaler:UserWarning")
SHORT = ("SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "0", "VIS_PERIOD", "2")


def test_trains_evaluates_and_resumes(command, run, tmp_path):
    """First by the command itself, in a process of its own."""
    argv = [sys.executable, str(ROOT / "tools" / "train_net.py"), *command(tmp_path / "run", *SHORT, flags=())]
    done = subprocess.run(argv, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "No GPU found: running on the CPU" in done.stdout
    assert "data       14 images of t_train; tested on t_val" in done.stdout
    assert "schedule   4 steps of 4 images, 1.14 epochs" in done.stdout
    out = tmp_path / "run"
    assert {"model_final.pth", "config.yaml", "metrics.json", "log.txt"} <= {p.name for p in out.iterdir()}
    assert (out / "inference" / "coco_instances_results.json").is_file()
    logged = (out / "metrics.json").read_text()
    assert '"loss_cls": ' in logged and '"bbox/AP": ' in logged
    names = [category["name"] for category in json.loads((command.scenes / "val.json").read_text())["categories"]]
    assert torch.load(out / "model_final.pth", weights_only=True)["thing_classes"] == names

    (out / "last_checkpoint").write_text("model_0000001.pth")
    assert run(*SHORT) == 0, run.text()
    assert "Starting training from iteration 2" in run.text()
    (tmp_path / "console.txt").unlink()
    assert run(*SHORT, "MODEL.WEIGHTS", out / "model_final.pth", flags=("--eval-only",)) == 0, run.text()
    assert "copypaste: AP,AP50,AP75" in run.text() and "Starting training" not in run.text()


@pytest.mark.parametrize(
    "flags, opts, message",
    [
        ((), ["MODEL.RETINANET.NUM_CLASSES", "7"], "'t_train' has 10 classes .* set MODEL.RETINANET.NUM_CLASSES 10"),
        ((), ["MODEL.RETINANET.FOCAL_LOSS_GAMA", "1"], "did you mean MODEL.RETINANET.FOCAL_LOSS_GAMMA"),
        ((), ["DATASETS.TEST", '("t_vall",)'], "no data set 't_vall' is registered"),
        (("--config-file", ""), [], "no config"),
        (("--eval-only",), [], "no trained weights to evaluate"),
        (("--register", "x=nowhere.json:nowhere"), [], "there is no file .*nowhere.json"),
        (("--num-gpus", "0"), [], "--num-gpus 0 .*at least 1 of each"),
        ((), ["MODEL.RETINANET.FOCAL_LOSS_ALPHA", "1.5"], "MODEL.RETINANET.FOCAL_LOSS_ALPHA must be in"),
        (("--num-gpus", "3"), [], "SOLVER.IMS_PER_BATCH 4 cannot be shared out evenly among 3 workers"),
        ((), ["MODEL.WEIGHTS", "nowhere.pth"], "MODEL.WEIGHTS: there is no file 'nowhere.pth'"),
    ],
)
def test_bad_input_is_one_message_and_no_traceback(run, flags, opts, message):
    assert run(*SHORT, *opts, flags=flags) == 2
    assert "Traceback" not in run.text()
    assert re.search(f"^error: .*{message}", run.text(), re.MULTILINE), run.text()


def test_adamw():
    cfg = get_config("digits/focal.yaml", ["SOLVER.WEIGHT_DECAY_BIAS", "0.5"])
    model = build_model(cfg)
    adamw = FocalTrainer.build_optimizer(cfg, model)
    assert isinstance(adamw, torch.optim.AdamW)
    assert sum(len(g["params"]) for g in adamw.param_groups) == len(list(model.parameters()))
    decay = {id(p): g["weight_decay"] for g in adamw.param_groups for p in g["params"]}
    assert decay[id(model.head.cls_score.weight)] == 0.01
    assert decay[id(model.head.cls_score.bias)] == 0.5
    assert decay[id(model.backbone.fpn_lateral3.norm.weight)] == 0.0
    # Gradients are clipped by step(): after one with a huge gradient AdamW's second moment is small.
    model.head.cls_score.weight.grad = torch.full_like(model.head.cls_score.weight, 1e6)
    adamw.step()
    assert adamw.state[model.head.cls_score.weight]["exp_avg_sq"].sum() <= 0.0011


@pytest.mark.parametrize("norm_type", ["2.0", "1.0", "inf"])
def test_gradients_are_clipped_as_detectron2_clips_them(norm_type):
    """Bit for bit, each parameter for itself; one has no gradient."""
    opts = ["SOLVER.OPTIMIZER", "SGD", "SOLVER.CLIP_GRADIENTS.NORM_TYPE", norm_type]
    cfg = get_config("digits/focal.yaml", opts)
    models = []
    for build in (build_optimizer, FocalTrainer.build_optimizer):
        torch.manual_seed(0)
        models.append(build_model(cfg))
        for number, parameter in enumerate(models[-1].parameters()):
            parameter.grad = torch.randn_like(parameter) * 10.0 ** (number % 7 - 3) if number else None
        build(cfg, models[-1]).step()
    for want, got in zip(*(model.parameters() for model in models)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("precision, dtype", [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_mixed_precision_is_upstreams_trainer_with_another_dtype(scenes, tmp_path, precision, dtype):
    trainer = amp_trainer(scenes, tmp_path, "cpu", precision)
    assert isinstance(trainer._trainer, AMPTrainer) and trainer._trainer.precision == dtype
    # With bfloat16 nothing is to be scaled: the loss goes into the backward pass as it is.
    assert dtype == torch.float16 or trainer._trainer.grad_scaler.scale(torch.tensor(3.0)) == 3


def test_float16_goes_on_from_a_run_that_had_no_loss_scale(scenes, tmp_path):
    saved = amp_trainer(scenes, tmp_path, "cpu", "bfloat16").state_dict()
    trainer = amp_trainer(scenes, tmp_path, "cpu", "float16")
    trainer._trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=32.0)
    for state in (saved, {**saved, "_trainer": {k: v for k, v in saved["_trainer"].items() if k != "grad_scaler"}}):
        trainer.load_state_dict(state)
        assert trainer._trainer.grad_scaler.get_scale() == 32


def test_a_config_without_the_keys_says_what_to_call():
    with pytest.raises(ValueError, match=r"call focal_plugin\.add_focal_config\(cfg\) after get_cfg\(\)"):
        FocalTrainer(get_cfg())


def test_a_model_can_be_copied_and_called_with_other_things_than_images(scenes, tmp_path):
    """As hooks do that average weights, or look at the backbone; Detectron2's own trainer does not mind."""
    trainer = amp_trainer(scenes, tmp_path, "cpu", "bfloat16")
    trainer.before_train()
    copy = copy_module.deepcopy(trainer.model)
    assert copy is not trainer.model and trainer.guard.batch == ()
    copy.eval()([{"image": torch.zeros(3, 64, 64)}])
    trainer.model.forward = lambda x: {}
    trainer.model(torch.zeros(2, 3))
    assert trainer.guard.batch == ()


def test_a_subclass_that_steps_in_its_own_way_diverges_in_the_same_file(scenes, tmp_path):
    """Without after_backward it is not the guard that finds the loss broken, but Detectron2's check of the metrics."""
    trainer = amp_trainer(scenes, tmp_path, "cpu", "bfloat16")
    trainer.run_step = lambda: trainer._trainer._write_metrics({"loss_cls": torch.tensor(float("nan"))}, 0.0)
    with pytest.raises(FloatingPointError):
        trainer.train()
    assert json.loads((tmp_path / DIVERGED).read_text())["iteration"] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_mixed_precision_trains(scenes, tmp_path, precision):
    trainer = amp_trainer(scenes, tmp_path, "cuda", precision)
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def amp_trainer(scenes, tmp_path, device, precision, *more):
    for split in ("train", "val"):
        if f"amp_{split}" not in DatasetCatalog:
            register_coco_instances(f"amp_{split}", {}, str(scenes / f"{split}.json"), str(scenes / split))
    opts = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", precision, "MODEL.DEVICE", device]
    opts += ["SOLVER.MAX_ITER", "3", "SOLVER.IMS_PER_BATCH", "4", "OUTPUT_DIR", str(tmp_path)]
    opts += ["DATASETS.TRAIN", '("amp_train",)', "DATASETS.TEST", '("amp_val",)']
    return FocalTrainer(get_config("digits/focal.yaml", [*opts, *more]))


@pytest.mark.parametrize("period, drawn", [("0", 0), ("5", 1)])
def test_vis_period_draws_on_the_main_worker(scenes, tmp_path, monkeypatch, period, drawn):
    trainer = amp_trainer(scenes, tmp_path, "cpu", "bfloat16", "VIS_PERIOD", period)
    assert sum(isinstance(hook, TrainingPicture) for hook in trainer.build_hooks()) == drawn
    with monkeypatch.context() as other:  # an architecture that has no such picture
        other.setattr("focal_plugin.engine.trainer.unwrap_ddp", lambda model: torch.nn.Linear(1, 1))
        assert not any(isinstance(hook, TrainingPicture) for hook in trainer.build_hooks())
    monkeypatch.setattr("focal_plugin.engine.trainer.comm.is_main_process", lambda: False)
    assert not any(isinstance(hook, TrainingPicture) for hook in trainer.build_hooks())


@pytest.fixture
def evaluate(tmp_path, restore_catalogs):
    """evaluate(truth, found): as at the end of an evaluation, with the detections of each image."""

    def make(truth, found):
        (tmp_path / "val.json").write_text(json.dumps(truth))
        register_coco_instances("judged", {}, str(tmp_path / "val.json"), str(tmp_path))
        DatasetCatalog.get("judged")
        evaluator = FocalTrainer.build_evaluator(get_config("digits/focal.yaml"), "judged", str(tmp_path))
        evaluator.reset()
        evaluator._results = {}
        images = [{"image_id": n, "instances": [{"image_id": n, **d} for d in ds]} for n, ds in found.items()]
        evaluator._eval_predictions(images)

    return make


@pytest.mark.parametrize("annotated", [True, False])
def test_an_ap_of_0_is_explained(scenes, evaluate, caplog, annotated):
    """With the detections of all workers and the data set's ids; not for a set that is there to be submitted."""
    truth = json.loads((scenes / "val.json").read_text())
    if not annotated:
        del truth["annotations"]
    evaluate(truth, {n: [{"category_id": 3, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.5}] for n in (1, 2)})
    told = re.findall(r"AP is 0: 2 detections, scores 0\.500 to 0\.500 for \d+ .* detected: \[4\],", caplog.text)
    assert len(told) == caplog.text.count("AP is 0") == annotated


def test_the_score_of_the_highest_f1_is_logged(scenes, evaluate):
    """All objects are found at .75, and as many things that are none at .25."""
    truth, found = json.loads((scenes / "val.json").read_text()), {}
    for one in truth["annotations"]:
        right = {"category_id": one["category_id"] - 1, "bbox": one["bbox"], "score": 0.75}
        found.setdefault(one["image_id"], []).extend([right, {**right, "bbox": [0.0, 0.0, 1.0, 1.0], "score": 0.25}])
    with EventStorage() as storage:
        evaluate(truth, found)
    assert storage.latest()["score_threshold"] == (0.75, 0)
