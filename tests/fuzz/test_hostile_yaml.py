"""Configs and overrides: a config or one error that names the file, whatever the file holds; no code, no network."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import yaml
from detectron2.config import CfgNode

from focal_plugin import get_config, load_config, yaml_safety
from focal_plugin.config import config_dir

SHIPPED = sorted(path.relative_to(config_dir()).as_posix() for path in config_dir().rglob("*.yaml"))
NUM_CASES = {"files": 450, "trees": 250, "overrides": 250}
WORDS = [
    b"!!python/object/apply:os.system ['touch canary']",
    b"!!python/name:os.system",
    b"&a [*a, *a]",
    b"&a ",
    b"*a",
    b"<<: *a\n",
    b"_BASE_: mutant.yaml\n",
    b"_BASE_: [Base-FocalRetinaNet.yaml, 3]\n",
    b"_BASE_: https://localhost:1/x.yaml\n",
    b"\n  ",
    b": ",
    b"[" * 200,
    b"{a: " * 60,
    b"- " * 200,
    b"2001-01-01",
    b"!!binary aGk=",
    b"!!set {a}",
    b"VERSION: 1\n",
    b"OUTPUT_DIR: ../../x\n",
    b"'",
    b'"\\ud800"',
    b"|\n",
    b"---\n",
    b"%YAML 1.1\n",
    b"null",
    b"0x" + b"f" * 90,
    b"1:1:1:1:1:1:1:1:1",
]


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """A copy of the configs, where a mutant finds its _BASE_."""
    return shutil.copytree(config_dir(), tmp_path_factory.mktemp("yaml") / "configs")


@pytest.fixture
def refused(tmp_path, guard, monkeypatch):
    """refused(text or bytes, message): c.yaml with this content is, and the message names it; returns the message."""
    monkeypatch.chdir(tmp_path)

    def check(content, message, error=ValueError, opts=()):
        (tmp_path / "c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        with guard(), pytest.raises(error, match=r"c\.yaml: ") as caught:
            load_config("c.yaml", opts)
        assert caught.match(message)
        assert not (tmp_path / "canary").exists()

    return check


def loads(path, opts=()) -> bool:
    """Property: a config that can be written to a file again, or one error that names what is wrong."""
    try:
        cfg = load_config(path, opts)
    except (ValueError, FileNotFoundError) as error:
        assert "mutant.yaml" in str(error) or str(error).startswith("override ")
        assert len(str(error)) < 30_000
        return False
    assert isinstance(cfg, CfgNode) and isinstance(cfg.MODEL.FOCAL, CfgNode)
    yaml.safe_load(cfg.dump())
    return True


# ------------------------------ mutants


def test_mutants_of_the_configs(fuzz, mutate, configs, monkeypatch):
    monkeypatch.chdir(configs.parent)

    def case(rng):
        real = configs / rng.choice(SHIPPED)
        mutant = real.parent / "mutant.yaml"
        mutant.write_bytes(mutate.bytes(rng, real.read_bytes(), WORDS))
        accepted = loads(mutant)
        mutant.unlink()
        return accepted

    fuzz.run("files", NUM_CASES["files"], case)
    assert not list(configs.rglob("canary"))


def test_configs_with_other_values(fuzz, mutate, configs, monkeypatch):
    monkeypatch.chdir(configs.parent)

    def case(rng):
        real = configs / rng.choice(SHIPPED)
        tree = mutate.tree(
            rng, yaml.safe_load(real.read_text()), ["(1, 2", "[" * 300, "-" * 5000 + "1", "a" + ".b" * 4000]
        )
        mutant = real.parent / "mutant.yaml"
        # Mostly json, which is YAML, too, and can have a key twice.
        mutant.write_text(json.dumps(tree) if rng.random() < 0.8 else yaml.dump(tree))
        accepted = loads(mutant)
        mutant.unlink()
        return accepted

    fuzz.run("trees", NUM_CASES["trees"], case)


def test_overrides(fuzz, mutate, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    keys = list(flat(get_config("retina_focal.yaml")))
    junk = [
        "(1, 2)",
        "[" * 300,
        "-" * 5000 + "1",
        "a" + ".b" * 4000,
        "1" + "+1" * 4000,
        "{1: 2}",
        "b'x'",
        "1j",
        "__import__('os')",
    ]

    def case(rng):
        key = rng.choice(keys)
        if rng.random() < 0.3:
            key = mutate.bytes(rng, key.encode(), [b".", b"..", b"__class__", b"\0"]).decode(errors="replace")
        value = str(mutate.junk(rng, [*junk, "1", "0.5", "True", "cpu", "('x',)"]))
        try:
            cfg = load_config("", [key, value])
        except ValueError as error:
            assert str(error).startswith(("override ", "--")) and len(str(error)) < 15_000
            return False
        yaml.safe_load(cfg.dump())
        return True

    fuzz.run("overrides", NUM_CASES["overrides"], case)


def flat(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key


# ------------------------------ one by one


@pytest.mark.parametrize(
    "tag",
    ["object/apply:os.system ['touch canary']", "name:os.system", "module:os", "tuple [1]", "object/new:os.system [x]"],
)
def test_python_tags(refused, tag):
    refused(f"SOLVER:\n  STEPS: !!python/{tag}", r"line 2\)\. Python tags can run any code and are refused")


def test_billion_laughs(refused):
    lists = "".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9)}]\n" for i in range(1, 30))
    refused("k0: &k0 [lol]\n" + lists, "more than 20,000 keys and values")
    merges = "".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}\n" for i in range(1, 40))
    refused("m0: &m0 {a: 1}\n" + merges, "more than 20,000 keys and values")


def test_nesting(refused):
    for text in ("[" * 50_000, "a: " + "{a: " * 50_000, "- " * 50_000, "? " * 50_000):
        refused(text, "nested more than 50 deep")
    chain = "".join(f"k{i}: &k{i} [*k{i - 1}]\n" for i in range(1, 3000))
    refused("k0: &k0 [x]\n" + chain, "nested more than 50 deep")
    refused("MODEL: &a [*a]", "an alias inside of what it stands for .line 1")
    refused("MODEL: &a {FPN: *a}", "an alias inside of what it stands for")


@pytest.mark.parametrize(
    "bomb", ["~" * 9000 + "1", "a" + ".b" * 4900, "1" + "+1" * 4900, "(" * 9000, "f" + "()" * 4000, "not " * 2000 + "1"]
)
def test_values_that_no_parser_should_get(refused, guard, bomb):
    """yacs parses each text as a Python literal; what is too deep for that is refused, or left as the text it is."""
    opts = ["MODEL.WEIGHTS", bomb]
    for load in (lambda: load_config("c.yaml"), lambda: load_config("", opts)):
        with open("c.yaml", "w") as file:
            file.write(f"MODEL:\n  WEIGHTS: '{bomb}'")
        try:
            with guard():
                assert bomb == load().MODEL.WEIGHTS
        except ValueError as error:
            assert "nested too deeply" in str(error)
            assert "c.yaml: " in str(error) or "override MODEL.WEIGHTS" in str(error)


@pytest.mark.parametrize(
    "content, message",
    [
        ("_BASE_: 3", "_BASE_ must be a path"),
        ("_BASE_: {a: b}", "_BASE_ must be a path"),
        ("_BASE_: ~", "_BASE_ must be a path"),
        ("_BASE_: ''", "_BASE_ must be a path"),
        ("_BASE_: [x.yaml, [y.yaml]]", "_BASE_ must be a path"),
        ("_BASE_: https://example.com/x.yaml", "would be fetched over the network"),
        ("_BASE_: [detectron2://x.yaml]", "would be fetched over the network"),
        ("_BASE_: c.yaml", "_BASE_ leads back to itself"),
        ("_BASE_: ./../{here}/c.yaml", "_BASE_ leads back to itself"),
        ("- 1", "no KEY: VALUE pairs at its top level"),
        ("5", "no KEY: VALUE pairs at its top level"),
        ("", "it is empty"),
        ("# only a comment", "it is empty"),
        (b"\xff\xfeM\0", "not UTF-8 text"),
        ("MODEL: {}\n\0", "a NUL in line 2"),
        ('MODEL:\n  WEIGHTS: "a\\0b"', r"a NUL character in a value \(line 2\)"),
        ('MODEL: {WEIGHTS: "\\ud800"}', "half of a surrogate pair"),
        ("#" * (1 << 25), "more than 262,144 bytes"),
        ("MODEL:\n  FPN:\n    NORM: BN\n    NORM: GN", r"the key 'NORM' for the second time in its mapping \(line 4\)"),
        ("SOLVER: {}\nSOLVER: {}", r"the key 'SOLVER' for the second time .*line 2"),
        ("1: 2", "'1' as a key .line 1.: keys are names"),
        ("ON: 2", "'ON' as a key"),
        ("? [a]\n: 2", "a list or a mapping as a key"),
        ("SOLVER:\n  BASE_LR: 2001-01-01", r"!!timestamp' \(line 2\).*such as a date"),
        ("SOLVER: {BASE_LR: !!timestamp x}", "!!timestamp"),
        ("SOLVER: {BASE_LR: !!binary aGk=}", "!!binary"),
        ("SOLVER: {BASE_LR: !!set {a}}", "!!set"),
        ("SOLVER: {BASE_LR: !<tag:x,2000:y> 1}", "'tag:x,2000:y'"),
        ("SOLVER: {AMP: {ENABLED: !!bool maybe}}", "'maybe' is no bool"),
        ("SOLVER: {BASE_LR: !!float many}", "'many' is no float"),
        ("SOLVER: {BASE_LR: !!int [1]}", "'!!int'"),
        ("SOLVER: {MAX_ITER: " + "9" * 5000 + "}", "a number of 5,000 digits"),
        ("SOLVER: {MAX_ITER: " + ":".join(["1"] * 9000) + "}", "a number of .* digits|a value of"),
        ("SOLVER: {MAX_ITER: 99999999999999999999}", "SOLVER.MAX_ITER: a number that does not fit into 64 bits"),
        ("SOLVER: {MAX_ITER: '0x" + "f" * 9000 + "'}", "does not fit into 64 bits"),
        ("MODEL: 5", "MODEL is a group of keys, such as MODEL\\."),
        ("MODEL: {FPN: null}", "MODEL.FPN is a group of keys"),
        ("MODEL: {WEIGHTS: {a: b}}", "ype mismatch|group|not a valid type"),
        ("MODEL.DEVICE: cpu", "unknown config key 'MODEL.DEVICE': in a file it is written nested"),
        ("__class__: x", "unknown config key __class__"),
        ("VERSION: x", "VERSION must be 2"),
        ("VERSION: -3", "VERSION must be 2"),
        ("VERSION: [2]", "VERSION must be 2"),
        ("OUTPUT_DIR: null", "OUTPUT_DIR must be a path"),
        ("OUTPUT_DIR: [a]", "ype mismatch"),
        ("a: *nowhere", "not valid YAML"),
        ("a: <<", "not valid YAML"),
        ("<<: 5", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: \x07", "not valid YAML"),
    ],
)
def test_refused_by_name(refused, tmp_path, content, message):
    if isinstance(content, str):
        content = content.replace("{here}", tmp_path.name)
    refused(content, message)


def test_bases_that_multiply(refused, tmp_path):
    """Each of 40 files names the next one twice: 2^40 files to read."""
    for i in range(40):
        (tmp_path / f"b{i}.yaml").write_text(f"_BASE_: [b{i + 1}.yaml, b{i + 1}.yaml]")
    refused("_BASE_: b0.yaml", "makes it read more than 20 files")


def test_the_fault_of_a_base_is_found_in_it(refused, tmp_path):
    (tmp_path / "base.yaml").write_text("MODEL: {}\nMODEL: {}")
    refused("_BASE_: base.yaml", r"its _BASE_ base\.yaml: the key 'MODEL' .*line 2")
    (tmp_path / "base.yaml").write_text("MODEL: 5")
    refused("_BASE_: base.yaml", r"its _BASE_ base\.yaml: MODEL is a group of keys")


def test_a_base_that_is_no_file(refused, tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    os.symlink("loop.yaml", tmp_path / "loop.yaml")
    for name in ("pipe.yaml", "folder.yaml", "loop.yaml", "/dev/zero"):
        refused(f"_BASE_: {name}", "is no regular file", FileNotFoundError)
    refused(f"_BASE_: {'x' * 5000}.yaml", "is not there", FileNotFoundError)


def test_a_config_that_is_no_file(tmp_path, guard):
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in (tmp_path / "pipe.yaml", tmp_path, "/dev/zero", "x" * 5000, "a\0b"):
        for load in (load_config, get_config):
            with guard(), pytest.raises(FileNotFoundError, match="no config file"):
                load(str(name))


@pytest.mark.parametrize(
    "opts, message",
    [
        (["", "1"], "unknown config key"),
        (["MODEL.", "1"], "unknown config key MODEL\\."),
        (["MODEL..DEVICE", "1"], "unknown config key MODEL\\.\\.DEVICE"),
        (["__class__", "1"], "unknown config key __class__"),
        (["MODEL.DEVICE.cu", "1"], "unknown config key MODEL.DEVICE.cu"),
        (["MODEL.BACKBONE.FREEZE_AT.x", "1"], "unknown config key"),
        (["MODEL", "5"], "it is a group of keys, such as MODEL\\."),
        (["MODEL", "{}"], "it is a group of keys"),
        (["MODEL", {}], "it is a group of keys"),
        (["_BASE_", "x.yaml"], "can only be used in files"),
        ([3, "1"], "3 is no key"),
        (["SOLVER.BASE_LR", None], None),
        (["SOLVER.BASE_LR", "2001-01-01"], "ype mismatch"),
        (["SOLVER.MAX_ITER", "{1, 2}"], "ype mismatch"),
        (["SOLVER.MAX_ITER", "b'1'"], "ype mismatch"),
        (["SOLVER.MAX_ITER", "9" * 30], "does not fit into 64 bits"),
        (["MODEL.WEIGHTS", "x" * 20_000], "a value of 20,000 characters"),
        (["MODEL.WEIGHTS", "a\0b"], "a NUL character"),
        (["MODEL.WEIGHTS", "__import__('os').system('touch canary')"], None),
    ],
)
def test_overrides_one_by_one(guard, tmp_path, monkeypatch, opts, message):
    monkeypatch.chdir(tmp_path)
    with guard():
        if message is None:  # the type is right: nothing to say, and nothing to run
            load_config("", opts)
        else:
            with pytest.raises(ValueError, match=f"^override .*{message}"):
                load_config("", opts)
    assert not list(tmp_path.iterdir())


# ------------------------------ where the output goes


def test_output_dir_of_a_file_stays_in_the_working_directory(refused, tmp_path):
    (tmp_path / "away").symlink_to(tmp_path.parent)
    (tmp_path / "inside").symlink_to(tmp_path / "out")
    for folder in ("..", "../x", "a/../../x", "away", "away/x", "away/../x", f"inside/../../{tmp_path.name}x"):
        refused(f"OUTPUT_DIR: {folder}", "leads out of the working directory, .*give OUTPUT_DIR on the command line")
        assert folder == load_config("c.yaml", ["OUTPUT_DIR", folder]).OUTPUT_DIR
        assert load_config("c.yaml", ["OUTPUT_DIR", "out"]).OUTPUT_DIR == "out"
        refused(f"OUTPUT_DIR: {folder}", "leads out", opts=["SOLVER.MAX_ITER", "3"])
    for folder in ("out", "./out/../b", "inside/x", "..out", str(tmp_path.parent / "x"), f"../{tmp_path.name}/x"):
        (tmp_path / "c.yaml").write_text(f"OUTPUT_DIR: {folder}")
        assert folder == load_config("c.yaml").OUTPUT_DIR


def test_output_dir_of_a_base(refused, tmp_path):
    (tmp_path / "base.yaml").write_text("OUTPUT_DIR: ../x")
    refused("_BASE_: base.yaml", "leads out of the working directory")


# ------------------------------ what is still accepted


@pytest.mark.parametrize("name", SHIPPED)
def test_no_shipped_config_is_refused(name):
    assert [file.path for file in yaml_safety.read_config_files(str(config_dir() / name))][-1].endswith(name)
    get_config(name)


def test_anchors_merges_and_lists_of_bases_still_work(tmp_path):
    (tmp_path / "one.yaml").write_text("SOLVER: {MAX_ITER: 7, BASE_LR: 0.5}")
    (tmp_path / "two.yaml").write_text("SOLVER: {BASE_LR: 0.25}")
    text = "_BASE_: [one.yaml, two.yaml]\nMODEL:\n  FPN: &norm {NORM: GN}\n  RESNETS: {<<: *norm, DEPTH: 18}\nTEST: {}"
    (tmp_path / "c.yaml").write_text(text)
    cfg = load_config(tmp_path / "c.yaml")
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (7, 0.25)
    assert cfg.MODEL.RESNETS.NORM == "GN" and cfg.MODEL.RESNETS.DEPTH == 18


def test_as_many_cases_as_promised(fuzz):
    fuzz.assert_ran(set(NUM_CASES), 950)
