"""`vista simulate` for those who launch from a checkout: python scripts/simulate.py [KEY=VALUE ...]."""

import sys

from vista.cli import main

if __name__ == "__main__":
    sys.exit(main(["simulate", *sys.argv[1:]]))
