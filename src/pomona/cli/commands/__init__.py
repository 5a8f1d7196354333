"""The commands, a module for each group of ``pomona --help``."""
