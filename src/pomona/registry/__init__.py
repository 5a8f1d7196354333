"""MLflow: tracked runs, the model registry, models as pyfunc, lineage of registered models.

No other package imports MLflow.
"""
