"""The command: parse, call, print. No work of its own: it calls the rooms below."""
