"""Models and data sets, made ready as files: ``python -m molora.prepare <what>``.

One module per thing that can be prepared (``quickstart``, ``mix``); ``__main__`` is the list of them. The others are
their sources: ``smollm2`` (a model), ``general`` (chat rows), ``maths`` (worked problems), over ``rows`` (what a row
is, and when two are the same question) and ``packages`` (data that comes inside a package).
"""
