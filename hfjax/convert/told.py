"""What a published config.json tells of an architecture."""

import re
from collections.abc import Mapping
from typing import Any

# By our field: what each of the keys that tell it says. Some tools keep keys of two conventions, of
# which only one is right, so that the tensors decide between them.
Told = dict[str, dict[str, Any]]


def is_of(cfg: Mapping[str, Any], fields: Mapping[str, str], names: str) -> bool:
  """Whether a configuration is a model's: by its class or type, or as it tells two fields or more.

  names: a pattern of classes and types. Other programs put a config.json beside weights too.
  """
  named = any(re.fullmatch(names, str(cfg.get(key))) for key in ("_class_name", "model_type"))
  return named or sum(cfg.get(key) is not None for key in fields) >= 2


def read(
  what: str,
  cfg: Mapping[str, Any],
  fields: Mapping[str, str],
  only: Mapping[str, tuple[Any, ...]],
) -> Told:
  """Fields that a configuration tells; keys that are missing or null tell nothing.

  what: the model, for sentences. fields: our field by key.
  only: values by key, of architectures that hfjax has.
  Raises ValueError on another architecture.
  """
  for key, values in only.items():
    if key in cfg and _tuple(cfg[key]) not in values:
      raise ValueError(
        f"The {what} has {key} {cfg[key]!r}; hfjax has only models where it is "
        f"{' or '.join(repr(v) for v in values)}."
      )
  told: Told = {}
  for key, field in fields.items():
    if cfg.get(key) is not None:
      add(told, field, key, _tuple(cfg[key]))
  return told


def add(told: Told, field: str, key: str, value: Any):
  """Adds what a key tells."""
  told.setdefault(field, {})[key] = value


def value(what: str, told: Told, field: str) -> Any:
  """The one value that is told of a field; ValueError if keys contradict each other."""
  (first, known), *others = told[field].items()
  for key, value in others:
    if value != known:
      raise ValueError(
        f"The {what}'s configuration contradicts itself: {first} is {known!r}, and {key} {value!r}."
      )
  return known


def check(what: str, told: Told, config: Any):
  """Raises ValueError if the tensors have led to another configuration than what is told.

  A field may be told by several keys, of which one must be right.
  """
  wrong = [
    f"{' and '.join(f'{key} {value!r}' for key, value in said.items())} against "
    f"{getattr(config, field)!r}"
    for field, said in told.items()
    if all(getattr(config, field) != value for value in said.values())
  ]
  if wrong:
    raise ValueError(
      f"config.json and the tensors disagree ({'; '.join(wrong)}): they are of different {what}s."
    )


def values(what: str, told: Told, *needed: str) -> dict[str, Any]:
  """Values by field; ValueError that lists what is needed and not told, or on contradictions."""
  missing = [field for field in needed if field not in told]
  if missing:
    raise ValueError(
      f"The {what}'s configuration does not tell {', '.join(missing)}; give the config.json of a "
      "published one."
    )
  return {field: value(what, told, field) for field in told}


def _tuple(value: Any) -> Any:
  return tuple(_tuple(v) for v in value) if isinstance(value, (list, tuple)) else value
