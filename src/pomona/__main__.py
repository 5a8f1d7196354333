"""``python -m pomona`` is the command ``pomona``."""

from pomona.cli.main import main

main()
