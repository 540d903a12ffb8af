"""Configs and overrides: a config, or one error that names the file; no code, no network, no hang."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode
from mutants import JUNK, guarded, mutate_bytes, mutate_tree, run_cases

from focal_plugin import get_config, load_config
from focal_plugin.config import config_dir
from focal_plugin.config_yaml import all_keys

SHIPPED = sorted(path.relative_to(config_dir()).as_posix() for path in config_dir().rglob("*.yaml"))
CODE = b"!!python/object/apply:os.system ['touch canary']"
WORDS = [CODE, b"&a [*a, *a]", b"*a", b"<<: *a\n", b"_BASE_: mutant.yaml\n", b"_BASE_: https://localhost:1/x.yaml\n"]
WORDS += [b"[" * 200, b"{a: " * 60, b"- " * 200, b"2001-01-01", b"!!binary aGk=", b"VERSION: 1\n", b"null", b": ", b"'"]
WORDS += [b'"\\ud800"', b"|\n", b"---\n", b"\n  ", b"0x" + b"f" * 90, b"1:1:1:1:1:1:1:1:1", b"OUTPUT_DIR: ../x\n"]
LITERALS = ["(1, 2", "[" * 300, "-" * 250_000 + "1", "a" + ".b" * 90_000, "{1: 2}", "b'x'", "1j", "__import__('os')"]


def loads(path, opts=()) -> bool:
    """Return whether a config was loaded, which can then be written to a file; or there is one short error."""
    try:
        cfg = load_config(path, opts)
    except (ValueError, FileNotFoundError) as error:
        assert str(error).startswith(("override ", "--") if opts else str(path)) and len(str(error)) < 2_000
        assert "\x1b" not in str(error)
        return False
    assert isinstance(cfg.MODEL.FOCAL, CfgNode)
    yaml.safe_load(cfg.dump())
    return True


@pytest.mark.parametrize("name, num_cases", [("files", 300), ("trees", 200), ("overrides", 200)])
def test_mutants(tmp_path, name, num_cases):
    configs = shutil.copytree(config_dir(), tmp_path / "configs")  # where a mutant finds its _BASE_
    keys = all_keys(get_config("retina_focal.yaml"))

    def case(rng):
        if name == "overrides":
            key = rng.choice(keys)
            if rng.random() < 0.3:
                key = mutate_bytes(rng, key.encode(), [b".", b"..", b"__class__", b"\0"]).decode(errors="replace")
            return loads("", [key, str(rng.choice([*JUNK, *LITERALS, "1", "0.5", "True", "cpu", "('x',)"]))])
        real = configs / rng.choice(SHIPPED)
        mutant = real.parent / "mutant.yaml"
        if name == "files":
            mutant.write_bytes(mutate_bytes(rng, real.read_bytes(), WORDS))
        else:  # other values, written as json, which is YAML too
            mutant.write_text(json.dumps(mutate_tree(rng, yaml.safe_load(real.read_text()), [*LITERALS, "\x1b[2J"])))
        return loads(mutant)

    run_cases(name, num_cases, case)


@pytest.mark.parametrize(
    "content, message",
    [
        (f"SOLVER:\n  STEPS: {CODE.decode()}", r"the tag '!!python/.* \(line 2\)\. Python tags can run .*: write the"),
        ("MODEL:\n  FPN: &a {NORM: GN}\n  RESNETS: *a", r"an alias or anchor, 'a' \(line 2\)"),
        ("a: " + "{a: " * 50_000, "nested too deeply"),
        ("_BASE_: [x.yaml, [y.yaml]]", "_BASE_ must be a path"),
        ("_BASE_: [https://example.com/x.yaml]", "_BASE_ must be a path .* and is not fetched: 'https://exam"),
        ("_BASE_: [c.yaml, c.yaml]", "leads back to itself, or to more than 20 files"),
        ("MODEL: 5", r"MODEL is a group of keys, such as MODEL\."),
        ("_BASE_: twice.yaml", r"its _BASE_ 'twice\.yaml': the key 'NORM' for the second time .*\(line 4\)"),
        ("- 1", "no KEY: VALUE pairs at its top level"),
        ("#" * (1 << 20), "more than 262,144 bytes"),
        ("ON: 2", r"a key that is no name \(line 1\): ON, 3 and the like need quotes"),
        ("SOLVER: {BASE_LR: 2001-01-01}", r"Type mismatch .*SOLVER\.BASE_LR"),
        ("SOLVER: {BASE_LR: " + "1:" * 900 + "1.5}", "not valid YAML"),
        ("MODEL.DEVICE: cpu", "unknown config key 'MODEL.DEVICE': in a file it is written nested"),
        ("SOLVER: {MAX_ITER: 0x" + "f" * 9000 + "}", "4300 digits"),  # which dump() could not write
        ("SOLVER: {BASE_LR: \"'> vs. <class 'x'>) with \\e[2J key: x\"}", r"mismatch .* key: SOLVER\.BASE_LR"),
        ('"A key: \\e[2J": 1', r"unknown config key 'A key: \\x1b\[2J'"),
        ('OUTPUT_DIR: "a\\0b"', r"OUTPUT_DIR 'a\\x00b': embedded null"),
        ("VERSION: [2]", "VERSION must be 2"),
        ("OUTPUT_DIR: away/x", "leads out of the working directory"),
        ("_BASE_: out.yaml", "OUTPUT_DIR 'a/../../x': leads out of .*, to .*: give it on the command"),
        ("MODEL: {FOCAL: {STAR_BETA: 1}}", "write a float with a point"),
        ("OUTPUT_DIR: caf\xe9", "not valid YAML in UTF-8: .*character 16"),
        ("SOLVER: {MAX_ITER: 9e4}", "SOLVER.MAX_ITER .write a whole number: 90000"),
        (["MODEL.DEVICE.cu", "1"], "unknown config key 'MODEL.DEVICE.cu'"),
        (["MODEL", "{}"], r"MODEL is a group of keys, such as MODEL\."),
        (["SOLVER.MAX_ITER", "~" * 250_000 + "1"], "(nested too deeply|ype mismatch)"),
        (["DATASETS.TRAIN", "mine"], r"""'DATASETS.TRAIN mine': Type mismatch .*write a tuple: \("name",\)"""),
        (["MODEL.OHEM.BATCH_SIZE"], "be KEY VALUE pairs"),
        (["SOLVER.BASE_LR", "0.1", "--resume", "x"], "after the first KEY VALUE pair"),
    ],
)
def test_refused_by_name(tmp_path, content, message):
    """The content of a file, or overrides on the command line."""
    (tmp_path / "twice.yaml").write_text("MODEL:\n  FPN:\n    NORM: BN\n    NORM: GN")
    (tmp_path / "out.yaml").write_text("OUTPUT_DIR: a/../../x")
    (tmp_path / "away").symlink_to(tmp_path.parent)
    file, opts = ("c.yaml", []) if isinstance(content, str) else ("retina_focal.yaml", content)
    if not opts:
        (tmp_path / file).write_bytes(content.encode("latin-1"))
    start = "(override |overrides must|--resume comes)" if opts else r"c\.yaml: "
    with guarded(), pytest.raises(ValueError, match=f"^{start}.*{message}") as caught:
        load_config(file, opts)
    assert "\x1b" not in str(caught.value)
    if "leads out" in message:  # which the command line may
        assert load_config(file, ["OUTPUT_DIR", "../x"]).OUTPUT_DIR == "../x"


def test_what_is_no_file(no_files):
    for name in (name for names in no_files for name in names):
        with guarded(), pytest.raises(FileNotFoundError, match="no config file"):
            load_config(name)
        Path("c.yaml").write_text(json.dumps({"_BASE_": name}))
        with guarded(), pytest.raises(FileNotFoundError, match=r"^c\.yaml: its _BASE_ '.*: not there"):
            load_config("c.yaml")
