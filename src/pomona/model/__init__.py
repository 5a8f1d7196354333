"""Features to answers: projection, classifier, detector of the unknown, the model's folder.

Fits and judges on rows in memory. No Spark, and no stage of the pipeline.
"""
