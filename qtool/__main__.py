"""`python -m qtool`."""

import sys

from qtool.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
