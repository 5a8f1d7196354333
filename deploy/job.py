"""Start Pomona on the session that spark-submit set up: what a cluster's job names as its file."""

from pomona.cli.spark_job import main

main()
