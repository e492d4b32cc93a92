"""The command line of training, its config files, and their record as JSON.

A config file is Python: `get_config()` in it returns an ml_collections.ConfigDict. Any value can be
overridden by --config.KEY=VALUE and keeps its type.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import os
import re
import runpy
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict, config_dict
from ml_collections.config_flags import config_flags

_USAGE = """\
Usage: python -m hfjax.train --config=FILE --workdir=DIR [--config.KEY=VALUE ...]

  --config=FILE        Python file whose get_config() returns the configuration
  --config.KEY=VALUE   sets one of its values, such as --config.optimizer.rate=1e-6
  --workdir=DIR        folder of checkpoints and metrics; a run that was stopped goes on there
  --dry_run            compiles the updates, tells parameters and memory, and trains nothing
  --quiet              shows no progress
  --debug              shows where an error came from
"""
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")
_Tree = ConfigDict | Mapping


class ConfigError(ValueError):
  """A command or config that cannot be followed; its text is a sentence."""


@dataclasses.dataclass(frozen=True)
class Options:
  """What the command line asks for.

  config: with overrides; nothing in it can be changed, lists are tuples. debug: whether errors
  come with their traceback.
  """

  config: FrozenConfigDict
  config_file: Path
  workdir: Path
  dry_run: bool
  quiet: bool
  debug: bool


def parse(argv: Sequence[str], about: str = "") -> Options:
  """Reads the command line, without the program's name, and the config file that it names.

  --help prints `about`, flags and the config's values, and raises SystemExit(0).
  Raises ConfigError; where it came from is its __cause__, which --debug in `argv` asks to show.
  """
  name, rest = _take_config(argv)
  if {"-h", "--help"} & set(rest):
    print("\n\n".join(x.strip() for x in (about, _USAGE, _describe(name)) if x.strip()))
    raise SystemExit(0)
  if not name:
    raise ConfigError("--config=FILE is missing; give a config file, and --workdir=DIR.")
  file = Path(name).expanduser()
  config, _ = _load(file)
  before = leaves(config)
  overrides = [m[1] for x in rest if (m := _OVERRIDE.match(x))]
  for key in overrides:
    _check_key(key, before, file)
  values = _flags(config, rest, before)
  for key in overrides:
    _check_value(key, before, config)
  if not values.workdir:
    raise ConfigError("--workdir=DIR is missing; give a folder for checkpoints and metrics.")
  plain = _plain(config)
  return Options(
    FrozenConfigDict(plain), file, Path(values.workdir).expanduser(), values.dry_run,
    values.quiet, values.debug,
  )  # fmt: skip


def write(config: _Tree, path: Path):
  """Writes a config as JSON; all of the file, or nothing. ConfigError if that fails."""
  part = path.with_name(f".{path.name}.{os.getpid()}.part")
  text = json.dumps(_plain(config), indent=2) + "\n"
  try:
    with part.open("w", encoding="utf-8") as f:
      f.write(text)
      f.flush()
      os.fsync(f.fileno())
    part.replace(path)
  except OSError as e:
    raise ConfigError(
      f"{path} cannot be written ({e.strerror}); free space, or give another --workdir."
    ) from e
  finally:
    with contextlib.suppress(OSError):
      part.unlink(missing_ok=True)


def read(path: Path) -> FrozenConfigDict:
  """What `write` was given; ConfigError if the file holds no config."""
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
      raise ValueError("it holds no object")
    return FrozenConfigDict(_plain(found))
  except (OSError, ValueError, RecursionError) as e:
    why = getattr(e, "strerror", None) or e
    raise ConfigError(f"{path} cannot be read ({why}); it is damaged or no config.") from e


def differences(old: _Tree, new: _Tree) -> list[str]:
  """Dotted keys that only one of two configs has, or whose values differ, sorted."""
  a, b, none = leaves(_plain(old)), leaves(_plain(new)), object()
  return sorted(k for k in a.keys() | b.keys() if a.get(k, none) != b.get(k, none))


def leaves(config: _Tree) -> dict[str, Any]:
  """Values by dotted keys, in the config's order; a group without keys is a value."""
  found: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, _Tree) and len(value):
      found |= {f"{key}.{k}": v for k, v in leaves(value).items()}
    else:
      found[str(key)] = value
  return found


def _take_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
  """The value of --config, and all other arguments."""
  name, rest, words = None, [], iter(argv)
  for word in words:
    if word in ("--config", "-config"):
      name = next(words, None)
    elif word.startswith(("--config=", "-config=")):
      name = word.split("=", 1)[1]
    else:
      rest.append(word)
  return name, rest


def _load(path: Path) -> tuple[ConfigDict, str]:
  """The config of a file, and what its docstring says."""
  if not path.is_file():
    raise ConfigError(f"{path} is not there; give a config file, such as one of configs/.")
  try:
    names = runpy.run_path(str(path), run_name="hfjax_config")
    if not callable(names.get("get_config")):
      raise ConfigError(f"{path} has no function get_config(); it returns the config.")
    config = names["get_config"]()
  except ConfigError:
    raise
  except SyntaxError as e:
    raise ConfigError(f"{e.filename or path}, line {e.lineno}, is no Python: {e.msg}.") from e
  except (Exception, SystemExit) as e:
    at = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == str(path)]
    line = f", line {at[-1]}" if at else ""
    said = " ".join(str(e).split())
    raise ConfigError(
      f"{path} gives no config: {type(e).__name__}{line}{f': {said}' if said else ''}."
    ) from e
  if not isinstance(config, ConfigDict):
    raise ConfigError(
      f"get_config() of {path} returned {_kind(config)}; it must return an "
      "ml_collections.ConfigDict."
    )
  try:
    config = ConfigDict(config.to_dict()) if isinstance(config, FrozenConfigDict) else config
    _plain(config)
  except ValueError as e:
    raise ConfigError(f"The config of {path} cannot be used: {e}") from e
  return config, (names.get("__doc__") or "").strip()


def _describe(name: str | None) -> str:
  """What --help says of a config file."""
  if not name:
    return "With --config=FILE, --help lists its values too."
  try:
    config, about = _load(Path(name).expanduser())
  except ConfigError as e:
    return str(e)
  lines = [f"  --config.{key}={_shown(value)}" for key, value in leaves(config).items()]
  return "\n".join([*([about, ""] if about else []), f"Values of {name}:", "", *lines])


def _check_key(key: str, known: Mapping[str, Any], file: Path):
  if key in known:
    return
  if group := [k for k in known if k.startswith(f"{key}.")]:
    raise ConfigError(
      f"--config.{key} is a group of values; set one of them, such as --config.{group[0]}."
    )
  last = lambda k: k.rsplit(".", 1)[-1]
  near = [k for k in known if last(k) == last(key)]
  near += difflib.get_close_matches(key, known, 1)
  alike = difflib.get_close_matches(last(key), [last(k) for k in known], 1)
  near += [k for k in known if last(k) in alike]
  hint = f"--config.{near[0]} is one. " if near else ""
  raise ConfigError(f"--config.{key} is no value of {file}; {hint}--help lists all.")


def _flags(config: ConfigDict, rest: list[str], before: Mapping[str, Any]) -> Any:
  """Values of the other flags; overrides go into `config`."""
  values = flags.FlagValues()  # of this call alone, so that calls do not see each other's overrides
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    for switch in ("dry_run", "quiet", "debug"):
      flags.DEFINE_bool(switch, False, "", flag_values=values)
    left = values(["train", *rest])[1:]
  except flags.UnrecognizedFlagError as e:
    near = difflib.get_close_matches(e.flagname, ["workdir", "dry_run", "quiet", "debug"], 1)
    hint = f"--{near[0]} is one. " if near else ""
    raise ConfigError(f"--{e.flagname} is no flag; {hint}--help lists all.") from e
  except config_flags.UnsupportedOperationError as e:
    keys = [k for k in before if before[k] is None or isinstance(before[k], (list, _Tree))]
    keys = [k for k in keys if any(k == m[1] for x in rest if (m := _OVERRIDE.match(x)))]
    raise ConfigError(
      f"--config.{keys[0] if keys else 'KEY'} cannot be set here, as the type of its default is "
      "not known; set it in the config file."
    ) from e
  except (flags.Error, ValueError, TypeError) as e:
    raise ConfigError(_unfit(str(e), before)) from e
  if left:
    raise ConfigError(f"{left[0]!r} is no flag; write --name=value.")
  return values


def _unfit(said: str, before: Mapping[str, Any]) -> str:
  """A sentence for a value of another type, from what absl says."""
  found = re.match(r"flag --config\.(.+?)=(.*?): ", said, re.DOTALL)
  if found and found[1] in before:
    default = before[found[1]]
    return (
      f"--config.{found[1]}={found[2]} does not fit; give a value like its default, "
      f"{_shown(default)} ({_kind(default)})."
    )
  return f"{' '.join(said.split()).rstrip('.')}."


def _check_value(key: str, before: Mapping[str, Any], config: ConfigDict):
  """ConfigError unless an overridden value, or each of a tuple, is what its default is."""
  *groups, last = key.split(".")
  holder = config
  for group in groups:
    holder = holder[group]
  value, default = holder[last], before[key]
  if isinstance(value, float) and math.isnan(value):
    raise ConfigError(f"--config.{key}={value} is no number; give one.")
  if not isinstance(value, tuple) or not default:
    return
  kinds = {type(x) for x in default}
  if kinds == {float}:  # whole numbers will do
    value = tuple(float(x) if type(x) is int else x for x in value)
    holder[last] = value
  if not {type(x) for x in value} <= kinds:
    raise ConfigError(
      f"--config.{key}={_shown(value)} does not fit; give values like those of its default, "
      f"{_shown(default)} ({', '.join(sorted(k.__name__ for k in kinds))})."
    )


def _plain(value: Any, key: str = "") -> Any:
  """A config as dicts, tuples and what JSON knows besides; ConfigError names what is not."""
  if isinstance(value, _Tree):
    found = {}
    for k in value:
      if not isinstance(k, str):
        raise ConfigError(f"{key or 'the config'} has the key {k!r}, which is no name.")
      path = f"{key}.{k}" if key else k
      try:
        found[k] = _plain(value[k], path)
      except config_dict.RequiredValueError as e:
        raise ConfigError(f"{path} has no value; give it one in the config file.") from e
    return found
  if isinstance(value, (list, tuple)):
    return tuple(_plain(x, key) for x in value)
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  raise ConfigError(f"{key} is {_kind(value)}; use numbers, words, tuples of them, or None.")


def _kind(value: Any) -> str:
  return "None" if value is None else f"{type(value).__name__}"


def _shown(value: Any) -> str:
  return value if isinstance(value, str) else str(value).replace(", ", ",")
