"""`python -m vrpo`, the same as the `vrpo` command."""

import sys

from vrpo.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
