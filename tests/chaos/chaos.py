"""Is every accepted job answered, and rightly, while workers, Redis and the network are killed, hung and cut?

    python tests/chaos/chaos.py [--seed 1] [--jobs 2000] [--kills 12] [--sentinel] [--fsync everysec] [--json] …

Workers are killed and hung; Redis is killed and hung, and its clock is set; the network is cut, or swallows what is
sent. With ``--sentinel`` Redis is a master with a replica, and each of its deaths and hangs a failover.

Producer processes submit jobs (interactive and bulk, of several tenants, with copies, deadlines, cancellations, one
tenant's flood and one job that kills its worker) while a schedule made from the seed is carried out. Then every journal
is held against the rankings that the same jobs get alone. Exit status 1 if a promise of ``docs/reliability.md`` was
broken. The same seed makes the same jobs and the same blows; what they hit is up to the machine.
"""

from __future__ import annotations

import argparse
import heapq
import json
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
from scene import verdict  # first: it puts gear on the path

from gear.report import keep, machine  # isort: skip
from gear.workers import forget_settings  # isort: skip
from forked_processes import interpreter
from scene.actors import Clock, Producers, RedisServer, WatchedRedis, Worker, leftovers
from scene.alone import rank_alone
from scene.proxy import Proxy
from scene.schedule import Blow, Order, Shape, blows, orders, seconds_per_token
from scene.watching import Orphans, Watch

LOOK_EVERY_S = 0.1
# How long a blow waits for a worker that holds some jobs; and how long all may take after the last blow.
WAIT_FOR_JOBS_S, PATIENCE_S = 5.0, 240.0
WORTH_A_BLOW = 4


# Seconds for which a former master may take itself for the master; docs/reliability.md says so.
SPLIT_BRAIN_S = 2.0


class Run:
    """One run: carries out the schedule, tends the workers, and notes what became of the jobs they held."""

    def __init__(
        self,
        server: RedisServer | WatchedRedis,
        clock: Clock | None,
        workers: list[Worker],
        proxies: list[Proxy],
        planned: list[Blow],
    ) -> None:
        self._server = server
        self._clock = clock
        self._workers = workers
        self._proxies = proxies
        self._began = time.monotonic()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self.watch = Watch(server.url)
        self.lost: list[Orphans] = []
        self.redis_deaths: list[float] = []
        self.split_brains: list[float] = []
        self._failing_over = False
        self.cuts: list[tuple[float, float]] = []
        self.holes: list[tuple[float, float]] = []
        self.freezes: list[tuple[float, float]] = []
        self.clock_steps: list[float] = []
        self.outages: list[tuple[float, float]] = []
        self.worker_deaths = 0
        for blow in planned:
            self._at(blow.at_s, lambda blow=blow: self._strike(blow, self.now() + WAIT_FOR_JOBS_S))

    def now(self) -> float:
        return time.monotonic() - self._began

    def over(self) -> bool:
        return not self._due

    def step(self) -> None:
        """Do what is due, and look round."""
        while self._due and self._due[0][0] <= self.now():
            heapq.heappop(self._due)[2]()
        self.worker_deaths += sum(worker.supervise() for worker in self._workers)
        if self._failing_over and self._server.replaced():
            # One that was back before its replicas left it goes on accepting, until it misses them.
            self._failing_over = False
            self._note_split_brain()
        self.watch.look_after(self.lost)
        time.sleep(LOOK_EVERY_S)

    def _at(self, at_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._due, (at_s, len(self._due) + id(act), act))

    def _strike(self, blow: Blow, latest: float) -> None:
        match blow.kind:
            case "redis":
                self._kill_redis(blow)
            case "freeze":
                self._freeze_redis(blow)
            case "clock":
                self._set_the_clock(blow)
            case "partition":
                self._part(blow, Proxy.cut, Proxy.heal, self.cuts, "cut off")
            case "hole":
                self._part(blow, Proxy.swallow, Proxy.forward, self.holes, "swallowed what is sent by")
            case _:
                if not self._hit_a_worker(blow, at_any_rate=self.now() >= latest):
                    self._at(self.now() + LOOK_EVERY_S, lambda: self._strike(blow, latest))

    def _hit_a_worker(self, blow: Blow, *, at_any_rate: bool) -> bool:
        """Hit the worker that the schedule names, or the next one that is up and holds jobs."""
        for turn in range(len(self._workers)):
            worker = self._workers[(blow.worker + turn) % len(self._workers)]
            token = worker.token
            if worker.hung or not self.watch.is_registered(token):
                continue
            held = self.watch.held_by(token)
            if len(held) < WORTH_A_BLOW and not at_any_rate:
                continue
            at = worker.kill() if blow.kind == "kill" else worker.pause()
            if at is None:
                continue
            # Those it held when the blow fell, not those that it ended between our look and the blow.
            still = self.watch.held_by(token)
            orphans = Orphans(blow.kind, round(self.now(), 1), at, {one: held.get(one, n) for one, n in still.items()})
            self.lost.append(orphans)
            tell(self.now(), f"{'killed' if blow.kind == 'kill' else 'hung'} {worker.name}, {len(still)} jobs running")
            if blow.kind == "hang":
                self._at(self.now() + blow.length_s, worker.resume)
            return True
        return False

    def _kill_redis(self, blow: Blow) -> None:
        died = self._server.kill()
        self._failing_over = True
        self.redis_deaths.append(died)
        tell(self.now(), f"killed redis for {blow.length_s:.1f} s")

        def again() -> None:
            self._server.start()
            self._note_split_brain()
            self.outages.append((died, time.time()))

        self._at(self.now() + blow.length_s, again)

    def _freeze_redis(self, blow: Blow) -> None:
        try:
            at = self._server.freeze()
        except RuntimeError:  # killed a moment ago, where the schedule is late: as soon as it is back
            self._at(self.now() + LOOK_EVERY_S, lambda: self._freeze_redis(blow))
            return
        self._failing_over = True
        if isinstance(self._server, WatchedRedis):
            # What had not reached the replica by then is lost with the failover.
            self.redis_deaths.append(at)
        tell(self.now(), f"hung redis for {blow.length_s:.1f} s")

        def thaw() -> None:
            self._server.thaw()
            self._note_split_brain()
            self.freezes.append((at, time.time()))

        self._at(self.now() + blow.length_s, thaw)

    def _note_split_brain(self) -> None:
        """A master that is back before Sentinel told it of its successor forgets what it accepts until then."""
        if isinstance(self._server, WatchedRedis):
            self.split_brains.append(time.time() + SPLIT_BRAIN_S)

    def _set_the_clock(self, blow: Blow) -> None:
        if self._clock is not None:
            self._clock.step(round(blow.length_s))
            self.clock_steps.append(time.time())
            tell(self.now(), f"set the clock of redis by {blow.length_s:+.0f} s")

    def _part(
        self,
        blow: Blow,
        begin: Callable[[Proxy], None],
        end: Callable[[Proxy], None],
        told: list[tuple[float, float]],
        what: str,
    ) -> None:
        struck = self._proxies if blow.worker is None else [self._proxies[blow.worker]]
        at = time.time()
        for proxy in struck:
            begin(proxy)
        tell(self.now(), f"{what} {len(struck)} workers for {blow.length_s:.1f} s")

        def over() -> None:
            for proxy in struck:
                end(proxy)
            told.append((at, time.time()))

        self._at(self.now() + blow.length_s, over)


def tell(at_s: float, what: str) -> None:
    print(f"{at_s:7.1f} s  {what}", file=sys.stderr, flush=True)


def write_orders(folder: Path, made: list[Order]) -> None:
    by_producer = defaultdict(list)
    for order in made:
        job = order.job.model_dump(mode="json", exclude_defaults=True)
        by_producer[order.producer].append(json.dumps(order._asdict() | {"job": job}))
    for producer, lines in by_producer.items():
        (folder / f"producer-{producer}.orders").write_text("\n".join(lines), encoding="utf-8")


def carry_out(args: argparse.Namespace, shape: Shape, folder: Path) -> dict[str, Any]:
    made = orders(args.seed, shape)
    write_orders(folder, made)
    tell(0, f"{len(made)} jobs; ranking each alone")
    alone = rank_alone(made, args.model)
    environment = {
        "RERANKQ_MODEL": args.model,
        "RERANKQ_DTYPE": "float32",
        "RERANKQ_LEASE_S": str(args.lease),
        "RERANKQ_MAX_ATTEMPTS": str(args.attempts),
        **dict(setting.split("=", 1) for setting in args.set),
    }
    with ExitStack() as open_:
        clock = Clock.made(folder) if shape.clock_steps else None
        server: RedisServer | WatchedRedis
        if args.sentinel:
            server, proxies = WatchedRedis(folder, fsync=args.fsync), []
            open_.callback(server.close)
            urls_of_workers = [server.url] * shape.workers
        else:
            server = RedisServer(folder / "redis", fsync=args.fsync, clock=clock)
            open_.callback(server.close)
            proxies = [Proxy(server.port) for _ in range(shape.workers)]
            for proxy in proxies:
                open_.callback(proxy.close)
            urls_of_workers = [f"redis://127.0.0.1:{proxy.port}/0" for proxy in proxies]
        workers = []
        for number, url in enumerate(urls_of_workers):
            workers.append(Worker(f"w{number}", url, environment, forked=args.forked))
            open_.callback(workers[-1].close)
        open_.callback(lambda: [worker.wait() for worker in workers])
        open_.callback(lambda: [worker.ask_to_stop() for worker in workers])
        watch = Watch(server.url)
        open_.callback(watch.close)
        _until(lambda: all(watch.is_registered(worker.token) for worker in workers), 120, workers)
        urls = environment | {"RERANKQ_BROKER_URL": server.url}
        patience_s = shape.span_s + PATIENCE_S + 10 * args.lease
        starts_at = time.time() + 1
        producers = Producers(folder, urls, starts_at=starts_at, patience_s=patience_s, forked=args.forked)
        open_.callback(producers.close)
        run = Run(server, clock, workers, proxies, blows(args.seed, shape))
        open_.callback(run.watch.close)
        while producers.running() or not run.over():
            run.step()
        seconds = run.now()
        tell(seconds, "all is quiet; judging")
        events = [json.loads(line) for journal in producers.journals() for line in journal.read_text().splitlines()]
        claims = run.watch.claims({event["id"] for event in events if event["event"] == "accepted"})
        by_itself = [death for worker in workers for death in worker.died_by_itself]
    return judge(made, events, alone, run) | {
        "seconds": round(seconds, 1),
        "jobs_run_more_than_once": sum(count > 1 for count in claims.values()),
        "most_claims_of_a_job": max(claims.values()),
        "deaths_of_workers": run.worker_deaths,
        "workers_that_ended_by_themselves": by_itself,
    }


def judge(made: list[Order], events: list[dict[str, Any]], alone: dict[int, Any], run: Run) -> dict[str, Any]:
    by_order = defaultdict(list)
    excuses = [*run.redis_deaths, *run.split_brains]
    for event in events:
        by_order[event["order"]].append(event)
    wrong = {
        order.number: found
        for order in made
        if (found := verdict.faults(order, by_order[order.number], alone.get(order.number), excuses))
    }
    away = [*run.outages, *run.cuts, *run.holes, *run.freezes, *((at, at) for at in run.clock_steps)]
    kills = [one for one in run.lost if one.kind == "kill" and one.claims]
    clear = [one for one in kills if not any(began - 15 < one.lost_at < ended + 15 for began, ended in away)]
    return verdict.summary(made, events, run.redis_deaths) | {
        "kills_of_workers": sum(one.kind == "kill" for one in run.lost),
        "hangs_of_workers": sum(one.kind == "hang" for one in run.lost),
        "hangs_of_redis": len(run.freezes),
        "clock_steps_of_redis": len(run.clock_steps),
        "partitions": len(run.cuts),
        "black_holes": len(run.holes),
        "jobs_running_when_killed": sum(len(one.claims) for one in kills),
        "seconds_from_a_kill_until_the_first_of_its_jobs_runs_again": verdict.spread(
            [min(one.again_s.values()) for one in clear if one.again_s]
        ),
        "seconds_from_a_kill_until_its_jobs_are_queued_again": verdict.spread(
            [seconds for one in kills for seconds in one.queued_s.values()]
        ),
        "seconds_from_a_kill_until_its_jobs_run_again": verdict.spread(times(kills)),
        "of_them_interactive": verdict.spread(times(kills, "interactive")),
        "of_them_bulk": verdict.spread(times(kills, "bulk")),
        "the_same_with_redis_in_reach_all_the_while": verdict.spread(times(clear)),
        "jobs_of_hung_workers_run_elsewhere_after_s": verdict.spread(
            times([one for one in run.lost if one.kind == "hang"])
        ),
        "recoveries": [
            {"kind": one.kind, "at_s": one.at_s, "jobs": len(one.claims), "again_s": verdict.spread(times([one]))}
            for one in run.lost
        ],
        "never_run_again": sum(len(one.waiting) for one in run.lost),
        "wrong": {str(number): found for number, found in wrong.items()},
    }


def times(lost: list[Orphans], priority: str = "") -> list[float]:
    return [
        seconds
        for one in lost
        for job_id, seconds in one.again_s.items()
        if not priority or one.priorities.get(job_id) == priority
    ]


def _until(holds: Callable[[], bool], seconds: float, workers: list[Worker]) -> None:
    ends = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > ends:
            raise RuntimeError("the workers did not start:\n" + "\n".join(worker.last_output() for worker in workers))
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2_000)
    parser.add_argument("--span", type=float, help="seconds over which all is spread; default: by the blows")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--producers", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=16, help="chunks of a job, on average")
    parser.add_argument("--kills", type=int, default=10, help="SIGKILLs of a worker")
    parser.add_argument("--hangs", type=int, default=10, help="SIGSTOPs of a worker, longer than a lease")
    parser.add_argument("--redis-kills", type=int, default=3)
    parser.add_argument("--freezes", type=int, default=3, help="SIGSTOPs of Redis")
    parser.add_argument(
        "--partitions", type=int, default=2, help="times that nothing gets through, and nothing is lost"
    )
    parser.add_argument("--holes", type=int, default=2, help="times that connections lose what is sent, for ever")
    parser.add_argument(
        "--clock-steps", type=int, default=2, help="times that Redis's clock is set; needs a C compiler"
    )
    parser.add_argument("--sentinel", action="store_true", help="failovers; without partitions, holes and clock steps")
    parser.add_argument("--lease", type=float, default=8, help="RERANKQ_LEASE_S")
    parser.add_argument("--attempts", type=int, default=3, help="RERANKQ_MAX_ATTEMPTS")
    parser.add_argument("--model", default="stub", help="`stub`, as slow as --busy wants it, or `bundled`")
    parser.add_argument("--busy", type=float, default=0.75, help="share of the run that workers would need undisturbed")
    parser.add_argument("--fsync", choices=["always", "everysec"], default="everysec")
    parser.add_argument("--set", action="append", default=[], metavar="RERANKQ_X=VALUE", help="any other setting")
    parser.add_argument(
        "--forked", action="store_true", help="fork workers and producers from a process with their libraries"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON and keep no file")
    args = parser.parse_args()
    forget_settings()
    if args.sentinel:
        # Sentinel says where the servers are: there is no place for a proxy. It suspends itself when a clock is set.
        args.partitions = args.holes = args.clock_steps = 0
    struck = args.kills + args.hangs + args.redis_kills + args.freezes + args.partitions + args.holes + args.clock_steps
    span_s = args.span or 1.25 * args.lease * struck
    shape = Shape(
        jobs=args.jobs,
        span_s=span_s,
        lease_s=args.lease,
        workers=args.workers,
        producers=args.producers,
        chunks=args.chunks,
        kills=args.kills,
        hangs=args.hangs,
        redis_kills=args.redis_kills,
        freezes=args.freezes,
        partitions=args.partitions,
        holes=args.holes,
        clock_steps=args.clock_steps,
    )
    if args.model == "stub":
        args.model = f"stub:{seconds_per_token(shape, args.busy):.2g}"
    if args.forked:
        interpreter()  # whose server lives as long as we do
    here, before = machine(), {one.pid for one in psutil.Process().children(recursive=True)}
    folder = Path(tempfile.mkdtemp(prefix="rerankq-chaos-"))
    answer: dict[str, Any] = {}
    try:
        answer = {"seed": args.seed, "fsync": args.fsync, "model": args.model, "sentinel": args.sentinel}
        answer |= shape._asdict()
        answer |= carry_out(args, shape, folder)
    finally:
        # What the producers and servers wrote is kept where something is to be found out from it.
        if answer.get("wrong") or answer.get("never_run_again"):
            print(f"journals: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    answer["processes_left_behind"] = leftovers(before)
    if args.json:
        print(json.dumps(answer))
    else:
        show(answer)
        keep("chaos.sentinel" if args.sentinel else "chaos", answer, here, quick=args.jobs < 2_000)
    return 1 if is_broken(answer) else 0


def is_broken(answer: dict[str, Any]) -> bool:
    return bool(answer["wrong"] or answer["never_run_again"] or answer["processes_left_behind"])


def show(answer: dict[str, Any]) -> None:
    for name, value in answer.items():
        if name not in {"wrong", "recoveries", "workers_that_ended_by_themselves"}:
            print(f"{name.replace('_', ' '):62} {value}")
    for death in answer["workers_that_ended_by_themselves"]:
        print(f"ended by itself: {death}")
    for number, found in list(answer["wrong"].items())[:20]:
        print(f"WRONG: order {number}: {'; '.join(found)}")


if __name__ == "__main__":
    raise SystemExit(main())
