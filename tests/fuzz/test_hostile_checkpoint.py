"""Checkpoints: loaded, or one error that names the file; no code, and a resume that finds a good one."""

import io
import os
import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from mutants import guarded, mutate_bytes, run_cases
from torch import nn

from focal_plugin.engine import SafeCheckpointer

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
SYSTEM_CALL = b"cos\nsystem\n(S'touch canary'\ntR."
WORDS = [SYSTEM_CALL, b"cbuiltins\nexec\n", b"\x8c\x02os\x8c\x06system\x93", b"R", b"b", b"0."]


class Call(tuple):
    """Pickled as a call of ``function(*args)`` and its ``__setstate__(state)``, which loading it would make."""

    def __reduce__(self):
        return tuple(self)


SYSTEM = Call((os.system, ("touch canary",)))


def make_checkpointer(folder=""):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    return SafeCheckpointer(model, str(folder), optimizer=optimizer)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """Return the content of a checkpoint."""
    folder = tmp_path_factory.mktemp("real")
    make_checkpointer(folder).save("a", iteration=3, workers=[{"rng": [1, 2.0]}])
    return torch.load(folder / "a.pth", weights_only=True)


def saved(content, **kwargs) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


def loads(name, content: bytes) -> bool:
    """Return whether a file was loaded, into a model of the same shape; or there is an error that names it."""
    Path(name).write_bytes(content)
    checkpointer, accepted = make_checkpointer(), True
    shapes = {key: value.shape for key, value in checkpointer.model.state_dict().items()}
    try:
        checkpointer.load(name)
    except (OSError, ValueError) as error:
        accepted = False
        assert name in str(error) and len(str(error)) < 5_000
        assert isinstance(error, OSError) or f"{name} is refused: " in str(error)
    assert {key: value.shape for key, value in checkpointer.model.state_dict().items()} == shapes
    return accepted


def test_real_files_load_bit_for_bit_and_mutants_or_not_at_all(state, request):
    arrays = {name: value.numpy() for name, value in state["model"].items()}
    more = {"n": np.int64(7), "lr": np.float32(3), "empty": np.zeros(0), "classes": np.array(["cat"])}
    zoo = {"model": arrays, "__author__": "zoo", "matching_heuristics": True, **more}
    turned = {**zoo, "model": {**arrays, "0.weight": np.asfortranarray(arrays["0.weight"]).astype(">f4")}}
    files = {
        "new.pth": saved(state),
        "old.pth": saved(state, _use_new_zipfile_serialization=False),
        "pycls.pyth": saved({"model_state": state["model"]}),
        **{f"zoo{protocol}.pkl": pickle.dumps(zoo, protocol) for protocol in PROTOCOLS},
        # Not in protocol 5, in which numpy turns them itself.
        **{f"turned{protocol}.pkl": pickle.dumps(turned, protocol) for protocol in PROTOCOLS[:5]},
        "caffe2.pkl": pickle.dumps({"blobs": {f"{name}_w": value for name, value in arrays.items()}, "cfg": "x"}, 2),
    }
    for name, content in files.items():
        assert loads(name, content), name
        checkpointer = make_checkpointer()
        rest, loaded = checkpointer.load(name), checkpointer.model.state_dict()
        assert name == "caffe2.pkl" or all(torch.equal(loaded[key], value) for key, value in state["model"].items())
        if name.startswith(("zoo", "turned")):
            assert (rest["n"], rest["classes"].tolist(), rest["empty"].shape) == (7, ["cat"], (0,))
    # 4 GiB more for the process: what a pickle may claim is not looked at, so a mutant of one may ask for all.
    before = resource.getrlimit(resource.RLIMIT_AS)
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_AS, before))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), before[1]))

    def case(rng):
        name = rng.choice(list(files))
        return loads(name, mutate_bytes(rng, files[name], WORDS))

    run_cases("bytes", 300, case)


def test_code_and_what_is_no_numbers(state):
    ones, attack = torch.ones(1), {"model": {"x": SYSTEM}}
    contents = [SYSTEM, Call((exec, ("open('canary', 'w')",))), attack, {**state, "extra": [SYSTEM]}, {"blobs": SYSTEM}]
    core = np._core if hasattr(np, "_core") else np.core
    bare = (core.multiarray._reconstruct, (np.ndarray, (0,), b"b"))
    f4, obj = np.dtype("f4"), np.dtype("O")
    # Its field would be an object, of which the bytes are taken for the address: to look at it is a crash of Python.
    forged = Call((np.dtype, ("V8", False, True), (3, "|", None, ("a",), {"a": (obj, 0)}, 8, 1, 0)))
    arrays = [
        np.array(["text"]),
        Call((*bare, (1, (1 << 60,), f4, False, b""))),
        Call((*bare, (1, (1,), obj, False, b"12345678"))),
        Call((*bare, (1, (1,), forged, False, b"12345678"))),
        Call((np.ndarray, ((1,), "O", b"12345678"))),
        Call((core.numeric._frombuffer, (8, f4, (2,), "C"))),  # room for as many bytes as it says
        Call((core.numeric._frombuffer, (b"12345678", f4, (3,), "C"))),
    ]
    # Beside the weights, whose type is checked once more, and as weights.
    contents += [5, [1], ones, *({"model": {}, "__author__": "x", "extra": array} for array in arrays[1:])]
    models = [[], {"x": 3}, {5: ones}, {"\x1b[2J": ones}, {"x": ones, "y": None}, *({"x": array} for array in arrays)]
    for content in contents + [{"model": model, "__author__": "x"} for model in models]:
        with guarded():
            assert not any(loads("evil.pkl", pickle.dumps(content, protocol)) for protocol in PROTOCOLS)
            assert not loads("evil.pth", saved(content))
            assert not loads("evil.pth", saved(content, _use_new_zipfile_serialization=False))
            assert not loads("evil.pyth", saved({"model_state": content}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["evil.pkl", "evil.pth", "evil.pyth"])
def test_opcodes_and_damage(name):
    for content in (
        SYSTEM_CALL,
        b"(S'touch canary'\nios\nsystem\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__new__\x93.",
        b"\x80\x02c_codecs\nencode\nU\x01xU\x05rot13\x86R.",
        b"\x80\x02\x82\x01.",  # an extension of copyreg
        b"\x80\x02U\x01xQ.",  # a persistent id
        b"\x80\x05\x97.",  # a buffer from elsewhere
        *(b"", b"not a pickle", b"PK\x03\x04 cut off", b"\x80\x02}"),
    ):
        with guarded():
            assert not loads(name, content[:-1] + b"0}."), content  # thrown away, and an empty dict is left
            Path(name).write_bytes(content)
            with pytest.raises(ValueError, match=f"{name} is refused: it is damaged"):
                make_checkpointer().load(name)


def test_every_flipped_bit_of_the_numbers_is_noticed(state):
    """torch itself reads on, and gives another number."""
    content, numbers = saved(state), state["model"]["0.weight"].numpy().tobytes()
    for offset in range(0, len(numbers), 5):
        flipped = bytearray(content)
        flipped[content.index(numbers) + offset] ^= 1 << (offset % 8)
        torch.load(io.BytesIO(bytes(flipped)), weights_only=True)
        Path("flipped.pth").write_bytes(flipped)
        with pytest.raises(ValueError, match=r"flipped.pth is refused: .*the sum of archive/data/.* is wrong"):
            make_checkpointer().load("flipped.pth")


def test_not_there_a_folder_a_pipe_a_device(no_files):
    irregular, impossible = no_files
    for name in irregular:
        os.rename(name, f"{name}.pth")
        with guarded(), pytest.raises(ValueError, match=f"{name}.pth is refused: it is no regular file"):
            make_checkpointer().load(f"{name}.pth")
    for name in (*impossible, "//[x", "nowhere.pth?matching_heuristics=True"):
        with pytest.raises((OSError, ValueError)) as caught:
            make_checkpointer().load(name)
        assert repr(name.partition("?")[0])[1:-1] in str(caught.value)


def test_what_else_may_lie_in_the_folder(state, tmp_path):
    """What last_checkpoint names is not followed out of the folder, and nothing there is waited for."""
    folder = tmp_path / "run"
    for name in ("folder", "model_0000006.pth", "model_final.pth", "model_0000008.pth.tmp", "../away"):
        (folder / name).mkdir(parents=True)
    (tmp_path / "away" / "model_0000009.pth").write_bytes(saved({**state, "iteration": 9}))
    (folder / "model_0000001.pth").write_bytes(saved({**state, "iteration": 1}))
    os.mkfifo(folder / "pipe")
    os.mkfifo(folder / "model_0000005.pth")
    os.symlink("loop", folder / "loop")
    for tag in b"../away/model_0000009.pth /etc/passwd .. a\0b \xff\xfe folder pipe loop".split(b" "):
        (folder / "last_checkpoint").write_bytes(tag)
        with guarded():
            assert make_checkpointer(folder).resume_or_load("", resume=True)["iteration"] == 1
