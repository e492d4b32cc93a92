"""Examples by their number: lines of files, and folders that were written for training."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds

from hfjax.data import rows, shards
from hfjax.data.rejects import DataError, Rejects
from hfjax.data.shards import Shape

# What makes a folder of each kind, and what its examples must hold beside a prompt.
TOOLS = {
  "prompts": "tools/embed_prompts.py",
  "trajectories": "tools/make_trajectories.py",
  "videos": "tools/encode_videos.py",
  "clips": "tools/make_shapes.py",
}
_HELD = {
  "prompts": (), "trajectories": ("trajectory",), "videos": ("latents",), "clips": ("video",),
}  # fmt: skip


class Source(Protocol):
  """Examples that can be read in any order: dicts of `prompt`, a string, and arrays."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


class Prompts:
  """A list of prompts. rejects: what was left out of it."""

  def __init__(self, prompts: Sequence[str], rejects: Rejects | None = None):
    self.prompts, self.rejects = list(prompts), rejects or Rejects()

  @functools.cached_property
  def identity(self) -> str:
    """The same for the same prompts."""
    return shards.digest(self.prompts)

  def __len__(self) -> int:
    return len(self.prompts)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {"prompt": self.prompts[index]}


class Stored:
  """A dataset that `shards.write` or TFDS wrote.

  about: what its plan says of how it was made. shapes, dtypes: of the arrays as they are stored, a
    length None where it varies.
  rejects: examples that turned out to be damaged.
  """

  def __init__(self, folder: Path, kind: str, rejects: Rejects):
    """Raises DataError if it is of another kind, or is not whole."""
    self.folder, self.rejects = folder, rejects
    plan = shards.read_plan(folder)
    content = {k: v for k, v in (plan or {}).items() if k != "command"}
    self.identity = shards.digest(content or str(folder))
    self.about: dict[str, Any] = plan["about"] if plan else {}
    arrays = plan["arrays"] if plan else {}
    self.dtypes: dict[str, str] = {name: array["dtype"] for name, array in arrays.items()}
    if plan and plan["kind"] != kind:
      raise DataError(f"{folder} holds {plan['kind']}, and {kind} are asked for; give another.")
    if plan:
      _check_whole(folder, plan)
    try:
      builder: Any = tfds.builder_from_directory(str(folder))
      self._data = builder.as_data_source(shards.SPLIT)
      self._length = len(self._data)
      features: Any = builder.info.features
      self.shapes: dict[str, Shape] = {
        k: tuple(v.shape) for k, v in features.items() if k != "prompt"
      }
    except Exception as e:  # TFDS raises all sorts
      raise DataError(
        f"{folder} is no dataset of {kind} that can be read ({_line(e)}); make one with "
        f"{TOOLS[kind]}."
      ) from e
    for name in ("prompt", *_HELD[kind]):
      if name not in features:
        raise DataError(f"The examples of {folder} have no {name}; make them with {TOOLS[kind]}.")

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, Any]:
    """An example; arrays are float32, or uint8 if they are stored so.

    Raises DataError if it is damaged, IndexError beyond the last.
    """
    if not 0 <= index < self._length:
      raise IndexError(index)
    name = f"Example {index} of {self.folder}"
    try:
      found = self._data[index]
      prompt = found.pop("prompt").decode()
    except Exception as e:  # of the file format, or of no UTF-8
      raise DataError(f"{name} cannot be read ({_line(e)}).") from e
    arrays = {k: v if v.dtype == np.uint8 else _float32(v) for k, v in found.items()}
    if not prompt.strip():
      raise DataError(f"{name} has an empty prompt.")
    for key, array in arrays.items():
      if not np.all(np.isfinite(array)):
        raise DataError(f"{name} has numbers in its {key} that are not finite.")
    return {"prompt": prompt, **arrays}


class Beginnings:
  """A source whose arrays of one name are cut to their first frames; DataError on shorter ones.

  rejects, shapes, dtypes: of the source, and with so many frames.
  """

  def __init__(self, source: "Prompts | Stored", name: str, frames: int):
    self.source, self.name, self.frames = source, name, frames
    self.rejects = source.rejects
    self.dtypes: dict[str, str] = getattr(source, "dtypes", {})
    self.shapes: dict[str, Shape] = dict(getattr(source, "shapes", {}))
    if name in self.shapes:
      self.shapes[name] = (frames, *self.shapes[name][1:])

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    example = self.source[index]
    if len(example[self.name]) < self.frames:
      raise DataError(
        f"The {self.name} of {example['prompt'][:60]!r} has {len(example[self.name])} frames, and "
        f"{self.frames} are needed."
      )
    return {**example, self.name: example[self.name][: self.frames]}


def open_source(
  kind: str,
  path: str | Path,
  *,
  on_bad: str = "fail",
  expect: Mapping[str, Shape] | None = None,
) -> Prompts | Stored:
  """Examples of a kind, by number: `len(source)`, `source[i]`.

  kind: "prompts": {"prompt": str} and perhaps "context" `[t w]`; "trajectories": "trajectory"
    `[s f y x c]` too, from noise to clean; "videos": "latents" `[f y x c]`; "clips": "video"
    `[t y x 3]`, uint8. Other arrays are float32.
  path: a folder that the tools made; for prompts also a .txt, .jsonl or .csv file.
  on_bad: "fail", or "skip": bad lines are left out, and `batches` leaves out damaged examples;
    `source.rejects` counts and names them.
  expect: shapes that arrays must have, None where any length will do.

  Raises DataError on what is not there, not whole, of another kind, or of other shapes.
  """
  if kind not in TOOLS:
    raise DataError(f"There are no data of the kind {kind!r}; choose one of {', '.join(TOOLS)}.")
  path, rejects = Path(path).expanduser(), Rejects(on_bad)
  if not path.exists():
    raise DataError(f"There is no {path} to read {kind} from; make it with {TOOLS[kind]}.")
  if path.is_file() and kind != "prompts":
    raise DataError(f"{path} is a file; {kind} are in folders that {TOOLS[kind]} makes.")
  source = Stored(path, kind, rejects) if path.is_dir() else _of_file(path, rejects)
  held = getattr(source, "shapes", {})
  for name, shape in (expect or {}).items():
    if name not in held:
      how = f" with {TOOLS[kind]}" if kind == "prompts" else " with the option --with_context"
      raise DataError(f"{path} has no {name}; make it{how if name == 'context' else ' anew'}.")
    if not shards.matches(held[name], shape):
      raise DataError(
        f"The {name} in {path} has the shape {_text(held[name])}, and {_text(shape)} is needed; "
        "give other data, or settings that fit these."
      )
  return source


def _of_file(path: Path, rejects: Rejects) -> Prompts:
  prompts = rows.read_prompts(path, rejects.add)
  if not prompts:
    raise DataError(f"{path} holds no prompt. {rejects.report()}".strip())
  if rejects.count:
    warnings.warn(f"{path}: {rejects.report()}", stacklevel=3)
  return Prompts(prompts, rejects)


def _check_whole(folder: Path, plan: Mapping[str, Any]):
  shape = {k: (tuple(v["shape"]), v["dtype"]) for k, v in plan["arrays"].items()}
  whole = shards.Plan(plan["kind"], plan["count"], shape, plan["about"], plan["per_shard"])
  there = len(whole.present(folder))
  if there < whole.shards or not (folder / "dataset_info.json").is_file():
    command = plan["command"] or f"the same {TOOLS[plan['kind']]} again"
    raise DataError(
      f"{folder} is not complete: {there} of {whole.shards} shards are there. Run what finishes "
      f"it: {command}"
    )


def _float32(array: np.ndarray) -> np.ndarray:
  return (array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array).astype(np.float32)


def _text(shape: Shape) -> str:
  return " x ".join("any" if n is None else str(n) for n in shape)


def _line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0]
