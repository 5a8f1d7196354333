"""What every package uses: errors, the columns of tables, files, URIs, object stores.

Nothing about photos, models or OUT; it imports no other package.
"""
