"""The file that a cluster's job names: start Pomona on the session of spark-submit."""

from pomona.cli.spark_job import main

main()
