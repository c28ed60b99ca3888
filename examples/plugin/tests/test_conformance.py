from mcobjectives_jackknife import Jackknife

from mcobjectives.testing import check_estimator, check_objective


def test_the_objective_conforms():
    check_objective(Jackknife(k=8))


def test_the_estimator_conforms():
    check_estimator("loo")
