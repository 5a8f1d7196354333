"""Start Pomona on the session that spark-submit set up: what a cluster's job names as its file."""

from pomona.sparkjob import main

main()
