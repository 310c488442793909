import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmsinger.metrics.accumulators import Moments, Sample

floats = st.floats(-100, 100, width=32)


@given(st.lists(st.lists(floats, min_size=1, max_size=5), min_size=1,
                max_size=5))
def test_moments(batches):
    moments = Moments()
    for batch in batches:
        moments.add(torch.tensor(batch))
    values = [float(torch.tensor(v)) for batch in batches for v in batch]
    assert moments.count == len(values)
    assert moments.summary() == {
        'mean': pytest.approx(statistics.fmean(values), abs=1e-9),
        'std': pytest.approx(statistics.pstdev(values), abs=1e-5)}


def test_sample_holds_all_that_fits():
    sample = Sample(size=10)
    rows = torch.randn(10, 2)
    for part in rows.split(3):
        sample.add(part)
    assert torch.equal(sample.rows, rows)


def test_sample_is_bounded_seeded_and_uniform():
    counts = torch.zeros(20)
    for seed in range(600):
        sample, again = Sample(5, seed), Sample(5, seed)
        for part in torch.arange(20.).view(-1, 1).split(6):
            sample.add(part)
            again.add(part)
            assert len(sample.rows) <= 5
        assert torch.equal(sample.rows, again.rows)
        assert len(set(sample.rows.flatten().tolist())) == 5
        counts[sample.rows.flatten().long()] += 1
    # 150 expected each, standard deviation 10.6
    assert (counts - 150).abs().max() < 45
