"""The HTTP service.

It answers by a finished model and keeps nothing; no stage runs here.
"""
