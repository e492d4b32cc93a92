"""Runs of training as checkpoints: weights of a step, read array by array.

A run's folder has `checkpoints/STEP`, as Orbax writes them, each with items: `student` (weights),
`ema` (their averages), `adapters` (low-rank ones, if only these are trained; then `ema` is theirs),
`umt5` and `vae` (models that were trained beside or before it) with `umt5_ema` and `vae_ema`, and
`note`, which says what the weights are. What else training keeps is not read.
"""

import functools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hfjax import checksums
from hfjax.convert.adapters import TARGETS, Factors, to_original
from hfjax.convert.part import Part, named_tensors
from hfjax.convert.registry import KINDS
from hfjax.convert.source import CheckpointError, Tensor
from hfjax.models.geometry import VARIANTS
from hfjax.models.presets import WanConfig
from hfjax.models.sampling_presets import SAMPLING_PRESETS

FORMAT = "hfjax-run-1"
_SHOWN = 20  # steps named in a sentence
_OTHERS = ("umt5", "vae")  # models beside the transformer


class _DamagedError(Exception):
  """Why a step cannot be read."""


def is_run(path: Path) -> bool:
  """Whether a folder is a run's; one without any checkpoint yet, too."""
  folder = path / "checkpoints"
  if not os.path.isdir(folder):
    return False
  entries = [*folder.iterdir()]
  # Orbax names those that it has not finished STEP.orbax-checkpoint-tmp.
  return not entries or any(e.is_dir() and e.name.partition(".")[0].isdigit() for e in entries)


def check_is_whole(path: Path):
  """Raises CheckpointError if `path` is a part of a run, rather than the run."""
  whole = Path(os.path.abspath(path))
  for folder in (whole, *whole.parents[:2]):
    if folder.name == "checkpoints" and is_run(folder.parent):
      raise CheckpointError(
        f"{path} is a part of a run of training; give its folder, {folder.parent}, and --step for "
        "one of its steps."
      )


def open_run(
  path: Path, averaged: bool = False, step: int | None = None, model: str = "dit"
) -> Part:
  """The transformer of a run's step, by default its newest; adapters are merged.

  model: another one that the run trained, "umt5" or "vae".
  averaged: moving averages of what is trained.
  Arrays are read when asked for, one being held at a time, whatever devices training had.
  Raises CheckpointError, also while reading, if the step is missing or damaged; no other is taken
  for it.
  """
  steps = _steps(path)
  if not steps:
    raise CheckpointError(
      f"{path} is a run of training that has written no checkpoint yet; wait for its first."
    )
  if step is not None and step not in steps:
    more = "" if len(steps) <= _SHOWN else "..., "
    raise CheckpointError(
      f"{path} has no checkpoint of step {step}; it has {more}"
      f"{', '.join(map(str, steps[-_SHOWN:]))}."
    )
  step = steps[-1] if step is None else step
  held = models(path, step)
  if model not in held:
    raise CheckpointError(f"{path} holds no {model}: only {', '.join(held)}.")
  try:
    return _open(path, step, averaged, model)
  except _DamagedError as e:
    raise _refusal(path, step, averaged, model, e) from e


def models(path: Path, step: int | None = None) -> list[str]:
  """Names of the models that a run has trained, as its newest or a given step says.

  Where nothing can be read of it, these are all that there might be, opening which tells why.
  """
  steps = _steps(path)
  every = ["dit", *_OTHERS]
  if not steps or (step is not None and step not in steps):
    return every
  try:
    folder = path.absolute() / "checkpoints" / str(steps[-1] if step is None else step)
    told = _read_note(folder).get("models") or {}
  except (_DamagedError, CheckpointError):
    return every
  others = [name for name in _OTHERS if isinstance(told, dict) and name in told]
  return others if "vae" in others else ["dit", *others]


def _steps(path: Path) -> list[int]:
  """Finished steps, rising."""
  entries = (path / "checkpoints").iterdir()
  return sorted(int(e.name) for e in entries if e.name.isdigit() and e.is_dir())


def _refusal(path: Path, step: int, averaged: bool, model: str, why: Exception) -> CheckpointError:
  """What is said of a damaged step, with another that can be opened."""
  other = None
  for candidate in reversed(_steps(path)):
    if candidate != step:
      try:
        _open(path, candidate, averaged, model)
      except (_DamagedError, CheckpointError):
        continue
      other = candidate
      break
  advice = "no other step of the run can be read"
  if other is not None:
    advice = f"step {other} can be taken instead, with --step {other}"
  reason = str(why).strip().splitlines()[0][:200].rstrip(".")
  return CheckpointError(
    f"The checkpoint of step {step} of {path} is damaged, or was removed meanwhile; {advice}. "
    f"({reason}.)"
  )


def _open(path: Path, step: int, averaged: bool, model: str) -> Part:
  """A model of a step; _DamagedError if it cannot be read."""
  folder = path.absolute() / "checkpoints" / str(step)  # Orbax takes no other
  note = _read_note(folder)
  config, low_rank = _architecture(note, model, averaged), _low_rank(note)
  item, averages = ("student", "ema") if model == "dit" else (model, f"{model}_ema")
  if averaged and not (folder / averages).is_dir():
    raise CheckpointError(
      f"{path} has no moving averages of weights at step {step}; leave out --ema for the weights "
      "themselves, or take a later step."
    )
  kind = KINDS[model]
  table = kind.table(config)
  weights = folder / (averages if averaged and not low_rank else item)
  held = _shapes(weights)
  _check_shapes(weights.name, {n: x.shape for n, x in held.items()}, table.our_shapes)
  sums: dict[str, str] = {}

  @functools.lru_cache(maxsize=1)  # the layers of an array are asked for one after the other
  def read(name: str) -> np.ndarray:
    try:
      x = _restore(weights, name)
      sums[name] = checksums.array_sum(x)
      if len(sums) == len(held):  # with the last array, before anything is made of all of them
        _check_sum(weights.name, sums, note)
      return x
    except _DamagedError as e:
      raise _refusal(path, step, averaged, model, e) from e

  def tensor(name: str) -> Tensor:
    shape, dtype = held[name].shape, np.dtype(held[name].dtype)
    return Tensor(shape, dtype, lambda row=None: read(name) if row is None else read(name)[row])

  tensors = named_tensors(table, {name: tensor(name) for name in held})
  notes = [f"{'Moving averages of weights' if averaged else 'Weights'} of step {step} were taken."]
  if low_rank:
    rank, alpha = low_rank
    factors = _read_adapters(folder / ("ema" if averaged else "adapters"), config, rank, note)
    for module, pair in factors.items():
      name = f"{module}.weight"
      tensors[name] = _merged(tensors[name], pair, alpha / rank)
    notes.append(f"{len(factors)} adapters of rank {rank} were merged, with alpha {alpha:g}.")
  if not averaged and (folder / averages).is_dir():
    notes.append("The step has moving averages of them as well, which --ema takes.")
  run = os.path.basename(os.path.abspath(path))
  origin = {"run": run, "step": step, "averaged": averaged, "adapters": note.get("lora")}
  if model != "dit":
    return Part(kind, config, tensors, None, origin, notes)
  return Part(kind, config, tensors, note["variant"], origin, notes, note.get("preset"))


def _read_note(folder: Path) -> dict[str, Any]:
  import orbax.checkpoint as ocp
  from etils import epath

  try:
    note: Any = ocp.JsonCheckpointHandler().restore(epath.Path(folder / "note"))
  except Exception as e:  # what a damaged file raises is nowhere said
    raise _DamagedError(f"its note cannot be read: {e}") from e
  if not isinstance(note, dict) or not isinstance(note.get("format"), str):
    raise _DamagedError("its note says nothing")
  if note["format"] != FORMAT:
    raise CheckpointError(
      f"{folder} is of the format {note['format']}, and this hfjax reads {FORMAT}; use the one "
      "that trained it."
    )
  for name, known in (("variant", [*VARIANTS]), ("preset", [None, *SAMPLING_PRESETS])):
    if note.get(name) not in known:
      raise _DamagedError(f"its note has the unknown {name} {note.get(name)!r}")
  return note


def _architecture(note: Mapping[str, Any], model: str, averaged: bool) -> Any:
  try:
    told: dict[str, Any]
    if model == "dit":
      told = note["architecture"]
    else:  # averages may have statistics of their own
      models = note["models"]
      told = (averaged and models.get(f"{model}_ema")) or models[model]
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
    return KINDS[model].config(**fields)
  except (KeyError, AttributeError, TypeError, ValueError) as e:
    name = {"dit": "transformer", "umt5": "text encoder"}.get(model, model)
    raise _DamagedError(f"its note describes no {name}: {e}") from e


def _low_rank(note: Mapping[str, Any]) -> tuple[int, float] | None:
  """Rank and alpha of adapters, or None if the weights themselves were trained."""
  told = note.get("lora")
  if told is None:
    return None
  rank, alpha = (told.get(k) if isinstance(told, dict) else None for k in ("rank", "alpha"))
  if (
    not isinstance(rank, int)
    or isinstance(rank, bool)
    or rank < 1
    or not isinstance(alpha, int | float)
    or not math.isfinite(alpha)
  ):
    raise _DamagedError(f"its note describes no adapters: {str(told)[:100]}")
  return rank, float(alpha)


def _read_adapters(
  folder: Path, config: WanConfig, rank: int, told: Mapping[str, Any]
) -> dict[str, Factors]:
  """Factors of all layers by original module name."""
  adapters: dict[str, dict[str, np.ndarray]] = {}
  for path in _shapes(folder):
    name, _, factor = path.partition("/")
    adapters.setdefault(name, {})[factor] = _restore(folder, path)
  _check_sum(
    folder.name,
    {f"{t}/{f}": checksums.array_sum(x) for t, pair in adapters.items() for f, x in pair.items()},
    told,
  )
  try:
    factors = to_original(config, adapters)
  except Exception as e:  # other names, or other shapes than layouts take
    raise _DamagedError(f"its {folder.name} are no adapters of this model: {e}") from e
  shapes = KINDS["dit"].table(config).shapes
  for module, (down, up) in factors.items():
    out, into = shapes[f"{module}.weight"]
    if down.shape != (rank, into) or up.shape != (out, rank):
      raise _DamagedError(f"its {folder.name} do not fit {module} with rank {rank}")
  if len(factors) != len(adapters) * config.layers or not adapters.keys() <= TARGETS.keys():
    raise _DamagedError(f"its {folder.name} are not those of all layers")
  return factors


def _merged(weight: Tensor, pair: Factors, scale: float) -> Tensor:
  def read(row: int | None = None) -> np.ndarray:
    change = np.float32(scale) * (pair.up.astype(np.float32) @ pair.down.astype(np.float32))
    x = (weight.read().astype(np.float32) + change).astype(weight.dtype)
    return x if row is None else x[row]

  return Tensor(weight.shape, weight.dtype, read)


def _shapes(folder: Path) -> dict[str, Any]:
  """What Orbax says of the arrays of an item, by path."""
  import orbax.checkpoint as ocp
  from etils import epath

  if not folder.is_dir():
    raise _DamagedError(f"it has no {folder.name}")
  try:
    first = next(iter(json.loads((folder / "_METADATA").read_text())["tree_metadata"].values()))
    # Below, all arrays are opened at once, and where many fail Orbax prints a trace for each.
    _restore(folder, "/".join(key["key"] for key in first["key_metadata"]))
    tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder)).tree
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(getattr(k, "key", k)) for k in path): x for path, x in paths}
  except _DamagedError:
    raise
  except Exception as e:  # what damaged files raise is nowhere said
    raise _DamagedError(f"its {folder.name} cannot be read: {e}") from e


def _check_sum(item: str, sums: Mapping[str, str], note: Mapping[str, Any]):
  """_DamagedError unless arrays are those that were saved, where the note has their checksum."""
  told = note.get("checksums")
  want = told.get(item) if isinstance(told, dict) else None
  if want is not None and checksums.combined(sums) != want:
    raise _DamagedError(f"the arrays of its {item} are not those that were saved")


def _check_shapes(
  item: str, have: Mapping[str, tuple[int, ...]], want: Mapping[str, tuple[int, ...]]
):
  wrong = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
  if wrong:
    raise _DamagedError(
      f"its {item} is not of the architecture in its note, in {', '.join(wrong[:3])}"
    )


def _restore(folder: Path, name: str) -> np.ndarray:
  """An array of an item by its path, and no other, on the host."""
  import orbax.checkpoint as ocp
  from etils import epath

  item: Any = name
  args: Any = ocp.RestoreArgs(restore_type=np.ndarray)
  for key in reversed(name.split("/")):
    item, args = {key: item}, {key: args}
  want = ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
  try:
    held = ocp.PyTreeCheckpointHandler().restore(epath.Path(folder), args=want)
  except Exception as e:  # what damaged files raise is nowhere said
    raise _DamagedError(f"its {folder.name} cannot be read: {e}") from e
  return np.asarray(jax.tree.leaves(held)[0])
