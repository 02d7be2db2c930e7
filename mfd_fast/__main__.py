"""``python -m mfd_fast`` is ``mfd-fast``; torchrun needs a module."""

from mfd_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
