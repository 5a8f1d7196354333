"""The stages, each from table to table: extract, reduce, train, report, predict, finetune.

No printing and no options of the command line.
"""
