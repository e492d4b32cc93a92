"""Rows of text files: prompts, one a line or in columns with others, and captions of clips."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hfjax.data.rejects import DataError

_EXAMPLES = {"prompt": "a red square", "caption": "a red square", "file": "clip.mp4"}


def read_prompts(path: Path, bad: Callable[[str], Any]) -> list[str]:
  """Prompts of a .jsonl or .csv file (`prompt`), or of any other, one a line.

  bad: called with a sentence on each line that holds no prompt, and goes on if it returns. Empty
    lines are no fault.
  Raises DataError on what is no such file.
  """
  return [row[0] for row in read_rows(path, ("prompt",), bad)]


def read_rows(path: Path, names: Sequence[str], bad: Callable[[str], Any]) -> list[tuple[str, ...]]:
  """The named values of each line; of a file that is neither .jsonl nor .csv, the line.

  bad, errors: as in `read_prompts`.
  """
  try:
    # What is no UTF-8 becomes surrogates, so that the line can be named.
    text = path.read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff")
  except OSError as e:
    raise DataError(f"{path} cannot be read ({e.strerror}); give a text file.") from e
  kind = path.suffix.lower()
  if kind == ".csv":
    found = _csv_rows(path, text, names, bad)
  else:
    parse = _json_row if kind == ".jsonl" else lambda where, line, names: (line,)
    found = _lines(path, text, names, bad, parse)
  rows = []
  for where, row in found:
    if any("\udc80" <= c <= "\udcff" for value in row for c in value):
      bad(f"{where} is no UTF-8 text.")
    else:
      rows.append(row)
  return rows


def _lines(path, text, names, bad, parse) -> Iterator[tuple[str, tuple[str, ...]]]:
  for number, line in enumerate(io.StringIO(text, newline=None), 1):
    where = f"{path}, line {number},"
    if line := line.strip():
      try:
        yield where, parse(where, line, names)
      except DataError as e:
        bad(str(e))


def _json_row(where: str, line: str, names: Sequence[str]) -> tuple[str, ...]:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError) as e:
    raise DataError(f"{where} is no JSON: {getattr(e, 'msg', e)}.") from e
  if isinstance(row, str) and len(names) == 1:
    row = {names[0]: row}
  values = [row.get(name) if isinstance(row, dict) else None for name in names]
  for name, value in zip(names, values, strict=True):
    if not isinstance(value, str) or not value.strip():
      like = json.dumps({name: _EXAMPLES.get(name, "...") for name in names})
      raise DataError(f"{where} has no {name}; write {like}.")
  return tuple(str(v) for v in values)


def _csv_rows(path, text, names, bad) -> Iterator[tuple[str, tuple[str, ...]]]:
  rows = csv.reader(io.StringIO(text, newline=""), strict=True)
  header: dict[str, int] | None = None
  while True:
    try:
      row = next(rows, None)
    except csv.Error as e:
      error = f"{path}, line {rows.line_num}, is no CSV: {e}."
      if header is None:
        raise DataError(error) from e
      bad(error)
      continue
    if row is None:
      break
    if header is None:
      header = {name.strip().lower(): i for i, name in enumerate(row) if name.strip()}
      _check_header(path, header, names)
    elif row:
      where = f"{path}, line {rows.line_num},"
      values = tuple(row[header[n]] if header[n] < len(row) else "" for n in names)
      missing = [n for n, value in zip(names, values, strict=True) if not value.strip()]
      if missing:
        bad(f"{where} has no {missing[0]}; fill it in.")
      else:
        yield where, values
  if header is None:
    _check_header(path, {}, names)


def _check_header(path: Path, header: dict[str, int], names: Sequence[str]):
  for name in names:
    if name not in header:
      raise DataError(
        f"{path} has the columns {', '.join(header) or 'of an empty file'}; one must be `{name}`."
      )
