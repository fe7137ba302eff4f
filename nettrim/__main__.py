"""`python -m nettrim` is the command `nettrim`."""

import sys

from nettrim.cli import main

if __name__ == "__main__":
    sys.exit(main())
