"""MLflow: tracked runs, the model registry, models as pyfunc, lineage.

No other room speaks to MLflow.
"""
