"""``python -m bilevel.compare``."""

import sys

from bilevel.compare.command import main

sys.exit(main())
