"""Erase photos from OUT and all that was made of them, and keep them out.

What is erased by hand elsewhere is listed in docs/privacy.md.
"""
