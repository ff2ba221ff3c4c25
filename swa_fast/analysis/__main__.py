"""``python -m swa_fast.analysis OPTIONS`` is ``swa-fast analyze OPTIONS``."""

import sys

from ..train.cli import main

if __name__ == "__main__":
    sys.exit(main(["analyze", *sys.argv[1:]]))
