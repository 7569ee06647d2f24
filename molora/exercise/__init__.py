"""Two stages or one, a mixture or one LoRA: ``python -m molora.exercise``, see ``__main__``.

``plan`` decides what is trained, ``comparison`` says what came of it.
"""
