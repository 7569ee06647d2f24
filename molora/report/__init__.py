"""What routers did and how runs went, as numbers, pictures and pages.

    python -m molora.report routing --model DIR --data general=FILE --data maths=FILE
    python -m molora.report run DIR [DIR …]

Data flows one way: ``observe`` runs models, ``statistics`` are pure functions of what was seen, ``pictures`` draw
numbers, ``page`` puts pictures on one HTML page; ``routing`` and ``run`` are the two commands.
"""

from molora.report.pictures import draw_routing
from molora.report.statistics import shares

__all__ = ["draw_routing", "shares"]
