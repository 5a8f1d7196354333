"""Jobs on Amazon EMR: submit, watch, read logs, tear the stack down.

::

    stack     find a stack of deploy/emr/template.yaml; AWS errors become one line
    submit    upload the entry script and the weights, start `pomona run` as a job
    jobs      state of one job or of the last ones, waiting, logs
    teardown  delete the jobs, objects, security groups and the stack, and nothing else

This package starts and watches commands on EMR; it computes nothing. It needs the extra ``aws``
(boto3). The job itself starts in `pomona.cli.spark_job`.
"""
