"""``python -m clipfast``."""

import sys

from .cli import main

sys.exit(main())
