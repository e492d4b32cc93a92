"""What a checkpoint is: its models, their naming and their architecture."""

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hfjax.convert import source
from hfjax.convert.registry import KINDS, Kind
from hfjax.convert.source import CheckpointError, Tensor, Tensors

# Inserted by wrappers of modules, anywhere in a name.
_INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# Put before all names, longest first.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "module.")
# Where the tensors lie in the dictionaries of trainers, in order of preference.
_WEIGHTS = ("generator", "model", "state_dict", "")
_AVERAGED = ("generator_ema", "ema", "model_ema")


def clean_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """Tensors without the infixes and prefixes of wrappers; CheckpointError if two become one."""
  cleaned: dict[str, Any] = {}
  for name, tensor in tensors.items():
    short = functools.reduce(lambda n, infix: n.replace(infix, ""), _INFIXES, name)
    if short in cleaned:
      raise CheckpointError(f"The checkpoint holds {short} twice, under names of wrapped modules.")
    cleaned[short] = tensor
  while cleaned:
    # Of most names: one without it must come out as unexpected, rather than hide what all are.
    prefix = next((p for p in _PREFIXES if 2 * _count(p, cleaned) > len(cleaned)), None)
    if prefix is None:
      break
    bare = {n.removeprefix(prefix): t for n, t in cleaned.items()}
    if len(bare) < len(cleaned):
      twice = next(n for n in cleaned if n.startswith(prefix) and n.removeprefix(prefix) in cleaned)
      raise CheckpointError(
        f"The checkpoint holds {twice.removeprefix(prefix)} twice, once after {prefix}"
      )
    cleaned = bare
  return cleaned


def _count(prefix: str, names: Iterable[str]) -> int:
  return sum(n.startswith(prefix) for n in names)


def recognise(tensors: Mapping[str, Any]) -> tuple[Kind, str] | None:
  """The model and its naming, "original" or "diffusers", by marks among the names."""
  for kind in KINDS.values():
    for style, marks in kind.marks.items():
      if all(m in tensors for m in marks):
        return kind, style
  return None


def original_names(kind: Kind, tensors: Tensors, style: str) -> dict[str, Tensor]:
  """Tensors under original names; unknown names stay, for the name table to refuse."""
  if style == "original":
    return dict(tensors)
  renamed: dict[str, Tensor] = {}
  for name, tensor in tensors.items():
    original = original_name(kind.name, kind.tied.get(name, name))
    if original in renamed:
      tensor = _tied(original, renamed[original], tensor)
    renamed[original] = tensor
  return renamed


def _tied(name: str, first: Tensor, second: Tensor) -> Tensor:
  """A tensor that a file holds under two names; read, it is CheckpointError if they differ."""
  error = CheckpointError(
    f"The checkpoint holds {name} under two names with different numbers, and one model has one of "
    "them only; remove the tensor that is not the model's."
  )
  if (first.shape, first.dtype) != (second.shape, second.dtype):
    raise error

  def read(row: int | None = None) -> np.ndarray:
    x = first.read(row)
    rows = [(x, second.read(row))] if row is not None else (
      (x[i], second.read(i)) for i in range(first.shape[0])
    )  # one at a time: an embedding takes gigabytes  # fmt: skip
    if any(a.tobytes() != b.tobytes() for a, b in rows):
      raise error
    return x

  return dataclasses.replace(first, read=read, file=None)


@dataclasses.dataclass(frozen=True)
class Group:
  """Tensors that lie together.

  path: a file, or what shards have in common. files: where they lie.
  key: where in a trainer's dictionary. averaged: whether they are moving averages of weights.
  """

  path: Path
  tensors: dict[str, Tensor]
  files: Sequence[Path]
  key: str = ""
  averaged: bool = False


def groups(path: Path, averaged: bool) -> tuple[list[Group], dict[Path, CheckpointError]]:
  """What a file or folder holds, and why some of it cannot be read.

  averaged: take moving averages of weights, from files that hold them.
  Raises CheckpointError if there is nothing to read, or if a file given by name cannot be.
  """
  if not os.path.isdir(path):
    if not os.path.lexists(path):
      raise CheckpointError(f"{path} is not there; give a file of weights or a folder of them.")
    if path.suffix == ".safetensors" and not averaged:  # this one, whatever lies beside it
      return [Group(path, source.read_safetensors(path), [path])], {}
    return [_read(path, averaged)], {}
  found: list[Group] = []
  failed: dict[Path, CheckpointError] = {}
  for folder in (path, *(path / kind.folder for kind in KINDS.values())):
    if not folder.is_dir():
      continue
    for entry in _sets(folder):
      try:
        found.append(_read(entry, averaged))
      except CheckpointError as e:
        failed[entry] = e
  if not found and not failed:
    kinds = ", ".join(("*.safetensors", *source.PICKLES))
    raise CheckpointError(f"{path} holds no weights ({kinds}); give the folder that does.")
  return found, failed


def _sets(folder: Path) -> list[Path]:
  """Pickles, and files of safetensors by what their shards have in common; folders are skipped."""
  files = sorted(f for f in folder.iterdir() if source.stem_of(f.name) and not f.is_dir())
  pickles = [f for f in files if f.suffix in source.PICKLES]
  indices = [f for f in files if f.name.endswith(source.INDEX)]
  named: set[Path] = set()
  for index in indices:
    with contextlib.suppress(CheckpointError):  # it comes again when the set is read
      named.update(folder / name for name in source.named_by(index))
  stems = {source.stem_of(f.name) for f in files if f not in named and f not in pickles}
  return [folder / f"{stem}.safetensors" for stem in sorted(filter(None, stems))] + pickles


def _read(path: Path, averaged: bool) -> Group:
  """One file, or the shards of `path`, which then is their name without numbers."""
  if path.suffix == ".safetensors":
    if averaged:
      raise CheckpointError(
        f"{path} holds one set of weights, not known as averages; leave out --ema, or give the "
        "trainer's .pt file."
      )
    stem = path.name.removesuffix(".safetensors")
    return Group(path, source.read_shards(path.parent, stem), source.shards(path.parent, stem))
  if path.suffix not in source.PICKLES:
    raise CheckpointError(
      f"{path} is neither safetensors nor a PyTorch file ({', '.join(source.PICKLES)})."
    )
  held = dict(source.nested(source.read_pickle(path)))
  wanted = _AVERAGED if averaged else (*_WEIGHTS, *_AVERAGED)
  key = next((k for k in wanted if k in held), None)
  if key is None:
    what = "averaged weights" if averaged else "weights"
    have = ", ".join(repr(k) if k else "tensors without a key" for k in held) or "no tensors"
    raise CheckpointError(f"{path} holds no {what} under a known name; it holds {have}.")
  return Group(path, source.pickle_tensors(path, held[key]), [path], key, key in _AVERAGED)


@functools.cache
def _patterns(kind_name: str) -> tuple[tuple[re.Pattern[str], str], ...]:
  """Patterns of Diffusers' names and the original templates they stand for."""
  rows = []
  for original, theirs in KINDS[kind_name].names.items():
    pattern = re.escape(theirs).replace(re.escape("{i}"), r"(?P<i>[0-9]+)")
    rows.append((re.compile(pattern + r"(?P<rest>\.[a-z]+)?"), original))
  return tuple(rows)


@functools.cache
def original_name(kind_name: str, name: str) -> str:
  """Original name of a Diffusers name; the name itself if there is none."""
  for pattern, original in _patterns(kind_name):
    match = pattern.fullmatch(name)
    if match:
      found = match.groupdict()
      return original.format(i=found.get("i")) + (found["rest"] or "")
  return name
