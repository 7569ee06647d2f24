"""Models and data sets, made ready as files: ``python -m molora.prepare <what>``.

One module per thing that can be done (``quickstart``, ``general_en_ko``, ``openr1_math``, ``mix``, ``convert``,
``check``); ``__main__`` is the list of them. The others are what they are made of: ``smollm2`` (a model), ``general``
(chat rows), ``maths`` (worked problems), ``hub`` (data sets), ``split`` (train and bench files), over ``rows`` (what a
row is, and when two are the same question) and ``packages`` (data that comes inside a package).
"""
