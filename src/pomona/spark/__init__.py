"""The only room that imports PySpark: sessions, tasks on executors, DataFrames.

Nothing here decides what a stage does.
"""
