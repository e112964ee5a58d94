"""The state object: learning rates."""

from __future__ import annotations

from stages.models.gan import learning_rate_at


def test_the_rate_is_constant_then_falls_to_zero() -> None:
    rates = [learning_rate_at(epoch, rate=1.0, epochs=2, decay_epochs=2) for epoch in (0, 2, 3, 4, 5)]
    assert rates == [1, 1, 0.5, 0, 0]
    assert learning_rate_at(99, rate=1.0, epochs=2, decay_epochs=0) == 1
