"""Loading of checkpoints without running code from them."""

import pickle
from contextlib import contextmanager

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
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
}


class SafeCheckpointer(DetectionCheckpointer):
    """Upstream's checkpointer for files that one need not trust.

    ``.pth`` files are loaded with ``weights_only=True``, model-zoo ``.pkl`` files only if they hold arrays.
    """

    def _torch_load(self, f):
        with _refusing(f):
            return torch.load(f, map_location="cpu", weights_only=True)

    def _load_file(self, filename):
        if filename.endswith(".pkl"):
            with _refusing(filename), PathManager.open(filename, "rb") as f:
                _ArrayUnpickler(f, encoding="latin1").load()
        return super()._load_file(filename)


@contextmanager
def _refusing(filename):
    """Turns whatever a damaged or hostile file raises (anything, from KeyError to EOFError) into one error."""
    try:
        yield
    except OSError:
        raise
    except Exception as e:
        raise ValueError(
            f"{filename} is refused: it is damaged, or no plain checkpoint of tensors and arrays but one that would "
            f"run code when loaded. If you trust it, load it yourself and save its state_dict again. ({e!r})"
        ) from e


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _ARRAY_GLOBALS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)
