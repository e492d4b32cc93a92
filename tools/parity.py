"""Compares hfjax with golden numbers of the published code: `python tools/parity.py DIR`.

Each file of the folder is a case; its README tells the format. A case is rebuilt from the
configuration, parameters and inputs that its file holds, run in float32 on the CPU, and every
stored output gets one row: case, array, largest error, allowed error, verdict. Verdicts are ok,
FAIL, information (not judged) and "not covered" (no code of ours answers it yet).

Exit status: 0 if nothing failed, 1 if a row failed, 2 with a sentence if the folder cannot be read
or the case is unknown.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_default_matmul_precision", "highest")

from goldens import distill, parts, rollouts  # noqa: E402
from goldens.file import Golden, Row, UnreadableError  # noqa: E402

# By the beginning of the file's name, so that a folder may hold several files of a kind.
CASES = {
  "schedule": parts.schedule,
  "embeddings": parts.embeddings,
  "block_sparse": parts.block_sparse,
  "wan_bidirectional": parts.wan_bidirectional,
  "causal_dense_rollout": rollouts.causal_dense,
  "hybrid_infer_rollout": rollouts.hybrid_infer,
  "hybrid_train_rollout": rollouts.hybrid_train,
  "dmd": distill.dmd,
  "umt5": parts.umt5,
  "vae": parts.vae,
}


def show(case: str, row: Row):
  numbers = ["-" if x is None else f"{x:.2e}" for x in (row.error, row.allowed)]
  case, array = (
    " ".join(x.split()) or "-" for x in (case, row.array)
  )  # one line, whatever it holds
  print(f"{case:24} {array:44} {numbers[0]:>9} {numbers[1]:>9} {row.verdict}", flush=True)


def run(folder: Path, case: str | None) -> int:
  """Prints the rows; the exit status, but for UnreadableError."""
  try:
    there = folder.is_dir()
  except OSError as e:
    raise UnreadableError(f"{folder} cannot be looked at ({e.strerror}); give another.") from e
  if not there:
    raise UnreadableError(f"{folder} is no folder; give one that holds golden files (*.npz).")
  files = {p.stem: p for p in sorted(folder.glob("*.npz"))}
  if not files:
    raise UnreadableError(f"{folder} holds no golden files (*.npz); give a folder that does.")
  if case is not None:
    if case not in files:
      raise UnreadableError(f"There is no case {case!r} in {folder}; it holds {', '.join(files)}.")
    files = {case: files[case]}
  failed = 0
  for name, path in files.items():
    handler = next((h for start, h in CASES.items() if name.startswith(start)), None)
    if handler is None:
      show(name, Row("-", None, None, "not covered"))
      continue
    golden = Golden(path)
    try:
      compared = tuple(handler(golden))
    except (UnreadableError, ValueError):
      raise
    except Exception as e:  # whatever a configuration of wrong types and shapes leads to
      reason = str(e).partition("\n")[0]
      raise UnreadableError(
        f"{name} cannot be rebuilt from its cfg and inputs ({type(e).__name__}: {reason}); make "
        "the file anew."
      ) from e
    if not compared:
      raise UnreadableError(f"{name} holds no output that its cfg speaks of; make the file anew.")
    for row in (*compared, *golden.rest()):
      failed += row.verdict == "FAIL"
      show(name, row)
  return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
  """Command line; the exit status."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
  parser.add_argument("folder", type=Path, metavar="DIR", help="folder of golden files")
  parser.add_argument("--case", help="only this file, by its name without .npz")
  args = parser.parse_args(argv)
  try:
    return run(args.folder, args.case)
  except (UnreadableError, ValueError) as e:
    print("parity:", " ".join(str(e).split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(main())
