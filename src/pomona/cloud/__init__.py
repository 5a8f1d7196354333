"""Jobs on other people's machines (Amazon EMR).

It starts and watches the command there; it computes nothing.
"""
