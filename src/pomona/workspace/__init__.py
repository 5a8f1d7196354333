"""The folder OUT: its layout, lock, tables, tombstones, and its copies elsewhere.

No pixels and no model; it doesn't know what the rows mean.
"""
