"""What a checkpoint is: its models, their naming and their architecture."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfjax.convert import source
from hfjax.convert.registry import KINDS, Kind
from hfjax.convert.source import CheckpointError, Tensor, Tensors

# Inserted by wrappers of modules, anywhere in a name.
_INFIXES = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
# Put before all names, longest first.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "module.")
# Where the tensors lie in the dictionaries of trainers, in order of preference.
_WEIGHTS = ("generator", "model", "state_dict", "", "generator_ema")
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
    prefix = next((p for p in _PREFIXES if all(n.startswith(p) for n in cleaned)), None)
    if prefix is None:
      break
    cleaned = {n.removeprefix(prefix): t for n, t in cleaned.items()}
  return cleaned


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
    renamed.setdefault(original_name(kind.name, kind.tied(name)), tensor)
  return renamed


def groups(path: Path, averaged: bool) -> dict[str, dict[str, Tensor]]:
  """Sets of tensors that lie together, by what to call them: files, shards, folders.

  averaged: take moving averages of weights where a file holds them beside the weights.
  Raises CheckpointError if there is nothing to read.
  """
  if path.is_file():
    return {str(path): _read_file(path, averaged)}
  if not path.is_dir():
    raise CheckpointError(f"{path} is not there; give a file of weights or a folder of them.")
  found: dict[str, dict[str, Tensor]] = {}
  for folder in (path, *(path / kind.folder for kind in KINDS.values())):
    if not folder.is_dir():
      continue
    files = sorted(folder.glob("*.safetensors"))
    stems = sorted({re.sub(r"-\d+-of-\d+$", "", f.stem) for f in files})
    for stem in stems:
      found[str(folder / stem)] = source.read_shards(folder, stem)
    for file in sorted(f for f in folder.iterdir() if f.suffix in source.PICKLES):
      found[str(file)] = _read_file(file, averaged)
  if not found:
    kinds = ", ".join(("*.safetensors", *source.PICKLES))
    raise CheckpointError(f"{path} holds no weights ({kinds}); give the folder that does.")
  return found


def _read_file(path: Path, averaged: bool) -> dict[str, Tensor]:
  if path.suffix == ".safetensors":
    return source.read_safetensors(path)
  if path.suffix not in source.PICKLES:
    raise CheckpointError(
      f"{path} is neither safetensors nor a PyTorch file ({', '.join(source.PICKLES)})."
    )
  held = dict(source.nested(source.read_pickle(path)))
  wanted = _AVERAGED if averaged else _WEIGHTS
  key = next((k for k in wanted if k in held), None)
  if key is None:
    what = "averaged weights" if averaged else "weights"
    have = ", ".join(repr(k) for k in held) or "no tensors"
    raise CheckpointError(f"{path} holds no {what} under a known name; it holds {have}.")
  return source.pickle_tensors(path, held[key])


@functools.cache
def _patterns(kind_name: str) -> tuple[tuple[re.Pattern[str], str], ...]:
  """Patterns of Diffusers' names and the original templates they stand for."""
  rows = []
  for original, theirs in KINDS[kind_name].names.items():
    pattern = re.escape(theirs).replace(re.escape("{i}"), r"(?P<i>\d+)")
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
