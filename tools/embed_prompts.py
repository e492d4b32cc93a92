"""Encodes prompts: `python tools/embed_prompts.py --weights DIR --prompts FILE --out DIR`.

Writes a dataset of prompts with their text contexts, so that training holds no text encoder beside
its networks. Only that of --weights is loaded. What is cut short goes on with the same command.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hfjax.data import command

NAME = "embed_prompts"


def main(argv: list[str] | None = None) -> int:
  """Command line; the exit status."""
  argv = sys.argv[1:] if argv is None else argv
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--weights", required=True, metavar="DIR",
                      help="folder, repository of the Hub, or random:NAME")  # fmt: skip
  parser.add_argument("--prompts", required=True, metavar="FILE", help=".txt, .jsonl or .csv")
  parser.add_argument("--count", type=int, help="only so many prompts")
  parser.add_argument("--batch", type=int, default=8, help="prompts that are encoded at once")
  parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
  command.add_flags(parser)
  args = parser.parse_args(argv)

  def act():
    from hfjax.data import contexts
    from hfjax.data.loading import open_source

    options = command.options(args, NAME, argv, "prompts")
    source = open_source("prompts", args.prompts, on_bad=args.on_bad)
    encode = contexts.text_encoder(args.weights, args.dtype)
    loaded = getattr(encode, "loaded", None)
    known = args.weights if loaded is None else contexts.fingerprint(loaded.params)
    return contexts.write(
      args.out,
      source,
      encode,
      batch=args.batch,
      model=f"{known} {args.dtype}",
      count=args.count,
      **options,
    )

  return command.run(NAME, act)


if __name__ == "__main__":
  sys.exit(main())
