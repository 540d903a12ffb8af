"""Checkpoints: loaded, or one error that names the file; no code, no hang, and a resume that finds a good one."""

from __future__ import annotations

import copy
import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from focal_plugin.engine import SafeCheckpointer

NUM_CASES = {"bytes": 450, "pickles": 250, "trees": 250, "resume": 200}
WORDS = [
    b"cos\nsystem\n(S'touch canary'\ntR.",
    b"cbuiltins\nexec\n",
    b"\x8c\x02os\x8c\x06system\x93",
    b"cnumpy\nndarray\n",
    b"\x93",
    b"R",
    b"b",
    b"Q",
    b"0",
    b"2",
    b"(",
    b"l",
    b"}",
    b"]",
    b"\x86",
    b"h\x00",
    b"r\xff\xff\xff\x7f",  # put at place 2^31
    b"J\xff\xff\xff\x7f",
    b"\x8a\x08" + b"\x7f" * 8,
    b".",
]


class Attack:
    def __deepcopy__(self, memo):
        return self  # copying it would be the attack


class System(Attack):
    def __reduce__(self):
        return os.system, ("touch canary",)


class Exec(Attack):
    def __reduce__(self):
        return exec, ("open('canary', 'w')",)


class Call:
    """Pickled as a call: Call(f, args) -> f(*args), then its __setstate__."""

    def __init__(self, function, args, state=None):
        self._call = function, args, state

    def __reduce__(self):
        return self._call


class Model(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


class Trainer:
    """What FocalTrainer has: an optimizer, hooks, and the number of the step."""

    def __init__(self, model):
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.ones(3, 4)).sum().backward()
        self.optimizer.step()
        self.iteration = 0

    def state_dict(self):
        hooks = {"LRScheduler": {"base_lrs": [0.1], "last_epoch": 3}}
        return {"iteration": self.iteration, "optimizer": self.optimizer.state_dict(), "hooks": hooks}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]
        self.optimizer.load_state_dict(state["optimizer"])


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("canary")), "code has run"


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """The content of a checkpoint."""
    torch.manual_seed(0)
    model = Model()
    folder = tmp_path_factory.mktemp("real")
    SafeCheckpointer(model, str(folder), trainer=Trainer(model)).save("a", iteration=3, workers=[{"rng": [1, 2.0]}])
    return torch.load(folder / "a.pth", weights_only=True)


@pytest.fixture(scope="module")
def files(state):
    """Real files by format: name and bytes."""
    arrays = {name: value.numpy() for name, value in state["model"].items()}
    zoo = {"model": arrays, "__author__": "zoo", "matching_heuristics": True, "lr": np.float32(3)}
    caffe2 = {"blobs": {f"{name}_w": value for name, value in arrays.items()}, "cfg": "text"}
    return [
        ("new.pth", saved(state)),
        ("old.pth", saved(state, _use_new_zipfile_serialization=False)),
        ("pycls.pyth", saved({"model_state": state["model"]})),
        *((f"zoo{protocol}.pkl", pickle.dumps(zoo, protocol)) for protocol in (0, 2, 4, 5)),
        ("caffe2.pkl", pickle.dumps(caffe2, 2)),
    ]


def saved(content, **kwargs) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


def loads(name) -> bool:
    """Property: loaded, into a model of the same shape, or an error that names the file."""
    model = Model()
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    try:
        SafeCheckpointer(model, trainer=Trainer(model)).load(name)
        return True
    except ValueError as error:
        assert f"{name} is refused: " in str(error) and len(str(error)) < 5_000
    except OSError as error:
        assert name in str(error)
    finally:
        assert {key: value.shape for key, value in model.state_dict().items()} == shapes
        assert not os.path.exists("canary")
    return False


def write(name, content: bytes) -> str:
    with open(name, "wb") as file:
        file.write(content)
    return name


def rezip(archive: bytes, change, **kwargs) -> bytes:
    """The same zip with ``change(name, data)`` instead of data, and the right sums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w", **kwargs) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out.getvalue()


# ------------------------------ mutants


def test_mutants_of_real_files(fuzz, mutate, files):
    def case(rng):
        name, content = rng.choice(files)
        if rng.random() < 0.05:  # as it is: that is accepted, in every format
            assert loads(write(name, content))
            return True
        return loads(write(name, mutate.bytes(rng, content, WORDS)))

    fuzz.run("bytes", NUM_CASES["bytes"], case)


def test_mutants_of_the_pickle_inside(fuzz, mutate, files):
    """With right sums, so that the pickle is what has to be refused."""
    archive = files[0][1]

    def case(rng):
        def change(name, data):
            return mutate.bytes(rng, data, WORDS) if name.endswith("data.pkl") else data

        return loads(write("new.pth", rezip(archive, change)))

    fuzz.run("pickles", NUM_CASES["pickles"], case)


def test_checkpoints_of_other_content(fuzz, mutate, state):
    one = torch.ones(1)
    junk = [System(), Exec(), one, torch.ones(2, 3, 4), torch.ones(4).to_sparse(), torch.ones(6, dtype=torch.cfloat)]
    junk += [
        np.ones(6),
        np.array([1, None]),
        np.array(["x"]),
        np.zeros((0, 3)),
        one.expand(1 << 40),
        {1: (2, (3,))},
        b"x",
    ]
    junk += [set(), torch.float32, torch.device("cpu"), OrderedDict(x=1), torch.ones(6, device="meta"), range(3)]

    def case(rng):
        tree = mutate.tree(rng, state, junk)
        if rng.random() < 0.5:
            model = tree.get("model")
            if isinstance(model, dict):
                model = {name: _as_array(value) for name, value in model.items()}
            content = {"model": model, "__author__": mutate.junk(rng, junk)}
            return loads(write("x.pkl", pickle.dumps(content, rng.choice((2, 4)))))
        return loads(write("x.pth", saved(tree, _use_new_zipfile_serialization=rng.random() < 0.8)))

    fuzz.run("trees", NUM_CASES["trees"], case)


def _as_array(value):
    plain = type(value) is torch.Tensor and value.layout == torch.strided and value.device.type == "cpu"
    return value.numpy() if plain and value.numel() < 1000 else value


def test_resume_goes_back_to_a_good_one(fuzz, mutate, state, tmp_path):
    """True: from the newest, which was hurt where it does not matter; False: from the one before."""
    older, newest = tmp_path / "model_0000001.pth", tmp_path / "model_0000003.pth"
    older.write_bytes(saved({**state, "iteration": 1}))
    content = saved(state)

    def case(rng):
        newest.write_bytes(mutate.bytes(rng, content, WORDS) if rng.random() < 0.95 else content)
        tag = b"model_0000003.pth"
        (tmp_path / "last_checkpoint").write_bytes(
            tag if rng.random() < 0.7 else mutate.bytes(rng, tag, [b"../", b"\0"])
        )
        model = Model()
        checkpointer = SafeCheckpointer(model, str(tmp_path), trainer=Trainer(model))
        try:
            rest = checkpointer.resume_or_load("", resume=True)
        except ValueError as error:  # it could be read, and only its content does not fit
            assert f"{newest} is refused: " in str(error)
            return False
        assert checkpointer.resumed_from in (str(older), str(newest))
        if checkpointer.resumed_from == str(older):
            assert rest["iteration"] == 1
        return checkpointer.resumed_from == str(newest)

    fuzz.run("resume", NUM_CASES["resume"], case)


# ------------------------------ one by one


@pytest.fixture
def refused(guard):
    """refused(name, content, message): loading the file neither hangs nor runs anything, and raises."""

    def check(name, content, message="", error=ValueError):
        if content is not None:
            write(name, content)
        with guard(), pytest.raises(error, match=rf"{name}.*{message}"):
            SafeCheckpointer(Model()).load(name)
        if error is ValueError:
            with guard(), pytest.raises(ValueError, match=f"{name} is refused: "):
                SafeCheckpointer(Model()).load(name)

    return check


@pytest.mark.parametrize("attack", [System(), Exec()])
def test_code(refused, state, attack):
    for content in (
        attack,
        {"model": attack},
        {"model": {"x": attack}},
        {**state, "extra": [attack]},
        {"blobs": attack},
    ):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            refused("evil.pkl", pickle.dumps(content, protocol))
        refused("evil.pth", saved(content))
        refused("evil.pth", saved(content, _use_new_zipfile_serialization=False))
        refused("evil.pth", pickle.dumps(content))
        refused("evil.pyth", saved({"model_state": content}))
        refused("evil.pyth", pickle.dumps({"model_state": content}))


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cos\nsystem\n(S'touch canary'\ntR.",
        b"(S'touch canary'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch canary'\no.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch canary\x85R.",
        b"\x80\x02cos\nsystem\nU\x0ctouch canary\x85\x81.",
        b"\x80\x02cnumpy\nos.system\nU\x0ctouch canary\x85R.",
        b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__new__\x93.",
        b"\x80\x02cnumpy.core.multiarray\nexec\nU\x01x\x85R.",
        b"\x80\x02cbuiltins\neval\nU\x011\x85R.",
        b"\x80\x02\x82\x01.",  # an extension of copyreg
        b"\x80\x02U\x01xQ.",  # a persistent id
        b"\x80\x05\x97.",  # a buffer from elsewhere
    ],
)
@pytest.mark.parametrize("name", ["evil.pkl", "evil.pth", "evil.pyth"])
def test_opcodes(refused, name, opcodes):
    refused(name, opcodes)
    refused(name, opcodes[:-1] + b"0}.")  # thrown away, and an empty dict is left


def test_pickles_that_take_for_ever_or_all_the_memory(refused):
    doubled = b"\x80\x02)" + b"q\x00h\x00h\x00\x86" * 60  # () -> ((), ()) -> ...
    stack = doubled + b"q\x01"
    for bomb in (
        stack + b"}h\x01K\x01s.",  # as a key: its hash takes 2^60 steps
        stack + b"(h\x01K\x01d.",
        stack + b"}(h\x01K\x01u.",
        b"\x80\x04\x8f" + doubled[2:] + b"\x94\x90.",  # in a set
        b"\x80\x02c__builtin__\nset\n]" + doubled[2:] + b"a\x85R0}.",  # in a set that is thrown away
        b"\x80\x02]q\x00" + b"]q\x01(h\x00h\x00eq\x00" * 60 + b".",  # lists of lists
        b"\x80\x02]q\x00h\x00a.",  # a list in itself
        b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".",
        b"\x80\x02}U\x05modelcbuiltins\nbytearray\n\x8a\x06" + b"\x7f" * 6 + b"\x85Rs.",
        b"\x80\x02}U\x05modelc__builtin__\nbytearray\n\x8a\x06\0\0\0\0\x10\0\x85Rs.",  # 64 GiB
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 36) + b".",
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 36) + b".",
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b".",
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"}.",
    ):
        for name in ("bomb.pkl", "bomb.pth", "bomb.pyth"):
            refused(name, bomb)
        refused("bomb.pth", rezip(saved({}), lambda name, data, bomb=bomb: bomb if name.endswith("data.pkl") else data))


def test_a_place_far_away_costs_nothing(guard):
    """Python's unpickler in C makes a table of as many places as there are before it: 2^31 times 8 bytes."""
    write("far.pkl", b"\x80\x02}r\xff\xff\xff\x7fU\x05model}s.")
    with guard(), pytest.raises(ValueError, match=r"far\.pkl is refused"):  # for what it holds: no arrays
        SafeCheckpointer(Model()).load("far.pkl")


def test_arrays(refused):
    ndarray, multiarray = np.ndarray, np._core.multiarray if hasattr(np, "_core") else np.core.multiarray
    bare = (multiarray._reconstruct, (ndarray, (0,), b"b"))
    f4, obj = np.dtype("f4"), np.dtype("O")
    forged = Call(np.dtype, ("V8", False, True), (3, "|", None, ("a",), {"a": (obj, 0)}, 8, 1, 0))
    for array in (
        np.array([1, None], dtype=object),
        np.array([System()], dtype=object),
        np.zeros(3, [("a", "f4")]),
        np.zeros(3, "M8[s]"),
        np.array(["text"]),
        Call(*bare, (1, (1 << 60,), f4, False, b"")),
        Call(*bare, (1, (1 << 40,), f4, False, b"1234")),
        Call(*bare, (1, (-1,), f4, False, b"1234")),
        Call(*bare, (1, (1,), obj, False, b"12345678")),
        Call(*bare, (1, (1,), forged, False, b"12345678")),  # read as an address: a crash of Python
        Call(*bare, (1, "x", f4, False, b"1234")),
        Call(*bare, (f4,)),
        Call(ndarray, ((1 << 34,), "f4")),
        Call(ndarray, ((1,), "O", b"12345678")),
    ):
        for protocol in (2, 4):
            refused("arrays.pkl", pickle.dumps({"model": {"0.weight": array}, "__author__": "x"}, protocol))
    for encoding in ("rot13", "zip", "utf-7", "punycode"):
        opcodes = b"\x80\x02}U\x01xc_codecs\nencode\nU\x01xU" + bytes([len(encoding)]) + encoding.encode() + b"\x86Rs."
        refused("codec.pkl", opcodes)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_zoo_pickles_load_bit_for_bit(protocol, state):
    arrays = {name: value.numpy() for name, value in state["model"].items()}
    if protocol < 5:  # in which numpy turns the bytes around; the last leaves it to whom it may concern
        arrays["0.weight"] = np.asfortranarray(arrays["0.weight"]).astype(">f4")
    arrays["0.bias"] = arrays["0.bias"].astype(np.float64)
    write("zoo.pkl", pickle.dumps({"model": arrays, "__author__": "x", "n": np.int64(7), "s": np.zeros(0)}, protocol))
    model = Model()
    rest = SafeCheckpointer(model).load("zoo.pkl")
    assert rest["n"] == 7
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["model"][name])


def test_every_flipped_bit_of_the_numbers_is_noticed(refused, state):
    """torch itself reads on, and gives another number."""
    content = saved(state)
    numbers = state["model"]["0.weight"].numpy().tobytes()
    at = content.index(numbers)
    for offset in range(0, len(numbers), 5):
        flipped = bytearray(content)
        flipped[at + offset] ^= 1 << (offset % 8)
        torch.load(io.BytesIO(bytes(flipped)), weights_only=True)
        refused("flipped.pth", bytes(flipped), "the sum of archive/data/.* is wrong")


def test_a_flipped_bit_is_not_resumed_from(state, tmp_path):
    (tmp_path / "model_0000001.pth").write_bytes(saved({**state, "iteration": 1}))
    content = bytearray(saved(state))
    content[bytes(content).index(state["model"]["0.weight"].numpy().tobytes()) + 3] ^= 64
    (tmp_path / "model_0000003.pth").write_bytes(content)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    model = Model()
    assert SafeCheckpointer(model, str(tmp_path), trainer=Trainer(model)).resume_or_load("")["iteration"] == 1


def test_archives(refused, state):
    good = saved(state)
    refused(
        "x.pth", rezip(good, lambda name, data: data + b"\0" * 10**6, compression=zipfile.ZIP_DEFLATED), "larger than"
    )
    grown = rezip(good, lambda name, data: data + b"\0" * 4 if name.endswith("/data/0") else data)
    refused("x.pth", grown, "a tensor of 96 bytes, of which it has 100")
    shrunk = rezip(good, lambda name, data: data[:4] if name.endswith("/data/0") else data)
    refused("x.pth", shrunk, "a tensor of 96 bytes, of which it has 4")
    for extra in ("archive/data.pkl", "archive/DATA.PKL"):
        buffer = io.BytesIO(good)
        with pytest.warns(UserWarning) if extra.islower() else nullcontext(), zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(extra, pickle.dumps(System()))
        refused("x.pth", buffer.getvalue(), "the same name")
    refused("x.pth", rezip(good, lambda name, data: b"" if name.endswith("data.pkl") else data))
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    refused("x.pth", empty.getvalue())
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(System())
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    refused("x.pth", tar.getvalue())


def test_old_format_that_claims_more_than_it_has(refused, state):
    content = saved({"model": {"0.weight": torch.ones(6, 4)}}, _use_new_zipfile_serialization=False)
    for count in (struct.pack("<i", 2**31 - 1), struct.pack("<i", -1)):
        claimed = content.replace(b"cpuq", b"cpuq", 1)
        place = claimed.index(b"K\x18")  # 24 numbers
        refused("old.pth", claimed[:place] + b"J" + count + claimed[place + 2 :])


@pytest.mark.parametrize(
    "content",
    [
        5,
        "text",
        [1],
        torch.ones(3),
        {"model": []},
        {"model": {"x": 3}},
        {"model": {5: torch.ones(1)}},
        {"model": {"\x1b[2J": torch.ones(1)}},
        {"model": {"x": torch.ones(1), "y": None}},
        {"model": {f"{i}": i for i in range(20_001)}},
    ],
)
def test_of_the_right_format_and_the_wrong_content(refused, content):
    refused("x.pth", saved(content))
    refused("x.pyth", saved(content))
    refused("x.pyth", saved({"model_state": content}))
    if not isinstance(content, torch.Tensor):
        refused("x.pkl", pickle.dumps({"model": content, "__author__": "x"}))


def test_not_there_a_folder_a_pipe_a_device(refused, tmp_path):
    (tmp_path / "folder.pth").mkdir()
    os.mkfifo("pipe.pth")
    os.symlink("loop.pth", "loop.pth")
    os.symlink("/dev/zero", "device.pth")
    for name in ("folder.pth", "pipe.pth", "loop.pth", "device.pth"):
        refused(name, None, "no regular file")
    refused("nowhere.pth", None, "", FileNotFoundError)
    for name in ("a\0b.pth", "x" * 5000, "//[x", "nowhere.pth?matching_heuristics=True"):
        with pytest.raises((OSError, ValueError)) as caught:
            SafeCheckpointer(Model()).load(name)
        assert repr(name.partition("?")[0])[1:-1] in str(caught.value)


@pytest.mark.parametrize(
    "tag",
    [
        b"../away/model_0000009.pth",
        b"/etc/passwd",
        b"..",
        b".",
        b"",
        b"\n\n",
        b"a\0b",
        b"\xff\xfe\x80",
        b"x" * 5000,
        b"model_0000001.pth\nmodel_0000002.pth",
        b"log.txt",
        b"folder",
        b"pipe",
        b"loop",
        b"last_checkpoint",
    ],
)
def test_what_last_checkpoint_may_say(guard, state, tmp_path, tag):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "model_0000009.pth").write_bytes(saved({**state, "iteration": 9}))
    (folder / "model_0000001.pth").write_bytes(saved({**state, "iteration": 1}))
    (folder / "log.txt").write_text("a log")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    os.symlink("loop", folder / "loop")
    (folder / "last_checkpoint").write_bytes(tag)
    model = Model()
    with guard():
        rest = SafeCheckpointer(model, str(folder), trainer=Trainer(model)).resume_or_load("", resume=True)
    assert rest["iteration"] == 1


def test_what_else_may_lie_in_the_folder(guard, state, tmp_path):
    (tmp_path / "model_0000001.pth").write_bytes(saved({**state, "iteration": 1}))
    os.mkfifo(tmp_path / "model_0000005.pth")
    (tmp_path / "model_0000006.pth").mkdir()
    os.symlink("model_0000007.pth", tmp_path / "model_0000007.pth")
    (tmp_path / "model_0000008.pth.tmp").mkdir()
    (tmp_path / "model_final.pth").mkdir()
    os.symlink("last_checkpoint", tmp_path / "last_checkpoint")
    model = Model()
    checkpointer = SafeCheckpointer(model, str(tmp_path), trainer=Trainer(model))
    with guard():
        assert checkpointer.resume_or_load("", resume=True)["iteration"] == 1
    (tmp_path / "model_0000001.pth").unlink()
    with guard(), pytest.raises(ValueError, match=r"none of the checkpoints in .* can be resumed from"):
        checkpointer.resume_or_load("", resume=True)


def test_the_originals_are_accepted(files):
    for name, content in copy.copy(files):
        assert loads(write(name, content)), name


def test_as_many_cases_as_promised(fuzz):
    fuzz.assert_ran(set(NUM_CASES), 1150)
