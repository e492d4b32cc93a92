"""Times a conversion at full size: `python tools/benchmark_convert.py --model hybrid-1.3b`.

Makes an original checkpoint of the architecture in a temporary folder (sparse files of zeros, which
take no room), converts it to an hfjax folder, and prints time and peak memory.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from hfjax.convert import dit
from hfjax.convert.registry import KINDS
from hfjax.models.presets import PRESETS, preset

SHARD_BYTES = 10 * 10**9


def make_checkpoint(folder: Path, config, code: str, size: int) -> int:
  """Writes shards whose data are a hole in the file; their bytes."""
  stem = KINDS["dit"].stems["original"]
  shards: list[dict] = [{}]
  offset = total = 0
  for name, shape in dit.table(config).shapes.items():
    nbytes = int(np.prod(shape, dtype=np.int64)) * size
    if offset + nbytes > SHARD_BYTES:
      shards.append({})
      offset = 0
    shards[-1][name] = {
      "dtype": code,
      "shape": list(shape),
      "data_offsets": [offset, offset + nbytes],
    }
    offset, total = offset + nbytes, total + nbytes
  for i, header in enumerate(shards):
    text = json.dumps(header).encode()
    data = max(e["data_offsets"][1] for e in header.values())
    number = f"-{i + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
    with (folder / f"{stem}{number}.safetensors").open("wb") as f:
      f.write(len(text).to_bytes(8, "little") + text)
      f.truncate(8 + len(text) + data)
  config_json = json.dumps(dit.published_config(config, "original"))
  (folder / "config.json").write_text(config_json)
  return total


# Another process, as its memory would otherwise be counted.
_MAKE_PICKLE = """
import json, sys, torch
shapes = json.load(sys.stdin)
dtype = {"bf16": torch.bfloat16, "float32": torch.float32}[sys.argv[2]]
held = {key: {"model." + name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
        for key in ("generator", "generator_ema")}
torch.save(held, sys.argv[1])
"""


def make_pickle(path: Path, config, dtype: str) -> int:
  """Writes weights and their averages as trainers do; bytes of the averages."""
  shapes = dit.table(config).shapes
  command = [sys.executable, "-c", _MAKE_PICKLE, str(path), dtype]
  subprocess.run(command, input=json.dumps(shapes), text=True, check=True)
  return path.stat().st_size // 2


def main(argv: list[str] | None = None) -> int:
  """Command line; the exit status is the converter's."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
  parser.add_argument("--model", default="hybrid-1.3b", choices=PRESETS)
  parser.add_argument("--dtype", default="bf16", choices=("bf16", "float32"), help="of the source")
  parser.add_argument("--pt", action="store_true", help="take averages out of a trainer's .pt file")
  parser.add_argument("--folder", type=Path, help="where to work; a temporary place by default")
  args = parser.parse_args(argv)
  code, size = {"bf16": ("BF16", 2), "float32": ("F32", 4)}[args.dtype]
  with tempfile.TemporaryDirectory(dir=args.folder) as place:
    source, target = Path(place, "source"), Path(place, "target")
    extra = []
    if args.pt:
      source, extra = Path(place, "model.pt"), ["--ema"]
      total = make_pickle(source, preset(args.model), args.dtype)
    else:
      source.mkdir()
      total = make_checkpoint(source, preset(args.model), code, size)
    tool = Path(__file__).with_name("convert_checkpoint.py")
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, tool, source, target, *extra])
    _, status, usage = os.wait4(process.pid, 0)  # of this process alone
    seconds, peak = time.perf_counter() - start, usage.ru_maxrss * 1024
  print(
    f"{args.model}, {args.dtype}: {total / 1e9:.2f} GB in {seconds:.1f} s "
    f"({total / 1e6 / seconds:.0f} MB/s), peak memory {peak / 1e9:.2f} GB"
  )
  return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
  sys.exit(main())
