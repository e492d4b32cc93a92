"""Folders of hfjax models: what their config.json records, and their arrays."""

import hashlib
import os
from pathlib import Path
from typing import Any

from hfjax.convert import source, write
from hfjax.convert.registry import KINDS, Kind
from hfjax.convert.source import CheckpointError, Tensor
from hfjax.models.geometry import VARIANTS
from hfjax.models.sampling_presets import SAMPLING_PRESETS

FORMAT = "hfjax-1"
STEM = "model"


def hfjax_models(path: Path) -> dict[str, Path]:
  """Folders of hfjax models by name: `path` itself, or below it.

  Raises CheckpointError if it is in the middle of an exchange.
  """
  write.check_whole(path)
  candidates = (path, *(path / name for name in KINDS))
  return {read_config(p)[0].name: p for p in candidates if is_hfjax(p)}


def is_hfjax(folder: Path) -> bool:
  """Whether a folder holds a model as hfjax writes it."""
  config = folder / "config.json"
  return os.path.isfile(config) and source.read_json(config).get("format") == FORMAT


def read_config(folder: Path) -> tuple[Kind, Any, dict[str, Any]]:
  """Model, architecture and the whole of config.json of an hfjax folder."""
  path = folder / "config.json"
  info = source.read_json(path)
  name, fields = info.get("model"), info.get("architecture", {})
  if info.get("format") != FORMAT or not isinstance(name, str) or name not in KINDS:
    raise CheckpointError(
      f"{folder} is no hfjax model of format {FORMAT}; convert it with tools/convert_checkpoint.py."
    )
  kind = KINDS[name]
  hashes, dtypes = info.get("hashes", {}), info.setdefault("dtypes", {})
  rows = (fields, info.setdefault("origin", {}), hashes, dtypes)
  variants = [*VARIANTS] if name == "dit" else [None]
  # Folders of before there were presets record none.
  presets = [None, *SAMPLING_PRESETS] if name == "dit" else [None]
  if (
    not all(isinstance(row, dict) for row in rows)
    or not isinstance(rows[1].get("tied", []), list)
    or any(code not in source.DTYPES for code in map(str, dtypes.values()))
    or any(Path(file).name != file for file in hashes)
    or info.get("variant") not in variants
    or info.get("preset") not in presets
  ):
    raise CheckpointError(
      f"{path} is damaged, in its architecture, variant, preset, origin, hashes or dtypes; convert "
      "anew."
    )
  try:
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return kind, kind.config(**values), info
  except (TypeError, ValueError) as e:
    raise CheckpointError(f"{path} describes no {name}: {e}") from e


def verify(folder: Path):
  """Raises CheckpointError unless the weights of an hfjax folder have the hashes it records."""
  hashes = read_config(folder)[2]["hashes"]
  files = {file.name for file in source.shards(folder, STEM)}
  for name in sorted(files | hashes.keys()):
    digest = None
    if name in files:
      with (folder / name).open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    if digest != hashes.get(name):
      raise CheckpointError(
        f"{folder / name} is not the file that was written here, by its SHA-256 in config.json; "
        "convert or copy it anew."
      )


def our_arrays(folder: Path, kind: Kind, config: Any) -> dict[str, Tensor]:
  """Arrays of an hfjax folder by path; CheckpointError unless they are the architecture's."""
  arrays = source.read_shards(folder, STEM)
  want = kind.table(config).our_shapes
  wrong = sorted(
    [f"{n} is missing" for n in want.keys() - arrays.keys()]
    + [f"{n} is unexpected" for n in arrays.keys() - want.keys()]
    + [f"{n} is {list(arrays[n].shape)} and not {list(s)}" for n, s in want.items()
       if n in arrays and arrays[n].shape != s]
  )  # fmt: skip
  if wrong:
    raise CheckpointError(
      f"{folder} does not fit its config.json: {'; '.join(wrong[:20])}; convert it anew."
    )
  return arrays


def folder_hash(folder: Path) -> str:
  """One SHA-256 for all weights of an hfjax folder, from those that its config.json records."""
  _, _, info = read_config(folder)
  text = "\n".join(f"{k} {v}" for k, v in sorted(info["hashes"].items()))
  return hashlib.sha256(text.encode()).hexdigest()
