"""The entry point that jobs set up for version 0.1 hold: `pomona.cli.spark_job`."""

from pomona.cli.spark_job import main

if __name__ == "__main__":
    main()
