"""What the batcher learns of its device, and the decisions it makes of it."""

import numpy as np
import pytest

from rerankq_worker.engine.scheduling.batch_time import BatchTimeModel, Budget, FairShare


def learnt(device, batches):
    pace = BatchTimeModel()
    for tokens in batches:
        pace = pace.after(tokens, device(tokens))
    return pace


def test_a_device_that_takes_some_time_for_nothing_is_learnt_though_most_batches_are_small():
    def device(tokens):
        return 0.010 + 2e-6 * tokens

    pace = learnt(device, ([600] * 10 + [16_000]) * 5)
    assert pace.predict(16_000) == pytest.approx(device(16_000), rel=0.05)
    assert pace.predict(600) == pytest.approx(device(600), rel=0.1)


@pytest.mark.parametrize("spread", [0, 0.001, 0.01, 0.1])
def test_batches_that_are_all_alike_do_not_teach_nonsense_of_others(spread):
    rng = np.random.default_rng(0)
    # Noise of a fifth in the seconds, whatever the tokens.
    pace = learnt(lambda tokens: 1e-6 * tokens * rng.uniform(0.8, 1.2), 16_000 * (1 + spread * rng.normal(size=200)))
    assert pace.predict(16_000) == pytest.approx(0.016, rel=0.2)
    assert 0 <= pace.predict(100) <= pace.predict(16_000) <= pace.predict(32_000) <= 0.032 * 1.2


@pytest.mark.parametrize(
    "device",
    [
        pytest.param(lambda tokens: 1e-9 * tokens**2, id="large batches are dearer by the token"),
        pytest.param(lambda tokens: 0.02 - 1e-6 * tokens, id="large batches are over sooner"),
    ],
)
def test_a_prediction_is_never_negative_and_never_falls_with_the_tokens(device):
    pace = learnt(device, [1_000, 8_000, 16_000] * 20)
    predicted = [pace.predict(tokens) for tokens in (0, 10, 1_000, 4_000, 16_000, 64_000)]
    assert predicted == sorted(predicted)
    assert predicted[0] >= 0


@pytest.mark.parametrize("factor", [0.25, 4])
def test_a_device_that_became_slower_or_faster_is_learnt_anew_within_fifty_batches(factor):
    pace = learnt(lambda tokens: 1e-6 * tokens, [8_000, 16_000] * 500)
    for tokens in [8_000, 16_000] * 25:
        pace = pace.after(tokens, factor * 1e-6 * tokens)
    assert pace.predict(16_000) == pytest.approx(factor * 0.016, rel=0.1)


def test_nothing_is_predicted_before_anything_was_measured():
    assert BatchTimeModel().predict(1000) == 0


def test_bulk_turns_that_come_a_little_late_still_come_to_their_share():
    turn, turns = FairShare(share=0.2), 0
    # A device that is free every 0.7 s; each turn of bulk takes 1 s.
    for now in np.arange(0, 1000, 0.7):
        if now >= turn.due_at:
            turn, turns = turn.after(now, 1.0), turns + 1
    assert turns == pytest.approx(1000 / 5, abs=2)


def test_bulk_that_was_alone_for_long_waits_for_its_turn_as_any_other():
    turn = FairShare(share=0.25)
    for now in range(100):
        turn = turn.after(float(now), 1.0)
    assert turn.due_at == 99 + 4


def calm(budget, batches):
    for _ in range(batches):
        budget = budget.after_success()
    return budget


def test_a_lowered_budget_is_doubled_after_64_batches_without_trouble_and_never_beyond_what_is_configured():
    lowered = Budget(1000, 1000).after_out_of_memory(600)
    assert lowered.now == 300
    assert [calm(lowered, batches).now for batches in (63, 64, 127, 128, 10_000)] == [300, 600, 600, 1000, 1000]


def test_trouble_begins_the_count_of_calm_batches_anew():
    lowered = calm(Budget(1000, 1000).after_out_of_memory(600), 63).after_out_of_memory(300)
    assert [calm(lowered, batches).now for batches in (0, 63, 64)] == [150, 150, 300]


@pytest.mark.parametrize(("tokens", "now"), [(1, 1), (3, 1), (700, 300), (5000, 300)])
def test_a_budget_never_rises_by_a_failure_nor_falls_below_a_token(tokens, now):
    assert Budget(1000, 300).after_out_of_memory(tokens).now == now
