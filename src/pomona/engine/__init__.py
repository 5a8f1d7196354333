"""Who runs the tasks of a stage: what tasks and engines promise, and the engine of processes.

No task is defined here, and no Spark: its engine is `pomona.spark.engine`.
"""
