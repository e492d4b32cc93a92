"""What cannot be used: counted and named, and either left out or the end."""

import threading
from collections.abc import Hashable
from typing import Any

NAMED = 10


class DataError(ValueError):
  """Data that cannot be read or written; its text is a sentence for the user."""


class Rejects:
  """Examples that cannot be used. Threads may add to it at the same time.

  on_bad: "fail" or "skip". count: how many there are. first: sentences on the first ten.
  """

  def __init__(self, on_bad: str = "fail"):
    """Raises DataError on another word than "fail" and "skip"."""
    if on_bad not in ("fail", "skip"):
      raise DataError(f'Bad examples are to be treated by {on_bad!r}; give "fail" or "skip".')
    self.on_bad, self.count, self.first = on_bad, 0, list[str]()
    self._seen: set[Hashable] = set()
    self._lock = threading.Lock()

  def add(self, sentence: str, key: Hashable = None) -> bool:
    """Takes one, and says whether it is among the first ten; DataError if it is to be the end.

    key: of the example, if it may come again, and then counts once.
    """
    if self.on_bad == "fail":
      raise DataError(f"{sentence} Mend that, or set on_bad to skip, to leave such ones out.")
    with self._lock:
      if key is not None and key in self._seen:
        return False
      self._seen.add(key)
      self.count += 1
      is_named = self.count <= NAMED
      self.first += [sentence] * is_named
      return is_named

  def merge(self, other: dict[str, Any]):
    """Takes what `to_json` of others gave."""
    self.count += other["count"]
    self.first = [*self.first, *other["first"]][:NAMED]

  def to_json(self) -> dict[str, Any]:
    """Count and sentences, for a file."""
    return {"count": self.count, "first": self.first}

  def report(self) -> str:
    """Lines on what was left out; empty if nothing was."""
    if not self.count:
      return ""
    several = f"{self.count} examples are" if self.count > 1 else "1 example is"
    more = [f"... and {self.count - len(self.first)} more."] * (self.count > len(self.first))
    return "\n  ".join([f"{several} left out:", *self.first, *more])
