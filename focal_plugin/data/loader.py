"""Training data as a stream in which the n-th image, augmentation included, depends on the seed and on n alone.

A resumed run of Detectron2's sees the beginning of the data again, augmented differently. This stream can begin at any
batch, with any number of data workers, and gives the images that an uninterrupted run would have seen.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper, build_detection_train_loader, get_detection_dataset_dicts
from detectron2.data import detection_utils as utils
from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from ..files import printable

logger = logging.getLogger(__name__)

_MAX_TRIES = 1000  # images, to find one that can be trained on
SKIPPED = "skipped"  # key of an image's dict: the files that it replaces
Mapper = Callable[[dict], dict]  # from a dict in Detectron2's format to what the model takes


class TrainingStream(Sampler):
    """Choose the images that this process trains on, batch after batch, from any batch on.

    Yields (index, position): an image, and its place in the stream that all processes share. Images are grouped here,
    from the annotations, and not after loading as in Detectron2: those before the first batch need not be read.

    Args:
        make_sampler: returns one of Detectron2's training samplers for a ``seed``, both the same in all processes.
        batch_size: images per step of this process.
        groups: for each image, the group that it shares batches with; None puts all images into one group.
    """

    def __init__(
        self, make_sampler: Callable[[int], Sampler], batch_size: int, seed: int, groups: Sequence[int] | None = None
    ):
        self._make_sampler, self.batch_size, self._groups = make_sampler, batch_size, groups
        self.start_from(0, seed)

    def start_from(self, batch: int, seed: int) -> None:
        """Let the next iteration begin at this batch of the stream of this seed; a collective call."""
        self.batch, self.seed = batch, seed
        self._sampler = self._make_sampler(seed)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return itertools.islice(self._grouped(), self.batch * self.batch_size, None)

    def _grouped(self) -> Iterator[tuple[int, int]]:
        buckets: dict[int, list] = {}
        for sample in zip(self._sampler, itertools.count(comm.get_rank(), comm.get_world_size())):
            bucket = buckets.setdefault(0 if self._groups is None else self._groups[sample[0]], [])
            bucket.append(sample)
            if len(bucket) == self.batch_size:
                yield from bucket
                bucket.clear()

    def __getstate__(self):
        return {"seed": self.seed}  # all that a spawned data worker needs


class SeededDataset(Dataset):
    """Map images with random numbers that depend on their place in the stream only.

    An image that cannot be read is replaced by another, drawn by the same rule, which lists it under :data:`SKIPPED`;
    at most ``max_bad_images`` are passed over before a readable one. The ``stream`` gives (index, position) and seed.
    """

    def __init__(self, dataset: Sequence[dict], mapper: Mapper, stream: TrainingStream, max_bad_images: int):
        self._dataset, self._mapper, self._stream, self._max_bad_images = dataset, mapper, stream, max_bad_images

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, samples: list[tuple[int, int]]) -> list[dict]:
        """Return a batch, as torch's loader asks for one."""
        with seeded():  # without data workers, the model draws from the same generators
            return [self[sample] for sample in samples]

    def __getitem__(self, sample: tuple[int, int]) -> dict:
        """Return the mapped image of a sample of the stream, or of its replacement; leaves the generators seeded.

        A ValueError names the images that cannot be read where they are more than may be passed over.
        """
        (index, position), seed, skipped = sample, self._stream.seed, []
        others = None  # made when first needed: seeding it from a text takes a while
        for _ in range(_MAX_TRIES):
            _seed(seed, position)
            image, reason = _read(self._mapper, self._dataset[index])
            if reason:
                skipped.append((image, reason))
                if len(skipped) > self._max_bad_images:
                    raise ValueError(too_many_bad_images(skipped, self._max_bad_images))
            elif image is not None:  # a mapper returns None to ask for another image
                return {**image, SKIPPED: skipped} if skipped else image
            others = others or random.Random(f"{seed} {position}")
            index = others.randrange(len(self))
        if skipped:
            raise ValueError(too_many_bad_images(list(dict(skipped).items()), self._max_bad_images))
        raise ValueError(f"the mapper has returned None for {_MAX_TRIES} images in a row")


class NamingMapper:
    """Map images with one of Detectron2's mappers for evaluation, where none can be left out: errors name the file."""

    def __init__(self, mapper: Mapper):
        self._mapper = mapper

    def __call__(self, image: dict) -> dict:
        image, reason = _read(self._mapper, image)
        if reason:
            hint = "mend it or take it out of the annotations (tools/check_dataset.py lists all such images)"
            raise ValueError(f"{image} cannot be read ({reason}), and an evaluation needs every image: {hint}")
        return image


def _read(mapper: Mapper, image: dict) -> tuple[dict | str, str]:
    """Return the mapped image and no reason, or the name of its file, safe to print, and why it cannot be read."""
    try:
        return mapper(image), ""
    except Exception:
        # The file's fault, or the mapper's? Pillow raises all kinds of errors, and does not name the file.
        try:
            utils.check_image_size(dict(image), utils.read_image(image["file_name"], format="BGR"))
        except MemoryError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            return printable(image["file_name"], 500, quotes=False), printable(reason, 500, quotes=False)
        raise


def too_many_bad_images(skipped: Sequence[tuple[str, str]], limit: int) -> str:
    """Return an error message that names the files, given as (file name, reason), and says what to do."""
    files = "".join(f"  {name}: {reason}\n" for name, reason in skipped)
    text = f"{len(skipped)} image(s) cannot be read, and DATALOADER.MAX_BAD_IMAGES allows {limit}:\n{files}"
    return text + "Mend or remove them (tools/check_dataset.py lists them all), or raise DATALOADER.MAX_BAD_IMAGES."


def build_train_loader(cfg: CfgNode, mapper: Mapper | None = None) -> DataLoader:
    """Build a loader of Detectron2's training data from whose :func:`stream_of` training can be resumed.

    ``cfg`` has the plugin's keys; ``mapper`` is by default Detectron2's ``DatasetMapper(cfg, True)``. A ValueError says
    that no image is left to train on, or that there is no such sampler.
    """
    mapper = mapper or DatasetMapper(cfg, is_train=True)
    try:
        dicts = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    except AssertionError as error:  # Detectron2's, where nothing is left
        hint = "Images without an object are dropped unless DATALOADER.FILTER_EMPTY_ANNOTATIONS is False"
        raise ValueError(f"DATASETS.TRAIN {cfg.DATASETS.TRAIN}: {error} {hint}") from error
    groups = None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        try:
            groups = np.array([image["width"] > image["height"] for image in dicts], dtype=np.uint8)
        except KeyError:
            logger.warning("images are not grouped by aspect ratio: the data set does not give their width and height")
    dataset = DatasetFromList(dicts, copy=False)
    del dicts  # packed by now, and much smaller

    def make_sampler(seed: int) -> Sampler:
        # Detectron2's own choice by name. Samplers that take no seed draw one from NumPy's generator.
        with seeded(seed):
            return build_detection_train_loader.from_config(cfg, mapper=mapper, dataset=dataset)["sampler"]

    seed = comm.shared_random_seed()
    stream = TrainingStream(make_sampler, cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size(), seed, groups)
    loader = DataLoader(
        SeededDataset(dataset, mapper, stream, cfg.DATALOADER.MAX_BAD_IMAGES),
        batch_size=stream.batch_size,
        sampler=stream,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),  # without one it would draw from the model's
    )
    return ignore_sigterm(loader)


def stream_of(loader: Iterable[list[dict]]) -> TrainingStream | None:
    """Return the stream that a loader of :func:`build_train_loader` reads; None for another loader."""
    sampler = getattr(loader, "sampler", None)
    return sampler if isinstance(sampler, TrainingStream) else None


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Start Python's, NumPy's and torch's CPU generators from non-negative integers inside, and put them back after."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        _seed(*entropy)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


def _seed(*entropy: int) -> None:
    words = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    # Not torch.manual_seed, which seeds the GPUs as well.
    torch.default_generator.manual_seed(int(words[2]))


def ignore_sigterm(loader: DataLoader) -> DataLoader:
    """Make the data workers of a loader ignore SIGTERM unless it comes from the process that started them.

    A scheduler sends it to every process, and means the trainer, which needs living data workers to save a checkpoint.
    """
    if loader.num_workers and hasattr(signal, "sigwaitinfo"):  # where signals can be waited for, as on Linux
        loader.__class__ = _SigtermIgnoringLoader
        loader.worker_init_fn = _init_worker
    return loader


class _SigtermIgnoringLoader(DataLoader):
    def __iter__(self):
        # The workers inherit the mask: there is no moment at which they could die of the signal.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(worker_id: int) -> None:
    def obey_parent() -> None:
        # torch ends a worker that does not end by itself with SIGTERM; the interpreter would wait for it forever.
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=obey_parent, daemon=True).start()
