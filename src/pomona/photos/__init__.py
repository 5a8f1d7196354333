"""Photos: list a source, read bytes, decode pixels, inspect, take a subset, render fruit.

No network and no model; what is computed from pixels lives above.
"""
