"""The command line of training: files, overrides, and sentences about what is wrong."""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict, FrozenConfigDict

from hfjax.training import config as configs
from hfjax.training.config import ConfigError, differences, parse, read, write

CONFIG = '''
"""Trains a thing.

In two lines.
"""
import ml_collections
from ml_collections import config_dict

def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 1
  config.name = "tiny"
  config.optimizer = ml_collections.ConfigDict(
    {"lr": 1e-6, "betas": (0.0, 0.999), "clip": True, "steps": 100}
  )
  config.rollout = {"steps": (1000, 500), "words": ("a",), "chunks": {"most": 7}, "empty": ()}
  config.teacher = config_dict.placeholder(str)
  config.untyped = None
  return config
'''


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  Path("c.py").write_text(CONFIG)


def get(*argv):
  return parse(["--config=c.py", "--workdir=w", *argv])


def test_a_file_alone():
  found = get()
  assert found == configs.Options(found.config, Path("c.py"), Path("w"), False, False, False)
  assert found.config.optimizer.lr == 1e-6 and found.config.rollout.steps == (1000, 500)
  assert found.config.teacher is None and found.config.untyped is None
  with pytest.raises(AttributeError):
    found.config.seed = 2
  with pytest.raises(AttributeError):
    found.config.optimizer.rate = 2
  found = parse(["--dry_run", "--config", "c.py", "--quiet", "--workdir", "~/x", "--debug"])
  assert found.dry_run and found.quiet and found.debug
  assert found.workdir == Path("~/x").expanduser()


@pytest.mark.parametrize(
  ("argv", "key", "value"),
  [
    (["--config.seed=5"], "seed", 5),
    (["--config.seed", "-5"], "seed", -5),
    (["-config.seed=5"], "seed", 5),
    (["--config.seed=4", "--config.seed=5"], "seed", 5),
    (["--config.optimizer.lr=2"], "optimizer.lr", 2.0),
    (["--config.optimizer.lr=2e-3"], "optimizer.lr", 2e-3),
    (["--config.optimizer.clip=false"], "optimizer.clip", False),
    (["--noconfig.optimizer.clip"], "optimizer.clip", False),
    (["--config.optimizer.clip"], "optimizer.clip", True),
    (["--config.optimizer.betas=(0,0.5)"], "optimizer.betas", (0.0, 0.5)),
    (["--config.rollout.steps=1000,750,500"], "rollout.steps", (1000, 750, 500)),
    (["--config.rollout.steps", "(1000, 250)"], "rollout.steps", (1000, 250)),
    (["--config.rollout.steps=7"], "rollout.steps", (7,)),
    (["--config.rollout.words=b"], "rollout.words", ("b",)),
    (["--config.rollout.empty=1,2"], "rollout.empty", (1, 2)),
    (["--config.rollout.chunks.most=3"], "rollout.chunks.most", 3),
    (["--config.name=5"], "name", "5"),
    (["--config.name="], "name", ""),
    (["--config.name=a=b c"], "name", "a=b c"),
    (["--config.teacher=dir"], "teacher", "dir"),
  ],
)
def test_overrides_have_the_type_of_the_default(argv, key, value):
  changed = get(*argv)
  found = configs.leaves(changed.config)[key]
  assert found == value and type(found) is type(value)
  if isinstance(value, tuple):
    assert [type(x) for x in found] == [type(x) for x in value]
  assert differences(get().config, changed.config) in ([key], [])  # of this call alone
  # Before the file, too.
  assert parse([*argv, "--workdir=w", "--config=c.py"]).config == changed.config


@pytest.mark.parametrize(
  ("argv", "sentence"),
  [
    (["--config.lr=1"], "--config.lr is no value of c.py; --config.optimizer.lr is one"),
    (["--config.optimizer.stesp=1"], "--config.optimizer.steps is one"),
    (["--config.optimiser.lr=1"], "--config.optimizer.lr is one"),
    (["--config.rollout.clip=1"], "--config.optimizer.clip is one"),
    (["--config.mots=1"], "--config.rollout.chunks.most is one"),
    (["--config.rollout.steps[0]=1"], "--config.rollout.steps is one"),
    (["--config.xyzzy=1"], "--config.xyzzy is no value of c.py; --help lists all"),
    (["--config.optimizer={}"], "is a group of values; set one of them, such as"),
    (
      ["--config.seed=0.5"],
      "=0.5 does not fit; give a value like its default, 1 (int",
    ),
    (["--config.seed=true"], "--config.seed=true does not fit"),
    (["--config.seed="], "--config.seed= does not fit"),
    (["--config.seed"], "Missing value for flag --config.seed"),
    (["--config.optimizer.lr=fast"], "=fast does not fit; give a value like its default, 1e-06"),
    (["--config.optimizer.lr=nan"], "--config.optimizer.lr=nan is no number"),
    (["--config.optimizer.clip=2"], "=2 does not fit; give a value like its default, True (bool"),
    (["--config.optimizer.clip", "false"], "'false' is no flag; write --name=value"),
    (["--config.rollout.steps=1000,0.5"], "=(1000,0.5) does not fit; give values like those"),
    (["--config.rollout.steps=a,b"], "does not fit"),
    (["--config.rollout.steps=(1,"], "--config.rollout.steps"),
    (["--config.untyped=1"], "--config.untyped cannot be set here"),
    (["--noconfig.seed"], "--noconfig.seed is no flag"),
    (["--wrokdir=x"], "--wrokdir is no flag; --workdir is one"),
    (["--resume"], "--resume is no flag; --help"),
    (["--dry_run=maybe"], "dry_run"),
    (["c.py"], "'c.py' is no flag"),
    (["--flagfile=none"], "none"),
    (["--workdir="], "--workdir=DIR is missing"),
  ],
)
def test_what_cannot_be_followed(argv, sentence):
  with pytest.raises(ConfigError) as e:
    get(*argv)
  assert sentence in str(e.value)
  assert str(e.value).endswith(".") and "\n" not in str(e.value)
  assert get().config.seed == 1  # the next call is not the worse for it


def test_what_is_missing():
  for argv, sentence in (
    ([], "--config=FILE is missing"),
    (["--workdir=w", "--config"], "--config=FILE is missing"),
    (["--config=c.py"], "--workdir=DIR is missing"),
    (["--config=d.py", "--workdir=w"], "d.py is not there"),
    (["--config=.", "--workdir=w"], ". is not there"),
  ):
    with pytest.raises(ConfigError, match=sentence):
      parse(argv)


@pytest.mark.parametrize(
  ("text", "sentence"),
  [
    ("x = 1", "c.py has no function get_config()"),
    ("get_config = 1", "c.py has no function get_config()"),
    ("\ndef get_config(:", "c.py, line 2, is no Python"),
    ("a: [1", "c.py, line 1, is no Python"),
    ("\n\nimport nothing_of_the_kind", "ModuleNotFoundError, line 3: No module named"),
    ("def get_config():\n  return 1 / 0", "ZeroDivisionError, line 2: division by zero."),
    ("def get_config():\n  raise SystemExit", "gives no config: SystemExit, line 2."),
    ("def get_config(x): pass", "gives no config: TypeError"),
    ("def get_config(): pass", "returned None; it must return an ml_collections.ConfigDict"),
    ("def get_config(): return {}", "returned dict"),
    ("\0", "c.py"),
    (
      "import ml_collections as m\ndef get_config():\n  c = m.ConfigDict({}).lock()\n  c.b = 2",
      "line 4: ",
    ),
    (
      "import ml_collections as m\ndef get_config(): return m.ConfigDict({'a': {'b': len}})",
      "a.b is builtin_function_or_method; use numbers",
    ),
    (
      "import ml_collections as m\ndef get_config(): return m.ConfigDict({'a': "
      "m.config_dict.required_placeholder(int)})",
      "c.py cannot be used: a has no value; give it one",
    ),
  ],
)
def test_files_that_give_no_config(text, sentence):
  Path("c.py").write_text(text)
  with pytest.raises(ConfigError) as e:
    get()
  assert sentence in str(e.value) and "c.py" in str(e.value) and "\n" not in str(e.value)


def test_files_are_read_anew_and_leave_nothing_behind():
  modules = set(sys.modules)
  assert get().config.seed == 1
  Path("c.py").write_text(CONFIG.replace("seed = 1", "seed = 2"))
  assert get().config.seed == 2
  assert sorted(os.listdir()) == ["c.py"] and not {"hfjax_config", "c"} & (
    set(sys.modules) - modules
  )
  frozen = "import ml_collections as m\ndef get_config(): return m.FrozenConfigDict({'seed': 1})"
  Path("c.py").write_text(frozen)
  assert get("--config.seed=3").config.seed == 3


def test_help(capsys):
  for argv, parts, absent in (
    (["--help"], ["About.", "--workdir=DIR", "With --config=FILE"], "Values"),
    (
      ["-h", "--config=c.py"],
      ["About.", "Trains a thing.", "Values of c.py", "--config.optimizer.lr=1e-06\n",
       "--config.rollout.steps=(1000,500)\n", "--config.name=tiny\n"],
      "With --config",
    ),
    (["--config=d.py", "--help"], ["--workdir=DIR", "d.py is not there"], "Values"),
  ):  # fmt: skip
    with pytest.raises(SystemExit) as e:
      parse(argv, "About.")
    out = capsys.readouterr().out
    assert e.value.code == 0 and all(p in out for p in parts) and absent not in out


@given(
  st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
    | st.lists(st.integers(0, 9), max_size=3).map(tuple),
    lambda x: st.dictionaries(st.sampled_from("abcd"), x, min_size=1, max_size=3),
    max_leaves=8,
  )
)  # fmt: skip
def test_what_is_written_is_read(tree):
  config = FrozenConfigDict({"x": tree})
  write(config, Path("config.json"))
  found = read(Path("config.json"))
  assert found == config and found.to_dict() == config.to_dict()
  assert differences(found, config) == [] and differences(found, {"x": tree}) == []
  assert differences(found, {"y": tree}) == sorted(
    [*configs.leaves({"x": tree}), *configs.leaves({"y": tree})]
  )


def test_differences_are_dotted_keys():
  a = ConfigDict({"a": 1, "b": {"c": (1, 2), "d": 0.5, "e": None}, "same": {"x": 1}, "f": {"g": 1}})
  b = ConfigDict({"a": 1, "b": {"c": (1, 3), "d": 0.5, "h": 1}, "same": {"x": 1}, "f": 1})
  assert differences(a, b) == differences(b, a) == ["b.c", "b.e", "b.h", "f", "f.g"]
  assert differences({"a": [1, 2]}, {"a": (1, 2)}) == []


def test_a_file_that_cannot_be_written_or_read(tmp_path):
  path = tmp_path / "config.json"
  write({"a": 1}, path)
  for text in ("", "{", "[1]", '{"a": '):
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config.json cannot be read \("):
      read(path)
  with pytest.raises(ConfigError, match="No such file"):
    read(tmp_path / "none.json")
  with pytest.raises(ConfigError, match=r"config.json cannot be written \("):
    write({"a": 1}, tmp_path / "none" / "config.json")
  write({"a": 1}, path)
  before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))  # as if the disk were full
  try:
    with pytest.raises(ConfigError, match=r"config.json cannot be written \(File too large\)"):
      write({"a": 2, "b": "long" * 9}, path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)
  with pytest.raises(ConfigError, match="b is ndarray"):
    write({"a": 2, "b": np.zeros(2)}, path)
  assert json.loads(path.read_text()) == {"a": 1}  # as it was
  assert sorted(os.listdir(tmp_path)) == ["c.py", "config.json"]
