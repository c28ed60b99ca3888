"""The conformance kit: checks that an objective, an estimator or a model keeps its promises, and explains failures.

    from mcobjectives.testing import check_objective

    def test_my_objective():
        check_objective(MyObjective(k=8))

It needs no test framework. Every random number comes from fixed seeds, so a verdict does not change between runs.
"""

from mcobjectives.testing.estimators import check_estimator
from mcobjectives.testing.models import check_model
from mcobjectives.testing.objectives import check_objective
from mcobjectives.testing.promises import EXEMPTABLE
from mcobjectives.testing.report import ConformanceError, Finding

__all__ = ["EXEMPTABLE", "ConformanceError", "Finding", "check_estimator", "check_model", "check_objective"]
