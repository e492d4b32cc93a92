"""Checkpoints as parts, one per model, whatever they were read from; and writing them.

Reading gives tensors under original names. Writing folds them into hfjax arrays, layer by layer, or
names them for others. Nothing holds more than one layer of one array.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from hfjax.convert import recognise, source, write
from hfjax.convert.registry import KINDS, Kind
from hfjax.convert.source import CheckpointError, Tensor, Tensors
from hfjax.convert.table import Leaf, Table
from hfjax.models.geometry import VARIANTS

FORMAT = "hfjax-1"
STEM = "model"
CASTS = {"bf16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


@dataclasses.dataclass(frozen=True)
class Part:
  """One model of a checkpoint.

  tensors: under original names, complete. variant: semantics it was trained with.
  origin: what it was read from, for the record. notes: sentences for the user.
  """

  kind: Kind
  config: Any
  tensors: Tensors
  variant: str | None
  origin: Mapping[str, Any]
  notes: Sequence[str] = ()

  @property
  def table(self) -> Table:
    """Its name table."""
    return self.kind.table(self.config)


def open_parts(
  path: Path, model: str = "auto", variant: str | None = None, averaged: bool = False
) -> list[Part]:
  """The models that a file or folder holds, in any format that hfjax writes or reads.

  model: name of the only one wanted, or "auto" for all.
  variant: semantics to record; by default what the tensors speak for.
  averaged: take moving averages of weights.
  Raises CheckpointError with a sentence on whatever cannot be read.
  """
  ours = [p for p in _hfjax_folders(path) if model in ("auto", p.name)]
  if ours:
    parts = [_open_hfjax(folder) for folder in ours]
  else:
    parts, strange = [], []
    for name, tensors in recognise.groups(path, averaged).items():
      part = _open_foreign(Path(name), recognise.clean_names(tensors), model, variant)
      if part is None:
        strange.append(name)
      elif model in ("auto", part.kind.name):
        parts.append(part)
    if not parts:
      what = "no model that hfjax knows" if model == "auto" else f"no {model}"
      raise CheckpointError(
        f"{path} holds {what}: its tensors are not named as those of any of {', '.join(KINDS)}."
      )
    if strange:
      left = f"Left out, as no model of ours: {', '.join(strange)}."
      parts[0] = dataclasses.replace(parts[0], notes=(*parts[0].notes, left))
  twice = {p.kind.name for p in parts if sum(q.kind is p.kind for q in parts) > 1}
  if twice:
    where = "; ".join(str(p.origin["path"]) for p in parts if p.kind.name in twice)
    raise CheckpointError(f"{path} holds more than one {sorted(twice)[0]} ({where}); name one.")
  return parts


def _open_foreign(path: Path, tensors: Tensors, model: str, variant: str | None) -> Part | None:
  """The model of a set of tensors, checked; None if it is none of ours or not `model`."""
  known = recognise.recognise(tensors)
  if known is None or model not in ("auto", known[0].name):
    return None
  kind, style = known
  folder = path.parent
  cfg_path = folder / "config.json"
  # In an original folder, config.json is the transformer's, whatever else lies there.
  own = style == "diffusers" or path.name.startswith(KINDS["dit"].stems["original"])
  cfg = source.read_json(cfg_path) if own and cfg_path.is_file() else {}
  notes: list[str] = []
  named: Tensors = recognise.original_names(kind, tensors, style)
  try:
    config = kind.infer({n: t.shape for n, t in named.items()}, cfg, notes)
  except ValueError as e:
    raise CheckpointError(f"{path}: {e}") from e
  config, named, variant = _hybrid(kind, config, named, variant, notes)
  _compare_config(kind, config, cfg, path)
  named = kind.prepare(config, named)
  try:
    kind.table(config).check({n: t.shape for n, t in named.items()})
  except ValueError as e:
    raise CheckpointError(f"{path}: {e}") from e
  return Part(kind, config, named, variant, {"path": path.name, "naming": style}, notes)


def _hybrid(kind, config, tensors, variant, notes):
  """Decides on the linear branch: there, or wanted and added as zeros (spec section 11.2)."""
  if kind.name != "dit":
    return config, tensors, None
  if variant is None:
    variant = "reference_infer" if config.linear else "reference_dense"
    notes.append(
      f"Taken for variant {variant}, as the checkpoint has "
      f"{'a' if config.linear else 'no'} linear branch; --variant says otherwise."
    )
  if VARIANTS[variant].dense or config.linear:
    return config, tensors, variant
  config = dataclasses.replace(config, linear=True)
  missing = kind.table(config).shapes.keys() - tensors.keys()
  dtype = next(iter(tensors.values())).dtype
  added = {
    name: constant(kind.table(config).shapes[name], dtype)
    for name in sorted(missing)
    if "linear_proj" in name
  }
  notes.append(f"The linear branch is missing: {len(added)} linear_proj tensors were set to zero.")
  return config, {**tensors, **added}, variant


def constant(shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
  """A tensor of zeros."""
  return Tensor(shape, dtype, lambda row=None: np.zeros(shape if row is None else shape[1:], dtype))


# Keys of config.json, original and Diffusers', and the fields that must agree with them.
_CHECKED = {
  "dim": "dim", "ffn_dim": "ffn_dim", "num_layers": "layers", "num_heads": "heads",
  "num_attention_heads": "heads", "in_dim": "in_dim", "in_channels": "in_dim",
  "out_dim": "out_dim", "out_channels": "out_dim", "text_dim": "text_dim",
  "freq_dim": "freq_dim", "z_dim": "z_dim", "base_dim": "dim", "d_model": "dim", "d_ff": "dim_ffn",
  "vocab_size": "vocab",
}  # fmt: skip


def _compare_config(kind: Kind, config: Any, cfg: Mapping[str, Any], path: Path):
  wrong = [
    f"{key} {cfg[key]} against {getattr(config, field)}"
    for key, field in _CHECKED.items()
    if key in cfg and hasattr(config, field) and cfg[key] != getattr(config, field)
  ]
  if wrong:
    raise CheckpointError(
      f"{path.parent / 'config.json'} and the tensors disagree ({'; '.join(wrong)}): they are of "
      f"different {kind.name} models, so bring the two together."
    )


# ---- hfjax folders ----


def _hfjax_folders(path: Path) -> list[Path]:
  """Folders of hfjax models at `path`: itself, or below it."""
  if not path.is_dir():
    return []
  candidates = (path, *(path / name for name in KINDS))
  return [p for p in candidates if is_hfjax(p)]


def is_hfjax(folder: Path) -> bool:
  """Whether a folder holds one model in hfjax's format."""
  config = folder / "config.json"
  return config.is_file() and source.read_json(config).get("format") == FORMAT


def read_config(folder: Path) -> tuple[Kind, Any, dict[str, Any]]:
  """Model, architecture and the whole of config.json of an hfjax folder."""
  info = source.read_json(folder / "config.json")
  kind = KINDS.get(info.get("model", ""))
  if info.get("format") != FORMAT or kind is None:
    raise CheckpointError(
      f"{folder} is no hfjax model of format {FORMAT}; convert it with tools/convert_checkpoint.py."
    )
  fields = {
    k: tuple(v) if isinstance(v, list) else v for k, v in info.get("architecture", {}).items()
  }
  try:
    return kind, kind.config(**fields), info
  except (TypeError, ValueError) as e:
    raise CheckpointError(f"{folder / 'config.json'} describes no {kind.name}: {e}") from e


def _open_hfjax(folder: Path) -> Part:
  kind, config, info = read_config(folder)
  arrays = our_arrays(folder, kind, config)
  table = kind.table(config)
  tensors: dict[str, Tensor] = {}
  for leaf in table.leaves:
    for i in range(table.layers if leaf.is_layered else 1):
      for n, name in enumerate(leaf.sources):
        full = name.format(i=i)
        dtype = arrays[leaf.path].dtype
        mixed = info.get("dtypes", {}).get(full)
        tensors[full] = Tensor(
          table.shapes[full],
          source.DTYPES[mixed] if mixed else dtype,
          _part_reader(table, leaf, arrays[leaf.path], i if leaf.is_layered else None, n, mixed),
        )
  return Part(kind, config, tensors, info.get("variant"), {**info.get("origin", {})})


def _part_reader(table, leaf, array, layer, number, mixed):
  def read(row=None):
    x = table.part(leaf, array.read(layer))[number]
    x = x.astype(source.DTYPES[mixed]) if mixed else x
    return x if row is None else x[row]

  return read


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


# ---- Writing ----


def entries(part: Part, to: str, cast: str | None) -> tuple[list[write.Entry], dict[str, str]]:
  """What to write of a part, and the dtypes of tensors that share an array with wider ones.

  to: "hfjax", "original" or "diffusers". cast: "bf16", "float32" or None to keep dtypes.
  """
  dtype = CASTS[cast] if cast else None
  table = part.table
  if to != "hfjax":
    rename: Callable[[str], str] = table.diffusers_name if to == "diffusers" else str
    try:
      named = {rename(name): tensor for name, tensor in part.tensors.items()}
    except KeyError as e:
      raise CheckpointError(f"{part.kind.name} has no {to} naming (for {e}).") from e
    return [_entry(name, t, dtype or t.dtype) for name, t in named.items()], {}
  rows, mixed = [], {}
  for leaf in table.leaves:
    names = [s.format(i=i) for i in range(_layers(table, leaf)) for s in leaf.sources]
    kept = {part.tensors[n].dtype for n in names}
    wide = next(iter(kept)) if len(kept) == 1 else np.dtype(np.float32)
    if len(kept) > 1 and dtype is None:
      # float64 alone would not survive, and no published model has any.
      codes = {v: k for k, v in source.DTYPES.items()}
      mixed.update({n: codes[part.tensors[n].dtype] for n in names})
    rows.append(
      write.Entry(
        leaf.path, table.our_shapes[leaf.path], dtype or wide, _pieces(part, table, leaf, wide)
      )
    )
  return rows, mixed


def _entry(name: str, tensor: Tensor, dtype: np.dtype) -> write.Entry:
  return write.Entry(name, tensor.shape, dtype, lambda: iter([_read(tensor, name)]))


def _layers(table: Table, leaf: Leaf) -> int:
  return table.layers if leaf.is_layered else 1


def _pieces(part: Part, table: Table, leaf: Leaf, dtype: np.dtype):
  def pieces() -> Iterator[np.ndarray]:
    for i in range(_layers(table, leaf)):
      names = [s.format(i=i) for s in leaf.sources]
      yield table.join(leaf, [_read(part.tensors[n], n).astype(dtype, copy=False) for n in names])

  return pieces


def _read(tensor: Tensor, name: str) -> np.ndarray:
  """The tensor; CheckpointError if it holds NaN or infinity."""
  x = tensor.read()
  bad = _count_not_finite(x)
  if bad:
    raise CheckpointError(
      f"The tensor {name} holds {bad} numbers that are NaN or infinite; the checkpoint is damaged, "
      "or its training had diverged."
    )
  return x


def _count_not_finite(x: np.ndarray) -> int:
  if x.dtype == CASTS["bf16"]:  # by its exponent: isfinite converts, which takes ten times as long
    return int(((x.view(np.uint16) & 0x7F80) == 0x7F80).sum())
  return 0 if x.dtype.kind in "iub" else int(x.size - np.isfinite(x).sum())


def write_part(
  part: Part, folder: Path, to: str, cast: str | None, progress: Callable[[int], object]
) -> None:
  """Writes one model and its config.json into `folder`."""
  rows, mixed = entries(part, to, cast)
  stem = STEM if to == "hfjax" else part.kind.stems[to]
  hashes = write.write_shards(folder, stem, rows, progress)
  architecture = dataclasses.asdict(part.config)
  if to == "hfjax":
    info = {
      "format": FORMAT,
      "model": part.kind.name,
      "architecture": architecture,
      "variant": part.variant,
      "origin": dict(part.origin),
      "hashes": hashes,
    }
    if mixed:
      info["dtypes"] = mixed
    write.write_json(folder / "config.json", info)
  elif (published := part.kind.published(part.config, to)) is not None:
    write.write_json(folder / "config.json", published)


def folder_hash(folder: Path) -> str:
  """One SHA-256 for all weights of an hfjax folder, from those that its config.json records."""
  _, _, info = read_config(folder)
  text = "\n".join(f"{k} {v}" for k, v in sorted(info.get("hashes", {}).items()))
  return hashlib.sha256(text.encode()).hexdigest()


def part_folder(kind: Kind, to: str) -> str:
  """Subfolder that a model is written to: its name, its Diffusers folder, or the folder itself."""
  return {"hfjax": kind.name, "diffusers": kind.folder, "original": "."}[to]


TOKENIZER = Path("google", "umt5-xxl")


def copy_tokenizer(path: Path, folder: Path):
  """Takes the tokenizer's files along, if the source has them."""
  for found in (path / TOKENIZER, path / "tokenizer"):
    if found.is_dir() and not (folder / TOKENIZER).exists():
      shutil.copytree(found, folder / TOKENIZER)
