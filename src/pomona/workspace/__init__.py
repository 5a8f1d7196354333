"""The folder OUT: its layout, lock, tables, tombstones, and its copies elsewhere.

No pixels and no model; what the rows mean is decided above.
"""
