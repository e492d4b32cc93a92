"""Makes videos from prompts: `python -m hfjax.sample --weights=DIR --prompt="..."`.

Each video is written while it is made, and can be watched meanwhile. Ctrl-C ends it after the chunk
that is under way, and says how to go on; a second one stops at once. Beside each video lies a JSON
file that says how it was made.

Exit status: 0 if all is well, 1 if something failed on the way, 2 if the command makes no sense.
"""

import signal
import sys


def main(argv: list[str] | None = None) -> int:
  """Command line; the exit status."""
  from hfjax.sampling import command  # takes seconds

  return command.main(sys.argv[1:] if argv is None else argv, __doc__ or "")


if __name__ == "__main__":
  # Until there is something to keep, both end the process at once.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  sys.exit(main())
