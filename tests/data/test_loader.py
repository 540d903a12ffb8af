"""The training data as a stream: which images, in which order, augmented how, from any batch on."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.samplers import TrainingSampler

from focal_plugin import get_config
from focal_plugin.data import build_train_loader, make_digits
from focal_plugin.data.loader import SKIPPED, NamingMapper, SeededDataset, TrainingStream, seeded, stream_of
from focal_plugin.engine.worker_state import get_rng_state, set_rng_state


def first(iterable, count):
    return list(itertools.islice(iterable, count))


def make_stream(seed=1, groups=None):
    return TrainingStream(lambda seed: TrainingSampler(10, seed=seed), 4, seed, groups)


@pytest.mark.parametrize("groups", [None, [0, 1, 1, 0, 1, 1, 1, 0, 1, 0]])
@pytest.mark.parametrize("batch", [0, 1, 7, 100])
def test_it_can_start_at_any_batch(batch, groups):
    stream = make_stream(groups=groups)
    want = first(stream, 4 * 120)
    stream.start_from(batch, seed=1)
    assert first(stream, 4 * 10) == want[4 * batch : 4 * batch + 40]


def test_without_groups_it_is_upstreams_order_and_groups_share_batches_and_lose_nothing():
    for seed in (1, 2):
        assert [index for index, _ in first(make_stream(seed=seed), 50)] == first(TrainingSampler(10, seed=seed), 50)
    groups = [0, 1, 1, 0, 1, 1, 1, 0, 1, 0]
    samples = first(make_stream(groups=groups), 400)
    for at in range(0, 400, 4):
        assert len({groups[index] for index, _ in samples[at : at + 4]}) == 1
    positions = sorted(position for _, position in samples)
    assert positions == sorted(set(positions)) and positions[-1] < 410  # at most a batch of each group waits


@pytest.fixture
def config(tmp_path, restore_catalogs):
    folder = make_digits(tmp_path / "digits", num_train=8, num_val=1, image_size=64)
    register_coco_instances("loader_test", {}, str(folder / "train.json"), str(folder / "train"))

    def make(*opts):
        opts = ["DATASETS.TRAIN", '("loader_test",)', "SOLVER.IMS_PER_BATCH", "2", *opts]
        return get_config("digits/focal.yaml", [*opts, "INPUT.RANDOM_FLIP", "horizontal", "INPUT.CROP.ENABLED", "True"])

    return make


def batches(loader, count):
    return [
        [(x["file_name"], x["image"].sum().item(), x["image"].shape) for x in batch] for batch in first(loader, count)
    ]


@pytest.mark.parametrize("kind", ["", "RepeatFactor", "RandomSubset", "Weighted"])
def test_every_sampler_of_upstream_can_go_on(kind, config):
    cfg = config("DATALOADER.SAMPLER_TRAIN", f"{kind}TrainingSampler", "DATALOADER.REPEAT_THRESHOLD", "0.5")
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.5
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [("loader_test", 1.5)]  # which upstream reads and does not define
    loader = build_train_loader(cfg)
    want = batches(loader, 9)
    again = build_train_loader(cfg)  # with another seed, until the checkpoint is loaded
    stream_of(again).start_from(5, stream_of(loader).seed)
    assert batches(again, 4) == want[5:]


def test_data_workers_change_nothing_not_even_the_models_random_numbers(config):
    results = []
    for workers in ("0", "1", "2"):
        torch.manual_seed(3)
        np.random.seed(3)
        loader = build_train_loader(config("DATALOADER.NUM_WORKERS", workers))
        results.append((batches(loader, 6), torch.rand(1).item(), np.random.rand()))
    assert results[0] == results[1] == results[2]


def test_images_are_seeded_by_their_place_and_a_fault_of_the_mapper_is_not_theirs(config):
    """The same image, at another place of the stream, is augmented in another way."""
    dataset = build_train_loader(config()).dataset
    assert torch.equal(dataset[3, 7]["image"], dataset[3, 7]["image"])
    assert len({tuple(dataset[3, place]["image"].shape) for place in range(8)}) > 1
    with pytest.raises(KeyError, match="my own fault"):
        build_train_loader(config(), lambda image: image["my own fault"]).dataset[0, 0]


def test_a_mapper_that_returns_none_gets_another_and_what_it_names_is_printed_safely():
    images = [{"file_name": str(i)} for i in range(10)]
    dataset = SeededDataset(images, lambda d: d if d["file_name"] == "4" else None, make_stream(), 0)
    assert dataset[3, 0]["file_name"] == "4" and SKIPPED not in dataset[3, 0]
    with pytest.raises(ValueError, match="returned None for 1000 images"):
        SeededDataset(images, lambda d: None, make_stream(), 0)[3, 0]
    mapper = NamingMapper(DatasetMapper(get_config("retina_focal.yaml"), is_train=False))
    with pytest.raises(ValueError, match=r"^a\\x1b\[2Jb\.png cannot be read \(FileNotFoundError: .*\), and an eval"):
        mapper({"file_name": "a\x1b[2Jb.png", "height": 1, "width": 1})


def test_a_data_set_that_does_not_say_how_wide_its_images_are(config, caplog, monkeypatch):
    dicts = [{k: v for k, v in d.items() if k not in ("width", "height")} for d in DatasetCatalog.get("loader_test")]
    monkeypatch.setattr("focal_plugin.data.loader.get_detection_dataset_dicts", lambda *a, **k: dicts)
    assert len(batches(build_train_loader(config()), 2)) == 2
    assert "not grouped by aspect ratio" in caplog.text


def test_no_sampler_of_this_name_and_no_image_left(config):
    with pytest.raises(ValueError, match="Unknown training sampler: Nothing"):
        build_train_loader(config("DATALOADER.SAMPLER_TRAIN", "Nothing"))
    path = Path(MetadataCatalog.get("loader_test").json_file)
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
    with pytest.raises(ValueError, match=r"loader_test.*DATALOADER\.FILTER_EMPTY_ANNOTATIONS is False"):
        build_train_loader(config("DATALOADER.FILTER_EMPTY_ANNOTATIONS", "True"))


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1), np.random.randn()


def test_seeded_is_the_same_inside_and_leaves_no_trace():
    draw()
    state = get_rng_state()
    want = draw(), draw()
    set_rng_state(state)
    inside = []
    for entropy in ((1, 2), (1, 2), (2, 1), (1,)):
        with seeded(*entropy):
            inside.append(draw())
    assert (draw(), draw()) == want
    assert inside[0] == inside[1] and len(set(inside)) == 3
