"""What all rooms use: errors, tables' columns, files, URIs, object stores.

Nothing of photos, models or OUT; imports no other room.
"""
