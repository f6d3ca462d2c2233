"""`python -m flashsvd_jax` is the `flashsvd` command."""

import sys

from flashsvd_jax.cli import command

sys.exit(command())
