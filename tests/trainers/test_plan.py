"""What a step will take: bytes counted on real and fake tensors are the same, a process's peak is predicted, what fits is proposed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kdops.dispatch import SPECS
from tests.trainers.tiny import tiny, write_tiny, write_yaml
from trainers import plan
from trainers.cli import main
from trainers.config import Config
from trainers.config_file import load_config
from trainers.errors import InputError
from trainers.fields import parse_bytes
from trainers.footprint import Cost, StepCosts
from trainers.live_bytes import BALANCE, LiveBytes, Meter, operator_work, scratch_bytes
from trainers.methods import METHODS
from trainers.plan import Learned, Measured, Planner, Point, dynamic, learn, measure_in_child
from trainers.plan_table import verdict
from trainers.recompute import recompute, repeated_blocks

MIB = 2**20
ROOT = Path(__file__).parents[2]


def config_of(folder: Path, method: str = "facd", **train: Any) -> Config:
    return load_config(write_tiny(folder, method, **train))


def test_live_bytes_count_each_storage_once_until_it_dies() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        view, same = a[:10], a.add_(1)
        b = a * 2
        assert live.current == 8000
        del a, b
        assert live.current == 4000  # the views hold the first storage
        del view, same
        assert (live.current, live.peak) == (0, 8000)


def test_a_meter_within_another_leaves_its_peak() -> None:
    with LiveBytes() as live:
        outer = Meter(live)
        torch.zeros(1000)
        inner = Meter(live)
        small = torch.zeros(10)
        assert (inner.read().peak, inner.read().held) == (40, 40)
        assert (outer.read().peak, outer.read().held) == (4000, 40)
        del small


def test_work_is_flops_and_bytes() -> None:
    with LiveBytes() as live:
        a, b = torch.zeros(8, 16), torch.zeros(16, 4)
        before = live.work
        product = a @ b
        assert live.work - before == 2 * 8 * 16 * 4 + BALANCE * 4 * (a.numel() + b.numel() + product.numel())
        product.T.unsqueeze(0)  # a view
        assert live.work - before == 2 * 8 * 16 * 4 + BALANCE * 4 * (a.numel() + b.numel() + product.numel())


@pytest.mark.parametrize("name", sorted(SPECS))
def test_scratch_and_work_of_every_op_are_understood(name: str) -> None:
    """A raw operator's arguments are matched with those of the public function by name, forward and backward."""
    spec = SPECS[name]
    seen: list[tuple[int, float]] = []

    class Recorded(LiveBytes):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            if func.namespace == "kdops":
                out = super().__torch_dispatch__(func, types, args, kwargs)
                seen.append((scratch_bytes(func, args), operator_work(func, args, kwargs or {}, out)))
                return out
            return super().__torch_dispatch__(func, types, args, kwargs)

    sample = spec.samples[0]
    tensors = [torch.randn(shape).requires_grad_() for shape in sample.shapes]
    with FakeTensorMode(allow_non_fake_inputs=True), Recorded():
        out = spec.function(*tensors, **sample.kwargs)
        results = [r for r in (out if isinstance(out, (tuple, list)) else [out]) if r.requires_grad]
        if results:
            torch.autograd.grad([r.sum() for r in results], tensors, allow_unused=True)
    assert all(size >= 0 and work > 0 for size, work in seen)
    assert seen or not spec.raw_ops


SIMULATED = [(method, "kdops") for method in METHODS if method not in ("slkd", "sliced")] + [
    ("facd", "reference"),
    ("skd", "reference"),
]


@pytest.mark.parametrize(("method", "backend"), SIMULATED)
def test_fake_tensors_cost_what_real_ones_cost(tmp_path: Path, method: str, backend: str) -> None:
    from trainers.plan import build, run_parts

    config = config_of(tmp_path, method)
    point = Point(16, 4, False, backend)
    real, shared = run_parts(build(config, False, point.patch), config, point)
    fake, fake_shared = Planner(config, 2**40).simulate(point)
    assert fake_shared == shared
    # Fake tensors take some operators apart (torch.cdist, indexing), which may make or spare a small result.
    assert fake.peak == pytest.approx(real.peak, rel=0.01)
    assert set(fake.terms) == set(real.terms)
    for name, cost in fake.terms.items():
        assert cost.peak == pytest.approx(real.terms[name].peak, rel=0.01, abs=1024)
        assert cost.work == pytest.approx(real.terms[name].work, rel=0.01, abs=1e5)
    assert fake.student.peak == pytest.approx(real.student.peak, rel=0.01)
    assert fake.student.work == pytest.approx(real.student.work, rel=0.01)
    # The step holds what a part holds; a part alone keeps what it shares with others a little longer.
    assert all(part.peak <= 1.02 * fake.peak for part in fake.parts().values())
    assert fake.weights > fake.trained > 0


def test_the_reference_takes_more_where_it_holds_more(tmp_path: Path) -> None:
    planner = Planner(config_of(tmp_path, "facd"), 2**40)
    ours, reference = (
        planner.simulate(Point(64, 4, False, b))[0].terms["contrast"].peak for b in ("kdops", "reference")
    )
    assert reference > 2 * ours


def test_a_step_of_grey_images_has_one_channel(tmp_path: Path) -> None:
    network = {"arch": "dncnn", "features": 4, "depth": 3}
    peaks = []
    for channels in (1, 3):
        tree = tiny(tmp_path)
        tree |= {"task": "denoise", "student": network | {"image_channels": channels}}
        tree["data"]["grey"] = channels == 1
        config = load_config(write_yaml(tmp_path, tree))
        peaks.append(Planner(config, 2**40).simulate(Point(64, 4, False, "kdops"))[0].peak)
    assert 0 < peaks[0] < peaks[1]


def test_a_step_that_recomputes_holds_less(tmp_path: Path) -> None:
    planner = Planner(config_of(tmp_path, "scratch"), 2**40)
    plain, again = (planner.simulate(Point(64, 4, r, "kdops"))[0].student.held for r in (False, True))
    assert plain - again == 3 * (4 * 4 * 32 * 32 * 4)  # of each block the map (B, C, h, w) between its two convolutions


@pytest.mark.slow
def test_a_process_peak_is_predicted_within_ten_percent(tmp_path: Path) -> None:
    """From two small measured steps to one that takes some hundred MiB more."""
    planner = Planner(config_of(tmp_path, "facd"), 2**31)
    for point in (Point(512, 2, False, "kdops"), Point(256, 4, False, "reference")):
        costs, shared = planner.simulate(point)
        predicted = planner._predicted(point, costs, shared)
        measured = measure_in_child(planner.config, point).peak
        assert dynamic(costs, shared) > 32 * MIB
        assert predicted == pytest.approx(measured, rel=0.1)


def costs_of(work: float, seconds: float, peak: int = 0) -> StepCosts:
    """A step whose loss does `work` and whose student does a tenth of it."""
    student, loss = Cost(peak, seconds=seconds / 2, work=work / 10), Cost(seconds=seconds, work=work)
    return StepCosts(student, {}, {"pixel": loss}, peak, weights=0, trained=0, seconds=2 * seconds, small=peak)


def test_times_and_memory_are_learned_from_two_steps() -> None:
    """Times from the larger, part by part; memory from their difference."""
    simulated = [(costs_of(1e6, 0.0, peak), 0) for peak in (100, 300)]
    measured = [Measured(peak, 6.0, costs_of(1e6, 2.0)) for peak in (1000 + 150, 1000 + 450)]
    learned = learn(simulated, measured)
    assert [learned.besides(costs_of(1e6, 0.0, peak)) for peak in (100, 300, 500)] == [1050, 1150, 1250]
    mostly_large = dataclasses.replace(costs_of(1e6, 0.0, 500), small=300)
    assert learned.besides(mostly_large) == 1150
    timed, seconds = learned.times(costs_of(5e6, 0.0))
    assert timed.terms["pixel"].seconds == pytest.approx(10.0)
    assert timed.student.seconds == pytest.approx(5.0)
    assert seconds == pytest.approx(5 * 6.0)


def test_where_one_step_was_measured_holes_grow_as_storages_do() -> None:
    """A tiny network's two steps are one, the largest that its planner tries: predictions above it were 12 % too low."""
    learned = learn([(costs_of(1e6, 0.0, 100), 0)] * 2, [Measured(1150, 6.0, costs_of(1e6, 2.0))] * 2)
    assert [learned.besides(costs_of(1e6, 0.0, peak)) for peak in (100, 300)] == [1050, 1050 + 200 * plan.HOLES]


def test_a_step_that_takes_long_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, "scratch")
    learned = Learned((0, 0), (0, 1), (0, 1), {"student": 1e-6, "loss pixel": 0.0}, 1.0)
    monkeypatch.setattr(Planner, "_of_backend", lambda self, backend: learned)
    monkeypatch.setattr("trainers.plan.measure_in_child", lambda config, point: 1 / 0)
    point = Point(64, 4, False, "reference")
    seconds = Planner(config, 2**40).predict(point).seconds
    plan = Planner(config, 2**40, longest=0.9 * seconds).plan(point)
    assert (plan.measured, plan.seconds) == (False, seconds)
    assert "but was not run: it takes" in verdict(plan, 2**40, 0.9 * seconds)
    with pytest.raises(ZeroDivisionError):
        Planner(config, 2**40, longest=1.1 * seconds).plan(point)


def test_what_is_the_same_on_both_backends_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[Point] = []

    def measure(config: Config, point: Point) -> Measured:
        run.append(point)
        names = ["pixel"] if config.method.name == "scratch" else ["pixel", "output", "contrast"]
        teachers = {} if config.method.name == "scratch" else {"teacher": Cost(seconds=1.0)}
        terms = {name: Cost(seconds=1.0) for name in names}
        return Measured(2**20, 1.0, StepCosts(Cost(seconds=1.0), teachers, terms, 0, 0, 0, 1.0))

    monkeypatch.setattr("trainers.plan.measure_in_child", measure)
    for method, backends in (("scratch", {"kdops"}), ("facd", {"kdops", "reference"})):
        run.clear()
        planner = Planner(config_of(tmp_path, method), 2**40)
        plans = [planner.plan(Point(32, 4, False, backend)) for backend in ("kdops", "reference")]
        assert [plan.point.backend for plan in plans] == ["kdops", "reference"]
        assert {point.backend for point in run} == backends
        assert len(run) == len(set(run))


def test_a_step_is_built_on_patches_of_its_own_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks' first forward, for the adapters, else takes a process of small steps to what the config's patch needs."""
    sides = []
    sample = plan._Blanks.sample
    monkeypatch.setattr(plan._Blanks, "sample", lambda self, *key: sides.append(self.patch) or sample(self, *key))
    plan.build(config_of(tmp_path, "fitnet"), False, 48)
    assert set(sides) == {48}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_attention_at_full_resolution_fits_where_the_reference_is_refused() -> None:
    """One SKD step of a thin Restormer at patch 256, with attention between 65,536 positions: run for real."""
    config = load_config(ROOT / "benchmarks" / "plans.yaml", ["data.batch=1", "data.patch=256"])
    planner, point = Planner(config, 4 * 2**30), Point(256, 1, False, "kdops")
    found = measure_in_child(config, point)
    assert found.peak < 4 * 2**30
    assert planner.predict(point).peak == pytest.approx(found.peak, rel=0.1)
    reference = planner.plan(Point(256, 1, False, "reference"))
    assert reference.peak > 4 * 65536**2 * 4  # four maps of N x N in float32
    assert "is refused: above 4.00 GiB; most is taken by loss spatial" in verdict(reference, planner.memory, 60)


def test_proposals_halve_the_micro_batch_then_recompute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, "output")
    costs = Planner(config, 2**40).simulate(Point(64, 4, False, "kdops"))[0]
    nothing = Learned((0, 0), (0, 1), (0, 1), dict.fromkeys(costs.parts(), 0.0), 1.0)
    monkeypatch.setattr(Planner, "_of_backend", lambda self, backend: nothing)
    free = Planner(config, 2**40)

    def needs(micro: int, again: bool) -> int:
        return dynamic(*free.simulate(Point(64, micro, again, "kdops")))

    assert needs(4, False) > needs(2, False) > needs(1, False) > needs(1, True)
    for memory, again, micro in (
        (needs(4, False), False, 4),
        (needs(4, False) - 1, False, 2),
        (needs(1, False) - 1, True, next(m for m in (4, 2, 1) if needs(m, True) < needs(1, False))),
    ):
        found = Planner(config, memory).proposal("kdops", 64)
        assert found is not None
        assert found[0].point == Point(64, micro, again, "kdops")
        assert found[1] == [f"train.accumulate={4 // micro}"] + ["train.recompute=true"] * again
    assert Planner(config, needs(1, True) - 1).proposal("kdops", 64) is None


@pytest.mark.slow
def test_the_command_refuses_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny(tmp_path, "facd")
    assert main(["plan", str(path), "--memory", "1GiB", "--patch", "16,4096", "--json"]) == 0
    out = capsys.readouterr()
    first, second = json.loads(out.out)["patches"]
    assert first["patch"] == 16
    assert all(plan["measured"] for plan in first["plans"])
    assert not any(plan["measured"] for plan in second["plans"])
    assert "reference:" in out.err
    assert "is refused: above 1.00 GiB" in out.err
    assert "most is taken by" in out.err


@pytest.mark.parametrize(("text", "size"), [("8GiB", 2**33), ("512M", 2**29), ("1.5 GB", 3 * 2**29), ("1000", 1000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_what_is_no_size_or_patch_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="give a size such as 8GiB"):
        parse_bytes("lots")
    with pytest.raises(InputError, match="0: give a size"):
        parse_bytes("0")
    for text in ("1.2.3GiB", ".", "1e999"):
        with pytest.raises(InputError, match="give a size such as 8GiB"):
            parse_bytes(text)
    assert main(["plan", str(write_tiny(tmp_path)), "--patch", "17"]) == 2
    assert "17 is not a multiple" in capsys.readouterr().err


def test_a_patch_that_the_method_refuses_is_not_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DUKD downscales inputs once more; the planner's own halves of a patch are held to it too."""
    path = write_tiny(tmp_path, "dukd")
    planner = Planner(load_config(path), 2**40)
    assert all(side % 4 == 0 for side in planner._sides())
    assert main(["plan", str(path), "--patch", "18"]) == 2
    assert "must be a multiple of 4" in capsys.readouterr().err


# --- recomputed activations ------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Two levels of blocks, one within the other."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 4, 3, padding=1)
        inner = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(4)]
        self.body = nn.Sequential(nn.Sequential(*inner[:2]), nn.Sequential(*inner[2:]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(self.head(x))
        return out


def test_recomputing_changes_neither_names_nor_gradients() -> None:
    torch.manual_seed(0)
    plain = Network()
    again = Network()
    again.load_state_dict(plain.state_dict())
    assert list(repeated_blocks(again)) == ["body.0", "body.1"]
    recompute(again, ["body.1"])
    x = torch.randn(2, 3, 8, 8)
    for network in (plain, again):
        network(x).square().sum().backward()
    assert list(plain.state_dict()) == list(again.state_dict())
    for one, two in zip(plain.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_a_tap_within_a_block_is_refused() -> None:
    with pytest.raises(InputError, match=r"the tap body\.0\.1 lies within a block"):
        recompute(Network(), ["body.0.1"])
    with pytest.raises(InputError, match="no repeated blocks"):
        recompute(nn.Conv2d(3, 3, 1), [])


def test_a_run_that_recomputes_learns_the_same(tmp_path: Path) -> None:
    """Bit for bit, on one thread and with an average of the weights."""
    from tests.trainers.tiny import assert_same_state, last_state
    from trainers.launch import train

    states = []
    for again in (False, True):
        folder = tmp_path / str(again)
        folder.mkdir()
        states.append(last_state(train(config_of(folder, "facd", recompute=again))))
    assert_same_state(*states)
