"""Batches without end, for each process its own, that go on where they were left."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from hfjax.data.rejects import DataError, Rejects
from hfjax.data.sources import Source, open_source

__all__ = ["Batches", "batches", "indices", "open_source"]

_THREADS = 4


class Batches:
  """Iterates over batches; see `batches` and `indices`."""

  def __init__(self, data: Any, about: Mapping[str, Any]):
    self._data, self._about = iter(data), dict(about)

  def __iter__(self) -> "Batches":
    return self

  def __next__(self) -> Any:
    return next(self._data)

  def get_state(self) -> dict[str, Any]:
    """Where the next batch lies, JSON-able; every process has its own if examples are skipped."""
    return {**self._about, "position": self._data.get_state()}

  def set_state(self, state: Mapping[str, Any]):
    """Goes on with the batch after those before `get_state`.

    Raises DataError on the state of other data, another seed, batch or number of processes.
    """
    if "position" not in state:
      raise DataError("The state of the data has no position; give what get_state returned.")
    for name in [*self._about, *sorted(state.keys() - self._about.keys() - {"position"})]:
      then, now = state.get(name), self._about.get(name)
      if then != now:
        raise DataError(
          f"The state of the data was saved with {name}={then}, and now it is {now}; resume with "
          "the same, or begin the data anew."
        )
    self._data.set_state(state["position"])


def batches(
  source: Source,
  batch: int,
  seed: int,
  *,
  process_index: int = 0,
  process_count: int = 1,
  prefetch: int = 2,
  text_len: int | None = None,
) -> Batches:
  """Batches of `batch` examples for this process, without end, shuffled anew in every epoch.

  All processes walk along one endless order, each taking every `process_count`-th example, so that
  none sees what another does before the epoch is over.

  Yields {"prompt": list of str}, and arrays `[b ...]`, stacked. prefetch: batches that threads read
  ahead; 0 for none. text_len: rows to which "context" is filled up with zeros.

  Raises DataError if there are too few examples, or a context is longer than `text_len`; and on
  damaged examples, unless the source was opened with on_bad="skip".
  """
  _check(len(source), batch, process_index, process_count)
  rejects = getattr(source, "rejects", None) or Rejects()
  # Before any skipping: lines that were left out of a file do not count among its examples.
  before = rejects.count

  def read(index: int) -> dict[str, Any] | None:
    try:
      return filled(source[index], text_len)
    except DataError as e:
      if rejects.add(str(e), key=index):
        warnings.warn(f"{e} It is left out.", stacklevel=2)
      if rejects.count - before >= len(source):
        raise DataError(f"All examples are bad. {rejects.report()}") from e
      return None  # which is left out

  order = grain.MapDataset.source(range(len(source))).seed(seed).shuffle().repeat()
  mine = order.slice(slice(process_index, None, process_count)).map(read)
  options = grain.ReadOptions(
    num_threads=min(_THREADS, prefetch * batch), prefetch_buffer_size=prefetch * batch
  )
  data: Any = mine.to_iter_dataset(options)  # without what was left out
  about = {"examples": len(source), "seed": seed, "batch": batch, "process_count": process_count}
  if (identity := getattr(source, "identity", None)) is not None:
    about["data"] = identity
  return Batches(data.batch(batch, batch_fn=_stack), about)


def indices(
  count: int,
  batch: int,
  seed: int,
  *,
  process_index: int = 0,
  process_count: int = 1,
  identity: str | None = None,
) -> Batches:
  """As `batches`, of numbers of examples alone, int64 `[b]`, and faster; their order is another.

  identity: of the examples, if they have one; states of others are refused.
  Of a state that `batches` gave, set_state raises DataError, and the other way round.
  """
  _check(count, batch, process_index, process_count)
  order = _Order(count, batch, seed, process_index, process_count)
  about: dict[str, Any] = {
    "examples": count, "seed": seed, "batch": batch, "process_count": process_count
  }  # fmt: skip
  about |= {"order": "permutations"} | ({} if identity is None else {"data": identity})
  return Batches(order, about)


class _Order:
  """Numbers of this process's examples, shuffled by each epoch's own seed."""

  def __init__(self, count: int, batch: int, seed: int, process_index: int, process_count: int):
    self._count, self._batch, self._next = count, batch, 0
    self._first, self._stride = process_index, process_count
    self._epoch = functools.lru_cache(2)(
      lambda epoch: np.random.default_rng([seed, epoch]).permutation(count)
    )

  def __iter__(self) -> "_Order":
    return self

  def __next__(self) -> Int[np.ndarray, "b"]:
    at = self._first + self._stride * (self._next + np.arange(self._batch))
    self._next += self._batch
    epochs, places = np.divmod(at, self._count)
    return np.concatenate([self._epoch(e)[places[epochs == e]] for e in np.unique(epochs).tolist()])

  def get_state(self) -> dict[str, int]:
    return {"next_index": self._next}

  def set_state(self, state: Mapping[str, int]):
    self._next = state["next_index"]


def _check(count: int, batch: int, process_index: int, process_count: int):
  if batch < 1 or not 0 <= process_index < process_count:
    raise DataError(
      f"Batches of {batch} are asked for by process {process_index} of {process_count}; give at "
      "least 1 example, and count processes from 0."
    )
  if count < batch * process_count:
    raise DataError(
      f"There are {count} examples, and a batch takes {batch * process_count}; give more "
      "examples, or make the batch smaller."
    )


def filled(example: dict[str, Any], text_len: int | None) -> dict[str, Any]:
  """An example whose context, if there is one, has `text_len` rows; DataError if it has more."""
  context = example.get("context")
  if context is None or text_len is None:
    return example
  if len(context) > text_len:
    raise DataError(
      f"The context of {example['prompt'][:60]!r} has {len(context)} rows, and the model takes "
      f"{text_len}."
    )
  padded = np.zeros((text_len, context.shape[1]), context.dtype)
  padded[: len(context)] = context
  return {**example, "context": padded}


def _stack(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
  found: dict[str, Any] = {"prompt": [e["prompt"] for e in examples]}
  for name in examples[0]:
    if name != "prompt":
      shapes = {e[name].shape for e in examples}
      if len(shapes) > 1:
        hint = "give text_len, " if name == "context" else ""
        raise DataError(f"Arrays of {name} differ in shape; {hint}or make the data anew.")
      found[name] = np.stack([e[name] for e in examples])
  return found
