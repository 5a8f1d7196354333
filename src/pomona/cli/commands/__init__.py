"""The commands of ``pomona``, by what a person wants: a module each."""
