"""Loading of checkpoints without running code from them."""

import pickle

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager

# All that the pickles of the Detectron and Detectron2 model zoos are made of, beside Python's own containers.
_ARRAY_GLOBALS = {
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *(
        (module, name)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("_reconstruct", "scalar")
    ),
}


class SafeCheckpointer(DetectionCheckpointer):
    """Upstream's checkpointer for files that one need not trust.

    ``.pth`` files are loaded with ``weights_only=True``, model-zoo ``.pkl`` files only if they hold arrays.
    """

    def _torch_load(self, f):
        try:
            return torch.load(f, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as e:
            raise ValueError(
                f"{f} is not a plain checkpoint of tensors: it is damaged, or would run code when loaded, and is "
                f"refused. If you trust it, load it with torch.load and save its state_dict again. ({e})"
            ) from e

    def _load_file(self, filename):
        if filename.endswith(".pkl"):
            with PathManager.open(filename, "rb") as f:
                _ArrayUnpickler(f, encoding="latin1").load()
        return super()._load_file(filename)


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _ARRAY_GLOBALS:
            raise ValueError(f"the checkpoint holds {module}.{name}, not only arrays, and is refused")
        return super().find_class(module, name)
