"""Sources, bytes, pixels: list photos, read them, decode them.

No network and no model; what is computed from pixels lives above.
"""
