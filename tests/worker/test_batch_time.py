"""The batcher's predictions of batch times, its budget and the share of bulk."""

import numpy as np
import pytest

from rerankq_worker.engine.scheduling.batch_time import BatchTimeModel, Budget, FairShare


def fitted(device, batches):
    model = BatchTimeModel()
    for tokens in batches:
        model = model.after(tokens, device(tokens))
    return model


def test_the_fixed_time_of_a_batch_is_learned_although_most_batches_are_small():
    def device(tokens):
        return 0.010 + 2e-6 * tokens

    model = fitted(device, ([600] * 10 + [16_000]) * 5)
    assert model.predict(16_000) == pytest.approx(device(16_000), rel=0.05)
    assert model.predict(600) == pytest.approx(device(600), rel=0.1)


@pytest.mark.parametrize("spread", [0, 0.001, 0.01, 0.1])
def test_a_prediction_from_batches_of_nearly_equal_size_stays_plausible_for_others(spread):
    rng = np.random.default_rng(0)
    # Noise of a fifth in the seconds, whatever the tokens.
    model = fitted(lambda tokens: 1e-6 * tokens * rng.uniform(0.8, 1.2), 16_000 * (1 + spread * rng.normal(size=200)))
    assert model.predict(16_000) == pytest.approx(0.016, rel=0.2)
    assert 0 <= model.predict(100) <= model.predict(16_000) <= model.predict(32_000) <= 0.032 * 1.2


@pytest.mark.parametrize(
    "device",
    [
        pytest.param(lambda tokens: 1e-9 * tokens**2, id="large batches are dearer by the token"),
        pytest.param(lambda tokens: 0.02 - 1e-6 * tokens, id="large batches are over sooner"),
    ],
)
def test_a_prediction_is_never_negative_and_never_falls_with_the_tokens(device):
    model = fitted(device, [1_000, 8_000, 16_000] * 20)
    predicted = [model.predict(tokens) for tokens in (0, 10, 1_000, 4_000, 16_000, 64_000)]
    assert predicted == sorted(predicted)
    assert predicted[0] >= 0


@pytest.mark.parametrize("factor", [0.25, 4])
def test_a_prediction_follows_a_device_that_became_slower_or_faster_within_fifty_batches(factor):
    model = fitted(lambda tokens: 1e-6 * tokens, [8_000, 16_000] * 500)
    for tokens in [8_000, 16_000] * 25:
        model = model.after(tokens, factor * 1e-6 * tokens)
    assert model.predict(16_000) == pytest.approx(factor * 0.016, rel=0.1)


def test_a_prediction_is_zero_before_the_first_batch():
    assert BatchTimeModel().predict(1000) == 0


def test_bulk_turns_that_are_slightly_late_still_reach_their_share():
    turn, turns = FairShare(share=0.2), 0
    # A device that is free every 0.7 s; each turn of bulk takes 1 s.
    for now in np.arange(0, 1000, 0.7):
        if now >= turn.due_at:
            turn, turns = turn.after(now, 1.0), turns + 1
    assert turns == pytest.approx(1000 / 5, abs=2)


def test_bulk_that_was_alone_for_long_waits_no_longer_than_usual():
    turn = FairShare(share=0.25)
    for now in range(100):
        turn = turn.after(float(now), 1.0)
    assert turn.due_at == 99 + 4


def after_successes(budget, batches):
    for _ in range(batches):
        budget = budget.after_success()
    return budget


def test_a_lowered_budget_is_doubled_after_64_successful_batches_up_to_the_configured_one():
    lowered = Budget(1000, 1000).after_out_of_memory(600)
    assert lowered.now == 300
    assert [after_successes(lowered, batches).now for batches in (63, 64, 127, 128, 10_000)] == [
        300,
        600,
        600,
        1000,
        1000,
    ]


def test_an_out_of_memory_error_restarts_the_count_of_successful_batches():
    lowered = after_successes(Budget(1000, 1000).after_out_of_memory(600), 63).after_out_of_memory(300)
    assert [after_successes(lowered, batches).now for batches in (0, 63, 64)] == [150, 150, 300]


@pytest.mark.parametrize(("tokens", "now"), [(1, 1), (3, 1), (700, 300), (5000, 300)])
def test_a_budget_after_out_of_memory_is_never_higher_and_at_least_one_token(tokens, now):
    assert Budget(1000, 300).after_out_of_memory(tokens).now == now
