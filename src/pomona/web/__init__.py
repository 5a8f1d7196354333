"""The page that recognises fruit, as files.

No server: the service and any static host serve what is made here.
"""
