"""What a published config.json tells of an architecture."""

from collections.abc import Mapping
from typing import Any

# By our field: the key that tells it, for sentences, and its value.
Told = dict[str, tuple[str, Any]]


def read(
  what: str,
  cfg: Mapping[str, Any],
  fields: Mapping[str, str],
  only: Mapping[str, tuple[Any, ...]],
) -> Told:
  """Fields that a configuration tells; keys that are missing or null tell nothing.

  what: the model, for sentences. fields: our field by key.
  only: values by key, of architectures that hfjax has.
  Raises ValueError on another architecture, and on keys that contradict each other.
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
      add(what, told, field, key, _tuple(cfg[key]))
  return told


def add(what: str, told: Told, field: str, key: str, value: Any):
  """Adds what a key tells; ValueError if another one tells otherwise."""
  other, known = told.get(field, (key, value))
  told[field] = (key, value)
  if other != key and known != value:
    raise ValueError(
      f"The {what}'s configuration contradicts itself: {other} is {known!r}, and {key} {value!r}."
    )


def check(what: str, told: Told, config: Any):
  """Raises ValueError if the tensors have led to another configuration than what is told."""
  wrong = [
    f"{key} {value!r} against {getattr(config, field)!r}"
    for field, (key, value) in told.items()
    if getattr(config, field) != value
  ]
  if wrong:
    raise ValueError(
      f"config.json and the tensors disagree ({'; '.join(wrong)}): they are of different {what}s, "
      "so bring the two together."
    )


def values(what: str, told: Told, *needed: str) -> dict[str, Any]:
  """Values by field; ValueError that lists what is needed and not told."""
  missing = [field for field in needed if field not in told]
  if missing:
    raise ValueError(
      f"The {what}'s configuration does not tell {', '.join(missing)}; give the config.json of a "
      "published one."
    )
  return {field: value for field, (_, value) in told.items()}


def _tuple(value: Any) -> Any:
  return tuple(_tuple(v) for v in value) if isinstance(value, (list, tuple)) else value
