"""Laws of the order of examples: every picture gets its turns, and batch k needs no batch before it."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fusion.training.dataset import BatchOrder

ORDERS = st.builds(
    BatchOrder, st.lists(st.integers(1, 4), min_size=1, max_size=7).map(tuple), st.integers(1, 9), st.integers(0, 99)
)


@given(ORDERS)
def test_every_epoch_shows_every_picture_as_often_as_it_repeats(order):
    length, epochs = sum(order.repeats), order.batch_size
    shown = [index for k in range(length) for index in order.batch(k)]  # exactly batch_size epochs
    for epoch in range(epochs):
        seen = Counter(shown[epoch * length : (epoch + 1) * length])
        assert seen == Counter(dict(enumerate(order.repeats)))
    assert all(len(order.batch(k)) == order.batch_size for k in range(length))


@given(ORDERS, st.integers(0, 10_000))
def test_a_batch_is_a_function_of_seed_and_number(order, number):
    order.batch(3)
    assert BatchOrder(order.repeats, order.batch_size, order.seed).batch(number) == order.batch(number)


def test_seeds_and_epochs_give_other_orders():
    order = BatchOrder((1,) * 20, 20, 0)
    assert len({order.batch(0), order.batch(1), BatchOrder((1,) * 20, 20, 1).batch(0)}) == 3
