"""Which student block learns from which teacher block."""
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmsinger.errors import ConfigError
from mmsinger.models.distillers.layer_map import map_layers

depths = st.integers(1, 60)


@st.composite
def layers_of(draw, depth, most=None):
    return sorted(draw(st.sets(st.integers(0, depth - 1), min_size=1,
                               max_size=min(most or depth, depth))))


@given(depths, depths)
def test_last_learns_from_last(teacher, student):
    assert map_layers([teacher - 1], teacher, student) == [student - 1]


@given(depths, depths)
def test_monotone_and_in_range(teacher, student):
    mapped = map_layers(range(teacher), teacher, student)
    assert len(mapped) == teacher
    assert all(0 <= layer < student for layer in mapped)
    assert mapped == sorted(mapped)
    assert all(isinstance(layer, int) for layer in mapped)


@given(depths, depths)
def test_relative_depth_is_kept_within_half_a_block(teacher, student):
    for layer, mapped in enumerate(map_layers(range(teacher), teacher,
                                              student)):
        if mapped > 0:
            assert abs((mapped + 1) / student - (layer + 1) / teacher) \
                <= 0.5 / student + 1e-9


@given(depths)
def test_equal_depths_map_to_themselves(depth):
    assert map_layers(range(depth), depth, depth) == list(range(depth))


@given(st.integers(1, 20), st.integers(1, 6))
def test_whole_multiples(student, factor):
    """A block that ends where a student block ends is paired with it."""
    teacher = student * factor
    ends = [factor * (i + 1) - 1 for i in range(student)]
    assert map_layers(ends, teacher, student) == list(range(student))


def test_the_papers_pairs():
    # ViT-L to a 12-block student, layers 17 and 23
    assert map_layers([17, 23], 24, 12) == [8, 11]
    assert map_layers([17, 23], 24, 24) == [17, 23]


@given(st.data())
def test_order_of_the_layers_is_kept(data):
    teacher = data.draw(depths)
    layers = data.draw(layers_of(teacher))
    forward = map_layers(layers, teacher, 12)
    assert map_layers(layers[::-1], teacher, 12) == forward[::-1]


# -- the official code's map --------------------------------------------------


@given(st.data())
def test_official_map_is_one_to_one_and_in_range(data):
    teacher, student = data.draw(depths), data.draw(depths)
    layers = data.draw(layers_of(teacher, student))
    mapped = map_layers(layers, teacher, student, 'official')
    assert len(set(mapped)) == len(mapped) == len(layers)
    assert all(0 <= layer < student for layer in mapped)


@given(st.data())
def test_official_map_has_the_least_total_distance(data):
    teacher, student = data.draw(st.integers(1, 24)), \
        data.draw(st.integers(2, 7))
    layers = data.draw(layers_of(teacher, min(3, student)))

    def distance(mapped):
        return sum(abs(layer / teacher - s / (student - 1))
                   for layer, s in zip(layers, mapped))

    best = min(distance(p)
               for p in itertools.permutations(range(student), len(layers)))
    mapped = map_layers(layers, teacher, student, 'official')
    assert distance(mapped) == pytest.approx(best)


def test_official_map_may_leave_the_last_block_alone():
    assert map_layers([8, 11], 12, 12, 'official') == [7, 10]


def test_official_map_of_too_many_layers():
    with pytest.raises(ConfigError) as caught:
        map_layers([0, 1, 2], 12, 2, 'official')
    message = str(caught.value)
    assert "layer_map='official'" in message
    assert '3 teacher layers and 2 student blocks' in message
    assert "layer_map='relative'" in message
    assert len(map_layers([0, 1, 2], 12, 2)) == 3
