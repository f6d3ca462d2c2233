"""`python -m flashsvd_jax` is the `flashsvd` command."""

import sys

from flashsvd_jax.cli import main

sys.exit(main())
