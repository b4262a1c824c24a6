"""How the batch budget is measured, on an engine with a stated speed and a clock of its own."""

import math

import numpy as np
import pytest
import tiny_checkpoints
from hypothesis import given
from hypothesis import strategies as st

from rerankq.ledger.lease_policy import LeasePolicy
from rerankq_worker import engine
from rerankq_worker.engine.models.calibration import (
    BUDGETS,
    LEVEL,
    PATIENCE_S,
    levelling_point,
    measure,
    seconds_per_token,
)
from rerankq_worker.engine.scheduling.in_flight import InFlightBatches
from rerankq_worker.engine.scheduling.ticket import SharedPair
from rerankq_worker.engine.stub import StubEngine

CPU = BUDGETS["cpu"]


class Device(StubEngine):
    """Takes a fixed time for each batch and more for each token, by its own clock; holds so many tokens."""

    def __init__(self, *, per_batch_s, per_token_s, holds=10**9, fits=math.inf, slowed=()):
        super().__init__(sleep=self.spend)
        self.now, self.tried, self.released = 0.0, [], 0
        self.per_batch_s, self.per_token_s, self.holds = per_batch_s, per_token_s, holds
        self.fits, self.slowed = fits, list(slowed)

    def spend(self, _):
        tokens = self.tried[-1]
        slowness = self.slowed.pop(0) if self.slowed else 1
        self.now += slowness * (self.per_batch_s + tokens * self.per_token_s)

    def forward(self, batch):
        self.tried.append(sum(pair.length for pair in batch))
        if self.tried[-1] > self.holds:
            raise MemoryError
        return super().forward(batch)

    def release_memory(self):
        self.released += 1

    def most_tokens(self, batch):
        assert len(batch) == 2, "judged by the smallest batch"
        return self.fits

    def measured(self, *, patience_s=60.0):
        return measure(self, CPU, patience_s=patience_s, clock=lambda: self.now)


@given(st.dictionaries(st.integers(1, 10**6), st.floats(0.1, 1e7), min_size=1))
def test_the_levelling_point_is_the_smallest_budget_that_is_good_enough(throughput):
    found = levelling_point(throughput)
    assert throughput[found] >= LEVEL * max(throughput.values())
    assert all(throughput[smaller] < LEVEL * max(throughput.values()) for smaller in throughput if smaller < found)


def test_levelling_point_rejects_no_measurements():
    with pytest.raises(ValueError, match="no budget"):
        levelling_point({})


@pytest.mark.parametrize(("per_batch_s", "found"), [(0.0, 512), (0.04, 1024), (0.08, 2048), (1.0, 4096)])
def test_the_fixed_time_of_a_batch_decides_the_budget(per_batch_s, found):
    # A token takes a millisecond; the twin is the formula: tokens ÷ (fixed + tokens × each).
    throughput = Device(per_batch_s=per_batch_s, per_token_s=1e-3).measured()
    assert throughput == pytest.approx({budget: budget / (per_batch_s + budget * 1e-3) for budget in CPU})
    assert levelling_point(throughput) == found


def test_the_measurement_ignores_batches_that_other_programs_slow_down():
    quiet = Device(per_batch_s=0.03, per_token_s=1e-3)
    busy = Device(per_batch_s=0.03, per_token_s=1e-3, slowed=[5, 1, 9, 2, *[1] * 4, *[7] * 12])
    assert busy.measured() == pytest.approx(quiet.measured())


@pytest.mark.parametrize("patience_s", [0.1, 2.0, 6.0])
def test_the_measurement_ends_in_time_and_runs_one_batch_at_least(patience_s):
    device = Device(per_batch_s=0.0, per_token_s=1e-3)
    assert device.measured(patience_s=patience_s)
    # A single batch, where it alone takes longer.
    assert device.now <= max(patience_s, 0.512) + 1e-9


def test_a_budget_that_does_not_fit_into_memory_is_not_chosen_and_not_tried_again():
    device = Device(per_batch_s=1.0, per_token_s=1e-3, holds=2048)
    assert levelling_point(device.measured()) == 2048
    assert device.tried.count(4096) == device.released == 1


@pytest.mark.parametrize("fails_at", [1024, 2048])
def test_a_budget_that_no_longer_fits_takes_the_larger_ones_with_it(fails_at):
    class Shared(Device):
        def forward(self, batch):
            # Others on the device take memory after the first round, in which every budget fitted.
            if len(self.tried) == len(CPU):
                self.holds = fails_at - 1
            return super().forward(batch)

    device = Shared(per_batch_s=1.0, per_token_s=1e-3)
    assert max(device.measured()) == fails_at // 2
    assert device.tried[len(CPU) :].count(fails_at) == device.released == 1


@pytest.mark.parametrize(("fit", "largest"), [(1500, 1024), (1024, 1024), (1023, 512)])
def test_budgets_above_the_estimate_of_free_memory_are_not_tried(fit, largest):
    device = Device(per_batch_s=1.0, per_token_s=1e-3, fits=fit)
    assert max(device.measured()) == largest
    assert max(device.tried) == largest


def test_the_measurement_raises_errors_other_than_out_of_memory():
    class Broken(Device):
        def forward(self, batch):
            logits = super().forward(batch)
            if len(self.tried) == 3:
                raise RuntimeError("device-side assert triggered")
            return logits

    with pytest.raises(RuntimeError, match="assert"):
        Broken(per_batch_s=0.0, per_token_s=1e-3).measured()


def test_the_measurement_starts_no_batch_that_would_end_too_late():
    device = Device(per_batch_s=0.0, per_token_s=1e-3)
    device.measured(patience_s=3.0)
    assert device.tried == [512, 1024], "2048 tokens more would end after 3.6 s"


def test_an_automatic_budget_is_the_levelling_point_and_a_default_one_is_not_measured(monkeypatch):
    device = Device(per_batch_s=0.0, per_token_s=0.0)
    device.device = "cpu"
    asked = {}

    def measured(of, budgets, **options):
        asked.update(options, of=of, budgets=budgets)
        return {512: 700.0, 1024: 960.0, 2048: 1000.0}

    monkeypatch.setattr(engine, "_load_stub", lambda *_: device)
    monkeypatch.setattr(engine, "measure", measured)
    assert engine.load("stub", max_batch_tokens="auto").max_batch_tokens == 1024
    assert asked == {"of": device, "budgets": CPU, "patience_s": PATIENCE_S["cpu"]}
    asked.clear()
    engine.load("stub", max_batch_tokens="default")
    engine.load("stub")
    assert not asked


def test_the_measurement_raises_where_the_smallest_batch_does_not_fit():
    device = Device(per_batch_s=0.0, per_token_s=1e-3, holds=10)
    with pytest.raises(MemoryError):
        device.measured()


def test_an_automatic_budget_is_one_of_those_measured_and_a_stub_has_none_to_measure(tmp_path):
    tiny = str(tiny_checkpoints.write("bert", tmp_path))
    found = engine.load(tiny, "cpu", "float32", runtime="torch", max_batch_tokens="auto")
    assert found.max_batch_tokens in CPU
    assert np.isfinite(found.score([("q", "c")])).all()
    assert engine.load("stub", max_batch_tokens="auto").max_batch_tokens == engine.load("stub").max_batch_tokens


def test_a_template_longer_than_the_measured_pairs_does_not_fail_the_measurement():
    class Wordy(StubEngine):
        def tokenise(self, query, chunks, *, max_length=None, **options):
            if max_length is not None and max_length < 300:
                raise ValueError(f"max_length {max_length} leaves no room beside 299 special tokens")
            return super().tokenise(query, chunks, max_length=max_length, **options)

    assert set(measure(Wordy(seconds_per_token=0), (512, 1024), patience_s=5)) == {512, 1024}


def test_the_first_batch_is_predicted_by_a_token_timed_before_it():
    clock = [0.0]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    engine = StubEngine(seconds_per_token=0.5, sleep=sleep)
    measured = seconds_per_token(engine, clock=lambda: clock[0])
    assert measured == pytest.approx(0.5)
    assert clock[0] < 20, "a token that takes half a second must not keep a worker from starting"
    in_flight = InFlightBatches(engine, lambda: clock[0], measured)
    seen = []
    engine._sleep = lambda seconds: (seen.append(in_flight.oldest), sleep(seconds))
    (pair,) = engine.tokenise("q", ["word " * 200])
    in_flight.launch([SharedPair(pair, pair.length, None)], pair.length)
    ((_, predicted),) = seen
    assert predicted == pytest.approx(0.5 * pair.length)
    in_flight.finish_oldest()
    assert in_flight.time_model.predict(100) == pytest.approx(50), "measured batches count from then on"
    assert not LeasePolicy.hangs(10 * predicted - 1, predicted)
    assert LeasePolicy.hangs(10 * predicted + 1, predicted)
