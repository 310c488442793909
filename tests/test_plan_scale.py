"""tools/plan_scale.py against what can be counted by hand."""
import os
import runpy

import pytest

from tiny import ROOT

SCRIPT = 'plan_scale.py'


def test_counts_of_a_step():
    step_cost = runpy.run_path(
        os.path.join(ROOT, 'tools', SCRIPT), run_name='plan')['step_cost']
    tokens, dim = 197, 1024
    blocks = 24 * (24 * tokens * dim**2 + 4 * tokens**2 * dim)
    patches = 2 * 196 * 768 * dim
    few, many = (step_cost('ViT-L/16', 'ViT-T/16', 224, batch)
                 for batch in (2, 6))
    assert few.teacher_flop == pytest.approx(blocks + patches, rel=1e-3)
    # three passes of ViT-T, and block 18 again with gradients of its input
    student = 3 * 12 * (24 * tokens * 192**2 + 4 * tokens**2 * 192)
    assert few.rest_flop == pytest.approx(student + 2 * blocks / 24, rel=0.15)
    assert many.flop == pytest.approx(few.flop, rel=1e-3)
    assert few.teacher_parameters == pytest.approx(303e6, rel=0.01)
    assert few.trained_parameters == pytest.approx(
        5.5e6 + 2 * (192 * dim + 2 * 16 * dim), rel=0.02)
    assert few.peak < many.peak < 3 * few.peak
    assert few.saved < many.saved < many.peak
