"""What paired runs say, against formulas written another way."""

import math

import numpy
import pytest
from scipy import stats

from halfstep import _statistics as S

RNG = numpy.random.Generator(numpy.random.PCG64(7))


def test_intervals_and_tests_are_those_of_scipy():
    for n in (2, 3, 8, 40):
        d, delta = list(RNG.normal(0.1, 0.4, n)), 0.5
        found = S.paired(d, delta)
        assert found["p_lower"] == pytest.approx(stats.ttest_1samp(d, -delta, alternative="greater").pvalue, rel=1e-9)
        assert found["p_upper"] == pytest.approx(stats.ttest_1samp(d, delta, alternative="less").pvalue, rel=1e-9)
        for key, level in (("interval90", 0.90), ("interval95", 0.95)):
            assert found[key] == pytest.approx(list(stats.ttest_1samp(d, 0).confidence_interval(level)), rel=1e-9)
        assert S.interval(d) == pytest.approx(found["interval95"])
        assert (found["verdict"] == "equivalent") == (max(found["p_lower"], found["p_upper"]) < 0.05)  # the interval and the two tests are one


@pytest.mark.parametrize("values, verdict", [([0.1, -0.1, 0.05, 0.0, -0.05, 0.1], "equivalent"), ([-3, -3.2, -2.9, -3.1], "worse"), ([3, 3.2, 2.9, 3.1], "better"),
                                             ([-3, 3, 1, -1], "cannot tell"), ([-1.0, -1.1, -0.9, -1.05], "cannot tell")])
def test_verdicts(values, verdict):
    assert S.paired(values, 1.0)["verdict"] == verdict


def test_the_runs_it_asks_for_find_equal_arms_equivalent_nine_times_out_of_ten():
    for sd, delta in ((0.4, 0.5), (0.4, 0.25), (1.0, 0.3)):
        n = S.runs_needed(sd, delta)
        for size, enough in ((n, True), (n - 2, False)):
            d = RNG.normal(0, sd, (40_000, size))
            half = stats.t.ppf(0.95, size - 1) * d.std(1, ddof=1) / math.sqrt(size)
            share = float(((d.mean(1) - half > -delta) & (d.mean(1) + half < delta)).mean())
            assert share > 0.88 if enough else share < 0.91, (sd, delta, size, share)
    assert abs(S.runs_needed(1.0, 0.05) - (3.29 / 0.05) ** 2) < 5  # of large n the known formula


def test_how_many_more_is_what_is_missing():
    found = S.paired([0.6, -0.5, 0.3, -0.4], 0.25)
    assert found["verdict"] == "cannot tell" and found["needed"] == S.runs_needed(found["sd"], 0.25) > 4 and found["more"] == found["needed"] - 4
    close = S.paired(list(0.99 + RNG.normal(0, 0.1, 12)), 1.0)  # enough runs for equal arms, but the difference is at the margin
    assert close["verdict"] == "cannot tell" and close["needed"] > 12 and "close to delta" in close["note"]
    hopeless = S.paired([5.0, -5.0, 4.0], 0.001)
    assert hopeless["more"] is None and "larger delta" in hopeless["note"]


def test_few_runs_that_agree_are_no_proof():
    one = S.paired([0.0], 1.0)
    assert one["verdict"] == "cannot tell" and one["more"] == 2
    assert S.paired([0.0, 0.0], 1.0)["verdict"] == "cannot tell" and S.paired([0.0, 0.0, 0.0], 1.0)["verdict"] == "equivalent"
    # 397 items: accuracy moves in steps of 0.25 points, so two equal pairs do not show a spread below a tenth of a point
    found = S.paired([0.0, 0.0], 0.1, resolution=100 / 397)
    assert found["verdict"] == "cannot tell" and found["more"] > 0
    assert S.paired([0.0] * 8, 1.0, resolution=100 / 397)["verdict"] == "equivalent"
    with pytest.raises(ValueError, match="delta is 0"):
        S.paired([1.0, 2.0], 0)


def test_resolution_is_the_spread_of_two_roundings():
    a, b = RNG.uniform(0, 50, (2, 400_000))
    assert float((a.round() - b.round() - (a - b)).std()) == pytest.approx(1 / math.sqrt(6), rel=0.01)


def test_mcnemar_is_the_binomial_test_of_what_changed():
    first, other = [1] * 30 + [0] * 10 + [1] * 9 + [0] * 2, [1] * 30 + [0] * 10 + [0] * 9 + [1] * 2
    found = S.mcnemar(first, other)
    by_hand = sum(math.comb(11, k) for k in range(12) if math.comb(11, k) <= math.comb(11, 2)) / 2**11
    assert (found["lost"], found["won"]) == (9, 2) and found["p"] == pytest.approx(by_hand)
    assert S.mcnemar(first, first)["p"] == 1.0
    with pytest.raises(ValueError, match="51 items of the first arm, 1"):
        S.mcnemar(first, [1])


def test_items_of_one_seed_are_mcnemars_statistic():
    first, other = list(RNG.integers(0, 2, 500)), list(RNG.integers(0, 2, 500))
    found = S.items([first], [other])
    z = (found["won"] - found["lost"]) / math.sqrt(found["won"] + found["lost"])
    assert found["p"] == pytest.approx(2 * stats.norm.sf(abs(z)), abs=0.01) and found["seeds"][0] == S.mcnemar(first, other)
    again = S.items([first] * 5, [other] * 5)  # the same items five times are no more evidence
    assert again["p"] == pytest.approx(found["p"]) and again["lost"] == 5 * found["lost"]


def test_worst_class():
    first, other, labels = [1, 1, 1, 1, 0, 1], [1, 1, 0, 1, 1, 1], ["a", "a", "b", "b", "c", "c"]
    assert S.worst_class([first], [other], labels) == {"label": "b", "change": -0.5, "items": 2}


def test_bootstrap_is_about_the_t_interval_and_the_same_each_time():
    d = list(RNG.normal(0.0, 0.5, 60))
    low, high = S.paired(d, 1.0)["bootstrap95"]
    assert [low, high] == S.paired(d, 1.0)["bootstrap95"] and low == pytest.approx(S.interval(d)[0], abs=0.03) and high == pytest.approx(S.interval(d)[1], abs=0.03)
