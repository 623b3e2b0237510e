"""``python -m bench`` in a checkout, and ``python -m clipfast.bench`` anywhere."""

import sys

# by its installed name, also where this file is reached as bench/__main__.py
from clipfast.bench.cli import main

sys.exit(main())
