"""Conformance: the golden vectors, and running any implementation through them, which needs NumPy alone.

`drivers`, `check` and `new_method` are about refpeft itself, and import it.

from refpeft.conformance import conform, cases, report
print(report.text(conform(Mine(), cases())))
"""

from . import report
from .parametrize import parametrize_with_vectors
from .programs import Program
from .results import Results
from .runner import Implementation, Report, Verdict, conform
from .vectors import Case, cases

__all__ = [
    "Case",
    "Implementation",
    "Program",
    "Report",
    "Results",
    "Verdict",
    "cases",
    "conform",
    "parametrize_with_vectors",
    "report",
]
