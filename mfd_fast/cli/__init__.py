"""The command line ``mfd-fast``."""

from mfd_fast.cli.main import main as main
