"""``python -m bench`` in a checkout, and ``python -m clipfast.bench`` anywhere."""

import sys

# The import names the installed package, since this file may run as bench/__main__.py, where a relative import would
# make a second package.
from clipfast.bench.cli import main

sys.exit(main())
