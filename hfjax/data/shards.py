"""Folders of examples, written shard by shard, by several processes, and gone on with when cut.

A folder is a TFDS dataset of ArrayRecord files with one split, `train`. Beside them lies plan.json,
which says what is to be there. A shard appears by a rename, when it is whole, so what is there is
kept; the metadata that make the folder a dataset are written by whoever finishes the last shard.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module  # type: ignore[attr-defined]
from etils import epath
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from hfjax.data.rejects import DataError, Rejects

SPLIT = "train"
PLAN = "plan.json"
# Of a shard, if nothing else is asked for; examples that take minutes each are lost by few.
_SHARD_BYTES = 128 * 2**20
# Each example by itself; compression makes latents 8 % smaller, and reading twice as slow or more.
_OPTIONS = "group_size:1,uncompressed"
_VERSION = 1

Shape = tuple[int | None, ...]
Example = dict[str, Any]
# Yields the examples of inputs from a first to before a last one, and calls what it is given with a
# sentence on each that it leaves out.
Make = Callable[[int, int, Callable[[str], Any]], Iterable[Example]]


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a folder is to hold; two runs of equal plans give equal bytes.

  kind: "prompts", "trajectories", "videos" or "clips". count: inputs, of which bad ones may be left
    out.
  arrays: shape, None where it varies, and dtype ("float16", "float32", "bfloat16", "uint8") of
    what is in an example beside its prompt.
  about: what else decides the examples; JSON.
  per_shard: inputs of a shard; by default as many as make 128 MiB, and at most a sixteenth of all.
  command: that writes the folder; for messages.
  """

  kind: str
  count: int
  arrays: Mapping[str, tuple[Shape, str]]
  about: Mapping[str, Any]
  per_shard: int = 0
  command: str = ""

  def __post_init__(self):
    if self.count < 1:
      raise DataError(f"There are no {self.kind} to be written; give at least one.")
    if not self.per_shard:
      fits = max(1, _SHARD_BYTES // max(1, _nbytes(self.arrays)))
      object.__setattr__(self, "per_shard", min(fits, math.ceil(self.count / 16)))
    if self.per_shard < 1:
      raise DataError(f"A shard is to have {self.per_shard} examples; give 1 or more.")

  @property
  def shards(self) -> int:
    """Their number."""
    return math.ceil(self.count / self.per_shard)

  def inputs(self, shard: int) -> tuple[int, int]:
    """First input of a shard, and that after the last."""
    return shard * self.per_shard, min(self.count, (shard + 1) * self.per_shard)

  def path(self, folder: Path, shard: int) -> Path:
    """File of a shard."""
    return folder / f"{self.kind}-{SPLIT}.array_record-{shard:05d}-of-{self.shards:05d}"

  def present(self, folder: Path) -> list[int]:
    """Shards that are there."""
    return [i for i in range(self.shards) if self.path(folder, i).is_file()]

  def to_json(self) -> dict[str, Any]:
    """Everything, for a file."""
    arrays = {name: {"shape": [*s], "dtype": d} for name, (s, d) in sorted(self.arrays.items())}
    kept = {"kind": self.kind, "count": self.count, "per_shard": self.per_shard}
    rest = {"arrays": arrays, "about": dict(self.about), "command": self.command}
    return json.loads(json.dumps({"version": _VERSION, **kept, **rest}))


@dataclasses.dataclass(frozen=True)
class Written:
  """What a run leaves behind. missing: shards that other processes, or nobody yet, have written.

  examples: in the whole folder, once nothing is missing. rejects: left out of the shards there.
  """

  folder: Path
  examples: int
  missing: int
  rejects: Rejects


def write(
  folder: str | Path,
  plan: Plan,
  make: Make,
  *,
  process: tuple[int, int] = (0, 1),
  on_bad: str = "fail",
  progress: Callable[[int, int], Any] | None = None,
) -> Written:
  """Writes the shards of a process that are not there yet, and the metadata if that were the last.

  process: number and count; process i writes the shards i, i + count and so on.
  progress: called at the beginning and after each input, with how many of this process's are done,
    and how many it has.

  Raises DataError if the folder holds something else, if another run writes the same shards, on bad
  examples under on_bad="fail", and if nothing is left of the inputs. Finished shards stay.
  """
  index, count = process
  if not 0 <= index < count:
    raise DataError(f"This is process {index} of {count}; count from 0, as in 0/4 to 3/4.")
  folder = Path(folder)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except FileExistsError as e:
    raise DataError(f"{folder} is a file; give a folder to write to.") from e
  _claim(folder, plan)
  mine = range(index, plan.shards, count)
  left = [i for i in mine if not plan.path(folder, i).exists()]
  size = lambda numbers: sum(stop - start for start, stop in map(plan.inputs, numbers))
  total, done = size(mine), size(mine) - size(left)
  report = lambda n: progress(n, total) if progress else None
  report(done)
  features = _features(plan)
  for shard in left:
    _write_shard(folder, plan, shard, make, features, Rejects(on_bad), report, done)
    done += size([shard])
  missing = plan.shards - len(plan.present(folder))
  rejects = Rejects("skip")
  for path in sorted(folder.glob("left-out-*.json")):
    rejects.merge(json.loads(path.read_text()))
  examples = 0 if missing else _finish(folder, plan, features, rejects)
  return Written(folder, examples, missing, rejects)


def read_plan(folder: Path) -> dict[str, Any] | None:
  """What plan.json of a folder says; None if there is none.

  Raises DataError if it cannot be read.
  """
  path = folder / PLAN
  try:
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or found.get("version") != _VERSION:
      raise ValueError(f"it is of another version than {_VERSION}")
    return found
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as e:
    raise DataError(f"{path} cannot be read ({e}); write the folder anew elsewhere.") from e


def digest(value: Any) -> str:
  """Short name of a JSON value."""
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def batches(start: int, stop: int, size: int) -> Iterator[list[int]]:
  """Numbers from `start` to before `stop` in lists of `size`, the last one perhaps shorter."""
  if size < 1:
    raise DataError(f"Batches of {size} are asked for; give at least 1.")
  for i in range(start, stop, size):
    yield list(range(i, min(stop, i + size)))


def _nbytes(arrays: Mapping[str, tuple[Shape, str]]) -> int:
  """Bytes of an example; 64 where a length varies."""
  sizes = ((math.prod(64 if n is None else n for n in s), d) for s, d in arrays.values())
  return 256 + sum(n * {"uint8": 1, "float32": 4}.get(dtype, 2) for n, dtype in sizes)


def _claim(folder: Path, plan: Plan):
  """Writes the plan, or holds it against that which is there."""
  found, text = read_plan(folder), json.dumps(plan.to_json(), indent=1) + "\n"
  if found is None:
    if any(folder.glob("[!.]*.array_record*")):
      raise DataError(f"{folder} holds another dataset; write to a folder of its own.")
    with _beside(folder / PLAN) as path:
      path.write_text(text)
      try:
        os.link(path, folder / PLAN)
      except FileExistsError:
        pass  # another process was first
      except OSError:  # no links on this file system
        os.replace(path, folder / PLAN)
    found = read_plan(folder)
    assert found is not None
  told, wanted = _flat(found), _flat(plan.to_json())
  wrong = [k for k in sorted(told.keys() | wanted.keys()) if told.get(k) != wanted.get(k)]
  wrong = [k for k in wrong if k != "command"]
  if wrong and not any(folder.glob("*array_record*")):  # a run that came to nothing
    with _beside(folder / PLAN) as path:
      path.write_text(text)
      os.replace(path, folder / PLAN)
  elif wrong:
    told_of = ", ".join(f"{k} is {told.get(k)!r} and not {wanted.get(k)!r}" for k in wrong[:3])
    raise DataError(
      f"{folder} was begun with other settings: {told_of}. Run the command that began it "
      f"({found.get('command') or 'not recorded'}), or write to another folder."
    )


def _flat(plan: Mapping[str, Any]) -> dict[str, Any]:
  """A plan with what its parts hold beside the rest."""
  flat = {k: v for k, v in plan.items() if k not in ("about", "arrays")}
  return flat | plan.get("about", {}) | {f"array {k}": v for k, v in plan["arrays"].items()}


def _write_shard(folder, plan, shard, make, features, rejects, report, done):
  target = plan.path(folder, shard)
  path = target.with_name(f".{target.name}.unfinished")
  with _hold(path, folder, shard):
    if target.exists():  # another process has just finished it
      return
    serializer = ExampleSerializer(features.get_serialized_info())
    ready = itertools.count(done + 1)

    def reject(sentence: str):
      rejects.add(sentence)
      report(next(ready))

    with _full_disk(folder):
      writer = array_record_module.ArrayRecordWriter(str(path), _OPTIONS)
    try:
      for example in make(*plan.inputs(shard), reject):
        record = serializer.get_tf_example(features.encode_example(_packed(plan, example)))
        # By itself the order of features differs from process to process.
        with _full_disk(folder):
          writer.write(record.SerializeToString(deterministic=True))
        report(next(ready))
    finally:
      with _full_disk(folder):
        writer.close()
    sidecar = folder / f"left-out-{shard:05d}.json"
    sidecar.unlink(missing_ok=True)
    if rejects.count:
      with _beside(sidecar) as new:
        new.write_text(json.dumps(rejects.to_json(), indent=1) + "\n")
        os.replace(new, sidecar)
    with path.open("rb") as f:
      os.fsync(f.fileno())
    os.replace(path, target)


@contextlib.contextmanager
def _full_disk(folder: Path) -> Iterator[None]:
  """Errors of ArrayRecord, which raises no OSError, as sentences."""
  try:
    yield
  except RuntimeError as e:
    why = (str(e).strip().splitlines() or ["no reason was given"])[0]
    raise DataError(f"{folder} cannot be written ({why}); free space, and try again.") from e


@contextlib.contextmanager
def _hold(path: Path, folder: Path, shard: int) -> Iterator[None]:
  """Holds an unfinished file for this process; it is gone in the end."""
  with path.open("ab") as f:
    try:
      import fcntl

      fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise DataError(
        f"Another run is writing shard {shard} of {folder}; wait for it, or give each run a "
        "process number of its own."
      ) from e
    except (ImportError, OSError):
      pass  # systems without locks
    try:
      yield
    finally:
      path.unlink(missing_ok=True)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
  """A file in the same folder, to be renamed; gone in the end."""
  handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
  os.close(handle)
  os.chmod(name, 0o644)  # others may read what a dataset holds
  try:
    yield Path(name)
  finally:
    Path(name).unlink(missing_ok=True)


def _features(plan: Plan) -> Any:
  """What TFDS is told; bits of bfloat16 go as uint16, which it knows."""
  kinds: dict[str, Any] = {
    "bfloat16": np.uint16, "float16": np.float16, "float32": np.float32, "uint8": np.uint8,
  }  # fmt: skip
  features = {
    # Pixels of drawn clips become sixty times smaller; latents hardly do.
    name: tfds.features.Tensor(
      shape=shape, dtype=kinds[dtype], encoding="zlib" if dtype == "uint8" else "bytes"
    )
    for name, (shape, dtype) in plan.arrays.items()
  }
  return tfds.features.FeaturesDict({"prompt": tfds.features.Text(), **features})


def _packed(plan: Plan, example: Example) -> Example:
  """An example as TFDS takes it; DataError if it does not fit the plan or the dtype."""
  packed = {"prompt": example["prompt"]}
  for name, (shape, dtype) in plan.arrays.items():
    array = np.asarray(example[name])
    if not matches(array.shape, shape):
      raise DataError(
        f"The {name} of {example['prompt'][:60]!r} has shape {array.shape}, and {shape} is planned."
      )
    if dtype == "uint8" and array.dtype != np.uint8:
      raise DataError(
        f"The {name} of {example['prompt'][:60]!r} is of {array.dtype}, and {dtype} is planned."
      )
    with np.errstate(over="ignore"):
      cast = array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    if not np.all(np.isfinite(cast)):
      raise DataError(
        f"The {name} of {example['prompt'][:60]!r} holds numbers that are not finite in {dtype}; "
        "check the weights and the settings that made it."
      )
    if dtype == "bfloat16" and not np.array_equal(cast.astype(np.float32), array):
      raise DataError(f"The {name} of {example['prompt'][:60]!r} is more precise than {dtype}.")
    packed[name] = cast.view(np.uint16) if dtype == "bfloat16" else cast
  return packed


def matches(shape: Iterable[int | None], wanted: Iterable[int | None]) -> bool:
  """Whether a shape fits another one, where None fits any length."""
  shape, wanted = tuple(shape), tuple(wanted)
  return len(shape) == len(wanted) and all(
    a == b or a is None or b is None for a, b in zip(shape, wanted, strict=True)
  )


def _finish(folder: Path, plan: Plan, features: Any, rejects: Rejects) -> int:
  """Writes TFDS's metadata, dataset_info.json last; returns the number of examples."""
  paths = [plan.path(folder, i) for i in range(plan.shards)]
  lengths = [_length(path) for path in paths]
  if not sum(lengths):
    raise DataError(f"Nothing is left for {folder}. {rejects.report()}")
  identity = tfds.core.dataset_info.DatasetIdentity(
    name=plan.kind,
    version=tfds.core.Version("1.0.0"),
    data_dir=os.fspath(folder),
    module_name="",
  )
  info = tfds.core.DatasetInfo(builder=identity, features=features, description=plan.kind)
  info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
  template = tfds.core.ShardedFileTemplate(
    data_dir=epath.Path(folder), dataset_name=plan.kind, split=SPLIT, filetype_suffix="array_record"
  )
  split = tfds.core.SplitInfo(
    name=SPLIT,
    shard_lengths=lengths,
    num_bytes=sum(path.stat().st_size for path in paths),
    filename_template=template,
  )
  info.set_splits(tfds.core.splits.SplitDict([split]))
  with tempfile.TemporaryDirectory(prefix=".metadata.", dir=folder) as place:
    info.write_to_directory(place)
    for name in ("features.json", "dataset_info.json"):
      os.replace(Path(place) / name, folder / name)
  return sum(lengths)


def _length(path: Path) -> int:
  try:
    reader = array_record_module.ArrayRecordReader(str(path))
    try:
      return int(reader.num_records())
    finally:
      reader.close()
  except Exception as e:  # the library raises nothing narrower
    raise DataError(
      f"{path} is damaged ({e}); remove it, and run the command again, which writes it anew."
    ) from e
