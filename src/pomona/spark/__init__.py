"""The only package that imports PySpark: sessions, tasks on executors, DataFrames, Spark ML.

::

    session       start a session or take the active one; why Spark failed, in one line
    resources     task slots, CPU threads and GPUs of a session
    connect       addresses of Spark Connect servers
    tasks         run functions on executors; chunks of a list become files
    executors     what executors have and see: the code, the source, the folder OUT
    binary_files  photos that Hadoop reads; `load_images`
    dataframes    a column of photos gets columns beside it: features, predictions
    ml            the backbone as a Transformer of Spark ML

Nothing here decides what a stage does.
"""
