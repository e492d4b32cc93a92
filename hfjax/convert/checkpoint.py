"""Checkpoints as parts, one per model, whatever they were read from; and writing them.

Reading gives tensors under original names. Writing folds them into hfjax arrays, layer by layer, or
names them for others. Nothing holds more than one layer of one array.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from hfjax.convert import recognise, runs, source, write
from hfjax.convert.part import Part, named_tensors
from hfjax.convert.registry import KINDS, Kind
from hfjax.convert.source import CheckpointError, Tensor, Tensors
from hfjax.convert.stored import (
  FORMAT,
  STEM,
  hfjax_models,
  is_hfjax,
  our_arrays,
  read_config,
  verify,
)
from hfjax.convert.table import Leaf, Table
from hfjax.models import sampling_presets
from hfjax.models.geometry import VARIANTS
from hfjax.models.sampling_presets import SAMPLING_PRESETS

CASTS = {"bf16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}


# Where trainers of few-step models put them in their files.
_GENERATORS = ("generator", "generator_ema")
# Where Wan 2.2 keeps a second transformer, in original folders and Diffusers'.
_EXPERTS = ("high_noise_model", "transformer_2")


def open_parts(
  path: Path,
  model: str = "auto",
  variant: str | None = None,
  averaged: bool = False,
  preset: str | None = None,
  step: int | None = None,
) -> list[Part]:
  """The models that a file or folder holds, in any format that hfjax writes or reads.

  model: name of the only one wanted, or "auto" for all.
  variant: semantics to record; by default what the tensors speak for.
  averaged: take moving averages of weights.
  preset: name in `SAMPLING_PRESETS` to record; by default what names and tensors speak for. A
    variant that it has is recorded too.
  step: of a run of training; by default its newest.
  What is not wanted, or no model, is left out, also if it cannot be read.
  Raises CheckpointError with a sentence on whatever is wanted and cannot be read.
  """
  if preset is not None:
    own = SAMPLING_PRESETS[preset].variant
    if variant is not None and own not in (None, variant):
      raise CheckpointError(
        f"The preset {preset} is of variant {own}, and {variant} was asked for; leave one out."
      )
    variant = variant or own
  if runs.is_run(path):
    wanted = runs.models(path, step) if model == "auto" else [model]
    parts = [runs.open_run(path, averaged, step, name) for name in wanted]
    return [
      _with_semantics(
        p, {"variant": p.variant, "preset": p.preset, "origin": p.origin}, variant, preset
      )
      for p in parts
    ]
  runs.check_is_whole(path)
  if step is not None:
    raise CheckpointError(f"{path} is no run of training, which alone has steps; leave out --step.")
  ours = hfjax_models(path)
  if ours:
    if averaged:
      raise CheckpointError(
        f"{path} is an hfjax folder, which holds no averages beside the weights; leave out --ema, "
        "or give the trainer's file."
      )
    parts = [_open_hfjax(f, variant, preset) for name, f in ours.items() if model in ("auto", name)]
    _check_found(path, parts, model, set(ours), {})
    return parts
  experts = next((path / n for n in _EXPERTS if os.path.isdir(path / n)), None)
  if experts and model in ("auto", "dit"):
    raise CheckpointError(
      f"{path} is of Wan 2.2, with two transformers (one in {experts.name}) that take turns; hfjax "
      "has Wan 2.1's. Other models of it may be converted with --model."
    )
  parts, others, notes = [], set(), []
  found, failed = recognise.groups(path, averaged)
  for group in found:
    try:
      tensors = recognise.clean_names(group.tensors)
    except CheckpointError as e:
      failed[group.path] = e
      continue
    known = recognise.recognise(tensors)
    if known is None:
      notes.append(f"Left out, as no model of ours: {group.path}.")
    elif model not in ("auto", known[0].name):
      others.add(known[0].name)
    else:
      names = _names(group.path, path)
      parts.append(_open_foreign(group, tensors, *known, variant, preset, names))
  for file, error in failed.items():
    if model == "auto" and _looks_ours(file):
      raise error
    notes.append(f"Left out {file.name}: {error}")
  _check_found(path, parts, model, others, failed)
  # Trainers put averages into a file of their own; asked for, the other one has failed above.
  plain = {p.kind.name for p in parts if not p.origin["averaged"]}
  parts = [p for p in parts if not p.origin["averaged"] or p.kind.name not in plain or averaged]
  for part in parts:
    same = [p for p in parts if p.kind is part.kind]
    if len(same) > 1:
      where = "; ".join(", ".join(p.origin["files"]) for p in same)
      raise CheckpointError(f"{path} holds more than one {part.kind.name} ({where}); name one.")
  parts[0] = dataclasses.replace(parts[0], notes=(*parts[0].notes, *notes))
  return parts


def _looks_ours(file: Path) -> bool:
  """Whether a file that cannot be read is likely one of a model's."""
  stems = tuple(kind.stems["original"] for kind in KINDS.values())
  return file.suffix == ".safetensors" or file.name.startswith(stems)


def _check_found(path, parts, model, others, failed):
  """Raises CheckpointError if nothing that is wanted was found, with what was."""
  if parts:
    return
  if len(failed) == 1 and not others:
    raise next(iter(failed.values()))
  what = "no model that hfjax knows" if model == "auto" else f"no {model}"
  have = f"only {', '.join(sorted(others))}" if others else (
    f"its tensors are not named as those of any of {', '.join(KINDS)}"
  )  # fmt: skip
  reasons = "".join(f" {file.name} could not be read: {e}" for file, e in failed.items())
  raise CheckpointError(f"{path} holds {what}: {have}.{reasons}")


def _names(file: Path, given: Path) -> list[str]:
  """Names that people gave to a file, its folder, and the folder or file that is read."""
  file, given = (Path(os.path.abspath(path)) for path in (file, given))
  # The Hub's copies lie in models--OWNER--NAME/snapshots/HASH.
  named = (f.parents[1] if f.parent.name == "snapshots" else f for f in (file.parent, given))
  return [file.name, *(f.name for f in named)]


def _open_foreign(
  group: recognise.Group,
  tensors: Tensors,
  kind: Kind,
  style: str,
  variant: str | None,
  preset: str | None,
  names: Sequence[str],
) -> Part:
  """The model of a set of tensors, checked; names: of where they lie."""
  cfg_path = group.path.parent / "config.json"
  # In an original folder, config.json is the transformer's, whatever else lies there.
  own = style == "diffusers" or kind.name == "dit"
  cfg = source.read_json(cfg_path) if own and cfg_path.is_file() else {}
  notes: list[str] = []
  if cfg and not kind.owns(cfg):
    cfg = {}
    notes.append(f"{cfg_path} is of no {kind.name}, and was not followed.")
  if group.averaged:
    notes.append(f"{group.path.name}: moving averages of weights ({group.key}) were taken.")
  named: Tensors = recognise.original_names(kind, tensors, style)
  try:
    config = _infer(kind, named, cfg, cfg_path, notes)
    if kind.name == "dit":
      variant, preset = _semantics(config.linear, variant, preset, group.key, names, notes)
      config, named = _hybrid(kind, config, named, variant, notes)
    else:
      variant = preset = None
    named = kind.prepare(config, named)
    kind.table(config).check({n: t.shape for n, t in named.items()})
  except ValueError as e:
    raise CheckpointError(f"{group.path}: {e}") from e
  origin = {
    "files": {f.name: f.stat().st_size for f in group.files},
    "key": group.key,
    "averaged": group.averaged,
    "naming": style,
  }
  if kind.tied.keys() & tensors.keys():
    origin["tied"] = sorted(tensors.keys() & {*kind.tied, *kind.tied.values()})
  return Part(kind, config, named, variant, origin, notes, preset)


def _infer(kind: Kind, tensors: Tensors, cfg: Mapping[str, Any], path: Path, notes: list[str]):
  """Architecture from tensors and the config.json at `path`, which is blamed if they disagree."""
  try:
    return kind.infer({n: t.shape for n, t in tensors.items()}, cfg, notes)
  except CheckpointError:
    raise
  except ValueError as e:
    hint = f" So says {path}: bring the model's own, or move it away." if cfg else ""
    raise ValueError(f"{e}{hint}") from e


def _semantics(
  linear: bool,
  variant: str | None,
  preset: str | None,
  key: Any,
  names: Iterable[str],
  notes: list[str],
) -> tuple[str, str]:
  """Variant and preset of a transformer: those given, else what it speaks for, with a note.

  linear: whether it has the linear branch. key: where it lay in a trainer's file. names: of where
  it came from.
  """
  assumed: dict[str, list[str]] = {}  # by reason
  if variant is None:
    variant = "reference_infer" if linear else "reference_dense"
    reason = f"the checkpoint has {'a' if linear else 'no'} linear branch"
    assumed[reason] = [f"variant {variant}"]
  if preset is None:
    keeps = not VARIANTS[variant].dense
    # A hybrid model whose branch is left out is a few-step one still.
    preset, reason = sampling_presets.infer(keeps, linear or key in _GENERATORS, names)
    if keeps and not linear:
      reason = f"variant {variant} has a linear branch"
    assumed.setdefault(reason, []).append(f"preset {preset}")
  if assumed:
    taken = ", and for ".join(f"{' and '.join(what)}, as {why}" for why, what in assumed.items())
    options = [f"--{what.split()[0]}" for row in assumed.values() for what in row]
    say = f"{' and '.join(options)} {'say' if len(options) > 1 else 'says'}"
    notes.append(f"Taken for {taken}; the converter's {say} otherwise.")
  return variant, preset


def _hybrid(kind, config, tensors, variant, notes):
  """Decides on the linear branch: kept, left out, or added as zeros (spec section 11.2)."""
  if VARIANTS[variant].dense != config.linear:
    return config, tensors
  if config.linear:
    kept = {name: t for name, t in tensors.items() if "linear_proj" not in name}
    notes.append(
      f"{len(tensors) - len(kept)} linear_proj tensors were left out, as variant {variant} has no "
      "linear branch."
    )
    return dataclasses.replace(config, linear=False), kept
  config = dataclasses.replace(config, linear=True)
  missing = kind.table(config).shapes.keys() - tensors.keys()
  dtype = next(iter(tensors.values())).dtype
  added = {
    name: constant(kind.table(config).shapes[name], dtype)
    for name in sorted(missing)
    if "linear_proj" in name
  }
  notes.append(f"The linear branch is missing: {len(added)} linear_proj tensors were set to zero.")
  return config, {**tensors, **added}


def constant(shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
  """A tensor of zeros."""
  return Tensor(shape, dtype, lambda row=None: np.zeros(shape if row is None else shape[1:], dtype))


# ---- hfjax folders ----


def recorded_semantics(
  kind: Kind,
  config: Any,
  info: Mapping[str, Any],
  notes: list[str],
  variant: str | None = None,
  preset: str | None = None,
) -> tuple[str | None, str | None]:
  """Variant and preset of an hfjax folder: those given, else what its config.json records.

  The preset is inferred, with a note, if none is recorded, or if the variant that is given changes
  the architecture that it was recorded for.
  """
  if kind.name != "dit":
    return None, None
  variant = variant or info["variant"]
  if preset is None and VARIANTS[variant].dense != config.linear:
    preset = info.get("preset")
  files = info["origin"].get("files")
  names = [*files] if isinstance(files, dict) else []
  return _semantics(config.linear, variant, preset, info["origin"].get("key"), names, notes)


def _open_hfjax(folder: Path, variant: str | None, preset: str | None) -> Part:
  kind, config, info = read_config(folder)
  verify(folder)
  arrays = our_arrays(folder, kind, config)
  tensors = named_tensors(kind.table(config), arrays, info["dtypes"])
  part = Part(kind, config, tensors, info["variant"], {**info["origin"]}, preset=info.get("preset"))
  return _with_semantics(part, info, variant, preset)


def _with_semantics(
  part: Part, info: Mapping[str, Any], variant: str | None, preset: str | None
) -> Part:
  """A part with the variant and preset that are given, else with those that `info` records."""
  notes = [*part.notes]
  variant, preset = recorded_semantics(part.kind, part.config, info, notes, variant, preset)
  config, tensors = part.config, part.tensors
  if variant is not None:
    config, tensors = _hybrid(part.kind, config, tensors, variant, notes)
  return dataclasses.replace(
    part, config=config, tensors=tensors, variant=variant, preset=preset, notes=notes
  )


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
    held = part.origin.get("tied", ())
    for copy, name in part.kind.tied.items():
      if to == "diffusers" and copy in held:  # under the names that it had there
        named[copy] = named[name] if name in held else named.pop(name)
    return [_entry(n, t, dtype or t.dtype) for n, t in named.items()], {}
  codes = {v: k for k, v in source.DTYPES.items()}
  rows, mixed = [], {}
  for leaf in table.leaves:
    names = [n for layer in table.names_of(leaf) for n in layer]
    kept = {part.tensors[n].dtype for n in names}
    wide = kept.pop()
    if kept:
      # Holds every number of all of them.
      is_double = np.dtype(np.float64) in {wide, *kept}
      wide = np.dtype(np.float64 if is_double else np.float32)
      if dtype is None:
        mixed.update({n: codes[part.tensors[n].dtype] for n in names})
    pieces = _pieces(part, table, leaf, dtype or wide)
    rows.append(write.Entry(leaf.path, table.our_shapes[leaf.path], dtype or wide, pieces))
  return rows, mixed


def _entry(name: str, tensor: Tensor, dtype: np.dtype) -> write.Entry:
  return write.Entry(
    name, tensor.shape, dtype, lambda: iter([cast_checked(_read(tensor, name), dtype, name)])
  )


def _pieces(part: Part, table: Table, leaf: Leaf, dtype: np.dtype):
  def read(name: str) -> np.ndarray:
    return cast_checked(_read(part.tensors[name], name), dtype, name)

  return lambda: table.layers_of(leaf, read)


def cast_checked(x: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
  """In another dtype; CheckpointError if that makes numbers infinite."""
  if x.dtype == dtype:
    return x
  with np.errstate(over="ignore"):
    y = x.astype(dtype)
  bad = count_not_finite(y)
  if bad and (bad := bad - count_not_finite(x)):
    raise CheckpointError(
      f"The tensor {name} holds {bad} numbers that are too large for {dtype}; leave out the dtype, "
      "which keeps theirs, or choose a wider one."
    )
  return y


def _read(tensor: Tensor, name: str) -> np.ndarray:
  """The tensor; CheckpointError if it holds NaN or infinity."""
  x = tensor.read()
  bad = count_not_finite(x)
  if bad:
    raise CheckpointError(
      f"The tensor {name} holds {bad} numbers that are NaN or infinite; the checkpoint is damaged, "
      "or its training had diverged."
    )
  return x


def count_not_finite(x: np.ndarray) -> int:
  """How many numbers are NaN or infinite."""
  if x.dtype == CASTS["bf16"]:  # by its exponent: isfinite converts, which takes ten times as long
    return int(((x.view(np.uint16) & 0x7F80) == 0x7F80).sum())
  return int(x.size - np.isfinite(x).sum())


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
      "preset": part.preset,
      "origin": dict(part.origin),
      "hashes": hashes,
    }
    if mixed:
      info["dtypes"] = mixed
    write.write_json(folder / "config.json", info)
  elif (published := part.kind.published(part.config, to)) is not None:
    write.write_json(folder / "config.json", published)


def part_folder(kind: Kind, to: str) -> str:
  """Subfolder that a model is written to: its name, its Diffusers folder, or the folder itself."""
  return {"hfjax": kind.name, "diffusers": kind.folder, "original": "."}[to]


def check_layout(target: Path, to: str):
  """Raises CheckpointError if a folder holds models in another layout than what is to be written.

  Side by side nobody could tell which of two models is meant.
  """
  folders = {kind.folder for kind in KINDS.values() if "diffusers" in kind.stems}
  held = {
    "hfjax": bool(hfjax_models(target)),
    "diffusers": any(_holds_weights(target / folder) for folder in folders),
    "original": _holds_weights(target),
  }
  other = next((layout for layout, there in held.items() if there and layout != to), None)
  if other is not None and not (to == "hfjax" and other != "hfjax"):
    raise CheckpointError(
      f"{target} holds models in the layout {other}, beside which {to} ones would not be found; "
      "write elsewhere."
    )


def _holds_weights(folder: Path) -> bool:
  if not folder.is_dir() or is_hfjax(folder):
    return False
  return any(f.suffix in (".safetensors", *source.PICKLES) for f in folder.iterdir())


TOKENIZER = Path("google", "umt5-xxl")


def copy_tokenizer(path: Path, folder: Path, to: str):
  """Takes the tokenizer's files along, if the source has them, to where `to` has them."""
  target = folder / ("tokenizer" if to == "diffusers" else TOKENIZER)
  found = next((p for p in (path / TOKENIZER, path / "tokenizer") if p.is_dir()), None)
  if found:
    shutil.copytree(found, target)
