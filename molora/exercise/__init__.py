"""Two stages or one, a mixture or one LoRA: ``python -m molora.exercise``, see ``__main__``."""
