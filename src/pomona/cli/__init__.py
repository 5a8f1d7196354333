"""The command: parse, call, print.

No work of its own: each command is one call into the rooms below.
"""
