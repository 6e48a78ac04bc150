"""python -m jax_w4a16"""

import sys

from jax_w4a16.cli import main

sys.exit(main())
