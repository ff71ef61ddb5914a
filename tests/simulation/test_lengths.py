"""Forced lengths: the named distributions, and those of a recorded run."""

import statistics

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from rlpost.errors import ConfigError, RunError
from rlpost.simulation.lengths import DISTRIBUTIONS, make_lengths

CAP = 1024


def sample(name, seed=0, count=4000):
    length_of = make_lengths(name, cap=CAP, seed=seed)
    return [length_of(f"{n}/0") for n in range(count)]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_lengths_lie_within_the_cap_and_depend_on_seed_and_sample_only(name):
    lengths = sample(name)
    assert min(lengths) >= 1 and max(lengths) <= CAP
    assert lengths == sample(name) and lengths != sample(name, seed=1)


def test_the_lognormal_has_its_median_at_a_sixteenth_of_the_cap_and_sigma_one():
    lengths = sample("lognormal", count=20_000)
    tenths = statistics.quantiles(lengths, n=100)
    assert statistics.median(lengths) == pytest.approx(64, rel=0.05)
    assert tenths[83] / 64 == pytest.approx(2.718, rel=0.08)  # one sigma is the 84th percentile
    assert 0.001 < sum(n == CAP for n in lengths) / len(lengths) < 0.006


def test_the_bimodal_has_two_humps_and_nothing_between():
    lengths = sample("bimodal")
    long = [n for n in lengths if n >= CAP / 4]
    assert len(long) / len(lengths) == pytest.approx(0.15, abs=0.03)
    assert max(n for n in lengths if n < CAP / 4) <= 48 and statistics.mean(long) == pytest.approx(512, rel=0.05)


def test_recorded_groups_stay_together_and_are_cut_at_the_cap(tmp_path):
    (tmp_path / "rollouts").mkdir()
    rows = {"uid": ["0:0", "0:0", "0:1", "0:1"], "token_ids": [[1] * 3, [1] * 5, [1] * 40, [1] * 2000]}
    parquet.write_table(pa.table(rows), tmp_path / "rollouts" / "step-000001.parquet")
    length_of = make_lengths(f"recorded:{tmp_path}", cap=CAP, seed=0)
    groups = [(length_of(f"{n}/0"), length_of(f"{n}/1")) for n in range(50)]
    assert set(groups) == {(3, 5), (40, CAP)}


def test_what_is_no_distribution_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="lognormal, uniform, bimodal, recorded:RUN_DIR"):
        make_lengths("pareto", cap=CAP, seed=0)
    with pytest.raises(RunError, match="keep_rollouts"):
        make_lengths(f"recorded:{tmp_path}", cap=CAP, seed=0)
