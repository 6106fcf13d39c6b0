"""The laws of the sweep algebra."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resjax.errors import UserError
from resjax.sweeps import chain, choose, param, product, zipped


def sweeps(field):
    """Generates sweeps over one field and a second one that is its double."""
    values = st.lists(st.integers(), max_size=4)
    return values.map(lambda xs: [{field: x, f"{field}.double": 2 * x} for x in xs])


A, B, C = (sweeps(field) for field in "abc")


@given(A, B, C)
def test_product_is_associative(a, b, c):
    flat = list(product(a, b, c))
    assert flat == list(product(product(a, b), c)) == list(product(a, product(b, c)))


@given(A)
def test_the_empty_product_is_products_unit(a):
    assert list(product()) == [{}]
    assert list(product(product(), a)) == list(product(a, product())) == a


@given(A, A, A)
def test_chain_is_associative(a, b, c):
    assert list(chain(a, chain(b, c))) == list(chain(chain(a, b), c)) == [*a, *b, *c]


@given(A)
def test_the_empty_chain_is_chains_unit_and_products_zero(a):
    assert list(chain()) == []
    assert list(chain(chain(), a)) == list(chain(a, chain())) == a
    assert list(product(a, chain())) == list(product(chain(), a)) == []


@given(A, A, B)
def test_product_distributes_over_a_chain_on_its_left(a, b, c):
    assert list(product(chain(a, b), c)) == list(chain(product(a, c), product(b, c)))


@given(A, B)
def test_a_product_holds_every_combination_and_its_last_sweep_varies_fastest(a, b):
    assert list(product(a, b)) == [x | y for x in a for y in b]


@given(st.lists(st.tuples(st.integers(), st.text())))
def test_zipped_merges_runs_at_the_same_position(pairs):
    a, b = ([pair[i] for pair in pairs] for i in (0, 1))
    assert list(zipped(param("a", a), param("b", b))) == [{"a": x, "b": y} for x, y in pairs]


def test_zipped_refuses_sweeps_of_different_lengths():
    with pytest.raises(ValueError, match="shorter"):
        list(zipped(param("a", (1, 2)), param("b", (1,))))


@pytest.mark.parametrize("combine", [product, zipped])
def test_two_sweeps_that_set_one_field_are_refused(combine):
    with pytest.raises(ValueError, match=r"set model\.depth"):
        list(combine(param("model.depth", (8,)), param("model.depth", (20,))))


def test_a_single_run_may_be_a_plain_dict_in_a_list():
    assert list(product([{"seed": 0}], param("model.depth", (8,)))) == [
        {"seed": 0, "model.depth": 8}
    ]


def test_choices_are_made_by_name_in_the_order_of_the_names():
    choices = {"Fixup": {"model.norm": "fixup"}, "BN": {"model.norm": "batch"}}
    assert choose(choices, iter(("BN", "Fixup"))) == [choices["BN"], choices["Fixup"]]
    with pytest.raises(UserError, match=r"^no such choice: 'Fxup'; did you mean 'Fixup'\?$"):
        choose(choices, ("BN", "Fxup"))
